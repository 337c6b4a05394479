"""What the channel pass knows of a value: its global and its member's shape, and whose channels it holds."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
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


def globally(value: Any) -> Any:
    return map_aggregate(value, lambda v: v.full if isinstance(v, (TensorPair, Both)) else v)


def in_member(value: Any) -> Any:
    return map_aggregate(value, lambda v: v.part if isinstance(v, (TensorPair, Both)) else v)


def tensors_in(value: Any) -> list[TensorPair]:
    found: list[TensorPair] = []
    map_aggregate(value, lambda v: found.append(v) if isinstance(v, TensorPair) else None)
    return found
