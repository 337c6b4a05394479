"""Who runs an operation: the choice, from shapes alone, between the forms a member-aware layer has."""

from __future__ import annotations

import math

import torch

# Nobody trains in these for speed: the loop computes, bit for bit, what the members alone compute.
EXACT = (torch.float64, torch.complex128)

# Thresholds: forward + backward on one CPU core, fp32, channels_last, 16 samples a member, medians in ms.


def conv_form(
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pointwise: bool,
    in_channels: int,
    out_channels: int,
    positions: int,
    dtype: torch.dtype = torch.float32,
) -> str:
    """How K convolutions run: "loop" over members, "grouped" as one call, "matmul" as one batched product.

    The sizes are one member's: `in_channels` of one of its groups, `positions` = samples · output pixels.
    `pointwise` says that a batched product computes the same (1×1, no padding, one group, images).
    """
    # 3×3, loop / grouped: 8→8 at 9², K=16 (0.7 M MAC): 14 / 9; 16→16 at 9², K=16 (3 M): 25 / 27; at 35², K=4: 39 / 56.
    if dtype in EXACT:
        return "loop"
    small = positions * out_channels * in_channels * math.prod(kernel) < 2**21
    # 1×1, loop / grouped / matmul: 16→64 at 35², K=4: 24 / 50 / 22; 8→32 at 9², K=16: 16 / 10 / 7; with stride 2,
    # 64→128 at 35², K=4: 54 / 94 / 79; 16→32 at 18², K=16: 31 / 23 / 15.
    if pointwise and (small or set(stride) == {1}):
        return "matmul"
    return "grouped" if small else "loop"


def norm_form(elements: int, channels: int, training: bool, dtype: torch.dtype = torch.float32) -> str:
    """How K batch norms run, "loop" or "grouped": `elements` values and `channels` channels a member."""
    # 8 channels at 9², K=16: 3.2 / 2.3; 64 at 9², K=4: 2.2 / 1.8; 64 at 35², K=4: 22 / 35; 4 at 35², K=16: 35 / 16.
    if dtype in EXACT:
        return "loop"
    if training:
        return "grouped" if elements < 2**16 or channels < 8 else "loop"
    # Forward alone: 16 channels at 5², K=16: 0.6 / 0.3; 4 at 18², K=16: 2.0 / 2.4; 64 at 9², K=4: 0.47 / 0.58.
    return "grouped" if elements < 2**14 else "loop"


def linear_form(rows: int, in_features: int, out_features: int, dtype: torch.dtype = torch.float32) -> str:
    """How K linear layers run, "loop" or "grouped" as one batched product: the sizes are one member's."""
    # 32→10 on 16 rows, K=16: 1.2 / 0.3; 64→192 on 1024 rows, K=4: 7.3 / 6.7; 512→1000 on 16 rows, K=4: 10 / 25.
    if dtype in EXACT:
        return "loop"
    return "loop" if rows < 64 and in_features * out_features >= 2**18 else "grouped"
