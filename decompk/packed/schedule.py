"""In which order a packed network's members and layers run on a CPU: the schedules, and the one in force."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch._C import _autograd
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _len_torch_function_stack

from ..errors import BackendError, DecompkError, UnsupportedOperation, brief
from ..fx.pytree import tree_map
from ..kernels import cpu, measure
from ..kernels.backend import EXACT
from ..kernels.backend import forced as forced_backend
from ..kernels.call import watched
from ..threads import one_at_a_time
from .apart import Call, Standing
from .choice import best_of, kind_of, nearest, structure_of, time_each
from .on_threads import OnThreads
from .per_member import PerMember
from .program import Program
from .side_by_side import SideBySide
from .twin import packed_batch

if TYPE_CHECKING:
    from .module import Packed


class Schedule(Protocol):
    """One order in which all members of a call run; every one computes the same, to rounding."""

    name: str

    def why_not(self, call: Call) -> str | None:
        """Why this call cannot run so; None where it can. Asked at each call."""

    def run(self, call: Call) -> Any:
        """What the packed network returns."""


class Together:
    """Layer after layer, each of all members, as the network runs by itself."""

    name = "together"

    def why_not(self, call: Call) -> str | None:
        return None

    def run(self, call: Call) -> Any:
        return call.packed._together(call.x, call.shared, call.N, call.way)


class FusedTogether:
    """The same on fused layers, as `decompk.fuse` runs them."""

    name = "fused"

    def why_not(self, call: Call) -> str | None:
        program = call.packed._plans.program(call.packed)
        if isinstance(program, str):
            return program
        return None if program.applies() else "its modules are no longer what torch.fx read"

    def run(self, call: Call) -> Any:
        program: Any = call.packed._plans.program(call.packed)
        return call.packed._together(call.x, call.shared, call.N, call.way, program)


class MembersSideBySide:
    """Layer after layer, all members' channels in one image, on torch's own grouped convolutions."""

    name = "side by side"

    def why_not(self, call: Call) -> str | None:
        program = call.packed._plans.side_by_side(call.packed)
        return program if isinstance(program, str) else program.why_not(call.x, call.shared)

    def run(self, call: Call) -> Any:
        packed = call.packed
        program: Any = packed._plans.side_by_side(packed)
        with packed_batch(packed._K * call.N):
            return packed._stacked(program(call.x, call.shared), call.way, call.N)


class InTurn:
    """Member after member, each through its whole network, and back through it in the opposite order."""

    name = "in turn"

    def why_not(self, call: Call) -> str | None:
        if isinstance(call.packed._inner, PerMember):
            return "the whole network runs member by member already"
        return call.standing.why_not_for(call)

    def run(self, call: Call) -> Any:
        outputs = call.standing.members(call.packed)._run([((part,), {}) for part in call.parts(call.x)])
        return tree_map(call.packed._stack, *outputs)


TOGETHER: Schedule = Together()
SCHEDULES: dict[str, Schedule] = {
    one.name: one for one in (TOGETHER, FusedTogether(), MembersSideBySide(), InTurn(), OnThreads())
}

forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("the schedule asked for by name", default=None)


@contextlib.contextmanager
def schedule(name: str) -> Iterator[None]:
    """Run packed networks inside by one schedule: "together", "fused", "side by side", "in turn" or "on threads".

    Of calls with one tensor, on a CPU; all compute the same, to rounding. "together": layer after layer, each of all
    members. "fused": the same as `fuse` would run it. "side by side": the same on images that hold all members'
    channels, by torch's own grouped convolutions. "in turn": member after member, each through its whole network. "on
    threads": members dealt to threads, each of which computes by itself. A backward runs as its forward did.
    Raises BackendError where there is no such schedule; a call that cannot run so raises DecompkError and says why.
    """
    check_schedule(name)
    token = forced.set(name)
    try:
        yield
    finally:
        forced.reset(token)


def check_schedule(name: str) -> None:
    if name not in SCHEDULES:
        raise BackendError(f"there is no schedule '{name}': choose one of {', '.join(SCHEDULES)}.")


def why_together(call: Call) -> str | None:
    """Why this call can run together alone, whatever the network; None where other schedules may run it."""
    if type(call.x) is not Tensor or call.x.device.type != "cpu":
        return "its input is no plain tensor on a CPU"
    if forced_backend.get() is not None:
        return f"backend '{forced_backend.get()}' is asked for"
    if watched() or torch._C._len_torch_dispatch_stack() or _len_torch_function_stack():
        return "something watches or transforms what it computes"
    if call.way.apart:
        return "calls of this kind run member by member"
    if _has_any_global_hook():
        return "there are hooks of all modules"
    if _autograd._top_saved_tensors_default_hooks(True) is not None:
        return "there are hooks of saved tensors"
    return None


def run(call: Call) -> Any:
    """What the packed network returns for `call`, by the schedule in force: asked for, or the fastest known."""
    if call.x.is_cpu:
        cpu.keep_freed_memory()
    name = forced.get()
    if name is None:
        chosen = call.packed._plans.chosen(call)
        if chosen is TOGETHER or why_together(call) or chosen.why_not(call):
            return TOGETHER.run(call)
        return chosen.run(call)
    chosen = SCHEDULES[name]
    if reason := chosen is not TOGETHER and (why_together(call) or chosen.why_not(call)):
        refuse_forced(reason)
    return chosen.run(call)


def refuse_forced(reason: str) -> None:
    """Raise DecompkError where a schedule is asked for by name that cannot run a call for that reason."""
    if (name := forced.get()) not in (None, TOGETHER.name):
        raise DecompkError(f"schedule '{name}' cannot run this call: {reason}.")


def settle(packed: Packed, *batches: Tensor) -> None:
    """Choose now, in the modes in force, the schedule of calls with each of these batches, and measure nothing later.

    Other kinds of calls run as the nearest number of samples does, or together. The network is rehearsed, and its
    kernels are compiled; weights, gradients, buffers and random numbers are as before. Where nothing may be measured
    (DECOMPK_MEASURE=0, deterministic algorithms) what is known is kept to.
    """
    packed._plans.close(False)
    for x in batches:
        call = packed._call(x)
        chosen = packed._plans.settled(call).schedule
        chosen.why_not(call)  # which makes what it needs
        time_each(call, [chosen])
    packed._plans.close()


def described(packed: Packed, x: Tensor) -> str:
    """The schedule of a call with x in the modes in force, and why it is that."""
    if name := forced.get():
        return f"schedule: {name} (asked for by name)"
    shared = packed._is_shared(x, (x,))
    kind = kind_of(packed, x, shared, x.shape[0 if shared else 1])
    times = packed._plans.times(packed, kind)
    name = packed._schedules.get(kind) or (best_of(times) if times else None)
    if name is None:
        later = "it is at the third call of a kind" if measure.allowed() else "DECOMPK_MEASURE=0"
        return f"schedule: {packed._plans.plan(packed, kind).schedule.name} (not measured: {later})"
    if not times:
        return f"schedule: {name} (as it was chosen before)"
    shown = ", ".join(f"{one} {times[one]:.3g}" for one in sorted(times, key=times.__getitem__))
    return f"schedule: {name} (measured here, ms: {shown})"


@dataclass
class Plan:
    """How one kind of call runs; the next measurement is at call number `due`, never where it is settled (0)."""

    kind: str
    schedule: Schedule
    due: int
    calls: int = 0


class Plans:
    """What one packed network knows of its schedules; a copy of the network finds out anew what is not recorded."""

    def __init__(self) -> None:
        self.closed = False  # nothing more is measured
        self.forget()

    def close(self, closed: bool = True) -> None:
        """From now on nothing more is measured."""
        self.closed = closed
        self._table.clear()

    def forget(self) -> None:
        """The network has changed, or what is recorded in it."""
        self._table: dict[Any, Plan] = {}
        self._standings: list[Standing] = []
        self._program: Program | str | None = None
        self._side_by_side: SideBySide | str | None = None
        self._structure = ""

    def chosen(self, call: Call) -> Schedule:
        """The schedule of a call; at the third call of a kind the fastest is measured."""
        packed, x = call.packed, call.x
        if call.way.apart or x.device.type != "cpu" or type(x) is not Tensor or x.dtype in EXACT:
            return TOGETHER
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        modes = packed._inner.training, torch.is_grad_enabled(), x.requires_grad, torch.get_num_threads()
        key = (x.shape, call.shared, x.dtype, autocast, modes)
        plan = self._table.get(key)
        if plan is None:
            plan = self._table[key] = self.plan(packed, kind_of(packed, x, call.shared, call.N))
        if plan.due:
            plan.calls += 1
            if plan.calls >= plan.due and not self.closed and measure.allowed() and not self._measured(plan, call):
                plan.due *= 2
        return plan.schedule

    def settled(self, call: Call) -> Plan:
        """The plan of a call, measured now where that may be."""
        plan = self.plan(call.packed, kind_of(call.packed, call.x, call.shared, call.N))
        if plan.due and measure.allowed():
            self._measured(plan, call)
        return plan

    def plan(self, packed: Packed, kind: str) -> Plan:
        """What is known of a kind: recorded in the network, measured before, or that of the nearest size.

        Of a settled network what is recorded alone, so that it runs alike where the cache is gone.
        """
        if kind in packed._schedules:
            return Plan(kind, SCHEDULES[packed._schedules[kind]], 0)
        if times := not self.closed and self.times(packed, kind):
            packed._schedules[kind] = best_of(times)
            return Plan(kind, SCHEDULES[packed._schedules[kind]], 0)
        name = TOGETHER.name
        prefix = self._key(packed, "")
        if other := nearest(kind, packed._schedules):
            name = packed._schedules[other]
        elif other := not self.closed and nearest(prefix + kind, measure.entries(measure.path())):
            name = best_of(self.times(packed, other.removeprefix(prefix)))
        return Plan(kind, SCHEDULES[name], CALLS)

    def times(self, packed: Packed, kind: str) -> dict[str, float]:
        """Schedule → milliseconds, as measured on this machine."""
        times = measure.times_of(measure.path(), self._key(packed, kind))
        return {name: ms for name, ms in times.items() if name in SCHEDULES}

    def _measured(self, plan: Plan, call: Call) -> bool:
        """Whether the fastest schedule of this kind could be measured."""
        if why_together(call) or call.x.dtype in EXACT or torch.are_deterministic_algorithms_enabled():
            return False
        offered = [one for one in SCHEDULES.values() if one.why_not(call) is None]
        if len(offered) == 1:
            return False
        with one_at_a_time():  # two that measure at once would measure each other
            times = time_each(call, offered)
            measure.keep(measure.path(), self._key(call.packed, plan.kind), times)
        call.packed._schedules[plan.kind] = best_of(times)
        plan.schedule, plan.due = SCHEDULES[best_of(times)], 0
        return True

    def _key(self, packed: Packed, kind: str) -> str:
        self._structure = self._structure or structure_of(packed, SCHEDULES)
        return f"network {self._structure}: {kind}"

    def standing(self, packed: Packed) -> Standing:
        """The network's modules as they are now: a mode, a hook or an attribute that changes makes another."""
        for one in self._standings:
            if one.holds():
                return one
        self._standings = [Standing(packed), *self._standings[: STANDINGS - 1]]
        return self._standings[0]

    def program(self, packed: Packed) -> Program | str:
        """The network's fused graphs, or why there are none."""
        if self._program is None:
            try:
                fused = "_program" in vars(packed)
                self._program = "it is fused already" if fused else Program(packed._inner, packed._crops)
            except UnsupportedOperation as error:
                self._program = brief(error)
        return self._program

    def side_by_side(self, packed: Packed) -> SideBySide | str:
        """The network's graphs for members side by side, or why there are none."""
        if self._side_by_side is None:
            try:
                self._side_by_side = SideBySide(packed._inner, packed._K, packed._crops)
            except UnsupportedOperation as error:
                self._side_by_side = brief(error)
        return self._side_by_side

    def __reduce__(self) -> tuple:
        return Plans, ()


CALLS = 3  # the call of a kind at which it is measured: the first ones also compile and rehearse
STANDINGS = 4  # sets of modes, mostly train and eval, whose members are kept
