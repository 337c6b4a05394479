"""How a kernel is measured: a problem's tensors, who else computes it, the gate before the timer, the timer."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from journal import sentence
from torch import Tensor

from decompk import ops
from decompk.crops import Crop
from decompk.kernels import conv
from decompk.kernels.call import dgrad_call, fprop_call, wgrad_call
from decompk.kernels.conv.form import Choice
from decompk.kernels.layout import cut, side_by_side
from decompk.kernels.problem import Config, Problem
from decompk.kernels.timer import Clock, Events, in_turns, wall_seconds

# ---- what is computed -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Torch's own float32 convolutions and products in `dtype`: "tf32", or in full for every other."""
    wanted = "tf32" if dtype == "tf32" else "ieee"
    both = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    with _set(both[0], "fp32_precision", wanted), _set(both[1], "fp32_precision", wanted):
        yield


@contextlib.contextmanager
def _set(settings: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(settings, name)
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)


def convolve(problem: Problem, x: Tensor, weight: Tensor, dy: Tensor, groups: int = 1) -> Tensor:
    """One pass of torch's own convolution: x (N, G·C, H, W), weight (G·O, C, kh, kw), dy (N, G·O, H', W')."""
    p = problem
    geometry = (p.stride, p.padding, p.dilation, False, (0, 0), groups)
    if p.kind == "fprop":
        return torch.convolution(x, weight, None, *geometry)
    mask = [p.kind == "dgrad", p.kind == "wgrad", False]
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, mask)[mask.index(True)]


class Trial:
    """Fresh random tensors of a Problem, as an operation holds them, and everyone who may compute it on them.

    call is the operation's own, and asked its Problem, which a Config is for: its pixels may be cut otherwise.
    x (K, N, C, H, W), with layout "crops" the image (1, N, C, *image), by default of twice their sizes;
    dy (K, N, O, H', W'); weight (K, O, C, kh, kw).
    """

    def __init__(self, problem: Problem, device: torch.device | str, image: tuple[int, int] | None = None):
        p = self.problem = problem
        self.device = torch.device(device)
        self.dtype = torch.float32 if p.dtype == "tf32" else getattr(torch, p.dtype)
        if p.layout == "crops":
            rows, columns = image or (2 * p.H, 2 * p.W)
            starts = [(13 * k % (rows - p.H + 1), 7 * k % (columns - p.W + 1)) for k in range(p.K)]
            self.crops = [Crop(*start, p.H, p.W) for start in starts]
            self.window = (p.H, p.W, *(n for start in starts for n in start))  # as operators take crops
            self.x = self._activation((1, p.N, p.C, rows, columns))
        else:
            self.window = ()
            self.x = self._activation((p.K, p.N, p.C, p.H, p.W))
        self.dy = self._activation((p.K, p.N, p.O, *p.out_size))
        scale = 1 / math.sqrt(p.C * p.taps)
        self.weight = self._random((p.K, p.O, *p.kernel, p.C)).mul_(scale).movedim(-1, 2)
        geometry = (p.stride, p.padding, p.dilation)
        self.call = fprop_call(self.x, self.weight, None, geometry, self.window, dtype=p.dtype)
        if p.kind != "fprop":
            self.call = (dgrad_call if p.kind == "dgrad" else wgrad_call)(self.call, self.dy)
        self.asked = self.call.problem

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def _activation(self, shape: tuple[int, ...]) -> Tensor:
        if self.problem.layout == "channel-grouped":
            K, N, C, H, W = shape
            return self._random((N, H, W, K, C)).permute(3, 0, 4, 1, 2)
        between = 16 if self.problem.layout == "strided" else 0
        K, N, C, H, W = shape
        return self._random((K, N, H, W, C + between))[..., :C].movedim(-1, 2)

    def members(self) -> Tensor:
        """The inputs (K, N, C, H, W): x, or the crops cut from it."""
        return cut(self.x, self.window) if self.window else self.x

    def by_torch(self, dtype: torch.dtype | None = None) -> Tensor:
        """The result of torch's own operator, a call a member: in float64 the reference."""
        dtype = dtype or self.dtype
        operands = zip(self.members(), self.weight, self.dy, strict=True)
        with precision(self.problem.dtype):
            return torch.stack([convolve(self.problem, *(t.to(dtype) for t in member)) for member in operands])

    def gate(self) -> Gate:
        with _set(torch.backends.cudnn, "benchmark", False):  # nobody waits for the reference twice
            reference = self.by_torch(torch.float64)
        return Gate(reference, self.by_torch())

    def poison(self) -> None:
        """NaN where the next result goes, and in the memory that is given out after it."""

        def once() -> Tensor:
            del self.call.empty
            return self.call.empty().fill_(math.nan)

        self.call.empty().fill_(math.nan)
        self.call.empty = once

    def by_op(self) -> Tensor:
        """As a network calls it: who runs is chosen."""
        p = self.problem
        geometry = (p.stride, p.padding, p.dilation)
        with torch.no_grad(), precision(p.dtype):
            if self.window and p.kind == "fprop":
                return ops.fused_conv2d(self.x[0], self.weight, None, *geometry, crops=self.crops)
            if self.window:
                return torch.ops.decompk.crop_conv2d_backward(self.dy, self.x, self.weight, self.window, *geometry)
            if p.kind == "fprop":
                return torch.ops.decompk.grouped_conv2d(self.x, self.weight, None, *geometry)
            wanted = [p.kind == "dgrad", p.kind == "wgrad", False]
            gradients = torch.ops.decompk.grouped_conv2d_backward(self.dy, self.x, self.weight, *geometry, wanted)
            return gradients[wanted.index(True)]

    def by_choice(self, choice: Choice, *around: Any) -> Tensor:
        """As the operation runs `choice`, without asking; around: of fprop an Epilogue, and a Prologue."""
        operands = {"fprop": (self.x, self.weight), "dgrad": (self.dy, self.weight), "wgrad": (self.dy, self.x)}
        with torch.no_grad(), precision(self.problem.dtype):
            return getattr(self.call, self.problem.kind)(choice, *operands[self.problem.kind], *around)

    def by_config(self, config: Config, *around: Any) -> Tensor:
        """`by_choice` of the form that the config is for."""
        return self.by_choice(Choice(conv.named(config.form), config, math.nan, "asked for"), *around)


