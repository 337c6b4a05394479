"""A kind of call tried on a few samples: through one member alone, and through all of them packed."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import PackError
from ..fx.forward_code import is_plain_object
from ..fx.pytree import leaves, tensors_of, tree_map
from ..fx.unseen import OwnDraws, seeded
from ..kernels.backend import resumed
from .per_member import PerMember
from .surgery import Changes, member_alone, sharing, without_insides
from .twin import Twin, deep_copy, packed_batch, rehearsal_of
from .watch import Watch, drop_hooks

COUNTS = (2, 3, 5, 7, 11)  # samples of a rehearsal: the first of which no other size is a multiple


class Rows(NamedTuple):
    """Where an argument has its samples: in dimension `dim` of one member's, which is `own` or shared by all.

    Of members that run apart nobody asks for the dimension.
    """

    dim: int | None
    own: bool


SAME = None  # the role of an argument that is handed to all members as it is
Role = Rows | None


@dataclass
class Trial:
    """One kind of call of `net`, K packed members, on its arguments; `cut` gives member k's part of the first tensor.

    shared: whether the first tensor is one batch of N samples for all members; else it is (K, N, …).
    """

    net: nn.Module
    K: int
    args: tuple
    kwargs: dict[str, Any]
    shared: bool
    N: int
    cut: Callable[[Tensor, int], Tensor] | None = None

    def __post_init__(self) -> None:
        self.tensors = tensors_of((self.args, self.kwargs))
        self.anchor = next((i for i, t in enumerate(self.tensors) if t.dim()), None)
        taken = {size for t in self.tensors for size in t.shape[: 2 if self.shared else 3]}
        taken |= {size for t in (*self.net.parameters(), *self.net.buffers()) for size in t.shape[1:2]}
        taken.add(self.N)
        fits = [n for n in COUNTS if not any(size and (size % (self.K * n) == 0 or size == n) for size in taken)]
        # the conditions of a run
        self.roles: Sequence[Role] = ()  # each tensor's
        self.count = (fits or COUNTS[1:])[0]
        self.scale = 1.0  # of the samples
        self.dtype: torch.dtype | None = None  # if not what the user has it run in
        self.grad = torch.is_grad_enabled()
        self.evaluates = False
        self.own_draws = False  # from numbers that no other thread draws
        # what the last runs leave: copies of the network, paths of its modules, arguments that have changed
        self.member: nn.Module | None = None
        self.packed: nn.Module | None = None
        self.shells: list[PerMember] = []
        self._ran: dict[int, str] = {}
        self._changed: list[str | int] = []

    @contextlib.contextmanager
    def under(self, **conditions: Any) -> Iterator[None]:
        """What runs meanwhile runs under other conditions."""
        before = {name: getattr(self, name) for name in conditions}
        vars(self).update(conditions)
        try:
            yield
        finally:
            vars(self).update(before)

    def runs(self, roles: Sequence[Role], left: int | None = None) -> bool:
        """Whether a member alone takes its parts of the arguments, tensor `left` with another number of samples."""
        try:
            with self.under(roles=roles):
                self.alone(left=left)
        except Exception:  # whatever a network raises at arguments that do not fit each other
            return False
        return True

    def alone(self, left: int | None = None, nudge: float = 0.0, seed: int = 0, watch: Watch = None) -> Any:
        """What the last member returns alone.

        left: a tensor that keeps another number of samples. nudge: how far its parameters are off, relatively.
        """
        k = self.K - 1
        net = self._posed(member_alone(self.net, k, copies=False))
        for i, p in enumerate(net.parameters() if nudge else ()):
            wave = torch.cos(torch.arange(p.numel(), dtype=torch.float64, device=p.device) + i)
            p.data = p.data * (1 + nudge * wave).view(p.shape).to(p.dtype)
        parts = [self._up(self._part(i, role, k, self.count + (i == left))) for i, role in enumerate(self.roles)]
        args, kwargs = self._given(parts)
        same = {id(part) for part, role in zip(parts, self.roles, strict=True) if role is SAME}
        given = {**dict(enumerate(args)), **kwargs}
        before = {name: _state(value, same) for name, value in given.items()}
        with self.conditions(seed), watch(net) if watch else contextlib.nullcontext():
            out = net(*args, **kwargs)
        self.member = net
        self._changed = [name for name, state in before.items() if _state(given[name], same) != state]
        return out

    def together(self, changes: Changes, watch: Watch = None, others: float = 1.0, alike: bool = False) -> Any:
        """What all members return together, as rows.

        others: a factor of the samples of all but the last. alike: all have the last one's samples.
        """
        memo = sharing(self.net)
        net = self._posed(changes.applied(deep_copy(self.net, memo), self.K))
        factors = [others] * (self.K - 1) + [1.0]
        order = [self.K - 1] * self.K if alike else range(self.K)
        parts = [
            self._up(
                self.tensors[i]
                if r is SAME
                else torch.cat([self._part(i, r, k, self.count, f) for k, f in zip(order, factors, strict=True)], r.dim)
            )
            for i, r in enumerate(self.roles)
        ]
        args, kwargs = self._given(parts)
        self._ran, self.packed = {id(m): path for path, m in net.named_modules()}, net
        self.shells = [m for m in without_insides(net) if isinstance(m, PerMember)]
        batch = packed_batch if self.count == self.N else rehearsal_of
        with self.conditions(0), batch(self.K * self.count), watch(net) if watch else contextlib.nullcontext():
            return net(*args, **kwargs)

    def _part(self, i: int, role: Role, k: int, count: int, factor: float = 1.0) -> Tensor:
        """Member k's few samples of tensor i; every member has others, so that no one can stand in for another."""
        t = self.tensors[i]
        if role is SAME:
            if i == self.anchor and self.cut:
                return self.cut(t, k)
            return t.detach().clone().requires_grad_(t.requires_grad)  # a forward may change it
        if role.own:
            t = t[k]
        if role.dim is None:
            return t
        index = (torch.arange(count, device=t.device) + k) % t.shape[role.dim]
        t = t.detach().index_select(role.dim, index)
        if i == self.anchor:
            if t.is_floating_point():
                t = t * (self.scale * factor * (1 - k / (4 * self.K)))
            if self.cut and self.shared:
                t = self.cut(t, k)
        return t

    def _given(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict[str, Any]]:
        """The arguments with other tensors in their places, and copies of objects, which a forward may change."""
        others = iter(tensors)

        def other(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return next(others)
            with contextlib.suppress(Exception):  # whatever an object raises that cannot be copied
                return deep_copy(leaf, {}) if is_plain_object(leaf) else leaf
            return leaf

        return tree_map(other, (self.args, self.kwargs))

    def _posed(self, net: nn.Module) -> nn.Module:
        drop_hooks(net)
        net = net._apply(self._up) if self.dtype else net
        return net.eval() if self.evaluates else net

    def _up(self, t: Tensor) -> Tensor:
        if self.dtype is None or not (t.is_floating_point() or t.is_complex()):
            return t
        return t.to(self.dtype.to_complex() if t.is_complex() else self.dtype)

    @contextlib.contextmanager
    def conditions(self, seed: int) -> Iterator[None]:
        """On operators that give the bits of a member alone, and unseen by the random state."""
        devices = {t.device for t in self.net.parameters() if t.is_cuda}
        with (
            torch.set_grad_enabled(self.grad),
            seeded(seed, devices),
            resumed("loop"),
            contextlib.ExitStack() as stack,
        ):
            for device in {"cpu", *(d.type for d in devices)} if self.dtype else ():
                stack.enter_context(torch.autocast(device, enabled=False))
            if self.own_draws:
                stack.enter_context(OwnDraws())
            yield

    def computed(self, t: Tensor) -> torch.dtype:
        """What a tensor like `t` is computed in, under autocast, too."""
        device = t.device.type
        cast = self.dtype is None and t.dtype != torch.float64 and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if cast else t.dtype

    def refuse_changes(self) -> None:
        """Raise PackError where forward changes what it is given, which is one and the same for all members."""
        for name in self._changed:
            what = f"'{name}'" if isinstance(name, str) else f"number {name + 1}"
            raise PackError(
                f"the members' forward changes its argument {what}, which all of them would share: keep it inside the "
                "network, where each member has its own, or call each of packed.unpack()."
            )

    def vary(self) -> None:
        """Put something in place of zeros, as a last layer may start with, which hide what is before."""
        memo: dict[int, Any] = {id(b): b for b in self.net.buffers()}
        for i, p in enumerate(self.net.parameters()):
            values = p.detach()
            if values.is_floating_point() and not values.any():
                generator = torch.Generator(p.device).manual_seed(i)
                values = torch.empty_like(values, dtype=torch.float32).normal_(0, 0.1, generator=generator).to(p.dtype)
            memo[id(p)] = nn.Parameter(values, p.requires_grad)
        self.net = deep_copy(self.net, memo)

    def origin(self, error: Exception) -> str:
        """The innermost module whose own code was running when packed layers raised."""
        path = ""
        for frame, _ in traceback.walk_tb(error.__traceback__):
            module = frame.f_locals.get("self")
            if id(module) in self._ran:
                path = self._ran[id(module)]
                if isinstance(module, Twin):
                    return path.rpartition(".")[0]
        return path

    def places(self, ours: Any, theirs: Any) -> tuple[int | None, ...] | None:
        """The dimension that holds the samples in each tensor of the outputs, or None where these are no rows."""
        a, b = leaves(ours), leaves(theirs)
        if len(a) != len(b):
            return None
        places = []
        for packed, single in zip(a, b, strict=True):
            if isinstance(packed, Tensor) and isinstance(single, Tensor):
                place = self.place(packed.shape, single.shape)
                if place == "nowhere":
                    return None
                places.append(place)
            elif (
                type(packed) is not type(single)
                or _holds_tensors(single)
                or (isinstance(single, _PLAIN) and packed != single)
            ):
                return None
        return tuple(places)

    def place(self, packed: torch.Size, single: torch.Size) -> int | None | str:
        if len(packed) == len(single):
            for d, b in enumerate(single):
                if b and b % self.count == 0 and packed == (*single[:d], self.K * b, *single[d + 1 :]):
                    return d
            if packed == single:
                return None
        return "nowhere"

    def mine(self, packed: Tensor, place: int | None) -> Tensor:
        """The last member's part of a packed tensor."""
        return packed if place is None else packed.unflatten(place, (self.K, -1)).select(place, self.K - 1)


_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def _state(value: Any, same: Collection[int], deep: int = 6) -> Any:
    """What tells whether a forward has changed an argument; of tensors those in `same`, which are no batch."""
    if isinstance(value, Tensor):
        return (id(value), value._version) if id(value) in same else id(value)
    inside = vars(value) if is_plain_object(value) else value
    if isinstance(inside, dict | list | set) and deep:
        parts = inside.items() if isinstance(inside, dict) else inside
        return len(inside), [_state(part, same, deep - 1) for part in parts]
    return [_state(part, same, deep - 1) for part in value] if isinstance(value, tuple) and deep else id(value)


def _holds_tensors(value: Any) -> bool:
    """Whether an object of unknown kind, such as a distribution, holds tensors."""
    return is_plain_object(value) and any(isinstance(leaf, Tensor) for leaf in leaves([*vars(value).values()]))
