"""K networks of one architecture as one module, activations member-major: members ↔ packed."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..crops import Part
from ..errors import PackError, PartitionError, brief
from ..fx.wrapper import Shell, innermost
from ..kernels.backend import EXACT
from .architecture import check_members, listed
from .bare import adopt
from .follow import own_module
from .module import Packed, warn
from .per_member import PerMember, per_member_kind
from .selection import input_dims_of, selected
from .stack import hook, laid_out, stacked
from .surgery import without_insides
from .twin import Twin, deep_copy


def pack(
    members: Sequence[nn.Module],
    crops: Sequence[Part] | None = None,
    *,
    input_dims: int | None = None,
    member_by_member: Collection[str] = (),
    shared: Collection[str] | None = None,
    rehearse: bool = True,
) -> Packed:
    """K networks of one architecture as one module that trains them all, each as if it were alone.

    The members stay as they are; the packed module holds copies. With `crops`, one per member, the module takes the
    global batch and cuts it. `input_dims` is the number of dimensions of one member's batch, needed where the first
    layer does not tell it. `member_by_member` names modules to run whole, once per member, beside those that are found
    to need it: the members' own code sees all K·N samples at once, so where it mixes samples, or moves them out of
    dimension 0, it must run so. `describe()` lists what does. `shared` names arguments of forward, beside the first,
    that are the same for all members, where the first call shall not find out; `rehearse=False` skips all that
    it does (see Packed). Raises PackError where the members differ in more than their values.
    """
    members = listed(members)
    apart = check_members(members)
    K, first = len(members), members[0]
    if crops is not None:
        crops = tuple(crops)
        if len(crops) != K:
            raise PackError(f"{len(crops)} crops do not fit {K} members; give each member its crop.")
        if any(crop.size != crops[0].size for crop in crops):
            raise PartitionError(f"crops of unequal size {sorted({c.size for c in crops})} cannot be packed.")
        input_dims = input_dims or 2 + len(crops[0].size)
    takes = inspect.signature(innermost(first).forward).parameters
    for name in shared or ():
        if name not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            raise PackError(f"shared names '{name}', which is no argument of {type(first).__name__}.forward.")
    twins, whole = selected(first, member_by_member, apart, rehearse)

    memo: dict[int, Any] = _stack_tensors(members, {path for path, kind in twins.items() if kind._twin_dims == 4})
    for path, reason in whole.items():
        module = first.get_submodule(path)
        if not isinstance(memo.get(id(module)), PerMember):
            inner = _copy(module, memo)
            own = [own_module(member.get_submodule(path)) for member in members]
            memo[id(module)] = per_member_kind(module)(inner, K, path, reason, own)
    net = _copy(first, memo)
    for path, kind in twins.items():
        leaf = net.get_submodule(path)
        if not isinstance(leaf, Twin):  # registered under two names
            kind._twin_adopt(leaf, K, path)
    for module in without_insides(net):
        if not isinstance(module, Twin | Shell) and any(p is not None for p in module._parameters.values()):
            adopt(module)
    if whole.get("", "asked for") != "asked for" and K > 1:
        name = type(innermost(first)).__name__
        warn(f"{name}: the network runs member by member, no faster than alone: {whole['']}.")
    return Packed(net, K, crops, input_dims or input_dims_of(first), shared, rehearse, told=input_dims is not None)


def _copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy, with `memo` for what stands for something else, to which all that is copied is added."""
    try:
        return deep_copy(module, memo)
    except Exception as error:  # whatever the module's attributes raise
        raise PackError(f"member 0 cannot be copied, which packing needs: {brief(error)}.") from error


def _stack_tensors(members: list[nn.Module], channels_last: set[str]) -> dict[int, Tensor]:
    """id of each tensor of member 0 → all members' in one; a tensor shared inside a member stays shared."""
    modules = [dict(member.named_modules(remove_duplicate=False)) for member in members]
    stacks: dict[int, Tensor] = {}
    for path, module in modules[0].items():
        for store in ("_parameters", "_buffers"):
            for name, tensor in getattr(module, store).items():
                if tensor is None or id(tensor) in stacks:
                    continue
                own = [getattr(m[path], store)[name] for m in modules]
                stack = stacked(own, store == "_parameters")
                if path in channels_last and stack.dtype not in EXACT:
                    stack.data = laid_out(stack.data, torch.channels_last)
                hook(stack, own)
                stacks[id(tensor)] = stack
    return stacks
