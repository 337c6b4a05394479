"""What fuses in a packed network: its code read by torch.fx, a convolution and what follows it made one node."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partialmethod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..crops import Crop
from ..errors import UnsupportedOperation, brief
from ..fx.graph import in_mode
from ..fx.unseen import undrawn
from ..fx.wrapper import Shell
from ..threads import Tracer, one_at_a_time
from .bare import Bare
from .conv import PackedConv2d
from .fused_layer import affines, relu_of, run_layer, run_shared_layer
from .fused_linear import run_linear
from .fused_pool import pools, run_pool
from .linear import PackedLinear
from .norm import PackedBatchNorm2d
from .norm_then import ALONE, PackedBatchNormThen2d
from .per_member import PerMember
from .twin import Twin

if TYPE_CHECKING:
    pass


class _Reader(Shell):
    """A network as a function of its first argument; the others keep their defaults."""

    def forward(self, x: Tensor) -> Any:
        return self._inner.forward(x)


class _Proxy(fx.Proxy):
    """A value on which `+=` and its like stay in place; torch.fx's own makes `+` of it, unseen under other names."""

    def _augment(self, name: str, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", augmented, (name, self, other), {})

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


def augmented(name: str, value: Any, other: Any) -> Any:
    """`value += other`, for the operator of that name."""
    return getattr(operator, name)(value, other)


class _Tracer(Tracer):
    """Twins, owners of bare parameters and modules that run member by member stay whole.

    entered: the modules whose code is read.
    """

    proxy_buffer_attributes = True

    def __init__(self, net: nn.Module):
        super().__init__()
        self.entered = {net: None}
        self._around: dict[nn.Module, nn.Module] = {}  # a norm alone → the module whose it is
        self._outside = _context()

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, (Bare, Twin, PerMember)) or super().is_leaf_module(module, qualified_name)

    def path_of_module(self, module: nn.Module) -> str:
        around = self._around.get(module)
        return super().path_of_module(module) if around is None else f"{super().path_of_module(around)}.{ALONE}"

    def called(self, module: nn.Module, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if isinstance(module, PackedBatchNormThen2d):
            self.entered[module] = None
            self._around[module._norm] = module
            return module._then(super().called(module._norm, forward, args, kwargs))
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


def read(net: nn.Module, training: bool) -> tuple[fx.Graph, list[nn.Module]]:
    """The graph of `net` in train or eval mode, and the modules whose code it comes from."""
    if isinstance(net, PerMember):
        raise UnsupportedOperation(
            f"the whole network runs member by member, since {net._reason}: nothing can be fused."
        )
    if isinstance(net, Bare):
        raise UnsupportedOperation(f"{type(net).__name__} reads parameters of its own, which no graph of it can.")
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
            "name the module that does in pack(..., member_by_member=[...])."
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


class Fusion:
    """The graph of `net` in one mode with its chains replaced by calls of `run_layer`.

    entered: modules whose code the graph stands for; called: those that it calls or that its chains are made of. notes:
    path of a twin → what became of it. reads_image: whether the first layer takes the uncut image.
    """

    def __init__(self, net: nn.Module, training: bool, crops: Sequence[Crop] | None):
        self.graph, self.entered = read(net, training)
        self.notes: dict[str, str] = {}
        called = [n for n in self.graph.nodes if n.op == "call_module"]
        self._modules: dict[Any, Any] = {n: net.get_submodule(n.target) for n in called}
        self.called = list(dict.fromkeys(self._modules.values()))
        self._calls = Counter(self._modules.values())
        self._owners = Counter(id(t) for m in net.modules() for t in m._buffers.values() if t is not None)
        self._nodes = list(self.graph.nodes)
        self._taken: set[fx.Node] = set()
        self._image = next(node for node in self.graph.nodes if node.op == "placeholder") if crops is not None else None
        chains = [chain for node in self._modules for chain in self._chain(node)]
        self.reads_image = any(chain.reads_image for chain in chains)
        linears = [chain for node in self._modules for chain in self._linear(node)]
        self._replace(chains)
        for chain in linears:
            self._replace_linear(chain)
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
            self._taken.update(chain.nodes)
            yield chain
            if len(chain.nodes) > 1 or chain.reads_image:
                self.notes[conv._twin_path] = str(chain)
                return
            reason = self._follower(node)
        self.notes[conv._twin_path] = f"not fused: {reason}"

    def _why_not(self, node: fx.Node, conv: PackedConv2d) -> str | None:
        if conv.groups != 1 and not (conv._twin_is_by_channel() and isinstance(conv.padding, tuple)):
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
        module = self._modules.get(user)
        if (relu_of(module) and _only_argument(user)) or user.target in _RELUS:
            chain.relu = user
            chain.nodes.append(user)

    def _replace(self, chains: list[_Chain]) -> None:
        graph = self.graph
        image = next(node for node in graph.nodes if node.op == "placeholder")
        norms: list[Any] = [chain.norm for chain in chains if chain.norm is not None]
        with graph.inserting_after(image):
            crops = graph.placeholder("crops", default_value=None)
        with graph.inserting_after(crops):
            alone = graph.placeholder("alone", default_value=False)
        private = [self._is_private(chain, chains) for chain in chains]
        with graph.inserting_before(alone.next):
            modules = {norm: graph.get_attr(norm.target) for norm in norms}
            every = graph.call_function(affines, tuple(modules.values()))
            affine = {norm: graph.call_function(operator.getitem, (every, i)) for i, norm in enumerate(norms)}
        for chain, is_private in zip(chains, private, strict=True):
            conv, add, last = chain.nodes[0], chain.add, chain.nodes[-1]
            read: Any = conv.args[0]
            with graph.inserting_before(last):
                call = (
                    alone if is_private else False,
                    *(conv.args[0], crops if chain.reads_image else None, graph.get_attr(str(conv.target))),
                    *(modules.get(chain.norm), affine.get(chain.norm)),
                    None if add is None else next(node for node in _addends(add) if node not in chain.nodes),
                    add is not None and _adds_in_place(add),
                    self._activation(chain.relu),
                )
                if shared := self._sharers(chain, chains):
                    pair = graph.call_function(run_shared_layer, (alone, *call))
                    y, x = (graph.call_function(operator.getitem, (pair, i)) for i in range(2))
                    last.replace_all_uses_with(y)
                    for user in shared:
                        user.replace_input_with(read, x)
                else:
                    last.replace_all_uses_with(graph.call_function(run_layer, call))
            for node in reversed(chain.nodes):
                graph.erase_node(node)
        for node, module in self._modules.items():
            if _only_argument(node) and pools(module):
                with graph.inserting_before(node):
                    pool = graph.get_attr(str(node.target))
                    node.replace_all_uses_with(graph.call_function(run_pool, (node.args[0], pool)))
                graph.erase_node(node)

    def _linear(self, node: fx.Node) -> Iterator[_Chain]:
        """A linear layer and the ReLU that follows it, if `node` is one."""
        module = self._modules[node]
        if type(module) is PackedLinear and _only_argument(node) and self._calls[module] == 1:
            chain = _Chain([node], reads_image=False)
            self._activate(chain)
            self._taken.update(chain.nodes)
            yield chain

    def _replace_linear(self, chain: _Chain) -> None:
        first, last, graph = chain.nodes[0], chain.nodes[-1], self.graph
        with graph.inserting_before(last):
            call = first.args[0], graph.get_attr(str(first.target)), self._activation(chain.relu)
            last.replace_all_uses_with(graph.call_function(run_linear, call))
        for node in reversed(chain.nodes):
            graph.erase_node(node)

    def _sharers(self, chain: _Chain, chains: list[_Chain]) -> list[fx.Node]:
        """The others that read the chain's input, where all of them do so after it and only read."""
        conv = chain.nodes[0]
        x: Any = conv.args[0]
        order = self._nodes
        if chain.reads_image or x.op == "placeholder":
            return []
        later = set(order[order.index(chain.nodes[-1]) + 1 :])
        fused = {node: one.nodes[-1] for one in chains for node in one.nodes}  # it runs where its last node stood
        others = [user for user in x.users if user is not conv]
        read_later = all(fused.get(user, user) in later for user in others)
        return others if read_later and all(self._only_reads(user, fused) for user in others) else []

    def _is_private(self, chain: _Chain, chains: list[_Chain]) -> bool:
        """Whether only layers that read it see the chain's result."""
        fused = {node for one in chains for node in one.nodes}
        return all(self._only_reads(user, fused) for user in chain.nodes[-1].users)

    def _only_reads(self, user: fx.Node, fused: Collection[fx.Node]) -> bool:
        """Whether it neither writes into what it is given nor hands it on, but to others of that kind."""
        module = self._modules.get(user)
        if type(module) is nn.Identity:
            return all(self._only_reads(reader, fused) for reader in user.users)
        return user in fused or isinstance(module, _READERS)

    def _activation(self, relu: fx.Node | None) -> Any:
        """The ReLU as `run_layer` takes it: a module, the name of a function, or None."""
        if relu is None:
            return None
        if relu.op == "call_module":
            return self.graph.get_attr(str(relu.target))
        if relu.target is F.relu6:
            return "relu6"
        return "relu_" if _in_place(relu) else "relu"


_READERS = (PackedConv2d, nn.MaxPool2d, nn.AvgPool2d)  # they leave their input as it is and give no view of it
_RELUS = (F.relu, F.relu6, torch.relu, torch.relu_, "relu", "relu_")


def _addends(node: fx.Node) -> tuple[Any, ...]:
    """The two sides of an addition; (None, None) of anything else."""
    if node.target is augmented and node.args[0] == "iadd":
        return node.args[1:]
    plain = node.target in (operator.add, torch.add, "add", "add_") and len(node.args) == 2 and not node.kwargs
    return node.args if plain else (None, None)


def _adds_in_place(node: fx.Node) -> bool:
    return node.target in (augmented, "add_")


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _in_place(node: fx.Node) -> bool:
    """Whether a call's name or arguments say that it writes into its input."""
    return _name(node).endswith("_") or any(value is True for value in (*node.args, node.kwargs.get("inplace")))


def _only_argument(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs
