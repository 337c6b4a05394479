"""The members of a packed network apart, each through its whole network on slices of the stacks; kept between calls."""

from __future__ import annotations

import functools
import operator
import random
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import brief
from ..fx.forward_code import read_forward
from ..fx.unseen import seeded, unseen
from ..fx.wrapper import Rewritten, Shell, innermost
from ..threads import Turn
from .follow import Noted, own_module
from .fused_layer import unhooked
from .per_member import PerMember, of_torch
from .rehearsal import Way
from .surgery import member_alone, sharing
from .twin import Twin, deep_copy
from .watch import drop_hooks

if TYPE_CHECKING:
    from .module import Packed


@dataclass
class Call:
    """One tensor given to a packed network: x (N, …), shared by all members, or (K, N, …), and how its kind runs."""

    packed: Packed
    x: Tensor
    shared: bool
    N: int
    way: Way

    @functools.cached_property
    def standing(self) -> Standing:
        return self.packed._plans.standing(self.packed)

    def parts(self, x: Tensor) -> list[Tensor]:
        """What each member gets of x, which is like the call's."""
        if not self.shared:
            return list(x.unbind(0))
        if self.packed._crops:
            return [crop.cut(x).clone() for crop in self.packed._crops]  # dense, as in the rows of all members
        return [x] * self.packed._K


class KeptMembers(PerMember):
    """The members of packed modules `net`, which run as they do; made anew where a module of `net` changes.

    Parts that run member by member are the very ones: what their forward keeps between calls is kept in one place.
    """

    def __init__(self, net: nn.Module, K: int):
        shells = [m for m in net.modules() if isinstance(m, PerMember)]
        own = [{id(shell): shell._members[k] for shell in shells} for k in range(K)]
        members = [own_module(_member(net, k, dict(parts)), parts.values()) for k, parts in enumerate(own)]
        super().__init__(net, K, "", "", members)
        vars(self).update(_turn=_Turns([self._turn, *(shell._turn for shell in shells)]))

    def _bring_over(self) -> None:
        """Nothing: see `Standing.holds`, and `Standing.members`."""


class _Turns:
    """The turns of all that members are made of."""

    def __init__(self, turns: Sequence[Turn]):
        self._turns = turns

    def __enter__(self) -> None:
        for turn in self._turns:
            turn.__enter__()

    def __exit__(self, *error: Any) -> None:
        for turn in reversed(self._turns):
            turn.__exit__(*error)


def _member(net: nn.Module, k: int, parts: dict[int, Any] | None = None) -> nn.Module:
    """Member k of packed modules `net`, which lays out images where its twin does.

    parts: what stands in it for modules that run member by member, by their ids; by default copies.
    """
    member = member_alone(net, k, copies=False, parts=parts)
    for twin, layer in zip(net.modules(), member.modules(), strict=True):
        if isinstance(twin, Twin) and twin._twin_contiguous:
            layer.register_forward_hook(_contiguous)
    return member


