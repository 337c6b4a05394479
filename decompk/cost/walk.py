"""What a network costs: FLOPs, parameters, activations and bytes, layer by layer. Every formula lives here.

All figures are for one sample. A multiply-accumulate is counted at every output position, padding included. The printed
tables of the paper follow no single convention, so several stand side by side (CONVENTIONS).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..crops import by
from ..errors import DecompkError
from ..fx.graph import MetaInterpreter, on_meta, trace
from ..kernels.problem import Config, Problem

Shape = tuple[int, ...]

# ---- formulas -------------------------------------------------------------------------------------------------------


def conv_macs(positions: int, c_in: int, c_out: int, kernel: Sequence[int], groups: int = 1) -> int:
    """Multiply-accumulates of a convolution with `positions` output pixels (input pixels, if it is transposed).

    A fully connected layer is a convolution with one position whose kernel is its whole input.
    """
    return positions * (c_in // groups) * prod(kernel) * c_out


def conv_weights(c_in: int, c_out: int, kernel: Sequence[int], groups: int = 1) -> int:
    """Elements of a convolution's kernel, bias apart."""
    return (c_in // groups) * prod(kernel) * c_out


def eq210_flops(macs: int, outputs: int) -> int:
    """(2.10): HW(2·c_in·t1·t2 − 1)·c_out, which is two per MAC less the first addition of every output element."""
    return 2 * macs - outputs


def profiler_flops(macs: int, weights: int, bias_adds: int, joins: int, w: int) -> int:
    """What the paper's profiler reports: 2 · MAC + w · kernel weights + bias adds + residual adds and pooling.

    w counts the weights' initialiser and regulariser operations: 5 fits Tables 2.2 and 3.1, 2 fits Table 3.4.
    """
    return 2 * macs + w * weights + bias_adds + joins


def pool_flops(outputs: int, window: Sequence[int]) -> int:
    """k · k operations for each output element: comparisons, or additions and one division."""
    return outputs * prod(window)


def norm_flops(elements: int, statistics: bool) -> int:
    """Two operations an element (scale, shift), and three more where mean and variance are computed as well."""
    return elements * (5 if statistics else 2)


def pass_bytes(inputs: int, weights: int, outputs: int, element_size: int = 4) -> int:
    """Compulsory traffic of one pass over a layer, each tensor moved once; the same sum for all three passes.

    Forward reads X and W and writes Y; dgrad reads dY and W and writes dX; wgrad reads dY and X and writes dW.
    """
    return element_size * (inputs + weights + outputs)


def adam_bytes(params: int, tensors: int, element_size: int = 4) -> int:
    """State of Adam: two moments for each parameter, and a float32 step count for each of `tensors` tensors.

    A packed optimizer holds one step count for each tensor of each member, so K members cost K times one.
    """
    return 2 * element_size * params + 4 * tensors


@dataclass(frozen=True)
class OpCost:
    """One pass of a grouped convolution with one config: what it has to do, and what that config does."""

    compulsory_bytes: int  # each tensor once: the floor of device memory
    useful_flops: int
    executed_flops: int  # padding of tiles, blocks and bands included
    l2_bytes: int  # loads of all programs: what is re-read is served by L2


def conv_bytes(problem: Problem) -> int:
    """Compulsory traffic of one pass of K convolutions; an overlap of crops is counted for every member."""
    p = problem
    images = p.K * p.N
    weights = p.K * p.O * p.C * p.taps
    return pass_bytes(images * p.C * p.H * p.W, weights, images * p.O * prod(p.out_size), p.element_size)


def conv_flops(problem: Problem) -> int:
    """Useful FLOPs of one pass of K convolutions: the same for fprop, dgrad and wgrad."""
    p = problem
    return 2 * p.K * p.N * conv_macs(prod(p.out_size), p.C, p.O, p.kernel)


def op_cost(problem: Problem, config: Config) -> OpCost:
    """The cost of `problem` as the Triton kernel of `config` runs it."""
    from ..kernels.conv import FORMS

    form = FORMS[config.form]
    return OpCost(
        conv_bytes(problem), conv_flops(problem), form.executed_flops(problem, config), form.l2_bytes(problem, config)
    )


@dataclass(frozen=True)
class Exponents:
    """Sub-network over global network is (1/K) to these powers, for a uniform split without overlap (2.1.2)."""

    flops: int
    weights: int
    activations: int


# Layers of any other role have no ratio in the paper. Its 1/K⁴ for the FLOPs of the first FC is a slip for 1/K³.
ROLES = {
    "first conv": Exponents(2, 1, 2),
    "conv": Exponents(3, 2, 2),
    "first fc": Exponents(3, 3, 1),
    "fc": Exponents(2, 2, 1),
    "last fc": Exponents(1, 1, 0),
}


# ---- figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Additive figures of a layer or a network, for one sample; they add with + and scale with *."""

    macs: int = 0
    mac_outputs: int = 0  # output elements of convolutions and matrix products
    backward_macs: int = 0  # dgrad and wgrad
    kernel_weights: int = 0  # kernel elements read: no bias, counted again at every use
    bias_flops: int = 0
    elementwise_flops: int = 0  # norms, activations, pooling, adds and everything else without MACs
    join_flops: int = 0  # the part of it that is residual adds and pooling
    params: int = 0
    param_tensors: int = 0  # weights, biases, …: how many tensors the parameters are
    statistics: int = 0  # running means and variances
    activations: int = 0  # output elements
    forward_samples: int = 0  # elements moved for every sample
    forward_weights: int = 0  # elements moved once a batch
    backward_samples: int = 0
    backward_weights: int = 0
    saved_samples: int = 0  # elements that autograd keeps for every sample, each tensor once
    saved_vectors: int = 0  # elements kept once a batch: a batch norm's mean and deviation
    saved_indices: int = 0  # int64, for every sample: which pixel a max-pool took
    saved_masks: int = 0  # what dropout drew, for every sample
    saved_image: int = 0  # the network's input, where something keeps it; not among saved_samples

    def flops(self, convention: str = "2mac") -> int:
        """Forward FLOPs under one of CONVENTIONS."""
        return CONVENTIONS[convention](self)

    @property
    def backward_flops(self) -> int:
        """Two per MAC of dgrad and wgrad; the layer that reads the image needs no dgrad."""
        return 2 * self.backward_macs

    def forward_bytes(self, element_size: int = 4, batch: int = 1) -> int:
        """Compulsory bytes of the forward pass of `batch` samples."""
        return element_size * (batch * self.forward_samples + self.forward_weights)

    def backward_bytes(self, element_size: int = 4, batch: int = 1) -> int:
        """Compulsory bytes of the backward pass of `batch` samples."""
        return element_size * (batch * self.backward_samples + self.backward_weights)

    def saved_bytes(self, element_size: int = 4, batch: int = 1, mask_size: int | None = None) -> int:
        """Bytes that autograd keeps from the forward to the backward pass, without parameters, buffers and the image.

        `mask_size`: bytes of one drawn number of dropout; by default a whole element, as on a CPU. A GPU keeps 1.
        """
        masks = self.saved_masks * (element_size if mask_size is None else mask_size)
        samples = element_size * self.saved_samples + 8 * self.saved_indices + masks
        return batch * samples + element_size * self.saved_vectors

    def image_bytes(self, element_size: int = 4, batch: int = 1) -> int:
        """Bytes of the input that autograd keeps."""
        return element_size * batch * self.saved_image

    def figures(self, element_size: int = 4, batch: int = 1) -> dict[str, int]:
        """Every figure by name: FLOPs, MACs and activations of one sample, bytes of a batch."""
        return {
            "macs": self.macs,
            "flops_2mac": self.flops("2mac"),
            "flops_eq2.10": self.flops("eq2.10"),
            "flops_profiler_w5": self.flops("paper-profiler w=5"),
            "flops_profiler_w2": self.flops("paper-profiler w=2"),
            "bias_flops": self.bias_flops,
            "elementwise_flops": self.elementwise_flops,
            "backward_flops": self.backward_flops,
            "params": self.params,
            "statistics": self.statistics,
            "activations": self.activations,
            "forward_bytes": self.forward_bytes(element_size, batch),
            "backward_bytes": self.backward_bytes(element_size, batch),
        }

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(getattr(self, f.name) * times for f in fields(Cost)))


