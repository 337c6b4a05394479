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
from ..errors import DecompkError, PackError, brief
from ..optim import clip_grad_norm_, inside, limits
from ..packed.ahead import can_compile, compile_launches, kept_buffers, launches_of
from .capture import Capturable

PRECISIONS = ("float32", "bf16", "float64")
EAGER_STEPS = 3  # before a graph is captured: lazy state, cuDNN's and Triton's choices
FEW_REPLAYS = 4  # graphs that live no longer, so many of them in a row, cost more than they save


@dataclass(frozen=True)
class Sums:
    """What the steps since the last reset came to, a number per member."""

    loss: list[float]  # mean cross-entropy
    accuracy: list[float]  # % of the training images, as they were trained on
    images: int


class Step:
    """Trains `net` by one batch a call, and sums loss and accuracy on the device.

    net: a packed module, whose output is (K, N, …), or any network of output (N, …). optimizer: one of decompk.optim,
    or of torch. loss: (output, target) → scalar, of the members' losses their sum, as `losses.each` makes it;
    cross-entropy by default. precision: "bf16" runs the forward pass under autocast, "float64" expects `net` and
    images in it. clip: largest norm of each member's gradient, 0 for none. compile: run `net` through torch.compile.

    graph: on a GPU, capture the whole step in a CUDA graph, one for every shape of batch and every set of modes, after
    EAGER_STEPS steps without. The optimizer is made capturable; torch's gets its learning rates as tensors. Schedulers,
    `load_state_dict`, train and eval mode, frozen parameters and whatever changes weights in place between two calls
    are followed. A replay runs kernels, no Python: hooks and the network's own code act when a graph is captured, and
    `p.grad` is the memory of the last capture.

    Where compiling or capturing cannot be done the step runs without, and `reasons` says why. No call waits for the
    device; `read` does.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Any,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        *,
        precision: str = "float32",
        clip: float | Sequence[float] = 0.0,
        compile: bool = False,
        graph: bool = True,
    ):
        self.net, self.optimizer = net, optimizer
        self.precision, self.clip = precision, clip
        self.reasons: dict[str, str] = {}
        self._packed = _is_packed(net)
        self.loss = loss or (losses.cross_entropy if self._packed else nn.functional.cross_entropy)
        self._device = next(net.parameters()).device
        self._run = torch.compile(net) if compile else net
        self._compile, self._ready = compile, False
        self._modules, self._parameters = list(net.modules()), list(net.parameters())
        self._graphs: dict[Any, _Graph] = {}
        self._replays: Counter[Any] = Counter()
        self._short_lived = 0  # graphs in a row that were captured again after few replays
        self._eager_steps: Counter[Any] = Counter()
        self._weights: dict[Any, Tensor] = {}
        self._sums: Tensor | None = None  # (2, K): Σ loss, Σ right
        self._images = 0  # counted on the host, which knows
        self._capturable: Capturable | None = None
        self.graph = graph and self._may_capture()

    def __call__(self, x: Tensor, y: Tensor, weight: float = 1.0) -> Tensor:
        """Train by the batch x (N, …) or (K, N, …) and its targets y, both on the network's device.

        Returns the loss, a scalar on the device, without `weight`, which scales its gradient: for a share of a larger
        batch. Raises DecompkError.
        """
        if not self._ready:
            self._prepare(x, y)
        if not self.graph:
            return self._train(x, y, weight)
        modes = (*(m.training for m in self._modules), *(p.requires_grad for p in self._parameters))
        key = (x.shape, y.shape, x.dtype, y.dtype, weight, modes)
        if self._eager_steps[key] < EAGER_STEPS:
            self._eager_steps[key] += 1
            loss = self._train(x, y, weight)
            self._modules = list(self.net.modules())  # a packed network's first call may change them
            return loss
        version = self._constants()
        if key not in self._graphs or self._graphs[key].version != version:
            try:
                self._capture(key, x, y, weight, version)
            except DecompkError:  # a first step of its kind, which no graph may hold: the next one can
                return self._train(x, y, weight)
            except RuntimeError as error:
                self._give_up("graph", error)
                return self._train(x, y, weight)
        self._replays[key] += 1
        return self._graphs[key].replay(x, y)

    def read(self) -> Sums:
        """Means since the last reset, of outputs (K, N, classes) or (N, classes). Waits for the device."""
        sums = self.sums()
        return Sums([], [], self._images) if sums is None else means(sums)

    def reset(self) -> None:
        """Start the sums anew."""
        self._images = 0
        if self._sums is not None:
            self._sums.zero_()

    def sums(self) -> Tensor | None:
        """(3, K): Σ loss · images, Σ right, Σ images since the last reset; what a checkpoint keeps."""
        if self._sums is None:
            return None
        return torch.cat([self._sums, torch.full_like(self._sums[:1], self._images)])

    def set_sums(self, sums: Tensor | None) -> None:
        """Go on from the `sums` of a checkpoint. Waits for the device."""
        self._sums = None if sums is None else sums[:2].to(self._device, copy=True)
        self._images = 0 if sums is None else int(sums[2, 0])
        self._graphs.clear()  # they add to the sums that were
        self._eager_steps.clear()  # no graph may make the sums: each replay would start them anew

    def _train(self, x: Tensor, y: Tensor, weight: float) -> Tensor:
        loss, output = self._gradients(x, y, weight)
        if self.clip:
            self._clip()
        self.optimizer.step()
        self._note(output, x, y)
        return loss

    def _gradients(self, x: Tensor, y: Tensor, weight: float) -> tuple[Tensor, Any]:
        """Forward and backward; returns loss and output, of which autograd keeps nothing."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self._device, self.precision):
            output = self._run(x)
        if isinstance(output, Tensor) and output.dtype in (torch.bfloat16, torch.float16):
            output = output.float()
        loss = self.loss(output, y)
        if not isinstance(loss, Tensor) or loss.dim():
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise DecompkError(f"the loss is {what}, not a scalar: let it return the sum of the members' losses.")
        loss.backward(self._weight(weight, loss))
        return loss.detach(), output.detach() if isinstance(output, Tensor) else None

    def _weight(self, weight: float, loss: Tensor) -> Tensor:
        """A loss's own gradient, kept: it takes no launch, and a graph nothing from the host."""
        key = weight, loss.dtype, loss.device
        if key not in self._weights:
            self._weights[key] = torch.full((), weight, dtype=loss.dtype, device=loss.device)
        return self._weights[key]

    def _clip(self) -> None:
        if self._packed:
            clip_grad_norm_(self.net, self.clip)
        else:
            most: Any = self.clip  # one number: there are no members
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), most)

    @torch.no_grad()
    def _note(self, output: Any, x: Tensor, y: Tensor) -> None:
        logits = output if self._packed or output is None else output.unsqueeze(0)
        classes = logits is not None and logits.dim() == 3 and y.shape in (logits.shape[1:2], logits.shape[:2])
        if not classes or y.is_floating_point():
            self._images += len(x)  # there are no classes to be right about
            return
        K, N = logits.shape[:2]
        self._images += N
        if self._sums is None:
            self._sums = torch.zeros(2, K, dtype=torch.float64, device=logits.device)
        each = nn.functional.cross_entropy(logits.flatten(0, 1), y.expand(K, N).flatten(), reduction="none")
        right = logits.argmax(-1) == y
        new = torch.empty_like(self._sums)
        torch.sum(each.view(K, N), 1, dtype=torch.float64, out=new[0])
        torch.sum(right, 1, dtype=torch.float64, out=new[1])
        self._sums += new

    def _constants(self) -> Any:
        """What a graph of this step holds and its caller may change; what is on the device is brought up to date."""
        prepared = None if self._capturable is None else self._capturable.version()
        clip = tuple(self.clip) if isinstance(self.clip, Sequence) else self.clip
        if clip and self._packed:
            self._limits = limits(self.net, clip, self._device)  # held as long as a graph may read it
        return prepared, clip

    def _may_capture(self) -> bool:
        if self._device.type != "cuda":
            self.reasons["graph"] = "no CUDA graph: the network is not on a GPU"
            return False
        try:
            self._capturable = Capturable(self.optimizer, self._device)
        except DecompkError as error:
            self.reasons["graph"] = f"no CUDA graph: {error}"
            return False
        return True

    def _capture(self, key: Any, x: Tensor, y: Tensor, weight: float, version: Any) -> None:
        if self._graphs.pop(key, None) is not None:
            self._short_lived = self._short_lived + 1 if self._replays.pop(key) < FEW_REPLAYS else 0
            if self._short_lived == FEW_REPLAYS:
                raise RuntimeError("hyperparameters other than the learning rate change at every few steps")
        self._graphs[key] = _Graph(self, x, y, weight, version)

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
        self.step, self.version = step, version
        self.x, self.y = x.clone(), y.clone()
        self.graph = torch.cuda.CUDAGraph()
        images = step._images
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # a loader's threads may pin memory
                self.loss = step._train(self.x, self.y, weight)
            self.images = step._images - images
        finally:
            step._images = images  # nothing of it has run

    def replay(self, x: Tensor, y: Tensor) -> Tensor:
        self.x.copy_(x, non_blocking=True)
        self.y.copy_(y, non_blocking=True)
        self.graph.replay()
        self.step._images += self.images
        return self.loss.clone()  # the next replay writes over it


def _is_packed(net: nn.Module) -> bool:
    try:
        inside(net)
    except PackError:
        return False
    return True


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
