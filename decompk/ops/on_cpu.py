"""The shortest way to run packed layers on a CPU: float32 activations (K·N, C, H, W), straight to the kernels.

Torch's dispatcher, which the operators pass, takes as long as a small layer does. So does nothing here what it is for:
`takes` says whether tensors are plain and nobody watches; else the operators are called.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ..kernels import choose as dispatch
from ..kernels import cpu, library
from ..kernels.layout import check_shapes
from ..kernels.library import Pair
from ..kernels.problem import PASSES, Problem
from .followed import conv_gradients, follows
from .norm import followed_gradients

Geometry = tuple[Pair, Pair, Pair]  # stride, padding, dilation
_PLAIN = (Tensor, nn.Parameter)


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether float32 tensors on a CPU are computed here and now: no mode, transform or compiler looks on."""
    if not dispatch.runs_on_cpu() or dispatch.watched():
        return False
    for t in (x, *others):
        if t is not None and (type(t) not in _PLAIN or t.dtype is not torch.float32 or t.device.type != "cpu"):
            return False
    return torch._C._len_torch_dispatch_stack() == 0 and not torch.is_autocast_enabled("cpu")


def channels_last(x: Tensor) -> Tensor:
    """x (K·N, C, H, W) where it lies NHWC without gaps, else a copy that does."""
    return x.contiguous(memory_format=torch.channels_last)


# ---- convolution ----------------------------------------------------------------------------------------------------


class _Plan:
    """A convolution of activations (K·N, C, H, W): who runs each of its passes on the `backend` of its forward."""

    def __init__(self, fprop: Problem, backend: str):
        self.K, self.backend, self._problem = fprop.K, backend, fprop
        self._forms: dict[str, str] = {}

    def form(self, kind: str) -> str:
        if kind not in self._forms:  # chosen, perhaps measured, when it first runs
            problem = self._problem.of(kind).streamed()
            with dispatch.resumed(self.backend):
                self._forms[kind] = dispatch.choose(problem, torch.device("cpu")).form
        return self._forms[kind]


@functools.lru_cache(maxsize=4096)
def _plan(x: torch.Size, weight: torch.Size, bias: torch.Size | None, geometry: Geometry, backend: str) -> _Plan:
    """Raises DecompkError for shapes that do not fit: the kernels take pointers, and look at nothing."""
    K, O, C, *kernel = weight
    rows, channels, H, W = x
    check_shapes((K, rows // K, channels, H, W), weight, bias, *geometry)
    return _Plan(Problem("fprop", "float32", K, rows // K, C, O, H, W, tuple(kernel), *geometry), backend)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """`grouped_conv2d` of x (K·N, C, H, W) and weight (K, O, C, kh, kw), bias (K, O) → (K·N, O, H', W')."""
    # Copied out here, where autograd sees it: what a Function saves has to be what it got.
    return _Conv.apply(channels_last(x), weight, bias, (stride, padding, dilation))


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        plan = _plan(x.shape, weight.shape, None if bias is None else bias.shape, geometry, dispatch.noted())
        ctx.plan, ctx.geometry, ctx.has_bias = plan, geometry, bias is not None
        ctx.save_for_backward(x, weight)
        y = library.forward(plan.form("fprop"), x.unflatten(0, (plan.K, -1)), weight, bias, *geometry)
        return channels_last(y.flatten(0, 1)).data  # torch lets nobody write into a view that comes out of here

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        plan = ctx.plan
        needs = ctx.needs_input_grad
        if follows(dy):
            x5, dy5 = (t.unflatten(0, (plan.K, -1)) for t in (x, dy))
            wanted = *needs[:2], ctx.has_bias and needs[2]
            dx, dw, db = conv_gradients(dy5, x5, weight, ctx.geometry, wanted, plan.backend)
            return None if dx is None else dx.flatten(0, 1), dw, db, None
        dy = channels_last(dy)
        x5, dy5 = (t.unflatten(0, (plan.K, -1)) for t in (x, dy))
        forms = tuple(plan.form(kind) if wants else None for kind, wants in zip(PASSES[1:], needs, strict=False))
        dx, dw = library.backward_by_forms(forms, dy5, x5, weight, *ctx.geometry)
        dx = None if dx is None else channels_last(dx.flatten(0, 1))
        db = None
        if ctx.has_bias and needs[2]:
            db = dy.permute(0, 2, 3, 1).reshape(plan.K, -1, dy.shape[1]).sum(1)
        return dx, dw, db, None


# ---- batch norm -----------------------------------------------------------------------------------------------------


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    K: int,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`ops.batch_norm` of x (K·N, C, H, W), with the residual like x; two values a channel or more in training."""
    x, residual = channels_last(x), None if residual is None else channels_last(residual)
    return _BatchNorm.apply(x, weight, bias, residual, running_mean, running_var, K, training, momentum, eps, relu)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, running_mean, running_var, K, training, momentum, eps, relu) -> Tensor:
        y, saved = torch.empty_like(x), x.new_empty((4, K, x.shape[1]))
        vectors = [None if t is None else t.contiguous() for t in (weight, bias)]
        cpu.batch_norm(x, *vectors, running_mean, running_var, residual, y, saved, training, relu, momentum, eps)
        if training and running_mean is not None:
            torch.autograd.graph.increment_version((running_mean, running_var))
        ctx.training, ctx.relu, ctx.residual = training, relu, residual is not None
        ctx.save_for_backward(x, weight, saved, y if relu and residual is not None else None)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved, y = ctx.saved_tensors
        if follows(dy):
            return *_BatchNorm.followed(ctx, dy, x, weight, saved, y), *(None,) * 7
        dy = channels_last(dy)
        dx, sums = torch.empty_like(x), torch.empty_like(saved[:2])
        g = torch.empty_like(dy) if y is not None else None
        cpu.batch_norm_backward(dy, x, y, saved, ctx.training, ctx.relu, dx, sums[0], sums[1], g)
        needs = ctx.needs_input_grad
        residual = (dy if g is None else g) if ctx.residual and needs[3] else None
        return dx, sums[0] if needs[1] else None, sums[1] if needs[2] else None, residual, *(None,) * 7

    @staticmethod
    def followed(ctx, dy, x, weight, saved, y) -> tuple[Tensor | None, ...]:
        dy, x, y = (t if t is None else t.unflatten(0, (saved.shape[1], -1)) for t in (dy, x, y))
        mean, rstd, _, bias = saved
        dx, dw, db, g = followed_gradients(dy, x, y, mean, rstd, weight, bias, ctx.relu, ctx.training)
        needs = ctx.needs_input_grad
        residual = g.flatten(0, 1) if ctx.residual and needs[3] else None
        return dx.flatten(0, 1), dw if needs[1] else None, db if needs[2] else None, residual
