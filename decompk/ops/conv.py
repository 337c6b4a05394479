"""K independent convolutions in one call: decompk::grouped_conv2d, its backward, and the drop-in for torch.conv2d."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..cost.formulas import conv_macs
from ..errors import DecompkError
from ..kernels.backend import ANY, forced, noted, resumed
from ..kernels.call import (
    Call,
    about,
    dgrad_call,
    follows,
    fprop_call,
    settle,
    unwatched,
    watched,
    wgrad_call,
)
from ..kernels.choose import choose
from ..kernels.conv.form import Choice
from ..kernels.layout import (
    channels_inside,
    check_alike,
    check_shapes,
    cut,
    empty_like_layout,
    empty_weight,
    kind_of,
    output_shape,
    sizes,
)
from ..kernels.problem import PLAIN, Epilogue, Geometry, Pair
from ..threads import once
from .followed import by_torch, conv_gradients


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """K independent convolutions in one launch: one convolution with a block-diagonal kernel.

    x (K, N, C, H, W) with channel stride 1: member-major, or a channels_last tensor of K·C channels seen as 5-D,
    without a copy; other strides are read as they are. Channels first (NCHW) is taken, too: it costs one copy, an
    ordinary `contiguous` in the graph. weight (K, O, C, kh, kw), bias (K, O), all of one floating dtype; under autocast
    they are cast to its dtype. → (K, N, O, H', W') in x's layout, channel stride 1. Sums are float32 (float64 for
    float64).

    Differentiable as often as torch's own operators, which compute whatever follows the first derivative, and all that
    torch.func, forward mode or an export looks at. NaN and infinity stay within their member: on Triton they may reach
    more of its elements than in torch, never fewer. Raises DecompkError for shapes, dtypes or sizes that do not fit.
    """
    if x.dim() != 5 or weight.dim() != 5:
        raise DecompkError(
            f"grouped_conv2d takes x (K, N, C, H, W) and weight (K, O, C, kh, kw), not {sizes(x, weight)}."
        )
    x, *geometry = padded(x, weight.shape[3:], stride, padding, dilation)
    return convolve(x, weight, bias, tuple(geometry))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """`grouped_conv2d` with stride, padding and dilation as pairs."""
    if unwatched(x, weight, bias):
        return convolve_now(x, weight, bias, geometry)
    if watched():
        check(x, weight, bias, *geometry)
        return by_torch(*autocast(x, weight, bias), *geometry)
    tell_flop_counter(register_flops)
    return torch.ops.decompk.grouped_conv2d(channels_inside(x), weight, bias, *geometry)


def convolve_now(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, window: tuple[int, ...] = ()
) -> Tensor:
    """`convolve` of what is `unwatched`: x (K, N, C, H, W), or rows (K·N, C, H, W), and y like it.

    With a window of crops x is the image (N, C, H, W) that all share, which needs no gradient, and y (K, N, O, H', W').
    """
    if master := torch.is_autocast_enabled(x.device.type):
        x, weight, bias = autocast_now(x, weight, bias)
    # What has to be copied is copied out here, where autograd sees it: a Function has to save what it got.
    x, call = settled_call(x.unsqueeze(0) if window else x, weight, bias, geometry, window, master=master)
    return _Conv.apply(x, weight, bias, call)


def settled_call(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, *around: Any, master: bool = False
) -> tuple[Tensor, Call]:
    """x as forms read it, a copy where it does not lie so, and its Call; around: the window and residual of `fused`."""
    call = fprop_call(x, weight, bias, geometry, *around, master=master)
    if call.settled:
        return x, call
    x = settle(x)
    return x, fprop_call(x, weight, bias, geometry, *around, master=master)


class _Conv(torch.autograd.Function):
    """The operator without torch's dispatcher, for what nobody looks on at."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        ctx.call, ctx.has_bias, ctx.asked = call, bias is not None, forced.get()
        ctx.save_for_backward(x, weight)
        return call.fprop(chosen(call, ctx.asked), x, weight, with_bias(bias))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = *ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]
        if follows(dy) or not unwatched(dy, x, weight):
            return *gradients_seen(dy, x, weight, ctx.call, wanted, ctx.asked), None
        x, call = call_again(ctx.call, x, weight)
        return *conv_backward(dy, x, weight, call, wanted, ctx.asked), None


