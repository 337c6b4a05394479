"""Pooling in a fused network on a GPU, where torch's own takes more launches and bytes than there is to do."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.call import follows, settle, unwatched
from .fused_layer import on_kernels, unchanged


def fused_pool(pool: nn.Module) -> type[torch.autograd.Function] | None:
    """What computes `pool`, where there is something better than torch's own."""
    if type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1)):
        return _Mean
    if type(pool) is nn.MaxPool2d and pool.kernel_size in (1, (1, 1)) and pool.padding in (0, (0, 0)):
        return None if pool.return_indices else _Subsample
    return None


def run_pool(x: Tensor, pool: nn.Module) -> Tensor:
    """`pool(x)`, x (K·N, C, H, W)."""
    function = fused_pool(pool)
    if function is None or not (unchanged(pool, type(pool)) and on_kernels(x) and x.dim() == 4 and unwatched(x)):
        return pool(x)
    if function is _Mean:
        return _Mean.apply(x)
    stride: Any = pool.stride
    return _Subsample.apply(x, stride if isinstance(stride, tuple) else (stride, stride))


class _Mean(torch.autograd.Function):
    """Over an image; the gradient of a pixel is a view, written by whoever needs it in memory."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return (dy / (ctx.shape[2] * ctx.shape[3])).expand(ctx.shape)


class _Subsample(torch.autograd.Function):
    """A max-pool whose windows are single pixels, without the index of each, which takes 8 bytes."""

    @staticmethod
    def forward(ctx, x: Tensor, stride: tuple[int, int]) -> Tensor:
        ctx.shape, ctx.stride = x.shape, stride
        return x[..., :: stride[0], :: stride[1]].contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        if follows(dy) or not unwatched(dy):
            dx = dy.new_zeros(ctx.shape)
            dx[..., :: ctx.stride[0], :: ctx.stride[1]] = dy
            return dx, None
        dx = torch.empty(ctx.shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
        _kernels().launch_spread(settle(dy), dx, ctx.stride)
        return dx, None


def _kernels() -> ModuleType:
    from ..kernels import pool  # triton loads with it

    return pool
