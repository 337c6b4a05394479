"""The grouped form: torch's own grouped convolution, with the members as channel groups of one image."""

from __future__ import annotations

from torch import Tensor

from ...cost.formulas import conv_bytes
from ..device import Device
from ..layout import side_by_side
from ..problem import Geometry, Problem
from ..torch_limits import mixes_groups
from .loop import Loop, convolution, gradients
from .torch_form import TorchForm, copied_ms, product_ms

GROUPED_SLOWDOWN = 3.0  # of cuDNN's: a tile project's public figure, 19.7 against 6.6 µs


class Grouped(TorchForm):
    """One call; member-major activations are copied to channel groups and back. In turn where torch mixes groups."""

    name = "grouped"

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, differentiable: bool = False
    ) -> Tensor:
        if mixes_groups(x, len(x), *weight.shape[1:3]):
            return Loop().convolve(x, weight, bias, geometry, differentiable)
        bias = None if bias is None else bias.flatten()
        y = convolution(side_by_side(x), weight.flatten(0, 1), bias, geometry, len(x), differentiable)
        return y.unflatten(1, weight.shape[:2]).movedim(1, 0)

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        K = len(x)
        if mixes_groups(x, K, *weight.shape[1:3]):
            return Loop().backward(dy, x, weight, geometry, wanted)
        dx, dw = gradients(side_by_side(dy), side_by_side(x), weight.flatten(0, 1), geometry, K, wanted)
        return (
            None if dx is None else dx.unflatten(1, (K, x.shape[2])).movedim(1, 0),
            None if dw is None else dw.view(weight.shape),
        )

    def predicted(self, problem: Problem, device: Device) -> tuple[int, dict[str, float], str]:
        spent = {"library": product_ms(problem, device, problem.kind == "wgrad", GROUPED_SLOWDOWN)}
        if problem.layout == "channel-grouped":
            return 1, spent, "one grouped call"
        spent["memory"] = copied_ms(2 * conv_bytes(problem), device)
        return 3, spent, "one grouped call, copied to channel groups and back"
