"""What the forms on torch's own operators share: layouts between, and what stands around a convolution in steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from ...cost.formulas import conv_bytes, conv_flops
from ..device import Device
from ..layout import cut
from ..problem import PLAIN, PLAIN_GRADIENT, Epilogue, Geometry, GradientEpilogue, Offsets, Problem, Prologue
from .form import PlainForm, Prediction, matrix_rate
from .steps import after, before, folded

CUDNN_SLOWDOWN = 1.5  # not measured


class TorchForm(PlainForm, ABC):
    """A form without Configs, on any device. x (K, N, C, H, W), weight (K, O, C, kh, kw): as torch's operators take."""

    name: str
    backend = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")

    @abstractmethod
    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, differentiable: bool = False
    ) -> Tensor:
        """→ (K, N, O, H', W'), its strides as they come. differentiable: torch's autograd may run behind it."""

    @abstractmethod
    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dx, dweight) as wanted, one of them or both, their strides as they come; None for what is not."""

    @abstractmethod
    def predicted(self, problem: Problem, moved: float, computed: float) -> tuple[float, str]:
        """Milliseconds and reason; moved, computed: milliseconds of the compulsory bytes, and of the arithmetic."""

    def why_not(self, problem: Problem, config: None, device: Device) -> str | None:
        return None

    def predict(self, problem: Problem, config: None, device: Device) -> Prediction:
        moved = conv_bytes(problem) / device.memory_gbps / 1e6
        return Prediction(*self.predicted(problem, moved, conv_flops(problem) / matrix_rate(problem, device) / 1e9))

    def fprop(
        self,
        problem: Problem,
        config: None,
        x: Tensor,
        weight: Tensor,
        y: Tensor,
        epilogue: Epilogue = PLAIN,
        prologue: Prologue | None = None,
        offsets: Offsets | None = None,
    ) -> Tensor:
        if epilogue.residual is not None:
            epilogue = replace(epilogue, residual=epilogue.residual.movedim(-1, 2))
        if epilogue.bias is not None:
            epilogue = replace(epilogue, bias=epilogue.bias.to(x.dtype))
        x, weight = _members(problem, x, offsets), weight.to(x.dtype).movedim(-1, 2)
        return self.around(x, weight, _geometry(problem), epilogue, prologue).movedim(2, -1)

    def dgrad(
        self,
        problem: Problem,
        config: None,
        dy: Tensor,
        weight: Tensor,
        dx: Tensor,
        epilogue: GradientEpilogue = PLAIN_GRADIENT,
    ) -> Tensor:
        x = dx.movedim(-1, 2)  # its values are not read
        weight = weight.to(dy.dtype).movedim(-1, 2)
        found, _ = self.backward(dy.movedim(-1, 2), x, weight, _geometry(problem), (True, False))
        assert found is not None
        return found.movedim(2, -1)

    def wgrad(
        self, problem: Problem, config: None, dy: Tensor, x: Tensor, out: Tensor, offsets: Offsets | None = None
    ) -> Tensor:
        # The weight's values are not read.
        x, weight = _members(problem, x, offsets), torch.empty_like(out, dtype=x.dtype).movedim(-1, 2)
        _, found = self.backward(dy.movedim(-1, 2), x, weight, _geometry(problem), (False, True))
        assert found is not None
        return found.movedim(2, -1)

    def around(
        self,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        epilogue: Epilogue,
        prologue: Prologue | None,
        differentiable: bool = False,
    ) -> Tensor:
        """`convolve` with what stands around it; residual and result (K, N, O, H', W')."""
        weight, epilogue = folded(weight, epilogue)
        return after(self.convolve(before(x, prologue), weight, epilogue.bias, geometry, differentiable), epilogue)


def _geometry(problem: Problem) -> Geometry:
    return problem.stride, problem.padding, problem.dilation


def _members(problem: Problem, x: Tensor, offsets: Offsets | None) -> Tensor:
    """(K, N, C, H, W) of the view that a kernel reads."""
    x = x.movedim(-1, 2)
    return x if offsets is None else cut(x, (problem.H, problem.W, *chain(*offsets.starts)))
