"""How an input is cut: crops, grids, margins, views (2.6, 2.8)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from numbers import Integral
from typing import Any

import numpy as np
import torch

from .errors import PartitionError

_AXIS_NAMES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


@dataclass(frozen=True)
class Crop:
    """The part of the input one member sees: where it starts and how far it goes, per spatial axis.

    `Crop(top, left, height, width)` for images; `Crop(start, length)` for signals and
    `Crop(front, top, left, depth, height, width)` for volumes follow the same order: starts, then sizes.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]

    def __init__(self, *numbers: int):
        if len(numbers) not in (2, 4, 6):
            raise PartitionError(
                f"Crop{numbers} has {len(numbers)} numbers; give starts, then sizes: (start, length), "
                "(top, left, height, width) or (front, top, left, depth, height, width)."
            )
        numbers = tuple(int(n) for n in numbers)
        half = len(numbers) // 2
        object.__setattr__(self, "start", numbers[:half])
        object.__setattr__(self, "size", numbers[half:])

    @property
    def top(self) -> int:
        return self.start[-2]

    @property
    def left(self) -> int:
        return self.start[-1]

    @property
    def height(self) -> int:
        return self.size[-2]

    @property
    def width(self) -> int:
        return self.size[-1]

    @property
    def stop(self) -> tuple[int, ...]:
        """Per axis, the first position behind the crop."""
        return tuple(start + size for start, size in zip(self.start, self.size, strict=True))

    @property
    def positions(self) -> tuple[np.ndarray, ...]:
        """Which positions of each axis the crop holds."""
        return tuple(start + np.arange(size) for start, size in zip(self.start, self.size, strict=True))

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """The crop of `x` (..., *spatial) as a view: no copy."""
        for axis, (start, size) in enumerate(zip(self.start, self.size, strict=True), start=x.dim() - len(self.size)):
            x = x.narrow(axis, start, size)
        return x

    def __repr__(self) -> str:
        return f"Crop({', '.join(map(str, self.start + self.size))})"


@dataclass(frozen=True)
class Indices:
    """The features of an input vector that one member sees, in ascending order: a crop without neighbourhoods.

    `Indices([0, 2, 5])` takes any sequence of integers. For the last axis of vectors (N, D) and sequences (N, T, D).
    """

    indices: tuple[int, ...]

    def __init__(self, indices: Sequence[int]):
        numbers = sorted(int(i) for i in indices)
        if not numbers or numbers[0] < 0 or len(set(numbers)) < len(numbers):
            raise PartitionError(f"{_brief(numbers)} is no set of features: give different numbers from 0 on.")
        object.__setattr__(self, "indices", tuple(numbers))

    @property
    def start(self) -> tuple[int, ...]:
        return (self.indices[0],)

    @property
    def size(self) -> tuple[int, ...]:
        return (len(self.indices),)

    @property
    def stop(self) -> tuple[int, ...]:
        return (self.indices[-1] + 1,)

    @property
    def positions(self) -> tuple[np.ndarray, ...]:
        return (np.array(self.indices),)

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """These features of `x` (..., D), as a copy."""
        return x.index_select(-1, _index(self.indices, x.device))

    def __repr__(self) -> str:
        return f"Indices({_brief(self.indices)})"


