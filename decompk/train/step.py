"""One training step as one call: forward, loss, backward, clipping, optimizer; on a GPU as one captured graph."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..errors import DecompkError, brief
from ..optim import clip_grad_norm_, limits
from ..packed.ahead import can_compile, compile_launches, kept_buffers, launches_of
from ..packed.pack import Packed

PRECISIONS = ("float32", "bf16", "float64")
EAGER_STEPS = 3  # before a graph is captured: lazy state, cuDNN's and Triton's choices


@dataclass(frozen=True)
class Sums:
    """What the steps since the last reset came to, a number per member."""

    loss: list[float]  # mean cross-entropy
    accuracy: list[float]  # % of the training images, as they were trained on
    images: int


class Step:
    """Trains `net` by one batch a call, and sums loss and accuracy on the device.

    net: a packed module, whose output is (K, N, classes), or any network of output (N, classes). optimizer: one of
    decompk.optim, or of torch. loss: (logits, target) → scalar; `losses.cross_entropy` of (K, N, classes) by default.
    precision: "bf16" runs the forward pass under autocast, "float64" expects `net` and images in it. clip: largest norm
    of each member's gradient, 0 for none. compile: run `net` through torch.compile. graph: on a GPU, capture the whole
    step in a CUDA graph, one for every shape of batch; the optimizer must be capturable. Where compiling or capturing
    cannot be done the step runs without, and `reasons` says why. `weight` scales the loss of each call, for a share of
    a larger batch.

    No call waits for the device; `read` does.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Tensor, Tensor], Tensor] = losses.cross_entropy,
        *,
        precision: str = "float32",
        clip: float | Sequence[float] = 0.0,
        compile: bool = False,
        graph: bool = False,
    ):
        self.net, self.optimizer, self.loss = net, optimizer, loss
        self.precision, self.clip = precision, clip
        self.reasons: dict[str, str] = {}
        self._device = next(net.parameters()).device
        self._run = torch.compile(net) if compile else net
        self._compile, self._ready = compile, False
        self._graphs: dict[Any, _Graph] = {}
        self._eager_steps: Counter[Any] = Counter()
        self._sums: Tensor | None = None
        self.graph = graph and self._may_capture()

    def __call__(self, x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """Train by the batch x (N, C, H, W) or (K, N, C, H, W), y (N,) or (K, N), both on the network's device."""
        if not self._ready:
            self._prepare(x, y)
        key = (x.shape, y.shape, x.dtype, weight)
        if not self.graph or self._eager_steps[key] < EAGER_STEPS:
            self._eager_steps[key] += 1
            self._train(x, y, weight)
            return
        version = self._constants()
        if key not in self._graphs or self._graphs[key].version != version:
            self._graphs.pop(key, None)
            try:
                self._graphs[key] = _Graph(self, x, y, weight, version)
            except RuntimeError as error:
                self._give_up("graph", error)
                self._train(x, y, weight)
                return
        self._graphs[key].replay(x, y)

    def read(self) -> Sums:
        """Means since the last reset. Waits for the device."""
        return Sums([], [], 0) if self._sums is None else means(self._sums)

    def reset(self) -> None:
        """Start the sums anew."""
        if self._sums is not None:
            self._sums.zero_()

    def sums(self) -> Tensor | None:
        """(3, K): Σ loss · images, Σ right, Σ images since the last reset; what a checkpoint keeps."""
        return self._sums

    def set_sums(self, sums: Tensor | None) -> None:
        """Go on from the `sums` of a checkpoint."""
        self._sums = None if sums is None else sums.to(self._device, copy=True)
        self._graphs.clear()  # they add to the sums that were
        self._eager_steps.clear()  # no graph may make the sums: each replay would start them anew

    def _train(self, x: Tensor, y: Tensor, weight: float) -> None:
        logits = self._gradients(x, y, weight)
        if self.clip:
            self._clip()
        self.optimizer.step()
        self._note(logits, y)

    def _gradients(self, x: Tensor, y: Tensor, weight: float) -> Tensor:
        """Forward and backward; returns the logits (K, N, classes)."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self._device, self.precision):
            logits = self._run(x)
        logits = logits.unsqueeze(0) if logits.dim() == 2 else logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = self.loss(logits, y)
        (loss * weight if weight != 1 else loss).backward()
        return logits.detach()

    def _clip(self) -> None:
        if hasattr(self.net, "K"):
            clip_grad_norm_(self.net, self.clip)
        else:
            most: Any = self.clip  # one number: there are no members
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), most)

    @torch.no_grad()
    def _note(self, logits: Tensor, y: Tensor) -> None:
        K, N = logits.shape[:2]
        if self._sums is None:
            self._sums = torch.zeros(3, K, dtype=torch.float64, device=logits.device)
        target = y.expand(K, N)
        each = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        right = logits.argmax(-1) == target
        self._sums[0] += each.view(K, N).sum(1)
        self._sums[1] += right.sum(1)
        self._sums[2] += N

    def _constants(self) -> Any:
        """What a graph of this step holds and its caller may change; what is on the device is brought up to date."""
        prepared = self.optimizer.prepare() if hasattr(self.optimizer, "prepare") else None
        clip = tuple(self.clip) if isinstance(self.clip, Sequence) else self.clip
        if clip and isinstance(self.net, Packed):
            self._limits = limits(self.net, clip, self._device)  # held as long as a graph may read it
        return prepared, clip

    def _may_capture(self) -> bool:
        if self._device.type != "cuda":
            self.reasons["graph"] = "no CUDA graph: the network is not on a GPU"
            return False
        if any(not group.get("capturable", group.get("fused")) for group in self.optimizer.param_groups):
            self.reasons["graph"] = "no CUDA graph: the optimizer is not capturable"
            return False
        return True

    def _prepare(self, x: Tensor, y: Tensor) -> None:
        """Compile forward and backward before anything is trained, so that a failure costs nothing."""
        self._ready = True
        if can_compile(self._device):
            run, self._run = self._run, self.net
            compile_launches(launches_of(self.net, lambda: self._gradients(x, y, 1.0)), self._device)
            self._run = run
        if not self._compile:
            return
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices), kept_buffers(self.net):
            try:
                self._gradients(x, y, 1.0)
            except Exception as error:  # torch.compile raises what its backends raise
                self._run = self.net
                self._give_up("compile", error)

    def _give_up(self, what: str, error: Exception) -> None:
        self.reasons[what] = f"no {what}: {brief(error)}"
        if what == "graph":
            self.graph = False
            self._graphs.clear()


def means(sums: Tensor) -> Sums:
    """What `Step.sums` come to, each divided by the number of images."""
    loss, right, images = sums.tolist()
    count = max(images[0], 1.0)
    return Sums([value / count for value in loss], [100 * value / count for value in right], int(images[0]))


class _Graph:
    """One captured step, for one shape of batch."""

    def __init__(self, step: Step, x: Tensor, y: Tensor, weight: float, version: Any):
        self.version = version
        self.x, self.y = x.clone(), y.clone()
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            step._train(self.x, self.y, weight)

    def replay(self, x: Tensor, y: Tensor) -> None:
        self.x.copy_(x, non_blocking=True)
        self.y.copy_(y, non_blocking=True)
        self.graph.replay()


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """What the forward pass runs under: bfloat16 where it pays for "bf16", nothing else for the others."""
    if precision not in PRECISIONS:
        raise DecompkError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}; choose one.")
    if precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def prepared(x: Tensor, precision: str) -> Tensor:
    """Images in the dtype that a network of that precision takes."""
    return x.double() if precision == "float64" else x
