"""Whether K networks are one architecture: they may differ in the values of their tensors and in nothing else."""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils.parametrize import is_parametrized

from ..errors import PackError
from ..fx.forward_code import attributes, is_changeable, read_forward
from ..fx.held import inside, opaque, walked
from ..fx.wrapper import Rewritten, Shell
from .stack import hooks_of
from .twin import HOOKS, Twin, dotted

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def listed(members: Any) -> list[nn.Module]:
    """The members as a list. Raises PackError, with the right call, where they are no sequence of networks."""
    if isinstance(members, nn.ModuleDict | Mapping):
        raise PackError("pack takes the members in a list, not in a dict: pack(list(members.values())).")
    if isinstance(members, nn.Module) and not isinstance(members, nn.ModuleList):
        raise PackError(
            f"pack takes a list of networks, not one {type(members).__name__}: build each member, "
            "pack([make() for _ in range(K)])."
        )
    if not isinstance(members, Iterable):
        raise PackError(f"pack takes a list of networks, pack([m1, m2, …]), not {_noun(members)}.")
    members = list(members)
    if not members:
        raise PackError("pack needs at least one member.")
    for k, member in enumerate(members):
        if isinstance(member, type) or (callable(member) and not isinstance(member, nn.Module)):
            raise PackError(f"member {k} is {_noun(member)}, not a network: call it for every member.")
        if not isinstance(member, nn.Module):
            raise PackError(f"member {k} is not an nn.Module but {type(member).__name__}.")
    return members


