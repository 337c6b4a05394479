"""Which member owns which channels of the global network: one pass over its torch.fx graph.

Every node is run twice on meta tensors: on the global shapes and on one member's. Next to the two results stands whose
channels they hold: the tensor is shared by all members (the image), divided among them along channel axes, or a
partial sum (a head's output, which composition adds up). Rules say what an operation does to that (`rules.py`;
layers with parameters here); what has no rule is refused by name. The result is a `Division`: for every tensor of the
state dict, where each member's part of it lies in the global one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import map_aggregate, map_arg

from ..crops import Crop, Part, by, owners
from ..errors import MISFITS, DecompkError, MisfitError, PartitionError, UnsupportedOperation, brief
from ..fx.graph import MetaInterpreter, dtype_of, on_meta, shape_of, trace, where, windows
from ..fx.hooks import refuse_hooks
from ..ops.recurrent import GATES
from .division import Division, Place
from .ends import LAYERS, _reads_features, heads
from .operations import (
    ELEMENTWISE_FUNCTIONS,
    ELEMENTWISE_MODULES,
    FUNCTIONAL_LAYERS,
    LINEAR,
    SHAPE_QUERIES,
    operation_name,
)
from .rules.layers import MODULE_RULES
from .rules.registry import FUNCTION_RULES
from .rules.spatial import covers
from .strands import Strands
from .values import PARTIAL, SHARED, Both, Divided, MapExtent, Ownership, TensorPair, globally, in_member, tensors_in


@dataclass(eq=False)
class Leaf:
    """What a layer with parameters becomes in a member: new attributes, and the strands along its tensors' axes."""

    kind: str
    attributes: dict[str, Any] = field(default_factory=dict)
    inputs: np.ndarray | None = None  # None: the layer reads the image
    outputs: np.ndarray | None = None  # None: a head, all outputs
    flat: MapExtent | None = None
    groups: int = 1
    member_groups: int = 1
    hidden: list[list[np.ndarray]] = field(default_factory=list)  # of a recurrent layer: by depth and direction


def divide_channels(
    model: nn.Module,
    input_size: tuple[int, ...],
    crops: Sequence[Part],
    head: str,
    graphs: dict[bool, fx.Graph] | None = None,
) -> Division:
    """Divide `model` among len(crops) members. Raises UnsupportedOperation or PartitionError; changes nothing.

    graphs: the model's, by training or not, where they were traced before.
    """
    return _Pass(model, input_size, crops, head).run(graphs)