# ---- who else computes it -------------------------------------------------------------------------------------------

Contestant = tuple[Callable[[], Any], Callable[[Any], Tensor]]  # what is timed; its result as the gate takes it


def same(result: Any) -> Any:
    return result


def channel_groups(x: Tensor) -> Tensor:
    """(K, N, C, H, W) → (N, K·C, H, W), channels_last, in memory of its own."""
    return side_by_side(x).contiguous(memory_format=torch.channels_last)


def rivals(trial: Trial) -> dict[str, Contestant]:
    """cuDNN on one pass: as channel groups without and with the copies that needs, member by member, and dense."""
    p, K = trial.problem, trial.problem.K
    x, dy, weight = channel_groups(trial.members()), channel_groups(trial.dy), trial.weight.flatten(0, 1)
    members = list(zip(trial.members(), trial.weight, trial.dy, strict=True))
    blocks = trial.weight.new_zeros(K, p.O, *p.kernel, K, p.C)
    for k in range(K):
        blocks[k, :, :, :, k] = trial.weight[k].movedim(1, -1)
    dense = blocks.flatten(4).flatten(0, 1).movedim(-1, 1)

    def by_member(result: Tensor) -> Tensor:
        if p.kind == "wgrad":
            return result.unflatten(0, (K, p.O))
        return result.unflatten(1, (K, -1)).movedim(1, 0)

    def diagonal(result: Tensor) -> Tensor:
        parts = result.unflatten(1, (K, p.C)).unflatten(0, (K, p.O))
        return torch.stack([parts[k, :, k] for k in range(K)])

    def copied() -> Tensor:
        operands = (x if p.kind == "dgrad" else channel_groups(trial.members()), weight)
        gradient = dy if p.kind == "fprop" else channel_groups(trial.dy)
        return trial.call.empty().copy_(by_member(convolve(p, *operands, gradient, K)))

    return {
        "cudnn_grouped": (partial(convolve, p, x, weight, dy, K), by_member),
        "cudnn_grouped_copied": (copied, same),
        "cudnn_loop": (lambda: [convolve(p, *member) for member in members], torch.stack),
        "cudnn_dense": (partial(convolve, p, x, dense, dy), diagonal if p.kind == "wgrad" else by_member),
    }


# ---- the gate -------------------------------------------------------------------------------------------------------


