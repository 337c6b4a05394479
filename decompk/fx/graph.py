"""Reading a network: its torch.fx graph, shapes without arithmetic, and where each node stands in the source."""

from __future__ import annotations

import copy
import inspect
import operator
import os
import re
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .. import threads
from ..errors import DecompkError, UnsupportedOperation, brief
from .branches import goes_on_with
from .held import opaque, walked
from .unseen import undrawn

# Subclasses of these stay whole even when they live outside torch.nn: a batch norm with an activation inside, a
# weight-standardised convolution. Their parameters are known, their own forward code is not looked into.
PARAMETRIC = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.PReLU,
    nn.Embedding,
    nn.MultiheadAttention,
    nn.RNNBase,
)


class _Tracer(threads.Tracer):
    record_stack_traces = True
    proxy_buffer_attributes = True

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, PARAMETRIC) or super().is_leaf_module(module, qualified_name)

    def __init__(self) -> None:
        super().__init__()
        self.checks: dict[fx.Node, bool] = {}  # conditions that forward raises without, and what they must be

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator:
        count = self.length(obj.node)
        return super().iter(obj) if count is None else iter([obj[i] for i in range(count)])

    def length(self, node: fx.Node) -> int | None:
        """Of `x.size()[1:]`, as hand-written networks count their features, where x's dimensions are known."""
        sliced = node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], slice)
        size = node.args[0] if sliced else node
        is_size = (size.op, size.target) == ("call_method", "size") and len(size.args) == 1 and not size.kwargs
        is_shape = size.op == "call_function" and size.target is getattr and size.args[1] == "shape"
        dims = _dims(size.args[0], self.root) if is_size or is_shape else None
        return len(range(dims)[node.args[1]]) if sliced and dims is not None else dims

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A branch whose other side only raises, `assert x.dim() == 4`, is no branch."""
        node, frame = obj.node, sys._getframe(2)
        if node not in self.checks:
            answer = goes_on_with(frame.f_code, frame.f_lasti)
            if answer is None:
                what = "a tensor's shape" if _is_metadata(node) else "the values of a tensor"
                raise UnsupportedOperation(
                    f"torch.fx cannot trace {type(self.root).__name__}: {_line(traceback.extract_stack(frame))} "
                    f"branches on {what}, which tracing does not know; let something given to __init__ decide, or pack "
                    "copies of the network with decompk.pack, which has no such limit."
                )
            self.checks[node] = answer
        return self.checks[node]


class _Answering:
    """What torch.fx's proxies do not answer: how many sizes a shape has, and functions of numpy."""

    def __len__(self) -> int:
        count = self.tracer.length(self.node)
        if count is None:
            raise RuntimeError("a Proxy has no len: a tensor's dimensions are x.dim(), its samples x.size(0)")
        return count

    def __getattr__(self, name: str) -> fx.Proxy:
        if name.startswith("__"):  # protocols of other libraries, to which a proxy would seem to answer
            raise AttributeError(name)
        return Attribute(self, name)

    def __array_function__(self, function: Callable, types: Any, args: tuple, kwargs: dict) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, args, kwargs)


class Proxy(_Answering, fx.Proxy):
    pass


class Attribute(_Answering, fx.proxy.Attribute):
    pass


_METADATA = {"size", "dim", "ndimension", "numel", "is_floating_point", "is_complex", "stride", "get_device", "len"}
_TENSORS = {"data", "T", "mT", "H", "mH", "real", "imag", "grad"}  # attributes that are no metadata