def _contiguous(layer: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out.contiguous()


class Standing:
    """The modules of a packed network as they are now, and what was made of them.

    why_not: why its members cannot run apart, each through its whole network, whatever the call; None if they can.
    """

    def __init__(self, packed: Packed):
        net = packed._inner
        modules = [m for m in net.modules() if not isinstance(m, PerMember)]
        modules += [m._inner for m in net.modules() if isinstance(m, PerMember | Rewritten)]
        self._shells = [m for m in net.modules() if isinstance(m, PerMember)]
        inside = {part for shell in self._shells for part in shell._inner.modules()}
        why_not = (_why_not_apart(m, m in inside) for m in modules)
        self.why_not = packed._WHY_NOT_APART or next(filter(None, why_not), None)
        self.is_sparse = any(getattr(m, "sparse", False) for m in modules)
        self._noted = [Noted(m) for m in modules]
        self._leaves: dict[int, tuple[weakref.ref[Tensor], tuple, list[Tensor]]] = {}
        self._tried: dict[Any, str | None] = {}
        self._members: PerMember | None = None
        self._made_of: list[Any] = []

    def holds(self) -> bool:
        """Whether no module has changed since, in mode, attributes, hooks or children."""
        return all(noted.holds() for noted in self._noted)

    def leaves(self, stack: Tensor) -> Sequence[Tensor]:
        """The K slices of a stack, in its memory, as tensors whose graphs begin there; a parameter's are kept."""
        key, lies = id(stack), (stack.data_ptr(), stack.stride(), stack.shape, stack.dtype, stack.requires_grad)
        kept = self._leaves.get(key)
        if kept is not None and kept[0]() is stack and kept[1] == lies:
            return kept[2]
        if not stack.requires_grad:  # each counts its own changes: another member's are nothing to its graph
            return [part.data for part in stack.unbind(0)]
        # They share the stack's count, by which a graph notices that a weight is no longer what it was.
        found = [part.requires_grad_() for part in stack.detach().unbind(0)]
        gone = functools.partial(_forget, weakref.ref(self), key)
        self._leaves[key] = weakref.ref(stack, gone), lies, found
        return found

    def members(self, packed: Packed) -> PerMember:
        """The members, which share the packed network's tensors."""
        net = packed._inner
        if isinstance(net, PerMember):
            return net
        for shell in self._shells:
            with shell._turn:
                shell._bring_over()
        made_of = [shell._was for shell in self._shells]  # another list where its members' modules are others
        if self._members is None or not all(map(operator.is_, made_of, self._made_of)):
            self._members, self._made_of = KeptMembers(net, packed._K), made_of
        return self._members

    def why_not_for(self, call: Call) -> str | None:
        """`why_not`, or why members cannot run apart in calls of this kind: one of them tries it first, unseen."""
        if self.why_not:
            return self.why_not
        hooked = next((shell for shell in self._shells if not unhooked(shell)), None)
        if hooked is not None:
            return f"{type(innermost(hooked)).__name__} has hooks"
        if call.way.random or call.way.draws:
            return _DRAWS
        x = call.x
        kind = (x.shape, x.dtype, call.shared, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
        if kind not in self._tried:
            self._tried[kind] = _tried(call)
        return self._tried[kind]


def _forget(standing: weakref.ref[Standing], key: int, stack: object) -> None:
    """A parameter is no more: nor need its slices be."""
    if (one := standing()) is not None:
        one._leaves.pop(key, None)


_DRAWS = "its forward draws random numbers"


def unseen_copy(packed: Packed) -> Packed:
    """A copy whose parameters share memory with those of `packed`, unless a user's code may change them.

    Hooks, buffers and gradients are its own.
    """
    memo: dict[int, Any] = sharing(packed._inner)
    new = packed._copied(deep_copy(packed._inner, memo))
    drop_hooks(new._inner)
    return new


def _tried(call: Call) -> str | None:
    """What keeps the first member from running apart on this call, as a copy of it shows, if anything does."""
    with unseen(), seeded(0, ()):
        member = _member(call.packed._inner, 0)
        for own, stack in zip(member.parameters(), call.packed._inner.parameters(), strict=True):
            own.data = stack.detach()[0].clone()  # which lies as its slice does
        x = call.parts(call.x.detach().clone())[0].requires_grad_(call.x.requires_grad)
        before = _random_states(), x._version
        try:
            member(x)
        except Exception as error:  # whatever its code raises where it is alone
            return f"a member alone raises: {brief(error)}"
        if x._version != before[1]:
            return "its forward changes its input"
        return None if _random_states() == before[0] else _DRAWS


def _random_states() -> tuple:
    pythons, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    return pythons, numpys[1].tobytes(), numpys[2:], torch.get_rng_state().numpy().tobytes()


def _why_not_apart(module: nn.Module, by_member: bool) -> str | None:
    """by_member: whether it runs member by member anyhow: what each keeps between calls is its own."""
    name = type(module).__name__
    if not unhooked(module):
        return f"{name} has hooks, or a forward of its own"
    if isinstance(module, Shell) and not isinstance(module, Rewritten):
        return f"{name} is a network around another"
    if by_member or isinstance(module, Twin) or of_torch(module):
        return None
    code = read_forward(module)
    kept = min(code.stored | code.filled, default=None)
    return f"the forward of {name} keeps '{kept}'" if kept else None