def errors(result: Tensor, reference: Tensor) -> tuple[float, float]:
    """(‖result − reference‖ / ‖reference‖, the largest difference / the largest reference); infinite for NaN."""
    away, tiny = result.double() - reference, 1e-300
    norm = away.norm() / reference.norm().clamp_min(tiny)
    peak = away.abs().max() / reference.abs().max().clamp_min(tiny)
    return tuple(math.inf if math.isnan(value) else value for value in torch.stack((norm, peak)).tolist())


class Gate:
    """Who is right: at most twice as far from float64 as torch's own operator in the same dtype, plus 1e-6."""

    def __init__(self, reference: Tensor, own: Tensor):
        self.reference = reference
        self.own = errors(own, reference)

    def __call__(self, result: Tensor) -> tuple[float, str | None]:
        """(relative error, what is wrong or None)."""
        if result.shape != self.reference.shape:
            return math.inf, f"wrong: {tuple(result.shape)} instead of {tuple(self.reference.shape)}"
        found = errors(result, self.reference)
        if all(error <= 2 * own + 1e-6 for error, own in zip(found, self.own, strict=True)):
            return found[0], None
        pairs = zip(("norm", "peak"), found, self.own, strict=True)
        return found[0], "wrong: " + ", ".join(f"{name} {error:.2e}, torch {own:.2e}" for name, error, own in pairs)


# ---- the timer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median and quantiles of `runs` runs."""

    ms: float
    ms_p20: float
    ms_p80: float
    runs: int

    @staticmethod
    def of(times: list[float]) -> Timing:
        """times: seconds."""
        levels = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        return Timing(*torch.tensor(times, dtype=torch.float64).quantile(levels).mul(1e3).tolist(), len(times))


class Timer:
    """Times contestants in turn by CUDA events.

    Cold: L2 is read full of something else before each run, and the run is queued behind a pause as long as the host
    takes to launch it, so that it shows what the GPU does. Warm: back to back, the host's time included.
    """

    def __init__(self, device: torch.device):
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26)
        self.other = torch.ones(4 * max(l2, 2**26) // 4, device=device)

    def __call__(
        self,
        contestants: dict[str, Callable[[], Any]],
        cold: bool = True,
        seconds: float = 0.05,
        runs: int = 50,
        least: int = 5,
    ) -> dict[str, Timing]:
        """Of each the median of as many runs as take `seconds`, of `runs` at most and `least` at least."""
        plans = {name: self._plan(call, seconds, runs, least) for name, call in contestants.items()}

        def once(name: str) -> Events:
            if cold:
                self.other.sum()  # reads, so that no dirty line has to be written back while the run is timed
                torch.cuda._sleep(plans[name][1])
            with Events() as events:
                contestants[name]()
            return events

        samples = in_turns({n: partial(once, n) for n in contestants}, {n: count for n, (count, _) in plans.items()})
        torch.cuda.synchronize()
        return {name: Timing.of([events.seconds for events in found]) for name, found in samples.items()}

    def _plan(self, call: Callable[[], Any], seconds: float, runs: int, least: int) -> tuple[int, int]:
        """(how often to run, clock cycles the host needs to launch it)."""
        call()
        torch.cuda.synchronize()
        with Clock() as whole:
            with Clock() as launch:
                call()
            torch.cuda.synchronize()
        return min(runs, max(least, int(seconds / whole.seconds))), int(min(launch.seconds, 0.02) * 2e9) + 20_000


class HostTimer:
    """The same on a CPU, by the clock: to see that everything runs, not how fast."""

    def __call__(self, contestants: dict[str, Callable[[], Any]], **_: Any) -> dict[str, Timing]:
        timed = {name: partial(wall_seconds, call, torch.device("cpu")) for name, call in contestants.items()}
        return {name: Timing.of(times) for name, times in in_turns(timed, rounds=2).items()}


# ---- the GPU ---------------------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> float:
    """Bytes; no limit on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def end_if_lost(device: torch.device) -> None:
    """After an error: end the process where the GPU answers nothing any more; who supervises it starts it again."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            print(f"the GPU's context is lost: {sentence(error)}", file=sys.stderr)
            raise SystemExit(3) from error


def describe(choice: Choice) -> str:
    """A Choice in a few characters."""
    c = choice.config
    if c is None:
        return f"{choice.backend} {choice.form.name}"
    tile, shared = "×".join(map(str, c.tile)), f" {c.splits} splits" if c.splits > 1 else ""
    atomic = " atomic" if c.atomic else ""
    return f"{c.form} {tile} {c.block_in}→{c.block_out} {c.warps} warps {c.stages} stages{shared}{atomic}"
