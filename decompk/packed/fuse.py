"""Fusion of a packed network: a convolution with its crops, batch norm, residual and ReLU, in one launch."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partialmethod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from ..crops import Crop
from ..errors import DecompkError, UnsupportedOperation, brief
from ..fx.graph import in_mode
from ..fx.unseen import undrawn
from ..fx.wrapper import Rewritten, Shell
from ..kernels.backend import asked_for
from ..kernels.call import Geometry, runs_cpu, watched
from ..kernels.layout import output_shape
from ..ops.conv import arguments
from ..ops.fused import fused_rows, window_of
from ..threads import Tracer, one_at_a_time
from .conv import PackedConv2d
from .norm import PackedBatchNorm2d
from .pack import Packed
from .per_member import PerMember
from .surgery import Changes
from .twin import HOOKS, Twin, batch_rows

if TYPE_CHECKING:
    from typing_extensions import Self


def fuse(net: Packed) -> Fused:
    """The same packed network, running each convolution together with what follows it.

    Conv2d (groups=1, zero padding) → BatchNorm2d → + residual → ReLU, each part but the first optional, become one
    launch in eval mode without gradients; in train mode, on Triton's kernels, the convolution also takes the moments,
    and batch norm, residual and ReLU are one pass. A first convolution that alone reads the image reads its crops
    from it, so none are copied. All of this is decided at each call: where tensors, modes or hooks do not allow it
    (float64, a gradient in eval mode, a residual that broadcasts), the layers run one after the other as in `net`.

    The result shares parameters, buffers and layers with `net`, which keeps working and is what `unfuse()` gives
    back; `describe()` says what became of each layer. torch.fx reads the network's code once, in both modes: what
    that code branches on, and which layers it has, must not change afterwards. Calls with more than one argument run
    as in `net`. Raises DecompkError where `net` is not packed, UnsupportedOperation where torch.fx cannot follow it.
    """
    if not isinstance(net, Packed):
        raise DecompkError(
            f"fuse takes a packed network, from decompk.pack or decompk.grouped_subnets, not {type(net).__name__}."
        )
    return Fused(net.unfuse() if isinstance(net, Fused) else net)


class Fused(Packed):
    """A Packed that runs fused; built by `fuse`."""

    _original: Packed
    _program: _Program | None

    def __init__(self, packed: Packed):
        super().__init__(packed._inner, packed._K, packed._crops, packed._input_dims, packed._shared, packed._rehearse)
        program = _Program(packed._inner, packed._crops)
        vars(self).update(_original=packed, _program=program, _decomposition=packed._decomposition)
        vars(self).update(_ways=packed._ways, _told=packed._told)

    def unfuse(self) -> Packed:
        """The packed network this one was made of, with all that was learned since."""
        return self._original

    def train(self, mode: bool = True) -> Self:
        self._original.train(mode)
        return self

    def _run(self, x: Tensor, cuts: bool) -> Any:
        program = self._program
        if program is None or not program.applies():
            return super()._run(x, cuts)
        uncut = cuts and program.reads_image()
        return program(self._cut(x) if cuts and not uncut else x, self._crops if uncut else None)

    def _change(self, changes: Changes) -> None:
        self._original._change(changes)
        vars(self).update(_inner=self._original._inner)
        if changes.whole:
            self._watch_switches(self._original._switches)
            try:
                program = _Program(self._inner, self._crops)
            except UnsupportedOperation:  # nothing is left that could be fused
                program = None
            vars(self)["_program"] = program

    def _by_member(self, leaf: Tensor) -> Tensor:
        return self._original._by_member(leaf)

    def _how(self, twin: Twin) -> str:
        note = None if self._program is None else self._program.notes().get(twin._twin_path)
        return super()._how(twin) + (f", {note}" if note else "")


class _Program(Rewritten):
    """The fused graphs of `net`, for train and for eval mode."""

    _notes: dict[bool, dict[str, str]]
    _reads_image: dict[bool, bool]
    _modal: bool
    _plain: dict[bool, list[tuple[nn.Module, dict[str, Any]]]]

    def __init__(self, net: nn.Module, crops: Sequence[Crop] | None):
        fusions = {mode: _Fusion(net, mode, crops) for mode in (True, False)}
        try:
            super().__init__(net, {mode: fusion.graph for mode, fusion in fusions.items()})
        except (AttributeError, ImportError) as error:
            raise UnsupportedOperation(
                f"the graph of {type(net).__name__} cannot be written down: {error}; define at the top of a module "
                "what it uses."
            ) from error
        vars(self).update(
            _notes={mode: fusion.notes for mode, fusion in fusions.items()},
            _reads_image={mode: fusion.reads_image for mode, fusion in fusions.items()},
            _modal=self._source[True][0] != self._source[False][0],
            _plain={mode: [(m, _plain(m)) for m in fusion.entered] for mode, fusion in fusions.items()},
        )

    def forward(self, x: Tensor, crops: Sequence[Crop] | None = None) -> Any:
        """x: rows of all members (K·N, …), or with crops the image (N, …) that they share."""
        return self._code[self._inner.training](self._inner, x, crops)

    def applies(self) -> bool:
        """Whether the graph is what the code would do now: no hooks on the way, modes and values as it was read."""
        mode = self._inner.training
        return not (_has_any_global_hook() or watched()) and all(
            _unhooked(m)
            and (m.training == mode or not self._modal)
            and all(vars(m).get(name) is value for name, value in plain.items())
            for m, plain in self._plain[mode]
        )

    def reads_image(self) -> bool:
        return self._reads_image[self._inner.training]

    def notes(self) -> dict[str, str]:
        return self._notes[self._inner.training]


# ---- reading the network --------------------------------------------------------------------------------------------


class _Reader(Shell):
    """A network as a function of its first argument; the others keep their defaults."""

    def forward(self, x: Tensor) -> Any:
        return self._inner.forward(x)


class _Proxy(fx.Proxy):
    """A value on which `+=` and its like stay in place; torch.fx's own makes `+` of it, unseen under other names."""

    def _augment(self, name: str, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", _augmented, (name, self, other), {})

    __iadd__ = partialmethod(_augment, "iadd")
    __isub__ = partialmethod(_augment, "isub")
    __imul__ = partialmethod(_augment, "imul")
    __imatmul__ = partialmethod(_augment, "imatmul")
    __itruediv__ = partialmethod(_augment, "itruediv")
    __ifloordiv__ = partialmethod(_augment, "ifloordiv")
    __imod__ = partialmethod(_augment, "imod")
    __ipow__ = partialmethod(_augment, "ipow")
    __iand__ = partialmethod(_augment, "iand")
    __ior__ = partialmethod(_augment, "ior")
    __ixor__ = partialmethod(_augment, "ixor")


def _augmented(name: str, value: Any, other: Any) -> Any:
    """`value += other`, for the operator of that name."""
    return getattr(operator, name)(value, other)


class _Tracer(Tracer):
    """Twins and modules that run member by member stay whole; `entered` are the modules whose code is read."""

    proxy_buffer_attributes = True

    def __init__(self, net: nn.Module):
        super().__init__()
        self.entered = {net: None}
        self._outside = _context()

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, (Twin, PerMember)) or super().is_leaf_module(module, qualified_name)

    def called(self, module: nn.Module, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.is_leaf_module(module, ""):
            self.entered[module] = None
        return super().called(module, module.forward, args, kwargs)  # without its hooks

    def proxy(self, node: fx.Node) -> _Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self._outside:
            raise UnsupportedOperation(
                "the network's forward changes the gradient mode or autocast, or checkpoints, which torch.fx does not "
                "see: name the module that does in pack(..., member_by_member=[...])."
            )
        return super().create_node(*args, **kwargs)


def _context() -> tuple:
    """What decides, beside its arguments, how an operation runs, and is no part of a graph."""
    torch.autocast_increment_nesting()
    autocasts = torch.autocast_decrement_nesting()  # how many are under way
    return torch.is_grad_enabled(), autocasts, torch._C._autograd._top_saved_tensors_default_hooks(False)


def _read(net: nn.Module, training: bool) -> tuple[fx.Graph, list[nn.Module]]:
    """The graph of `net` in train or eval mode, and the modules whose code it comes from."""
    if isinstance(net, PerMember):
        raise UnsupportedOperation(
            f"the whole network runs member by member, since {net._reason}: nothing can be fused."
        )
    if isinstance(net, Twin):
        raise UnsupportedOperation(f"the network is a single {net._twin_class.__name__}: there is nothing to fuse.")
    reader = _Reader(net)
    attributes = set(vars(reader))

    def read() -> tuple[_Tracer, fx.Graph]:
        tracer = _Tracer(net)
        return tracer, tracer.trace(reader)

    try:
        with one_at_a_time(), in_mode(net, training):
            (tracer, graph), draws = undrawn(read)
    except UnsupportedOperation:
        raise
    except Exception as error:  # torch.fx raises whatever the traced code raised
        raise UnsupportedOperation(
            f"torch.fx cannot trace {type(net).__name__}: {brief(error)}; only networks of one input whose "
            "forward does not branch on tensor values can be fused."
        ) from error
    if draws:
        raise UnsupportedOperation(
            f"{type(net).__name__}.forward draws a random number to decide what it does, which tracing would freeze: "
            "name the module that does in pack(..., member_by_member=[...]); if it does not, another thread drew from "
            "Python's random meanwhile: fuse while none does."
        )
    if vars(reader).keys() - attributes:  # where torch.fx keeps tensors that forward makes
        raise UnsupportedOperation(
            f"{type(net).__name__}.forward makes a tensor of its own, which tracing would freeze; register it as a "
            "buffer."
        )
    return graph, list(tracer.entered)


# ---- finding what fuses ---------------------------------------------------------------------------------------------


@dataclass
class _Chain:
    """Nodes of a graph that become one: a convolution, and what follows it."""

    nodes: list[fx.Node]
    reads_image: bool
    norm: fx.Node | None = None
    add: fx.Node | None = None
    relu: fx.Node | None = None

    def __str__(self) -> str:
        parts = {"batch norm": self.norm, "residual": self.add, "ReLU": self.relu}
        names = [name for name, node in parts.items() if node is not None]
        crops = ["reads its crops from the image"] if self.reads_image else []
        return ", ".join([*([f"fused with {' + '.join(names)}"] if names else []), *crops])


class _Fusion:
    """The graph of `net` in one mode with its chains replaced by calls of `_layer`.

    entered: modules whose code the graph stands for. notes: path of a twin → what became of it. reads_image: whether
    the first layer takes the uncut image.
    """

    def __init__(self, net: nn.Module, training: bool, crops: Sequence[Crop] | None):
        self.graph, self.entered = _read(net, training)
        self.notes: dict[str, str] = {}
        called = [n for n in self.graph.nodes if n.op == "call_module"]
        self._modules: dict[Any, Any] = {n: net.get_submodule(n.target) for n in called}
        self._calls = Counter(self._modules.values())
        self._owners = Counter(id(t) for m in net.modules() for t in m._buffers.values() if t is not None)
        self._nodes = list(self.graph.nodes)
        self._taken: set[fx.Node] = set()
        self._image = next(node for node in self.graph.nodes if node.op == "placeholder") if crops is not None else None
        chains = [chain for node in self._modules for chain in self._chain(node)]
        self.reads_image = any(chain.reads_image for chain in chains)
        self._replace(chains)
        self.graph.lint()

    def _chain(self, node: fx.Node) -> Iterator[_Chain]:
        """The chain that begins at `node`, if one does."""
        conv = self._modules[node]
        if type(conv) is not PackedConv2d:
            return
        reason = self._why_not(node, conv)
        if reason is None:
            image = self._image
            chain = _Chain([node], image is not None and node.args == (image,) and len(image.users) == 1)
            self._normalise(chain)
            self._add(chain)
            self._activate(chain)
            if len(chain.nodes) > 1 or chain.reads_image:
                self._taken.update(chain.nodes)
                self.notes[conv._twin_path] = str(chain)
                yield chain
                return
            reason = self._follower(node)
        self.notes[conv._twin_path] = f"not fused: {reason}"

    def _why_not(self, node: fx.Node, conv: PackedConv2d) -> str | None:
        if conv.groups != 1:
            return f"it has {conv.groups} groups"
        if conv.padding_mode != "zeros":
            return f"its padding is {conv.padding_mode}"
        ends = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if conv.padding == "same" and any(n % 2 for n in ends):
            return "its padding is uneven"
        if self._calls[conv] > 1:
            return f"it runs {self._calls[conv]} times"
        return None if _only_argument(node) else "it is called with more than its input"

    def _follower(self, node: fx.Node) -> str:
        if len(node.users) != 1:
            return f"{len(node.users)} operations follow"
        user = next(iter(node.users))
        return f"{type(self._modules[user]).__name__ if user in self._modules else repr(user.name)} follows"

    def _next(self, chain: _Chain) -> fx.Node | None:
        """What alone reads the chain's result, where the chain may run in its place: nothing before it writes."""
        last = chain.nodes[-1]
        user = next(iter(last.users), None)
        if len(last.users) != 1 or user in self._taken:
            return None
        between = self._nodes[self._nodes.index(chain.nodes[0]) : self._nodes.index(user)]
        return None if any(self._may_write(node) for node in between if node not in chain.nodes) else user

    def _may_write(self, node: fx.Node) -> bool:
        """Whether a node may change a tensor that is not its own result; code that is not torch's may."""
        if node.op == "call_module":
            module = self._modules[node]
            known = isinstance(module, Twin) or type(module).__module__.startswith("torch.nn.")
            return not known or getattr(module, "inplace", False)
        if node.op not in ("call_function", "call_method"):
            return False
        home = getattr(node.target, "__module__", None) or "torch"
        if home.split(".")[0] not in ("torch", "_operator", "builtins", "math") or home.startswith("torch.ops"):
            return True
        return _in_place(node) or "out" in node.kwargs or (home == "_operator" and _name(node).startswith("i"))

    def _normalise(self, chain: _Chain) -> None:
        user = self._next(chain)
        norm, conv = self._modules.get(user), self._modules[chain.nodes[0]]
        if user is None or type(norm) is not PackedBatchNorm2d or not _only_argument(user) or self._calls[norm] > 1:
            return
        shared = any(self._owners[id(t)] > 1 for t in norm._buffers.values() if t is not None)
        if not shared and norm.num_features == conv.out_channels:
            self.notes[norm._twin_path] = f"fused into '{conv._twin_path}'"
            chain.norm = user
            chain.nodes.append(user)

    def _add(self, chain: _Chain) -> None:
        last, user = chain.nodes[-1], self._next(chain)
        if user is None:
            return
        one, other = _addends(user)
        residual = other if one is last else one
        if isinstance(residual, fx.Node) and residual is not last and (one is last or not _adds_in_place(user)):
            chain.add = user
            chain.nodes.append(user)

    def _activate(self, chain: _Chain) -> None:
        user = self._next(chain)
        if user is None:
            return
        if (type(self._modules.get(user)) is nn.ReLU and _only_argument(user)) or user.target in _RELUS:
            chain.relu = user
            chain.nodes.append(user)

    def _replace(self, chains: list[_Chain]) -> None:
        graph = self.graph
        image = next(node for node in graph.nodes if node.op == "placeholder")
        norms: list[Any] = [chain.norm for chain in chains if chain.norm is not None]
        with graph.inserting_after(image):
            crops = graph.placeholder("crops", default_value=None)
        with graph.inserting_before(crops.next):
            modules = {norm: graph.get_attr(norm.target) for norm in norms}
            affines = graph.call_function(_affines, tuple(modules.values()))
            affine = {norm: graph.call_function(operator.getitem, (affines, i)) for i, norm in enumerate(norms)}
        for chain in chains:
            conv, add, last = chain.nodes[0], chain.add, chain.nodes[-1]
            with graph.inserting_before(last):
                call = (
                    *(conv.args[0], crops if chain.reads_image else None, graph.get_attr(str(conv.target))),
                    *(modules.get(chain.norm), affine.get(chain.norm)),
                    None if add is None else next(node for node in _addends(add) if node not in chain.nodes),
                    add is not None and _adds_in_place(add),
                    self._activation(chain.relu),
                )
                last.replace_all_uses_with(graph.call_function(_layer, call))
            for node in reversed(chain.nodes):
                graph.erase_node(node)

    def _activation(self, relu: fx.Node | None) -> Any:
        """The ReLU as `_layer` takes it: a module, the name of a function of torch, or None."""
        if relu is None:
            return None
        if relu.op == "call_module":
            return self.graph.get_attr(str(relu.target))
        return "relu_" if _in_place(relu) else "relu"


_RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")


def _addends(node: fx.Node) -> tuple[Any, ...]:
    """The two sides of an addition; (None, None) of anything else."""
    if node.target is _augmented and node.args[0] == "iadd":
        return node.args[1:]
    plain = node.target in (operator.add, torch.add, "add", "add_") and len(node.args) == 2 and not node.kwargs
    return node.args if plain else (None, None)


def _adds_in_place(node: fx.Node) -> bool:
    return node.target in (_augmented, "add_")


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _in_place(node: fx.Node) -> bool:
    """Whether a call's name or arguments say that it writes into its input."""
    return _name(node).endswith("_") or any(value is True for value in (*node.args, node.kwargs.get("inplace")))


def _only_argument(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs


# ---- running it -----------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _layer(
    x: Tensor, crops: Sequence[Crop] | None, conv: PackedConv2d, norm: PackedBatchNorm2d | None, *further: Any
) -> Tensor:
    """`_run_layer`, laid out as its last twin is to be."""
    y = _run_layer(x, crops, conv, norm, *further)
    return y.contiguous() if (conv if norm is None else norm)._twin_contiguous else y


def _run_layer(
    x: Tensor,
    crops: Sequence[Crop] | None,
    conv: PackedConv2d,
    norm: PackedBatchNorm2d | None,
    affine: tuple[Tensor, Tensor] | None,
    residual: Any,
    add_in_place: bool,
    relu: nn.Module | str | None,
) -> Tensor:
    """relu(norm(conv(x)) + residual): x (K·N, C, H, W), or with crops the image (N, C, H, W) → (K·N, O, H', W').

    In as few launches as arguments, modes and hooks allow; else as the network's own code does it. affine: scale and
    shift (K, O) of a norm by its running statistics. relu: a module, or the name of a function of torch.
    """
    known = _unchanged(conv, PackedConv2d) and _unchanged(norm, PackedBatchNorm2d) and _unchanged(relu, nn.ReLU)
    joins = known and norm is not None and runs_cpu(x)  # the norm takes what follows it
    call = _call(x, crops, conv) if known and not joins else None
    if call is not None and (residual is None or _fits(residual, call)):
        gradient = torch.is_grad_enabled() and any(map(_needs_gradient, (x, conv.weight, conv.bias, residual)))
        if not gradient and (norm is None or affine is not None):
            return fused_rows(*call, affine or (None, None), residual, relu is not None)
        if norm is not None and _on_kernels(x) and _takes_moments(norm, call):
            return _by_moments(call, crops, norm, residual, relu is not None)

    if crops is None:
        y = conv(x)
    elif call is not None and _on_kernels(x):
        x, weight, bias, geometry, _ = call
        y = ops.conv2d_moments(x, weight, bias, *geometry, crops=crops, moments=False)[0].flatten(0, 1)
    else:
        y = conv(torch.cat([crop.cut(x) for crop in crops]))
    if joins and (residual is None or (isinstance(residual, Tensor) and residual.shape == y.shape)):
        assert norm is not None
        return norm(y, residual, relu is not None)
    if norm is not None:
        y = norm(y)
    if add_in_place:
        y += residual
    elif residual is not None:
        y = y + residual
    if relu is None:
        return y
    return getattr(torch, relu)(y) if isinstance(relu, str) else relu(y)


def _on_kernels(x: Tensor) -> bool:
    """Whether Triton runs here: torch's own operators need a pass of their own for what the kernels do on the way."""
    return asked_for("triton") or (x.is_cuda and not asked_for("torch"))


def _plain(module: nn.Module) -> dict[str, Any]:
    """The numbers and words among a module's attributes, which its code may read."""
    kinds = (bool, int, float, str, type(None))
    return {name: value for name, value in vars(module).items() if type(value) in kinds and name != "training"}


def _unhooked(module: nn.Module) -> bool:
    return "forward" not in vars(module) and not any(getattr(module, hooks) for hooks in HOOKS)


def _unchanged(part: nn.Module | str | None, kind: type[nn.Module]) -> bool:
    return part is None or isinstance(part, str) or (type(part) is kind and _unhooked(part))


def _needs_gradient(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad


_Call = tuple[Tensor, Tensor, Tensor | None, Geometry, tuple[int, ...]]


def _call(x: Tensor, crops: Sequence[Crop] | None, conv: PackedConv2d) -> _Call | None:
    """x, rows (K·N, C, H, W) or the image, weight, bias, stride, padding and dilation, and the window of crops.

    None where no operator takes them.
    """
    compiled = torch.compiler.is_compiling()  # which reads no ContextVar
    if crops is None and (compiled or x.dim() != 4 or x.shape[0] % (batch_rows.get() or conv._twin_K)):
        conv._twin_check(x)
    weight, bias = conv.weight, conv.bias
    if x.device.type not in ("cpu", "cuda") or any(t is not None and t.dtype not in DTYPES for t in (x, weight, bias)):
        return None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    geometry: Any = conv.stride, conv.padding, conv.dilation
    if isinstance(conv.padding, str):
        geometry = arguments(conv.kernel_size, *geometry)
    window = () if crops is None else window_of(crops, x.shape, len(weight))
    return x, weight, bias, geometry, window


def _shape(call: _Call) -> tuple[int, ...]:
    """(K, N, O, H', W') of what a call gives."""
    x, weight, _, geometry, window = call
    K, N = len(weight), x.shape[0] if window else x.shape[0] // len(weight)
    find = output_shape if torch.compiler.is_compiling() else _output_shape  # no cache holds symbols
    return find((K, N, x.shape[1], *(window[:2] or x.shape[2:])), weight.shape, *geometry)


_output_shape = functools.lru_cache(maxsize=1024)(output_shape)


def _fits(residual: Any, call: _Call) -> bool:
    """Whether the operators add it: a tensor of the output's shape, dtype and device."""
    x = call[0]
    if not isinstance(residual, Tensor) or (residual.dtype, residual.device) != (x.dtype, x.device):
        return False
    K, N, *rest = _shape(call)
    return tuple(residual.shape) == (K * N, *rest)


def _affines(*norms: Any) -> list[tuple[Tensor, Tensor] | None]:
    """scale and shift (K, C) float32 of every norm that uses its running statistics and needs no gradient."""
    affine = [_is_affine(norm) for norm in norms]
    ready = [norm for norm, is_affine in zip(norms, affine, strict=True) if is_affine]
    if not ready:
        return [None] * len(norms)

    def vectors(name: str, absent: float = 0.0) -> list[Tensor]:
        pairs = [(norm.running_var, getattr(norm, name)) for norm in ready]
        return [torch.full_like(var, absent, dtype=torch.float32) if t is None else t.float() for var, t in pairs]

    with torch.no_grad():  # a few launches for all layers together
        scales = torch._foreach_rsqrt(torch._foreach_add(vectors("running_var"), [norm.eps for norm in ready]))
        scales = torch._foreach_mul(scales, vectors("weight", 1.0))
        shifts = torch._foreach_sub(vectors("bias"), torch._foreach_mul(vectors("running_mean"), scales))
    pairs = iter(zip(scales, shifts, strict=True))
    return [next(pairs) if is_affine else None for is_affine in affine]


def _is_affine(norm: nn.Module) -> bool:
    if type(norm) is not PackedBatchNorm2d or norm.training or norm.running_mean is None or norm.running_var is None:
        return False
    gradient = torch.is_grad_enabled() and any(map(_needs_gradient, (norm.weight, norm.bias)))
    return not gradient and norm.running_var.dtype in DTYPES


def _takes_moments(norm: PackedBatchNorm2d, call: _Call) -> bool:
    """Whether it normalises by its batch's statistics, in a way that the operator does, too."""
    if not norm.training and (norm.running_mean is not None or norm.running_var is not None):
        return False
    statistics = [t for t in _tracked(norm) if t is not None]
    if statistics and (norm.momentum is None or not all(t.is_contiguous() for t in statistics)):
        return False
    _, N, _, H, W = _shape(call)
    return N * H * W > 1


def _tracked(norm: PackedBatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics that a batch moves."""
    return (norm.running_mean, norm.running_var) if norm.training and norm.track_running_stats else (None, None)


def _by_moments(
    call: _Call, crops: Sequence[Crop] | None, norm: PackedBatchNorm2d, residual: Tensor | None, relu: bool
) -> Tensor:
    """A batch norm by its batch's statistics, which the convolution takes while it writes what they are of."""
    x, weight, bias, geometry, _ = call
    members = (len(weight), -1)
    y, moments = ops.conv2d_moments(x if crops else x.unflatten(0, members), weight, bias, *geometry, crops=crops)
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    added = None if residual is None else residual.unflatten(0, members)
    statistics = _tracked(norm)
    return ops.batch_norm(
        y, norm.weight, norm.bias, *statistics, True, momentum, norm.eps, added, relu, moments
    ).flatten(0, 1)