SIDES = {True: ("in_channels", "out_channels"), False: ("in_features", "out_features")}  # convolution or linear
_PLAIN_FORWARDS = {
    kind.forward
    for kind in (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
}


class _Pass:
    def __init__(self, model: nn.Module, input_size: tuple[int, ...], crops: Sequence[Part], head: str):
        self.model, self.input_size, self.crops, self.head = model, input_size, crops, head
        self.K = len(crops)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.strands = Strands()
        self.leaves: dict[str, Leaf] = {}
        self.bare: dict[str, tuple[int, np.ndarray]] = {}
        self.features = np.zeros(0, dtype=np.int64)  # the strands of an input vector, whose owners the crops say
        self.checks: list[tuple[fx.Node, Callable[[np.ndarray], bool]]] = []
        self.turned: fx.Node | None = None  # what swaps axes of the image itself
        self.shuffles: list[tuple[bool, fx.Node, np.ndarray, int, np.ndarray]] = []
        self.pinned: list[np.ndarray] = []  # strands whose order an operation without parameters relies on
        self.division = Division(self.K)
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.bare_rewrites: dict[str, list[str]] = {}  # nodes rewritten for a parameter that may yet prove shared
        self.tensor_names: dict[str, tuple[str, str | None]] = {}  # functional layer → names of weight and bias

    def run(self, graphs: dict[bool, fx.Graph] | None = None) -> Division:
        refuse_hooks(self.model)
        self._refuse_tied_parameters()
        graphs = graphs or {mode: trace(self.model, mode) for mode in (True, False)}
        self.division.graphs = graphs
        self.extent = self.input_size[-len(self.crops[0].size) :]
        self.vectors = len(self.extent) == 1 and (
            len(self.input_size) == 1 or any(_reads_features(self.modules, g) for g in graphs.values())
        )
        self.assembles = self.head == "concat" and not self.vectors and self._returns_maps(graphs[False])
        divides_outputs = self.head == "concat" and not self.assembles
        self.heads = set() if divides_outputs else set().union(*(heads(self.model, g) for g in graphs.values()))
        if self.vectors:
            owner = owners(self.crops, self.extent, "every feature of an input vector needs one member")
            self.features = self.strands.new(owner.size)
            self.strands.give(self.features, owner)
        elif self.assembles:
            owners(self.crops, self.extent, "every part of an auto-encoder's output is one member's")
        elif not all(isinstance(crop, Crop) for crop in self.crops):
            raise PartitionError(
                f"{type(self.model).__name__} reads neighbours, not single features: give crops, not index sets."
            )
        self.values: dict[bool, dict[fx.Node, Any]] = {}
        for self.mode, graph in graphs.items():
            self.division.member_args[self.mode] = {}
            self.division.assemblies[self.mode] = {}
            self.env: dict[fx.Node, Any] = {}
            for node in graph.nodes:
                self.node = node
                try:
                    self.env[node] = self._visit(node)
                except DecompkError:
                    raise
                except Exception as error:  # an operation used in a way that its rule does not foresee
                    self.refuse(f"it cannot be followed ({type(error).__name__}: {brief(error)})")
                if "holds" in node.meta:
                    self._check(node.meta["holds"])
            self.values[self.mode] = self.env
        self._finish(self.values)
        return self.division

    # ---- one node -------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            full = torch.empty((2, *self.input_size), device="meta", dtype=dtype_of(self.model))
            part = full.new_empty((2, *self.input_size[: -len(self.extent)], *self.crops[0].size))
            if self.vectors:
                return self.wrap(full, part, Divided(self.features, (full.dim() - 1,)))
            return TensorPair(full, part, SHARED, (Fraction(1),) * len(self.extent))
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.env[n])
        if node.op == "output":
            return self._output(args[0])
        if node.op == "get_attr":
            return self._get_attr(node.target)
        if node.op == "call_module":
            return self._call_module(node.target, args, kwargs)
        if isinstance(node.target, type):  # a named tuple of outputs
            return node.target(*args, **kwargs)
        name = operation_name(node)
        if not tensors_in((args, kwargs)):
            return self.outside(args, kwargs)
        rule = FUNCTION_RULES.get(name)
        if rule is None:
            self.refuse(f"'{name}' has no rule")
        if name not in (ELEMENTWISE_FUNCTIONS | FUNCTIONAL_LAYERS | SHAPE_QUERIES):
            for t in tensors_in((args, kwargs)):
                if isinstance(t.ownership, Divided) and not t.ownership.axes:
                    self.refuse(
                        f"it rearranges parameter '{t.ownership.bare}', which does not have one value per channel"
                    )
        return rule(self, name, args, kwargs)

    def _check(self, holds: bool) -> None:
        """What the network's own code checks here must hold of whole samples and of a member's part."""
        value = self.env[self.node]
        if bool(globally(value)) != holds:
            raise PartitionError(f"{where(self.node)}: the network itself refuses samples of {by(self.input_size)}.")
        if bool(in_member(value)) != holds:
            raise MisfitError(
                f"{where(self.node)}: the network's own check refuses a member, whose channels and maps are smaller; "
                "let it check no size that the division changes, or pack copies of the network with decompk.pack."
            )

    def _returns_maps(self, graph: fx.Graph) -> bool:
        """Whether what the network returns has the input's spatial axes."""
        values = MetaInterpreter(self.model, graph, self.input_size).run_all()
        output = next(value for node, value in values.items() if node.op == "output")
        found: list[torch.Tensor] = []
        map_aggregate(output, lambda value: found.append(value) if isinstance(value, torch.Tensor) else None)
        return any(t.dim() == 1 + len(self.input_size) for t in found)

    def refuse(self, what: str, remedy: str = "run it whole, or pack copies of the network with decompk.pack") -> Any:
        raise UnsupportedOperation(f"{where(self.node)}: {what}, so its channels cannot be divided; {remedy}.")

    def adapted(self, name: str) -> None:
        """The layer follows the member's smaller map; a member no longer runs on the full image."""
        if name not in self.division.adapted:
            self.division.adapted.append(name)

    def note(self, what: str) -> None:
        self.division.noted.add(self.node.name)
        note = f"{where(self.node)}: {what}"
        if note not in self.division.notes:
            self.division.notes.append(note)

    def run_global(self, args: Any, kwargs: Any) -> Any:
        """The node's operation on the global shapes."""
        with torch.no_grad():
            return self._operation()(*globally(args), **globally(kwargs))

    def run_member(self, args: Any, kwargs: Any, member: tuple | None = None) -> Any:
        """The node's operation on a member's shapes; `member` overrides its arguments."""
        operation = self._operation(self.division.attributes.get(self.node.target, {}))
        args_, kwargs_ = member or (in_member(args), in_member(kwargs))
        try:
            with torch.no_grad():
                return operation(*args_, **kwargs_)
        except MISFITS as error:
            raise self._does_not_fit(next(iter(tensors_in((args, kwargs)))), error) from error

    def run_both(self, args: Any, kwargs: Any, member: tuple | None = None) -> tuple[Any, Any]:
        return self.run_global(args, kwargs), self.run_member(args, kwargs, member)

    def _operation(self, attributes: dict[str, Any] | None = None) -> Callable:
        node = self.node
        if node.op == "call_module":
            return narrow(self.modules[node.target], attributes or {}, {})
        return partial(_call_method, node.target) if node.op == "call_method" else node.target

    def _does_not_fit(self, x: TensorPair, error: Exception) -> MisfitError:
        return MisfitError(
            f"{where(self.node)}: a member's {by(x.part.shape[1:])} does not fit here ({brief(error)}); "
            "choose other crops (a larger crop_size lets them overlap) or another number of partitions."
        )

    def rewrite(self, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        """The member's node takes these arguments instead (nodes and plain numbers); returns their values."""
        self.division.member_args[self.mode][self.node.name] = (args, kwargs)
        for source in self.node.all_input_nodes:
            ownership = getattr(self.env[source], "ownership", None)
            if isinstance(ownership, Divided) and ownership.bare is not None:
                self.bare_rewrites.setdefault(ownership.bare, []).append(self.node.name)
        return in_member(map_arg((args, kwargs), lambda n: self.env[n]))

    @staticmethod
    def pick(args: tuple, kwargs: dict) -> Any:
        """One element of a tuple of tensors."""
        return args[0][globally(args[1])]

    def wrap(
        self, full: Any, part: Any, ownership: Ownership, scale: tuple = (), moved: MapExtent | None = None
    ) -> Any:
        """The two results as one value; every divided tensor adds its demand for an even division."""
        if isinstance(full, torch.Tensor):
            if isinstance(ownership, Divided) and ownership.bare is None:
                self._demand(ownership, full, part)
            return TensorPair(full, part, ownership, scale, moved)
        if isinstance(full, (tuple, list)) and not isinstance(full, torch.Size):
            return type(full)(self.wrap(f, p, ownership, scale) for f, p in zip(full, part, strict=True))
        return full if full == part else Both(full, part)

    def outside(self, args: Any, kwargs: Any) -> Any:
        full, part = self.run_both(args, kwargs)
        if isinstance(full, torch.Tensor) and full.shape != part.shape:
            self.refuse("it makes a tensor whose shape differs between the global network and a member")
        return self.wrap(full, part, SHARED)

    def _demand(self, ownership: Divided, full: torch.Tensor, part: torch.Tensor) -> None:
        cut = self.cut(ownership, full, part)
        node = self.node
        if cut == len(ownership.axes) - 1:
            for row in ownership.ids.reshape(-1, ownership.ids.shape[-1]):
                self.strands.require(row, partial(where, node))
        else:
            rows = np.moveaxis(ownership.ids, cut, -1)
            K = self.K

            def even(owner: np.ndarray) -> bool:
                owned = owner[rows.reshape(-1, rows.shape[-1])]
                return all(((owned == k).sum(1) * K == rows.shape[-1]).all() for k in range(K))

            self.checks.append((node, even))

    def cut(self, ownership: Divided, full: torch.Tensor, part: torch.Tensor) -> int:
        """Which of the divided axes is the one that is K times shorter in a member."""
        extent = ownership.flat
        shorter = []
        for i, axis in enumerate(ownership.axes):
            whole, own = full.shape[axis], part.shape[axis]
            if extent is not None:
                whole, own = whole // math.prod(extent.full), own // math.prod(extent.part)
            if whole != own:
                shorter.append((i, whole, own))
        if self.K == 1:
            return len(ownership.axes) - 1
        if len(shorter) != 1 or shorter[0][1] != shorter[0][2] * self.K:
            sizes = by([full.shape[a] for a in ownership.axes])
            raise PartitionError(
                f"{where(self.node)}: {sizes} channels cannot be divided into {self.K} equal parts; "
                "choose a number of partitions that divides them."
            )
        return shorter[0][0]

    # ---- parameters and outputs -----------------------------------------------------------------------------------

    def _get_attr(self, target: str) -> Any:
        value = self.tensor(target)
        if not isinstance(value, torch.Tensor):
            return value
        full = torch.empty_like(value, device="meta")
        long = [axis for axis, size in enumerate(value.shape) if size > 1]
        if len(long) != 1 or value.shape[long[0]] % self.K:
            undivided = Divided(np.zeros(0, dtype=np.int64), (), bare=target)
            return TensorPair(full, full, undivided if target in self.parameters else SHARED)
        _, ids = self.bare.get(target) or (long[0], self.strands.new(value.shape[long[0]]))
        return TensorPair(full, _shrunk(full, long[0], self.K), Divided(ids, (long[0],), bare=target))

    def settle(self, tensors: list[TensorPair]) -> list[TensorPair]:
        """Bare parameters and buffers take the side of the activation they meet."""
        divided = any(isinstance(t.ownership, Divided) and t.ownership.bare is None for t in tensors)
        settled = []
        for t in tensors:
            name = t.ownership.bare if isinstance(t.ownership, Divided) else None
            if name is None:
                settled.append(t)
                continue
            if divided and t.ownership.axes:
                axis = next(a for a, s in enumerate(self.tensor(name).shape) if s > 1)
                self.strands.tie(self.bare.setdefault(name, (axis, t.ownership.ids))[1], t.ownership.ids)
                settled.append(replace(t, ownership=replace(t.ownership, bare=None)))
            elif name not in self.parameters:
                for node in self.bare_rewrites.pop(name, []):
                    self.division.member_args[self.mode].pop(node, None)
                settled.append(TensorPair(t.full, t.full, SHARED))
            elif not divided:
                self.refuse(
                    f"parameter '{name}' acts on what all members share, and composition has one place for K of it"
                )
            else:
                self.refuse(
                    f"parameter '{name}' of shape {tuple(self.tensor(name).shape)} does not have one value per channel"
                )
        return settled

    def tensor(self, name: str) -> Any:
        value: Any = self.model
        for part in name.split("."):
            value = getattr(value, part)
        return value

    def _output(self, value: Any) -> Any:
        for t in tensors_in(value):
            if isinstance(t.ownership, Divided) and self.head != "concat":
                self.refuse(
                    "the network returns divided channels, not the output of a last layer",
                    'ask for decompose(..., head="concat")',
                )
            if t.ownership is SHARED and not self.assembles:
                self.note("the network returns what every member holds whole: the composed network returns it once")
            if isinstance(t.ownership, Divided) and (len(t.ownership.axes) != 1 or t.ownership.flat):
                self.refuse("the network's output mixes channels with other axes")
            if isinstance(t.ownership, Divided) and self.vectors and len(t.ownership.ids) == len(self.features):
                self.strands.tie(t.ownership.ids, self.features)  # output k is the reconstruction of input k
        return value

    def _refuse_tied_parameters(self) -> None:
        seen: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owner = name.rpartition(".")[0]
            first = seen.setdefault(id(parameter), owner)
            if self.modules[first] is not self.modules[owner]:
                raise UnsupportedOperation(
                    f"'{owner}' and '{first}' share parameter '{name}'; layers that share parameters cannot be "
                    "narrowed one by one: give each its own, or call the same module twice."
                )

    # ---- combining tensors ----------------------------------------------------------------------------------------

    def join(self, name: str, tensors: list[TensorPair], out_dims: int) -> tuple[Ownership, tuple]:
        """The ownership of an elementwise combination with broadcasting."""
        scale = next((t.scale for t in tensors if t.scale), ())
        if len(tensors) == 1:  # one operand keeps its ownership, and a parameter is still undecided
            ownership = tensors[0].ownership
            if ownership is PARTIAL and name not in LINEAR:
                self.note(f"'{name}' acts on the sum of the members' outputs; the composed network has {name}(Σ)")
            return ownership, scale
        tensors = self.settle(tensors)
        splits = [t for t in tensors if isinstance(t.ownership, Divided)]
        if not splits:
            if any(t.ownership is PARTIAL for t in tensors):
                if any(t.ownership is not PARTIAL for t in tensors) or name not in ("add", "sub"):
                    self.note(f"'{name}' acts on partial sums; the composed network applies it to Σ")
                return PARTIAL, scale
            return SHARED, scale
        if any(t.ownership is PARTIAL for t in tensors):
            self.refuse("it combines divided channels with a head's output")
        first = splits[0]
        axes = tuple(a - first.full.dim() + out_dims for a in first.ownership.axes)
        for t in tensors:
            if isinstance(t.ownership, Divided):
                moved = tuple(a - t.full.dim() + out_dims for a in t.ownership.axes)
                if moved != axes or t.ownership.ids.shape != first.ownership.ids.shape:
                    self.refuse("it combines channels on different axes")
                self.strands.tie(first.ownership.ids, t.ownership.ids)
            else:
                shape = (1,) * (out_dims - t.full.dim()) + tuple(t.full.shape)
                if any(shape[a] != 1 for a in axes):
                    self.refuse("it combines divided channels with channels that every member holds whole")
        return Divided(first.ownership.ids, axes, first.ownership.flat), scale

    def elementwise(self, name: str, args: Any, kwargs: Any) -> Any:
        tensors = tensors_in((args, kwargs))
        if len(tensors) > 1:
            settled = iter(self.settle(tensors))
            args, kwargs = map_aggregate((args, kwargs), lambda v: next(settled) if isinstance(v, TensorPair) else v)
            tensors = tensors_in((args, kwargs))
        if len(tensors) == 1 and tensors[0].ownership is PARTIAL:
            scaled = name == "mul" or (name == "div" and args[0] is tensors[0])
            zero = name in ("add", "sub") and args[0] == 0  # sum([a, b]) begins with 0 + a
            name = "contiguous" if scaled or zero else name + " a number" if name in ("add", "sub") else name
        numbers: list[Both] = []
        map_aggregate((args, kwargs), lambda v: numbers.append(v) if isinstance(v, Both) else None)
        if numbers and any(t.ownership is not SHARED for t in tensors):
            self.note(f"'{name}' uses a size that differs in a member: composed(x) may not be the sum")
        full, part = self.run_both(args, kwargs)
        dims = full.dim() if isinstance(full, torch.Tensor) else tensors[0].full.dim()
        ownership, scale = self.join(name, tensors, dims)
        moved = next((t.moved for t in tensors if t.moved and t.full.shape == getattr(full, "shape", None)), None)
        return self.wrap(full, part, ownership, scale, moved)

    # ---- layers ---------------------------------------------------------------------------------------------------

    def _call_module(self, target: str, args: tuple, kwargs: dict) -> Any:
        module = self.modules[target]
        for kinds, rule in MODULE_RULES:
            if isinstance(module, kinds):
                return rule(self, target, module, args, kwargs)
        if type(module).__name__ in ELEMENTWISE_MODULES:
            return self.elementwise(type(module).__name__, args, kwargs)
        return self.refuse(f"{type(module).__name__} mixes channels or has no rule")

    def functional_layer(self, name: str, args: tuple, kwargs: dict) -> Any:
        """F.conv2d(x, self.weight, …): the layer's module is made up, its tensors keep their names."""
        order = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
        if name.startswith("conv_transpose"):
            order = [*order[:5], "output_padding", "groups", "dilation"]
        node, given = self.node, dict(zip(order, args, strict=False)) | kwargs
        nodes = dict(zip(order, node.args, strict=False)) | node.kwargs
        names = [nodes.get("weight"), nodes.get("bias")]
        if any(n is not None and (not isinstance(n, fx.Node) or n.op != "get_attr") for n in names):
            self.refuse("its weight is computed, not a parameter as it stands", "make it a module of its own")
        weight = self.tensor(names[0].target)
        key = names[0].target
        options = {k: v for k, v in given.items() if k not in ("input", "weight", "bias")}
        groups = options.get("groups", 1)
        options["dtype"] = weight.dtype
        with torch.device("meta"):
            if name == "linear":
                module: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], names[1] is not None, **options)
            else:
                kind = getattr(nn, {"conv": "Conv", "conv_transpose": "ConvTranspose"}[name[:-2]] + name[-2:])
                sides = [weight.shape[0], weight.shape[1] * groups][:: 1 if "transpose" in name else -1]
                module = kind(*sides, tuple(weight.shape[2:]), bias=names[1] is not None, **options)
        self.modules[key] = module
        self.tensor_names[key] = (key, names[1].target if names[1] is not None else None)
        result = self.layer(key, module, (given["input"],), {})
        if groups > 1:
            own = self.leaves[key].member_groups
            if "groups" in node.kwargs:
                self.rewrite(node.args, {**node.kwargs, "groups": own})
            else:
                self.rewrite(tuple(own if i == 6 else a for i, a in enumerate(node.args)), node.kwargs)
        return result

    def layer(self, target: str, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Convolution or linear: the first layer keeps its inputs, a head its outputs, all others 1/K of both (2.7)."""
        x = args[0]
        conv = isinstance(module, nn.modules.conv._ConvNd)
        into, out = SIDES[conv]
        groups, axis = (module.groups, 1) if conv else (1, x.full.dim() - 1)
        i, o = _sides(module)
        attributes = {into: i, out: o} | ({"groups": groups} if conv else {})
        self._known_tensors(module, {"weight", "bias"})
        if type(module).forward not in _PLAIN_FORWARDS:
            self.note(f"{type(module).__name__} computes with its whole weight, so composed(x) may not be the sum")
        leaf = Leaf("conv" if conv else "linear", groups=groups)
        head = target in self.heads
        if x.ownership is PARTIAL:
            self.refuse("it reads the output of a last layer", 'where no layer is a last one, use head="concat"')
        if x.ownership is SHARED:
            if head:
                self.refuse("it is the first and the last layer at once, and no channels lie between")
            if groups > 1:
                self.refuse("a grouped convolution reads the image, whose channels are never divided")
            if not conv:
                self.refuse(
                    "a linear layer reads an image",
                    "flatten the images yourself and decompose for vectors, input_size=(features,)",
                )
        else:
            ownership = self._activation(x)
            if ownership.axes != (axis,) or (conv and ownership.flat):
                self.refuse("it does not read the divided axis as its channels")
            leaf.inputs, leaf.flat = ownership.ids, ownership.flat
            attributes[into] = x.part.shape[axis]
            if conv and covers(windows(module, x.full.dim() - 2), x):  # a fully connected layer in disguise
                full, part = tuple(x.full.shape[2:]), tuple(x.part.shape[2:])
                leaf.flat = MapExtent(tuple(range(len(full))), full, part, x.scale)
                attributes["kernel_size"] = leaf.flat.part
        if head and groups > 1:
            self.refuse("the last layer is a grouped convolution, whose members' outputs cannot add up")
        if not head:
            if o % self.K:
                raise PartitionError(
                    f"{where(self.node)}: {o} channels cannot be divided into {self.K} equal parts; "
                    f"choose a number of partitions that divides {o}{self._dividing()}."
                )
            attributes[out] = o // self.K
        if groups > 1:
            # lcm(G, K) / K groups a member: each lies inside one global group. G and K divide both widths, so lcm does.
            leaf.member_groups = attributes["groups"] = math.lcm(groups, self.K) // self.K
        return self._finish_layer(target, module, leaf, attributes, x, axis, (*args[1:], *kwargs.values()))

    def _dividing(self) -> str:
        """The numbers that divide the widths of all layers but the last."""
        targets = {
            n.target for g in self.division.graphs.values() for n in g.nodes if n.op == "call_module"
        } - self.heads
        layers = [self.modules[target] for target in targets]
        widths = [_sides(layer)[1] for layer in layers if isinstance(layer, LAYERS)]
        common = math.gcd(*widths, *(layer.hidden_size for layer in layers if isinstance(layer, nn.RNNBase)))
        numbers = [str(n) for n in range(2, common + 1) if common % n == 0]
        return f" (all widths: {', '.join(numbers)})" if numbers else " (no number divides all widths)"

    def _finish_layer(
        self, target: str, module: nn.Module, leaf: Leaf, attributes: dict, x: TensorPair, axis: int, extra: tuple
    ) -> Any:
        head = target in self.heads
        _, outputs = _sides(module)
        leaf.attributes = attributes
        known = self.leaves.get(target)
        if known is None:
            if not head:
                same = leaf.groups > 1 and len(leaf.inputs) == outputs
                leaf.outputs = leaf.inputs if same else self.strands.new(outputs)
                if leaf.groups > 1:
                    self.checks.append((self.node, partial(self._groups_whole, leaf)))
            self.leaves[target] = known = leaf
        else:  # the same layer called again: both calls must see the same division
            if known.attributes != attributes or (known.inputs is None) != (leaf.inputs is None):
                self.refuse("the layer is called twice on inputs that are divided differently")
            if leaf.inputs is not None:
                self.strands.tie(known.inputs, leaf.inputs)
        owner = target if target not in self.tensor_names else target.rpartition(".")[0]
        if isinstance(self.modules[owner], LAYERS):  # a functional may take the weight of a layer's module
            self.division.attributes[owner] = attributes
        full = on_meta(module)(x.full, *globally(extra))
        try:
            part = narrow(module, attributes, _member_shapes(module, leaf, attributes))(x.part, *in_member(extra))
        except MISFITS as error:
            raise self._does_not_fit(x, error) from error
        ownership = PARTIAL if head else Divided(known.outputs, (axis,))
        scale = x.scale
        if leaf.kind == "conv":
            scale = self.scaled(x, windows(module, x.full.dim() - 2) if leaf.flat is None else None, full, part)
        if head and self.assembles:
            self.division.assemblies[self.mode][self.node.name] = self._boxes(full, part, scale)
            ownership = SHARED  # as the image is: each member holds all channels of its own crop
        return self.wrap(full, part, ownership, scale)

    def _boxes(self, full: torch.Tensor, part: torch.Tensor, scale: tuple) -> tuple:
        """Where in a last layer's output each member's lies: (start, stop) for each axis, by member."""
        boxes = []
        whole, own = tuple(full.shape[2:]), tuple(part.shape[2:])
        for crop in self.crops:
            starts = [s and Fraction(start) / s for start, s in zip(crop.start, scale, strict=False)]
            sizes = [s and Fraction(size) / s for size, s in zip(crop.size, scale, strict=False)]
            wholes = [s and Fraction(size) / s for size, s in zip(self.extent, scale, strict=False)]
            known = len(whole) == len(starts) and None not in starts and all(s.denominator == 1 for s in starts)
            if not known or tuple(sizes) != own or tuple(wholes) != whole:
                raise PartitionError(
                    f"{where(self.node)}: its output of {by(whole)} for {by(self.extent)} pixels, and {by(own)} for a "
                    f"crop of {by(crop.size)}, cannot be put together from the members'; give the layers padding that "
                    "keeps these sizes in proportion."
                )
            boxes.append(tuple((int(s), int(s) + size) for s, size in zip(starts, own, strict=True)))
        return tuple(boxes)

    def recurrent(self, target: str, module: nn.RNNBase, args: tuple, kwargs: dict) -> Any:
        """nn.RNN, nn.GRU and nn.LSTM (2.27): U, W and every gate share one division of the hidden state."""
        x, H = args[0], module.hidden_size
        if module.proj_size:
            self.refuse("its hidden state is projected", "leave proj_size out")
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            self.refuse("it is given its first states", "leave them out: they begin at zero")
        if not isinstance(x, TensorPair) or x.full.dim() != 3:
            self.refuse("it does not read a padded batch of sequences")
        ownership = self._activation(x)
        if ownership.axes != (2,) or ownership.flat:
            self.refuse("it does not read the divided axis as its features")
        if H % self.K:
            raise PartitionError(
                f"{where(self.node)}: a hidden state of {H} cannot be divided into {self.K} equal parts; "
                f"choose a number of partitions that divides {H}{self._dividing()}."
            )
        directions = 1 + module.bidirectional
        attributes = {"input_size": x.part.shape[2], "hidden_size": H // self.K}
        leaf = self.leaves.get(target)
        if leaf is None:
            hidden = [[self.strands.new(H) for _ in range(directions)] for _ in range(module.num_layers)]
            leaf = self.leaves[target] = Leaf("recurrent", attributes, ownership.ids, hidden=hidden)
            self.division.attributes[target] = attributes
        self.strands.tie(leaf.inputs, ownership.ids)
        shapes = {}
        for name, tensor in module.named_parameters():
            rows, *columns = tensor.shape
            into = attributes["input_size"] if name in ("weight_ih_l0", "weight_ih_l0_reverse") else None
            shapes[name] = (rows // self.K, *(into or c // self.K for c in columns))
        full = shape_of(on_meta(module), x.full)
        part = shape_of(narrow(module, attributes, shapes), x.part)
        outputs = Divided(np.concatenate(leaf.hidden[-1]), (2,))
        states = Divided(np.stack([ids for layer in leaf.hidden for ids in layer]), (0, 2))
        return self.wrap(full[0], part[0], outputs), self.wrap(full[1], part[1], states)

    def _groups_whole(self, leaf: Leaf, owner: np.ndarray) -> bool:
        """Every group of every member lies inside one global group, on both sides."""
        for k in range(self.K):
            sides = []
            for ids in (leaf.inputs, leaf.outputs):
                group = np.nonzero(owner[ids] == k)[0] // (len(ids) // leaf.groups)
                group = group.reshape(leaf.member_groups, -1)
                if (group != group[:, :1]).any():
                    return False
                sides.append(group[:, 0])
            if (sides[0] != sides[1]).any():
                return False
        return True

    @staticmethod
    def scaled(x: TensorPair, found: tuple | None, full: torch.Tensor, part: torch.Tensor) -> tuple:
        """Input pixels per position behind a spatial operation; None where windows do not tell."""
        scale = x.scale or (None,) * (x.full.dim() - 2)
        if found is not None:
            steps = [Fraction(1, w.stride) if w.transposed else Fraction(w.stride) for w in found]
        else:
            globals_ = [Fraction(a, b) for a, b in zip(x.full.shape[2:], full.shape[2:], strict=True)]
            members = [Fraction(a, b) for a, b in zip(x.part.shape[2:], part.shape[2:], strict=True)]
            steps = [g if g == m else None for g, m in zip(globals_, members, strict=True)]
        return tuple(None if s is None or t is None else s * t for s, t in zip(scale, steps, strict=True))

    def _activation(self, x: TensorPair) -> Divided:
        if not isinstance(x.ownership, Divided) or x.ownership.bare is not None:
            self.refuse("it acts on the image itself or on a head's output, where its parameters have no one owner")
        return x.ownership

    def _known_tensors(self, module: nn.Module, known: set[str]) -> None:
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name not in known and (tensor.numel() > 1 or isinstance(tensor, nn.Parameter)):
                self.refuse(f"{type(module).__name__} holds '{name}', whose axes are not known")

    def norm(self, target: str, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """One parameter per channel: normalisations and PReLU keep the channels of their input."""
        x = args[0]
        ownership = self._activation(x)
        if len(ownership.axes) != 1 or ownership.flat:
            self.refuse("its channels are not one axis")
        whole, own = x.full.shape[ownership.axes[0]], x.part.shape[ownership.axes[0]]
        self._known_tensors(module, {"weight", "bias", "running_mean", "running_var"})
        leaf = Leaf("norm", inputs=ownership.ids, outputs=ownership.ids)
        if isinstance(module, nn.GroupNorm):
            if module.num_groups % self.K:
                raise PartitionError(
                    f"{where(self.node)}: {module.num_groups} groups do not divide among {self.K} members, whose "
                    "statistics would mix; choose a number of groups that is a multiple of the partitions."
                )
            leaf.groups, leaf.member_groups = module.num_groups, module.num_groups // self.K
            attributes: dict[str, Any] = {"num_channels": own, "num_groups": leaf.member_groups}
            self.checks.append((self.node, partial(self._groups_whole, leaf)))
        elif isinstance(module, nn.LayerNorm):
            if tuple(module.normalized_shape) != (whole,):
                self.refuse(f"its parameters of shape {tuple(module.normalized_shape)} are not one per channel")
            attributes = {"normalized_shape": (own,)}
            self.note("normalises over all channels, a member over its own: composed(x) is not exactly the sum")
        elif isinstance(module, nn.PReLU):
            if module.num_parameters != whole:
                self.refuse("one slope serves all channels, and composition has one place for K", "use PReLU(channels)")
            attributes = {"num_parameters": own}
        else:
            attributes = {"num_features": own}
        leaf.attributes = self.division.attributes[target] = attributes
        known = self.leaves.setdefault(target, leaf)
        if known is not leaf:
            self.strands.tie(known.inputs, leaf.inputs)
        shapes = {name: (own,) for name, _ in _vectors(module)}
        full = shape_of(on_meta(module), x.full)
        part = shape_of(narrow(module, attributes, shapes), x.part)
        return self.wrap(full, part, ownership, x.scale, x.moved)

    def pool(self, target: str, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        x = args[0]
        found = windows(module, x.full.dim() - 2)
        if covers(found, x):  # a last pooling over the whole map follows the member's smaller map
            extent = tuple(x.part.shape[2:])
            self.division.attributes[target] = {"kernel_size": extent, "stride": extent}
            self.adapted(target)
        return self.spatial(type(module).__name__, args, kwargs, found)

    def spatial(self, name: str, args: tuple, kwargs: dict, found: tuple | None, member: tuple | None = None) -> Any:
        x = args[0]
        if isinstance(x.ownership, Divided) and x.ownership.axes != (1,):
            self.refuse("it pools or resizes an axis that holds channels")
        full, part = self.run_both(args, kwargs, member)
        first = full[0] if isinstance(full, tuple) else full
        own = part[0] if isinstance(part, tuple) else part
        ownership, _ = self.join(name, [x], first.dim())
        return self.wrap(full, part, ownership, self.scaled(x, found, first, own))

    # ---- the division ---------------------------------------------------------------------------------------------

    def _finish(self, values: dict[bool, dict[fx.Node, Any]]) -> None:
        owner = self.strands.owners(self.K)
        for node, holds in self.checks:
            if not holds(owner):
                raise UnsupportedOperation(
                    f"{where(node)}: the parts of its channels that {self.K} members own cut through its groups; "
                    "choose another number of partitions, or pack copies of the network with decompk.pack."
                )
        own = partial(_owned, owner, self.K)
        for target, leaf in self.leaves.items():
            self._place_leaf(target, leaf, own)
        for name, (axis, ids) in self.bare.items():
            dims = range(self.tensor(name).dim())
            places = [np.ix_(*(index if a == axis else np.zeros(1, np.int64) for a in dims)) for index in own(ids)]
            self.division.places[name] = tuple(places)
        for mode, env in values.items():
            self.division.channels[mode], self.division.features[mode] = {}, {}
            for node, value in env.items():
                if (
                    not isinstance(value, TensorPair)
                    or not isinstance(value.ownership, Divided)
                    or len(value.ownership.axes) != 1
                ):
                    continue
                ownership, (axis,) = value.ownership, value.ownership.axes
                found = None if ownership.flat else np.stack(own(ownership.ids))
                if axis == 1:
                    self.division.channels[mode][node.name] = found
                if axis == value.full.dim() - 1 and found is not None:
                    self.division.features[mode][node.name] = found
            self.division.reorders[mode] = {}
        for mode, node, source, cut, out_ids in self.shuffles:
            order = self._order(owner, source, cut, out_ids)
            if (order != np.arange(len(order))).any():
                self.division.reorders[mode][node.name] = order

    def _order(self, owner: np.ndarray, ids: np.ndarray, cut: int, out_ids: np.ndarray) -> np.ndarray:
        """The composed network's channel order behind a shuffle that every member does on its own channels."""
        position = np.arange(ids.size).reshape(ids.shape)
        rows = np.moveaxis(ids, cut, -1)
        positions = np.moveaxis(position, cut, -1)
        order = np.empty(ids.size, dtype=np.int64)
        for k, out in enumerate(_owned(owner, self.K, out_ids)):
            mine = positions[owner[rows] == k].reshape(*rows.shape[:-1], -1)
            order[out] = np.moveaxis(mine, -1, cut).reshape(-1)
        return order

    def _place_leaf(self, target: str, leaf: Leaf, own: Callable[[np.ndarray], list[np.ndarray]]) -> None:
        module, places = self.modules[target], self.division.places
        if leaf.kind == "norm":
            for name, _ in _vectors(module):
                places[f"{target}.{name}"] = tuple((index,) for index in own(leaf.inputs))
            return
        if leaf.kind == "recurrent":
            places.update(_recurrent_places(target, module, leaf, own))
            return
        weight, bias = self.tensor_names.get(target, (f"{target}.weight", f"{target}.bias"))
        conv = leaf.kind == "conv"
        inputs, outputs = _sides(module)
        columns = [np.arange(inputs)] * self.K if leaf.inputs is None else own(leaf.inputs)
        spots = [self._spots(leaf.flat, crop) for crop in self.crops]
        if leaf.flat is not None and leaf.flat.full != leaf.flat.part:
            self.adapted(target)
        if leaf.flat is not None and not conv:
            extent = math.prod(leaf.flat.full)
            flat = [np.ravel_multi_index(np.ix_(*s), leaf.flat.full).reshape(-1) for s in spots]
            if leaf.flat.order is not None:
                whole, own_order = leaf.flat.order
                flat = [np.argsort(whole)[f[own_order]] for f in flat]
            columns = [(c[:, None] * extent + f).reshape(-1) for c, f in zip(columns, flat, strict=True)]
        rows = [np.arange(outputs)] * self.K if leaf.outputs is None else own(leaf.outputs)
        if conv and module.transposed:
            blocks = [_block(c, r, outputs, leaf) for r, c in zip(rows, columns, strict=True)]
        else:
            blocks = [_block(r, c, inputs, leaf) for r, c in zip(rows, columns, strict=True)]
        if conv and leaf.flat is not None:
            blocks = [_with_space(block, spot) for block, spot in zip(blocks, spots, strict=True)]
        places[weight] = tuple(blocks)
        if leaf.outputs is None:
            self.division.head_weights.add(weight)
        if module.bias is not None:
            if leaf.outputs is None:
                self.division.summed.add(bias)
            else:
                places[bias] = tuple((r,) for r in rows)

    def _spots(self, flat: MapExtent | None, crop: Crop) -> list[np.ndarray]:
        """(2.13): per spatial axis, the global positions that the crop's activations occupy."""
        spots = []
        if flat is None:
            return spots
        if self.turned is not None and flat.full != flat.part:
            raise UnsupportedOperation(
                f"{where(self.turned)}: it swaps axes of the image, whose crops cannot be followed to the first fully "
                "connected layer; give the network images that are turned already."
            )
        for axis, full, part, scale in zip(flat.axes, flat.full, flat.part, flat.scale, strict=True):
            pixels = scale if scale is not None else Fraction(self.input_size[1 + axis], full)
            start = min(math.ceil(Fraction(crop.start[axis]) / pixels), full - part) if full != part else 0
            spots.append(start + np.arange(part))
        return spots


def _recurrent_places(
    target: str, module: nn.RNNBase, leaf: Leaf, own: Callable[[np.ndarray], list[np.ndarray]]
) -> dict[str, tuple[Place, ...]]:
    """Where each member's part of U (weight_ih), W (weight_hh) and their biases lies, gate after gate."""
    places: dict[str, tuple[Place, ...]] = {}
    first = module.hidden_size * np.arange(GATES[module.mode])[:, None]  # row of each gate
    for depth, layer in enumerate(leaf.hidden):
        inputs = own(np.concatenate(leaf.hidden[depth - 1]) if depth else leaf.inputs)
        for ids, direction in zip(layer, ("", "_reverse"), strict=False):
            hidden = own(ids)
            rows = [(first + index).reshape(-1) for index in hidden]
            end = f"l{depth}{direction}"
            for name, columns in (("weight_ih", inputs), ("weight_hh", hidden)):
                blocks = zip(rows, columns, strict=True)
                places[f"{target}.{name}_{end}"] = tuple((r[:, None], c[None, :]) for r, c in blocks)
            for name in ("bias_ih", "bias_hh") if module.bias else ():
                places[f"{target}.{name}_{end}"] = tuple((r,) for r in rows)
    return places


def _block(rows: np.ndarray, columns: np.ndarray, column_count: int, leaf: Leaf) -> tuple[np.ndarray, np.ndarray]:
    """Where a member's (rows, columns) block lies in the global weight; a grouped weight has one group's columns."""
    if leaf.groups == 1:
        return rows[:, None], columns[None, :]
    per_group = columns.reshape(leaf.member_groups, -1) % (column_count // leaf.groups)
    return rows[:, None], np.repeat(per_group, len(rows) // leaf.member_groups, axis=0)


def _with_space(block: tuple[np.ndarray, ...], spots: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """A (rows, columns) block of a convolution restricted to some of its kernel positions."""
    return (*(i.reshape(*i.shape, *[1] * len(spots)) for i in block), *(s[None, None] for s in np.ix_(*spots)))


def _vectors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a normalisation that hold one number per channel."""
    return [(n, t) for n, t in [*module.named_parameters(), *module.named_buffers()] if t.dim() == 1 and "." not in n]


def _owned(owner: np.ndarray, members: int, ids: np.ndarray) -> list[np.ndarray]:
    return [np.nonzero(owner[ids] == k)[0] for k in range(members)]


def _sides(module: nn.Module) -> tuple[int, int]:
    """Input and output channels, or features."""
    into, out = SIDES[isinstance(module, nn.modules.conv._ConvNd)]
    return getattr(module, into), getattr(module, out)


def _member_shapes(module: nn.Module, leaf: Leaf, attributes: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of a member's weight and bias."""
    into, out = (attributes[side] for side in SIDES[leaf.kind == "conv"])
    shape: tuple[int, ...] = (out, into)
    if leaf.kind == "conv":
        rows, columns = (into, out) if module.transposed else (out, into)
        shape = (rows, columns // attributes["groups"], *attributes.get("kernel_size", module.kernel_size))
    return {"weight": shape, "bias": (out,)}


def narrow(module: nn.Module, attributes: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """A copy of a leaf on the meta device with new attributes and tensors of new shapes."""
    copy = on_meta(module)
    for name, value in attributes.items():
        setattr(copy, name, value)
    for store in (copy._parameters, copy._buffers):
        for name, tensor in store.items():
            if tensor is not None and name in shapes:
                empty = tensor.new_empty(shapes[name])
                store[name] = nn.Parameter(empty, tensor.requires_grad) if store is copy._parameters else empty
    return copy


def _call_method(name: str, owner: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(owner, name)(*args, **kwargs)


def _shrunk(full: torch.Tensor, axis: int, members: int) -> torch.Tensor:
    shape = list(full.shape)
    shape[axis] //= members
    return full.new_empty(shape)
