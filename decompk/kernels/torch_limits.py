"""What torch's own convolutions on a CPU cannot be given: oneDNN's faults, and ways round them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn


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
