"""The layers of a network whose members lie side by side: what they take and give is (N, K·C, H, W), channels_last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..crops import Part
from ..errors import PackError
from ..kernels.torch_limits import as_torch_can
from .conv import PackedConv2d, PackedConvTranspose2d
from .linear import PackedPReLU
from .norm import PackedBatchNorm2d, PackedGroupNorm, PackedInstanceNorm2d
from .twin import channel_grouped, member_major

# ---- into the layout, and out of it ---------------------------------------------------------------------------------


def cut(x: Tensor, crops: Sequence[Part]) -> Tensor:
    """The image (N, C, *spatial) that all members share → their crops."""
    return torch.cat([crop.cut(x) for crop in crops], 1).contiguous(memory_format=torch.channels_last)


def repeat(x: Tensor, K: int) -> Tensor:
    """x (N, C, H, W), the same for all members."""
    return x.repeat(1, K, 1, 1).contiguous(memory_format=torch.channels_last)


def rows(x: Tensor, K: int, contiguous: bool) -> Tensor:
    """→ (K·N, C, …), channels_last, or channels first where contiguous."""
    if contiguous:
        return x.unflatten(1, (K, x.shape[1] // K)).transpose(0, 1).flatten(0, 1).contiguous()
    return member_major(x, K)


def rows_of_each(parts: Sequence[Tensor], K: int) -> tuple[Tensor, ...]:
    return tuple(member_major(part, K) for part in parts)


def repeated_rows(x: Tensor, K: int) -> Tensor:
    """x (N, …), the same for all members → (K·N, …)."""
    return torch.cat([x] * K)


def version(x: Tensor) -> int | None:
    """It grows with what is written into x; None where nobody counts."""
    return None if x.is_inference() else x._version


def as_written(x: Tensor, rows: Tensor, before: int | None, K: int) -> Tensor:
    """x, which was copied into rows, of which `before` was the version; or what was written into them since."""
    return x if before is not None and rows._version == before else channel_grouped(rows, K)


def shape_of_rows(x: Tensor, K: int, shared: bool) -> torch.Size:
    N, C, *spatial = x.shape
    return torch.Size((K * N, C if shared else C // K, *spatial))


def _members(x: Tensor, *channels: int) -> Tensor:
    """A view (N, H, W, *channels), of K and the rest."""
    return x.permute(0, 2, 3, 1).unflatten(3, channels)


def _joined(x: Tensor) -> Tensor:
    """The inverse of `_members`, without a copy where the channels lie so."""
    return x.flatten(3).permute(0, 3, 1, 2)


# ---- layers with tensors of their own -------------------------------------------------------------------------------


def convolve(x: Tensor, conv: PackedConv2d, K: int) -> Tensor:
    return _convolve(x, conv, K * conv.groups)


def convolve_shared(x: Tensor, conv: PackedConv2d) -> Tensor:
    """x (N, C, H, W), which all members read: one dense convolution, of a single group."""
    if x.shape[1] == 1:  # whose strides say neither, and torch would lay the result out channels first
        n, _, h, w = x.shape
        x = x.contiguous().as_strided((n, 1, h, w), (h * w, 1, w, 1))
    return _convolve(x, conv, 1)


def _convolve(x: Tensor, conv: PackedConv2d, groups: int) -> Tensor:
    weight, bias, padding = conv.weight.flatten(0, 1), _flat(conv.bias), conv.padding
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    x, weight = as_torch_can(x, weight, conv.stride, padding, conv.dilation)
    return F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, groups)


def convolve_transposed(x: Tensor, conv: PackedConvTranspose2d, K: int) -> Tensor:
    weight, groups = conv.weight.flatten(0, 1), K * conv.groups
    extra = conv._output_padding(x, None, conv.stride, conv.padding, conv.kernel_size, 2, conv.dilation)
    x, weight = as_torch_can(x, weight, conv.stride, conv.padding, conv.dilation)
    return F.conv_transpose2d(x, weight, _flat(conv.bias), conv.stride, conv.padding, extra, groups, conv.dilation)


def batch_norm(x: Tensor, norm: PackedBatchNorm2d, K: int) -> Tensor:
    mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    moves = norm.training and norm.track_running_stats
    if (moves and norm.momentum is None) or not all(t is None or t.is_contiguous() for t in (mean, var)):
        return channel_grouped(norm.forward(member_major(x, K)), K)  # each by a step of its own
    if moves and count is not None:
        count.add_(1)
    by_batch = norm.training or (mean is None and var is None)
    if norm.training and not norm.track_running_stats:
        mean = var = None
    momentum = 0.0 if norm.momentum is None else norm.momentum
    mean, var, weight, bias = map(_flat, (mean, var, norm.weight, norm.bias))
    return F.batch_norm(x, mean, var, weight, bias, by_batch, momentum, norm.eps)


def instance_norm(x: Tensor, norm: PackedInstanceNorm2d | nn.InstanceNorm2d, K: int) -> Tensor:
    mean, var = norm.running_mean, norm.running_var
    if not all(t is None or t.is_contiguous() for t in (mean, var)):
        return channel_grouped(norm.forward(member_major(x, K)), K)
    by_instance = norm.training or not norm.track_running_stats
    momentum = 0.0 if norm.momentum is None else norm.momentum
    mean, var, weight, bias = map(_flat, (mean, var, norm.weight, norm.bias))
    y = F.instance_norm(x, mean, var, weight, bias, by_instance, momentum, norm.eps)
    return y.contiguous(memory_format=torch.channels_last)


def group_norm(x: Tensor, norm: PackedGroupNorm | nn.GroupNorm, K: int) -> Tensor:
    return F.group_norm(x, K * norm.num_groups, _flat(norm.weight), _flat(norm.bias), norm.eps)


def prelu(x: Tensor, layer: PackedPReLU, K: int) -> Tensor:
    return F.prelu(x, layer.weight.expand(K, x.shape[1] // K).flatten())


def dropout(x: Tensor, layer: nn.Dropout, K: int) -> Tensor:
    """It draws for rows, in the order in which they lie."""
    return channel_grouped(layer.forward(member_major(x, K)), K) if layer.training else x


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.flatten()


# ---- what joins members' values, or takes them apart ----------------------------------------------------------------


def beside(value: Any, like: Tensor, K: int) -> Any:
    """What members compute with, to be combined with `like` (N, K·C, H, W): rows, a number, or a tensor without rows.

    Raises PackError for a tensor of more dimensions.
    """
    if not isinstance(value, Tensor):
        return like.new_tensor(value)
    if not value.dim():
        return value
    if value.dim() == 4 and value.shape[0] == K * like.shape[0]:
        return channel_grouped(value, K)
    if value.dim() > 4 or value.shape[: value.dim() - 3] not in ((), (1,)):
        raise PackError(
            f"a tensor of {tuple(value.shape)} meets {like.shape[0]} images a member of {tuple(like.shape[2:])} pixels."
        )
    return value[(None,) * (4 - value.dim())].repeat(1, K, 1, 1)


def combine(name: str, a: Tensor, b: Tensor, K: int, **options: Any) -> Tensor:
    """The method of a tensor of that name, of a and b: in-place where it is; one may have a single channel a member."""
    if not (a.dim() and b.dim()) or a.shape[1] == b.shape[1]:
        return getattr(a, name)(b, **options)
    y = getattr(_members(a, K, -1), name)(_members(b, K, -1), **options)
    return a if name.endswith("_") else _joined(y)


def concatenate(parts: Sequence[Tensor], K: int) -> Tensor:
    """Along each member's channels."""
    return _joined(torch.cat([_members(part, K, -1) for part in parts], 4))