CONVENTIONS: dict[str, Callable[[Cost], int]] = {
    "2mac": lambda c: 2 * c.macs,
    "eq2.10": lambda c: eq210_flops(c.macs, c.mac_outputs),
    "paper-profiler w=5": lambda c: profiler_flops(c.macs, c.kernel_weights, c.bias_flops, c.join_flops, 5),
    "paper-profiler w=2": lambda c: profiler_flops(c.macs, c.kernel_weights, c.bias_flops, c.join_flops, 2),
    "paper-profiler w=5 without adds and pooling": lambda c: profiler_flops(
        c.macs, c.kernel_weights, c.bias_flops, 0, 5
    ),
}


@dataclass(frozen=True)
class Saved:
    """One tensor that autograd keeps: its kind, its elements for one sample (for "vector" once a batch), its shape.

    `kind`: "sample", "vector", "index" or "mask"; see the fields saved_… of Cost. `shape` is (channels, *spatial) as
    it was made: a later view of the same memory does not change it.
    """

    kind: str
    elements: int
    shape: Shape


SAVED_KINDS = ("sample", "vector", "index", "mask")


@dataclass(frozen=True)
class LayerCost(Cost):
    """One node that computes. Shapes are those of one sample.

    `name`: the module's path, or the graph's name of a functional operation; a module's second call ends in "#2".
    `kind`: conv, conv_transpose, linear, matmul, norm, activation, pool, add, mul, cat, copy (moves data), other.
    `role`: one of ROLES, or "grouped conv", "last conv", "only fc" (first and last at once), "other".
    Parameters used twice are counted at their first use; `saved` lists what autograd keeps, at the first that does.
    """

    name: str = ""
    kind: str = "other"
    role: str = "other"
    in_shapes: tuple[Shape, ...] = ()
    out_shape: Shape = ()
    kernel: Shape = ()
    groups: int = 1
    saved: tuple[Saved, ...] = ()

    @property
    def in_shape(self) -> Shape:
        """The first input's shape."""
        return self.in_shapes[0] if self.in_shapes else ()

    @property
    def positions(self) -> int:
        """How often the kernel is applied: at output pixels, at input pixels if transposed, at tokens if linear."""
        if self.kind == "linear":
            return prod(self.out_shape[:-1])
        return prod((self.in_shape if self.kind == "conv_transpose" else self.out_shape)[1:])


