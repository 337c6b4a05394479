"""Stage two: assignments made hard, channels of a group side by side, and no weights between groups."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..blockdiag import ZeroSkipping, block_diagonal
from ..compose import output_axis, tensors
from .assignment import Assignment
from .nodes import Nodes


@dataclass(frozen=True)
class Split:
    """A split network.

    dense: the network with zeros between groups, its classes and names. masks: name of a weight → which of its entries
    lie inside a group, for fine-tuning it as it is.
    """

    dense: nn.Module
    masks: dict[str, torch.Tensor]

    @property
    def kept(self) -> float:
        """The share of the split layers' weights that is left."""
        return sum(int(m.sum()) for m in self.masks.values()) / sum(m.numel() for m in self.masks.values())

    def fast(self, input_size: Sequence[int] | None = None) -> ZeroSkipping:
        """The network without its zeros, which trains on with the zeros kept: see `decompk.block_diagonal`."""
        return block_diagonal(self.dense, input_size)


def split(net: nn.Module, assignment: Assignment) -> Split:
    """`net` split by its learned `assignment`; `net` itself is not changed.

    Every node goes to the group it belongs to most; nodes inside the network are put in the order of their groups,
    which changes nothing but rounding; then every weight between different groups becomes zero.
    """
    nodes, owner = assignment.nodes, assignment.hard()
    order = grouped_order(nodes, owner)
    out = permuted(net, nodes, order)
    masks = {}
    for path in assignment.groups:
        found, weight = nodes.sides(path), out.get_submodule(path).weight
        inside = np.ones(weight.shape[:2], dtype=bool)
        if path not in assignment.whole_inputs:
            rows, columns = order[found.outputs.nodes][:, None], order[found.inputs.of_each][None]
            levels = assignment.level[rows], assignment.level[columns]
            common = np.minimum(*levels)  # groups of the coarser of the two, in which both have a place
            inside = owner[rows] * common // levels[0] == owner[columns] * common // levels[1]
        mask = torch.from_numpy(inside).to(weight.device).view(*inside.shape, *(1,) * (weight.dim() - 2))
        with torch.no_grad():
            weight.mul_(mask)
        masks[f"{path}.weight"] = mask.expand_as(weight)
    return Split(out, masks)


def grouped_order(nodes: Nodes, owner: np.ndarray) -> np.ndarray:
    """(count,): which node comes to each node's place, so that groups are contiguous wherever code allows it.

    Nodes change places only with those that the same tensors hold, and outer ones not at all.
    """
    axes = [s.nodes for sides in nodes.layers.values() for s in (sides.inputs, sides.outputs) if s is not None]
    held = np.zeros((nodes.count, len(axes) + len(nodes.vectors) + 1), dtype=bool)
    for column, axis in enumerate([*axes, *nodes.vectors.values(), nodes.outer]):
        held[axis, column] = True
    order = np.arange(nodes.count)
    _, kinds = np.unique(held, axis=0, return_inverse=True)
    for kind in np.unique(kinds):
        alike = np.nonzero(kinds.reshape(-1) == kind)[0]
        if not held[alike[0], -1]:
            order[alike] = alike[np.argsort(owner[alike], kind="stable")]
    return order


def permuted(net: nn.Module, nodes: Nodes, order: np.ndarray) -> nn.Module:
    """A copy of `net` with node order[a] in the place of node a, in every tensor that holds it: the same function."""
    out = copy.deepcopy(net)
    known = tensors(out)
    with torch.no_grad():
        for path, sides in nodes.layers.items():
            weight = known[f"{path}.weight"]
            outputs = output_axis(out, f"{path}.weight")
            weight.copy_(weight.index_select(outputs, _moved(sides.outputs.nodes, order)))
            if sides.inputs is not None:
                places = _moved(sides.inputs.nodes, order)[:, None] * sides.inputs.repeat
                columns = (places + torch.arange(sides.inputs.repeat)).reshape(-1)
                weight.copy_(weight.index_select(1 - outputs, columns))
        for name, ids in nodes.vectors.items():
            axis = next((a for a, size in enumerate(known[name].shape) if size > 1), 0)
            known[name].copy_(known[name].index_select(axis, _moved(ids, order)))
    return out


def _moved(ids: np.ndarray, order: np.ndarray) -> torch.Tensor:
    """For each place of an axis that holds nodes `ids`: which of its places comes there."""
    sorter = np.argsort(ids)
    return torch.from_numpy(sorter[np.searchsorted(ids, order[ids], sorter=sorter)])
