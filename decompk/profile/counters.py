"""What running a network costs, by counters that know nothing of decompk's formulas."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cost.figures import Cost, LayerCost
from ..cost.formulas import adam_bytes
from ..errors import DecompkError, brief
from ..fx.graph import on_meta
from ..fx.pytree import leaves, tree_map
from ..kernels.backend import backend

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Figures:
    """One network's training step on a batch: FLOPs, and bytes of what it holds. Measured or analysed alike."""

    forward_flops: int
    backward_flops: int
    parameters: int
    gradients: int
    optimizer_state: int
    saved: int  # what autograd keeps for the backward pass, without parameters, buffers and the image
    image: int  # the copy of the input that it keeps


def analysed(cost: Cost, members: int, batch: int, element_size: int, mask_size: int) -> Figures:
    """What the analysis says of `members` networks of that cost; mask_size: bytes of a number that dropout drew."""
    figures = (
        batch * cost.flops(),
        batch * cost.backward_flops,
        element_size * cost.params,
        element_size * cost.params,
        adam_bytes(cost.params, cost.param_tensors, element_size),
        cost.saved_bytes(element_size, batch, mask_size),
        cost.image_bytes(element_size, batch),
    )
    return Figures(*(members * figure for figure in figures))


# ---- a training step ------------------------------------------------------------------------------------------------


def backward(outputs: Any) -> None:
    """Gradients of the sum of all outputs, from dense ones: an expanded scalar would be slower than in training."""
    heads = [leaf for leaf in leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not heads:
        raise DecompkError("the network returns nothing that a gradient flows back from: there is no training step.")
    torch.autograd.backward(heads, [torch.ones_like(head) for head in heads])


def measured(net: nn.Module, x: Tensor, pixels: Tensor, optimizer: torch.optim.Optimizer) -> Figures:
    """One training step, counted. `pixels`: what the network sees of the image x, whose copies count as image.

    Its own operators would be counted by decompk's formulas, so a packed network's FLOPs are those of torch's ungrouped
    ones, member by member. They run on a contiguous copy: in channels_last torch 2.13 on a CPU writes past its memory
    in the backward pass of some convolutions (1×1, stride 2, fewer than 8 channels).
    """
    packed = hasattr(net, "K")
    kept = SavedTensors(net, x, pixels)
    if packed:
        with backend("loop"):
            forward, back = _step_flops(copy.deepcopy(net).to(memory_format=torch.contiguous_format), x)
        with kept:
            outputs = net(x)
        backward(outputs)
    else:
        forward, back = _step_flops(net, x, kept)
    gradients = sum(p.grad.nbytes for p in net.parameters() if p.grad is not None)
    optimizer.step()
    net.zero_grad()
    state = sum(t.nbytes for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor))
    parameters = sum(p.nbytes for p in net.parameters())
    return Figures(forward, back, parameters, gradients, state, kept.activations, kept.image)


def _step_flops(net: nn.Module, x: Tensor, kept: SavedTensors | None = None) -> tuple[int, int]:
    with _counter() as forward:
        if kept is None:
            outputs = net(x)
        else:
            with kept:
                outputs = net(x)
    with _counter() as back:
        backward(outputs)
    return forward.get_total_flops(), back.get_total_flops()


def _counter() -> FlopCounterMode:
    """torch's counter, but for the weights' gradients of grouped convolutions, which torch 2.13 counts G times."""
    from torch.utils.flop_counter import FlopCounterMode  # loads triton

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


