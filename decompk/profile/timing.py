"""How long a training step takes: the networks interleaved, and single layers alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..fx.pytree import leaves
from ..kernels.timer import device_seconds, in_turns
from .counters import LayerCall, backward

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
    """Training steps of all jobs in turns, for about `seconds`, at least three rounds: name → Times.

    A job is a list of (network, input, optimizer) to be trained one after the other; its times are their sums.
    """

    def sample(name: str) -> tuple[float, ...]:
        tell(f"timing {name}")
        parts = [_step(net, x, optimizer, device) for net, x, optimizer in jobs[name]]
        return tuple(sum(part) for part in zip(*parts, strict=True))

    found = in_turns({n: partial(sample, n) for n in jobs}, MOST_ROUNDS, least=LEAST_ROUNDS, seconds=seconds)
    return {name: Times(*map(list, zip(*samples, strict=True))) for name, samples in found.items()}


def _step(net: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[float, ...]:
    net.zero_grad()
    forward, outputs = device_seconds(partial(net, x), device)
    back, _ = device_seconds(partial(backward, outputs), device)
    update, _ = device_seconds(optimizer.step, device)
    return forward, back, update


def layer_times(
    calls: Mapping[str, LayerCall], device: torch.device, tell: Callable[[str], None]
) -> dict[str, tuple[float, float]]:
    """Median seconds (forward, backward) of every layer alone; layers that cost the same are measured once."""
    found: dict[str, tuple[float, float]] = {}
    for name, call in calls.items():
        if call.key not in found:
            tell(f"timing layer {name}")
            found[call.key] = _alone(call, device)
    return {name: found[call.key] for name, call in calls.items()}


def _alone(call: LayerCall, device: torch.device) -> tuple[float, float]:
    args, kwargs = call.fresh(device)

    def once() -> tuple[float, float]:
        for tensor in (*call.module.parameters(), *filter(torch.is_tensor, leaves((args, kwargs)))):
            tensor.grad = None  # or the backward pass would also add
        forward, outputs = device_seconds(partial(call.module, *args, **kwargs), device)
        back, _ = device_seconds(partial(backward, outputs), device)
        return forward, back

    passes = in_turns({"layer": once}, least=LEAST_ROUNDS, seconds=LAYER_SECONDS, warm=True)["layer"]
    forwards, backs = zip(*passes, strict=True)
    return statistics.median(forwards), statistics.median(backs)
