"""Layer norms of K members on a CPU, all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import cpu
from ..kernels.call import follows, unwatched
from .followed import gradients
from .norm import contiguous


def layer_norm_rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, K: int, shape: Sequence[int], eps: float
) -> Tensor:
    """K layer norms of rows (K·N, …, *shape) → the same, without gaps, for what `runs_cpu`: of one value or more.

    weight, bias (K, *shape).
    """
    return _LayerNorm.apply(x.contiguous(), weight, bias, K, tuple(shape), eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, K: int, shape: tuple[int, ...], eps: float
    ) -> Tensor:
        ctx.K, ctx.shape, ctx.eps = K, shape, eps
        y, rows = torch.empty_like(x, memory_format=torch.contiguous_format), x.view(K, -1, *shape).flatten(2)
        saved = x.new_empty((3, *rows.shape[:2]))
        cpu.layer_norm(rows, *contiguous(weight, bias), y, saved, eps)
        ctx.save_for_backward(x, weight, bias, saved)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, saved = ctx.saved_tensors
        if follows(dy) or not unwatched(dy, x, weight):
            return *_followed(ctx, dy, x, weight, bias), None, None, None
        # Hooks of saved tensors may have given back what lies otherwise.
        dy, x, weight, saved = contiguous(dy, x, weight, saved)
        found = [
            torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and needs else None
            for t, needs in zip((x, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        cpu.layer_norm_backward(dy, x.view(*saved.shape[1:], -1), weight, saved, *found)
        return *found, None, None, None


def _followed(ctx: Any, dy: Tensor, *tensors: Tensor | None) -> Sequence[Tensor | None]:
    """Gradients by torch's own operators, differentiable again."""

    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        weights, biases = ([None] * ctx.K if t is None else t for t in (weight, bias))
        rows = zip(x.split(x.shape[0] // ctx.K), weights, biases, strict=True)
        return torch.cat([F.layer_norm(x, ctx.shape, w, b, ctx.eps) for x, w, b in rows])

    return gradients(normalise, tensors, dy, ctx.needs_input_grad[:3])