def _is_metadata(node: fx.Node) -> bool:
    """Whether a value is made of metadata of tensors, such as shapes, not of what they hold."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target is getattr:
        return node.args[1] not in _TENSORS
    name = getattr(node.target, "__name__", node.target)
    return name in _METADATA or (bool(node.all_input_nodes) and all(map(_is_metadata, node.all_input_nodes)))


def _line(stack: traceback.StackSummary) -> str:
    """The innermost line outside torch and what traces here, as file.py:12."""
    own = [frame for frame in stack if not frame.filename.startswith((*_TRACING, "<"))] or stack
    return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}"


def _dims(node: fx.Node, root: nn.Module) -> int | None:
    """The dimensions of a node's value, where the convolution, pooling or norm nearest in front of it tells."""
    while node.op in ("call_module", "call_function", "call_method") and node.all_input_nodes:
        module = root.get_submodule(node.target) if node.op == "call_module" else None
        name = type(module).__name__ if module is not None else getattr(node.target, "__name__", node.target)
        if axes := re.search(r"([123])d$", name):
            return 2 + int(axes[1])
        if not (isinstance(module, _ELEMENTWISE) or (module is None and name.rstrip("_") in _ELEMENTWISE_NAMES)):
            return None
        node = node.all_input_nodes[0]
    return None


_ELEMENTWISE = (
    *(vars(nn.modules.activation)[name] for name in nn.modules.activation.__all__ if "Attention" not in name),
    *(nn.modules.dropout._DropoutNd, nn.Identity),
)
_ELEMENTWISE_NAMES = {
    *("relu", "relu6", "elu", "selu", "celu", "gelu", "silu", "mish", "leaky_relu", "prelu", "rrelu", "tanh"),
    *("sigmoid", "hardtanh", "hardswish", "hardsigmoid", "softplus", "softsign", "logsigmoid", "dropout", "batch_norm"),
    *("add", "sub", "mul", "truediv", "contiguous"),
}


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode for a while; afterwards every module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def trace(model: nn.Module, training: bool) -> fx.Graph:
    """The graph of `model` in train or eval mode (the two differ where auxiliary heads exist).

    Only the first argument of forward is an input; the others keep their defaults. The model's own mode is
    restored. Raises UnsupportedOperation where torch.fx cannot follow the code.
    """
    inputs = list(inspect.signature(model.forward).parameters.items())
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    defaults = {name: p.default for name, p in inputs[1:] if p.default is not inspect.Parameter.empty}
    for name, p in inputs[1:]:
        if name not in defaults and p.kind not in variadic:
            raise UnsupportedOperation(
                f"{type(model).__name__}.forward needs '{name}' beside its first argument; only networks of one input "
                "can be decomposed: give the others defaults."
            )

    def read() -> tuple[_Tracer, fx.Graph]:
        tracer = _Tracer()
        return tracer, tracer.trace(model, concrete_args=defaults or None)

    try:
        with threads.one_at_a_time(), _as_it_was(model), in_mode(model, training):
            (tracer, graph), _ = undrawn(read)
    except DecompkError:
        raise
    except Exception as error:  # torch.fx raises whatever the traced code raised
        raise UnsupportedOperation(f"torch.fx cannot trace {type(model).__name__}: {_why(error)}.") from error
    for node in graph.nodes:
        if node.op == "get_attr" and not _holds(model, node.target):  # torch.fx would keep it in the network
            raise UnsupportedOperation(
                f"{type(model).__name__}.forward makes a tensor of its own, which tracing would freeze; register it as "
                "a buffer."
            )
    for node, answer in tracer.checks.items():
        node.meta["holds"] = answer
        if not _is_metadata(node):  # only samples can tell
            _erase_unused(graph, node)
    _drop_fixed_arguments(graph)
    for node in graph.nodes:
        _spell_one_way(node)
    return graph


