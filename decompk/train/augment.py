"""Flips, shifts, turns and zooms of whole batches, on their device, drawn from a seed alone; and the mean taken off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DecompkError


@dataclass(frozen=True)
class Augment:
    """What happens to each image of a batch, in this order: flipped, turned and zoomed about its centre, shifted.

    flip: left to right, one image in two. shift: whole pixels, up to this share of the height and of the width.
    rotate: degrees, up to ±. zoom: magnified by a factor from 1 − zoom to 1 + zoom. Edges are repeated.
    """

    flip: bool = False
    shift: float = 0.0
    rotate: float = 0.0
    zoom: float = 0.0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("flip", isinstance(self.flip, bool), "True or False"),
            ("shift", 0 <= self.shift < 1, "a share of height and width, from 0 to below 1"),
            ("rotate", 0 <= self.rotate <= 180, "degrees, from 0 to 180"),
            ("zoom", 0 <= self.zoom < 1, "a share, from 0 to below 1"),
        ):
            if not fits:
                raise DecompkError(f"Augment({name}={getattr(self, name)!r}) cannot be done; give {wanted}.")

    def __call__(self, x: Tensor, seed: int, rows: slice | None = None, of: int | None = None) -> Tensor:
        """x (N, C, H, W) as `seed` changes it, in its own dtype; with rotate or zoom float32 in the same range.

        A rank that holds only some `rows` of a batch of `of` samples gets what one process would have made of them.
        torch's global random state is neither read nor changed.
        """
        if self == Augment():
            return x
        drawn = self.draw(seed, len(x) if of is None else of, *x.shape[2:])
        drawn = drawn if rows is None else drawn[rows]
        if len(drawn) != len(x):
            raise DecompkError(f"{len(x)} images are not the rows {rows} of a batch of {of}; make them agree.")
        change = drawn.to(x.device, non_blocking=True).unbind(1)
        return _warped(x, *change) if self.rotate or self.zoom else _moved(x, *change[:3])

    def draw(self, seed: int, n: int, height: int, width: int) -> Tensor:
        """(n, 5) on the CPU: −1 if flipped or 1, pixels down, pixels right, radians anticlockwise, magnification.

        What is drawn for one of them does not depend on the others.
        """
        uniform = torch.rand(n, 5, generator=torch.Generator().manual_seed(seed))
        sign = 1 - 2.0 * (uniform[:, 0] < 0.5) if self.flip else torch.ones(n)
        most = torch.tensor([int(self.shift * height), int(self.shift * width)])
        pixels = (uniform[:, 1:3] * (2 * most + 1)).floor() - most
        spread = torch.tensor([math.radians(self.rotate), self.zoom])
        angle, zoom = ((2 * uniform[:, 3:] - 1) * spread).unbind(1)
        return torch.stack([sign, *pixels.unbind(1), angle, 1 + zoom], 1)


def _moved(x: Tensor, sign: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Flip and shift: every pixel of the result is one of x."""
    height, width = x.shape[2:]
    row = (torch.arange(height, device=x.device) - down[:, None]).clamp(0, height - 1).long()
    column = (torch.arange(width, device=x.device) - right[:, None]).clamp(0, width - 1).long()
    column = torch.where(sign[:, None] < 0, width - 1 - column, column)
    source = (row[:, :, None] * width + column[:, None, :]).flatten(1)
    return x.flatten(2).gather(2, source[:, None].expand(-1, x.shape[1], -1)).view(x.shape)


def _warped(x: Tensor, sign: Tensor, down: Tensor, right: Tensor, angle: Tensor, factor: Tensor) -> Tensor:
    """All of it as one bilinear sampling: where each pixel of the result lies in x, from the centre, in pixels."""
    height, width = x.shape[2:]
    sign, down, right, angle, factor = (t[:, None, None] for t in (sign, down, right, angle, factor))
    y = (torch.arange(height, device=x.device) - (height - 1) / 2)[:, None] - down
    z = (torch.arange(width, device=x.device) - (width - 1) / 2) - right
    cos, sin = torch.cos(angle) / factor, torch.sin(angle) / factor
    grid = torch.stack([sign * (cos * z - sin * y) * (2 / width), (sin * z + cos * y) * (2 / height)], -1)
    return F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


def normalise(x: Tensor, mean: Sequence[float] | Tensor, scale: bool | None = None) -> Tensor:
    """x (…, C, H, W) minus the mean of each channel, float32; first divided by 255 with `scale`.

    scale: None = whether x is uint8; True for what augmenting uint8 has turned into floats.
    """
    mean = torch.as_tensor(mean, dtype=torch.float32)
    if mean.shape != x.shape[-3:-2]:
        raise DecompkError(
            f"the mean has the shape {tuple(mean.shape)}; images of {x.shape[-3]} channels need one each."
        )
    scale = x.dtype == torch.uint8 if scale is None else scale
    x = x.float()
    x = x / 255 if scale else x
    return x - mean.to(x.device, non_blocking=True)[:, None, None]
