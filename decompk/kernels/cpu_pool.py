"""Max-pooling of images on a CPU, as `pool` has it for Triton."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .layout import output_shape
from .problem import Pair


def launch_max_pool(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> tuple[Tensor, Tensor]:
    """x (N, C, H, W) → y (N, C, H', W') and the places of its maxima, uint8; all channels_last."""
    size, sizes = sizes_of(x.shape, kernel, stride, padding)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    place = torch.empty(size, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)
    cpu.max_pool(x, y, place, sizes)
    return y, place


def launch_max_unpool(
    dy: Tensor, place: Tensor, shape: torch.Size, kernel: Pair, stride: Pair, padding: Pair
) -> Tensor:
    """dx (N, C, H, W) of dy and the places of the maxima (N, C, H', W'); all channels_last."""
    dx = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    cpu.max_unpool(dy, place, dx, sizes_of(shape, kernel, stride, padding)[1])
    return dx


@functools.lru_cache(maxsize=256)
def sizes_of(shape: torch.Size, kernel: Pair, stride: Pair, padding: Pair) -> tuple[tuple[int, ...], Any]:
    """The pooled images' sizes, and what the kernels take."""
    N, C, H, W = shape
    rows, columns = output_shape((1, *shape), (1, C, C, *kernel), stride, padding, (1, 1))[3:]
    return (N, C, rows, columns), cpu.sizes((1, N, C, C, H, W, *kernel, *stride, *padding, rows, columns))
