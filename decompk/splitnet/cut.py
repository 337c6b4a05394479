"""Where the graph of a split network is cut: what is computed once for all groups, and what each has of its own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import UnsupportedOperation
from ..fx.graph import MetaInterpreter, trace
from .nodes import Nodes


@dataclass(frozen=True)
class Handed:
    """A tensor on its way into the groups.

    shape: of two samples; batch: whether it begins with them, or with a multiple of them. dtype: None for floating
    ones, whose dtype is that of the sender. places: those of `axis` that a process needs, None: all.
    """

    shape: tuple[int, ...]
    batch: bool
    dtype: torch.dtype | None = None
    axis: int = 0
    places: Tensor | None = None

    def empty(self, x: Tensor) -> Tensor:
        """Room for it, of as many samples as x has, in the dtype of x."""
        return x.new_empty((len(x) * self.shape[0] // 2, *self.shape[1:]) if self.batch else self.shape)

    def own(self, value: Tensor) -> Tensor:
        """The part of it that this process needs."""
        value = value if self.dtype is None else value.to(self.dtype)
        return value if self.places is None else value.index_select(self.axis, self.places.to(value.device))


class Cut:
    """The cut of `net`, whose `nodes` are in groups where `levels`, (count,), is not 0.

    apart: the layers that are split on both sides. head: the last layer. For all groups at once is computed what holds
    no node of a group, and what comes before a layer that reads all groups. Raises UnsupportedOperation where split
    layers would be among that.
    """

    def __init__(self, net: nn.Module, nodes: Nodes, levels: np.ndarray, apart: Collection[str], head: str):
        self.net, self.nodes, self.levels, self.apart = net, nodes, levels, apart
        reads = {path for path, s in nodes.layers.items() if s.inputs is not None and levels[s.inputs.nodes].any()}
        gives = {path for path, s in nodes.layers.items() if levels[s.outputs.nodes].any()}
        gives |= {name.rpartition(".")[0] for name, ids in nodes.vectors.items() if levels[ids].any()}
        self.grouped, self.reads_all = reads | gives | {head}, reads - set(apart) - {head}

    def __call__(self, training: bool, kept: np.ndarray) -> tuple[fx.Graph, fx.Graph, list[Handed]]:
        """The graph of what comes first; that of the groups, of x and of what they are handed; and of these each.

        kept: (count,) of bool, the nodes of this process's groups and those in none.
        """
        graph = trace(self.net, training)
        x, *_, output = graph.nodes
        values = [MetaInterpreter(self.net, graph, self.nodes.input_size, n).run_all() for n in (2, 3)]
        trunk = self._trunk(graph)
        needed, border = {output}, []
        for node in reversed(graph.nodes):  # numbers are computed again; tensors are handed over
            for source in node.all_input_nodes if node in needed else ():
                if source in trunk and source is not x and isinstance(values[0][source], Tensor):
                    border += [source] if source not in border else []
                else:
                    needed.add(source)
        first, rest = fx.Graph(), fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        _copy(graph, _ancestors(graph, {x, *border}), first, copied)
        first.output(tuple(copied[node] for node in border))
        copied = {x: rest.placeholder("x")} | {node: rest.placeholder(f"handed_{i}") for i, node in enumerate(border)}
        _copy(graph, needed, rest, copied)
        called = [{node.target for node in part.nodes if node.op == "call_module"} for part in (first, rest)]
        for path in called[0] & called[1]:
            if any(True for _ in self.net.get_submodule(path).parameters()):
                raise UnsupportedOperation(f"'{path}' is called before the groups and in them: make it two modules.")
        return first, rest, [self._handed(node, training, kept, *(of[node] for of in values)) for node in border]

    def _trunk(self, graph: fx.Graph) -> set[fx.Node]:
        readers = {node for node in graph.nodes if node.op == "call_module" and node.target in self.reads_all}
        x, *_, output = graph.nodes
        trunk = _ancestors(graph, readers) | {x}
        for node in graph.nodes:
            owner = {"call_module": node.target, "get_attr": str(node.target).rpartition(".")[0]}.get(node.op, "")
            if node is not output and owner not in self.grouped and trunk.issuperset(node.all_input_nodes):
                trunk.add(node)
        for node in trunk:
            if node.op == "call_module" and node.target in self.apart:
                raise UnsupportedOperation(
                    f"a layer behind '{node.target}' reads all groups, so they cannot run apart: split the layers "
                    "behind it, too, up to the last."
                )
        return trunk

    def _handed(self, node: fx.Node, training: bool, kept: np.ndarray, two: Any, three: Any) -> Handed:
        shape, batch = tuple(two.shape), two.shape[:1] != three.shape[:1]
        dtype = None if two.is_floating_point() else two.dtype
        found = self.nodes.on_axis(training, node.name)
        if found is None or not self.levels[found[1]].any():
            return Handed(shape, batch, dtype)
        return Handed(shape, batch, dtype, found[0], torch.from_numpy(np.nonzero(kept[found[1]])[0]))


def _ancestors(graph: fx.Graph, nodes: set[fx.Node]) -> set[fx.Node]:
    """`nodes` and all that they are computed from."""
    found = set(nodes)
    for node in reversed(graph.nodes):
        found.update(node.all_input_nodes if node in found else ())
    return found


def _copy(graph: fx.Graph, nodes: set[fx.Node], into: fx.Graph, copied: dict[fx.Node, fx.Node]) -> None:
    """Those `nodes` that are not there yet, in their order."""
    for node in graph.nodes:
        if node in nodes and node not in copied:
            copied[node] = into.node_copy(node, copied.__getitem__)