@functools.lru_cache(maxsize=1024)
def _index(indices: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The indices on the device: copied there once, as no CUDA graph could."""
    return torch.tensor(indices, device=device)


Part = Crop | Indices
Partitions = int | Sequence[int] | Sequence[Crop] | Sequence[Indices] | Sequence[Sequence[int]]


def make_crops(
    spatial: tuple[int, ...],
    partitions: Partitions,
    crop_size: int | Sequence[int] | None = None,
    margin: int = 0,
) -> tuple[Part, ...]:
    """The crops of an input of `spatial` size (pixels per axis), in row-major order of the grid.

    `partitions` is a number, whose grid is the squarest there is (8 → 2×4, 5 → 1×5; in 3-D the most cubic), the parts
    per axis, a list of crops, or, of one axis, a list of index sets.
    `margin` pixels are cut off every border first. Without `crop_size` each crop is ⌊size/n⌋ wide (2.8), so the
    last size mod n pixels of an axis are seen by nobody; with it, crops are spread evenly from border to border
    and overlap where crop_size · n exceeds the size. Raises PartitionError.
    """
    axes = len(spatial)
    if isinstance(partitions, bool | str) or not isinstance(partitions, (int, Sequence)):
        raise PartitionError(f"partitions {partitions!r} must be a number, the parts per axis, or a list of crops.")
    if not isinstance(margin, Integral) or margin < 0:
        raise PartitionError(f"a margin of {margin!r} is no border: give a whole number of pixels, 0 or more.")
    if not isinstance(partitions, int) and any(not isinstance(p, int) for p in partitions):
        if crop_size is not None or margin:
            raise PartitionError("crop_size and margin only shape a grid; a list of crops already fixes both.")
        return _checked(tuple(p if isinstance(p, Crop | Indices) else _index_set(p) for p in partitions), spatial)

    parts = _parts_per_axis(partitions, axes)
    names = _AXIS_NAMES[axes]
    inner = tuple(s - 2 * margin for s in spatial)
    if min(inner) < 1:
        raise PartitionError(f"a margin of {margin} leaves nothing of an input of {by(spatial)}.")
    if crop_size is None:
        sizes = tuple(s // n for s, n in zip(inner, parts, strict=True))
    else:
        sizes = (crop_size,) * axes if isinstance(crop_size, Integral) else crop_size
        if not isinstance(sizes, Iterable) or any(not isinstance(c, Integral) for c in sizes):
            raise PartitionError(
                f"crop_size {crop_size!r} must be whole numbers of pixels, one for all axes or for each."
            )
        sizes = tuple(int(c) for c in sizes)
        if len(sizes) != axes:
            raise PartitionError(f"crop_size {sizes} has {len(sizes)} numbers; the input has {axes} spatial axes.")

    starts_per_axis = []
    for name, whole, part, size in zip(names, inner, parts, sizes, strict=True):
        if not 1 <= size <= whole:
            raise PartitionError(
                f"a crop {name} of {size} does not fit {whole} pixels cut into {part}; choose between 1 and {whole}."
            )
        if crop_size is None or part == 1:
            step = size
        else:
            step = (whole - size) / (part - 1)
        starts_per_axis.append([margin + math.floor(i * step + 0.5) for i in range(part)])
    return _checked(tuple(Crop(*starts, *sizes) for starts in product(*starts_per_axis)), spatial)


def _parts_per_axis(partitions: int | Sequence[int], axes: int) -> tuple[int, ...]:
    if isinstance(partitions, int):
        if partitions < 1:
            raise PartitionError(
                f"{partitions} partitions do not make a grid: give a positive number, the parts per axis such as "
                "(2, 4), or a list of crops."
            )
        return _squarest(partitions, axes)
    parts = tuple(int(p) for p in partitions)
    if len(parts) != axes or min(parts, default=0) < 1:
        raise PartitionError(f"partitions {parts} must name a positive number of parts for each of {axes} axes.")
    return parts


def _squarest(count: int, axes: int) -> tuple[int, ...]:
    """The factors of `count`, one per axis in ascending order, with the least sum: 8 → 2×4, 5 → 1×5."""
    if axes == 1:
        return (count,)
    grids = [(n, *_squarest(count // n, axes - 1)) for n in range(1, math.isqrt(count) + 1) if count % n == 0]
    return min((grid for grid in grids if grid[0] <= grid[1]), key=sum)


def _index_set(part: Any) -> Indices:
    try:
        return Indices(part)
    except (TypeError, ValueError):
        raise PartitionError(
            f"partitions hold {part!r}: give a number, the parts per axis, or a list of crops or of index sets."
        ) from None


def _checked(crops: tuple[Part, ...], spatial: tuple[int, ...]) -> tuple[Part, ...]:
    if len({type(crop) for crop in crops}) > 1:
        raise PartitionError("partitions mix crops and index sets: give one kind.")
    for crop in crops:
        if len(crop.size) != len(spatial):
            raise PartitionError(f"{crop} has {len(crop.size)} axes; the input has {len(spatial)}.")
        for size, start, stop, whole in zip(crop.size, crop.start, crop.stop, spatial, strict=True):
            if start < 0 or size < 1 or stop > whole:
                raise PartitionError(f"{crop} reaches outside an input of {by(spatial)} pixels; move or shrink it.")
        if crop.size != crops[0].size:
            raise PartitionError(
                f"{crop} and {crops[0]} differ in size; a packed network needs equal crops (overlap them instead)."
            )
    return crops


def owners(crops: Sequence[Part], spatial: tuple[int, ...], why: str) -> np.ndarray:
    """Which crop each position of the input belongs to. Raises PartitionError, ending in `why`, unless it is just one.

    → integers of shape `spatial`.
    """
    owner = np.full(spatial, -1)
    for k, crop in enumerate(crops):
        place = np.ix_(*crop.positions)
        taken = owner[place]
        if (taken >= 0).any():
            other, at = crops[taken.max()], [int(p.min()) for p in np.nonzero(taken >= 0)]
            where = by([int(axis[i]) for axis, i in zip(crop.positions, at, strict=True)])
            raise PartitionError(f"{other} and {crop} overlap (at {where}), but {why}.")
        owner[place] = k
    if (owner < 0).any():
        first = by([int(axis[0]) for axis in np.nonzero(owner < 0)])
        raise PartitionError(
            f"{int((owner < 0).sum())} of {owner.size} inputs belong to no member (the first at {first}), but {why}."
        )
    return owner


def _brief(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return f"[{shown}, … {len(numbers)} in all]" if len(numbers) > 6 else f"[{shown}]"


def by(sizes: Sequence[int]) -> str:
    """Sizes as people write them: 224×224."""
    return "×".join(map(str, sizes))
