"""A convolution and what stands around it in one launch: crops, normalised input, batch norm, residual, ReLU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..crops import Crop
from ..errors import DecompkError
from ..kernels.backend import forced, noted
from ..kernels.call import follows, fprop_call, statistics_dtype, unwatched, watched, wgrad_call
from ..kernels.layout import channels_inside, cut, empty_like_layout, empty_weight, in_layout, sizes
from ..kernels.problem import Epilogue, Geometry, Prologue
from .conv import (
    arguments,
    asked_of,
    autocast,
    check,
    chosen,
    register_flops,
    settled_call,
    tell_flop_counter,
    with_bias,
)
from .followed import conv_gradients, torch_form
from .norm import kernels


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
    each reads its own window of it, without a copy. Autocast casts x, weight, bias and residual. For inference: a
    gradient raises DecompkError.
    """
    epilogue = Epilogue(bias, scale, shift, residual, relu)
    prologue = Prologue(in_scale, in_shift, in_relu) if in_scale is not None or in_shift is not None else None
    return _fused_call(x, weight, epilogue, prologue, (stride, padding, dilation), crops, False)[0]


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
    return _fused_call(x, weight, with_bias(bias), None, (stride, padding, dilation), crops, moments)


def _fused_call(
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    prologue: Prologue | None,
    steps: tuple,
    crops: Sequence[Crop] | None,
    moments: bool,
) -> tuple[Tensor, Tensor]:
    """y and moments; steps: stride, padding and dilation as the user gave them."""
    if weight.dim() != 5 or x.dim() != (4 if crops else 5):
        wanted = "an image (N, C, H, W)" if crops else "(K, N, C, H, W)"
        raise DecompkError(f"x {sizes(x)} and weight {sizes(weight)} are not {wanted} and (K, O, C, kh, kw).")
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = autocast(x, weight, epilogue.bias)
        residual = None if epilogue.residual is None else epilogue.residual.to(x.dtype)
        epilogue = replace(epilogue, bias=bias, residual=residual)
    geometry = arguments(weight.shape[3:], *steps)
    window = () if crops is None else window_of(crops, x.shape, len(weight))
    if watched():
        return _by_torch(x, weight, epilogue, prologue, window, moments, geometry)
    x = x.unsqueeze(0) if window else x
    e, p = epilogue, prologue or Prologue(None, None, False)
    tensors = x, weight, e.bias, e.scale, e.shift, e.residual, p.scale, p.shift
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if unwatched(*tensors) and not gradient:
        return fused_now(x, weight, epilogue, prologue, window, moments, geometry)
    return _operator(
        *(x, weight, e.bias, e.scale, e.shift, e.residual, e.relu, p.scale, p.shift, p.relu),
        *(window, moments, *geometry),
    )


def fused_now(
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    prologue: Prologue | None,
    window: tuple[int, ...],
    moments: bool,
    geometry: Geometry,
    master: bool = False,
) -> tuple[Tensor, Tensor]:
    """y and moments (empty if not wanted, never with scale), without a gradient, of what is `unwatched`.

    x (K, N, C, H, W) or rows (K·N, C, H, W), and residual and y like it; with a window the image (1, N, C, H, W).
    master: as in `fprop_call`.
    """
    residual = epilogue.residual
    x, call = settled_call(x, weight, epilogue.bias, geometry, window, residual, master=master)
    K, O, C = weight.shape[:3]
    _check_around(epilogue, prologue, call.shape, call.dtype, call.device, (K, O), (K, C))
    if residual is not None and residual.stride() != call.strides:
        residual = call.empty().copy_(residual)
    vectors = (None if t is None else t.contiguous() for t in (epilogue.bias, epilogue.scale, epilogue.shift))
    if prologue is not None:
        prologue = Prologue(prologue.scale.contiguous(), prologue.shift.contiguous(), prologue.relu)
    choice = chosen(call, forced.get(), "moments" if moments else "")
    pieces = None
    if moments:
        pieces = x.new_empty((K, call.moments_pieces(choice), 3, O), dtype=statistics_dtype(x))
    around = Epilogue(*vectors, residual, epilogue.relu, pieces)
    y = call.fprop(choice, x, weight, around, prologue)
    return y, _merged(pieces, y, O)


def _merged(pieces: Tensor | None, y: Tensor, channels: int) -> Tensor:
    """moments (K, 1, 3, O) of all pieces; zero of an empty y, and empty where there are none."""
    if pieces is None:
        return y.new_empty(0, dtype=statistics_dtype(y))
    if not y.numel():
        return pieces.new_zeros((len(pieces), 1, 3, channels))
    if pieces.shape[1] == 1:
        return pieces
    return kernels().merge_moments(pieces)