def chunk(x: Tensor, K: int, count: int) -> tuple[Tensor, ...]:
    return tuple(map(_joined, _members(x, K, -1).chunk(count, 4)))


def split(x: Tensor, K: int, sizes: int | list[int]) -> tuple[Tensor, ...]:
    return tuple(map(_joined, _members(x, K, -1).split(sizes, 4)))


def index(x: Tensor, K: int, channels: slice, pixels: tuple[slice, ...]) -> Tensor:
    """x[:, channels, *pixels] of every member."""
    x = x[(slice(None), slice(None), *pixels)]
    return x if channels == slice(None) else _joined(_members(x, K, -1)[..., channels])


def pad_channels(x: Tensor, K: int, pad: Sequence[int], value: float | None) -> Tensor:
    """F.pad of six numbers: of columns, rows, and channels, by a constant."""
    around = (*pad[4:], 0, 0, *pad[:4])
    return _joined(F.pad(_members(x, K, -1), around, "constant", value))


def split_channels(x: Tensor, K: int, groups: int, each: int) -> Tensor:
    """→ (N, H, W, K, groups, each)."""
    return _members(x, K, groups, each)


def swap_channels(x: Tensor) -> Tensor:
    return x.transpose(4, 5)


def join_channels(x: Tensor) -> Tensor:
    """(N, H, W, K, …) → (N, K·C, H, W)."""
    return _joined(x)


def rows_of_split(x: Tensor) -> Tensor:
    """(N, H, W, K, groups, each) → (K·N, groups, each, H, W)."""
    return x.permute(3, 0, 4, 5, 1, 2).flatten(0, 1)
