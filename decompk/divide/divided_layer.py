"""What a layer with parameters becomes in a member, and where each member's part of its tensors lies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from ..fx.graph import on_meta
from ..ops.recurrent import GATES
from .division import Place
from .values import MapExtent

CONV_OR_LINEAR = (nn.modules.conv._ConvNd, nn.Linear)
SIDES = {True: ("in_channels", "out_channels"), False: ("in_features", "out_features")}  # convolution or linear

Shares = Callable[[np.ndarray], list[np.ndarray]]  # strands → for each member, where among them its own stand
Positions = Callable[[MapExtent], list[list[np.ndarray]]]  # for each member, per axis, what its crop occupies (2.13)


@dataclass(eq=False)
class DividedLayer:
    """A layer with parameters: the attributes that a member's has, and the strands of its inputs."""

    path: str  # of the module; where a functional is called, its weight's name
    module: nn.Module
    attributes: dict[str, Any] = field(default_factory=dict)
    inputs: np.ndarray | None = None  # None: the layer reads the image

    def places(self, K: int, shares: Shares, positions: Positions) -> dict[str, tuple[Place, ...]]:
        """By name, where each member's part of those of its tensors lies that are divided."""
        raise NotImplementedError


@dataclass(eq=False)
class ChannelwiseLayer(DividedLayer):
    """A normalisation or PReLU: one value for each channel."""

    groups: int = 1

    def places(self, K: int, shares: Shares, positions: Positions) -> dict[str, tuple[Place, ...]]:
        place = tuple((index,) for index in shares(self.inputs))
        return {f"{self.path}.{name}": place for name in channel_vectors(self.module)}


@dataclass(eq=False)
class RecurrentLayer(DividedLayer):
    """nn.RNN, nn.GRU or nn.LSTM; hidden: the strands of its states, by depth and direction."""

    hidden: list[list[np.ndarray]] = field(default_factory=list)

    def places(self, K: int, shares: Shares, positions: Positions) -> dict[str, tuple[Place, ...]]:
        """Of U (weight_ih), W (weight_hh) and their biases, gate after gate."""
        places: dict[str, tuple[Place, ...]] = {}
        first = self.module.hidden_size * np.arange(GATES[self.module.mode])[:, None]  # row of each gate
        for depth, layer in enumerate(self.hidden):
            inputs = shares(np.concatenate(self.hidden[depth - 1]) if depth else self.inputs)
            for ids, direction in zip(layer, ("", "_reverse"), strict=False):
                hidden = shares(ids)
                rows = [(first + index).reshape(-1) for index in hidden]
                end = f"l{depth}{direction}"
                for name, columns in (("weight_ih", inputs), ("weight_hh", hidden)):
                    blocks = zip(rows, columns, strict=True)
                    places[f"{self.path}.{name}_{end}"] = tuple((r[:, None], c[None, :]) for r, c in blocks)
                for name in ("bias_ih", "bias_hh") if self.module.bias else ():
                    places[f"{self.path}.{name}_{end}"] = tuple((r,) for r in rows)
        return places


@dataclass(eq=False)
class WeightedLayer(DividedLayer):
    """A convolution or linear layer, as a module or called as a functional."""

    weight: str = ""
    bias: str | None = None
    outputs: np.ndarray | None = None  # None: a head, all outputs
    flat: MapExtent | None = None  # of a fully connected layer behind a map, or a kernel over all of it
    groups: int = 1
    member_groups: int = 1

    @property
    def is_conv(self) -> bool:
        return isinstance(self.module, nn.modules.conv._ConvNd)

    def member_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a member's weight and bias."""
        inputs, outputs = (self.attributes[side] for side in SIDES[self.is_conv])
        shape: tuple[int, ...] = (outputs, inputs)
        if self.is_conv:
            rows, columns = (inputs, outputs) if self.module.transposed else (outputs, inputs)
            kernel = self.attributes.get("kernel_size", self.module.kernel_size)
            shape = (rows, columns // self.attributes["groups"], *kernel)
        return {"weight": shape, "bias": (outputs,)}

    def places(self, K: int, shares: Shares, positions: Positions) -> dict[str, tuple[Place, ...]]:
        inputs, outputs = sides(self.module)
        rows = [np.arange(outputs)] * K if self.outputs is None else shares(self.outputs)
        columns = [np.arange(inputs)] * K if self.inputs is None else shares(self.inputs)
        spots = positions(self.flat) if self.flat is not None else []
        if spots and not self.is_conv:
            columns = [self._behind_flatten(c, s) for c, s in zip(columns, spots, strict=True)]
        if self.is_conv and self.module.transposed:
            blocks = [self._block(c, r, outputs) for r, c in zip(rows, columns, strict=True)]
        else:
            blocks = [self._block(r, c, inputs) for r, c in zip(rows, columns, strict=True)]
        if spots and self.is_conv:
            blocks = [_with_space(block, spot) for block, spot in zip(blocks, spots, strict=True)]
        places = {self.weight: tuple(blocks)}
        if self.bias is not None and self.outputs is not None:
            places[self.bias] = tuple((r,) for r in rows)
        return places

    def _behind_flatten(self, channels: np.ndarray, spots: list[np.ndarray]) -> np.ndarray:
        """The columns that hold these positions of these channels of the map."""
        flat = np.ravel_multi_index(np.ix_(*spots), self.flat.full).reshape(-1)
        if self.flat.order is not None:
            whole, own = self.flat.order
            flat = np.argsort(whole)[flat[own]]
        return (channels[:, None] * math.prod(self.flat.full) + flat).reshape(-1)

    def _block(self, rows: np.ndarray, columns: np.ndarray, column_count: int) -> Place:
        """Where a (rows, columns) block lies in the global weight; a grouped weight has one group's columns."""
        if self.groups == 1:
            return rows[:, None], columns[None, :]
        per_group = columns.reshape(self.member_groups, -1) % (column_count // self.groups)
        return rows[:, None], np.repeat(per_group, len(rows) // self.member_groups, axis=0)


def _with_space(block: Place, spots: list[np.ndarray]) -> Place:
    """A (rows, columns) block of a convolution restricted to some of its kernel positions."""
    return (*(i.reshape(*i.shape, *[1] * len(spots)) for i in block), *(s[None, None] for s in np.ix_(*spots)))


def sides(module: nn.Module) -> tuple[int, int]:
    """Input and output channels, or features."""
    inputs, outputs = SIDES[isinstance(module, nn.modules.conv._ConvNd)]
    return getattr(module, inputs), getattr(module, outputs)


def channel_vectors(module: nn.Module) -> list[str]:
    """The names of a normalisation's tensors that hold one number per channel."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, tensor in tensors if tensor.dim() == 1 and "." not in name]


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
