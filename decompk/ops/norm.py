"""Batch norm of K members, each with its own statistics; ReLU and a residual are part of it."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DecompkError
from ..kernels import cpu
from ..kernels.backend import noted, resumed, runs_triton
from ..kernels.call import follows, settle, statistics_dtype, unwatched, watched
from ..kernels.layout import empty_like_layout, in_layout, layout_of, pieces_of, side_by_side

_PIXELS = (1, 3, 4)  # of x (K, N, C, H, W), all of a member's channel
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    moments: Tensor | None = None,
) -> Tensor:
    """relu((x − mean) / sqrt(var + eps) · weight + bias + residual), mean and var over the pixels of each member.

    x (K, N, C, H, W), float16, bfloat16, float32 or float64: member-major or channel-grouped, and y lies as x does;
    other strides are first copied member-major. weight, bias, running_mean, running_var (K, C), of any floating dtype;
    residual as x. Statistics are float32 (float64 for float64): deviations above 1e19 overflow, as in torch on a GPU.

    training: mean and var are those of x, var without Bessel's correction; the running statistics, contiguous, move by
    `momentum` towards mean and the unbiased var. moments (K, S, 3, C), where whoever wrote x knows them: count, mean
    and Σ(x − mean)² of S disjoint pieces of the pixels, which may be empty and together are all of x. Not training:
    mean and var are the running statistics.

    Differentiable in x, weight, bias and residual, as often as torch's own operators: see `grouped_conv2d`. Raises
    DecompkError for shapes, dtypes and devices that do not fit, and in training for fewer than two values a channel.
    """
    _check(x, weight, bias, running_mean, running_var, residual, moments)
    if training and x.shape[1] * x.shape[3] * x.shape[4] < 2:
        raise DecompkError(f"batch norm in training needs two values a channel or more, but x is {_size(x)}.")
    if not training and (running_mean is None or running_var is None):
        raise DecompkError("batch norm needs running_mean and running_var where it is not training.")
    if watched():
        y = torch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
        y = y if residual is None else y + residual
        return y.relu() if relu else y
    x, residual = _alike(x, residual)
    if training:
        if moments is None:
            moments = torch.ops.decompk.batch_norm_moments(x.detach())
        mean, rstd = torch.ops.decompk.batch_norm_finalise(moments.detach(), running_mean, running_var, momentum, eps)
    else:
        mean = running_mean.to(statistics_dtype(x))
        rstd = torch.rsqrt(running_var.to(mean.dtype) + eps)
    return torch.ops.decompk.batch_norm_apply(x, mean, rstd, weight, bias, residual, relu, training)


def torch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """The K batch norms as torch's own over K·C channels, which whatever follows torch's operators can follow."""
    K, _, C, *_ = x.shape
    statistics = running_mean, running_var
    vectors = [None if t is None else t.to(statistics_dtype(x)).flatten() for t in (*statistics, weight, bias)]
    value = side_by_side(x.to(statistics_dtype(x)))
    y = F.batch_norm(value, *vectors, training, momentum, eps).to(x.dtype)
    for kept, moved in zip(statistics, vectors, strict=False):
        if training and kept is not None and kept.dtype != moved.dtype:  # torch moved a copy
            kept.copy_(moved.view(K, C))
    return y.unflatten(1, (K, C)).movedim(1, 0)


@functools.cache
def kernels() -> ModuleType:
    """Those of batch norm."""
    from ..kernels import norm  # triton loads with it

    return norm


@torch.library.custom_op("decompk::batch_norm_moments", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def batch_norm_moments(x: Tensor) -> Tensor:
    """x (K, N, C, H, W) → (K, S, 3, C): count, mean and Σ(x − mean)² of S disjoint pieces of each member's pixels."""
    _check_layout(x)
    pieces = pieces_of(x)
    if runs_triton(x) and x.numel():
        return kernels().launch_moments(x, pieces)
    values = x.movedim(2, -1).flatten(1, 3).to(statistics_dtype(x))
    moments = values.new_zeros(_moments_shape(x))
    for s, piece in enumerate(values.split(max(-(-values.shape[1] // pieces), 1), 1)):
        var, mean = torch.var_mean(piece, 1, correction=0)
        moments[:, s] = torch.stack([torch.full_like(mean, piece.shape[1]), mean, var * piece.shape[1]], 1)
    return moments


@batch_norm_moments.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(_moments_shape(x), dtype=statistics_dtype(x))


@torch.library.custom_op(
    "decompk::batch_norm_finalise",
    mutates_args=("running_mean", "running_var"),
    schema="(Tensor moments, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps)"
    " -> (Tensor mean, Tensor rstd)",
    tags=(torch.Tag.needs_exact_strides,),
)
def batch_norm_finalise(
    moments: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """moments (K, S, 3, C) → mean, 1 / sqrt(var + eps), both (K, C); moves the running statistics (K, C) in place."""
    if runs_triton(moments) and moments.numel():
        return kernels().launch_finalise(moments.contiguous(), running_mean, running_var, momentum, eps)
    count, means, m2 = moments.unbind(2)
    total = count.sum(1)
    origin = means[:, :1]  # differences from it lose nothing to a large common mean
    mean = (count * (means - origin)).sum(1) / total + origin[:, 0]
    m2 = (m2 + count * (means - mean[:, None]) ** 2).sum(1)
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(m2 / (total - 1), alpha=momentum)
    return mean, torch.rsqrt(m2 / total + eps)


@batch_norm_finalise.register_fake
def _(moments: Tensor, running_mean: Any, running_var: Any, momentum: float, eps: float) -> tuple[Tensor, Tensor]:
    K, _, _, C = moments.shape
    return moments.new_empty((K, C)), moments.new_empty((K, C))


@torch.library.custom_op("decompk::batch_norm_apply", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def batch_norm_apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    training: bool,
) -> Tensor:
    """relu((x − mean) · rstd · weight + bias + residual), x and residual in one layout, the others (K, C).

    Differentiable in x, weight, bias and residual; mean and rstd are functions of x in training, else constants.
    """
    _check_layout(x, residual)
    if runs_triton(x) and x.numel():
        return kernels().launch_apply(
            x, *contiguous(mean, rstd, weight, bias), residual, relu, empty_like_layout(x, x.shape)
        )
    y = _affine(_centered(x, mean), rstd, weight, bias)
    y = y if residual is None else y + residual
    return empty_like_layout(x, x.shape).copy_(y.relu() if relu else y)


@batch_norm_apply.register_fake
def _(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Any, bias: Any, residual: Any, relu: bool, training: bool
) -> Tensor:
    return empty_like_layout(x, x.shape)


@torch.library.custom_op("decompk::batch_norm_backward", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    training: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias (K, C) in the dtype of mean, and, where y is given, g: dy where y > 0, else an empty tensor.

    y is given when relu came after a residual; without one x, weight and bias tell as much. dy, x and y in one layout.
    backend: what the forward noted (`backend.noted`).
    """
    _check_layout(x, dy, y)
    with resumed(backend):
        triton = runs_triton(x)
    if triton and x.numel():
        *results, g = kernels().launch_backward(
            dy, x, y, *contiguous(mean, rstd, weight, bias), relu, training, pieces_of(x)
        )
        return *results, dy.new_empty(0) if g is None else g
    dx, dweight, dbias, g = _gradients(dy, x, y, mean, rstd, weight, bias, relu, training)
    return (
        empty_like_layout(x, x.shape).copy_(dx),
        dweight,
        dbias,
        dy.new_empty(0) if y is None else empty_like_layout(x, x.shape).copy_(g),
    )


@batch_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    y: Any,
    mean: Tensor,
    rstd: Tensor,
    weight: Any,
    bias: Any,
    relu: bool,
    training: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = (torch.empty_like(mean), torch.empty_like(mean))
    return empty_like_layout(x, x.shape), *sums, dy.new_empty(0) if y is None else empty_like_layout(x, x.shape)


def _gradients(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`batch_norm_backward` as a formula, in the dtype of mean."""
    g, away = dy.to(mean.dtype), _centered(x, mean)
    if relu:
        g = g.masked_fill((_affine(away, rstd, weight, bias) if y is None else y) <= 0, 0)
    normalised = away * _expand(rstd)
    dbias, dweight = g.sum(_PIXELS), (g * normalised).sum(_PIXELS)
    dx = g
    if training:
        rows = x.shape[1] * x.shape[3] * x.shape[4]
        dx = g - _expand(dbias / rows) - normalised * _expand(dweight / rows)
    return dx * _expand(rstd if weight is None else rstd * weight), dweight, dbias, g


def followed_gradients(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and the residual's, differentiable in dy, x and weight; arguments of `batch_norm_backward`."""
    if training:  # of the forward's own values, but functions of x
        var, average = torch.var_mean(x.to(mean.dtype), _PIXELS, correction=0)
        mean = mean + (average - average.detach())
        rstd = torch.rsqrt(rstd**-2 + (var - var.detach()))
    dx, dweight, dbias, g = _gradients(dy, x, y, mean, rstd, weight, bias, relu, training)
    return dx.to(x.dtype), dweight, dbias, g.to(x.dtype)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, mean, rstd, weight, bias, residual, ctx.relu, ctx.training = inputs
    ctx.residual, ctx.backend = residual is not None, noted()
    ctx.save_for_backward(x, mean, rstd, weight, bias, output if ctx.relu and ctx.residual else None)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight, bias, y = ctx.saved_tensors
    if follows(dy):
        dx, dweight, dbias, g = followed_gradients(dy, x, y, mean, rstd, weight, bias, ctx.relu, ctx.training)
    else:
        x, y, dy = _alike(x, y, dy)  # hooks of saved tensors may have given back what lies otherwise
        dx, dweight, dbias, g = torch.ops.decompk.batch_norm_backward(
            dy, x, y, mean, rstd, weight, bias, ctx.relu, ctx.training, ctx.backend
        )
        g = dy if y is None else g
    dweight = None if weight is None else dweight.to(weight.dtype)
    dbias = None if bias is None else dbias.to(bias.dtype)
    dresidual = g if ctx.residual else None
    return dx, None, None, dweight, dbias, dresidual, None, None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise DecompkError("decompk::batch_norm_backward has no derivative: differentiate ops.batch_norm twice.")


batch_norm_apply.register_autograd(_differentiate, setup_context=_keep)
batch_norm_backward.register_autograd(_refuse)


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    moments: Tensor | None,
) -> None:
    if x.dim() != 5 or x.dtype not in DTYPES or 0 in (x.shape[0], x.shape[2]):
        raise DecompkError(
            "batch norm takes x (K, N, C, H, W) with members and channels, of float16, bfloat16, float32 or float64, "
            f"not {_size(x)} of {x.dtype}."
        )
    K, C = x.shape[0], x.shape[2]
    vectors = dict(weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    for name, t in {**vectors, "residual": residual, "moments": moments}.items():
        if t is not None and t.device != x.device:
            raise DecompkError(f"batch norm has x on {x.device}, but {name} on {t.device}.")
    for name, t in vectors.items():
        if t is not None and (t.shape != (K, C) or not t.is_floating_point()):
            raise DecompkError(
                f"batch norm of x {_size(x)} takes {name} ({K}, {C}) of a floating dtype, not {_size(t)} of {t.dtype}."
            )
    if (running_mean is None) != (running_var is None):
        raise DecompkError("batch norm takes running_mean and running_var both or neither.")
    if running_mean is not None and not (running_mean.is_contiguous() and running_var.is_contiguous()):
        raise DecompkError("batch norm takes contiguous running_mean and running_var: they are changed in place.")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise DecompkError(
            f"batch norm takes a residual as x, {_size(x)} of {x.dtype}, not {_size(residual)} of {residual.dtype}."
        )
    if moments is not None and (
        moments.dim() != 4
        or (moments.shape[0], *moments.shape[2:]) != (K, 3, C)
        or moments.dtype != statistics_dtype(x)
    ):
        raise DecompkError(
            f"batch norm of x {_size(x)} takes moments ({K}, S, 3, {C}) of {statistics_dtype(x)}, "
            f"not {_size(moments)} of {moments.dtype}."
        )


def _alike(x: Tensor, *others: Tensor | None) -> Any:
    """All of them in x's layout; member-major where it has none that the kernels take."""
    layout = layout_of(x)
    layout = "member" if layout == "strided" else layout
    return [None if t is None else in_layout(t, layout) for t in (x, *others)]


def _check_layout(x: Tensor, *others: Tensor | None) -> None:
    layout = layout_of(x)
    if layout == "strided" or any(t is not None and layout_of(t) != layout for t in others):
        raise DecompkError("batch norm's activations must be member-major or channel-grouped, all of them alike.")


def _size(t: Tensor) -> str:
    return str(tuple(t.shape))


def _moments_shape(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], pieces_of(x), 3, x.shape[2])


def contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in vectors]


def _expand(vector: Tensor) -> Tensor:
    """(K, C) → (K, 1, C, 1, 1)."""
    return vector[:, None, :, None, None]


def _centered(x: Tensor, mean: Tensor) -> Tensor:
    return x.to(mean.dtype) - _expand(mean)


def _affine(centered: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = centered * _expand(rstd if weight is None else rstd * weight)
    return y if bias is None else y + _expand(bias)


# ---- on a CPU -------------------------------------------------------------------------------------------------------


def batch_norm_rows(
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
    """`batch_norm` of rows (K·N, C, H, W), residual like x, by the C++ kernels, where `runs_cpu` of all tensors.

    In training two values a channel or more.
    """
    x, residual = settle(x), None if residual is None else settle(residual)
    return _BatchNorm.apply(x, weight, bias, residual, running_mean, running_var, K, training, momentum, eps, relu)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, running_mean, running_var, K, training, momentum, eps, relu) -> Tensor:
        y, saved = torch.empty_like(x), x.new_empty((4, K, x.shape[1]))
        vectors = contiguous(weight, bias)
        cpu.batch_norm(x, *vectors, running_mean, running_var, residual, y, saved, training, relu, momentum, eps)
        if training and running_mean is not None:
            torch.autograd.graph.increment_version((running_mean, running_var))
        ctx.training, ctx.relu, ctx.residual = training, relu, residual is not None
        ctx.save_for_backward(x, weight, saved, y if relu and residual is not None else None)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved, y = ctx.saved_tensors
        if follows(dy) or not unwatched(dy, x, saved, y):
            return *_BatchNorm.followed(ctx, dy, x, weight, saved, y), *(None,) * 7
        # Hooks of saved tensors may have given back what lies otherwise, and the kernels look at nothing.
        dy, x, y = settle(dy), settle(x), None if y is None else settle(y)
        saved = saved.contiguous()
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
