"""A race: whoever is right is timed, side by side with the others, in turns; pytest-benchmark reports what it found."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from journal import sentence
from torch import Tensor

from decompk.kernels.timer import in_turns, wall_seconds

Result = dict[str, Tensor]  # "output" and "gradient of …", each (K, …)
FAIR = {"output": 1e-4, "gradient": 5e-2}  # float32: one ReLU that flips moves a gradient by a hundredth
HOPELESS = 2.0  # who takes that many times as long as the fastest wins nothing: two rounds say how much it loses
SANE = 0.3  # torch's own output further off than this means that the reference does not describe what is run

# ---- who runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a run has to do: compulsory bytes, each tensor moved once, and useful FLOPs."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Contestant:
    """`run` is what is timed; `result` takes what it returned, and says what was computed.

    Without a `result` it computes something else than the others, and is not compared.
    """

    run: Callable[[], Any]
    result: Callable[[Any], Result] | None
    work: Work


Build = Callable[[], Contestant]

# ---- who is right ---------------------------------------------------------------------------------------------------


def errors(result: Mapping[str, Tensor], reference: Mapping[str, Tensor], typical: bool = False) -> dict[str, float]:
    """The largest ‖a − b‖ / ‖b‖ of any tensor and member, of "output" and of "gradient"; infinite for NaN.

    A tensor below a thousandth of its member's whole gradient, such as that of a bias before a batch norm, which is
    rounding alone, is held against that thousandth. `typical`: of gradients the median member counts, not the worst;
    where one ReLU flips by rounding, a narrow member's gradient may be off by a half, in torch's own layers too.
    """
    parts = {_part(name) for name in reference}
    if {name: t.shape for name, t in result.items()} != {name: t.shape for name, t in reference.items()}:
        return dict.fromkeys(parts, math.inf)
    size = {name: _norms(b) for name, b in reference.items()}
    worst = dict.fromkeys(parts, 0.0)
    for part in parts:
        whole = sum(norm**2 for name, norm in size.items() if _part(name) == part).sqrt()
        for name, b in reference.items():
            if _part(name) == part:
                away = _norms(result[name].detach().to(b.device, b.dtype) - b)
                by_member = away / size[name].maximum(1e-3 * whole).clamp_min(1e-300)
                error = (by_member.median() if typical and part == "gradient" else by_member.max()).item()
                worst[part] = max(worst[part], math.inf if math.isnan(error) else error)
    return worst


def _part(name: str) -> str:
    return name.partition(" ")[0]


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


# ---- who is fast ----------------------------------------------------------------------------------------------------


@dataclass
class Race:
    """By contestant: seconds of one run in every round it took part in, and its errors; or why it was not timed."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    work: dict[str, Work] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def race(
    builds: Mapping[str, Build],
    reference: Result,
    own: Sequence[str],
    slack: Mapping[str, float] = FAIR,
    typical: bool = False,
    rounds: int = 5,
    least: float = 0.0,
    most: float = math.inf,
    hopeless: float = math.inf,
) -> Race:
    """Build everybody, compare their results with `reference` in float64, then time those who are right.

    own: contestants that are torch's own layers, one member at a time. An error is allowed up to three times theirs,
    plus `slack`: what rounding alone does to a deep network's gradients depends on the network. `typical`: as in
    `errors`. A round takes every contestant once, each time another one first; a time is the mean of as many runs as
    take `least` seconds. Who needs more than `most` seconds for all rounds takes part in fewer, but in three; who takes
    `hopeless` times as long as the fastest, in two.
    """
    found = Race()
    runs: dict[str, Callable[[], Any]] = {}
    for name, build in builds.items():
        try:
            contestant = build()
            output = contestant.run()
            if contestant.result is not None:
                found.errors[name] = errors(contestant.result(output), reference, typical)
            runs[name], found.work[name] = contestant.run, contestant.work
        except Exception as error:  # whatever torch's compiler, vmap or a full memory has to say
            found.failed[name] = sentence(error)
        output = None
    for name in own:
        if name not in found.errors:
            raise RuntimeError(f"{name}, by whom the others are judged, does not run: {found.failed[name]}")
    fair = {part: max(found.errors[name][part] for name in own) for part in {_part(name) for name in reference}}
    if fair["output"] > SANE:
        raise RuntimeError(f"torch's own layers miss the reference by {fair['output']:.1e}: is anything random?")
    for name, parts in found.errors.items():
        bad = [f"{part} off by {e:.1e}" for part, e in parts.items() if not e <= 3 * fair[part] + slack[part]]
        if bad:
            found.wrong[name] = ", ".join(bad)
            del runs[name]

    gc.collect()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    once = {name: max(wall_seconds(run, device), 1e-6) for name, run in runs.items()}
    limit = hopeless * min(once.values())
    plans = {name: _plan(s, rounds if s < limit else min(2, rounds), least, most) for name, s in once.items()}
    first = 1 if all(count == 1 for _, count in plans.values()) else 0  # these were a round already
    names = [*list(runs)[first:], *list(runs)[:first]]
    timed = {name: partial(wall_seconds, runs[name], device, plans[name][1]) for name in names}
    times = in_turns(timed, {name: plans[name][0] - first for name in names})
    found.seconds = {name: [once[name]] * first + times[name] for name in runs}
    return found


