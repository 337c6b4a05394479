"""K independent convolutions in one call: decompk::grouped_conv2d, its backward, and the drop-in for torch.conv2d."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..cost.formulas import conv_macs
from ..errors import DecompkError
from ..kernels import choose as dispatch
from ..kernels import library
from ..kernels.layout import (
    aligned,
    as_strided_like,
    channels_inside,
    check_shapes,
    empty_like_layout,
    empty_weight,
    layout_of,
    nhwc,
    ohwi,
    output_shape,
    sizes,
    stream,
)
from ..kernels.problem import DTYPES, Epilogue, Problem, dtype_name
from ..threads import once
from . import on_cpu
from .followed import conv_gradients, follows

Pair = tuple[int, int]


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
    if on_cpu.takes(x, weight, bias) and layout_of(x) == "member" and prod(check(x, weight, bias, *geometry)):
        return on_cpu.conv2d(x.flatten(0, 1), weight, bias, *geometry).unflatten(0, x.shape[:2])
    if dispatch.watched():
        check(x, weight, bias, *geometry)
        return library.by_torch(*autocast(x, weight, bias), *geometry)
    tell_flop_counter(register_flops)
    return torch.ops.decompk.grouped_conv2d(channels_inside(x), weight, bias, *geometry)


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
    x = x if dispatch.watched() else x.contiguous(memory_format=torch.channels_last)
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
    check_alike("grouped_conv2d", x, x=x, weight=weight, bias=bias)
    return check_shapes(x.shape, weight.shape, None if bias is None else bias.shape, stride, padding, dilation)


def check_alike(operator: str, x: Tensor, /, **operands: Tensor | None) -> None:
    """Raise DecompkError where an operand is not floating, or not of x's dtype and device."""
    for name, t in operands.items():
        if t is not None and not t.is_floating_point():
            raise DecompkError(f"{operator} takes real floating dtypes, and {name} is {t.dtype}: convert it.")
        if t is not None and t.dtype != x.dtype:
            raise DecompkError(
                f"{operator} needs one floating dtype; x is {x.dtype}, {name} is {t.dtype}: convert one of them."
            )
        if t is not None and t.device != x.device:
            raise DecompkError(f"x is on {x.device} and {name} on {t.device}: move one of them.")


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
    shape = check(x, weight, bias, stride, padding, dilation)
    y = empty_like_layout(x, shape)
    if not y.numel():
        return y
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    x, w = channels_inside(x), ohwi(weight)
    problem, views = operands("fprop", x, w, geometry, (x, y))
    choice = dispatch.choose(problem, x.device)
    if choice.backend in library.BACKENDS:
        return as_strided_like(library.forward(choice.form, x, weight, bias, *geometry), y).data  # not a view
    from ..kernels import conv

    conv.fprop(
        problem, choice.config, views[0], w, views[1], Epilogue(bias=None if bias is None else bias.contiguous())
    )
    return y


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
    """(dx, dweight, dbias); what is not wanted is empty. backend: what the forward noted (`dispatch.noted`)."""
    dx, dw, db = _gradients(grad, x, weight, wanted)
    if not grad.numel():
        return tuple(t.zero_() for t in (dx, dw, db))
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    grad, x, w = settled(grad), channels_inside(x), ohwi(weight)
    if wanted[2]:
        db = grad.sum((1, 3, 4))
    chosen = {}
    for kind, wants, tensors in (("dgrad", wanted[0], (dx, grad)), ("wgrad", wanted[1], (x, grad))):
        if wants:
            problem, views = operands(kind, x, w, geometry, tensors)
            with dispatch.resumed(backend):
                chosen[kind] = problem, views, dispatch.choose(problem, x.device)
    forms = {kind: choice.form for kind, (_, _, choice) in chosen.items() if choice.backend in library.BACKENDS}
    found = library.backward_by_forms((forms.get("dgrad"), forms.get("wgrad")), grad, x, weight, *geometry)
    dx, dw = (out if t is None else as_strided_like(t, out) for t, out in zip(found, (dx, dw), strict=True))
    for kind in chosen.keys() - forms.keys():
        from ..kernels import conv

        problem, views, choice = chosen[kind]
        if kind == "dgrad":
            conv.dgrad(problem, choice.config, views[1], w, views[0])
        else:
            conv.wgrad(problem, choice.config, views[1], views[0], dw.movedim(2, -1))
    return dx, dw, db


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
    ctx.has_bias, ctx.backend = bias is not None, dispatch.noted()
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


def settled(grad: Tensor) -> Tensor:
    """A gradient with channels inside and memory of its own: that of a sum comes expanded."""
    return channels_inside(grad.contiguous() if 0 in grad.stride() else grad)


def operands(
    kind: str,
    x: Tensor,
    w: Tensor,
    geometry: tuple[Pair, Pair, Pair],
    activations: Sequence[Tensor],
    crops: bool = False,
) -> tuple[Problem, list[Tensor]]:
    """The Problem of x (K, N, C, H, W) and w (K, O, kh, kw, C), and the activations as (K, N, H, W, C).

    Its layout is theirs where they agree. A pointwise one is streamed, where no gaps part the pixels.
    """
    K, N, C, H, W = x.shape
    layouts = {layout_of(t) for t in activations}
    layout = "crops" if crops else layouts.pop() if len(layouts) == 1 else "strided"
    tf32 = x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
    sides = (K, N, C, w.shape[1], H, W, tuple(w.shape[2:4]))
    problem = Problem(kind, dtype_name(x.dtype, tf32), *sides, *geometry, layout)
    views = [nhwc(t) for t in activations]
    one_image = problem.streamed()
    if one_image != problem:
        streams = [stream(view, one_image.H, one_image.W) for view in views]
        if all(t is not None for t in streams):
            problem, views = one_image, streams
    straight = problem.dtype in DTYPES and aligned([*views, w])
    return (problem if straight else replace(problem, aligned=False)), views