def total(layers: Iterable[Cost]) -> Cost:
    """The sum of the layers' figures."""
    return sum(layers, start=Cost())


# ---- operations -----------------------------------------------------------------------------------------------------

FREE = (  # views without the tag, and tensors made from nothing
    *("empty", "empty_like", "new_empty", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "full", "full_like"),
    *("bernoulli_", "arange", "scalar_tensor", "_local_scalar_dense", "lift_fresh"),
    *("_unsafe_view", "_reshape_alias", "unsafe_split", "unsafe_chunk", "transpose_", "detach_"),
)
MOVES = (
    *("cat", "stack", "clone", "copy_", "_to_copy", "repeat", "roll", "flip", "pixel_shuffle", "pixel_unshuffle"),
    *("channel_shuffle", "index", "index_select", "gather", "embedding", "im2col", "upsample_nearest"),
)
MATMULS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}  # where the left operand stands
NORMS = ("native_layer_norm", "native_group_norm", "_fused_rms_norm")
ACTIVATIONS = ("hardswish", "_prelu_kernel", "glu", "_softmax", "_log_softmax", "_safe_softmax")  # not tagged pointwise
REDUCTIONS = ("mean", "sum", "amax", "amin", "max", "min", "var", "var_mean", "std", "linalg_vector_norm", "cumsum")
POINTWISE = {"add": "add", "sub": "add", "rsub": "add", "mul": "mul", "div": "mul"}
# What autograd keeps (torch's derivatives.yaml); every other operation keeps its first operand.
PRODUCTS = ("mul", *MATMULS)  # each operand, where a gradient flows to the other
KEEP_RESULT = ("relu", "sigmoid", "tanh", "exp", "expm1", "sqrt", "rsqrt", "reciprocal", "_softmax", "_log_softmax")
KEEP_STATISTICS = (*NORMS, "batch_norm", "max_pool")  # the operand and what else is returned: moments, indices
KEEP_ALL = ("amax", "amin", "linalg_vector_norm", "std", "minimum", "maximum", "gather", "_prelu_kernel")
KEEP_INDEX = {"index_select": 2, "index": 1, "embedding": 1, "where": 0}  # where the index stands
KEEP_NOTHING = (
    *("add", "sub", "rsub", "neg", "mean", "sum", "cumsum", "constant_pad_nd", "fill", "zero", "copy", "max", "min"),
    *(name for name in MOVES if name not in ("index", "index_select", "gather", "embedding")),
)
# A node of several operations is named after the first of these among them.
KINDS = ("conv", "conv_transpose", "matmul", "norm", "pool", "cat", "mul", "add", "activation", "other", "copy")