def _noun(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"the function {value.__name__}" if isinstance(value, FunctionType) else type(value).__name__


def check_members(members: list[nn.Module]) -> dict[str, str]:
    """Raise PackError, naming the module or tensor, unless the members can be packed.

    → the modules that have to run member by member, since members hold other things there than tensors alone can be
    stacked of, and why.
    """
    for path, module in members[0].named_modules():
        what = f"'{path}'" if path else "the network"
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            raise PackError(f"{what} is compiled; pack the plain modules and compile the packed one.")
        if isinstance(module, Shell | Twin) and not isinstance(module, Rewritten):
            raise PackError(f"{what} is packed already; unpack it first.")
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise PackError(f"{what} keeps extra state beside its tensors, which cannot be packed.")
    modules = [dict(member.named_modules(remove_duplicate=False)) for member in members]
    for k, own in enumerate(modules):
        _check_captures(own, k)
    apart: dict[str, str] = {}
    for k in range(1, len(members)):
        if only := sorted(modules[0].keys() ^ modules[k].keys()):
            raise PackError(f"members 0 and {k} differ: only one of them has a module '{only[0]}'.")
        registered = _registered(modules[0]) | _registered(modules[k])
        for path, module in modules[0].items():
            _check_module(k, path, module, modules[k][path])
            for name, kind in _differences(module, modules[k][path], registered):
                where = path if kind == "own" else _keeper(modules[0], path, name)
                if where is None:
                    what = dotted(path, name)
                    if kind == "absent":
                        raise PackError(f"only one of members 0 and {k} has an attribute '{what}'; give it to all.")
                    raise PackError(f"'{what}' has different values in members 0 and {k}; make them equal.")
                apart.setdefault(where, f"'{name}' is each member's own")
    for k, member_modules in enumerate(modules):
        ties, names = _ties(member_modules), _ties(modules[0])
        if ties != names:
            name = next(n for n in names if names[n] != ties[n])
            raise PackError(f"'{name}' is shared with another module in only one of members 0 and {k}.")
    return apart


def _registered(modules: dict[str, nn.Module]) -> set[int]:
    """ids of a member's modules, parameters and buffers."""
    tensors = [t for m in modules.values() for t in (*m._parameters.values(), *m._buffers.values())]
    return {id(part) for part in (*modules.values(), *tensors) if part is not None}


def _keeper(modules: dict[str, nn.Module], path: str, name: str) -> str | None:
    """The module whose code assigns or fills the attribute `name` of the one at `path`: itself, or one around it.

    Or one that holds the same object.
    """
    value = vars(modules[path]).get(name)
    held = [(p, n) for p, m in modules.items() for n, v in attributes(m).items() if v is value and is_changeable(v)]
    for where, called in [(path, name), *held]:
        around = [where.rsplit(".", n)[0] for n in range(where.count(".") + 1)] + [""] * (where != "")
        for one in around:
            code = read_forward(modules[one])
            if called in code.stored | code.filled:
                return one
    return None


def _ties(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Each tensor's name → the first name of the same tensor."""
    first: dict[int, str] = {}
    names = {}
    for path, module in modules.items():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                full = dotted(path, name)
                names[full] = first.setdefault(id(tensor), full)
    return names


def _check_module(k: int, path: str, a: nn.Module, b: nn.Module) -> None:
    """Raise PackError where module `a` of member 0 and `b` of member k differ in more than their values."""
    what = f"'{path}'" if path else "the network"
    kinds = [type(m).__bases__ if is_parametrized(m) else type(m) for m in (a, b)]
    if kinds[0] is not kinds[1] and kinds[0] != kinds[1]:
        names = [f"{kind.__module__}.{kind.__qualname__}" for kind in (type(a), type(b))]
        if names[0] == names[1]:
            raise PackError(
                f"{what} is of two classes named {names[0]} in members 0 and {k}: define the class once, outside of "
                "the function that makes a member."
            )
        if type(a).__name__ != type(b).__name__:
            names = [type(a).__name__, type(b).__name__]
        raise PackError(f"{what} is {names[0]} in member 0 and {names[1]} in member {k}.")
    if a.extra_repr() != b.extra_repr():
        raise PackError(f"{what} is {a._get_name()}({a.extra_repr()}) in member 0, ({b.extra_repr()}) in member {k}.")
    if a.training != b.training:
        raise PackError(f"{what} is in train mode in only one of members 0 and {k}; give all members one mode.")
    if [len(getattr(a, hooks)) for hooks in HOOKS] != [len(getattr(b, hooks)) for hooks in HOOKS]:
        raise PackError(f"{what} has different hooks in members 0 and {k}.")
    for store in ("_parameters", "_buffers"):
        ours, theirs = getattr(a, store), getattr(b, store)
        for name in sorted(ours.keys() | theirs.keys()):
            _check_tensors(k, dotted(path, name), ours.get(name), theirs.get(name))


def _check_tensors(k: int, name: str, a: Tensor | None, b: Tensor | None) -> None:
    if (a is None) != (b is None):
        raise PackError(f"only one of members 0 and {k} has a tensor '{name}'.")
    if a is None or b is None:
        return
    for tensor in (a, b):
        if nn.Parameter in type(tensor).__mro__[1:] and not isinstance(tensor, UninitializedTensorMixin):
            raise PackError(
                f"'{name}' is a {type(tensor).__name__}, and a stack of them is an nn.Parameter: make it one."
            )
    if isinstance(a, UninitializedTensorMixin) or isinstance(b, UninitializedTensorMixin):
        raise PackError(f"'{name}' has no shape yet; run a batch through every member first.")
    for fact in ("shape", "dtype", "device"):
        if getattr(a, fact) != getattr(b, fact):
            ours, theirs = (tuple(t.shape) if fact == "shape" else getattr(t, fact) for t in (a, b))
            raise PackError(f"'{name}' has {fact} {ours} in member 0 and {theirs} in member {k}.")
    if a.requires_grad != b.requires_grad:
        raise PackError(f"'{name}' requires a gradient in only one of members 0 and {k}; freeze it in all or none.")


def _differences(a: nn.Module, b: nn.Module, registered: set[int]) -> Iterator[tuple[str, str]]:
    """(name, how) of plain attributes that differ: "own", where a member by itself has its own; "value"; "absent"."""
    ours, theirs = attributes(a), attributes(b)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            yield name, "absent"
        elif how := _difference(ours[name], theirs[name], set(registered)):
            yield name, how


def _difference(a: Any, b: Any, known: set[int]) -> str:
    """How two plain attributes differ: "" not at all, "own" in tensors or objects' insides, "value" otherwise.

    known: ids of what is compared elsewhere, or has been; what cannot be compared counts as equal.
    """
    if a is b or (id(a) in known and id(b) in known):
        return ""
    if type(a) is not type(b):
        return "value"
    if isinstance(a, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and (a.is_meta or torch.equal(a, b))
        return "" if same else "own"
    if isinstance(a, np.ndarray):
        return "" if np.array_equal(a, b) else "own"
    if isinstance(a, (*_PLAIN, range, set, frozenset, type, BuiltinFunctionType)):
        return "" if a == b or (a != a and b != b) else "value"
    known |= {id(a), id(b)}
    if isinstance(a, FunctionType):
        return _worst(inside(a), inside(b), known) if a.__code__ == b.__code__ else "value"
    if isinstance(a, MethodType):
        return _worst([a.__func__, a.__self__], [b.__func__, b.__self__], known)
    if isinstance(a, functools.partial):
        return _worst([a.func, a.args, a.keywords], [b.func, b.args, b.keywords], known)
    if isinstance(a, dict):
        return _worst(list(a.values()), list(b.values()), known) if a.keys() == b.keys() else "value"
    if isinstance(a, list | tuple | deque):
        return _worst(a, b, known)
    if not opaque(a):  # a member alone uses its own object, whatever is in it
        return "own" if _difference(vars(a), vars(b), known) else ""
    return ""


def _worst(a: Sequence, b: Sequence, known: set[int]) -> str:
    if len(a) != len(b):
        return "value"
    found = {_difference(x, y, known) for x, y in zip(a, b, strict=True)}
    return next((how for how in ("value", "own") if how in found), "")


# ---- what no copy reaches -------------------------------------------------------------------------------------------


def _check_captures(modules: dict[str, nn.Module], k: int) -> None:
    """Raise PackError where a function that member k holds, or has as a hook, closes over the member's own parts.

    A copy of the member would go on using the original's: functions and weak references are not copied.
    """
    names = {id(m): path or "the network" for path, m in modules.items()}
    for path, module in modules.items():
        for store in (module._parameters, module._buffers):
            names.update({id(t): dotted(path, name) for name, t in store.items() if t is not None})
    for path, module in modules.items():
        hooks = {name: value for name, value in vars(module).items() if "hooks" in name}
        for name, value in {**attributes(module), **hooks}.items():
            if part := _captured(value, names):
                what = f"a hook of '{path or type(module).__name__}'" if name in hooks else f"'{dotted(path, name)}'"
                raise PackError(f"{what} in member {k} closes over {_quoted(part)}, {_REMEDY}.")
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None and (part := _reached(list(hooks_of(t)), names)):
                what = f"a gradient hook of '{dotted(path, name)}' in member {k}"
                raise PackError(f"{what} uses {_quoted(part)}, {_GRADIENT_REMEDY}.")


_REMEDY = "which a copy of the member would not have as its own: make it a method, or hand that over as an argument"
_GRADIENT_REMEDY = "which the packed one has as a stack: have it hold copies of the tensors that it needs"


def _quoted(part: str) -> str:
    return part if part == "the network" else f"'{part}'"


def _captured(value: Any, names: dict[int, str]) -> str:
    """The part of the member that a function or weak reference inside `value` holds; "" if none does."""
    for part in walked(value, lambda part: isinstance(part, Tensor | nn.Module)):
        if isinstance(part, FunctionType) and (found := _reached(inside(part), names)):
            return found
        if isinstance(part, weakref.ref) and isinstance(part(), nn.Module) and id(part()) in names:
            return names[id(part())]
    return ""


def _reached(value: Any, names: dict[int, str]) -> str:
    """The part of the member that `value` is or holds, however deep; "" if none."""
    found = (names[id(part)] for part in walked(value, lambda part: id(part) in names) if id(part) in names)
    return next(found, "")
