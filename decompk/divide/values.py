"""What the channel pass knows of a value: its global and its member's shape, and whose channels it holds."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_aggregate


class Ownership:
    """Whose channels a tensor holds: SHARED, PARTIAL or Divided, as DTensor's Replicate, Partial and Shard."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


SHARED = Ownership("shared")  # every member holds all channels, of its own crop
PARTIAL = Ownership("partial")  # every member holds all channels of a summand of the global tensor


@dataclass(frozen=True, eq=False)
class MapExtent:
    """The spatial axes of a map that is laid out otherwise now: flattened behind every channel, merged or swapped.

    axes: which of the input's axes these are; those of one position leave no trace in a flatten. full, part: their
    sizes globally and in a member. scale: input pixels per position, None where that is unknown. order: where the axes
    were merged or swapped, for each position, globally and in a member, which one it was before.
    """

    axes: tuple[int, ...]
    full: tuple[int, ...]
    part: tuple[int, ...]
    scale: tuple[Fraction | None, ...]
    order: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True, eq=False)
class Divided(Ownership):
    """Channels divided among members: `ids` has one strand (see strands.py) per position of `axes`, jointly."""

    ids: np.ndarray
    axes: tuple[int, ...]
    flat: MapExtent | None = None  # what a flatten put behind every channel
    bare: str | None = None  # the parameter or buffer it comes from, until it meets an activation


@dataclass(frozen=True, eq=False)
class TensorPair:
    """A tensor of the graph: its global and its member's shape (meta tensors), and whose channels it holds.

    scale: input pixels per position of each spatial axis. moved: the map that it was, where its spatial axes were
    merged or swapped.
    """

    full: torch.Tensor
    part: torch.Tensor
    ownership: Ownership
    scale: tuple[Fraction | None, ...] = ()
    moved: MapExtent | None = None


@dataclass(frozen=True)
class Both:
    """A number or shape that differs between the global network and a member."""

    full: Any
    part: Any


def operation_name(node: fx.Node) -> str:
    """One name for an operation in functional, method and in-place form."""
    if node.op not in ("call_function", "call_method"):
        return ""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    if not name.startswith("__"):
        name = name.rstrip("_")
    return _ALIASES.get(name, name)


def module_key(node: fx.Node) -> str:
    """What a layer is known by in a division: its module's path, or its weight's name where a functional is called."""
    if node.op == "call_module":
        return str(node.target)
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return str(getattr(weight, "target", node.name))


_ALIASES = {
    "iadd": "add", "imul": "mul", "isub": "sub", "itruediv": "div", "truediv": "div", "true_divide": "div",
    "multiply": "mul", "subtract": "sub", "divide": "div", "radd": "add", "rmul": "mul", "concat": "cat",
    "concatenate": "cat", "swapaxes": "transpose", "max_pool2d_with_indices": "max_pool2d", "upsample": "interpolate",
    "split_with_sizes": "split", "tensor_split": "chunk", "reshape": "view",
}  # fmt: skip
# What commutes with the sum over members, so that a head may still be followed by it.
LINEAR = {
    "add", "sub", "neg", "contiguous", "clone", "detach", "to", "float", "double", "half", "mean", "sum", "view",
    "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "chunk", "split", "getitem", "cat", "stack",
    "dropout", "dropout2d", "Dropout", "Dropout2d", "Identity", "Flatten", "interpolate", "Upsample", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "AvgPool1d",
    "AvgPool2d", "AvgPool3d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d",
}  # fmt: skip
# What asks a tensor only for its shape, dtype or device: the answer holds none of its values.
SHAPE_QUERIES = {
    "size", "dim", "ndimension", "numel", "getattr", "is_floating_point", "stride", "new_empty", "new_zeros",
    "new_ones",
    "new_full", "len",
}  # fmt: skip
FUNCTIONAL_LAYERS = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear",
}  # fmt: skip


def globally(value: Any) -> Any:
    return map_aggregate(value, lambda v: v.full if isinstance(v, (TensorPair, Both)) else v)


def in_member(value: Any) -> Any:
    return map_aggregate(value, lambda v: v.part if isinstance(v, (TensorPair, Both)) else v)


def tensors_in(value: Any) -> list[TensorPair]:
    found: list[TensorPair] = []
    map_aggregate(value, lambda v: found.append(v) if isinstance(v, TensorPair) else None)
    return found
