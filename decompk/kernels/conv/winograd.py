"""The Winograd form: C++ for processors, 3×3 of stride 1 with fewer products (kernels/cpu/winograd.h)."""

from __future__ import annotations

from ..device import Device
from ..problem import Problem
from .direct import Direct


class Winograd(Direct):
    """Tiles of the image transformed, multiplied and transformed back."""

    name = "winograd"
    functions = "winograd_dgrad", "winograd_wgrad"

    def why_not(self, problem: Problem, config: None, device: Device) -> str | None:
        if reason := super().why_not(problem, config, device):
            return reason
        if problem.kernel != (3, 3) or problem.stride != (1, 1):
            return "it is not 3×3 with stride 1"
        if problem.C % 8 or problem.O % 8:
            return f"{problem.C} or {problem.O} channels are no multiple of 8"
        return None
