"""The size of one sample where nobody gives it: the declared one, the one that fits, or that of the first batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import map_aggregate, map_arg

from ..crops import Part, by
from ..errors import DecompkError, MisfitError, PartitionError, brief
from ..fx.graph import MetaInterpreter, on_meta, shape_of, trace, where
from .channels import divide_channels
from .division import Division
from .operations import operation_name

# By number of free axes, in the order in which they are tried: the sides of squares and cubes, the lengths of signals.
_COMMON = {
    1: (128, 1024, 32, 64, 256, 512, 100, 16, 200, 187, 250, 300, 400, 500, 600, 1000, 1500, 2000, 2048, 3000, 3600)
    + (4000, 4096, 5000, 8000, 8192, 10000, 16000, 16384),
    2: (224, 256, 32, 28, 64, 299, 384, 96, 112, 128, 160, 192, 227, 288, 448, 512),
    3: (32, 64, 16, 28, 112, 128, 20, 24, 48, 96),
}
_LIMITS = {1: 2**16, 2: 512, 3: 128}  # how far further sides are looked for where no common one fits
_SAMPLES = 2

Size = tuple[int, ...]
SampleShape = tuple[int | None, ...]  # None is an axis of any size


@dataclass(frozen=True)
class Found:
    """A size, its crops and the division at this size; `waits`: any size of this shape gives these members."""

    size: Size
    crops: tuple[Part, ...]
    division: Division
    source: str
    shape: SampleShape
    waits: bool = False


def find_size(model: nn.Module, cut: Callable[[Size], tuple[Part, ...]], head: str) -> Found:
    """What `decompose` assumes without input_size. cut: sizes of the axes to divide → crops.

    The model's own declaration comes first. Otherwise the one common size at which the network, and its members on
    their crops, can run; where several can and the members would be the same, the first batch decides. Raises
    PartitionError where nothing tells the size, and what `divide_channels` raises.
    """
    search = _Search(model, cut, head)
    first = search.shapes[0]
    for size, source in _declared(model, first):
        if not search.misfit(size):
            return search.found(size, source)
    refused = None
    for shape in search.shapes:
        try:
            if found := search.fitting(shape):
                return found
        except PartitionError as error:
            refused = refused or error
    if refused is None and len(search.failures) == 1:
        raise PartitionError(
            f"{search.name} itself runs on no {_kind(first)} that was tried: {search.failures.pop()}; "
            "mend that, or give input_size=, the size of one sample."
        )
    raise refused or PartitionError(
        f"{search.name} runs on no {_kind(first)} that was tried, up to {_LIMITS[_free(first)]} a "
        "side: give input_size=, the size of one sample, such as (3, 224, 224)."
    )


def refuse_size(model: nn.Module, size: Size) -> None:
    """Raise PartitionError where the network itself does not run on samples of `size`."""
    try:
        search = _Search(model, lambda size: (), "sum")
    except DecompkError:  # it is refused at any size
        return
    if search.misfit(size) and search.failures:
        fits = [shape for shape in search.shapes if len(shape) == len(size)]
        channels = bool(fits) and all(shape[0] not in (None, size[0]) for shape in fits)
        example = " or ".join(str(_filled(shape, size[-1] if size[-1] > 4 else 32)) for shape in search.shapes)
        remedy = "" if fits and not channels else f"; one sample is (channels, *spatial), such as {example}"
        raise PartitionError(
            f"{search.name} itself does not run on samples of {size}: {search.failures.pop()}{remedy}; give an "
            "input_size= that it runs on, or none."
        )


def same_members(a: Division, b: Division) -> bool:
    """Whether two divisions of one network, at different sizes, make the same members."""
    fixed = [(p.summed, p.head_weights, p.attributes, p.adapted, _named(p.member_args)) for p in (a, b)]
    return fixed[0] == fixed[1] and _equal(a.places, b.places) and _equal(a.reorders, b.reorders)


def _named(arguments: Any) -> Any:
    """Graphs are copied with the network, so their nodes are known by their names."""
    return {mode: {k: map_arg(v, lambda n: n.name) for k, v in nodes.items()} for mode, nodes in arguments.items()}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return np.array_equal(a, b)


def check_shape(shape: SampleShape, size: Size, name: str) -> None:
    """Raise PartitionError where samples of `size` do not have the shape that the network's first layer reads."""
    if len(size) != len(shape) or any(n is not None and n != m for n, m in zip(shape, size, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise PartitionError(f"{name} takes samples of ({wanted}), not of {size}; give it such a batch first.")


# ---- what the model says --------------------------------------------------------------------------------------------


def _declared(model: nn.Module, shape: SampleShape) -> Iterator[tuple[Size, str]]:
    """The sizes that a network declares, as this package's own, timm's and Hugging Face's do, and where."""
    name = type(model).__name__
    own = getattr(model, "input_size", None)
    if _fits(own, shape):
        yield tuple(own), f"as {name} declares"
    for place in ("pretrained_cfg", "default_cfg"):
        given = getattr(model, place, None)
        size = given.get("input_size") if isinstance(given, dict) else getattr(given, "input_size", None)
        if isinstance(size, Sequence) and _fits((shape[0], *size[1:]), shape):  # the channels may be others
            yield (shape[0], *size[1:]), f"as {name}.{place} declares"
    sides = getattr(getattr(model, "config", None), "image_size", None)
    size = (shape[0], *(sides if isinstance(sides, Sequence) else (sides,) * (len(shape) - 1)))
    if len(shape) > 1 and _fits(size, shape):
        yield size, f"as {name}.config declares"


def _fits(size: Any, shape: SampleShape) -> bool:
    if not isinstance(size, tuple | list) or len(size) != len(shape):
        return False
    known = all(isinstance(n, int) and n > 0 for n in size)
    return known and all(n is None or n == m for n, m in zip(shape, size, strict=True))


def _sample_shapes(model: nn.Module, graph: fx.Graph) -> list[SampleShape]:
    """What one sample may look like to the network's first layer with channels or features."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        name = operation_name(node) if node.op == "call_function" else ""
        if isinstance(module, nn.modules.conv._ConvNd):
            return [(module.in_channels, *[None] * len(module.kernel_size))]
        if isinstance(module, nn.Embedding) or name == "embedding":
            raise PartitionError(
                f"{type(model).__name__} reads tokens, which have no parts to divide among sub-networks; decompk.pack "
                "trains any K of them at once."
            )
        if isinstance(module, nn.RNNBase):
            return [(None, module.input_size)]
        if isinstance(module, nn.Linear):
            return [(module.in_features,), (None, module.in_features)]
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        if name in ("linear", "conv1d", "conv2d", "conv3d") and getattr(weight, "op", "") == "get_attr":
            shape = model.get_parameter(weight.target).shape
            return [(shape[1],), (None, shape[1])] if name == "linear" else [(shape[1], *[None] * (len(shape) - 2))]
    raise PartitionError(
        f"{type(model).__name__} has no convolution, linear or recurrent layer that tells what it reads: give "
        "input_size=, the size of one sample."
    )


# ---- what the network can run on ------------------------------------------------------------------------------------


class _Search:
    def __init__(self, model: nn.Module, cut: Callable[[Size], tuple[Part, ...]], head: str):
        self.model, self.cut, self.head = model, cut, head
        self.name = type(model).__name__
        self.graphs = {mode: trace(model, mode) for mode in (True, False)}
        self.shapes = _sample_shapes(model, self.graphs[False])
        self.skeleton = on_meta(model)
        self.failures: set[str] = set()  # where and what the network raised on sizes that do not fit

    def found(self, size: Size, source: str, shape: SampleShape | None = None, waits: bool = False) -> Found:
        crops = self.cut(size[1:] or size)
        division = divide_channels(self.model, size, crops, self.head, self.graphs)
        return Found(size, crops, division, source, shape or size, waits)

    def fitting(self, shape: SampleShape) -> Found | None:
        """The one size of this shape that fits, or that of the first batch; None where none fits."""
        if None not in shape:
            return None if self.misfit(shape) else self.found(shape, "all that its first layer reads")
        found = self.among(shape, _COMMON[_free(shape)], "the only common size that fits")
        return found or self.among(shape, self.others(shape), "the only size that fits")

    def among(self, shape: SampleShape, sides: Sequence[int], source: str) -> Found | None:
        """`fitting` among these sides; the search ends when two of them, at which no layer adapts, give one answer."""
        fits: dict[int, Found] = {}
        refused: dict[str, PartitionError] = {}
        for side in sides:
            if self.misfit(_filled(shape, side)):
                continue
            try:
                fits[side] = found = self.found(_filled(shape, side), source, shape)
            except PartitionError as error:
                if str(error) in refused and not isinstance(error, MisfitError):  # not a matter of the size
                    raise
                refused[str(error)] = error
                continue
            if not found.division.adapted:
                same = [f for f in fits.values() if f is not found and not f.division.adapted]
                if same and same_members(same[0].division, found.division):
                    return self.waiting(same[0])
        if not fits and refused:
            raise next(iter(refused.values()))
        first, *further = [*fits.values()] or [None]
        if first is None or not further:
            return first
        if all(same_members(first.division, other.division) for other in further):
            return self.waiting(first)
        names = [by(_filled(shape, side)) for side in sorted(fits)]
        raise PartitionError(
            f"{self.name} runs on samples of {', '.join(names[:-1])} and {names[-1]}, and its members would differ: "
            "give input_size=, the size of one sample."
        )

    @staticmethod
    def waiting(found: Found) -> Found:
        return Found(found.size, found.crops, found.division, "as its first batch has", found.shape, waits=True)

    def others(self, shape: SampleShape) -> list[int]:
        """All sides that fit around one that bisection finds: what a flatten holds grows with the side."""
        low, high = 1, _LIMITS[_free(shape)]
        while low <= high:
            middle = (low + high) // 2
            misfit = self.misfit(_filled(shape, middle))
            if misfit == 0:
                break
            low, high = (middle + 1, high) if misfit < 0 else (low, middle - 1)
        else:
            return []
        first = last = middle
        while first > low and not self.misfit(_filled(shape, first - 1)):
            first -= 1
        while last < high and not self.misfit(_filled(shape, last + 1)):
            last += 1
        return list(range(first, last + 1))

    def misfit(self, size: Size) -> int:
        """0 where the network runs on samples of this size in both modes, -1 where they are too small, 1 too large."""
        for graph in self.graphs.values():
            trial = _Trial(self.skeleton, graph, size, _SAMPLES)
            try:
                rows = trial.rows()
            except Exception as error:  # whatever the network's code raises
                if not isinstance(error, NotImplementedError):  # which says that torch has no shapes without data
                    self.failures.add(f"{where(trial.node)}: {brief(error)}")
                return trial.misfit()
            if rows != {_SAMPLES}:
                return 1 if max(rows) > _SAMPLES else -1
        return 0


class _Trial(MetaInterpreter):
    """One run of a graph on a network without data, which remembers where it fails."""

    node: fx.Node

    def rows(self) -> set[int]:
        """How many samples the outputs have: others than went in where forward reshapes with a number of features."""
        values = self.run_all()
        found = {_SAMPLES}
        map_aggregate(values[self.node], lambda v: found.add(len(v)) if isinstance(v, torch.Tensor) and v.dim() else 0)
        return found - {_SAMPLES} or found

    def run_node(self, node: fx.Node) -> Any:
        self.node = node
        return super().run_node(node)

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Any:
        return shape_of(self.fetch_attr(target), *args, **kwargs)

    def misfit(self) -> int:
        """1 where the node that failed got more features than it takes, else -1."""
        node = self.node
        tensors = [self.values[n] for n in node.all_input_nodes if isinstance(self.values.get(n), torch.Tensor)]
        if not tensors:
            return -1
        x, wanted, got = tensors[0], None, math.prod(tensors[0].shape[1:])
        if node.op == "call_module":
            module = self.fetch_attr(node.target)
            wanted = getattr(module, "in_features", None) or getattr(module, "num_features", None)
            got = x.shape[1] if hasattr(module, "num_features") and x.dim() > 1 else x.shape[-1]
        elif getattr(node.target, "__name__", node.target) == "linear" and len(tensors) > 1:
            wanted, got = tensors[1].shape[-1], x.shape[-1]
        elif getattr(node.target, "__name__", node.target) in ("view", "reshape"):
            sizes = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
            wanted = math.prod(n for n in sizes[1:] if isinstance(n, int) and n > 0)
        return 1 if wanted is not None and got > wanted else -1


def _free(shape: SampleShape) -> int:
    return max(shape.count(None), 1)


def _filled(shape: SampleShape, side: int) -> Size:
    return tuple(side if n is None else n for n in shape)


def _kind(shape: SampleShape) -> str:
    if shape[0] is None:
        return f"sequence of {shape[-1]} features"
    return {1: "vector", 2: "signal", 3: "square image", 4: "cubic volume"}[len(shape)]