def gradients_seen(
    dy: Tensor, x: Tensor, weight: Tensor, call: Call, wanted: Sequence[bool], asked: str | None
) -> list[Tensor | None]:
    """dx, dweight and dbias behind `call` for who looks on: differentiable where somebody differentiates again."""
    if window := call.ends.window:
        x = cut(x, window)
    run = conv_gradients if follows(dy) else _by_operator
    found = _as_members(run, dy, x, weight.to(x.dtype), call.ends.geometry, wanted, asked or ANY)
    return [None if t is None else t.to(like.dtype) for t, like in zip(found, (x, weight, weight), strict=True)]


def call_again(call: Call, x: Tensor, weight: Tensor) -> tuple[Tensor, Call]:
    """x as forms read it and its Call: that of the forward, unless hooks gave back what lies otherwise."""
    ends = call.ends
    if (about(x), about(weight)) == (ends.x, ends.weight):
        return x, call
    return settled_call(x, weight, None, ends.geometry, ends.window, master=True)


def _as_members(
    gradients: Callable[..., Sequence[Tensor | None]], dy: Tensor, x: Tensor, weight: Tensor, *more: Any
) -> Sequence[Tensor | None]:
    """dx, dweight, dbias by a function of members (K, N, C, H, W), also of rows (K·N, C, H, W)."""
    if x.dim() == 5:
        return gradients(dy, x, weight, *more)
    # What is_grads_batched batches has rules for views, and none for unflatten.
    members = (len(weight), x.shape[0] // len(weight))
    dx, *others = gradients(*(t.view(*members, *t.shape[1:]) for t in (dy, x)), weight, *more)
    return [None if dx is None else dx.reshape(-1, *dx.shape[2:]), *others]


def _by_operator(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: Sequence[bool], backend: str
) -> list[Tensor | None]:
    """For whoever looks on at a backward alone."""
    tell_flop_counter(register_flops)
    found = torch.ops.decompk.grouped_conv2d_backward(dy, x, weight, *geometry, list(wanted), backend)
    return [t if wants else None for t, wants in zip(found, wanted, strict=True)]


def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, call: Call, wanted: Sequence[bool], asked: str | None
) -> list[Tensor | None]:
    """dx, dweight and dbias behind `call` as wanted; asked: the backend that its forward was asked for."""
    dx = dw = db = None
    if wanted[0]:
        dgrad, dy = _of_gradient(dgrad_call, call, dy)
        dx = dgrad.dgrad(chosen(dgrad, asked), dy, weight)
    if wanted[1]:
        wgrad, dy = _of_gradient(wgrad_call, call, dy)
        dw = wgrad.wgrad(chosen(wgrad, asked), dy, x)
    if wanted[2]:
        db = dy.movedim(-3, -1).reshape(len(weight), -1, dy.shape[-3]).sum(1, dtype=weight.dtype)
    return [dx, dw, db]


def _of_gradient(kind: Callable[[Call, Tensor], Call], call: Call, dy: Tensor) -> tuple[Call, Tensor]:
    """The call of a gradient behind `call`, and dy as it reads it."""
    found = kind(call, dy)
    if found.settled:
        return found, dy
    dy = settle(dy)
    return kind(call, dy), dy


def chosen(call: Call, asked: str | None, fused: str = "") -> Choice:
    """Who runs `call` where backend `asked` is asked for; chosen, perhaps measured, when it first runs.

    fused: as Problem.fused.
    """
    key = asked, torch._C._get_deterministic_algorithms(), fused
    choice = call.choices.get(key)
    if choice is None:
        with resumed(asked or ANY):
            choice = call.choices[key] = choose(replace(call.problem, fused=fused), call.device)
    return choice


