"""A packed network taken apart: one member alone, and modules that run member by member from now on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..fx.forward_code import is_users
from .bare import release
from .follow import own_module
from .per_member import PerMember, member_of, per_member_kind
from .stack import unhook
from .twin import Twin, deep_copy


def member_alone(net: nn.Module, k: int, copies: bool = True, parts: dict[int, Any] | None = None) -> nn.Module:
    """Member k of a packed `net` as an ordinary module of its own class; without `copies`, which shares what it can.

    parts: modules in the place of those that run member by member, by their ids; by default copies of member k's.
    """
    memo: dict[int, Any] = {} if parts is None else parts
    may_change = () if copies else _users_own(net)
    for tensor in (*net.parameters(), *net.buffers()):
        own, parameter = tensor.detach()[k], isinstance(tensor, nn.Parameter)
        lies = own.dim() > 3  # a kernel that lies channels_last makes its output lie so
        if copies or not parameter or lies or id(tensor) in may_change:
            own = own.clone(memory_format=torch.contiguous_format)
        memo[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if parameter else own
        if copies:
            unhook(tensor, k, memo[id(tensor)])
    if isinstance(net, PerMember):
        return member_of(net, k, memo)
    for shell in without_insides(net):
        if isinstance(shell, PerMember) and id(shell) not in memo:
            memo[id(shell)] = member_of(shell, k, memo)
    return _released(deep_copy(net, memo))


def sharing(net: nn.Module) -> dict[int, Any]:
    """id of every parameter → one in the same memory, or, where a user's code may change it, in other memory."""
    may_change = _users_own(net)
    values = {p: p.detach().clone() if id(p) in may_change else p.detach() for p in net.parameters()}
    return {id(p): nn.Parameter(value, p.requires_grad) for p, value in values.items()}


def _users_own(net: nn.Module) -> set[int]:
    """ids of the parameters that modules of a user's classes own, whose code may change them."""
    found = set()
    for module in net.modules():
        one = vars(module).get("_inner", module)
        if is_users(one._twin_class if isinstance(one, Twin) else type(one)):
            found |= {id(p) for p in one._parameters.values()}
    return found


def without_insides(module: nn.Module) -> Iterator[nn.Module]:
    """Every module once, but none inside a module that runs member by member."""
    seen: set[nn.Module] = set()
    queue = [module]
    while queue:
        module = queue.pop()
        if module not in seen:
            seen.add(module)
            yield module
            if not isinstance(module, PerMember):
                queue += reversed([child for child in module._modules.values() if child is not None])


def _released(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, Twin):
            module._twin_release()
        release(module)
    return net


def run_whole(net: nn.Module, K: int, path: str, reason: str) -> nn.Module:
    """The packed `net` with its module at `path` run member by member from now on; its tensors stay what they are."""
    module = net.get_submodule(path)
    if isinstance(module, PerMember):
        return net
    members = [own_module(member_alone(module, k)) for k in range(K)]
    _without_shells(module)
    for tensor in (*_released(module).parameters(), *module.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)  # as alone, where outputs lie like them
    shell = per_member_kind(module)(module, K, path, reason, members)
    for parent in [m for m in net.modules() if module in m._modules.values()]:
        parent._modules.update({name: shell for name, child in parent._modules.items() if child is module})
    return shell if path == "" else net


def apart_for_once(net: nn.Module, K: int) -> PerMember:
    """A packed `net`, which stays what it is, run member by member on its own tensors."""
    members = [own_module(member_alone(net, k)) for k in range(K)]
    stacks = _without_shells(deep_copy(net, {id(t): t for t in (*net.parameters(), *net.buffers())}))
    return PerMember(stacks, K, "", "", members)


def _without_shells(module: nn.Module) -> nn.Module:
    for parent in list(without_insides(module)):
        for name, child in parent._modules.items():
            if isinstance(child, PerMember):
                parent._modules[name] = child._inner
    return module


@dataclass
class Changes:
    """What a rehearsal changes in a network: layers whose output is laid out as alone, modules that run by members."""

    contiguous: list[str] = field(default_factory=list)
    whole: dict[str, str] = field(default_factory=dict)

    def applied(self, net: nn.Module, K: int) -> nn.Module:
        for path in self.contiguous:
            layer = net.get_submodule(path)
            if isinstance(layer, Twin):
                layer._twin_contiguous = True
        for path, reason in self.whole.items():
            net = run_whole(net, K, path, reason)
        return net