def _why(error: Exception) -> str:
    """Why tracing failed, and what to do."""
    place = _line(traceback.extract_tb(error.__traceback__))
    if "Proxy" in str(error) or "symbolic" in str(error):
        return (
            f"{place} needs a number that tracing does not know ({brief(error)}); write sizes without int(), features "
            "as x.flatten(1), or pack copies of the network with decompk.pack, which has no such limit"
        )
    return f"{place} raises {type(error).__name__} ({brief(error)}); decompk.pack needs no tracing"


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards, modules and what they hold have the attributes and elements that they had."""
    held = []
    for value in walked(model, lambda value: isinstance(value, torch.Tensor)):
        if not isinstance(value, torch.Tensor):
            held += [value] if isinstance(value, dict | list | set | deque) else [] if opaque(value) else [vars(value)]
    kept = [(value, _elements(value)) for value in held]
    try:
        yield
    finally:
        for value, elements in kept:
            now = _elements(value)
            if len(now) != len(elements) or any(a is not b for a, b in zip(now, elements, strict=True)):
                value.clear()
                if isinstance(value, dict):
                    half = len(elements) // 2
                    value.update(zip(elements[:half], elements[half:], strict=True))
                else:
                    (value.update if isinstance(value, set) else value.extend)(elements)


def _elements(value: Any) -> list:
    return [*value.keys(), *value.values()] if isinstance(value, dict) else [*value]


def _holds(model: nn.Module, path: str) -> bool:
    try:
        operator.attrgetter(path)(model)
    except AttributeError:
        return False
    return True


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Remove a node that nothing uses, and those in front of it that were there for it alone."""
    if not node.users and node.op in ("call_function", "call_method", "get_attr"):
        sources = node.all_input_nodes
        graph.erase_node(node)
        for source in sources:
            _erase_unused(graph, source)


def _spell_one_way(node: fx.Node) -> None:
    """One spelling of what torch accepts in many: the first operand and sizes positional, `dim` for numpy's `axis`."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return
    kwargs = {{"axis": "dim", "keepdims": "keepdim"}.get(key, key): value for key, value in node.kwargs.items()}
    args = list(node.args)
    for key in ("input", "tensors", "self", "x"):
        if not args and key in kwargs:
            args.append(kwargs.pop(key))
    if getattr(node.target, "__name__", node.target) in ("view", "reshape"):
        args += [kwargs.pop(key) for key in ("size", "shape") if key in kwargs]
    if (tuple(args), kwargs) != (node.args, node.kwargs):
        node.args, node.kwargs = tuple(args), kwargs


def _drop_fixed_arguments(graph: fx.Graph) -> None:
    """Remove the placeholders of arguments that keep their defaults, with the asserts torch.fx adds for them."""
    graph.set_codegen(fx.graph.CodeGen())
    fixed = [node for node in graph.nodes if node.op == "placeholder"][1:]
    for node in fixed:
        for user in [*node.users]:
            for assertion in [*user.users]:
                graph.erase_node(assertion)
            graph.erase_node(user)
        graph.erase_node(node)


_TRACING = (os.path.dirname(torch.__file__) + os.sep, __file__, threads.__file__)  # torchvision lies beside torch


def where(node: fx.Node) -> str:
    """The node by name, with the module that holds it and its line of source."""
    place = f"'{node.target}'" if node.op in ("call_module", "get_attr") else f"'{node.name}'"
    stack = node.meta.get("nn_module_stack") or {}
    owner = next(reversed([name for name, _ in stack.values()]), "") if stack else ""
    if node.op not in ("call_module", "get_attr") and owner:
        place += f" in '{owner}'"
    lines = [
        found
        for found in re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
        if not found[0].startswith(_TRACING)
    ]
    if lines:
        file, line = lines[-1]
        place += f" ({file.rsplit('/', 1)[-1]}:{line})"
    return place


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of a leaf without data, to compute shapes with; nothing is allocated for its tensors."""
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def shape_of(leaf: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """What a leaf without data returns for meta tensors.

    A batch norm keeps its input's shape: torch finds that by references in Python, 5 ms a call. A recurrent layer's
    are known, too: torch goes through its steps, 30 ms each.
    """
    if isinstance(leaf, nn.RNNBase) and _has_known_shapes(leaf, args, kwargs):
        (x,) = args
        states = leaf.num_layers * (1 + leaf.bidirectional), x.shape[0 if leaf.batch_first else 1], leaf.hidden_size
        last = [x.new_empty(states) for _ in range(2 if leaf.mode == "LSTM" else 1)]
        return x.new_empty((*x.shape[:2], leaf.hidden_size * (1 + leaf.bidirectional))), last[0] if len(
            last
        ) == 1 else tuple(last)
    plain = getattr(leaf.forward, "__func__", None) is nn.modules.batchnorm._BatchNorm.forward
    if plain and len(args) == 1 and not (kwargs or leaf._forward_hooks or leaf._forward_pre_hooks):
        (x,) = args
        vectors = [t for t in (leaf.weight, leaf.bias, leaf.running_mean, leaf.running_var) if t is not None]
        fits = x.dim() > 1 and x.shape[1] == leaf.num_features and x.numel() > x.shape[1]
        if fits and all(t.shape == x.shape[1:2] and t.dtype == x.dtype for t in vectors):
            leaf._check_input_dim(x)
            return torch.empty_like(x)
    return leaf(*args, **kwargs)


def _has_known_shapes(leaf: nn.RNNBase, args: tuple, kwargs: dict) -> bool:
    """Whether a recurrent layer is torch's own and is given one padded batch of sequences that it can read."""
    plain = type(leaf) in (nn.RNN, nn.GRU, nn.LSTM) and "forward" not in vars(leaf) and not leaf.proj_size
    if not plain or len(args) != 1 or kwargs or leaf._forward_hooks or leaf._forward_pre_hooks:
        return False
    (x,) = args
    return isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[2] == leaf.input_size and x.shape[1] > 0


def dtype_of(model: nn.Module) -> torch.dtype:
    """The floating dtype the network computes in: that of its first floating parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


class MetaInterpreter(fx.Interpreter):
    """Runs a graph on meta tensors and keeps every node's value in `values`: shapes at no cost.

    `batch` samples of `input_size` (C, *spatial) go in; FLOPs of one sample are those counted here / batch.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, input_size: tuple[int, ...], batch: int = 2):
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.values: dict[fx.Node, Any] = {}
        self._input = torch.empty((batch, *input_size), device="meta", dtype=dtype_of(model))

    def run_all(self) -> dict[fx.Node, Any]:
        with torch.no_grad():
            self.run(self._input)
        return self.values

    def run_node(self, node: fx.Node) -> Any:
        self.values[node] = super().run_node(node)
        if "holds" in node.meta and bool(self.values[node]) != node.meta["holds"]:
            raise ValueError("the network's own check there refuses such samples")
        return self.values[node]

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Any:
        return shape_of(on_meta(self.fetch_attr(target)), *args, **kwargs)

    def get_attr(self, target: str, args: tuple, kwargs: dict) -> Any:
        value = self.fetch_attr(target)
        return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value


