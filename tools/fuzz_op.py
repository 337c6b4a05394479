"""What tools/fuzz.py knows of an operator that it draws problems of.

A problem is a flat dict that JSON can hold: an operator's sizes and options, and those of `fuzz_check`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from decompk.kernels.layout import strides_of

Problem = dict  # not decompk.kernels.problem.Problem, which is one convolution of a kernel
Tensors = dict[str, Tensor]
Normal = Callable[..., Tensor]  # (*shape, scale=1) → random values

HOT = ("x", "dy", "residual")
HALVES, FLOATS = ("bfloat16", "float16"), ("float32", "float32", "float32", "float64")


@dataclass(frozen=True)
class Op:
    """An operator. `plain` is what shrinking leads to; `hot` names what may hold NaN and infinities ("dy": gradients).

    Of `torchs`, "_before" is y before its ReLU, which near zero may round to either side, "_sharp" says that there are
    such ReLUs inside, and "_floors" how large a result is beside which its errors count: of gradients, for dy of 1.
    What one NaN makes NaN: `apart` says that no other member's values, and `fewer` names the results in which it may be
    fewer values than in torch's: those of operators that skip products with zero.
    """

    draw: Callable[[random.Random], Problem]
    plain: Problem
    inputs: Callable[[Problem, Normal], Tensors]
    ours: Callable[[Problem, Tensors], Tensors]
    torchs: Callable[[Problem, Tensors], Tensors]
    backends: dict[str, float]
    hot: tuple[str, ...] = ("x", "dy")
    dtypes: tuple[str, ...] = FLOATS + HALVES
    apart: bool = True
    fewer: tuple[str, ...] = ()
    exempt: tuple[str, ...] = ()  # hard inputs that it is not made for


def laid(x: Tensor, layout: str) -> Tensor:
    """x (K, N, C, H, W) laid as "member", "channel-grouped", "first" (channels first) or "gaps" (between values)."""
    if layout == "first":
        return x.contiguous()
    if layout == "gaps":
        return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
    return x.new_empty(x.numel()).as_strided(x.shape, strides_of(layout, x.shape)).copy_(x)


def size(rng: random.Random, most: int, least: int = 1) -> int:
    return rng.choice((least, rng.randint(least, most), rng.randint(least, most)))


def statistics_floors(x: Tensor, mean: str, var: str) -> dict[str, float]:
    """Of values near one mean the deviations, of values around zero the mean are differences of larger numbers."""
    largest = x.detach().abs().nan_to_num(0, 0, 0).max().item() if x.numel() else 0.0
    return {mean: largest, var: 1e-6 * largest**2}
