"""A convolution and what stands around it in one launch: crops, normalised input, batch norm, residual, ReLU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..crops import Crop
from ..errors import DecompkError
from ..kernels import choose as dispatch
from ..kernels import library
from ..kernels.layout import (
    as_strided_like,
    channels_inside,
    empty_like_layout,
    empty_weight,
    in_layout,
    layout_of,
    ohwi,
    sizes,
)
from ..kernels.problem import Epilogue, Prologue
from .conv import arguments, check, operands, register_flops, tell_flop_counter
from .followed import conv_gradients, follows


def fused_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    in_relu: bool = False,
    crops: Sequence[Crop] | None = None,
) -> Tensor:
    """relu((conv(relu(x · in_scale + in_shift)) + bias) · scale + shift + residual) of K members in one launch.

    x, weight, bias, stride, padding and dilation as in `grouped_conv2d`; scale and shift (K, O), in_scale and in_shift
    (K, C) float32, each pair whole or absent; residual of the output's shape. Padding is zero after the input's
    normalisation. With `crops`, one of equal size per member, x is the image (N, C, H, W) that all members share, and
    each reads its own window of it, without a copy. For inference: a gradient raises DecompkError.
    """
    around = (scale, shift), residual, relu, (in_scale, in_shift), in_relu
    return _call(x, weight, bias, stride, padding, dilation, *around, crops, False)[0]


def conv2d_moments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    *,
    crops: Sequence[Crop] | None = None,
    moments: bool = True,
) -> tuple[Tensor, Tensor]:
    """(y, moments) for the batch norm behind a convolution: `grouped_conv2d`, or with `crops` as `fused_conv2d`.

    moments (K, 1, 3, O) float32 (float64 for float64): count, mean and Σ(y − mean)² over the pixels of each member,
    taken while y is written; without gradient, since `batch_norm` accounts for them. Empty where not asked for. y is
    differentiable as in `grouped_conv2d`.
    """
    around = (None, None), None, False, (None, None), False
    return _call(x, weight, bias, stride, padding, dilation, *around, crops, moments)


def _call(x, weight, bias, stride, padding, dilation, affine, residual, relu, prologue, in_relu, crops, moments):
    if weight.dim() != 5 or x.dim() != (4 if crops else 5):
        wanted = "an image (N, C, H, W)" if crops else "(K, N, C, H, W)"
        raise DecompkError(f"x {sizes(x)} and weight {sizes(weight)} are not {wanted} and (K, O, C, kh, kw).")
    geometry = arguments(weight.shape[3:], stride, padding, dilation)
    window = [] if crops is None else _window(crops, x, weight)
    if dispatch.watched():
        return _by_torch(x, weight, bias, affine, residual, relu, prologue, in_relu, window, moments, geometry)
    tell_flop_counter(register_flops)
    x = channels_inside(x.unsqueeze(0) if window else x)
    flags = (relu, *prologue, in_relu, window, moments, *geometry)
    return torch.ops.decompk.fused_conv2d(x, weight, bias, *affine, residual, *flags)


def _by_torch(x, weight, bias, affine, residual, relu, prologue, in_relu, window, moments, geometry):
    """y and moments by torch's own operators, step after step, for whatever follows those alone."""
    members = library.cut(x.unsqueeze(0), window) if window else x
    shape = check(members, weight, bias, *geometry)
    _check_operands(x.new_empty(()).expand(shape), x, weight, *affine, residual, *prologue, window)
    form = "loop" if dispatch.exact(x.dtype) else "grouped"
    before = None if prologue[0] is None else Prologue(*prologue, in_relu)
    around = Epilogue(bias, *affine, residual, relu), before, moments
    y, found = library.fused(form, members, weight, *geometry, *around, differentiable=True)
    return y, y.new_empty(0, dtype=torch.float32) if found is None else found.detach()


