"""The gradient of a subsampling: every s-th pixel of every s-th row, zero between them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .problem import cdiv

BLOCK = 1024


@triton.jit
def spread_kernel(
    g, dx, SIZE, H, W, C, HO, WO, SH: tl.constexpr, SW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx (N, H, W, C) of g (N, HO, WO, C)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pixel = i // C
    w = pixel % W
    h = pixel // W % H
    read = (i < SIZE) & (h % SH == 0) & (w % SW == 0)
    at = ((pixel // (W * H) * HO + h // SH) * WO + w // SW) * C + i % C
    tl.store(dx + i, tl.load(g + at, read, 0.0), i < SIZE)


def launch_spread(g: Tensor, dx: Tensor, stride: tuple[int, int]) -> None:
    """g (N, C, H', W') to every stride-th pixel of dx (N, C, H, W), both channels_last."""
    sizes = dict(H=dx.shape[2], W=dx.shape[3], C=dx.shape[1], HO=g.shape[2], WO=g.shape[3], SIZE=dx.numel())
    grid = (cdiv(dx.numel(), BLOCK),)
    launch(spread_kernel, grid, 4, 1, g=g, dx=dx, SH=stride[0], SW=stride[1], BLOCK=BLOCK, **sizes)
