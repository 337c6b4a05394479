"""The grouped form: torch's own grouped convolution, with the members as channel groups of one image."""

from __future__ import annotations

from torch import Tensor

from ..layout import side_by_side
from ..problem import Geometry, Problem
from ..torch_limits import mixes_groups
from .form import LAUNCH_MS
from .loop import Loop, convolution, gradients
from .torch_form import TorchForm

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

    def predicted(self, problem: Problem, moved: float, computed: float) -> tuple[float, str]:
        lies_so = problem.layout == "channel-grouped"
        ms = LAUNCH_MS + GROUPED_SLOWDOWN * max(moved, computed) + (0 if lies_so else 2 * moved)
        return ms, "one grouped call" + ("" if lies_so else ", copied to channel groups and back")
