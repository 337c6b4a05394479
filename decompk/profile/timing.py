"""How long a training step takes: the networks interleaved, and single layers alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..fx.pytree import leaves
from .counters import Call, backward
from .roofs import seconds_of

LEAST_ROUNDS, MOST_ROUNDS = 3, 30
LAYER_SECONDS = 0.01  # quick layers are repeated for as long

Job = Sequence[tuple[nn.Module, Tensor, torch.optim.Optimizer]]


@dataclass(frozen=True)
class Times:
    """Seconds of the repeated passes of one job, a value a round."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)  # the optimizer's step

    @property
    def step(self) -> list[float]:
        """Forward, backward and update together."""
        return [sum(parts) for parts in zip(self.forward, self.backward, self.update, strict=True)]


def interleaved(
    jobs: Mapping[str, Job], device: torch.device, seconds: float, tell: Callable[[str], None]
) -> dict[str, Times]:
    """Training steps of all jobs in turn, for about `seconds`, at least three rounds: name → Times.

    A job is a list of (network, input, optimizer) to be trained one after the other; its times are their sums. In
    turn, so that whatever else the machine does falls on all alike.
    """
    found = {name: Times() for name in jobs}
    begun, rounds = time.monotonic(), 0
    while rounds < LEAST_ROUNDS or (time.monotonic() - begun < seconds and rounds < MOST_ROUNDS):
        for name, job in jobs.items():
            tell(f"timing {name}")
            parts = [_step(net, x, optimizer, device) for net, x, optimizer in job]
            totals = [sum(part) for part in zip(*parts, strict=True)]
            times = found[name]
            for values, value in zip((times.forward, times.backward, times.update), totals, strict=True):
                values.append(value)
        rounds += 1
    return found


def _step(net: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[float, ...]:
    net.zero_grad()
    forward, outputs = seconds_of(partial(net, x), device)
    back, _ = seconds_of(partial(backward, outputs), device)
    update, _ = seconds_of(optimizer.step, device)
    return forward, back, update


def layer_times(
    calls: Mapping[str, Call], device: torch.device, tell: Callable[[str], None]
) -> dict[str, tuple[float, float]]:
    """Median seconds (forward, backward) of every layer alone; layers that cost the same are measured once."""
    found: dict[str, tuple[float, float]] = {}
    for name, call in calls.items():
        if call.key not in found:
            tell(f"timing layer {name}")
            found[call.key] = _alone(call, device)
    return {name: found[call.key] for name, call in calls.items()}


def _alone(call: Call, device: torch.device) -> tuple[float, float]:
    args, kwargs = call.fresh(device)
    passes: list[tuple[float, float]] = []
    begun = 0.0
    while len(passes) < 1 + LEAST_ROUNDS or time.monotonic() - begun < LAYER_SECONDS:
        if len(passes) == 1:  # the first is not counted
            begun = time.monotonic()
        for tensor in (*call.module.parameters(), *filter(torch.is_tensor, leaves((args, kwargs)))):
            tensor.grad = None  # or the backward pass would also add
        forward, outputs = seconds_of(partial(call.module, *args, **kwargs), device)
        back, _ = seconds_of(partial(backward, outputs), device)
        passes.append((forward, back))
    forwards, backs = zip(*passes[1:], strict=True)
    return statistics.median(forwards), statistics.median(backs)
