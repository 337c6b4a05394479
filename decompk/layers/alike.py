"""Whether K networks are one architecture: they may differ in the values of their tensors and in nothing else."""

from __future__ import annotations

import functools
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils.parametrize import is_parametrized

from ..errors import PackError
from ..shell import Rewritten, Shell
from .base import HOOKS, Twin, dotted

_BASE_ATTRIBUTES = vars(nn.Module()).keys()
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def check_members(members: list[nn.Module]) -> None:
    """Raise PackError, naming the module or tensor, unless the members can be packed."""
    if not members:
        raise PackError("pack needs at least one member.")
    for k, member in enumerate(members):
        if not isinstance(member, nn.Module):
            raise PackError(f"member {k} is not an nn.Module but {type(member).__name__}.")
    for path, module in members[0].named_modules():
        what = f"'{path}'" if path else "the network"
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            raise PackError(f"{what} is compiled; pack the plain modules and compile the packed one.")
        if isinstance(module, Shell | Twin) and not isinstance(module, Rewritten):
            raise PackError(f"{what} is packed already; unpack it first.")
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise PackError(f"{what} keeps extra state beside its tensors, which cannot be packed.")
    modules = [dict(member.named_modules(remove_duplicate=False)) for member in members]
    for k in range(1, len(members)):
        if only := sorted(modules[0].keys() ^ modules[k].keys()):
            raise PackError(f"members 0 and {k} differ: only one of them has a module '{only[0]}'.")
        for path, module in modules[0].items():
            _check_alike(k, path, module, modules[k][path])
    for k, member_modules in enumerate(modules):
        ties, names = _ties(member_modules), _ties(modules[0])
        if ties != names:
            name = next(n for n in names if names[n] != ties[n])
            raise PackError(f"'{name}' is shared with another module in only one of members 0 and {k}.")


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


def _check_alike(k: int, path: str, a: nn.Module, b: nn.Module) -> None:
    """Raise PackError where module `a` of member 0 and `b` of member k differ in more than their values."""
    what = f"'{path}'" if path else "the network"
    kinds = [type(m).__bases__ if is_parametrized(m) else type(m) for m in (a, b)]
    if kinds[0] is not kinds[1] and kinds[0] != kinds[1]:
        raise PackError(f"{what} is {type(a).__name__} in member 0 and {type(b).__name__} in member {k}.")
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
    for name in sorted(vars(a).keys() & vars(b).keys() - _BASE_ATTRIBUTES):
        if not _same(vars(a)[name], vars(b)[name]):
            raise PackError(f"'{dotted(path, name)}' has different values in members 0 and {k}; make them equal.")


def _check_tensors(k: int, name: str, a: Tensor | None, b: Tensor | None) -> None:
    if (a is None) != (b is None):
        raise PackError(f"only one of members 0 and {k} has a tensor '{name}'.")
    if a is None or b is None:
        return
    if isinstance(a, UninitializedTensorMixin) or isinstance(b, UninitializedTensorMixin):
        raise PackError(f"'{name}' has no shape yet; run a batch through every member first.")
    for fact in ("shape", "dtype", "device"):
        if getattr(a, fact) != getattr(b, fact):
            ours, theirs = (tuple(t.shape) if fact == "shape" else getattr(t, fact) for t in (a, b))
            raise PackError(f"'{name}' has {fact} {ours} in member 0 and {theirs} in member {k}.")
    if a.requires_grad != b.requires_grad:
        raise PackError(f"'{name}' requires a gradient in only one of members 0 and {k}; freeze it in all or none.")


def _same(a: Any, b: Any) -> bool:
    """Whether two plain attributes are equal; what cannot be compared counts as equal."""
    if type(a) is not type(b):
        return False
    if isinstance(a, nn.Parameter | nn.Module):
        return True  # compared where they are registered
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and (a.is_meta or torch.equal(a, b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, FunctionType):
        return a.__code__ is b.__code__ or a.__code__ == b.__code__
    if isinstance(a, functools.partial):
        return _same([a.func, a.args, a.keywords], [b.func, b.args, b.keywords])
    if isinstance(a, (*_PLAIN, range, set, frozenset, type, BuiltinFunctionType)):
        return bool(a == b)
    return True
