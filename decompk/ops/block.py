"""Convolutions and linear layers that skip zero blocks of their weight: decompk::block_conv2d, decompk::block_linear.

A mask of R × S blocks says which are kept. `choose_blocks` decides from shapes alone who computes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cost.formulas import conv_macs
from ..errors import BackendError, DecompkError
from ..kernels.backend import asked_for, noted, resumed, runs_triton
from ..kernels.block_choice import (
    BlockChoice,
    BlockMask,
    Group,
    check_division,
    choose_blocks,
    grouped,
    mask_text,
    transpose,
    with_form,
)
from ..kernels.call import follows, watched
from ..kernels.layout import as_strided_like, check_alike, kind_of, sizes
from ..kernels.problem import DTYPES, Pair, Problem, dtype_name
from ..kernels.torch_limits import as_torch_can
from ..threads import once
from .conv import check, padded, register_autocast, tell_flop_counter
from .followed import gradients


def block_conv2d(
    x: Tensor,
    weight: Tensor,
    block_mask: BlockMask,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    *,
    skipped_gradients: bool = False,
) -> Tensor:
    """torch.conv2d with a weight of R × S blocks, of which the zero ones are skipped.

    x (N, C, H, W), channels_last: another format is converted once. weight (O, C, kh, kw), best channels_last, bias
    (O), all of one floating dtype; under autocast they are cast to its dtype. block_mask (R, S) is on the host: nested
    sequences of bools, a CPU tensor, or the text of `mask_text`, which costs nothing to pass (compiled code takes no
    tensor). Block (r, s) covers output channels r·O/R … and input channels s·C/S …; where it is False the weight counts
    as zero whatever it holds, and its gradient is zero, or with `skipped_gradients` that of the dense operator.
    → (N, O, H', W'), channels_last. Sums are float32 (float64 for float64).

    `choose_blocks` says who computes; the dense operator, where that is faster, multiplies x by zeros in place of
    skipping. Differentiable as often as torch's own operators: see `grouped_conv2d`. Raises DecompkError for shapes,
    dtypes, masks or sizes that do not fit.
    """
    mask = mask_text(block_mask)
    if x.dim() == 3:
        x = x.unsqueeze(0)
        y = block_conv2d(x, weight, mask, bias, stride, padding, dilation, skipped_gradients=skipped_gradients)
        return y.squeeze(0)
    if x.dim() != 4 or weight.dim() != 4:
        raise DecompkError(f"block_conv2d takes x (N, C, H, W) and weight (O, C, kh, kw), not {sizes(x, weight)}.")
    x, *geometry = padded(x, weight.shape[2:], stride, padding, dilation)
    if watched():
        _check(x, weight, bias, mask, *geometry)
        return _dense_conv(x, weight, bias, mask, *geometry, skipped_gradients)
    tell_flop_counter(_register_flops)
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.decompk.block_conv2d(x, weight, bias, mask, *geometry, skipped_gradients)


def block_linear(
    x: Tensor,
    weight: Tensor,
    block_mask: BlockMask,
    bias: Tensor | None = None,
    *,
    skipped_gradients: bool = False,
) -> Tensor:
    """torch.nn.functional.linear with a weight of R × S blocks, on matrix products of the kept ones.

    x (..., C), weight (O, C), bias (O) → (..., O); dtypes, block_mask, gradients and errors as in `block_conv2d`.
    """
    mask = mask_text(block_mask)
    if watched():
        _check_linear(x, weight, bias, mask)
        return _dense_linear(x, weight, bias, mask, skipped_gradients)
    tell_flop_counter(_register_flops)
    return torch.ops.decompk.block_linear(x, weight, bias, mask, skipped_gradients)


@functools.cache
def _kernels() -> ModuleType:
    from ..kernels import block  # triton loads with it

    return block


# ---- the mask on torch's operators ----------------------------------------------------------------------------------


class Products(NamedTuple):
    """A dense operator's three passes on channels at dimension 1: weight (O, C, …)."""

    fprop: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x, weight, bias
    dgrad: Callable[[Tensor, Tensor], Tensor]  # dy, weight
    wgrad: Callable[[Tensor, Tensor], Tensor]  # dy, x


LINEAR = Products(F.linear, lambda dy, weight: dy @ weight, lambda dy, x: dy.T @ x)


