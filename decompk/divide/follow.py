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
from .channels import _Pass, _sides, _vectors
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
    followed = _Pass(model, input_size, (Crop(*(0,) * len(size), *size),), "sum")
    followed.run()
    if followed.shuffles:
        raise UnsupportedOperation(
            f"{where(followed.shuffles[0][1])}: it shuffles channels, whose order would then have to stay as it is."
        )
    if followed.tensor_names:
        raise UnsupportedOperation(
            f"'{next(iter(followed.tensor_names))}' is used by a function, not by a layer that holds it: give it one."
        )
    layers, vectors = {}, {name: ids for name, (_, ids) in followed.bare.items()}
    outer = [followed.features] if followed.vectors else []
    pinned = followed.pinned
    for target, leaf in followed.leaves.items():
        module = followed.modules[target]
        if leaf.kind == "norm":
            vectors |= {f"{target}.{name}": leaf.inputs for name, _ in _vectors(module)}
            pinned += [leaf.inputs] if leaf.groups > 1 else []
        elif leaf.kind == "recurrent":
            pinned += [leaf.inputs, *(ids for depth in leaf.hidden for ids in depth)]
        elif leaf.groups > 1 and leaf.groups == len(leaf.inputs) == len(leaf.outputs):  # a kernel for each channel
            names = ["weight"] if module.bias is None else ["weight", "bias"]
            vectors |= {f"{target}.{name}": leaf.inputs for name in names}
        elif leaf.groups > 1:
            pinned += [leaf.inputs, leaf.outputs]
        else:
            outputs = leaf.outputs
            if outputs is None:  # a last layer
                outputs = followed.strands.new(_sides(module)[1])
                outer.append(outputs)
            flat = leaf.flat is not None and leaf.kind == "linear"
            layers[target] = leaf.inputs, outputs, math.prod(leaf.flat.full) if flat else 1
            if module.bias is not None:
                vectors[f"{target}.bias"] = outputs
    none = np.zeros(0, np.int64)
    ends, kept = np.concatenate([none, *outer]), np.concatenate([none, *pinned])
    values: dict[bool, dict[str, tuple[int, np.ndarray, int]]] = {}
    for mode, env in followed.values.items():
        ownerships = {node.name: value.ownership for node, value in env.items() if isinstance(value, TensorPair)}
        values[mode] = {
            name: (ownership.axes[0], ownership.ids, math.prod(ownership.flat.full) if ownership.flat else 1)
            for name, ownership in ownerships.items()
            if isinstance(ownership, Divided) and len(ownership.axes) == 1
        }
    return Followed(layers, vectors, ends, kept, values, followed.strands.roots)