@dataclass
class _Work:
    """What the tensor operations of one graph node add up to, for the whole batch."""

    kinds: set[str] = field(default_factory=set)
    macs: int = 0
    mac_outputs: int = 0
    bias: int = 0
    elementwise: int = 0
    saves_input: bool = False  # the backward pass reads the input again
    kernel: Shape = ()
    groups: int = 1
    saved: list[Saved] = field(default_factory=list)
    image: int = 0  # elements of the network's input that are saved


@dataclass
class _Memory:
    """What is known of one piece of memory, whichever views of it there are."""

    storage: torch.UntypedStorage  # held, or another tensor would get its identity
    shape: Shape
    kind: str  # as of Saved; "image" is the network's input, "own" a parameter or buffer
    learned: bool  # a gradient flows to it
    saved: bool = False


class _Recorder(TorchDispatchMode):
    """Adds up tensor operations, whether a module, a function or a method called them."""

    def __init__(self) -> None:
        super().__init__()
        self.work = _Work()
        self.known: dict[Any, Any] = {}
        self.memory: dict[int, _Memory] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = self._call(func, args, kwargs or {})
        name = func.overloadpacket.__name__
        learned = self._follow(name, args, out)
        if not func.is_view and name not in FREE:
            _record(self.work, name, func, args, kwargs or {}, out)
            if learned:
                for tensor in _kept(name.rstrip("_"), args, out, self._learned):
                    self._save(tensor)
            if learned and name == "max_pool1d":  # where no gradient is wanted torch leaves out the indices
                self.work.saved.append(Saved("index", out.numel() // BATCH, tuple(out.shape[1:])))
        return out

    def meet(self, tensor: torch.Tensor, kind: str, learned: bool = False) -> _Memory:
        """What is known of a tensor's memory; `kind` and `learned` where it is new."""
        storage = tensor.untyped_storage()
        return self.memory.setdefault(storage._cdata, _Memory(storage, tuple(tensor.shape), kind, learned))

    def _learned(self, tensor: torch.Tensor) -> bool:
        return self.meet(tensor, "vector").learned

    def _follow(self, name: str, args: tuple, out: Any) -> bool:
        """Note of what kind the results are; whether a gradient flows to them."""
        operands = [self.meet(t, "vector") for t in _tensors(args)]
        learned = any(m.learned for m in operands) and not name.startswith(("empty", "zeros", "ones", "full", "new"))
        sampled = any(m.kind not in ("vector", "own") for m in operands)
        for i, tensor in enumerate(_tensors(out)):
            kind = "sample" if sampled and not (i and "batch_norm" in name) else "vector"
            known = self.meet(tensor, kind if tensor.is_floating_point() else "index")
            known.learned |= learned
            if name == "bernoulli_":
                known.kind = "mask"
        return learned

    def _save(self, tensor: torch.Tensor) -> None:
        known = self.meet(tensor, "vector")
        size = 8 if known.kind == "index" else tensor.element_size()
        elements = known.storage.nbytes() // size
        if known.saved or known.kind == "own" or not elements:
            return
        known.saved = True
        if known.kind == "image":
            self.work.image += elements // BATCH
        elif known.kind == "vector":
            self.work.saved.append(Saved("vector", elements, known.shape))
        else:
            self.work.saved.append(Saved(known.kind, elements // BATCH, known.shape[1:]))

    def _call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """func's result; the second time, from memory: torch infers shapes in Python, a hundred times slower."""
        if kwargs or func.is_view or func._schema.is_mutable:
            return func(*args, **kwargs)
        key = (func, _layout(args))
        if key not in self.known:
            out = func(*args)
            self.known[key] = _layout(out)
            return out
        return _empty(self.known[key])


@dataclass(frozen=True)
class _Layout:
    shape: Shape
    stride: Shape
    dtype: torch.dtype


def _layout(value: Any) -> Any:
    """A value with every tensor replaced by its layout; hashable if its other parts are."""
    if isinstance(value, torch.Tensor):
        return _Layout(tuple(value.shape), value.stride(), value.dtype)
    return tuple(map(_layout, value)) if isinstance(value, (tuple, list)) else value


def _empty(value: Any) -> Any:
    if isinstance(value, _Layout):
        return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
    return tuple(map(_empty, value)) if isinstance(value, tuple) else value


def _record(work: _Work, name: str, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
    outputs = sum(t.numel() for t in _tensors(out))
    if name == "convolution":
        x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
        at = x if transposed else out
        work.kernel, work.groups = tuple(weight.shape[2:]), groups
        work.macs += conv_macs(at.shape[0] * prod(at.shape[2:]), x.shape[1], out.shape[1], work.kernel, groups)
        work.mac_outputs += outputs
        work.bias += 0 if bias is None else outputs
        kind = "conv_transpose" if transposed else "conv"
    elif name in MATMULS:
        left = MATMULS[name]
        work.macs += outputs * args[left].shape[-1]
        work.mac_outputs += outputs
        work.bias += outputs if left else 0
        kind = "matmul"
    elif func.overloadpacket in flop_registry:  # attention kernels, and operators that registered their own formula
        work.macs += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out) // 2
        work.mac_outputs += outputs
        kind = "matmul"
    elif "batch_norm" in name or name in NORMS:
        work.elementwise += norm_flops(args[0].numel(), statistics=not _normalises_by_running(name, args))
        work.saves_input = True
        kind = "norm"
    elif "pool" in name or _pools_globally(name, args):
        result = next(_tensors(out))
        work.kernel = _window(name, args, result)
        work.elementwise += pool_flops(result.numel(), work.kernel)
        work.saves_input |= "max" in name
        kind = "pool"
    elif "pad" in name or name.startswith(MOVES):
        kind = "cat" if name in ("cat", "stack") else "copy"
    elif name in REDUCTIONS:
        work.elementwise += args[0].numel()
        work.saves_input = True
        kind = "other"
    else:
        name = name.rstrip("_")
        pointwise = torch.Tag.pointwise in func.tags or name in ACTIVATIONS
        kind = POINTWISE.get(name, "activation" if pointwise else "other")
        work.elementwise += outputs
        work.saves_input |= kind != "add"
    work.kinds.add(kind)


def _kept(name: str, args: tuple, out: Any, learned: Callable[[torch.Tensor], bool]) -> Iterator[torch.Tensor]:
    """What autograd keeps of one operation whose result a gradient flows to; its name without a trailing "_"."""
    operands, results = list(_tensors(args)), list(_tensors(out))
    if name in PRODUCTS:
        left, *right = operands[MATMULS.get(name, 0) :][:2]
        yield from (t for t, other in ((left, right), *((r, [left]) for r in right)) if any(map(learned, other)))
    elif name == "convolution":
        yield from operands[:2]
    elif name == "div":
        yield from operands if learned(operands[-1]) else operands[1:]
    elif name in KEEP_INDEX:
        yield from _tensors(args[KEEP_INDEX[name]])
    elif name in KEEP_RESULT:
        yield results[0]
    elif any(word in name for word in KEEP_STATISTICS):
        yield operands[0]
        if not _normalises_by_running(name, args):
            yield from results[1:3]
    elif name in KEEP_ALL or name.startswith("_scaled_dot_product"):
        yield from (*operands, *results[:2])
    elif not name.startswith(KEEP_NOTHING):
        yield from operands[:1]


def _normalises_by_running(name: str, args: tuple) -> bool:
    """Whether a batch norm takes its running statistics."""
    return name == "native_batch_norm" and not args[5]


def _pools_globally(name: str, args: tuple) -> bool:
    """Whether a reduction takes a whole map of every sample and channel."""
    axes = args[0].dim() if name in ("mean", "amax") and len(args) > 1 else 0
    return axes > 2 and {axis % axes for axis in args[1]} == set(range(2, axes))


def _window(name: str, args: tuple, out: torch.Tensor) -> Shape:
    spatial = args[0].shape[2:]
    if "adaptive" in name:
        return tuple(-(-i // o) for i, o in zip(spatial, out.shape[2:], strict=True))
    if name in REDUCTIONS:
        return tuple(spatial)
    return tuple(args[1]) * (len(spatial) // len(args[1]))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


# ---- the walk -------------------------------------------------------------------------------------------------------

BATCH = 2  # two samples, so that squeeze() and batch statistics behave as in use; figures are divided by it


@dataclass
class _Node:
    """What is known of a graph node once it has run."""

    work: _Work
    own: dict[int, torch.Tensor]  # parameters and buffers it reads, or only passes on
    data: list[fx.Node]  # inputs that are activations
    sampled: bool  # its value depends on the input
    learned: bool  # its value depends on a parameter, so a gradient flows back to it

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [tensor for tensor in self.own.values() if isinstance(tensor, nn.Parameter)]


class _Walker(MetaInterpreter):
    """Runs a graph on meta tensors and describes every node."""

    def __init__(self, model: nn.Module, graph: fx.Graph, input_size: Shape):
        super().__init__(model, graph, input_size, batch=BATCH)
        self.recorder = _Recorder()
        self.nodes: dict[fx.Node, _Node] = {}

    def run_node(self, node: fx.Node) -> Any:
        self.recorder.work = work = _Work()
        value = super().run_node(node)
        own: dict[int, torch.Tensor] = {}
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            self.recorder.meet(value, "image")
        if node.op == "get_attr":
            own = {id(tensor): tensor for tensor in _tensors(self.fetch_attr(node.target))}
        elif node.op == "call_module":
            leaf = self.fetch_attr(node.target)
            own = {id(tensor): tensor for tensor in (*leaf.parameters(), *leaf.buffers())}
        data = []
        for source in node.all_input_nodes:
            known = self.nodes[source]
            if known.own and not known.work.kinds:
                own |= known.own
            if (known.sampled or known.work.kinds) and any(True for _ in _tensors(self.values[source])):
                data.append(source)
        self.nodes[node] = _Node(
            work,
            own,
            data,
            sampled=node.op == "placeholder" or any(self.nodes[source].sampled for source in data),
            learned=any(isinstance(t, nn.Parameter) for t in own.values()) or any(self.nodes[s].learned for s in data),
        )
        return value

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Any:
        leaf = self.fetch_attr(target)
        if not all(tensor.is_meta for tensor in (*leaf.parameters(), *leaf.buffers())):
            leaf = on_meta(leaf)
        for tensor in (*leaf.parameters(), *leaf.buffers()):
            self.recorder.meet(tensor, "own", tensor.requires_grad)
        with self.recorder:
            return leaf(*args, **kwargs)

    def get_attr(self, target: str, args: tuple, kwargs: dict) -> Any:
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, torch.Tensor):
            self.recorder.meet(value, "own", self.fetch_attr(target).requires_grad)
        return value

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        with self.recorder:
            return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple, kwargs: dict) -> Any:
        with self.recorder:
            return super().call_method(target, args, kwargs)

    def samples(self, node: fx.Node) -> int:
        return BATCH if self.nodes[node].sampled else 1

    def elements(self, node: fx.Node) -> int:
        """Elements of a node's value, for one sample."""
        return sum(tensor.numel() for tensor in _tensors(self.values[node])) // self.samples(node)

    def shape(self, node: fx.Node) -> Shape:
        """The shape of a node's (first) value, for one sample."""
        shape = tuple(next(_tensors(self.values[node])).shape)
        return shape[1:] if self.nodes[node].sampled else shape

    def leaf(self, node: fx.Node) -> nn.Module | None:
        return self.fetch_attr(node.target) if node.op == "call_module" else None


def layers(model: nn.Module, input_size: Sequence[int], training: bool = False) -> list[LayerCost]:
    """One LayerCost for every node of `model` that computes, in the order of execution, for one sample.

    `input_size` is (C, *spatial). In training mode dropout counts and batch norm computes statistics. No data is
    allocated. Parameters outside the graph are not seen. Raises UnsupportedOperation where torch.fx cannot follow the
    model, DecompkError where the model cannot run on such an input.
    """
    graph = trace(model, training)
    walker = _Walker(model, graph, tuple(input_size))
    with _mode(model, training):
        try:
            walker.run_all()
        except Exception as error:  # whatever the model's own operations raise on a shape they do not fit
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise DecompkError(
                f"{type(model).__name__} cannot run on an input of {by(input_size)}: {reason}; "
                "give the input size it is made for."
            ) from error
    final = _final(walker)
    counted: set[int] = set()
    calls: Counter[str] = Counter()
    entries = []
    for node, known in walker.nodes.items():
        if known.work.kinds:
            name = str(node.target) if node.op == "call_module" else node.name
            calls[name] += 1
            name += f"#{calls[name]}" if calls[name] > 1 else ""
            entries.append(_entry(name, node, walker, node in final, counted))
            counted |= known.own.keys()
    return entries


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _entry(name: str, node: fx.Node, walker: _Walker, final: bool, counted: set[int]) -> LayerCost:
    known, samples, kind = walker.nodes[node], walker.samples(node), _kind(node, walker)
    work, inputs, outputs = known.work, sum(map(walker.elements, known.data)), walker.elements(node)
    weights = sum(p.numel() for p in known.parameters)
    kernel_weights = sum(p.numel() for p in known.parameters if p.dim() > 1) if work.macs else 0
    differentiable = [source for source in known.data if walker.nodes[source].learned]
    elementwise = work.elementwise // samples
    passes = backward_samples = backward_weights = 0
    if work.macs:  # dgrad for every operand a gradient flows to, wgrad for the parameters
        passes = min(len(differentiable) + bool(known.parameters), 2)
        backward_samples = passes * (inputs + outputs)
        backward_weights = weights + (kernel_weights if differentiable else 0)
    elif known.learned:  # reads dY and what was saved, writes dX and dW
        saved = inputs if work.saves_input or known.parameters else 0
        backward_samples = outputs + saved + sum(map(walker.elements, differentiable))
        backward_weights = 2 * weights
    new = [tensor for key, tensor in known.own.items() if key not in counted]
    saved = {kind: sum(s.elements for s in work.saved if s.kind == kind) for kind in SAVED_KINDS}
    return LayerCost(
        macs=work.macs // samples,
        mac_outputs=work.mac_outputs // samples,
        backward_macs=passes * work.macs // samples,
        kernel_weights=kernel_weights,
        bias_flops=work.bias // samples,
        elementwise_flops=elementwise,
        join_flops=elementwise if kind in ("add", "pool") else 0,
        params=sum(t.numel() for t in new if isinstance(t, nn.Parameter)),
        param_tensors=sum(isinstance(t, nn.Parameter) for t in new),
        statistics=sum(
            t.numel() for t in new if kind == "norm" and t.is_floating_point() and not isinstance(t, nn.Parameter)
        ),
        activations=outputs,
        forward_samples=inputs + outputs,
        forward_weights=weights,
        backward_samples=backward_samples,
        backward_weights=backward_weights,
        saved_samples=saved["sample"],
        saved_vectors=saved["vector"],
        saved_indices=saved["index"],
        saved_masks=saved["mask"],
        saved_image=work.image,
        name=name,
        kind=kind,
        role=_role(node, kind, walker, final),
        in_shapes=tuple(map(walker.shape, known.data)),
        out_shape=walker.shape(node),
        kernel=work.kernel,
        groups=work.groups,
        saved=tuple(work.saved),
    )


def _kind(node: fx.Node, walker: _Walker) -> str:
    module = walker.leaf(node)
    if isinstance(module, nn.Linear) or node.target is F.linear:
        return "linear"
    if type(module).__module__ == "torch.nn.modules.normalization":
        return "norm"  # some are made of plain arithmetic
    return next(kind for kind in KINDS if kind in walker.nodes[node].work.kinds)


def _final(walker: _Walker) -> set[fx.Node]:
    """The nodes whose value reaches the network's output through no further product with weights."""
    final: set[fx.Node] = set()
    for node in reversed(walker.nodes):
        if any(user.op == "output" or (user in final and not walker.nodes[user].work.macs) for user in node.users):
            final.add(node)
    return final


def _role(node: fx.Node, kind: str, walker: _Walker, final: bool) -> str:
    known = walker.nodes[node]
    if kind not in ("conv", "conv_transpose", "linear") or not known.data:
        return "other"
    source = known.data[0]
    spatial = slice(None, -1) if kind == "linear" else slice(1, None)
    before, after = (walker.shape(n)[spatial] for n in (source, node))
    if kind == "linear":
        whole_map = _reads_flattened_map(source, walker)
    else:
        whole_map = known.work.kernel == before and prod(before) > 1
    if whole_map and walker.nodes[source].learned:
        return "only fc" if final else "first fc"
    if prod(before) == prod(after) == 1:
        return "last fc" if final else "fc"
    if not walker.nodes[source].learned:
        return "first conv"
    if known.work.groups > 1:
        return "grouped conv"
    return "last conv" if final else "conv"


def _reads_flattened_map(source: fx.Node, walker: _Walker) -> bool:
    """Whether a vector holds all pixels of a learned map of more than one pixel."""
    features = walker.shape(source)
    while len(features) == 1 and not walker.nodes[source].work.macs and walker.nodes[source].data:
        source = walker.nodes[source].data[0]
        shape = walker.shape(source)
        if len(shape) > 1:
            return walker.nodes[source].learned and prod(shape[1:]) > 1 and prod(shape) == features[0]
    return False
