"""How K activations lie in memory, member-major, channel-grouped or otherwise; allocating like them; their shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import DecompkError

# Dimensions of (K, N, C, H, W) from the outermost in memory to the innermost.
ORDERS = {"member": (0, 1, 3, 4, 2), "channel-grouped": (1, 3, 4, 0, 2)}


def strides_of(layout: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense (K, N, C, H, W) tensor in `layout`, "member" or "channel-grouped"."""
    strides, step = [0] * 5, 1
    for dim in reversed(ORDERS[layout]):
        strides[dim] = step
        step = step * max(shape[dim], 1)
    return tuple(strides)


def layout_of(x: Tensor) -> str:
    """ "member", "channel-grouped", or "strided" for any other strides; dimensions of size 1 may have any stride."""
    for layout in ORDERS:
        expected = strides_of(layout, x.shape)
        if all(size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), expected, strict=True)):
            return layout
    return "strided"


def in_layout(t: Tensor, layout: str) -> Tensor:
    """t (K, N, C, H, W) itself where it lies in `layout`, "member" or "channel-grouped", else a copy."""
    if layout_of(t) == layout:
        return t
    if t.numel() == 0:
        return t.as_strided(t.shape, strides_of(layout, t.shape))
    order = ORDERS[layout]
    return t.permute(order).contiguous().permute([order.index(dim) for dim in range(5)])


def channels_inside(x: Tensor) -> Tensor:
    """x itself where its channels are contiguous, else one member-major copy: what an NCHW tensor costs."""
    if x.dim() != 5 or x.shape[2] == 1 or x.stride(2) == 1:
        return x
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