def _conv_products(
    image: Sequence[int], kernel: Sequence[int], stride: Pair, padding: Pair, dilation: Pair
) -> Products:
    """Those of a convolution of `kernel` size on `image` (H, W)."""

    def backward(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Sequence[Tensor]:
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [*wanted, False]
        )

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = as_torch_can(x, weight, stride, padding, dilation, differentiable=False)
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, (0, 0), 1)

    return Products(
        forward,
        # Of x in dgrad, and of the weight in wgrad, torch reads the shape alone.
        lambda dy, weight: backward(dy, _channels_last(dy, (len(dy), weight.shape[1], *image)), weight, [True, False])[
            0
        ],
        lambda dy, x: backward(dy, x, x.new_empty((dy.shape[1], x.shape[1], *kernel)), [False, True])[1],
    )


def _channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _runs(blocks: Sequence[int], size: int) -> list[tuple[int, int]]:
    """(first, number) of the channels of `blocks`, those side by side as one."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and sum(runs[-1]) == block * size:
            runs[-1] = runs[-1][0], runs[-1][1] + size
        else:
            runs.append((block * size, size))
    return runs


def _take(t: Tensor, dim: int, blocks: Sequence[int], size: int) -> Tensor:
    """The channels of `blocks`: a view where they lie side by side, else a copy."""
    parts = [t.narrow(dim, *run) for run in _runs(blocks, size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _put(t: Tensor, dim: int, blocks: Sequence[int], size: int, value: Tensor) -> None:
    """The reverse of `_take`: writes `value` into those channels of t."""
    runs = _runs(blocks, size)
    for run, part in zip(runs, value.split([number for _, number in runs], dim), strict=True):
        t.narrow(dim, *run).copy_(part)


def _corner(choice: BlockChoice, weight: Tensor, group: Group) -> Tensor:
    return _take(_take(weight, 0, group.rows, choice.out_block), 1, group.columns, choice.in_block)


@functools.lru_cache(maxsize=1024)
def _kept_on(choice: BlockChoice, device: torch.device) -> Tensor:
    """The mask (R, S) on the device; kept, so that a captured graph copies nothing from the host."""
    return torch.tensor(choice.mask, dtype=torch.bool, device=device)


def _masked(choice: BlockChoice, weight: Tensor) -> Tensor:
    """weight with zeros in the skipped blocks, whatever they hold."""
    if choice.kept == 1:
        return weight
    R, S = len(choice.mask), len(choice.mask[0])
    kept_on = _kept_on.__wrapped__ if watched() else _kept_on  # what a trace makes is no tensor to keep
    keep = kept_on(choice, weight.device).view(R, 1, S, *[1] * (weight.dim() - 1))
    blocks = weight.unflatten(1, (S, choice.in_block)).unflatten(0, (R, choice.out_block))
    return torch.where(keep, blocks, 0).reshape(weight.shape)


class _Whole(torch.autograd.Function):
    """`_masked`, with the gradient of the weight that is not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, masked: Tensor) -> Tensor:
        return masked.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    @staticmethod
    def jvp(ctx, weight: Tensor, masked: Tensor) -> Tensor:
        return weight.clone()


def _counted(weight: Tensor, mask: str, skipped_gradients: bool) -> Tensor:
    """The weight as the dense operator takes it."""
    masked = _masked(choose_blocks(mask, *weight.shape[:2]), weight)
    return _Whole.apply(weight, masked.detach()) if skipped_gradients else masked


def _dense_conv(x, weight, bias, mask, stride, padding, dilation, skipped_gradients) -> Tensor:
    """`block_conv2d` for whatever follows torch's own operators alone."""
    weight = _counted(weight, mask, skipped_gradients)
    x, weight = as_torch_can(x, weight, stride, padding, dilation)
    return F.conv2d(x, weight, bias, stride, padding, dilation)


def _dense_linear(x, weight, bias, mask, skipped_gradients) -> Tensor:
    """`block_linear` for whatever follows torch's own operators alone."""
    return F.linear(x, _counted(weight, mask, skipped_gradients), bias)


def _fprop(
    choice: BlockChoice, products: Products, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor
) -> Tensor:
    """The forms "dense" and "rows": y filled, or one like it."""
    if choice.form == "dense":
        return as_strided_like(products.fprop(x, _masked(choice, weight), bias), y)
    for group in choice.by_rows:
        own_bias = None if bias is None else _take(bias, 0, group.rows, choice.out_block)
        if group.columns:
            own = products.fprop(_take(x, 1, group.columns, choice.in_block), _corner(choice, weight, group), own_bias)
        else:
            own = y.new_zeros(len(group.rows) * choice.out_block) if own_bias is None else own_bias
            own = own.view(1, -1, *[1] * (y.dim() - 2)).expand(len(y), -1, *y.shape[2:])
        _put(y, 1, group.rows, choice.out_block, own)
    return y


