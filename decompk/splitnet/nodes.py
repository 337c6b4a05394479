"""Which channels of different layers are one node: what produces it, normalises it and reads it, shortcuts included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from ..divide.follow import follow_channels
from ..errors import DecompkError


@dataclass(frozen=True, eq=False)
class Side:
    """The inputs or outputs of a layer: a node for every channel, each `repeat` times in the weight (a flatten)."""

    nodes: np.ndarray
    repeat: int = 1

    @property
    def of_each(self) -> np.ndarray:
        """A node for every row or column of the weight."""
        return np.repeat(self.nodes, self.repeat)


@dataclass(frozen=True, eq=False)
class Sides:
    """What a convolution or linear layer reads, None for the image, and gives."""

    inputs: Side | None
    outputs: Side


class Nodes:
    """The nodes of `net`, numbered from 0: channels that meet in an addition or a norm, or only move, are one.

    layers: module path → Sides of every convolution and linear layer without groups. vectors: tensor name → nodes of
    the norms', biases and other tensors with one value, or one kernel, a channel. count: how many nodes there are.
    outer: the nodes of what the network reads as features and returns; pinned: those that something mixes by their
    numbers (a local response norm); the order of neither is ours to change. transposed: the layers whose weight is
    (inputs, outputs, …). Raises UnsupportedOperation where the
    network cannot be followed.
    """

    def __init__(self, net: nn.Module, input_size: Sequence[int]):
        self.input_size = tuple(input_size)
        found = follow_channels(net, self.input_size)
        sides = [ids for inputs, outputs, _ in found.layers.values() for ids in (inputs, outputs) if ids is not None]
        known = np.unique(found.roots(np.concatenate([*sides, *found.vectors.values(), found.outer, found.pinned])))

        def numbered(ids: np.ndarray) -> np.ndarray:
            return np.searchsorted(known, found.roots(ids))

        self.count = len(known)
        self.layers = {
            path: Sides(None if inputs is None else Side(numbered(inputs), repeat), Side(numbered(outputs)))
            for path, (inputs, outputs, repeat) in found.layers.items()
        }
        self.vectors = {name: numbered(ids) for name, ids in found.vectors.items()}
        self.outer, self.pinned = numbered(found.outer), numbered(found.pinned)
        self._values = {
            training: {
                name: (axis, numbered(ids), repeat)
                for name, (axis, ids, repeat) in values.items()
                if np.isin(found.roots(ids), known).all()
            }
            for training, values in found.values.items()
        }
        self.transposed = {path for path in self.layers if getattr(net.get_submodule(path), "transposed", False)}

    @cached_property
    def kinds(self) -> np.ndarray:
        """(count,): a number that nodes share which the same tensors hold, and which may change places."""
        axes = [s.nodes for sides in self.layers.values() for s in (sides.inputs, sides.outputs) if s is not None]
        axes += [*self.vectors.values(), self.outer, self.pinned]
        held = np.zeros((self.count, len(axes)), dtype=int)
        for column, axis in enumerate(axes):
            np.add.at(held[:, column], axis, 1)
        return np.unique(held, axis=0, return_inverse=True)[1].reshape(-1)

    def on_axis(self, training: bool, name: str) -> tuple[int, np.ndarray] | None:
        """Of the value of a graph's node: which axis holds nodes, and which at each place; None where none does."""
        if name not in self._values[training]:
            return None
        axis, ids, repeat = self._values[training][name]
        return axis, np.repeat(ids, repeat)

    def sides(self, path: str) -> Sides:
        """The Sides of a layer. Raises DecompkError for what is none."""
        if path not in self.layers:
            raise DecompkError(f"'{path}' is no convolution or linear layer that could be split: give a layer's path.")
        return self.layers[path]
