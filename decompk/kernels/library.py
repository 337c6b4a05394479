"""K convolutions by form, on torch's own operators (cuDNN's on a GPU) or, on a CPU, the C++ kernels.

"loop": in turn; "grouped": as channel groups; "matmul": as one batched product; "direct" and "winograd": `kernels.cpu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from ..errors import BackendError
from . import choose as dispatch
from . import cpu
from .problem import TORCH_FORMS, Epilogue, Prologue

BACKENDS = ("torch", "cpu")  # of a Choice whose form is one of these

Pair = tuple[int, int]


def forward(
    form: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    differentiable: bool = False,
) -> Tensor:
    """x (K, N, C, H, W), weight (K, O, C, kh, kw), bias (K, O) → (K, N, O, H', W'), its strides as they come.

    differentiable: torch's autograd may run behind it; only the forms of torch's own operators can be.
    """
    _known(form)
    if form in cpu.FORMS:
        return cpu.forward(form, x, weight, bias, stride, padding)
    if form == "matmul":
        x, shape = _rows(x, stride)
        weight = weight.flatten(2).mT
        y = torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)
        return y.view(*shape, -1).movedim(-1, 2)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        x, weight = as_torch_can(x, weight, stride, padding, dilation, differentiable)
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, (0, 0), groups)

    if form == "loop" or mixes_groups(x, len(x), *weight.shape[1:3]):
        members = [
            convolve(*member, 1)
            for member in zip(x, weight, bias if bias is not None else [None] * len(x), strict=True)
        ]
        return torch.cat(members).unflatten(0, x.shape[:2])
    y = convolve(side_by_side(x), weight.flatten(0, 1), None if bias is None else bias.flatten(), len(x))
    return y.unflatten(1, weight.shape[:2]).movedim(1, 0)


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """`forward` for whatever follows torch's own operators: any derivative, torch.func, an export."""
    form = "loop" if dispatch.exact(x.dtype) else "grouped"
    return forward(form, x, weight, bias, stride, padding, dilation, differentiable=True)


def fused(
    form: str,
    x: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    epilogue: Epilogue,
    prologue: Prologue | None,
    moments: bool,
    differentiable: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(y, moments (K, 1, 3, O) if wanted): `forward` with a prologue and an epilogue, one step after the other."""
    e = epilogue
    if prologue is not None:
        value = x * _channels(prologue.scale) + _channels(prologue.shift)
        x = (value.relu() if prologue.relu else value).to(x.dtype)
    bias = e.bias
    if e.scale is not None:  # goes into weights and bias
        weight = (weight * e.scale[..., None, None, None]).to(x.dtype)
        bias = (e.shift if bias is None else e.shift + bias * e.scale).to(x.dtype)
    y = forward(form, x, weight, bias, stride, padding, dilation, differentiable)
    found = moments_of(y) if moments else None
    if e.residual is not None:
        y = y + e.residual
    return (y.relu() if e.relu else y), found


def _known(form: str) -> None:
    known = TORCH_FORMS + cpu.FORMS
    if form not in known:
        raise BackendError(f"no library convolves in the form '{form}': choose one of {', '.join(known)}.")


def moments_of(y: Tensor) -> Tensor:
    """(K, 1, 3, C): count, mean and Σ(y − mean)² over samples and pixels, float32 (float64 for float64)."""
    value = y if y.dtype == torch.float64 else y.float()
    variance, mean = torch.var_mean(value, (1, 3, 4), correction=0)
    count = torch.full_like(mean, y.numel() // mean.numel())
    return torch.stack((count, mean, variance * count), 1).unsqueeze(1)


def _channels(t: Tensor) -> Tensor:
    """(K, C) against (K, N, C, H, W)."""
    return t[:, None, :, None, None]


def backward(
    form: str,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight) as wanted, None for what is not."""
    _known(form)
    K, N = x.shape[:2]
    if form in cpu.FORMS:
        return cpu.backward(form, grad, x, weight, stride, padding, wanted)
    if form == "matmul":
        rows, _ = _rows(x, stride)
        dy = grad.movedim(2, -1).reshape(K, -1, grad.shape[2])
        dx = dw = None
        if wanted[0]:
            flat = torch.bmm(dy, weight.flatten(2)).view(*grad.shape[:2], *grad.shape[3:], -1).movedim(-1, 2)
            dx = flat if stride == (1, 1) else torch.zeros_like(x)
            if dx is not flat:
                dx[..., :: stride[0], :: stride[1]] = flat
        if wanted[1]:
            dw = torch.bmm(dy.mT, rows).view(weight.shape)
        return dx, dw

    def convolve(grad: Tensor, x: Tensor, weight: Tensor, groups: int) -> tuple[Tensor | None, Tensor | None]:
        if overruns(x, weight, stride):
            grad, x, weight = (t.contiguous() for t in (grad, x, weight))
        mask = [*wanted, False]
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
        )[:2]

    if form == "loop" or mixes_groups(x, K, *weight.shape[1:3]):
        dx, dw = zip(*(convolve(*member, 1) for member in zip(grad, x, weight, strict=True)), strict=True)
        return (torch.cat(dx).view(x.shape) if wanted[0] else None), (torch.stack(dw) if wanted[1] else None)
    dx, dw = convolve(side_by_side(grad), side_by_side(x), weight.flatten(0, 1), K)
    return (
        dx.unflatten(1, (K, x.shape[2])).movedim(1, 0) if wanted[0] else None,
        dw.view(weight.shape) if wanted[1] else None,
    )


