"""The direct form: C++ for processors, all passes, float32, member-major (kernels/cpu/direct.h)."""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import Tensor

from .. import cpu
from ..device import Device
from ..problem import PLAIN, Epilogue, Offsets, Problem, Prologue
from .form import PlainForm, Prediction
from .steps import after, before, folded

_NO_NORM = (None,) * 4


class Direct(PlainForm):
    """Sums of products in registers, tap by tap; a bias is added there, residual and ReLU while it is in cache."""

    name = "direct"
    backend = "cpu"
    devices: tuple[str, ...] = ("cpu",)
    functions = "dgrad", "wgrad"  # of the C++ library

    def missing(self) -> str | None:
        return cpu.why_not()

    def why_not(self, problem: Problem, config: None, device: Device) -> str | None:
        p = problem
        if p.dtype != "float32":
            return f"it is in {p.dtype}, not float32"
        if p.layout != "member":
            return "its activations are not member-major"
        if p.dilation != (1, 1):
            return "it is dilated"
        return None

    def predict(self, problem: Problem, config: None, device: Device) -> Prediction:
        """Nothing: on a processor it is measured."""
        return Prediction(math.nan, "")

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
        if prologue is not None:
            x = before(x.movedim(-1, 2), prologue).movedim(2, -1).contiguous()
        if epilogue.scale is not None:
            weight, epilogue = folded(weight, epilogue)
        bias = None if epilogue.bias is None else epilogue.bias.contiguous()
        by, added = None if bias is None else bias.data_ptr(), epilogue.residual
        read = x.data_ptr(), weight.data_ptr(), by, *_NO_NORM, None if added is None else added.data_ptr()
        how = epilogue.relu, 0.0, 0.0, cpu.BY[self.name], sizes_of(problem)
        cpu.library().layer(*read, y.data_ptr(), None, None, *how)
        if epilogue.moments is None:
            return y
        return after(y.movedim(-1, 2), Epilogue(moments=epilogue.moments)).movedim(2, -1)

    def dgrad(self, problem: Problem, config: None, dy: Tensor, weight: Tensor, dx: Tensor) -> Tensor:
        function = getattr(cpu.library(), self.functions[0])
        function(dy.data_ptr(), weight.data_ptr(), dx.data_ptr(), sizes_of(problem))
        return dx

    def wgrad(
        self, problem: Problem, config: None, dy: Tensor, x: Tensor, out: Tensor, offsets: Offsets | None = None
    ) -> Tensor:
        function = getattr(cpu.library(), self.functions[1])
        function(x.data_ptr(), dy.data_ptr(), out.data_ptr(), sizes_of(problem))
        return out


@functools.lru_cache(maxsize=4096)
def sizes_of(problem: Problem) -> Any:
    """A convolution as the kernels take it: Shape in conv.h."""
    p = problem
    values = (p.K, p.N, p.C, p.O, p.H, p.W, *p.kernel, *p.stride, *p.padding, *p.out_size)
    return cpu.sizes(values)
