"""Pooling in a fused network, where torch's own takes more launches and bytes than there is to do."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import cpu_pool
from ..kernels.backend import runs_triton
from ..kernels.call import follows, runs_cpu, settle, unwatched
from ..kernels.problem import Pair
from .fused_layer import unchanged


def pools(module: nn.Module) -> bool:
    """Whether there is something better than torch's own."""
    if type(module) is nn.AdaptiveAvgPool2d:
        return module.output_size in (1, (1, 1))
    if type(module) is not nn.MaxPool2d or module.return_indices or module.ceil_mode:
        return False
    window = window_of(module)
    if any(len(pair) != 2 for pair in window):
        return False  # an empty stride is the kernel's size to torch
    (kh, kw), stride, padding = window
    if not all(type(n) is int for n in (*sum(window, ()), *_pair(module.dilation))):
        return False  # torch says what is wrong with them
    fits = all(0 <= 2 * p <= k for k, p in zip((kh, kw), padding, strict=True))
    return 0 < kh * kw < 255 and min(stride) > 0 and fits and _pair(module.dilation) == (1, 1)


def run_pool(x: Tensor, pool: nn.Module) -> Tensor:
    """`pool(x)`, x (K·N, C, H, W)."""
    if not (unchanged(pool, type(pool)) and pools(pool) and x.dim() == 4 and unwatched(x)):
        return pool(x)
    on_cpu = runs_cpu(x)
    if not (runs_triton(x) or (on_cpu and isinstance(pool, nn.MaxPool2d))):
        return pool(x)
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        return _Mean.apply(x)
    kernel, stride, _ = window = window_of(pool)
    if not _meet(x, window):
        return pool(x)
    if kernel == (1, 1) and not on_cpu:
        return _Subsample.apply(x, stride)
    return _MaxPool.apply(settle(x), cpu_pool if on_cpu else _kernels(), *window)


def cpu_pools(x: Tensor, pool: nn.Module) -> bool:
    """Whether `run_pool(x, pool)` is one of `cpu_pool`'s on a CPU."""
    known = type(pool) is nn.MaxPool2d and unchanged(pool, nn.MaxPool2d) and pools(pool) and x.dim() == 4
    return known and runs_cpu(x) and _meet(x, window_of(pool))


def _meet(x: Tensor, window: tuple[Pair, Pair, Pair]) -> bool:
    """Whether every window meets the images."""
    kernel, _, padding = window
    return x.numel() > 0 and all(n + 2 * p >= k for n, k, p in zip(x.shape[2:], kernel, padding, strict=True))


def window_of(pool: Any) -> tuple[Pair, Pair, Pair]:
    """Kernel, stride and padding."""
    return _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding)


def _pair(value: Any) -> Pair:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * 2 if len(values) == 1 else values


class _Mean(torch.autograd.Function):
    """Over an image."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        pixels, spread = ctx.shape[2] * ctx.shape[3], dy.expand(ctx.shape)
        if follows(dy) or not unwatched(dy):
            return spread / pixels
        dx = torch.empty(ctx.shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
        return torch.div(spread, pixels, out=dx)  # as layers below read it, and memory of its own for hooks


class _Subsample(torch.autograd.Function):
    """A maximum of single pixels."""

    @staticmethod
    def forward(ctx, x: Tensor, stride: Pair) -> Tensor:
        ctx.shape, ctx.stride = x.shape, stride
        return x[..., :: stride[0], :: stride[1]].clone(memory_format=torch.channels_last)  # x's own where stride is 1

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        if follows(dy) or not unwatched(dy):
            dx = dy.new_zeros(ctx.shape)
            dx[..., :: ctx.stride[0], :: ctx.stride[1]] = dy
            return dx, None
        return _kernels().launch_spread(settle(dy), ctx.shape, ctx.stride), None


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kernels: ModuleType, *window: Pair) -> Tensor:
        y, place = kernels.launch_max_pool(x, *window)
        ctx.shape, ctx.window, ctx.kernels = x.shape, window, kernels
        ctx.save_for_backward(place)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        if not (follows(dy) or not unwatched(dy, place)):
            dx = ctx.kernels.launch_max_unpool(settle(dy), settle(place), ctx.shape, *ctx.window)
            return dx, *(None,) * 4
        kernel, stride, padding = ctx.window
        rows, columns = (
            torch.arange(n, device=dy.device) * s - p for n, s, p in zip(dy.shape[2:], stride, padding, strict=True)
        )
        row, column = place // kernel[1] + rows[:, None], place % kernel[1] + columns
        like = dy.new_empty(ctx.shape)
        around = *ctx.window, (1, 1), False, row * ctx.shape[3] + column
        return torch.ops.aten.max_pool2d_with_indices_backward(dy, like, *around), *(None,) * 4


def _kernels() -> ModuleType:
    from ..kernels import pool  # triton loads with it

    return pool