def _by_torch(
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    prologue: Prologue | None,
    window: tuple[int, ...],
    moments: bool,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """y and moments by torch's own operators, step after step, for whatever follows those alone."""
    members = cut(x.unsqueeze(0), window) if window else x
    shape = check(members, weight, epilogue.bias, *geometry)
    K, O, C = weight.shape[:3]
    _check_around(epilogue, prologue, shape, x.dtype, x.device, (K, O), (K, C))
    form, found = torch_form(x.dtype), None
    if moments:
        found = x.new_empty((K, 1, 3, O), dtype=statistics_dtype(x))
    y = form.around(members, weight, geometry, replace(epilogue, moments=found), prologue, differentiable=True)
    return y, x.new_empty(0, dtype=statistics_dtype(x)) if found is None else found


def window_of(crops: Sequence[Crop], image: torch.Size, members: int) -> tuple[int, ...]:
    """(height, width, top and left of each member), as the operator takes it; image: (…, H, W)."""
    written_down = torch.compiler.is_compiling() or watched()  # sizes are symbols there, which no cache can hold
    return (_window.__wrapped__ if written_down else _window)(tuple(crops), image, members)


@functools.lru_cache(maxsize=256)
def _window(crops: tuple[Crop, ...], image: torch.Size, members: int) -> tuple[int, ...]:
    if len(crops) != members or any(c.size != crops[0].size or len(c.size) != 2 for c in crops):
        raise DecompkError(f"{len(crops)} crops do not fit {members} members: give each one of equal size.")
    for crop in crops:
        if any(s + n > whole for s, n, whole in zip(crop.start, crop.size, image[-2:], strict=True)):
            raise DecompkError(f"{crop} does not fit an image of {image[-2]}×{image[-1]} pixels.")
    return *crops[0].size, *(start for crop in crops for start in crop.start)


def fused_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    window: tuple[int, ...],
    affine: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """`fused_conv2d` of rows (K·N, C, H, W), or with a window of the image (N, C, H, W) → (K·N, O, H', W')."""
    if not unwatched(x, weight, bias, *affine, residual):
        x = x.unsqueeze(0) if window else x.unflatten(0, (len(weight), -1))
        residual = None if residual is None else residual.unflatten(0, (len(weight), -1))
        around = *affine, residual, relu, None, None, False, window, False
        return _operator(x, weight, bias, *around, *geometry)[0].flatten(0, 1)
    master = torch.is_autocast_enabled(x.device.type)
    if not window:
        return fused_now(x, weight, Epilogue(bias, *affine, residual, relu), None, (), False, geometry, master)[0]
    residual = None if residual is None else residual.unflatten(0, (len(weight), -1))
    epilogue = Epilogue(bias, *affine, residual, relu)
    return fused_now(x.unsqueeze(0), weight, epilogue, None, window, False, geometry, master)[0].flatten(0, 1)


def _operator(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    tell_flop_counter(register_flops)
    return torch.ops.decompk.fused_conv2d(channels_inside(x), *arguments)


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
    """`fused_now`; with a window x is the shared image (1, N, C, H, W)."""
    prologue = None if in_scale is None and in_shift is None else Prologue(in_scale, in_shift, in_relu)
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    epilogue = Epilogue(bias, scale, shift, residual, relu)
    return fused_now(channels_inside(x), weight, epilogue, prologue, tuple(window), moments, geometry)


@_fused.register_fake
def _(x, weight, bias, scale, shift, residual, relu, in_scale, in_shift, in_relu, window, moments, *geometry):
    (K, O, C), members = weight.shape[:3], _members(x, weight.shape[0], window)
    y = empty_like_layout(members, check(members, weight, bias, *geometry))
    prologue = None if in_scale is None and in_shift is None else Prologue(in_scale, in_shift, in_relu)
    around = Epilogue(bias, scale, shift, residual, relu), prologue
    _check_around(*around, y.shape, y.dtype, y.device, (K, O), (K, C))
    return y, y.new_empty((K, 1, 3, O) if moments else 0, dtype=statistics_dtype(x))


def _members(x: Tensor, K: int, window: Sequence[int]) -> Tensor:
    """(K, N, C, h, w) as if every member read the window's first corner: right in everything but where crops begin."""
    return x.expand(K, *x.shape[1:])[..., : window[0], : window[1]] if window else x


def _check_around(
    epilogue: Epilogue,
    prologue: Prologue | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    outputs: tuple[int, int],
    inputs: tuple[int, int],
) -> None:
    """Raise DecompkError where what stands around does not fit y of `shape`; outputs (K, O), inputs (K, C)."""
    e, p = epilogue, prologue
    pairs = [("scale", e.scale, e.shift, outputs)]
    pairs += [] if p is None else [("in_scale", p.scale, p.shift, inputs)]
    for name, scale, shift, wanted in pairs:
        if (scale is None) != (shift is None):
            raise DecompkError(f"{name} needs its shift, and the shift its scale.")
        for t in () if scale is None else (scale, shift):
            if t.shape != wanted or t.dtype not in (torch.float32, torch.float64) or t.device != device:
                raise DecompkError(
                    f"{name} and its shift are {wanted} float32 on {device}, not {sizes(t)} {t.dtype} on {t.device}."
                )
    if e.residual is not None and (e.residual.shape != shape or e.residual.dtype != dtype):
        raise DecompkError(
            f"the residual {sizes(e.residual)} {e.residual.dtype} is not of the output's {tuple(shape)} {dtype}."
        )


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
    image = channels_inside(image)
    call = fprop_call(image, weight, None, (tuple(stride), tuple(padding), tuple(dilation)), tuple(window))
    grad = in_layout(grad, "member")  # no kernel asks how what stands beside crops lies
    one = wgrad_call(call, grad)
    return one.wgrad(chosen(one, asked_of(backend)), grad, image)


@_crop_backward.register_fake
def _(grad, image, weight, window, stride, padding, dilation, backend=None):
    return empty_weight(weight)


def _keep(ctx, inputs, output):
    x, weight, ctx.bias, scale, _, residual, relu, in_scale, _, _, ctx.window, _, *ctx.geometry = inputs
    ctx.inference = relu or any(t is not None for t in (scale, residual, in_scale))
    ctx.backend = noted()
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
