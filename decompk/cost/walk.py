"""What a network costs, layer by layer: its graph run on meta tensors, every tensor operation counted.

A multiply-accumulate is counted at every output position, padding included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..crops import by
from ..errors import DecompkError, brief
from ..fx.graph import MetaInterpreter, in_mode, on_meta, trace
from .figures import SAVED_CONTENTS, LayerCost, Saved, Shape
from .formulas import conv_macs, norm_flops, pool_flops

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
    content: str  # as of Saved; "image" is the network's input, "own" a parameter or buffer
    learned: bool  # a gradient flows to it
    saved: bool = False


class _Recorder(TorchDispatchMode):
    """Adds up tensor operations, whether a module, a function or a method called them."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # loads triton; decompk's operators register once it is here

        super().__init__()
        self.registry = flop_registry
        self.work = _Work()
        self.known: dict[Any, Any] = {}
        self.memory: dict[int, _Memory] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = self._call(func, args, kwargs or {})
        name = func.overloadpacket.__name__
        learned = self._follow(name, args, out)
        if not func.is_view and name not in FREE:
            _record(self.work, name, func, self.registry.get(func.overloadpacket), args, kwargs or {}, out)
            if learned:
                for tensor in _kept(name.rstrip("_"), args, out, self._learned):
                    self._save(tensor)
            if learned and name == "max_pool1d":  # where no gradient is wanted torch leaves out the indices
                self.work.saved.append(Saved("index", out.numel() // BATCH, tuple(out.shape[1:])))
        return out

    def meet(self, tensor: torch.Tensor, content: str, learned: bool = False) -> _Memory:
        """What is known of a tensor's memory; `content` and `learned` where it is new."""
        storage = tensor.untyped_storage()
        return self.memory.setdefault(storage._cdata, _Memory(storage, tuple(tensor.shape), content, learned))

    def _learned(self, tensor: torch.Tensor) -> bool:
        return self.meet(tensor, "vector").learned

    def _follow(self, name: str, args: tuple, out: Any) -> bool:
        """Note what the results hold; whether a gradient flows to them."""
        operands = [self.meet(t, "vector") for t in _tensors(args)]
        learned = any(m.learned for m in operands) and not name.startswith(("empty", "zeros", "ones", "full", "new"))
        sampled = any(m.content not in ("vector", "own") for m in operands)
        for i, tensor in enumerate(_tensors(out)):
            content = "sample" if sampled and not (i and "batch_norm" in name) else "vector"
            known = self.meet(tensor, content if tensor.is_floating_point() else "index")
            known.learned |= learned
            if name == "bernoulli_":
                known.content = "mask"
        return learned

    def _save(self, tensor: torch.Tensor) -> None:
        known = self.meet(tensor, "vector")
        size = 8 if known.content == "index" else tensor.element_size()
        elements = known.storage.nbytes() // size
        if known.saved or known.content == "own" or not elements:
            return
        known.saved = True
        if known.content == "image":
            self.work.image += elements // BATCH
        elif known.content == "vector":
            self.work.saved.append(Saved("vector", elements, known.shape))
        else:
            self.work.saved.append(Saved(known.content, elements // BATCH, known.shape[1:]))

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


def _record(
    work: _Work, name: str, func: Any, registered: Callable | None, args: tuple, kwargs: dict, out: Any
) -> None:
    """Add one operation to `work`; `registered` is its formula in torch's FLOP counter, if it has one."""
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
    elif registered:  # attention kernels, and operators that registered their own formula
        work.macs += registered(*args, **kwargs, out_val=out) // 2
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
    with in_mode(model, training):
        try:
            walker.run_all()
        except Exception as error:  # whatever the model's own operations raise on a shape they do not fit
            raise DecompkError(
                f"{type(model).__name__} cannot run on an input of {by(input_size)}: {brief(error)}; "
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
    saved = {content: sum(s.elements for s in work.saved if s.content == content) for content in SAVED_CONTENTS}
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
