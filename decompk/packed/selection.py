"""Which modules of a network become twins, and which run whole, once per member."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Mapping
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import PackError
from ..fx.forward_code import attributes, is_changeable, read_forward, why_not_packed
from ..fx.held import walked
from ..fx.wrapper import Rewritten
from .bare import is_bare
from .norm_then import twin_of_norm
from .twin import HOOKS, Twin, dotted
from .twins import TWINS

_ALONG_DIM = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.CosineSimilarity, nn.Unflatten)

# What a subclass may define and still compute what its base computes.
_HARMLESS = {
    *("__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "__annotate_func__", "__parameters__"),
    *("__annotations_cache__", "__firstlineno__", "__static_attributes__", "__orig_bases__", "__classcell__"),
    *("__constants__", "__repr__", "extra_repr", "reset_parameters"),
}


def selected(
    first: nn.Module, named: Collection[str], apart: Mapping[str, str], rehearse: bool
) -> tuple[dict[str, type[Twin]], dict[str, str]]:
    """Which modules become twins, and which run member by member and why; inside these nothing is replaced.

    `named`: those that the user wants to run so; `apart`: those in which members hold things of their own, and why;
    `rehearse`: whether a first call finds out where that is wrong.
    """
    modules = dict(first.named_modules(remove_duplicate=False))
    for path in named:
        if path not in modules:
            raise PackError(f"member_by_member names '{path}', which is no module of {type(first).__name__}.")
    for path, module in modules.items():
        # Its samples are in dimension 1, perhaps its callers' too; only the network's own input surely has them first.
        if getattr(module, "batch_first", True) is False:
            return {}, {"": f"'{path}' has batch_first=False"}

    while True:
        twins, whole = _visited(first, modules, named, apart, rehearse)
        wider = entangled(modules, whole)
        if not wider:
            return twins, whole
        apart = {**apart, **wider}


def _visited(
    first: nn.Module, modules: dict[str, nn.Module], named: Collection[str], apart: Mapping[str, str], rehearse: bool
) -> tuple[dict[str, type[Twin]], dict[str, str]]:
    twins: dict[str, type[Twin]] = {}
    whole: dict[str, str] = {}

    def visit(path: str, module: nn.Module) -> None:
        if path in named:
            whole[path] = "asked for"
        elif path in apart:
            whole[path] = apart[path]
        elif kind := twin_of(module):
            twins[path] = kind
        elif reason := why_member_by_member(module, rehearse):
            whole[path] = reason
        else:
            for name, child in module.named_children():
                visit(dotted(path, name), child)
            prefix = f"{path}." if path else ""
            below = {name: store for store in (twins, whole) for name in store if name.startswith(prefix)}
            if reason := _noticed(module, {name: modules[name] for name in below}, whole):
                for name, store in below.items():
                    del store[name]
                whole[path] = reason

    visit("", first)
    return twins, whole


def entangled(modules: dict[str, nn.Module], whole: Collection[str]) -> dict[str, str]:
    """Modules around those in `whole` that have to run member by member in their stead, and why.

    Members' copies of a module hold copies of what its attributes hold: other modules, tensors of theirs, and what
    several modules change together have to be inside.
    """
    wider: dict[str, str] = {}
    homes = {id(part): path for path, module in modules.items() for part in _registered(module)}
    for path in whole:
        inside = {id(part) for module in modules[path].modules() for part in _registered(module)}
        for below, module in modules.items():
            held = {**attributes(module), **{hooks: getattr(module, hooks) for hooks in HOOKS}}
            for name, value in held.items() if is_in(below, path) else ():
                for part in walked(value, lambda part: id(part) in homes):
                    if not is_in(home := homes.get(id(part), path), path) and id(part) not in inside:
                        wider[_around(path, home)] = f"'{dotted(below, name)}' holds a part of '{home}'"
    holders: dict[int, list[str]] = {}
    for path, module in modules.items():
        for value in attributes(module).values():
            holders.setdefault(id(value), []).append(path)
    shared = {key: paths for key, paths in holders.items() if len(set(paths)) > 1}
    for path, module in modules.items():
        names = [name for name, value in attributes(module).items() if id(value) in shared and is_changeable(value)]
        for name in sorted(set(names) & read_forward(module).filled) if names else ():
            around = functools.reduce(_around, shared[id(vars(module)[name])])
            if not any(is_in(around, one) for one in whole):
                wider[around] = f"its parts share '{name}', which '{path}' changes"
    return wider


def _registered(module: nn.Module) -> list:
    """A module, its parameters and its buffers."""
    return [module, *(t for store in (module._parameters, module._buffers) for t in store.values() if t is not None)]


def is_in(path: str, around: str) -> bool:
    return not around or path == around or path.startswith(f"{around}.")


def _around(a: str, b: str) -> str:
    """The path of the innermost module around those at `a` and `b`."""
    while not is_in(b, a):
        a = a.rpartition(".")[0]
    return a


def _noticed(module: nn.Module, below: dict[str, nn.Module], whole: Collection[str]) -> str | None:
    """What forward would notice of the stand-ins below, which are wrapped if in `whole` and else twins, if anything."""
    code = read_forward(module)
    for path, part in below.items():
        if isinstance(part, tuple(code.classes if path in whole else code.exact)):
            return f"its forward asks what kind of module '{path}' is"
        if path in whole and type(part).forward is nn.Module.forward:
            return f"'{path}' holds tensors and has no forward"
        for name in sorted(code.foreign | code.called | {"forward"}) if path in whole else ():
            known = name != "forward" and hasattr(nn.Module, name)
            if not known and _takes_no_samples(getattr(type(part), name, None)):
                return f"it uses '{path}.{name}' without samples"
    return None


def _takes_no_samples(value: Any) -> bool:
    return isinstance(value, property) or (
        isinstance(value, FunctionType) and list(inspect.signature(value).parameters) == ["self"]
    )


def twin_of(leaf: nn.Module) -> type[Twin] | None:
    """The twin that computes what `leaf` computes; None for an unknown kind, or a leaf that needs none."""
    if "forward" in vars(leaf) or any(getattr(leaf, hooks) for hooks in HOOKS):
        return None
    for klass in type(leaf).__mro__:
        if klass in TWINS:
            return TWINS[klass] if TWINS[klass]._twin_fits(leaf) else None
        if not vars(klass).keys() <= _HARMLESS:
            return twin_of_norm(leaf)
    return None


def why_member_by_member(module: nn.Module, rehearse: bool = True) -> str | None:
    """Why a module without a twin has to run whole, once per member; None where its parts can be packed."""
    if any(getattr(module, hooks) for hooks in HOOKS):
        return "it has hooks"
    if isinstance(module, Rewritten) and module._reads_tensors:
        return "its edited graph reads parameters of its parts"
    if is_parametrized(module):
        return "it is parametrized"
    own = [name for store in (module._parameters, module._buffers) for name, t in store.items() if t is not None]
    if own and type(module).__module__.startswith("torch.nn."):
        return f"no twin for this {type(module).__name__}"
    if own and not (rehearse and is_bare(module)):
        return f"it owns '{own[0]}'"
    if isinstance(module, _ALONG_DIM) and module.dim in (0, None):  # None takes 0 of three dimensions
        return "it works along the samples"
    if getattr(module, "mode", None) == "batch" and not type(module).__module__.startswith("torch.nn."):
        return "it draws one random number per batch"
    return why_not_packed(module)


def input_dims_of(first: nn.Module) -> int | None:
    """Dimensions of the batch that the first layer with parameters takes, where its kind tells."""
    for module in first.modules():
        for klass in type(module).__mro__:
            if klass in TWINS:
                return TWINS[klass]._twin_dims
        if not module._modules and module._parameters:
            return None
    return None
