"""Pooling in as few bytes as it has: a maximum's place in its window is one byte, not a pixel's number of eight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .layout import output_shape
from .problem import Pair, cdiv

BLOCK = 1024


@triton.jit
def max_pool_kernel(
    x, y, place, SIZE, C, H, W, HO, WO,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y (N, HO, WO, C) of x (N, H, W, C), and where in its window each maximum is, the first of equals, or a NaN."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pixel = i // C
    image = pixel // (WO * HO) * H
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = tl.full((BLOCK,), -1, tl.int32)
    for tap in tl.static_range(KH * KW):
        h = pixel // WO % HO * SH + (tap // KW - PH)
        w = pixel % WO * SW + (tap % KW - PW)
        inside = (i < SIZE) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        value = tl.load(x + ((image + h) * W + w) * C + i % C, inside, 0.0).to(tl.float32)
        wins = inside & ((value > best) | (value != value) | (at < 0))
        best = tl.where(wins, value, best)
        at = tl.where(wins, tap, at)
    tl.store(y + i, best, i < SIZE)
    tl.store(place + i, at.to(tl.uint8), i < SIZE)


@triton.jit
def max_unpool_kernel(
    dy, place, dx, SIZE, C, H, W, HO, WO,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx (N, H, W, C) of dy (N, HO, WO, C): what every window whose maximum a pixel is passes on to it."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pixel = i // C
    image = pixel // (W * H) * HO
    total = tl.zeros((BLOCK,), tl.float32)
    for tap in tl.static_range(KH * KW):
        h = pixel // W % H + (PH - tap // KW)
        w = pixel % W + (PW - tap % KW)
        met = (i < SIZE) & (h >= 0) & (w >= 0) & (h % SH == 0) & (w % SW == 0) & (h // SH < HO) & (w // SW < WO)
        at = ((image + h // SH) * WO + w // SW) * C + i % C
        met = met & (tl.load(place + at, met, 255) == tap)
        total += tl.load(dy + at, met, 0.0).to(tl.float32)
    tl.store(dx + i, total, i < SIZE)


@triton.jit
def spread_kernel(
    g, dx, SIZE, C, H, W, HO, WO, SH: tl.constexpr, SW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx (N, H, W, C) of g (N, HO, WO, C): at every SH-th row and SW-th column, zero between them."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pixel = i // C
    h = pixel // W % H
    w = pixel % W
    read = (i < SIZE) & (h % SH == 0) & (w % SW == 0)
    at = ((pixel // (W * H) * HO + h // SH) * WO + w // SW) * C + i % C
    tl.store(dx + i, tl.load(g + at, read, 0.0), i < SIZE)


def launch_max_pool(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> tuple[Tensor, Tensor]:
    """x (N, C, H, W) → y (N, C, H', W') and the places of its maxima, uint8; all channels_last."""
    N, C, *_ = x.shape
    size = output_shape((1, *x.shape), (1, C, C, *kernel), stride, padding, (1, 1))[3:]
    y, place = (_empty((N, C, *size), x, dtype) for dtype in (x.dtype, torch.uint8))
    _over(max_pool_kernel, y, x, y, x=x, y=y, place=place, **_window(kernel, stride, padding))
    return y, place


def launch_max_unpool(
    dy: Tensor, place: Tensor, shape: torch.Size, kernel: Pair, stride: Pair, padding: Pair
) -> Tensor:
    """dx (N, C, H, W) of dy and the places of the maxima (N, C, H', W'); all channels_last."""
    dx = _empty(shape, dy, dy.dtype)
    _over(max_unpool_kernel, dx, dx, dy, dy=dy, place=place, dx=dx, **_window(kernel, stride, padding))
    return dx


def launch_spread(g: Tensor, shape: torch.Size, stride: Pair) -> Tensor:
    """g (N, C, H', W') at every stride-th pixel of dx (N, C, H, W), zero between them; both channels_last."""
    dx = _empty(shape, g, g.dtype)
    _over(spread_kernel, dx, dx, g, g=g, dx=dx, SH=stride[0], SW=stride[1])
    return dx


def _empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _over(kernel, written: Tensor, image: Tensor, pooled: Tensor, **arguments) -> None:
    """Launch `kernel` over the values of `written`."""
    sizes = dict(SIZE=written.numel(), C=image.shape[1], H=image.shape[2], W=image.shape[3])
    grid = (cdiv(written.numel(), BLOCK),)
    launch(kernel, grid, 4, 1, HO=pooled.shape[2], WO=pooled.shape[3], BLOCK=BLOCK, **sizes, **arguments)


def _window(kernel: Pair, stride: Pair, padding: Pair) -> dict[str, int]:
    pairs = dict(K=kernel, S=stride, P=padding)
    return {name + axis: pair[i] for name, pair in pairs.items() for i, axis in enumerate("HW")}