def _convolution_backward(grad: Any, x: Any, weight: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    """FLOPs from shapes: every wanted gradient multiplies as often as the convolution itself, 2 FLOPs each time."""
    *_, transposed, _, _, wanted = rest
    applied = x if transposed else grad  # each of its numbers meets one row of the kernel
    return 2 * sum(wanted[:2]) * prod(applied) * prod(weight[1:])


class SavedTensors:
    """While it is entered, notes what autograd keeps: every piece of memory once, parameters and buffers left out."""

    def __init__(self, net: nn.Module, x: Tensor, pixels: Tensor):
        self._own = {_memory(t) for t in (*net.parameters(), *net.buffers())}
        self._x, self._pixels = _memory(x), pixels
        self._values = pixels.flatten().sort().values
        self._found: dict[int, torch.UntypedStorage] = {}  # held: its identity must not be given away
        self.image = self.activations = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda t: t)

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)
        self._found.clear()

    def _note(self, tensor: Tensor) -> Tensor:
        memory = _memory(tensor)
        if memory in self._own or memory in self._found:
            return tensor
        self._found[memory] = tensor.untyped_storage()
        if memory == self._x:
            self.image += self._pixels.nbytes  # a crop is a view of the whole image
        elif self._is_image(tensor):
            self.image += self._pixels.nbytes
        else:
            self.activations += tensor.untyped_storage().nbytes()
        return tensor

    def _is_image(self, tensor: Tensor) -> bool:
        """Whether a tensor holds the image's pixels in any order: a packed network copies its crops."""
        storage = tensor.untyped_storage()
        if storage.nbytes() != self._pixels.nbytes or tensor.dtype != self._pixels.dtype:
            return False
        return torch.equal(tensor.new_empty(0).set_(storage).sort().values, self._values)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_memory(net: nn.Module, x: Tensor) -> int | None:
    """The allocator's peak of a forward and backward pass above what is held before, bytes; None off a GPU."""
    if x.device.type != "cuda":
        return None
    net.zero_grad()
    torch.cuda.synchronize(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    backward(net(x))
    torch.cuda.synchronize(x.device)
    net.zero_grad()
    return torch.cuda.max_memory_allocated(x.device) - before


FVCORE_OPERATORS = ("conv", "linear", "addmm", "matmul", "bmm", "mm", "einsum")


def fvcore_macs(net: nn.Module, x: Tensor) -> int | str:
    """MACs of a forward pass as fvcore counts them, which it calls flops; where it cannot, why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it uses what torch deprecates
            from fvcore.nn import FlopCountAnalysis
    except ImportError:
        return "fvcore is not installed"
    try:
        with backend("loop"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.jit's tracer
            count = FlopCountAnalysis(net, x)
            count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            operators = count.by_operator()
    except Exception as error:  # whatever torch.jit's tracer cannot follow
        return f"fvcore cannot trace the network: {brief(error)}"
    return int(sum(operators[name] for name in FVCORE_OPERATORS))


# ---- layers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer: the module, and its arguments, whose tensors lie on the meta device."""

    module: nn.Module
    arguments: tuple[tuple, dict]

    @property
    def key(self) -> str:
        """Equal for calls that cost the same."""
        layouts = tree_map(
            lambda t: (tuple(t.shape), t.stride(), t.dtype, t.requires_grad) if isinstance(t, Tensor) else t,
            self.arguments,
        )
        return f"{type(self.module).__name__} {self.module!r} {layouts}"

    def fresh(self, device: torch.device | str) -> tuple[tuple, dict]:
        """The arguments with random numbers."""
        return tree_map(lambda t: _like(t, device) if isinstance(t, Tensor) else t, self.arguments)


def _like(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the same layout with random numbers; zeros where it holds integers."""
    new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    new = new.normal_() if new.is_floating_point() else new.zero_()
    return new.requires_grad_(tensor.requires_grad)


@contextmanager
def layer_calls(net: nn.Module, layers: Iterable[LayerCost]) -> Iterator[dict[str, LayerCall]]:
    """While it runs, collects the calls of those layers with MACs that are modules: layer name → LayerCall."""
    paths = {layer.name.partition("#")[0] for layer in layers if layer.macs}
    modules = dict(net.named_modules())
    counts: Counter[str] = Counter()
    calls: dict[str, LayerCall] = {}
    handles = []

    def without_data(leaf: Any) -> Any:
        return _like(leaf, "meta") if isinstance(leaf, Tensor) else leaf

    def watch(path: str) -> Callable:
        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            counts[path] += 1
            name = path if counts[path] == 1 else f"{path}#{counts[path]}"
            calls[name] = LayerCall(module, tree_map(without_data, (args, kwargs)))

        return note

    try:
        for path in paths & modules.keys():
            handles.append(modules[path].register_forward_pre_hook(watch(path), with_kwargs=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def layer_flops(call: LayerCall) -> tuple[int, int]:
    """(forward, backward) FLOPs of one layer alone, by torch's counter, without data.

    In a whole network that counter credits the backward pass of one module to its neighbours.
    """
    leaf = on_meta(call.module)
    args, kwargs = call.arguments
    with backend("loop"):
        with _counter() as forward:
            outputs = leaf(*args, **kwargs)
        with _counter() as back:
            backward(outputs)
    return forward.get_total_flops(), back.get_total_flops()
