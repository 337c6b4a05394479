"""How torch's own operators run K layers: "loop" over members, or in one call. Thresholds measured on one CPU core.

Forward + backward in float32, channels_last, 16 samples a member, medians in ms; on a GPU it is always one call.
"""

from __future__ import annotations

import math

import torch

from .backend import exact, sizeless
from .call import watched


def conv_form(
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pointwise: bool,
    in_channels: int,
    out_channels: int,
    positions: int,
    dtype: torch.dtype = torch.float32,
    cuda: bool = False,
) -> str:
    """How K convolutions run: "loop" over members, "grouped" as one call, "matmul" as one batched product.

    The sizes are one member's: `in_channels` of one of its groups, `positions` = samples · output pixels.
    `pointwise` says that a batched product computes the same (1×1, no padding, one group, images). On a GPU it is
    always one launch.
    """
    # 3×3, loop / grouped: 8→8 at 9², K=16 (0.7 M MAC): 14 / 9; 16→16 at 9², K=16 (3 M): 25 / 27; at 35², K=4: 39 / 56.
    if exact(dtype) or sizeless():
        return "loop"
    if cuda:
        return "matmul" if pointwise else "grouped"
    small = positions * out_channels * in_channels * math.prod(kernel) < 2**21
    # 1×1, loop / grouped / matmul: 16→64 at 35², K=4: 24 / 50 / 22; 8→32 at 9², K=16: 16 / 10 / 7; with stride 2,
    # 64→128 at 35², K=4: 54 / 94 / 79; 16→32 at 18², K=16: 31 / 23 / 15.
    if pointwise and (small or set(stride) == {1}):
        return "matmul"
    return "grouped" if small else "loop"


def norm_form(
    elements: int, channels: int, training: bool, dtype: torch.dtype = torch.float32, cuda: bool = False
) -> str:
    """How K batch norms run, "loop" or "grouped": `elements` values and `channels` channels a member."""
    # 8 channels at 9², K=16: 3.2 / 2.3; 64 at 9², K=4: 2.2 / 1.8; 64 at 35², K=4: 22 / 35; 4 at 35², K=16: 35 / 16.
    if exact(dtype) or sizeless():
        return "loop"
    if cuda:
        return "grouped"
    if training:
        return "grouped" if elements < 2**16 or channels < 8 else "loop"
    # Forward alone: 16 channels at 5², K=16: 0.6 / 0.3; 4 at 18², K=16: 2.0 / 2.4; 64 at 9², K=4: 0.47 / 0.58.
    return "grouped" if elements < 2**14 else "loop"


def recurrent_form(mode: str, K: int, dtype: torch.dtype = torch.float32, cuda: bool = False) -> str:
    """How K recurrent layers run: "loop", torch's own in turn, or "together", all of them a step at a time."""
    # oneDNN has LSTMs of its own, and nothing else. 16 steps of 16 samples, two cores, loop / together in ms: LSTM,
    # hidden 64, K=4: 11.5 / 13.9, K=16: 37.3 / 28.6; hidden 16: 6.6 / 9.7, 24.7 / 13.5; GRU, hidden 64: 32.9 / 14.2,
    # 75.5 / 17.7.
    if sizeless():
        return "loop"
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or watched():
        return "together"
    return "loop" if exact(dtype) or (mode == "LSTM" and K <= 8 and not cuda) else "together"


def linear_form(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype = torch.float32, cuda: bool = False
) -> str:
    """How K linear layers run, "loop" or "grouped" as one batched product: the sizes are one member's."""
    # 32→10 on 16 rows, K=16: 1.2 / 0.3; 64→192 on 1024 rows, K=4: 7.3 / 6.7; 512→1000 on 16 rows, K=4: 10 / 25.
    if exact(dtype) or sizeless():
        return "loop"
    if cuda:
        return "grouped"
    return "loop" if rows < 64 and in_features * out_features >= 2**18 else "grouped"
