"""The loop form: torch's own convolution of one member after the other."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..device import Device
from ..problem import Geometry, Problem
from ..torch_limits import as_torch_can, overruns
from .torch_form import TorchForm, copied_ms, product_ms, result_bytes


class Loop(TorchForm):
    """K launches, whose results are then laid one behind the other."""

    name = "loop"

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, differentiable: bool = False
    ) -> Tensor:
        members = zip(x, weight, [None] * len(x) if bias is None else bias, strict=True)
        return torch.cat([convolution(*member, geometry, 1, differentiable) for member in members]).unflatten(
            0, x.shape[:2]
        )

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        members = [gradients(*member, geometry, 1, wanted) for member in zip(dy, x, weight, strict=True)]
        dx, dw = zip(*members, strict=True)
        return (torch.cat(dx).view(x.shape) if wanted[0] else None), (torch.stack(dw) if wanted[1] else None)

    def predicted(self, problem: Problem, device: Device) -> tuple[int, dict[str, float], str]:
        one = product_ms(replace(problem, K=1), device, split=problem.kind == "wgrad")
        spent = {"library": problem.K * one, "memory": copied_ms(2 * result_bytes(problem), device)}
        return problem.K + 1, spent, f"{problem.K} launches, then side by side in memory"


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int, differentiable: bool
) -> Tensor:
    """torch's own, of x (N, G·C, H, W) and weight (G·O, C, kh, kw)."""
    x, weight = as_torch_can(x, weight, *geometry, differentiable)
    return torch.convolution(x, weight, bias, *geometry, False, (0, 0), groups)


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, groups: int, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight) of `convolution`, as wanted."""
    if 1 in weight.shape and not weight.is_contiguous():  # strides of size 1 mislead torch about the memory format
        weight = weight.contiguous()
    if overruns(x, weight, geometry[0]):
        dy, x, weight = (t.contiguous() for t in (dy, x, weight))
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, False, [0, 0], groups, [*wanted, False])[
        :2
    ]
