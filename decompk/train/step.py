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
from ..errors import DecompkError, PackError, brief, name_of
from ..fx.pytree import tensors_of, tree_map
from ..optim import clip_grad_norm_, inside, limits
from ..packed.ahead import can_compile, compile_launches, kept_buffers, launches_of
from .capture import Capturable

PRECISIONS = ("float32", "bf16", "float64")
EAGER_STEPS = 3  # before a graph is captured: lazy state, cuDNN's and Triton's choices
FEW_REPLAYS = 4  # graphs that live no longer, so many of them in a row, cost more than they save


@dataclass(frozen=True)
class Sums:
    """What the steps since the last reset came to, a number per member."""

    loss: list[float]  # mean cross-entropy of the labels that name a class
    accuracy: list[float]  # % of them, of the images as they were trained on
    images: int


class Step:
    """Trains `net` by one batch a call, and sums on the device what its outputs come to as classes: see `read`.

    net: a packed module, whose output is (K, N, …), or any network of output (N, …). optimizer: one of decompk.optim,
    or of torch, made of the parameters of `net`; each call is one step of it. loss: (output, target) → scalar, of the
    members' losses their sum, as `losses.each` makes it; cross-entropy by default. precision: "bf16" runs the forward
    pass under autocast, and the loss reads its outputs in float32; "float64" expects `net` and images in it. clip:
    largest norm of each member's gradient, one number or K, 0 for none. compile: run `net` through torch.compile.

    graph: on a GPU, capture the whole step in a CUDA graph, one for every shape of batch and every set of modes, after
    EAGER_STEPS steps without. The optimizer is made capturable; torch's gets its learning rates as tensors. Schedulers,
    `load_state_dict`, train and eval mode, frozen parameters and whatever changes weights in place between two calls
    are followed. A replay runs kernels, no Python: hooks and the network's own code act when a graph is captured, and
    `p.grad` is the memory of the last capture.

    Where compiling or capturing cannot be done the step runs without, and `reasons` says why. No call waits for the
    device; `read` does. Raises DecompkError for what cannot be trained so.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Any,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        *,
        precision: str = "float32",
        clip: float | Sequence[float] | Tensor = 0.0,
        compile: bool = False,
        graph: bool = True,
    ):
        self._packed = _is_packed(net)
        owned = _checked(net, optimizer, loss, self._packed)
        self.net, self.optimizer = net, optimizer
        self.precision, self.clip = precision, clip
        self.reasons: dict[str, str] = {}
        self.loss = loss or (losses.cross_entropy if self._packed else nn.functional.cross_entropy)
        self._device = next(net.parameters()).device
        autocast(self._device, precision)
        self._others = [p for p in net.parameters() if id(p) not in owned]  # whose gradients no optimizer clears
        self._run = torch.compile(net) if compile else net
        self._compile, self._ready = compile, False
        self._modules, self._parameters = list(net.modules()), list(net.parameters())
        self._graphs: dict[Any, _Graph] = {}
        self._replays: Counter[Any] = Counter()
        self._short_lived = 0  # graphs in a row that were captured again after few replays
        self._eager_steps: Counter[Any] = Counter()
        self._scalars: dict[Any, Tensor] = {}
        self._sums: Tensor | None = None  # (3, K) of labels that name a class: Σ log p, Σ right, their number
        self._images = 0  # counted on the host, which knows
        self._capturable: Capturable | None = None
        self.graph = graph and self._may_capture()

    def __call__(self, x: Any, y: Any, weight: float = 1.0) -> Tensor:
        """Train by the batch x (N, …) or (K, N, …) and its targets y, both on the network's device.

        Whatever else the network and the loss take is given to them as it is; a graph is of tensors alone. Returns the
        loss, a scalar on the device, without `weight`, which scales its gradient: for the share of a larger batch that
        one of several processes trains. Raises DecompkError.
        """
        if not self._ready:
            self._prepare(x, y)
        if not (self.graph and isinstance(x, Tensor) and isinstance(y, Tensor)):
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
        """Mean cross-entropy and accuracy since the last reset; waits for the device.

        Of outputs (K, N, classes) or (N, classes), two classes at least, whose targets are integers (N,) or (K, N),
        whatever the loss is. A target that names no class, such as torch's -100, counts for nothing.
        """
        sums = self.sums()
        return Sums([], [], self._images) if sums is None else means(sums)

    def reset(self) -> None:
        """Start the sums anew."""
        self._images = 0
        if self._sums is not None:
            self._sums.zero_()

    def sums(self) -> Tensor | None:
        """(4, K) since the last reset: Σ loss, Σ right, Σ labels of a class, Σ images; what a checkpoint keeps."""
        if self._sums is None:
            return None
        found = torch.cat([self._sums, torch.full_like(self._sums[:1], self._images)])
        found[0].neg_()
        return found

    def set_sums(self, sums: Tensor | None) -> None:
        """Go on from the `sums` of a checkpoint. Waits for the device."""
        self._sums = None if sums is None else sums[:3].to(self._device, copy=True)
        if self._sums is not None:
            self._sums[0].neg_()
        self._images = 0 if sums is None else int(sums[-1, 0])
        self._graphs.clear()  # they add to the sums that were
        self._eager_steps.clear()  # no graph may make the sums: each replay would start them anew

    @property
    def clip(self) -> float | Sequence[float]:
        return self._clip

    @clip.setter
    def clip(self, clip: float | Sequence[float] | Tensor) -> None:
        self._clip = clip.tolist() if isinstance(clip, Tensor) else clip
        if isinstance(self._clip, Sequence) and not self._packed:
            raise DecompkError("clip is one number for a network that is not packed.")

    def _train(self, x: Tensor, y: Tensor, weight: float) -> Tensor:
        loss, output = self._gradients(x, y, weight)
        if self.clip:
            self._clip_gradients()
        self.optimizer.step()
        self._note(output, x, y)
        return loss

    def _gradients(self, x: Tensor, y: Tensor, weight: float) -> tuple[Tensor, Any]:
        """Forward and backward; returns loss and output, of which autograd keeps nothing."""
        self.optimizer.zero_grad(set_to_none=True)
        for p in self._others:
            p.grad = None
        with autocast(self._device, self.precision):
            output = self._run(x)
        output = tree_map(_in_float32, output)
        loss = self.loss(output, y)
        if not isinstance(loss, Tensor) or loss.dim():
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise DecompkError(f"the loss is {what}, not a scalar: let it return the sum of the members' losses.")
        loss.backward(self._scalar(weight, loss))
        return loss.detach(), tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)

    def _scalar(self, value: float, like: Tensor) -> Tensor:
        """One number on the device, kept: it takes no launch, and a graph nothing from the host."""
        key = value, like.dtype, like.device
        if key not in self._scalars:
            self._scalars[key] = torch.full((), value, dtype=like.dtype, device=like.device)
        return self._scalars[key]

    def _clip_gradients(self) -> None:
        if self._packed:
            clip_grad_norm_(self.net, self.clip)
        else:
            most: Any = self.clip  # one number: there are no members
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), most)

    @torch.no_grad()
    def _note(self, output: Any, x: Any, y: Any) -> None:
        logits = output if self._packed or not isinstance(output, Tensor) else output.unsqueeze(0)
        if not _are_classes(logits, y):
            self._images += next((t.shape[self._packed] for t in tensors_of(output) if t.dim() > self._packed), 0)
            return
        K, N, classes = logits.shape
        self._images += N
        if self._sums is None:
            self._sums = torch.zeros(3, K, dtype=torch.float64, device=logits.device)
        y = y.long().expand(K, N)
        found = y.new_empty((2, K, N))  # the likeliest class, and the label's, whose own is another if it names none
        torch.argmax(logits, -1, out=found[0])
        torch.clamp(y, 0, classes - 1, out=found[1])
        hits = found == y
        likelihood = logits.log_softmax(-1).gather(-1, found[1].unsqueeze(-1)).squeeze(-1)
        new = torch.empty_like(self._sums)
        likelihood = torch.where(hits[1], likelihood, self._scalar(0.0, likelihood))
        torch.sum(likelihood, 1, dtype=torch.float64, out=new[0])
        torch.sum(hits, 2, dtype=torch.float64, out=new[1:])
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
    """What `Step.sums` come to, each divided by the number of labels."""
    loss, right, labels, images = sums.tolist()
    counts = [max(count, 1.0) for count in labels]
    means = [value / count for value, count in zip(loss, counts, strict=True)]
    return Sums(means, [100 * value / count for value, count in zip(right, counts, strict=True)], int(images[0]))


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


def _are_classes(logits: Any, y: Any) -> bool:
    """Whether logits (K, N, classes) and labels y, (N,) or (K, N), say who is right."""
    if not (isinstance(logits, Tensor) and isinstance(y, Tensor)) or logits.dim() != 3 or logits.shape[2] < 2:
        return False
    whole = not (y.is_floating_point() or y.is_complex() or y.dtype is torch.bool)
    return whole and logits.is_floating_point() and y.shape in (logits.shape[1:2], logits.shape[:2])


def _in_float32(leaf: Any) -> Any:
    half = isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16)
    return leaf.float() if half else leaf


def _checked(net: Any, optimizer: Any, loss: Any, packed: bool) -> set[int]:
    """The ids of what `optimizer` trains. Raises DecompkError where a step of these would train nothing, or fail."""
    if not isinstance(net, nn.Module):
        raise DecompkError(f"Step trains a network, not {type(net).__name__}: decompk.pack(members) makes one of many.")
    own = {id(p) for p in net.parameters()}
    if not own:
        raise DecompkError(f"{type(net).__name__} has no parameters: there is nothing to train.")
    if isinstance(optimizer, type) or not (hasattr(optimizer, "step") and hasattr(optimizer, "zero_grad")):
        raise DecompkError(f"Step takes (net, optimizer, loss); {name_of(optimizer)} is no optimizer.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise DecompkError("LBFGS calls the network as often as it likes, a step calls it once: choose another.")
    groups = getattr(optimizer, "param_groups", None)
    trained = own if groups is None else {id(p) for group in groups for p in group["params"]}
    if not own & trained:
        raise DecompkError("the optimizer has none of this network's parameters: make it of net.parameters().")
    if isinstance(loss, type) or not (loss is None or callable(loss)):
        raise DecompkError(f"loss is a function (output, target) → scalar, not {name_of(loss)}.")
    of_one = isinstance(loss, (*losses.INDICES, *losses.ALIKE, *losses.SEQUENCES))
    if packed and (of_one or any(loss is function for function in losses.FUNCTIONS)):
        raise DecompkError(
            f"{name_of(loss)} reads the outputs of one network: decompk.losses.each makes of it the members' sum."
        )
    return trained


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
