"""Which member owns which channels of the global network: one walk over its torch.fx graph.

Every node is run twice on meta tensors: on the global shapes and on one member's. Next to the two results stands whose
channels they hold: the tensor is shared by all members (the image), divided among them along channel axes, or a
partial sum (a head's output, which composition adds up). Rules say what an operation or a layer does to that
(`rules`); what has no rule is refused by name. The result is a `Division`: for every tensor of the state dict, where
each member's part of it lies in the global one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import map_aggregate, map_arg

from ..crops import Crop, Part, by, owners
from ..errors import MISFITS, DecompkError, MisfitError, PartitionError, UnsupportedOperation, brief
from ..fx.graph import MetaInterpreter, dtype_of, trace, where
from ..fx.hooks import refuse_hooks
from .divided_layer import DividedLayer, WeightedLayer, narrow
from .division import Division
from .ends import heads, reads_features
from .operations import (
    ELEMENTWISE_FUNCTIONS,
    ELEMENTWISE_MODULES,
    FUNCTIONAL_LAYERS,
    SHAPE_QUERIES,
    operation_name,
)
from .rules.elementwise import elementwise
from .rules.registry import RULES, layer_rule
from .strands import Strands
from .values import PARTIAL, SHARED, Both, Divided, MapExtent, Ownership, TensorPair, globally, in_member, tensors_in


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
    return Walk(model, input_size, crops, head).run(graphs)


class Walk:
    """A ChannelPass over the graphs of `model`, in training and not: `run` gives its Division.

    values: by training or not, what every node gave. bare: name of a parameter or buffer with one value a channel that
    functions use → its axis and strands. shuffles: (training, node, strands, the axis along which a member's are cut,
    strands behind it). pinned: see `pin`. vectors: whether the network reads features, as of vectors and sequences;
    features: their strands, whose owners the crops say.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, ...], crops: Sequence[Part], head: str):
        self._model, self._input_size, self._crops, self._head = model, input_size, crops, head
        self.K = len(crops)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.strands = Strands()
        self.layers: dict[str, DividedLayer] = {}
        self.division = Division(self.K)
        self.values: dict[bool, dict[fx.Node, Any]] = {}
        self.features = np.zeros(0, dtype=np.int64)
        self.bare: dict[str, tuple[int, np.ndarray]] = {}
        self.shuffles: list[tuple[bool, fx.Node, np.ndarray, int, np.ndarray]] = []
        self.pinned: list[np.ndarray] = []
        self._expected: list[tuple[fx.Node, Callable[[np.ndarray], bool]]] = []
        self._turned: fx.Node | None = None  # what swaps axes of the image itself
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._bare_rewrites: dict[str, list[str]] = {}  # nodes rewritten for a parameter that may yet prove shared

    def run(self, graphs: dict[bool, fx.Graph] | None = None) -> Division:
        refuse_hooks(self._model)
        self._refuse_tied_parameters()
        graphs = graphs or {mode: trace(self._model, mode) for mode in (True, False)}
        self.division.graphs = graphs
        self._extent = self._input_size[-len(self._crops[0].size) :]
        self.vectors = len(self._extent) == 1 and (
            len(self._input_size) == 1 or any(reads_features(self.modules, g) for g in graphs.values())
        )
        self._assembles = self._head == "concat" and not self.vectors and self._returns_maps(graphs[False])
        divides_outputs = self._head == "concat" and not self._assembles
        self.heads = set() if divides_outputs else set().union(*(heads(self._model, g) for g in graphs.values()))
        if self.vectors:
            owner = owners(self._crops, self._extent, "every feature of an input vector needs one member")
            self.features = self.strands.new(owner.size)
            self.strands.give(self.features, owner)
        elif self._assembles:
            owners(self._crops, self._extent, "every part of an auto-encoder's output is one member's")
        elif not all(isinstance(crop, Crop) for crop in self._crops):
            raise PartitionError(
                f"{type(self._model).__name__} reads neighbours, not single features: give crops, not index sets."
            )
        for self._mode, graph in graphs.items():
            self.division.member_args[self._mode] = {}
            self.division.assemblies[self._mode] = {}
            self._env: dict[fx.Node, Any] = {}
            for node in graph.nodes:
                self.node = node
                try:
                    self._env[node] = self._visit(node)
                except DecompkError:
                    raise
                except Exception as error:  # an operation used in a way that its rule does not foresee
                    self.refuse(f"it cannot be followed ({type(error).__name__}: {brief(error)})")
                if "holds" in node.meta:
                    self._check(node.meta["holds"])
            self.values[self._mode] = self._env
        self._finish()
        return self.division

    # ---- one node ---------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            full = torch.empty((2, *self._input_size), device="meta", dtype=dtype_of(self._model))
            part = full.new_empty((2, *self._input_size[: -len(self._extent)], *self._crops[0].size))
            if self.vectors:
                return self.wrap(full, part, Divided(self.features, (full.dim() - 1,)))
            return TensorPair(full, part, SHARED, (Fraction(1),) * len(self._extent))
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._env[n])
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
            return self.without_channels(args, kwargs)
        rule = RULES.get(name)
        if rule is None:
            self.refuse(f"'{name}' has no rule")
        if name not in (ELEMENTWISE_FUNCTIONS | FUNCTIONAL_LAYERS | SHAPE_QUERIES):
            for t in tensors_in((args, kwargs)):
                if isinstance(t.ownership, Divided) and not t.ownership.axes:
                    self.refuse(
                        f"it rearranges parameter '{t.ownership.bare}', which does not have one value per channel"
                    )
        return rule(self, name, args, kwargs)

    def _call_module(self, target: str, args: tuple, kwargs: dict) -> Any:
        module = self.modules[target]
        if rule := layer_rule(module):
            return rule(self, target, args, kwargs)
        if type(module).__name__ in ELEMENTWISE_MODULES:
            return elementwise(self, type(module).__name__, args, kwargs)
        return self.refuse(f"{type(module).__name__} mixes channels or has no rule")

    def _check(self, holds: bool) -> None:
        """What the network's own code checks here must hold of whole samples and of a member's part."""
        value = self._env[self.node]
        if bool(globally(value)) != holds:
            raise PartitionError(f"{where(self.node)}: the network itself refuses samples of {by(self._input_size)}.")
        if bool(in_member(value)) != holds:
            raise MisfitError(
                f"{where(self.node)}: the network's own check refuses a member, whose channels and maps are smaller; "
                "let it check no size that the division changes, or pack copies of the network with decompk.pack."
            )

    def _returns_maps(self, graph: fx.Graph) -> bool:
        """Whether what the network returns has the input's spatial axes."""
        values = MetaInterpreter(self._model, graph, self._input_size).run_all()
        output = next(value for node, value in values.items() if node.op == "output")
        found: list[torch.Tensor] = []
        map_aggregate(output, lambda value: found.append(value) if isinstance(value, torch.Tensor) else None)
        return any(t.dim() == 1 + len(self._input_size) for t in found)

    # ---- what a rule may ask ----------------------------------------------------------------------------------------

    def run_global(self, args: tuple, kwargs: dict) -> Any:
        with torch.no_grad():
            return self._operation()(*globally(args), **globally(kwargs))

    def run_member(self, args: tuple, kwargs: dict, member: tuple | None = None) -> Any:
        operation = self._operation(self.division.attributes.get(self.node.target, {}))
        args_, kwargs_ = member or (in_member(args), in_member(kwargs))
        try:
            with torch.no_grad():
                return operation(*args_, **kwargs_)
        except MISFITS as error:
            raise self.misfit(next(iter(tensors_in((args, kwargs)))), error) from error

    def run_both(self, args: tuple, kwargs: dict, member: tuple | None = None) -> tuple[Any, Any]:
        return self.run_global(args, kwargs), self.run_member(args, kwargs, member)

    def _operation(self, attributes: dict[str, Any] | None = None) -> Callable:
        node = self.node
        if node.op == "call_module":
            return narrow(self.modules[node.target], attributes or {}, {})
        return partial(_call_method, node.target) if node.op == "call_method" else node.target

    def rewrite(self, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        self.division.member_args[self._mode][self.node.name] = (args, kwargs)
        for source in self.node.all_input_nodes:
            ownership = getattr(self._env[source], "ownership", None)
            if isinstance(ownership, Divided) and ownership.bare is not None:
                self._bare_rewrites.setdefault(ownership.bare, []).append(self.node.name)
        return in_member(map_arg((args, kwargs), lambda n: self._env[n]))

    def wrap(
        self, full: Any, part: Any, ownership: Ownership, scale: tuple = (), moved: MapExtent | None = None
    ) -> Any:
        if isinstance(full, torch.Tensor):
            pair = TensorPair(full, part, ownership, scale, moved)
            if isinstance(ownership, Divided) and ownership.bare is None:
                self._demand_even(pair)
            return pair
        if isinstance(full, (tuple, list)) and not isinstance(full, torch.Size):
            return type(full)(self.wrap(f, p, ownership, scale) for f, p in zip(full, part, strict=True))
        return full if full == part else Both(full, part)

    def without_channels(self, args: tuple, kwargs: dict) -> Any:
        full, part = self.run_both(args, kwargs)
        if isinstance(full, torch.Tensor) and full.shape != part.shape:
            self.refuse("it makes a tensor whose shape differs between the global network and a member")
        return self.wrap(full, part, SHARED)

    def _demand_even(self, x: TensorPair) -> None:
        """Every member must own 1/K of what x holds along the axis that is cut."""
        ids, cut, K = x.ownership.ids, self.cut(x), self.K
        rows = np.moveaxis(ids, cut, -1).reshape(-1, ids.shape[cut])
        if cut == len(x.ownership.axes) - 1:
            for row in rows:
                self.strands.require(row, partial(where, self.node))
        else:
            self.expect(lambda owner: all(((owner[rows] == k).sum(1) * K == rows.shape[1]).all() for k in range(K)))

    def cut(self, x: TensorPair) -> int:
        divided, shorter = x.ownership, []
        for i, axis in enumerate(divided.axes):
            whole, own = x.full.shape[axis], x.part.shape[axis]
            if divided.flat is not None:
                whole, own = whole // math.prod(divided.flat.full), own // math.prod(divided.flat.part)
            if whole != own:
                shorter.append((i, whole, own))
        if self.K == 1:
            return len(divided.axes) - 1
        if len(shorter) != 1 or shorter[0][1] != shorter[0][2] * self.K:
            sizes = by([x.full.shape[a] for a in divided.axes])
            raise PartitionError(
                f"{where(self.node)}: {sizes} channels cannot be divided into {self.K} equal parts; "
                "choose a number of partitions that divides them."
            )
        return shorter[0][0]

    def expect(self, holds: Callable[[np.ndarray], bool]) -> None:
        self._expected.append((self.node, holds))

    def shuffle(self, ids: np.ndarray, cut: int) -> np.ndarray:
        new = self.strands.new(ids.size)
        self.shuffles.append((self._mode, self.node, ids, cut, new))
        return new

    def pin(self, ids: np.ndarray) -> None:
        self.pinned.append(ids)

    def turn_image(self) -> None:
        self._turned = self.node

    def last_output(self, full: torch.Tensor, part: torch.Tensor, scale: tuple) -> Ownership:
        if not self._assembles:
            return PARTIAL
        self.division.assemblies[self._mode][self.node.name] = self._boxes(full, part, scale)
        return SHARED  # as the image is: each member holds all channels of its own crop

    def settle(self, tensors: list[TensorPair]) -> list[TensorPair]:
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
            elif name not in self._parameters:
                for node in self._bare_rewrites.pop(name, []):
                    self.division.member_args[self._mode].pop(node, None)
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
        value: Any = self._model
        for part in name.split("."):
            value = getattr(value, part)
        return value

    def misfit(self, x: TensorPair, error: Exception) -> MisfitError:
        return MisfitError(
            f"{where(self.node)}: a member's {by(x.part.shape[1:])} does not fit here ({brief(error)}); "
            "choose other crops (a larger crop_size lets them overlap) or another number of partitions."
        )

    def refuse(
        self, what: str, remedy: str = "run it whole, or pack copies of the network with decompk.pack"
    ) -> NoReturn:
        raise UnsupportedOperation(f"{where(self.node)}: {what}, so its channels cannot be divided; {remedy}.")

    def adapt(self, path: str) -> None:
        if path not in self.division.adapted:
            self.division.adapted.append(path)

    def note(self, what: str) -> None:
        self.division.noted.add(self.node.name)
        note = f"{where(self.node)}: {what}"
        if note not in self.division.notes:
            self.division.notes.append(note)

    # ---- tensors and outputs of the network -------------------------------------------------------------------------

    def _get_attr(self, target: str) -> Any:
        value = self.tensor(target)
        if not isinstance(value, torch.Tensor):
            return value
        full = torch.empty_like(value, device="meta")
        long = [axis for axis, size in enumerate(value.shape) if size > 1]
        if len(long) != 1 or value.shape[long[0]] % self.K:
            undivided = Divided(np.zeros(0, dtype=np.int64), (), bare=target)
            return TensorPair(full, full, undivided if target in self._parameters else SHARED)
        _, ids = self.bare.get(target) or (long[0], self.strands.new(value.shape[long[0]]))
        return TensorPair(full, _shrunk(full, long[0], self.K), Divided(ids, (long[0],), bare=target))

    def _output(self, value: Any) -> Any:
        for t in tensors_in(value):
            if isinstance(t.ownership, Divided) and self._head != "concat":
                self.refuse(
                    "the network returns divided channels, not the output of a last layer",
                    'ask for decompose(..., head="concat")',
                )
            if t.ownership is SHARED and not self._assembles:
                self.note("the network returns what every member holds whole: the composed network returns it once")
            if isinstance(t.ownership, Divided) and (len(t.ownership.axes) != 1 or t.ownership.flat):
                self.refuse("the network's output mixes channels with other axes")
            if isinstance(t.ownership, Divided) and self.vectors and len(t.ownership.ids) == len(self.features):
                self.strands.tie(t.ownership.ids, self.features)  # output k is the reconstruction of input k
        return value

    def _boxes(self, full: torch.Tensor, part: torch.Tensor, scale: tuple) -> tuple:
        """Where in a last layer's output each member's lies: (start, stop) for each axis, by member."""
        boxes = []
        whole, own = tuple(full.shape[2:]), tuple(part.shape[2:])
        for crop in self._crops:
            starts = [s and Fraction(start) / s for start, s in zip(crop.start, scale, strict=False)]
            sizes = [s and Fraction(size) / s for size, s in zip(crop.size, scale, strict=False)]
            wholes = [s and Fraction(size) / s for size, s in zip(self._extent, scale, strict=False)]
            known = len(whole) == len(starts) and None not in starts and all(s.denominator == 1 for s in starts)
            if not known or tuple(sizes) != own or tuple(wholes) != whole:
                raise PartitionError(
                    f"{where(self.node)}: its output of {by(whole)} for {by(self._extent)} pixels, and {by(own)} for a "
                    f"crop of {by(crop.size)}, cannot be put together from the members'; give the layers padding that "
                    "keeps these sizes in proportion."
                )
            boxes.append(tuple((int(s), int(s) + size) for s, size in zip(starts, own, strict=True)))
        return tuple(boxes)

    def _refuse_tied_parameters(self) -> None:
        seen: dict[int, str] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            owner = name.rpartition(".")[0]
            first = seen.setdefault(id(parameter), owner)
            if self.modules[first] is not self.modules[owner]:
                raise UnsupportedOperation(
                    f"'{owner}' and '{first}' share parameter '{name}'; layers that share parameters cannot be "
                    "narrowed one by one: give each its own, or call the same module twice."
                )

    # ---- the division -----------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Give every strand its owner, and the division what follows from that."""
        owner = self.strands.owners(self.K)
        for node, holds in self._expected:
            if not holds(owner):
                raise UnsupportedOperation(
                    f"{where(node)}: the parts of its channels that {self.K} members own cut through its groups; "
                    "choose another number of partitions, or pack copies of the network with decompk.pack."
                )
        own = partial(_owned, owner, self.K)
        for layer in self.layers.values():
            self.division.places |= layer.places(self.K, own, self._positions)
            if isinstance(layer, WeightedLayer):
                self._finish_weighted(layer)
        for name, (axis, ids) in self.bare.items():
            dims = range(self.tensor(name).dim())
            places = [np.ix_(*(index if a == axis else np.zeros(1, np.int64) for a in dims)) for index in own(ids)]
            self.division.places[name] = tuple(places)
        for mode, env in self.values.items():
            self.division.channels[mode], self.division.features[mode] = {}, {}
            for node, value in env.items():
                divided = getattr(value, "ownership", None)
                if not isinstance(divided, Divided) or len(divided.axes) != 1:
                    continue
                (axis,) = divided.axes
                found = None if divided.flat else np.stack(own(divided.ids))
                if axis == 1:
                    self.division.channels[mode][node.name] = found
                if axis == value.full.dim() - 1 and found is not None:
                    self.division.features[mode][node.name] = found
            self.division.reorders[mode] = {}
        for mode, node, source, cut, out_ids in self.shuffles:
            order = self._order(owner, source, cut, out_ids)
            if (order != np.arange(len(order))).any():
                self.division.reorders[mode][node.name] = order

    def _finish_weighted(self, layer: WeightedLayer) -> None:
        """What composition must know of a last layer, and of one that follows its crop's smaller map."""
        if layer.flat is not None and layer.flat.full != layer.flat.part:
            self.adapt(layer.path)
        if layer.outputs is None:
            self.division.head_weights.add(layer.weight)
            if layer.bias is not None:
                self.division.summed.add(layer.bias)

    def _positions(self, flat: MapExtent) -> list[list[np.ndarray]]:
        """(2.13): for each member, per spatial axis, the global positions that its crop's activations occupy."""
        if self._turned is not None and flat.full != flat.part:
            raise UnsupportedOperation(
                f"{where(self._turned)}: it swaps axes of the image, whose crops cannot be followed to the first fully "
                "connected layer; give the network images that are turned already."
            )
        positions = []
        for crop in self._crops:
            spots = []
            for axis, full, part, scale in zip(flat.axes, flat.full, flat.part, flat.scale, strict=True):
                pixels = scale if scale is not None else Fraction(self._input_size[1 + axis], full)
                start = min(math.ceil(Fraction(crop.start[axis]) / pixels), full - part) if full != part else 0
                spots.append(start + np.arange(part))
            positions.append(spots)
        return positions

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


def _owned(owner: np.ndarray, members: int, ids: np.ndarray) -> list[np.ndarray]:
    """For each member, where among `ids` the strands stand that it owns."""
    return [np.nonzero(owner[ids] == k)[0] for k in range(members)]


def _call_method(name: str, owner: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(owner, name)(*args, **kwargs)


def _shrunk(full: torch.Tensor, axis: int, members: int) -> torch.Tensor:
    shape = list(full.shape)
    shape[axis] //= members
    return full.new_empty(shape)