def empty_like_layout(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of `shape`, channel-grouped where x is, else member-major."""
    layout = "channel-grouped" if layout_of(x) == "channel-grouped" else "member"
    return torch.empty_strided(shape, strides_of(layout, shape), dtype=dtype or x.dtype, device=x.device)


def empty_weight(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor like weight (K, O, C, kh, kw), OHWI in memory."""
    K, O, C, *kernel = weight.shape
    return weight.new_empty((K, O, *kernel, C), dtype=dtype).movedim(-1, 2)


def as_strided_like(x: Tensor, like: Tensor) -> Tensor:
    """x where it already has the strides of `like`, else `like` filled with it."""
    return x if x.stride() == like.stride() else like.copy_(x)


def nhwc(x: Tensor) -> Tensor:
    """(K, N, C, H, W) → (K, N, H, W, C) as kernels take it; dimensions of size 1 get regular strides."""
    x = x.permute(0, 1, 3, 4, 2)
    strides = [1 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    extent = max(size * stride for size, stride in zip(x.shape, strides, strict=True))
    outer = [extent if size == 1 else stride for size, stride in zip(x.shape[:4], strides[:4], strict=True)]
    return x.as_strided(x.shape, (*outer, strides[4]))


def as_one_image(x: Tensor, rows: int, width: int) -> Tensor | None:
    """(K, N, H, W, C) → (K, 1, rows, width, C): one image of all pixels; None where gaps part them."""
    K, N, H, W, C = x.shape
    k, n, h, w, _ = x.stride()
    if (H > 1 and h != W * w) or (N > 1 and n != (H * h if H > 1 else W * w)):
        return None
    pixel = w if W > 1 else h if H > 1 else n
    return x.as_strided((K, 1, rows, width, C), (k, N * H * W * pixel, width * pixel, pixel, 1))


def aligned(tensors: Iterable[Tensor]) -> bool:
    """Whether base addresses and all strides but the innermost are multiples of 16 bytes, as descriptors need."""
    return all(
        all(stride * t.element_size() % 16 == 0 for stride in t.stride()[:-1])
        and (t.storage_offset() * t.element_size() if isinstance(t, FakeTensor) else t.data_ptr()) % 16 == 0
        for t in tensors
    )


def sizes(*tensors: Tensor) -> str:
    """The shapes of tensors, for a message."""
    return " and ".join(str(tuple(t.shape)) for t in tensors)


def output_shape(
    x: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """(K, N, O, H', W')."""
    spatial = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x[3:], weight[3:], stride, padding, dilation, strict=True)
    ]
    return (x[0], x[1], weight[1], *spatial)


def check_alike(
    operator: str, x: tuple[torch.dtype, torch.device], /, **operands: tuple[torch.dtype, torch.device] | None
) -> None:
    """Raise DecompkError where an operand, (dtype, device) or None, is not floating, or not of x's dtype and device."""
    for name, operand in operands.items():
        if operand is None:
            continue
        dtype, device = operand
        if not dtype.is_floating_point:
            raise DecompkError(f"{operator} takes real floating dtypes, and {name} is {dtype}: convert it.")
        if dtype != x[0]:
            raise DecompkError(
                f"{operator} needs one floating dtype; x is {x[0]}, {name} is {dtype}: convert one of them."
            )
        if device != x[1]:
            raise DecompkError(f"x is on {x[1]} and {name} on {device}: move one of them.")


def kind_of(t: Tensor) -> tuple[torch.dtype, torch.device]:
    """What `check_alike` compares."""
    return t.dtype, t.device


def check_shapes(
    x: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """`output_shape` of x (K, N, C, H, W), weight (K, O, C, kh, kw) and bias (K, O); raises DecompkError for others."""
    if x[0] != weight[0] or x[2] != weight[2]:
        members, channels = x[0], x[2]
        raise DecompkError(
            f"x {tuple(x)} has {members} members of {channels} channels, weight {tuple(weight)} has {weight[0]} of "
            f"{weight[2]}."
        )
    if bias is not None and tuple(bias) != tuple(weight[:2]):
        raise DecompkError(f"bias {tuple(bias)} does not fit weight {tuple(weight)}: it has to be (K, O).")
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        raise DecompkError(
            f"stride {tuple(stride)}, padding {tuple(padding)} and dilation {tuple(dilation)}: strides and dilations "
            "start at 1 and padding at 0."
        )
    if not x[0] or not x[2] or not weight[1] or not weight[3] * weight[4]:
        raise DecompkError(f"x {tuple(x)} and weight {tuple(weight)}: only the batch may be empty.")
    shape = output_shape(x, weight, stride, padding, dilation)
    if min(shape[3:]) < 1:
        raise DecompkError(
            f"a {weight[3]}×{weight[4]} kernel of dilation {tuple(dilation)} does not fit images of {x[3]}×{x[4]} "
            f"pixels with padding {tuple(padding)}."
        )
    return shape


def side_by_side(x: Tensor) -> Tensor:
    """(K, N, C, *spatial) → (N, K·C, *spatial): members as channel groups.

    Images become channels_last, without a copy where the members already lie so.
    """
    if x.dim() == 5:
        return x.permute(1, 3, 4, 0, 2).flatten(3).permute(0, 3, 1, 2)
    return x.transpose(0, 1).flatten(1, 2)


def cut(image: Tensor, window: Sequence[int]) -> Tensor:
    """An image (1, N, C, H, W) and a window (h, w, top and left of each member) → the crops (K, N, C, h, w), copied."""
    h, w, *starts = window
    pixels = image[0].permute(0, 2, 3, 1)
    corners = zip(starts[::2], starts[1::2], strict=True)
    return torch.stack([pixels[:, top : top + h, left : left + w] for top, left in corners]).movedim(-1, 2)


def streams(x: Tensor) -> tuple[int, int, int]:
    """x as (streams, rows, channels) without gaps: K streams of C channels; one of K·C where it is channel-grouped."""
    K, N, C, H, W = x.shape
    return (K, N * H * W, C) if layout_of(x) == "member" else (1, N * H * W, K * C)


def pieces_of(x: Tensor) -> int:
    """Into how many pieces the pixels of x are cut for sums: enough to fill any GPU, each far larger than its sums."""
    count, rows, channels = streams(x)
    filling = max(1024 // (count * -(-channels // 128)), 1)
    least = max(2048 // channels, 128)
    return torch.sym_max(torch.sym_min(filling, (rows + least - 1) // least), 1)
