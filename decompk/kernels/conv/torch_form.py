"""What the forms on torch's own operators share: layouts between, and what stands around a convolution in steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from itertools import chain
from math import prod

import torch
from torch import Tensor

from ...cost.formulas import conv_bytes
from ..device import Device
from ..layout import cut
from ..problem import PLAIN, Epilogue, Geometry, Offsets, Problem, Prologue, cdiv, power_of_two
from .form import PlainForm, Prediction, matrix_rate, merge_ms
from .model import LAUNCH_MS, Work
from .steps import after, before, folded

CUDNN_SLOWDOWN = 1.5  # not measured
ROWS, COLUMNS, DEPTH_BYTES, STAGES = 128, 128, 64, 3  # of a library's tile of a product, and of one step along its sum
LIBRARY_CTAS = 2  # that a multiprocessor holds at once


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
    def predicted(self, problem: Problem, device: Device) -> tuple[int, dict[str, float], str]:
        """Launches, milliseconds of what they do one after the other, and reason."""

    def why_not(self, problem: Problem, config: None, device: Device) -> str | None:
        return None

    def predict(self, problem: Problem, config: None, device: Device) -> Prediction:
        """As the form says, and what is fused in passes of its own over the result."""
        launches, spent, reason = self.predicted(problem, device)
        if problem.fused:
            passes, moved = _fused_apart(problem)
            launches += passes
            spent["moments"] = copied_ms(moved, device) + merge_ms(problem, 1, device)
            reason += f", {problem.fused} by {passes} more"
        terms = {"launches": launches * LAUNCH_MS, **spent}
        return Prediction(sum(terms.values()), reason, None, tuple((name, ms) for name, ms in terms.items() if ms))

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

    def dgrad(self, problem: Problem, config: None, dy: Tensor, weight: Tensor, dx: Tensor) -> Tensor:
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


def result_bytes(problem: Problem) -> int:
    """Of y, dx or dweight."""
    p = problem
    y, x, weight = p.N * p.O * prod(p.out_size), p.N * p.C * p.H * p.W, p.O * p.C * p.taps
    return p.K * {"fprop": y, "dgrad": x, "wgrad": weight}[p.kind] * p.element_size


def copied_ms(moved: float, device: Device) -> float:
    """Milliseconds of so many bytes of device memory."""
    return moved / device.memory_gbps / 1e6


def product_ms(problem: Problem, device: Device, split: bool, slowdown: float = CUDNN_SLOWDOWN) -> float:
    """Milliseconds of K matrix products of a library in one launch: tiles of a small output do not fill a GPU.

    split: whether several CTAs share a sum where there are too few. slowdown: beside the model's own tiles.
    """
    p = problem
    y, x, taps = p.N * prod(p.out_size), p.N * p.H * p.W, p.C * p.taps
    rows, columns, depth = {
        "fprop": (y, p.O, taps),
        "dgrad": (x, p.C, cdiv(p.O * p.taps, prod(p.stride))),
        "wgrad": (p.O, taps, y),
    }[p.kind]
    tile = power_of_two(min(rows, ROWS), 16), power_of_two(min(columns, COLUMNS), 16)
    products = p.K * cdiv(rows, tile[0]) * cdiv(columns, tile[1])
    splits = max(1, LIBRARY_CTAS * device.processors // products) if split else 1
    work = Work(
        programs=products * splits,
        ctas=LIBRARY_CTAS,
        memory_bytes=conv_bytes(p),
        l2_bytes=products * sum(tile) * depth * p.element_size,
        step_bytes=sum(tile) * DEPTH_BYTES * STAGES,
        flops=2 * products * prod(tile) * depth,
        tflops=matrix_rate(p, device),
    )
    return slowdown * work.run(device)[0]


def _fused_apart(problem: Problem) -> tuple[int, int]:
    """Launches and bytes of what is fused, where it takes passes of its own over the result."""
    if problem.fused == "moments":
        return 1, result_bytes(problem)  # y is read again
    return 1, 2 * result_bytes(problem)  # dx and x̂ are read


def _geometry(problem: Problem) -> Geometry:
    return problem.stride, problem.padding, problem.dilation


def _members(problem: Problem, x: Tensor, offsets: Offsets | None) -> Tensor:
    """(K, N, C, H, W) of the view that a kernel reads."""
    x = x.movedim(-1, 2)
    return x if offsets is None else cut(x, (problem.H, problem.W, *chain(*offsets.starts)))
