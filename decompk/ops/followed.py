"""Backwards that are differentiated or batched themselves: by torch's own operators, which bear that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.backend import exact, resumed
from ..kernels.conv import named
from ..kernels.conv.loop import convolution
from ..kernels.conv.torch_form import TorchForm
from ..kernels.layout import cut
from ..kernels.problem import Pair


def gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Any, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients that are wanted of `function(*inputs)`, given those of its outputs; None for the others.

    function: made of torch's own operators. Differentiable again where a graph is wanted.
    """
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [_own(t) if wants else t for t, wants in zip(inputs, wanted, strict=True)]
        outputs = function(*inputs)
    several = zip(outputs, grads, strict=True) if isinstance(outputs, tuple) else [(outputs, grads)]
    ends = [(y, g) for y, g in several if g is not None]
    sought = [t for t, wants in zip(inputs, wanted, strict=True) if wants]
    if not sought or not ends:
        return [None] * len(inputs)
    outputs, grads = zip(*ends, strict=True)
    found = iter(torch.autograd.grad(outputs, sought, grads, create_graph=graph, allow_unused=True))
    return [next(found) if wants else None for wants in wanted]


def _own(t: Tensor) -> Tensor:
    """A view, since one tensor may be two inputs, each of which has its own gradient."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def conv_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Sequence[Sequence[int]],
    wanted: Sequence[bool],
    backend: str,
    window: Sequence[int] = (),
) -> list[Tensor | None]:
    """dx, dweight, dbias of `grouped_conv2d` as wanted; backend: what the forward noted (`backend.noted`).

    With a window, of `layout.cut`, x is the image that all members share.
    """

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return by_torch(cut(x, window) if window else x, weight, None, *geometry)

    with resumed(backend):
        dx, dw = gradients(convolve, (x, weight), dy, wanted[:2])
    return [dx, dw, dy.sum((1, 3, 4)) if wanted[2] else None]


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """`grouped_conv2d` for whatever follows torch's own operators: any derivative, torch.func, an export.

    Also where members' channels are grouped again: weight (K, O, C / groups, kh, kw).
    """
    if (groups := x.shape[2] // weight.shape[2]) > 1:
        members = zip(x, weight, [None] * len(x) if bias is None else bias, strict=True)
        return torch.stack([convolution(*one, (stride, padding, dilation), groups, True) for one in members])
    return torch_form(x.dtype).convolve(x, weight, bias, (stride, padding, dilation), differentiable=True)


def activated(y: Tensor, relu: int) -> Tensor:
    """y past a ReLU (1), a ReLU6 (6) or none (0)."""
    return F.hardtanh(y, 0.0, float(relu)) if relu > 1 else y.relu() if relu else y


def torch_form(dtype: torch.dtype) -> TorchForm:
    """The form on torch's operators that computes what members alone would where that is asked for."""
    return named("loop" if exact(dtype) else "grouped")