def _window(crops: Sequence[Crop], image: Tensor, weight: Tensor) -> list[int]:
    """(height, width, top and left of each member), as the operator takes it."""
    if len(crops) != weight.shape[0] or any(c.size != crops[0].size or len(c.size) != 2 for c in crops):
        raise DecompkError(f"{len(crops)} crops do not fit {weight.shape[0]} members: give each one of equal size.")
    for crop in crops:
        if any(s + n > whole for s, n, whole in zip(crop.start, crop.size, image.shape[2:], strict=True)):
            raise DecompkError(f"{crop} does not fit an image of {image.shape[2]}×{image.shape[3]} pixels.")
    return [*crops[0].size, *(start for crop in crops for start in crop.start)]


# ---- the operators --------------------------------------------------------------------------------------------------


@torch.library.custom_op("decompk::fused_conv2d", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def _fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_relu: bool,
    window: Sequence[int],
    moments: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """y and moments (empty if not wanted, never with scale); with a window x is the shared image (1, N, C, H, W)."""
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    y, merged = _outputs(x, weight, bias, window, moments, geometry)
    _check_operands(y, x, weight, scale, shift, residual, in_scale, in_shift, window)
    if not y.numel():
        return y, merged.zero_()
    contiguous = (None if t is None else t.contiguous() for t in (bias, scale, shift))
    residual = None if residual is None else _laid_like(residual, y)
    epilogue = Epilogue(*contiguous, residual, relu)
    prologue = None if in_scale is None else Prologue(in_scale.contiguous(), in_shift.contiguous(), in_relu)

    x, w = channels_inside(x), ohwi(weight)
    members = _members(x, w.shape[0], window)
    extra = () if residual is None else (residual,)
    problem, views = operands("fprop", members, w, geometry, (x, y, *extra), bool(window))
    choice = dispatch.choose(problem, x.device)
    if choice.backend in library.BACKENDS:
        members = library.cut(x, window) if window else x
        value, found = library.fused(choice.form, members, weight, *geometry, epilogue, prologue, moments)
        return as_strided_like(value, y), merged.copy_(found) if moments else merged
    from ..kernels import conv
    from ..kernels.norm import merge_moments

    pieces = None
    if moments:
        pieces = merged.new_empty((*y.shape[:1], conv.moments_pieces(problem, choice.config), 3, y.shape[2]))
    epilogue = replace(epilogue, residual=views[2] if extra else None, moments=pieces)
    conv.fprop(problem, choice.config, views[0], w, views[1], epilogue, prologue, _offsets(window, x.device))
    return y, merge_moments(pieces) if moments else merged


@_fused.register_fake
def _(x, weight, bias, scale, shift, residual, relu, in_scale, in_shift, in_relu, window, moments, *geometry):
    y, merged = _outputs(x, weight, bias, window, moments, geometry)
    _check_operands(y, x, weight, scale, shift, residual, in_scale, in_shift, window)
    return y, merged


def _outputs(x, weight, bias, window, moments, geometry) -> tuple[Tensor, Tensor]:
    members = _members(x, weight.shape[0], window)
    y = empty_like_layout(members, check(members, weight, bias, *geometry))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return y, y.new_empty((y.shape[0], 1, 3, y.shape[2]) if moments else 0, dtype=dtype)


def _members(x: Tensor, K: int, window: Sequence[int]) -> Tensor:
    """(K, N, C, h, w) as if every member read the window's first corner: right in everything but where crops begin."""
    return x.expand(K, *x.shape[1:])[..., : window[0], : window[1]] if window else x


def _check_operands(y, x, weight, scale, shift, residual, in_scale, in_shift, window) -> None:
    K, _, O, *_ = y.shape
    for name, pair, channels in (("scale", (scale, shift), O), ("in_scale", (in_scale, in_shift), weight.shape[2])):
        if (pair[0] is None) != (pair[1] is None):
            raise DecompkError(f"{name} needs its shift, and the shift its scale.")
        for t in pair if pair[0] is not None else ():
            if t.shape != (K, channels) or t.dtype not in (torch.float32, torch.float64) or t.device != x.device:
                raise DecompkError(
                    f"{name} and its shift are ({K}, {channels}) float32 on {x.device}, not {sizes(t)} {t.dtype} on "
                    f"{t.device}."
                )
    if residual is not None and (residual.shape != y.shape or residual.dtype != y.dtype):
        raise DecompkError(
            f"the residual {sizes(residual)} {residual.dtype} is not of the output's {sizes(y)} {y.dtype}."
        )


def _laid_like(residual: Tensor, y: Tensor) -> Tensor:
    return residual if layout_of(residual) == layout_of(y) else torch.empty_like(y).copy_(residual)


def _offsets(window: Sequence[int], device: torch.device) -> Tensor | None:
    return _offsets_of(tuple(window[2:]), device) if window else None


@functools.lru_cache(maxsize=64)
def _offsets_of(starts: tuple[int, ...], device: torch.device) -> Tensor:
    """(K, 2) tops and lefts on the device; kept, so that a captured graph copies nothing from the host."""
    return torch.tensor(starts, dtype=torch.int32, device=device).view(-1, 2)


@torch.library.custom_op("decompk::crop_conv2d_backward", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def _crop_backward(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str | None = None,
) -> Tensor:
    """dweight of a convolution that read the windows of one image; backend: what the forward noted."""
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    dw = empty_weight(weight)
    if not grad.numel():
        return dw.zero_()
    image, w = channels_inside(image), ohwi(weight)
    grad = in_layout(grad, "member")  # no kernel asks how what stands beside crops lies
    members = _members(image, w.shape[0], window)
    problem, views = operands("wgrad", members, w, geometry, (image, grad), True)
    with dispatch.resumed(backend):
        choice = dispatch.choose(problem, image.device)
    if choice.backend in library.BACKENDS:
        crops = library.cut(image, window)
        return as_strided_like(library.backward(choice.form, grad, crops, weight, *geometry, (False, True))[1], dw)
    from ..kernels import conv

    conv.wgrad(problem, choice.config, views[1], views[0], dw.movedim(2, -1), _offsets(window, image.device))
    return dw


@_crop_backward.register_fake
def _(grad, image, weight, window, stride, padding, dilation, backend=None):
    return empty_weight(weight)


def _keep(ctx, inputs, output):
    x, weight, ctx.bias, scale, _, residual, relu, in_scale, _, _, ctx.window, _, *ctx.geometry = inputs
    ctx.inference = relu or any(t is not None for t in (scale, residual, in_scale))
    ctx.backend = dispatch.noted()
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, grad, _):
    if ctx.inference:
        raise DecompkError(
            "a convolution fused with its batch norm, residual or ReLU is for inference: use it under torch.no_grad(), "
            "or grouped_conv2d and batch_norm."
        )
    x, weight = ctx.saved_tensors
    wanted = [*ctx.needs_input_grad[:2], ctx.bias is not None and ctx.needs_input_grad[2]]
    if follows(grad):
        gradients = conv_gradients(grad, x, weight, ctx.geometry, wanted, ctx.backend, ctx.window)
    elif not ctx.window:
        gradients = torch.ops.decompk.grouped_conv2d_backward(grad, x, weight, *ctx.geometry, wanted, ctx.backend)
    else:
        gradients = [None, None, None]
        if wanted[0]:
            gradients[0] = _image_gradient(grad, x, weight, ctx.window, ctx.geometry, ctx.backend)
        if wanted[1]:
            arguments = grad, x, weight, ctx.window, *ctx.geometry, ctx.backend
            gradients[1] = torch.ops.decompk.crop_conv2d_backward(*arguments)
        if wanted[2]:
            gradients[2] = grad.sum((1, 3, 4))
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), *(None,) * 12


def _image_gradient(
    grad: Tensor, image: Tensor, weight: Tensor, window: Sequence[int], geometry, backend: str
) -> Tensor:
    """The members' input gradients, added where their windows overlap."""
    crops = image.new_empty((weight.shape[0], *image.shape[1:3], *window[:2]))
    wanted = [True, False, False]
    parts = torch.ops.decompk.grouped_conv2d_backward(grad, crops, weight, *geometry, wanted, backend)[0]
    total = torch.zeros_like(image)
    for part, top, left in zip(parts, window[2::2], window[3::2], strict=True):
        total[0, :, :, top : top + window[0], left : left + window[1]] += part
    return total


_fused.register_autograd(_differentiate, setup_context=_keep)
