"""A linear layer in a fused network, and the ReLU behind it: on a CPU a convolution of images of one pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.call import cpu_takes, runs_cpu
from ..ops.cpu_layer import How, call_of, cpu_layer
from .fused_layer import activate, is_known_relu, relu_of, unchanged
from .linear import PackedLinear
from .twin import batch_rows

MOST = 2**18  # weights of a member: more leave its cache while they are turned over, and a library's product gains
_ONE_PIXEL: Any = ((1, 1), (0, 0), (1, 1))  # stride, padding and dilation


def run_linear(x: Tensor, linear: nn.Module, relu: nn.Module | str | None) -> Tensor:
    """relu(linear(x)); relu: as `run_layer` takes it."""
    how = linear_on_cpu(x, linear, relu)
    if how is not None:
        weight: Any = linear.weight
        return cpu_layer(x[..., None, None], weight[..., None, None], linear.bias, how, relu=relu_of(relu)).flatten(1)
    return activate(linear(x), relu)


def linear_on_cpu(x: Any, linear: Any, relu: nn.Module | str | None) -> How | None:
    """How `cpu_layer` runs it in training, None where it does not; x: rows (K·N, I)."""
    known = is_known_relu(relu) and unchanged(linear, PackedLinear)
    if not known or not (linear.training and torch.is_grad_enabled()):
        return None
    weight, bias = linear.weight, linear.bias
    if not isinstance(x, Tensor) or x.dim() != 2 or weight[0].numel() > MOST:
        return None
    if not runs_cpu(x) or not cpu_takes(weight, bias):
        return None
    fits = x.shape[0] % (batch_rows.get() or linear._twin_K) == 0 and x.shape[1:] == weight.shape[2:]
    if not fits or not x.is_contiguous() or not any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return None
    return call_of(x[..., None, None], weight[..., None, None], bias, _ONE_PIXEL, None, x.requires_grad)
