"""Which schedule of a packed network is fastest here: its kinds of calls in words, and a measurement beside them."""

from __future__ import annotations

import contextlib
import hashlib
import statistics
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..crops import by
from ..fx.pytree import tensors_of
from ..fx.unseen import seeded, unseen
from ..kernels import measure
from ..kernels.timer import Clock, in_turns
from .apart import Call, unseen_copy

if TYPE_CHECKING:
    from .module import Packed

LEAST, ROUNDS, SECONDS = 3, 7, 8.0  # rounds; after the least none begins later than these seconds
CLOSE = (measure.HOPELESS, 1.5, 1.25)  # who takes as many times the fastest's time after a round runs no more
LONG = 10.0  # seconds of one run from which on each is timed once
MARGIN = 0.97  # schedules by layers are chosen where others do not take less than that share of their time
BY_LAYERS = ("together", "fused", "side by side")
_BATCH = ", batch "


class _Runs(Protocol):
    name: str

    def run(self, call: Call) -> Any: ...


def kind_of(packed: Packed, x: Tensor, shared: bool, N: int) -> str:
    """What calls have in common that are run by one schedule, in words; its end is the number of samples."""
    dtype = str(x.dtype).removeprefix("torch.")
    if torch.is_autocast_enabled("cpu"):
        dtype += f" as {str(torch.get_autocast_dtype('cpu')).removeprefix('torch.')}"
    gradients = "no gradients"
    if torch.is_grad_enabled():
        gradients = "gradients of x, too" if x.requires_grad else "gradients"
    sample = by(x.shape[1 if shared else 2 :]) or "1"
    return (
        f"{'train' if packed.training else 'eval'}, {gradients}, {'shared' if shared else 'own'} {sample} {dtype}, "
        f"{torch.get_num_threads()} threads{_BATCH}{N}"
    )


def nearest(kind: str, kinds: Iterable[str]) -> str | None:
    """The one of `kinds` that differs from `kind` in the number of samples alone, and in that least."""
    alike, _, N = kind.rpartition(_BATCH)
    sizes = {int(size): other for other in kinds for same, _, size in [other.rpartition(_BATCH)] if same == alike}
    return sizes[min(sizes, key=lambda size: (abs(size - int(N)), size))] if sizes else None


def structure_of(packed: Packed, schedules: Iterable[str]) -> str:
    """A digest of the network's classes, their settings and tensors, in the order of its modules, and who competes."""
    found: list[object] = [type(packed).__name__, packed._K, packed._crops, *schedules]
    for path, module in packed._inner.named_modules():
        tensors = [(name, tuple(p.shape), p.dtype) for name, p in module._parameters.items() if p is not None]
        found.append((path, type(module).__name__, module.extra_repr(), tensors))
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def best_of(times: dict[str, float]) -> str:
    return min(times, key=lambda name: times[name] * (MARGIN if name in BY_LAYERS else 1))


def time_each(call: Call, schedules: Iterable[_Runs]) -> dict[str, float]:
    """Milliseconds of each schedule on this call, forward and, with gradients, backward: see `_usual`.

    The first is the network's own, which alone is not timed. One that raises has no time. It runs a copy that shares
    the parameters' memory: gradients, buffers, hooks and random state see nothing of it.
    """
    with unseen(), seeded(0, ()):
        packed = unseen_copy(call.packed)
        x = call.x.detach().clone().requires_grad_(call.x.requires_grad)
        wanted = [t for t in (x, *packed.parameters()) if t.requires_grad] if torch.is_grad_enabled() else []

        def seconds(one: _Runs) -> float:
            with Clock() as clock:
                out = tensors_of(one.run(Call(packed, x, call.shared, call.N, call.way)))
                out = [t for t in out if t.requires_grad]
                if out and wanted:
                    total: Any = sum(t.sum() for t in out)
                    total.backward(inputs=wanted)  # where gradients are laid as their tensors lie, which takes its time
            for t in wanted:
                t.grad = None
            return clock.seconds

        own, *others = schedules
        seconds(own)  # its layers choose their kernels
        if not others:
            return {}
        long = seconds(own) > LONG
        running = {own.name: partial(seconds, own)}
        for one in others:
            with contextlib.suppress(Exception):  # whatever a network raises that runs otherwise than it did
                seconds(one)
                running[one.name] = partial(seconds, one)
        found = in_turns(running, 1 if long else ROUNDS, least=LEAST, seconds=SECONDS, hopeless=CLOSE)
    return {name: 1e3 * _usual(samples) for name, samples in found.items()}


def _usual(samples: Sequence[float]) -> float:
    """The mean of the smaller half.

    Bursts of other work would decide the median of few; the least alone hides how a schedule bears such work, and many
    short parallel regions bear it worse than members on threads.
    """
    return statistics.fmean(sorted(samples)[: (len(samples) + 1) // 2])