def _dgrad(choice: BlockChoice, products: Products, dy: Tensor, weight: Tensor, dx: Tensor) -> Tensor:
    if choice.form == "dense":
        return as_strided_like(products.dgrad(dy, _masked(choice, weight)), dx)
    for group in choice.by_columns:  # each is summed over all its rows at once, and so rounded once
        if group.rows:
            own = products.dgrad(_take(dy, 1, group.rows, choice.out_block), _corner(choice, weight, group))
        else:
            own = dx.new_zeros(()).expand(len(dx), len(group.columns) * choice.in_block, *dx.shape[2:])
        _put(dx, 1, group.columns, choice.in_block, own)
    return dx


def _wgrad(choice: BlockChoice, products: Products, dy: Tensor, x: Tensor, dw: Tensor) -> Tensor:
    if choice.form == "dense":
        return as_strided_like(_masked(choice, products.wgrad(dy, x)), dw)
    dw.zero_()
    for group in choice.by_rows:
        if group.columns:
            own = products.wgrad(
                _take(dy, 1, group.rows, choice.out_block), _take(x, 1, group.columns, choice.in_block)
            )
            runs = _runs(group.rows, choice.out_block)
            for run, part in zip(runs, own.split([number for _, number in runs]), strict=True):
                _put(dw.narrow(0, *run), 1, group.columns, choice.in_block, part)
    return dw


def _diagonal(choice: BlockChoice, weight: Tensor) -> Tensor:
    """The diagonal blocks (K, O/K, C/K, …) of a weight (O, C, …), a view."""
    K = len(choice.mask)
    blocks = weight.unflatten(1, (K, choice.in_block)).unflatten(0, (K, choice.out_block))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


# ---- the convolution ------------------------------------------------------------------------------------------------


def _choice_for(x: Tensor, weight: Tensor, text: str, problem: Problem) -> BlockChoice:
    """The choice for the backend in force; Triton asked for by name also takes what torch would do better."""
    forced, sizes = asked_for("triton"), (problem.taps, problem.N * prod(problem.out_size))
    if forced and problem.dtype not in DTYPES:
        raise BackendError(f"no Triton kernel computes in {problem.dtype}; use float32, bfloat16 or float16.")
    if runs_triton(x):
        found = choose_blocks(text, *weight.shape[:2], "triton", *sizes)
        if forced and found.form != "grouped":
            found = with_form(found, "blocks", "asked for by name")
        reason = _kernels().why_not(problem, found) if found.form == "blocks" else None
        if reason is None:
            return found
        if forced:
            raise BackendError(f"no Triton kernel skips the blocks of this convolution: {reason}.")
    return choose_blocks(text, *weight.shape[:2], "torch", *sizes)


def _check(x, weight, bias, mask, stride, padding, dilation) -> tuple[int, ...]:
    """The output's shape (N, O, H', W'); raises DecompkError where the tensors do not fit each other."""
    if x.dim() != 4 or weight.dim() != 4:
        raise DecompkError(f"block_conv2d takes x (N, C, H, W) and weight (O, C, kh, kw), not {sizes(x, weight)}.")
    _check_operands("block_conv2d", x, weight, bias, x.shape[1])
    shape = check(x[None], weight[None], None if bias is None else bias[None], stride, padding, dilation)
    check_division(mask, *weight.shape[:2])
    return shape[1:]