def backward_by_forms(
    forms: tuple[str | None, str | None],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight), each by its own form, None for what has none; one call for both where both run so."""
    dx = dw = None
    for form in dict.fromkeys(form for form in forms if form):
        wanted = forms[0] == form, forms[1] == form
        found = backward(form, grad, x, weight, stride, padding, dilation, wanted)
        dx, dw = (new if wants else old for old, new, wants in zip((dx, dw), found, wanted, strict=True))
    return dx, dw


def as_torch_can(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int] | int | str,
    dilation: Sequence[int],
    differentiable: bool = True,
) -> tuple[Tensor, Tensor]:
    """x and weight, laid out so that torch's convolution, and its backward if it is differentiable, survive them."""
    if differentiable and overruns(x, weight, stride):
        x, weight = x.contiguous(), weight.contiguous()
    if sees_nothing(x, weight, stride, padding, dilation):  # what has one pixel may be contiguous and channels_last
        x, weight = (t.clone(memory_format=torch.contiguous_format) for t in (x, weight))
    return x, weight


def mixes_groups(x: Tensor, groups: int, *channels: int) -> bool:
    """Whether NaN of one group may reach the next in torch's grouped convolution: bfloat16 on a CPU, odd channels.

    oneDNN, in torch 2.13, reads bfloat16 in pairs, and multiplies the first of the next group by zero: in fprop where a
    group's inputs, in dgrad where its outputs are odd in number. channels: how many both are.
    """
    if x.device.type != "cpu" or groups == 1:
        return False
    low = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return (x.dtype == torch.bfloat16 or low) and any(count % 2 for count in channels)


def sees_nothing(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int] | int | str, dilation: Sequence[int]
) -> bool:
    """Whether every window of a dilated convolution misses the input along its last axis, of which torch may die.

    oneDNN, in torch 2.13 on a CPU with AVX2 or AVX-512, calls a kernel that it has not made, at address 0, where the
    last axis is dilated, two outputs or more lie along it and none reads an input, the rows of the other axes do read
    some, x or weight is channels_last (of signals: of length 1), and the dtype is float32 with a bias or bfloat16;
    1-D to 3-D, grouped or not, on any number of threads. It computes as it should without one of these, in
    backward, and transposed.
    """
    n, k, s, d = x.shape[-1], weight.shape[-1], stride[-1], dilation[-1]
    if d == 1 or x.device.type != "cpu" or not isinstance(n, int):  # a trace would keep what is asked of its sizes
        return False
    if n >= max(s, d):  # steps no wider than the input do not miss it
        return False
    if isinstance(padding, str):
        before = d * (k - 1) // 2 if padding == "same" else 0
    else:
        before = padding if isinstance(padding, int) else padding[-1]
    starts = range(-before, n + before - d * (k - 1), s)
    return not any(0 <= start + d * tap < n for start in starts for tap in range(k))


def overruns(x: Tensor, weight: Tensor, stride: Sequence[int]) -> bool:
    """Whether torch's wgrad would write past its memory unless all is contiguous: oneDNN's in torch 2.13, on a CPU.

    So it does where fewer channels are read than a register holds: 16 of AVX-512, 8 of AVX2.
    """
    return x.device.type == "cpu" and _reads_too_few(x.shape[1], weight.shape[2:], stride)


def _reads_too_few(channels: int, kernel: Sequence[int], stride: Sequence[int]) -> bool:
    return prod(kernel) == 1 and max(stride) > 1 and channels < 16


def is_delicate(layer: nn.Module) -> bool:
    """Whether a layer's own numbers leave it open that `overruns` or `sees_nothing` is true of its convolution."""
    if not isinstance(layer, nn.modules.conv._ConvNd) or layer.transposed:
        return False
    few = _reads_too_few(layer.in_channels, layer.kernel_size, layer.stride)
    return few or (layer.dilation[-1] > 1 and layer.padding not in ("valid", (0,) * len(layer.dilation)))


def side_by_side(x: Tensor) -> Tensor:
    """(K, N, C, H, W) → (N, K·C, H, W), channels_last; without a copy where the members already lie so."""
    return x.permute(1, 3, 4, 0, 2).flatten(3).permute(0, 3, 1, 2)


def cut(image: Tensor, window: Sequence[int]) -> Tensor:
    """An image (1, N, C, H, W) and a window (h, w, top and left of each member) → the crops (K, N, C, h, w), copied."""
    h, w, *starts = window
    pixels = image[0].permute(0, 2, 3, 1)
    corners = zip(starts[::2], starts[1::2], strict=True)
    return torch.stack([pixels[:, top : top + h, left : left + w] for top, left in corners]).movedim(-1, 2)


def _rows(x: Tensor, stride: Pair) -> tuple[Tensor, tuple[int, ...]]:
    """(K, N·H'·W', C) of the pixels that a 1×1 kernel reads, and (K, N, H', W')."""
    x = x[..., :: stride[0], :: stride[1]].movedim(2, -1)
    return x.reshape(x.shape[0], -1, x.shape[-1]), tuple(x.shape[:4])
