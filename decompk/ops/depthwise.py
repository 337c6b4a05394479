"""Convolutions channel by channel of K members on a CPU, read and written where their rows lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import cpu
from ..kernels.call import follows, settle, unwatched
from ..kernels.layout import output_shape
from ..kernels.problem import Pair
from .followed import gradients


def depthwise_rows(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
    """K convolutions of as many groups as channels: rows (K·N, C, H, W) → (K·N, C, H', W'), for what `runs_cpu`.

    weight (K, C, 1, kh, kw), bias (K, C).
    """
    return _Depthwise.apply(settle(x), weight, bias, stride, padding)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
        K, C, _, *kernel = weight.shape
        N, H, W = x.shape[0] // K, *x.shape[2:]
        size = output_shape((K, N, C, H, W), (K, C, C, *kernel), stride, padding, (1, 1))[-2:]
        ctx.sizes = cpu.sizes((K, N, C, C, H, W, *kernel, *stride, *padding, *size))
        ctx.stride, ctx.padding = stride, padding
        like = {"dtype": x.dtype, "device": x.device, "memory_format": torch.channels_last}
        y = torch.empty((K * N, C, *size), **like)
        cpu.depthwise(x, _inside(weight), None if bias is None else bias.contiguous(), y, ctx.sizes)
        ctx.save_for_backward(x, weight, bias)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if follows(dy) or not unwatched(dy, x, weight):
            return *_followed(ctx, dy, x, weight, bias), None, None
        dy, x, laid = settle(dy), settle(x), _inside(weight)
        dx = torch.empty_like(x) if needs[0] else None
        dw = torch.empty_like(laid) if needs[1] else None
        db = torch.empty_like(bias, memory_format=torch.contiguous_format) if bias is not None and needs[2] else None
        cpu.depthwise_backward(dy, x, laid, dx, dw, db, ctx.sizes)
        return dx, None if dw is None else dw.movedim(-1, 1).unsqueeze(2), db, None, None


def _inside(weight: Tensor) -> Tensor:
    """(K, C, 1, kh, kw) → (K, kh, kw, C)."""
    return weight.squeeze(2).movedim(1, -1).contiguous()


def _followed(ctx: Any, dy: Tensor, *tensors: Tensor | None) -> Sequence[Tensor | None]:
    """Gradients by torch's own operators, differentiable again."""

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        K, C = weight.shape[:2]
        biases = [None] * K if bias is None else bias
        rows = zip(x.split(x.shape[0] // K), weight, biases, strict=True)
        return torch.cat([F.conv2d(*row, ctx.stride, ctx.padding, 1, C) for row in rows])

    return gradients(convolve, tensors, dy, ctx.needs_input_grad[:3])