def _check_operands(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, channels: int) -> None:
    check_alike(name, kind_of(x), weight=kind_of(weight), bias=None if bias is None else kind_of(bias))
    if channels != weight.shape[1]:
        raise DecompkError(f"x has {channels} channels, and weight {sizes(weight)} takes {weight.shape[1]}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise DecompkError(f"bias {sizes(bias)} does not fit weight {sizes(weight)}: it has to be (O).")


@torch.library.custom_op("decompk::block_conv2d", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    skipped_gradients: bool,
) -> Tensor:
    y = _channels_last(x, _check(x, weight, bias, mask, stride, padding, dilation))
    if not y.numel():
        return y
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    x = x.contiguous(memory_format=torch.channels_last)
    problem = _problem("fprop", x, weight, geometry)
    found = _choice_for(x, weight, mask, problem)
    if found.form == "grouped":
        bias = None if bias is None else bias.view(-1, found.out_block)
        own = torch.ops.decompk.grouped_conv2d(_by_group(x, found.in_block), _diagonal(found, weight), bias, *geometry)
        return as_strided_like(own.transpose(0, 1).flatten(1, 2), y)
    if found.form == "blocks":
        bias = None if bias is None else bias.contiguous()
        _kernels().fprop(problem, found, _nhwc(x), _nhwc(weight).contiguous(), bias, _nhwc(y))
        return y
    if found.form == "rows" and problem.pointwise:
        _linear_fprop(found, _pixels(x), weight.flatten(1), bias, _pixels(y))
        return y
    return _fprop(found, _conv_products(x.shape[2:], weight.shape[2:], *geometry), x, weight, bias, y)


@_conv.register_fake
def _(x, weight, bias, mask, stride, padding, dilation, skipped_gradients):
    return _channels_last(x, _check(x, weight, bias, mask, stride, padding, dilation))


@torch.library.custom_op("decompk::block_conv2d_backward", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def _conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    skipped_gradients: bool,
    wanted: Sequence[bool],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); what is not wanted is empty. backend: what the forward noted (`backend.noted`)."""
    dx, dw, db = _conv_gradients(grad, x, weight, wanted)
    if not grad.numel():
        return tuple(t.zero_() for t in (dx, dw, db))
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    if wanted[2]:
        db = grad.sum((0, 2, 3))
    problem = _problem("dgrad", x, weight, geometry)
    with resumed(backend):
        found = _choice_for(x, weight, mask, problem)
    products = _conv_products(x.shape[2:], weight.shape[2:], *geometry)
    own = wanted[0], wanted[1] and not skipped_gradients
    if wanted[1] and skipped_gradients:
        dw = as_strided_like(products.wgrad(grad, x), dw)
    if found.form == "grouped" and any(own):
        operands = _by_group(grad, found.out_block), _by_group(x, found.in_block), _diagonal(found, weight)
        dx_own, dw_own, _ = torch.ops.decompk.grouped_conv2d_backward(*operands, *geometry, [*own, False], backend)
        if own[0]:
            dx = as_strided_like(dx_own.transpose(0, 1).flatten(1, 2), dx)
        if own[1]:
            _diagonal(found, dw.zero_()).copy_(dw_own)
    elif found.form == "blocks" and any(own):
        if own[0]:
            _kernels().dgrad(problem, found, _nhwc(grad), _nhwc(weight).contiguous(), _nhwc(dx))
        if own[1]:
            _kernels().wgrad(problem.of("wgrad"), found, _nhwc(grad), _nhwc(x), _nhwc(dw))
    elif found.form == "rows" and problem.pointwise:
        if own[0]:
            _linear_dgrad(found, _pixels(grad), weight.flatten(1), _pixels(dx))
        if own[1]:
            _linear_wgrad(found, _pixels(grad), _pixels(x), dw.flatten(1))
    else:
        if own[0]:
            dx = _dgrad(found, products, grad, weight, dx)
        if own[1]:
            dw = _wgrad(found, products, grad, x, dw)
    return dx, dw, db


@_conv_backward.register_fake
def _(grad, x, weight, mask, stride, padding, dilation, skipped_gradients, wanted, backend=None):
    return _conv_gradients(grad, x, weight, wanted)


def _conv_gradients(grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _channels_last(x, x.shape) if wanted[0] else x.new_empty(0),
        _channels_last(x, weight.shape) if wanted[1] else x.new_empty(0),
        x.new_empty(weight.shape[0]) if wanted[2] else x.new_empty(0),
    )


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _pixels(x: Tensor) -> Tensor:
    """(N, C, H, W), channels_last → (N·H·W, C), a view."""
    return _nhwc(x).view(-1, x.shape[1])


def _by_group(x: Tensor, channels: int) -> Tensor:
    """(N, K·C, H, W) → (K, N, C, H, W), a view."""
    return x.unflatten(1, (-1, channels)).transpose(0, 1)


def _problem(kind: str, x: Tensor, weight: Tensor, geometry: tuple[Pair, Pair, Pair]) -> Problem:
    """The dense convolution as a Problem."""
    N, C, H, W = x.shape
    tf32 = x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
    sides = (1, N, C, weight.shape[0], H, W, tuple(weight.shape[2:]))
    deterministic = torch.are_deterministic_algorithms_enabled()
    return Problem(kind, dtype_name(x.dtype, tf32), *sides, *geometry, deterministic=deterministic)


# ---- the linear layer -----------------------------------------------------------------------------------------------

BATCH_FROM = 5  # sets of columns from which one batched product takes them all; fewer run in turn


@functools.lru_cache(maxsize=1024)
def _kept_columns(choice: BlockChoice, transposed: bool, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Indices (R, 1) and (R, n) of each row's n blocks, for one batched product; None where rows differ or are few."""
    mask = transpose(choice.mask) if transposed else choice.mask
    batched = choice.form == "grouped" or (choice.form == "rows" and len(grouped(mask)) >= BATCH_FROM)
    if not batched or len({sum(row) for row in mask}) > 1:
        return None
    columns = [[s for s, keep in enumerate(row) if keep] for row in mask]
    return torch.arange(len(mask), device=device)[:, None], torch.tensor(columns, device=device)


def _gathered(choice: BlockChoice, x: Tensor, columns: Tensor, size: int) -> Tensor:
    """(M, S·size) → (R, M, n·size): what each block row reads; a view where the kept blocks are the diagonal."""
    x = x.unflatten(1, (-1, size))
    return x.transpose(0, 1) if choice.form == "grouped" else x[:, columns].transpose(0, 1).flatten(2)


def _by_block(weight: Tensor, rows: int, size: int) -> Tensor:
    """A weight (O, C) as its blocks (R, S, O/R, size), a view."""
    return weight.unflatten(1, (-1, size)).unflatten(0, (rows, -1)).transpose(1, 2)


def _batched(
    choice: BlockChoice,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: tuple[Tensor, Tensor],
    size: int,
    y: Tensor,
) -> Tensor:
    """y (M, O) = x (M, C) · weightᵀ + bias, where x has blocks of `size` channels."""
    R = len(kept[0])
    own, kernels = _gathered(choice, x, kept[1], size), _by_block(weight, R, size)[kept].transpose(2, 3).flatten(1, 2)
    value = torch.bmm(own, kernels) if bias is None else torch.baddbmm(bias.view(R, 1, -1), own, kernels)
    y.unflatten(1, (R, -1)).copy_(value.transpose(0, 1))
    return y


def _linear_fprop(choice: BlockChoice, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """y (M, O) from x (M, C) and weight (O, C)."""
    kept = _kept_columns(choice, False, x.device)
    if kept is None:
        return _fprop(choice, LINEAR, x, weight, bias, y)
    return _batched(choice, x, weight, bias, kept, choice.in_block, y)


def _linear_dgrad(choice: BlockChoice, dy: Tensor, weight: Tensor, dx: Tensor) -> Tensor:
    kept = _kept_columns(choice, True, dy.device)
    if kept is None:
        return _dgrad(choice, LINEAR, dy, weight, dx)
    return _batched(choice, dy, weight.T, None, kept, choice.out_block, dx)


def _linear_wgrad(choice: BlockChoice, dy: Tensor, x: Tensor, dw: Tensor) -> Tensor:
    kept = _kept_columns(choice, False, x.device)
    if kept is None:
        return _wgrad(choice, LINEAR, dy, x, dw)
    per_row = dy.unflatten(1, (-1, choice.out_block)).permute(1, 2, 0)
    own = torch.bmm(per_row, _gathered(choice, x, kept[1], choice.in_block))
    _by_block(dw.zero_(), len(own), choice.in_block)[kept] = own.unflatten(2, (-1, choice.in_block)).transpose(1, 2)
    return dw


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, mask: str) -> tuple[int, ...]:
    if x.dim() < 1 or weight.dim() != 2:
        raise DecompkError(f"block_linear takes x (…, C) and weight (O, C), not {sizes(x, weight)}.")
    _check_operands("block_linear", x, weight, bias, x.shape[-1])
    if not weight.numel():
        raise DecompkError(f"weight {sizes(weight)}: only the batch may be empty.")
    check_division(mask, *weight.shape)
    return (*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("decompk::block_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, mask: str, skipped_gradients: bool) -> Tensor:
    y = x.new_empty(_check_linear(x, weight, bias, mask))
    if y.numel():
        rows = y.numel() // len(weight)
        found = choose_blocks(mask, *weight.shape, positions=rows)
        return _linear_fprop(found, x.reshape(rows, -1), weight, bias, y.view(rows, -1)).view(y.shape)
    return y


@_linear.register_fake
def _(x, weight, bias, mask, skipped_gradients):
    return x.new_empty(_check_linear(x, weight, bias, mask))


@torch.library.custom_op("decompk::block_linear_backward", mutates_args=())
def _linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: str, skipped_gradients: bool, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); what is not wanted is empty."""
    dx, dw, db = _linear_gradients(grad, x, weight, wanted)
    if not grad.numel():
        return tuple(t.zero_() for t in (dx, dw, db))
    rows = grad.numel() // len(weight)
    found = choose_blocks(mask, *weight.shape, positions=rows)
    grad, x = grad.reshape(rows, -1), x.reshape(rows, -1)
    if wanted[0]:
        dx = _linear_dgrad(found, grad, weight, dx.view(rows, -1)).view(dx.shape)
    if wanted[1] and skipped_gradients:
        dw = grad.T @ x
    elif wanted[1]:
        dw = _linear_wgrad(found, grad, x, dw)
    if wanted[2]:
        db = grad.sum(0)
    return dx, dw, db


@_linear_backward.register_fake
def _(grad, x, weight, mask, skipped_gradients, wanted):
    return _linear_gradients(grad, x, weight, wanted)


def _linear_gradients(grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    shapes = x.shape, weight.shape, weight.shape[:1]
    return tuple(x.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


# ---- as torch calls them --------------------------------------------------------------------------------------------


def _keep(ctx, inputs, output):
    x, weight, bias, *ctx.arguments = inputs
    ctx.has_bias, ctx.backend = bias is not None, noted()
    ctx.save_for_backward(x, weight)


def _differentiate(backward: str, chooses: bool, dense: Callable[..., Tensor]):
    def differentiate(ctx, grad):
        wanted = [*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]]
        backend = [ctx.backend] if chooses else []
        x, weight = ctx.saved_tensors
        if follows(grad):
            operands = x, weight, weight.new_zeros(len(weight)) if wanted[2] else None
            own = gradients(lambda *operands: dense(*operands, *ctx.arguments), operands, grad, wanted)
            return *own, *(None for _ in ctx.arguments)
        found = getattr(torch.ops.decompk, backward)(grad, x, weight, *ctx.arguments, wanted, *backend)
        own = [g if w else None for g, w in zip(found, wanted, strict=True)]
        return *own, *(None for _ in ctx.arguments)

    return differentiate


def _once(ctx, *grads):
    raise DecompkError(
        "the backwards of block_conv2d and block_linear have no derivative: differentiate the operators themselves."
    )


for _name, _forward, _backward, _chooses, _dense in (  # a linear layer is torch's products on every backend
    ("block_conv2d", _conv, _conv_backward, True, _dense_conv),
    ("block_linear", _linear, _linear_backward, False, _dense_linear),
):
    _forward.register_autograd(_differentiate(f"{_name}_backward", _chooses, _dense), setup_context=_keep)
    _backward.register_autograd(_once)
    register_autocast(_name)


@once
def _register_flops() -> None:
    """Two for every multiply-accumulate of a kept block, whatever form computes it."""
    from torch.utils.flop_counter import register_flop_formula

    def flops(positions: int, weight: Sequence[int], mask: str) -> int:
        found = choose_blocks(mask, *weight[:2])
        return 2 * found.blocks * conv_macs(positions, found.in_block, found.out_block, weight[2:])

    def backward_flops(positions: int, weight: Sequence[int], mask: str, skipped: bool, wanted: Sequence[bool]) -> int:
        return wanted[0] * flops(positions, weight, mask) + wanted[1] * flops(
            positions, weight, "1" if skipped else mask
        )

    @register_flop_formula(torch.ops.decompk.block_conv2d)
    def conv(x, weight, bias, mask, *_, out_shape, **__) -> int:
        return flops(x[0] * prod(out_shape[2:]), weight, mask)

    @register_flop_formula(torch.ops.decompk.block_conv2d_backward)
    def conv_backward(grad, x, weight, mask, stride, padding, dilation, skipped, wanted, backend=None, **_) -> int:
        return backward_flops(grad[0] * prod(grad[2:]), weight, mask, skipped, wanted)

    @register_flop_formula(torch.ops.decompk.block_linear)
    def linear(x, weight, bias, mask, *_, **__) -> int:
        return flops(prod(x[:-1]), weight, mask)

    @register_flop_formula(torch.ops.decompk.block_linear_backward)
    def linear_backward(grad, x, weight, mask, skipped, wanted, **_) -> int:
        return backward_flops(prod(grad[:-1]), weight, mask, skipped, wanted)
