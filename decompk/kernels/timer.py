"""The timer: contestants in turns, so that whatever else the machine does falls on all alike; and clocks."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch

Sample = TypeVar("Sample")
FOREVER = 1e9  # ms


def is_a_time(ms: object) -> bool:
    """Whether what a file holds may be measured milliseconds: more than none, and less than days."""
    return type(ms) in (int, float) and 0 < cast(float, ms) < FOREVER


def in_turns(
    contestants: Mapping[str, Callable[[], Sample]],
    rounds: float | Mapping[str, int] = math.inf,
    *,
    least: int = 1,
    seconds: float = math.inf,
    warm: bool = False,
    hopeless: float | Sequence[float] = math.inf,
) -> dict[str, list[Sample]]:
    """name → samples. A contestant runs once and returns a sample; a round takes each once, the next one first.

    rounds: at most as many, for all or for each. seconds: no round begins after them, but for the first `least`. warm:
    before, everybody runs once and is not counted. hopeless: whose smallest sample is as many times the smallest of
    all takes no further part, and who is left alone has won; of several such limits each round has the next.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    if warm:
        for run in contestants.values():
            run()
    end = time.perf_counter() + seconds
    limits = hopeless if isinstance(hopeless, Sequence) else [hopeless]
    names = list(contestants)
    turns = dict(rounds) if isinstance(rounds, Mapping) else dict.fromkeys(names, rounds)
    for turn in itertools.count():
        first = turn % max(1, len(names))
        running = [name for name in names[first:] + names[:first] if turn < turns[name]]
        won = turn > 0 and limits[0] < math.inf and len(running) == 1
        if not running or won or (turn >= least and time.perf_counter() > end):
            break
        for name in running:
            samples[name].append(contestants[name]())
        if limits[0] < math.inf:
            smallest: dict[str, Any] = {name: min(cast(list[Any], found)) for name, found in samples.items()}
            limit = limits[min(turn, len(limits) - 1)] * min(smallest.values())
            turns = {name: turns[name] if smallest[name] < limit else 0 for name in names}
    return samples


class Clock:
    """`with Clock() as clock:`, then clock.seconds: the host's time between entry and exit."""

    def __enter__(self) -> Clock:
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begin


class Events:
    """The same of what the GPU's current stream was given meanwhile; to be read when the GPU is through with it."""

    def __enter__(self) -> Events:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._begin.record()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.record()

    @property
    def seconds(self) -> float:
        return self._begin.elapsed_time(self._end) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait until the GPU is through, where `device` is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_seconds(run: Callable[[], object], device: torch.device, count: int = 1) -> float:
    """Mean seconds of `count` runs by the host's clock, from an idle device to an idle device."""
    synchronize(device)
    with Clock() as clock:
        for _ in range(count):
            run()
        synchronize(device)
    return clock.seconds / count


def device_seconds(run: Callable[[], Sample], device: torch.device) -> tuple[float, Sample]:
    """(seconds, result) of one run on an idle device: by CUDA events on a GPU, else by the clock."""
    synchronize(device)
    with Events() if device.type == "cuda" else Clock() as clock:
        result = run()
    synchronize(device)
    return clock.seconds, result