@dataclass(frozen=True)
class Window:
    """How a convolution or pooling looks at one spatial axis; padding is (before, after)."""

    kernel: int
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1
    transposed: bool = False


_POOL_ARGUMENTS = {
    "max_pool": ("kernel_size", "stride", "padding", "dilation"),
    "avg_pool": ("kernel_size", "stride", "padding"),
    "lp_pool": ("norm_type", "kernel_size", "stride"),
}


def windows(operation: Any, axes: int, args: tuple = (), kwargs: dict | None = None) -> tuple[Window, ...] | None:
    """One Window per spatial axis of a convolution or pooling: a module, or a functional's name with its arguments.

    `args` are those after the input. None for everything that has no fixed window (adaptive pooling, resizing, a window
    that the graph computes).
    """
    if isinstance(operation, nn.Module):
        if not isinstance(operation, (nn.modules.conv._ConvNd, *_POOL_MODULES)):
            return None
        given = {k: getattr(operation, k, None) for k in ("kernel_size", "stride", "padding", "dilation")}
    else:
        names = _POOL_ARGUMENTS.get(re.sub(r"[123]d$", "", operation))
        if names is None:
            return None
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in (kwargs or {}).items() if k in names}
        computed: list[fx.Node] = []
        fx.node.map_arg(given, computed.append)
        if computed:
            return None
    kernel = _per_axis(given["kernel_size"], axes)
    stride = _per_axis(given.get("stride") or given["kernel_size"], axes)
    dilation = _per_axis(given.get("dilation") or 1, axes)
    padding = given.get("padding") or 0
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in _per_axis(0 if padding == "valid" else padding, axes)]
    transposed = getattr(operation, "transposed", False)
    return tuple(Window(k, s, p, d, transposed) for k, s, p, d in zip(kernel, stride, sides, dilation, strict=True))


_POOL_MODULES = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._LPPoolNd,
)


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes if len(value) == 1 else 1)