def with_bias(bias: Tensor | None) -> Epilogue:
    return PLAIN if bias is None else Epilogue(bias if bias.is_contiguous() else bias.contiguous())


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """torch.conv2d on the same kernels: x (N, G·C, H, W) or (G·C, H, W), weight (G·O, C, kh, kw), bias (G·O).

    → (N, G·O, H', W'), channels_last; x of another format is converted once. Errors as in `grouped_conv2d`.
    """
    if x.dim() == 3:
        return conv2d(x.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
    if x.dim() != 4 or weight.dim() != 4:
        raise DecompkError(f"conv2d takes x (N, G·C, H, W) and weight (G·O, C, kh, kw), not {sizes(x, weight)}.")
    if groups < 1 or x.shape[1] % groups or weight.shape[0] % groups:
        raise DecompkError(f"x {sizes(x)} and weight {sizes(weight)} do not divide into {groups} groups.")

    def by_group(t: Tensor, dim: int) -> Tensor:
        return t.unflatten(dim, (groups, t.shape[dim] // groups))

    # A transform knows no memory format.
    x = x if watched() else x.contiguous(memory_format=torch.channels_last)
    x = by_group(x, 1).transpose(0, 1)
    bias = None if bias is None else by_group(bias, 0)
    y = grouped_conv2d(x, by_group(weight, 0), bias, stride, padding, dilation)
    return y.transpose(0, 1).flatten(1, 2)


def arguments(kernel: Sequence[int], stride, padding, dilation) -> tuple[Pair, Pair, Pair]:
    """stride, padding and dilation as pairs; padding also "valid" or "same", as torch takes them."""
    stride, dilation = _pair(stride, "stride", 1), _pair(dilation, "dilation", 1)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        if stride != (1, 1):
            raise DecompkError(f'padding="same" needs stride 1, not {stride}.')
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    return stride, _pair(padding, "padding", 0), dilation


def padded(x: Tensor, kernel: Sequence[int], stride, padding, dilation) -> tuple[Tensor, Pair, Pair, Pair]:
    """x and `arguments`; with "same" padding and an even kernel x has the odd row or column behind, as in torch."""
    same = padding == "same"
    stride, padding, dilation = arguments(kernel, stride, padding, dilation)
    if same and (odd := [d * (k - 1) % 2 for d, k in zip(dilation, kernel, strict=True)]) != [0, 0]:
        x = F.pad(x, (0, odd[1], 0, odd[0]))
    return x, stride, padding, dilation


def _pair(value, name: str, least: int) -> Pair:
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= 2
    if len(values) != 2 or not all(isinstance(v, int) for v in values) or min(values) < least:
        raise DecompkError(f"{name} is one or two integers of at least {least}, not {value!r}.")
    return values


def check(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> tuple[int, ...]:
    """The output's shape; raises DecompkError where the tensors do not fit each other."""
    if x.dim() != 5 or weight.dim() != 5:
        raise DecompkError(
            f"grouped_conv2d takes x (K, N, C, H, W) and weight (K, O, C, kh, kw), not {sizes(x, weight)}."
        )
    kinds = [None if t is None else kind_of(t) for t in (x, weight, bias)]
    check_alike("grouped_conv2d", kind_of(x), **dict(zip(("x", "weight", "bias"), kinds, strict=True)))
    return check_shapes(x.shape, weight.shape, None if bias is None else bias.shape, stride, padding, dilation)


# ---- the operators --------------------------------------------------------------------------------------------------


@torch.library.custom_op("decompk::grouped_conv2d", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    x = channels_inside(x)
    call = fprop_call(x, weight, bias, (tuple(stride), tuple(padding), tuple(dilation)))
    return call.fprop(chosen(call, forced.get()), x, weight, with_bias(bias))


@_forward.register_fake
def _(x, weight, bias, stride, padding, dilation):
    return empty_like_layout(x, check(x, weight, bias, stride, padding, dilation))


@torch.library.custom_op("decompk::grouped_conv2d_backward", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    wanted: Sequence[bool],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); what is not wanted is empty. backend: what the forward noted (`backend.noted`)."""
    x = channels_inside(x)
    call = fprop_call(x, weight, None, (tuple(stride), tuple(padding), tuple(dilation)))
    found = conv_backward(grad, x, weight, call, wanted, asked_of(backend))
    return tuple(x.new_empty(0) if t is None else t for t in found)


def asked_of(backend: str | None) -> str | None:
    """The backend asked for, of what a forward noted; None: of whoever asks now."""
    if backend is None:
        return forced.get()
    return None if backend == ANY else backend


@_backward.register_fake
def _(grad, x, weight, stride, padding, dilation, wanted, backend=None):
    return _gradients(grad, x, weight, wanted)


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_like_layout(x, x.shape) if wanted[0] else x.new_empty(0),
        empty_weight(weight) if wanted[1] else x.new_empty(0),
        x.new_empty(weight.shape[:2]) if wanted[2] else x.new_empty(0),
    )


def _keep(ctx, inputs, output):
    x, weight, bias, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.has_bias, ctx.backend = bias is not None, noted()
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, grad):
    x, weight = ctx.saved_tensors
    wanted = [*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]]
    geometry = ctx.stride, ctx.padding, ctx.dilation
    if follows(grad):
        gradients = conv_gradients(grad, x, weight, geometry, wanted, ctx.backend)
    else:
        gradients = torch.ops.decompk.grouped_conv2d_backward(grad, x, weight, *geometry, wanted, ctx.backend)
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), None, None, None


def _once(ctx, *grads):
    raise DecompkError("decompk::grouped_conv2d_backward has no derivative: differentiate ops.grouped_conv2d twice.")


_forward.register_autograd(_differentiate, setup_context=_keep)
_backward.register_autograd(_once)


_library = torch.library.Library("decompk", "FRAGMENT")


def autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of an operator as autocast casts them: in its dtype, where it is enabled and none is float64."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or torch.float64 in (x.dtype, weight.dtype):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def autocast_now(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """`autocast` of what is `unwatched`: weights stay float32 where Triton's kernels, which read them so, may run."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight, bias
    if not (device == "cuda" or forced.get() == "triton") or weight.dtype is not torch.float32:
        return autocast(x, weight, bias)
    return x if x.dtype is torch.float64 else x.to(torch.get_autocast_dtype(device)), weight, bias


def register_autocast(name: str) -> None:
    """Under autocast: decompk::`name`'s x, weight and bias in its dtype, then the operator itself."""

    def implement(device: str) -> None:
        key = f"Autocast{device.upper()}"

        def run(x, weight, bias, *arguments):
            operands = autocast(x, weight, bias)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                return getattr(torch.ops.decompk, name)(*operands, *arguments)

        _library.impl(name, run, key)

    for device in ("cpu", "cuda"):
        implement(device)


register_autocast("grouped_conv2d")


def tell_flop_counter(register: Callable[[], None]) -> None:
    """`register` operators' formulas with torch's FLOP counter, once that is loaded: it loads triton."""
    if torch.compiler.is_compiling() or "torch.utils.flop_counter" not in sys.modules:
        return
    register()
    for mode in _get_current_dispatch_mode_stack():  # a counter under way copied the formulas when it was made
        if hasattr(mode, "counter"):
            registry = sys.modules["torch.utils.flop_counter"].flop_registry
            mode.counter.flop_registry.update({op: f for op, f in registry.items() if "decompk" in str(op)})


@once
def register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    @register_flop_formula(torch.ops.decompk.grouped_conv2d)
    def forward(x, weight, bias, stride, padding, dilation, *, out_shape=None, **_) -> int:
        positions = prod(output_shape(x, weight, stride, padding, dilation)[3:])
        return 2 * x[0] * x[1] * conv_macs(positions, x[2], weight[1], weight[3:])

    @register_flop_formula(torch.ops.decompk.grouped_conv2d_backward)
    def backward(grad, x, weight, stride, padding, dilation, wanted, backend=None, *, out_shape=None, **_) -> int:
        return sum(wanted[:2]) * 2 * x[0] * x[1] * conv_macs(prod(grad[3:]), x[2], weight[1], weight[3:])

    @register_flop_formula(torch.ops.decompk.fused_conv2d)
    def fused(x, weight, *_, out_shape, **__) -> int:
        K, N, O, H, W = out_shape[0]
        return 2 * K * N * conv_macs(H * W, x[2], O, weight[3:])

    @register_flop_formula(torch.ops.decompk.crop_conv2d_backward)
    def crop_backward(grad, image, weight, *_, out_shape=None, **__) -> int:
        return 2 * prod(grad[:2]) * conv_macs(prod(grad[3:]), image[2], weight[1], weight[3:])
