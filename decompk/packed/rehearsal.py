"""The first call of a kind, rehearsed on a few samples: packed beside one member alone, which tells what is what.

Only the members' own code knows which of its arguments belong to the batch, whether its samples see each other, and
what it returns; so a few samples go through one member alone and through all of them packed. Where the two differ, the
smallest module is found that does not when it runs member by member, and from then on it does.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..errors import PackError, brief
from ..fx.forward_code import is_plain_object
from ..fx.numbers import DRAWS, Numbers, other_numbers
from ..fx.pytree import leaves, tensors_of, tree_map
from ..fx.unseen import OwnDraws, seeded
from ..fx.wrapper import Shell
from ..kernels.backend import resumed
from .per_member import PerMember, of_torch
from .selection import entangled, is_in
from .surgery import Changes, member_alone, without_insides
from .twin import Twin, deep_copy, packed_batch, rehearsal_of
from .watch import Narrowest, Watch, drop_hooks, noting, recording

COUNTS = (2, 3, 5, 7, 11)  # samples of a rehearsal: the first of which no other size is a multiple

# A ReLU's kink or a norm of few samples turns rounding into some of a gradient; what mixes members changes most.
COARSE, SMALL = 0.2, 0.02  # of a parameter's gradient, which counts as that share of all gradients at least


class Rows(NamedTuple):
    """Where an argument has its samples: in dimension `dim` of one member's, which is `own` or shared by all.

    Of members that run apart nobody asks for the dimension.
    """

    dim: int | None
    own: bool


SAME = None  # the role of an argument that is handed to all members as it is
Role = Rows | None


@dataclass(frozen=True)
class Way:
    """How one kind of call runs: each tensor argument's role, and where each tensor that comes back has its samples.

    outs: the dimension, or None for what is the same for all members; None altogether before it is known.
    apart: such calls alone run member by member, where the network otherwise does not. random: outputs follow chance;
    draws: in eval mode, too.
    """

    roles: tuple[Role, ...]
    outs: tuple[int | None, ...] | None = None
    apart: bool = False
    random: bool = False
    draws: bool = False


class _TooPrecise(Exception):
    """What fails in higher precision than the user's, and not in the user's."""


class Unknown(Exception):
    """The members alone do not run on other numbers of samples, so nothing can be told."""


@dataclass
class Rehearsal:
    """One kind of call of `net`, K packed members, on its arguments; `cut` gives member k's part of the first tensor.

    named: the tensors' roles where they are known.
    shared: whether the first tensor is one batch of N samples for all members; else it is (K, N, …).
    """

    net: nn.Module
    K: int
    args: tuple
    kwargs: dict[str, Any]
    shared: bool
    N: int
    cut: Callable[[Tensor, int], Tensor] | None = None
    named: tuple[Role, ...] | None = None

    def __post_init__(self) -> None:
        self.tensors = tensors_of((self.args, self.kwargs))
        self.anchor = next((i for i, t in enumerate(self.tensors) if t.dim()), None)
        taken = {size for t in self.tensors for size in t.shape[: 2 if self.shared else 3]}
        taken |= {size for t in (*self.net.parameters(), *self.net.buffers()) for size in t.shape[1:2]}
        taken.add(self.N)
        fits = [n for n in COUNTS if not any(size and (size % (self.K * n) == 0 or size == n) for size in taken)]
        self.count = (fits or COUNTS[1:])[0]
        self._evaluates, self._grad, self._scale = False, torch.is_grad_enabled(), 1.0
        self._raised: torch.dtype | None = None  # what it runs in, if not in what the user has it run in
        self._shells: list[PerMember] = []
        self._draws = False  # in eval mode, too
        self._draws_apart = False  # from numbers that no other thread draws
        self._changed: list[str | int] = []
        self._roles: Sequence[Role] = ()  # each tensor's, once they are found
        self._random = any(isinstance(m, _DropoutNd) and m.training and m.p for m in self.net.modules())

    # -- what belongs to the batch

    def roles(self) -> tuple[Role, ...]:
        """The role of every tensor argument, found by what one member does with other numbers of samples.

        Raises Unknown.
        """
        if self.named is not None:
            return self.named
        options = [self._options(i, t) for i, t in enumerate(self.tensors)]
        if all(len(o) == 1 for o in options):
            return tuple(o[0] for o in options)
        for choice in itertools.islice(itertools.product(*options), 32):
            if self.runs(choice):
                break
        else:
            raise Unknown
        found = list(choice)
        for i, role in enumerate(choice):
            if role is not SAME and i != self.anchor and SAME in options[i]:
                free = self.runs(found, left=i)
                alone = [*found[:i], SAME, *found[i + 1 :]]
                if free and self.runs(alone):
                    found[i] = SAME
        return tuple(found)

    def takes(self) -> bool:
        """Whether a member alone takes its parts of the arguments, whatever their roles."""
        options = [self._options(i, t) for i, t in enumerate(self.tensors)]
        return any(self.runs(choice) for choice in itertools.islice(itertools.product(*options), 32))

    def _options(self, i: int, t: Tensor) -> list[Role]:
        """What a tensor may be, by its shape alone, the likeliest first."""
        if i == self.anchor:
            return [Rows(0, not self.shared)]
        K, N, shape = self.K, self.N, tuple(t.shape)
        own = [Rows(d, True) for d in (0, 1) if shape[:1] == (K,) and shape[1 + d : 2 + d] == (N,)]
        shared = [Rows(d, False) for d in (0, 1) if shape[d : d + 1] == (N,)]
        return [*(shared + own if self.shared else own + shared), SAME]

    def apart(self) -> tuple[Role, ...]:
        """Which tensors are the members' own, where members run one by one: only what no member takes whole.

        Raises Unknown where a member takes them in no way.
        """
        options: list[list[Role]] = []
        for i, t in enumerate(self.tensors):
            own = i == self.anchor and not self.shared
            batch = not self.shared and t.shape[:2] == (self.K, self.N)
            choice = [SAME, Rows(None, True)] if t.shape[:1] == (self.K,) and i != self.anchor else [SAME]
            options.append([Rows(None, True)] if own else choice[::-1] if batch else choice)
        reasons = []
        for roles in itertools.islice(itertools.product(*options), 32):
            try:
                with self._under(_roles=roles):
                    self.alone()
            except Exception as error:  # whatever a network raises at arguments that do not fit each other
                reasons.append(error)
            else:
                self.refuse_changes()
                return roles
        raise Unknown from reasons[0]

    def runs(self, roles: Sequence[Role], left: int | None = None) -> bool:
        """Whether a member alone takes its parts of the arguments, tensor `left` with another number of samples."""
        try:
            with self._under(_roles=roles):
                self.alone(left=left)
        except Exception:  # whatever a network raises at arguments that do not fit each other
            return False
        return True

    # -- arguments and runs

    def part(self, i: int, role: Role, k: int, count: int, factor: float = 1.0) -> Tensor:
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
                t = t * (self._scale * factor * (1 - k / (4 * self.K)))
            if self.cut and self.shared:
                t = self.cut(t, k)
        return t

    def given(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict[str, Any]]:
        """The arguments with other tensors in their places, and copies of objects, which a forward may change."""
        others = iter(tensors)

        def other(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return next(others)
            with contextlib.suppress(Exception):  # whatever an object raises that cannot be copied
                return deep_copy(leaf, {}) if is_plain_object(leaf) else leaf
            return leaf

        return tree_map(other, (self.args, self.kwargs))

    def alone(self, left: int | None = None, nudge: float = 0.0, seed: int = 0, watch: Watch = None) -> Any:
        """What the last member returns alone.

        left: a tensor that keeps another number of samples. nudge: how far its parameters are off, relatively.
        """
        k = self.K - 1
        net = self._posed(member_alone(self.net, k, copies=False))
        for i, p in enumerate(net.parameters() if nudge else ()):
            wave = torch.cos(torch.arange(p.numel(), dtype=torch.float64, device=p.device) + i)
            p.data = p.data * (1 + nudge * wave).view(p.shape).to(p.dtype)
        parts = [self._up(self.part(i, role, k, self.count + (i == left))) for i, role in enumerate(self._roles)]
        args, kwargs = self.given(parts)
        same = {id(part) for part, role in zip(parts, self._roles, strict=True) if role is SAME}
        given = {**dict(enumerate(args)), **kwargs}
        before = {name: _state(value, same) for name, value in given.items()}
        with self._apart(seed), watch(net) if watch else contextlib.nullcontext():
            out = net(*args, **kwargs)
        self._alone = net
        self._changed = [name for name, state in before.items() if _state(given[name], same) != state]
        return out

    def together(self, changes: Changes, watch: Watch = None, others: float = 1.0, alike: bool = False) -> Any:
        """What all members return together, as rows.

        others: a factor of the samples of all but the last. alike: all have the last one's samples.
        """
        memo = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in self.net.parameters()}
        net = self._posed(changes.applied(deep_copy(self.net, memo), self.K))
        factors = [others] * (self.K - 1) + [1.0]
        order = [self.K - 1] * self.K if alike else range(self.K)
        parts = [
            self._up(
                self.tensors[i]
                if r is SAME
                else torch.cat([self.part(i, r, k, self.count, f) for k, f in zip(order, factors, strict=True)], r.dim)
            )
            for i, r in enumerate(self._roles)
        ]
        args, kwargs = self.given(parts)
        self._ran, self._together = {id(m): path for path, m in net.named_modules()}, net
        self._shells = [m for m in without_insides(net) if isinstance(m, PerMember)]
        batch = packed_batch if self.count == self.N else rehearsal_of
        with self._apart(0), batch(self.K * self.count), watch(net) if watch else contextlib.nullcontext():
            return net(*args, **kwargs)

    def _posed(self, net: nn.Module) -> nn.Module:
        drop_hooks(net)
        net = net._apply(self._up) if self._raised else net
        return net.eval() if self._evaluates else net

    def _up(self, t: Tensor) -> Tensor:
        if self._raised is None or not (t.is_floating_point() or t.is_complex()):
            return t
        return t.to(self._raised.to_complex() if t.is_complex() else self._raised)

    @contextlib.contextmanager
    def _apart(self, seed: int) -> Iterator[None]:
        """On operators that give the bits of a member alone, and unseen by the random state."""
        devices = {t.device for t in self.net.parameters() if t.is_cuda}
        with (
            torch.set_grad_enabled(self._grad),
            seeded(seed, devices),
            resumed("loop"),
            contextlib.ExitStack() as stack,
        ):
            for device in {"cpu", *(d.type for d in devices)} if self._raised else ():
                stack.enter_context(torch.autocast(device, enabled=False))
            if self._draws_apart:
                stack.enter_context(OwnDraws())
            yield

    # -- the verdict

    @functools.cached_property
    def _best(self) -> torch.dtype | None:
        """The precision, if any higher than the user's, in which a member runs.

        There rounding hides less, and is told from samples that see each other; no processor has its own verdict.
        """
        first = next((t for t in self.net.parameters() if t.is_floating_point() or t.is_complex()), torch.empty(0))
        eps = torch.finfo(self._computed(first)).eps
        for dtype in (torch.float64, torch.float32):
            with self._under(_raised=dtype):
                if torch.finfo(dtype).eps < eps and self.runs(self._roles):
                    return dtype
        return None

    def refuse_changes(self) -> None:
        """Raise PackError where forward changes what it is given, which is one and the same for all members."""
        for name in self._changed:
            what = f"'{name}'" if isinstance(name, str) else f"number {name + 1}"
            raise PackError(
                f"the members' forward changes its argument {what}, which all of them would share: keep it inside the "
                "network, where each member has its own, or call each of packed.unpack()."
            )

    def _varied(self) -> nn.Module:
        """The network with something in place of zeros, as a last layer may start with, which hide what is before."""
        memo: dict[int, Any] = {id(b): b for b in self.net.buffers()}
        for i, p in enumerate(self.net.parameters()):
            values = p.detach()
            if values.is_floating_point() and not values.any():
                generator = torch.Generator(p.device).manual_seed(i)
                values = torch.empty_like(values, dtype=torch.float32).normal_(0, 0.1, generator=generator).to(p.dtype)
            memo[id(p)] = nn.Parameter(values, p.requires_grad)
        return deep_copy(self.net, memo)

    def _at_full_size(self, way: Way, changes: Changes) -> tuple[Way, Changes]:
        """The verdict on as many samples as the call has: code may ask how many there are."""
        training = any(m.training for m in self.net.modules())
        with self._under(count=self.N):
            found = self._by_size(way, changes, compare=not self._random)
            if found is changes and self._random and training and not self._draws:
                with self._under(_evaluates=True):
                    found = self._by_size(way, changes, compare=True)
        if found is not changes and self.N == 1:  # a last batch, mostly, for which the others shall not pay
            return replace(way, apart=True), changes
        return replace(way, outs=None if "" in found.whole else way.outs), found

    def _by_size(self, way: Way, changes: Changes, compare: bool) -> Changes:
        try:
            theirs = self.alone()
        except Exception:  # whatever the members raise: the call itself will
            return changes
        while "" not in changes.whole:
            try:
                ours = self.together(changes)
            except torch.OutOfMemoryError:  # the call itself holds less
                break
            except Exception as error:  # whatever the packed network raises where a member alone does not
                changes = self._by_members(changes, self._origin(error), f"packed, {brief(error)}")
                continue
            if not compare or self._same_rows(way, changes, ours, theirs):
                break
            reason = "its code asks how many samples it has"
            changes = self._by_members(changes, self._where(changes), reason)
        return changes

    def _same_rows(self, way: Way, changes: Changes, ours: Any, theirs: Any) -> bool:
        outs = self._places(ours, theirs)
        if outs is None or (outs != way.outs and not self._evaluates):  # in eval mode it may return something else
            return False
        self._figures = {("output", "", i): (t, None, 0.0) for i, t in enumerate(tensors_of(theirs))}
        found = {("output", "", i): self._mine(t, outs[i]) for i, t in enumerate(tensors_of(ours))}
        if not self._wrong(found):
            return True
        if self._raised is None and self._best:
            # whatever packed alone raises in that precision
            with contextlib.suppress(Exception), self._under(_raised=self._best):
                return self._same_rows(way, changes, self.together(changes), self.alone())
        return self._by_rounding(found)

    @contextlib.contextmanager
    def _under(self, **conditions: Any) -> Iterator[None]:
        """What runs meanwhile runs under other conditions."""
        before = {name: getattr(self, name) for name in conditions}
        vars(self).update(conditions)
        try:
            yield
        finally:
            vars(self).update(before)

    def run(self) -> tuple[Way, Changes]:
        """How this kind of call runs, and what has to change in the network for it. Raises Unknown."""
        self._roles, changes = self.roles(), Changes()
        self.net = self._varied()
        for path, reason in self._decides():
            if not any(is_in(path, one) for one in changes.whole):
                changes = self._by_members(changes, path, reason)
        outs, changes = self._settled(changes)
        x = self.tensors[self.anchor].detach()
        if x.is_floating_point() and not self._random and "" not in changes.whole:
            # Large enough for what saturates, or is switched on, to be so.
            scale = 32 / min(float(x.abs().max().nan_to_num().clamp(1e-3)), 1)
            with contextlib.suppress(Unknown), self._under(_scale=scale):
                changes = self._settled(changes, again=True)[1]
        if self._random:
            if any(m.training for m in self.net.modules()):
                self._random = False
                with contextlib.suppress(Unknown), self._under(_evaluates=True):
                    changes = self._settled(changes, again=True)[1]
                self._random, self._draws = True, self._random
            for dtype in dict.fromkeys((self._best, None)):
                with contextlib.suppress(Unknown), self._under(_raised=dtype):
                    while "" not in changes.whole and (path := self._depends(changes, outs)) is not None:
                        changes = self._by_members(changes, path, "its samples see each other")
                    break
        way = Way(tuple(self._roles), None if "" in changes.whole else outs, random=self._random, draws=self._draws)
        return (way, changes) if way.outs is None else self._at_full_size(way, changes)

    def again(self, way: Way) -> tuple[Way, Changes]:
        """`run` for another number of samples, where all else is known."""
        self._roles, self._random, self._draws = way.roles, way.random, way.draws
        self.net = self._varied()
        return self._at_full_size(way, Changes())

    def hand_over(self, net: nn.Module) -> None:
        """Tell the modules of `net` that run member by member which of their arguments had the batch's rows."""
        found = {shell._path: shell._batch for shell in self._shells}
        for shell in without_insides(net):
            if isinstance(shell, PerMember):
                shell._batch.update(found.get(shell._path, {}))

    def _settled(self, changes: Changes, again: bool = False) -> tuple[tuple | None, Changes]:
        """Where each output has its samples, and the changes with which packed is as alone.

        again: on other samples, of which the best precision tells enough, and the gradients nothing new.
        """
        while True:
            outs = None
            try:
                if self._best:  # without gradients, for which larger numbers take long and much memory
                    with self._under(_raised=self._best, _grad=False):
                        outs, changes = self._judged(changes)
                if "" in changes.whole or (again and self._best):
                    return outs, changes
                return self._judged(changes)
            except _TooPrecise:
                self._best = None  # from now on

    def _judged(self, changes: Changes) -> tuple[tuple | None, Changes]:
        self._look()
        outs: tuple | None = None
        while outs is None and "" not in changes.whole:
            found = self._outcome(changes)
            outs, changes = (None, found) if isinstance(found, Changes) else (found, changes)
        return outs, changes

    def _look(self) -> None:
        try:
            self._theirs = self.alone()
        except Exception as error:  # whatever the members raise
            raise (_TooPrecise if self._raised else Unknown) from error
        self.refuse_changes()
        self._figures = self._figures_alone(self._theirs)

    def _outcome(self, changes: Changes) -> tuple | Changes:
        """Where each output has its samples, if packed is as alone; else what to change further."""
        order: list[str] = []
        try:
            ours = self.together(changes, lambda net: noting(net, order))
        except Exception as error:  # whatever the packed network raises where a member alone does not
            if self._raised and self._packs(changes):
                raise _TooPrecise from error
            if isinstance(error, torch.OutOfMemoryError):
                raise
            left = [path for path in reversed(order) if path not in changes.contiguous]
            if "view size is not compatible" in str(error) and left:
                return Changes([*changes.contiguous, *left[: max(1, len(changes.contiguous))]], changes.whole)
            reason = brief(error).partition(": name the module")[0]
            return self._by_members(changes, self._origin(error), f"packed, {reason}")
        outs = self._places(ours, self._theirs)
        constant = "what it returns is not one row per sample"
        if outs is None:
            return self._by_members(changes, "", constant)
        found = self._figures_together(ours, outs)
        wrong = self._wrong(found)
        if self._random or not wrong or self._by_chance():
            return outs
        if self._best and self._raised is None:
            before = self._theirs, self._figures
            with self._under(_raised=self._best):
                self._look()
                verdict = self._outcome(changes)
            self._theirs, self._figures = before
            return verdict
        if self._by_rounding(found):
            return outs
        kind, path, name = wrong[0]
        if kind == "output":
            if outs[name] is None:
                return self._by_members(changes, "", constant)
            return self._by_members(changes, self._where(changes), "its samples see each other")
        if kind == "kept":
            return self._by_members(changes, path, f"its samples share '{name}'")
        return self._by_members(changes, "", "its samples see each other's gradients")

    def _packs(self, changes: Changes) -> bool:
        """Whether the packed network runs in the user's own precision."""
        with self._under(_raised=None):
            try:
                self.together(changes)
            except Exception:  # whatever it raises
                return False
        return True

    # -- what is compared: (kind, path, name) → the last member's tensor, and what rounding may do to it as a whole

    def _figures_alone(self, out: Any) -> dict[tuple, tuple[Tensor, float | None, float]]:
        net, outputs = self._alone, tensors_of(out)
        gradients = self._gradients([outputs], net)
        figures = {("output", "", i): (t.detach(), None, 0.0) for i, t in enumerate(outputs)}
        figures |= {("kept", path, name): (t.detach(), None, 0.0) for path, name, t in _kept(net)}
        self._alone = None  # which may be large
        least = SMALL * sum(float(torch.linalg.vector_norm(g)) ** 2 for g in gradients) ** 0.5
        return figures | {("gradient", "", i): (g, COARSE, least) for i, g in enumerate(gradients)}

    def _figures_together(self, out: Any, outs: Sequence[int | None]) -> dict[tuple, Tensor]:
        net, K = self._together, self.K
        apart = [
            [packed] * K if place is None else packed.unflatten(place, (K, -1)).unbind(place)
            for packed, place in zip(tensors_of(out), outs, strict=True)
        ]
        gradients = self._gradients(list(zip(*apart, strict=True)), net)
        figures = {("output", "", i): parts[-1].detach() for i, parts in enumerate(apart)}
        figures |= self._kept_together()
        self._together = None
        return figures | {("gradient", "", i): g for i, g in enumerate(gradients)}

    def _kept_together(self) -> dict[tuple, Tensor]:
        figures = {}
        for path, name, t in _kept(member_alone(self._together, self.K - 1, copies=False)):
            known = self._figures.get(("kept", path, name))
            place = self._place(t.shape, known[0].shape) if known else None  # an attribute may hold all members' rows
            if known and place != "nowhere":
                figures["kept", path, name] = self._mine(t, place).detach()
        return figures

    def _gradients(self, members: Sequence[Sequence[Tensor]], net: nn.Module) -> list[Tensor]:
        """The last member's gradients of one number made of all outputs; none where they are not asked for.

        members: each member's outputs; of one alone net's parameters are its own, else stacks.
        """
        parameters = [p for p in net.parameters() if p.requires_grad]
        if not self._grad or not parameters:
            return []
        try:
            with self._apart(0):
                loss = sum(
                    (t * torch.cos(torch.arange(t.numel(), device=t.device, dtype=t.dtype) + i).view(t.shape)).sum()
                    for outputs in members
                    for i, t in enumerate(outputs)
                    if t.requires_grad and t.is_floating_point()
                )
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
        except torch.OutOfMemoryError as error:
            raise _TooPrecise if self._raised else error from None
        except Exception:  # whatever a backward raises, also where no output follows a parameter
            return []
        whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        own = whole if net is self._alone else [g[self.K - 1] for g in whole]
        return [g.float() if g.dtype == self._raised else g for g in own]  # which holds less

    def _decides(self) -> list[tuple[str, str]]:
        """(path, why) of modules whose own code does with values what for all members' samples is another thing.

        Whatever these samples make it do: a branch that they do not take, say, other samples will.
        """
        if all(isinstance(m, Twin | Shell) or of_torch(m) for m in without_insides(self.net)):
            return []
        apart = {m._path for m in without_insides(self.net) if isinstance(m, PerMember)}
        cut = self.anchor if self.cut else None
        belongs = [None if r is SAME else r.own or i == cut for i, r in enumerate(self._roles)]
        one, all_ = Numbers(self.count, apart), Numbers(self.K * self.count, apart)
        try:
            self.alone(watch=lambda net: one.watch(net, belongs))
            if any(reason == DRAWS for _, reason in one.found):  # or another thread has drawn meanwhile
                again = Numbers(self.count, apart)
                self.alone(watch=lambda net: again.watch(net, belongs))
                one.found = [found for found in one.found if found in again.found]
            if not one.reads_shared or "" in apart:
                return one.found
            self.together(Changes(), lambda net: all_.watch(net, belongs), alike=True)
        except Exception:  # whatever a network raises that is watched so, or packed where it must not be
            return one.found
        return one.found + other_numbers(one, all_)

    def _depends(self, changes: Changes, outs: Sequence[int | None]) -> str | None:
        """Where the last member's rows follow other members' samples, if they do: for code that draws, drawn alike."""
        path = self._departs(changes, outs)
        if path is None or threading.active_count() == 1:
            return path
        with contextlib.suppress(Unknown), self._under(_draws_apart=True):  # another thread may have drawn meanwhile
            path = self._departs(changes, outs)
        return path

    def _departs(self, changes: Changes, outs: Sequence[int | None]) -> str | None:
        runs: list[list[tuple[str, bool, Any]]] = [[], []]
        kept: list[dict[tuple, Tensor]] = []
        for others, events in zip((1.0, 0.5), runs, strict=True):
            try:
                out = self.together(changes, lambda net, events=events: recording(net, events), others)
            except Exception as error:  # whatever code raises at other samples: nothing can be told so
                raise Unknown from error
            events.append(("", False, [self._mine(t, p) for t, p in zip(tensors_of(out), outs, strict=True)]))
            kept.append(self._kept_together())
        rows = self.K * self.count
        for (path, entered, one), (_, _, two) in zip(*runs, strict=False):
            if isinstance(one, Tensor) and one.dim() and one.shape[0] % rows == 0:
                one, two = ([t.unflatten(0, (self.K, -1))[self.K - 1]] for t in (one, two))
            if isinstance(one, list) and not all(map(self._close, one, two)):
                return path.rpartition(".")[0] if entered else path
        for (_, path, name), one in kept[0].items():
            if not self._close(kept[1].get(("kept", path, name)), one):
                return path
        return None

    def _by_members(self, changes: Changes, path: str, reason: str) -> Changes:
        """The module at `path`, or the first around it that does not do so yet, runs member by member, too."""
        taken = {*changes.whole, *(shell._path for shell in self._shells)}
        while path and any(is_in(path, p) for p in taken):
            path = path.rpartition(".")[0]
        modules = dict(self.net.named_modules(remove_duplicate=False))
        while wider := [
            p for p in entangled(modules, {path, *taken}) if path.startswith(f"{p}." if p else "") and p != path
        ]:
            path = wider[0]
        below = {p for p in changes.whole if p.startswith(f"{path}." if path else "")}
        return Changes(changes.contiguous, {path: reason, **{p: r for p, r in changes.whole.items() if p not in below}})

    def _origin(self, error: Exception) -> str:
        """The innermost module whose own code was running when packed layers raised."""
        path = ""
        for frame, _ in traceback.walk_tb(error.__traceback__):
            module = frame.f_locals.get("self")
            if id(module) in self._ran:
                path = self._ran[id(module)]
                if isinstance(module, Twin):
                    return path.rpartition(".")[0]
        return path

    def _places(self, ours: Any, theirs: Any) -> tuple[int | None, ...] | None:
        """The dimension that holds the samples in each tensor of the outputs, or None where these are no rows."""
        a, b = leaves(ours), leaves(theirs)
        if len(a) != len(b):
            return None
        places = []
        for packed, single in zip(a, b, strict=True):
            if isinstance(packed, Tensor) and isinstance(single, Tensor):
                place = self._place(packed.shape, single.shape)
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

    def _place(self, packed: torch.Size, single: torch.Size) -> int | None | str:
        if len(packed) == len(single):
            for d, b in enumerate(single):
                if b and b % self.count == 0 and packed == (*single[:d], self.K * b, *single[d + 1 :]):
                    return d
            if packed == single:
                return None
        return "nowhere"

    def _mine(self, packed: Tensor, place: int | None) -> Tensor:
        """The last member's part of a packed tensor."""
        return packed if place is None else packed.unflatten(place, (self.K, -1)).select(place, self.K - 1)

    def _by_chance(self) -> bool:
        """Whether the network draws random numbers, which is noted."""
        again = {name: figure[0] for name, figure in self._figures_alone(self.alone(seed=1)).items()}
        self._random = any(name in again for name in self._wrong(again))
        return self._random

    def _wrong(self, found: dict[tuple, Tensor], eps: float = 0.0) -> list[tuple]:
        return [name for name, figure in self._figures.items() if not self._close(found.get(name), *figure, eps)]

    def _by_rounding(self, found: dict[tuple, Tensor]) -> bool:
        """Whether `found` is the last member's figures but for rounding, of which a network may make much.

        How much is seen where its parameters are off by a few roundings of the narrowest dtype that it computes in.
        """
        narrow = Narrowest()
        try:
            self.alone(watch=lambda net: narrow)
        except Exception:  # whatever code raises that does not run in a mode
            narrow.eps = max(narrow.eps, torch.finfo(torch.float32).eps)
        eps = narrow.eps
        wrong = self._wrong(found, eps)
        nudged = self._figures_alone(self.alone(nudge=8 * eps)) if wrong else {}
        for name in wrong:
            mine, single, moved = found.get(name), self._figures[name][0], nudged.get(name, self._figures[name])[0]
            if mine is None or not mine.shape == single.shape == moved.shape or not single.is_floating_point():
                return False
            error, response = ((t - single).abs().nan_to_num().max() for t in (mine, moved))
            if error > min(100, 0.125 / eps) / 8 * response:  # deep networks came to 22 roundings
                return False
        return True

    def _close(
        self, ours: Tensor | None, theirs: Tensor, share: float | None = None, least: float = 0.0, eps: float = 0.0
    ) -> bool:
        """Whether only rounding parts two tensors: by the root of an epsilon, of the largest value.

        eps: the least epsilon, of which their dtype's may be larger. share: allowed instead, of the vector's length,
        which counts as `least` if it is shorter.
        """
        if ours is None or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return False
        if not theirs.is_floating_point() and not theirs.is_complex():
            return theirs.numel() == 0 or bool((ours != theirs).double().mean() < 0.05)
        finite = theirs.isfinite() & ours.isfinite()
        error, size = (torch.where(finite, t, 0).abs() for t in (ours - theirs, theirs))
        if share is not None:
            return bool(error.double().norm() <= share * max(float(size.double().norm()), least))
        eps = max(eps, torch.finfo(self._computed(ours)).eps)
        return theirs.numel() == 0 or bool(error.max() <= eps**0.5 * size.max())

    def _computed(self, t: Tensor) -> torch.dtype:
        """What a tensor like `t` is computed in, under autocast, too."""
        device = t.device.type
        cast = self._raised is None and t.dtype != torch.float64 and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if cast else t.dtype

    def _where(self, changes: Changes) -> str:
        """The module in whose own code packed departs from alone, in higher precision where the network runs so."""
        for dtype in dict.fromkeys((self._best, None)):
            ours, theirs = [], []
            try:
                with self._under(_raised=dtype):
                    self.together(changes, lambda net, events=ours: recording(net, events))
                    self.alone(watch=lambda net, events=theirs: recording(net, events))
            except Exception:  # whatever a network raises that makes tensors of a dtype of its own
                continue
            opaque = tuple(f"{shell._path}." for shell in self._shells)
            theirs = [event for event in theirs if not event[0].startswith(opaque)]
            for (path, entered, packed), (other, _, single) in zip(ours, theirs, strict=False):
                if path != other:
                    break
                if isinstance(packed, Tensor) and isinstance(single, Tensor):
                    place = self._place(packed.shape, single.shape)
                    if place == "nowhere" or not self._close(self._mine(packed, place), single):
                        return path.rpartition(".")[0] if entered else path
        return ""


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


def _kept(net: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(path, name, tensor) of the buffers, and of what forward leaves in attributes."""
    for path, module in net.named_modules():
        held = {} if isinstance(module, Shell) else vars(module)
        for name, value in (*module._buffers.items(), *held.items()):
            if isinstance(value, Tensor):
                yield path, name, value
