"""Whose channels are the same in a network that stays undivided."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn

from ..crops import Crop
from ..errors import UnsupportedOperation
from ..fx.graph import where
from .channels import Walk
from .divided_layer import ChannelwiseLayer, RecurrentLayer, WeightedLayer, channel_vectors, sides
from .values import Divided, TensorPair


@dataclass(frozen=True, eq=False)
class Followed:
    """Whose channels every tensor of an undivided network holds, as strands.

    layers: convolution or linear layer → (inputs, None for the image; outputs; columns a channel of a linear layer has
    behind a flatten). vectors: name of a tensor with one value, or one kernel, a channel → strands. outer: those of
    what the network reads as features and of what it returns. pinned: those of channels that something mixes by their
    numbers: grouped convolutions and norms, recurrent layers, local response norms. values: by training or not, name of
    a graph's node → the one axis of its value that holds channels, their strands, and elements a channel has on it.
    roots: strands → one of those that are the same.
    """

    layers: dict[str, tuple[np.ndarray | None, np.ndarray, int]]
    vectors: dict[str, np.ndarray]
    outer: np.ndarray
    pinned: np.ndarray
    values: dict[bool, dict[str, tuple[int, np.ndarray, int]]]
    roots: Callable[[np.ndarray], np.ndarray]


def follow_channels(model: nn.Module, input_size: tuple[int, ...]) -> Followed:
    """Follow the channels of `model` without dividing them. Raises UnsupportedOperation; changes nothing."""
    size = input_size[1:] or input_size
    walk = Walk(model, input_size, (Crop(*(0,) * len(size), *size),), "sum")
    walk.run()
    if walk.shuffles:
        raise UnsupportedOperation(
            f"{where(walk.shuffles[0][1])}: it shuffles channels, whose order would then have to stay as it is."
        )
    for layer in walk.layers.values():
        if isinstance(layer, WeightedLayer) and layer.weight == layer.path:
            raise UnsupportedOperation(
                f"'{layer.path}' is used by a function, not by a layer that holds it: give it one."
            )
    layers, vectors = {}, {name: ids for name, (_, ids) in walk.bare.items()}
    outer = [walk.features] if walk.vectors else []
    pinned = walk.pinned
    for path, layer in walk.layers.items():
        if isinstance(layer, ChannelwiseLayer):
            vectors |= {f"{path}.{name}": layer.inputs for name in channel_vectors(layer.module)}
            pinned += [layer.inputs] if layer.groups > 1 else []
        elif isinstance(layer, RecurrentLayer):
            pinned += [layer.inputs, *(ids for depth in layer.hidden for ids in depth)]
        elif layer.groups > 1 and layer.groups == len(layer.inputs) == len(layer.outputs):  # a kernel for each channel
            vectors |= {name: layer.inputs for name in (layer.weight, layer.bias) if name is not None}
        elif layer.groups > 1:
            pinned += [layer.inputs, layer.outputs]
        else:
            outputs = layer.outputs
            if outputs is None:  # a last layer
                outputs = walk.strands.new(sides(layer.module)[1])
                outer.append(outputs)
            flat = layer.flat is not None and not layer.is_conv
            layers[path] = layer.inputs, outputs, math.prod(layer.flat.full) if flat else 1
            if layer.bias is not None:
                vectors[layer.bias] = outputs
    none = np.zeros(0, np.int64)
    ends, kept = np.concatenate([none, *outer]), np.concatenate([none, *pinned])
    values: dict[bool, dict[str, tuple[int, np.ndarray, int]]] = {}
    for mode, env in walk.values.items():
        held = {node.name: value.ownership for node, value in env.items() if isinstance(value, TensorPair)}
        values[mode] = {
            name: (divided.axes[0], divided.ids, math.prod(divided.flat.full) if divided.flat else 1)
            for name, divided in held.items()
            if isinstance(divided, Divided) and len(divided.axes) == 1
        }
    return Followed(layers, vectors, ends, kept, values, walk.strands.roots)