def _plan(once: float, rounds: int, least: float, most: float) -> tuple[int, int]:
    """(rounds to take part in, runs a round) of who takes `once` seconds for one run."""
    count = max(1, math.ceil(least / once))
    return max(min(3, rounds), min(rounds, int(min(most / (count * once), rounds)))), count


# ---- what pytest-benchmark is told ----------------------------------------------------------------------------------


@dataclass
class Spec:
    """One race of the bench: `sides` says of every contestant whether it is "ours", a "peer" or the "global" network.

    facts: what else the result file says of every entry.
    """

    part: str
    title: str
    sides: dict[str, str]
    make: Callable[[], Race]
    facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def race(self) -> Race:
        """Run when the first contestant is asked for; everything that it built is freed behind it."""
        try:
            return self.make()
        finally:
            gc.collect()
            torch._dynamo.reset()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def entries(specs: Iterable[Spec]) -> list[Any]:
    """pytest's parameters (spec, name), one for every contestant of every race."""
    return [pytest.param(spec, name, id=f"{spec.title}-{name}") for spec in specs for name in spec.sides]


class Replay:
    """The clock of a race that is over.

    A claim about speed is a ratio, so everybody has to be timed in the same minutes. pytest-benchmark times one after
    the other; therefore `race` times, and pytest-benchmark, with this as its timer, is shown the same seconds again.
    """

    def __init__(self) -> None:
        self.now, self.left = 0.0, iter(())

    def __call__(self) -> float:
        return self.now

    def load(self, seconds: Sequence[float]) -> None:
        self.now, self.left = 0.0, iter(seconds)

    def run(self) -> None:
        self.now += next(self.left)


CLOCK = Replay()
LEFT_OUT: list[dict[str, str]] = []  # who was not timed, and why, for the result file


def enter(benchmark: Any, spec: Spec, name: str, roofs: Work | None = None) -> None:
    """One contestant's entry. A wrong one fails; one that cannot run is skipped with the reason, unless it is ours.

    roofs: bytes and FLOPs that the machine moves and computes in a second.
    """
    found, side = spec.race, spec.sides[name]
    why = found.wrong.get(name) or found.failed.get(name)
    if why:
        LEFT_OUT.append({"part": spec.part, "case": spec.title, "contestant": name, "why": why})
        if name in found.wrong or side == "ours":
            pytest.fail(f"{spec.title}, {name}: {why}")
        pytest.skip(why)
    seconds, work = found.seconds[name], found.work[name]
    median = statistics.median(seconds)
    benchmark.group = f"{spec.part}: {spec.title}"
    benchmark.extra_info.update(
        part=spec.part,
        case=spec.title,
        contestant=name,
        side=side,
        **spec.facts,
        seconds=[float(f"{value:.6g}") for value in seconds],
        bytes=work.bytes,
        flops=work.flops,
        gbps=round(work.bytes / median / 1e9, 3),
        gflops=round(work.flops / median / 1e9, 3),
        errors={part: float(f"{error:.2g}") for part, error in found.errors.get(name, {}).items()},
    )
    if roofs is not None:
        attainable = max(work.bytes / roofs.bytes, work.flops / roofs.flops)
        benchmark.extra_info["roof_percent"] = round(100 * attainable / median, 2)
    CLOCK.load(seconds)
    benchmark.pedantic(CLOCK.run, rounds=len(seconds))
