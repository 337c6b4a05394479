"""What stands around a convolution by torch's own operators, one step after the other, for forms without their own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..problem import Epilogue, Prologue


def before(x: Tensor, prologue: Prologue | None) -> Tensor:
    """relu(x · scale + shift) of x (K, N, C, H, W), where there is a prologue."""
    if prologue is None:
        return x
    value = x * _channels(prologue.scale) + _channels(prologue.shift)
    return (value.relu() if prologue.relu else value).to(x.dtype)


def folded(weight: Tensor, epilogue: Epilogue) -> tuple[Tensor, Epilogue]:
    """weight (K, O, …) and bias with the epilogue's scale and shift in them, and what is left of the epilogue."""
    e = epilogue
    if e.scale is None or e.shift is None:
        return weight, e
    bias = (e.shift if e.bias is None else e.shift + e.bias * e.scale).to(weight.dtype)
    scale = e.scale.view(*e.scale.shape, *(1,) * (weight.dim() - 2))
    return (weight * scale).to(weight.dtype), replace(e, bias=bias, scale=None, shift=None)


def after(y: Tensor, epilogue: Epilogue) -> Tensor:
    """y (K, N, O, H', W') with its moments taken, the residual, laid as y, added, and the ReLU."""
    if epilogue.moments is not None:
        epilogue.moments.copy_(moments_of(y))
    if epilogue.residual is not None:
        y = y + epilogue.residual
    return y.relu() if epilogue.relu else y


def moments_of(y: Tensor) -> Tensor:
    """(K, 1, 3, C): count, mean and Σ(y − mean)² over samples and pixels, float32 (float64 for float64)."""
    value = y if y.dtype == torch.float64 else y.float()
    variance, mean = torch.var_mean(value, (1, 3, 4), correction=0)
    count = torch.full_like(mean, y.numel() // mean.numel())
    return torch.stack((count, mean, variance * count), 1).unsqueeze(1)


def moments_passes(result: int, element_size: int) -> tuple[int, int]:
    """Launches and bytes of `moments_of`, and of the copy into what it is wanted in, for a y of `result` bytes."""
    if element_size == 4:
        return 5, result
    return 6, result + 2 * (4 * result // element_size)  # a float32 copy is written and read


def _channels(t: Tensor) -> Tensor:
    """(K, C) against (K, N, C, H, W)."""
    return t[:, None, :, None, None]
