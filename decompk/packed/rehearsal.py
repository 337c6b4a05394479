"""The first call of a kind, rehearsed on a few samples: packed beside one member alone, which tells what is what.

Only the members' own code knows which of its arguments belong to the batch, whether its samples see each other, and
what it returns; so a few samples go through one member alone and through all of them packed. Where the two differ, the
smallest module is found that does not when it runs member by member, and from then on it does.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..errors import brief
from ..fx.numbers import DRAWS, Numbers, other_numbers
from ..fx.pytree import tensors_of
from .figures import Figure, Figures, TooPrecise
from .kinds import runs_own_code
from .per_member import PerMember
from .roles import Unknown, find_roles
from .selection import entangled, is_in
from .surgery import Changes, without_insides
from .trial import SAME, Role, Trial
from .watch import noting, recording


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


class Rehearsal:
    """The verdict on the kind of call that a trial is of; `named`: its tensors' roles where they are known."""

    def __init__(self, trial: Trial, named: tuple[Role, ...] | None = None):
        self.trial, self.figures, self._named = trial, Figures(trial), named
        self._draws = False  # in eval mode, too
        self._random = any(isinstance(m, _DropoutNd) and m.training and m.p for m in trial.net.modules())

    def run(self) -> tuple[Way, Changes]:
        """How this kind of call runs, and what has to change in the network for it. Raises Unknown."""
        self.trial.roles = find_roles(self.trial) if self._named is None else self._named
        self.trial.vary()
        changes = Changes()
        for path, reason in self._decides():
            if not any(is_in(path, one) for one in changes.whole):
                changes = self._by_members(changes, path, reason)
        outs, changes = self._settled(changes)
        x = self.trial.tensors[self.trial.anchor].detach()
        if x.is_floating_point() and not self._random and "" not in changes.whole:
            # Large enough for what saturates, or is switched on, to be so.
            scale = 32 / min(float(x.abs().max().nan_to_num().clamp(1e-3)), 1)
            with contextlib.suppress(Unknown), self.trial.under(scale=scale):
                changes = self._settled(changes, again=True)[1]
        if self._random:
            if any(m.training for m in self.trial.net.modules()):
                self._random = False
                with contextlib.suppress(Unknown), self.trial.under(evaluates=True):
                    changes = self._settled(changes, again=True)[1]
                self._random, self._draws = True, self._random
            for dtype in dict.fromkeys((self._best, None)):
                with contextlib.suppress(Unknown), self.trial.under(dtype=dtype):
                    while "" not in changes.whole and (path := self._depends(changes, outs)) is not None:
                        changes = self._by_members(changes, path, "its samples see each other")
                    break
        outs = None if "" in changes.whole else outs
        way = Way(tuple(self.trial.roles), outs, random=self._random, draws=self._draws)
        return (way, changes) if way.outs is None else self._at_full_size(way, changes)

    def again(self, way: Way) -> tuple[Way, Changes]:
        """`run` for another number of samples, where all else is known."""
        self.trial.roles, self._random, self._draws = way.roles, way.random, way.draws
        self.trial.vary()
        return self._at_full_size(way, Changes())

    def hand_over(self, net: nn.Module) -> None:
        """Tell the modules of `net` that run member by member which of their arguments had the batch's rows."""
        found = {shell._path: shell._batch for shell in self.trial.shells}
        for shell in without_insides(net):
            if isinstance(shell, PerMember):
                shell._batch.update(found.get(shell._path, {}))

    @functools.cached_property
    def _best(self) -> torch.dtype | None:
        """The precision, if any higher than the user's, in which a member runs.

        There rounding hides less, and is told from samples that see each other; no processor has its own verdict.
        """
        trial = self.trial
        first = next((t for t in trial.net.parameters() if t.is_floating_point() or t.is_complex()), torch.empty(0))
        eps = torch.finfo(trial.computed(first)).eps
        for dtype in (torch.float64, torch.float32):
            with trial.under(dtype=dtype):
                if torch.finfo(dtype).eps < eps and trial.runs(trial.roles):
                    return dtype
        return None

    def _settled(self, changes: Changes, again: bool = False) -> tuple[tuple | None, Changes]:
        """Where each output has its samples, and the changes with which packed is as alone.

        again: on other samples, of which the best precision tells enough, and the gradients nothing new.
        """
        while True:
            outs = None
            try:
                if self._best:  # without gradients, for which larger numbers take long and much memory
                    with self.trial.under(dtype=self._best, grad=False):
                        outs, changes = self._judged(changes)
                if "" in changes.whole or (again and self._best):
                    return outs, changes
                return self._judged(changes)
            except TooPrecise:
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
            self._theirs = self.trial.alone()
        except Exception as error:  # whatever the members raise
            raise (TooPrecise if self.trial.dtype else Unknown) from error
        self.trial.refuse_changes()
        self.figures.expected = self.figures.alone(self._theirs)

    def _outcome(self, changes: Changes) -> tuple | Changes:
        """Where each output has its samples, if packed is as alone; else what to change further."""
        order: list[str] = []
        try:
            ours = self.trial.together(changes, lambda net: noting(net, order))
        except Exception as error:  # whatever the packed network raises where a member alone does not
            if self.trial.dtype and self._packs(changes):
                raise TooPrecise from error
            if isinstance(error, torch.OutOfMemoryError):
                raise
            left = [path for path in reversed(order) if path not in changes.contiguous]
            if "view size is not compatible" in str(error) and left:
                return Changes([*changes.contiguous, *left[: max(1, len(changes.contiguous))]], changes.whole)
            reason = brief(error).partition(": name the module")[0]
            return self._by_members(changes, self.trial.origin(error), f"packed, {reason}")
        outs = self.trial.places(ours, self._theirs)
        constant = "what it returns is not one row per sample"
        if outs is None:
            return self._by_members(changes, "", constant)
        found = self.figures.together(ours, outs)
        wrong = self.figures.wrong(found)
        self._random = self._random or (len(wrong) > 0 and self.figures.by_chance())
        if self._random or not wrong:
            return outs
        if self._best and self.trial.dtype is None:
            before = self._theirs, self.figures.expected
            with self.trial.under(dtype=self._best):
                self._look()
                verdict = self._outcome(changes)
            self._theirs, self.figures.expected = before
            return verdict
        if self.figures.by_rounding(found):
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
        with self.trial.under(dtype=None):
            try:
                self.trial.together(changes)
            except Exception:  # whatever it raises
                return False
        return True

    def _at_full_size(self, way: Way, changes: Changes) -> tuple[Way, Changes]:
        """The verdict on as many samples as the call has: code may ask how many there are."""
        training = any(m.training for m in self.trial.net.modules())
        with self.trial.under(count=self.trial.N):
            found = self._by_size(way, changes, compare=not self._random)
            if found is changes and self._random and training and not self._draws:
                with self.trial.under(evaluates=True):
                    found = self._by_size(way, changes, compare=True)
        if found is not changes and self.trial.N == 1:  # a last batch, mostly, for which the others shall not pay
            return replace(way, apart=True), changes
        return replace(way, outs=None if "" in found.whole else way.outs), found

    def _by_size(self, way: Way, changes: Changes, compare: bool) -> Changes:
        try:
            theirs = self.trial.alone()
        except Exception:  # whatever the members raise: the call itself will
            return changes
        while "" not in changes.whole:
            try:
                ours = self.trial.together(changes)
            except torch.OutOfMemoryError:  # the call itself holds less
                break
            except Exception as error:  # whatever the packed network raises where a member alone does not
                changes = self._by_members(changes, self.trial.origin(error), f"packed, {brief(error)}")
                continue
            if not compare or self._same_rows(way, changes, ours, theirs):
                break
            reason = "its code asks how many samples it has"
            changes = self._by_members(changes, self._where(changes), reason)
        return changes

    def _same_rows(self, way: Way, changes: Changes, ours: Any, theirs: Any) -> bool:
        outs = self.trial.places(ours, theirs)
        if outs is None or (outs != way.outs and not self.trial.evaluates):  # in eval mode it may return something else
            return False
        self.figures.expected = {("output", "", i): Figure(t) for i, t in enumerate(tensors_of(theirs))}
        found = {("output", "", i): self.trial.mine(t, outs[i]) for i, t in enumerate(tensors_of(ours))}
        if not self.figures.wrong(found):
            return True
        if self.trial.dtype is None and self._best:
            # whatever packed alone raises in that precision
            with contextlib.suppress(Exception), self.trial.under(dtype=self._best):
                return self._same_rows(way, changes, self.trial.together(changes), self.trial.alone())
        return self.figures.by_rounding(found)

    def _decides(self) -> list[tuple[str, str]]:
        """(path, why) of modules whose own code does with values what for all members' samples is another thing.

        Whatever these samples make it do: a branch that they do not take, say, other samples will.
        """
        if not any(map(runs_own_code, without_insides(self.trial.net))):
            return []
        apart = {m._path for m in without_insides(self.trial.net) if isinstance(m, PerMember)}
        cut = self.trial.anchor if self.trial.cut else None
        belongs = [None if r is SAME else r.own or i == cut for i, r in enumerate(self.trial.roles)]
        one, all_ = Numbers(self.trial.count, apart), Numbers(self.trial.K * self.trial.count, apart)
        try:
            self.trial.alone(watch=lambda net: one.watch(net, belongs))
            if any(reason == DRAWS for _, reason in one.found):  # or another thread has drawn meanwhile
                again = Numbers(self.trial.count, apart)
                self.trial.alone(watch=lambda net: again.watch(net, belongs))
                one.found = [found for found in one.found if found in again.found]
            if not one.reads_shared or "" in apart:
                return one.found
            self.trial.together(Changes(), lambda net: all_.watch(net, belongs), alike=True)
        except Exception:  # whatever a network raises that is watched so, or packed where it must not be
            return one.found
        return one.found + other_numbers(one, all_)

    def _depends(self, changes: Changes, outs: Sequence[int | None]) -> str | None:
        """Where the last member's rows follow other members' samples, if they do: for code that draws, drawn alike."""
        path = self._departs(changes, outs)
        if path is None or threading.active_count() == 1:
            return path
        with contextlib.suppress(Unknown), self.trial.under(own_draws=True):  # another thread may have drawn meanwhile
            path = self._departs(changes, outs)
        return path

    def _departs(self, changes: Changes, outs: Sequence[int | None]) -> str | None:
        runs: list[list[tuple[str, bool, Any]]] = [[], []]
        kept: list[dict[tuple, Tensor]] = []
        for others, events in zip((1.0, 0.5), runs, strict=True):
            try:
                out = self.trial.together(changes, lambda net, events=events: recording(net, events), others)
            except Exception as error:  # whatever code raises at other samples: nothing can be told so
                raise Unknown from error
            events.append(("", False, [self.trial.mine(t, p) for t, p in zip(tensors_of(out), outs, strict=True)]))
            kept.append(self.figures.kept_together())
        rows = self.trial.K * self.trial.count
        for (path, entered, one), (_, _, two) in zip(*runs, strict=False):
            if isinstance(one, Tensor) and one.dim() and one.shape[0] % rows == 0:
                one, two = ([t.unflatten(0, (self.trial.K, -1))[self.trial.K - 1]] for t in (one, two))
            if isinstance(one, list) and not all(map(self.figures.close, one, two)):
                return path.rpartition(".")[0] if entered else path
        for (_, path, name), one in kept[0].items():
            if not self.figures.close(kept[1].get(("kept", path, name)), one):
                return path
        return None

    def _where(self, changes: Changes) -> str:
        """The module in whose own code packed departs from alone, in higher precision where the network runs so."""
        for dtype in dict.fromkeys((self._best, None)):
            ours, theirs = [], []
            try:
                with self.trial.under(dtype=dtype):
                    self.trial.together(changes, lambda net, events=ours: recording(net, events))
                    self.trial.alone(watch=lambda net, events=theirs: recording(net, events))
            except Exception:  # whatever a network raises that makes tensors of a dtype of its own
                continue
            opaque = tuple(f"{shell._path}." for shell in self.trial.shells)
            theirs = [event for event in theirs if not event[0].startswith(opaque)]
            for (path, entered, packed), (other, _, single) in zip(ours, theirs, strict=False):
                if path != other:
                    break
                if isinstance(packed, Tensor) and isinstance(single, Tensor):
                    place = self.trial.place(packed.shape, single.shape)
                    if place == "nowhere" or not self.figures.close(self.trial.mine(packed, place), single):
                        return path.rpartition(".")[0] if entered else path
        return ""

    def _by_members(self, changes: Changes, path: str, reason: str) -> Changes:
        """The module at `path`, or the first around it that does not do so yet, runs member by member, too."""
        taken = {*changes.whole, *(shell._path for shell in self.trial.shells)}
        while path and any(is_in(path, p) for p in taken):
            path = path.rpartition(".")[0]
        modules = dict(self.trial.net.named_modules(remove_duplicate=False))
        while wider := [
            p for p in entangled(modules, {path, *taken}) if path.startswith(f"{p}." if p else "") and p != path
        ]:
            path = wider[0]
        below = {p for p in changes.whole if p.startswith(f"{path}." if path else "")}
        return Changes(changes.contiguous, {path: reason, **{p: r for p, r in changes.whole.items() if p not in below}})
