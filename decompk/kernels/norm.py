"""Batch norm of K members: every pass reads each byte once, all members in one launch.

A kernel sees streams: rows (pixels) of CHANNELS values without gaps. Member-major activations are K streams of C
channels, channel-grouped ones a single stream of K·C channels. A tile is LINES × WIDTH values; a line is a run of WIDTH
channels of one row or, where C is small or odd, MERGED whole rows, so that vectors stay 16 bytes wide.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Fixed, Launch, launch, recording
from .layout import pieces_of, streams, strides_of
from .moments import union
from .problem import cdiv, power_of_two

PROGRAMS = 4096  # of a pass without sums: beyond them a program takes several tiles, its channels' values read once


@dataclass(frozen=True)
class Tile:
    """`lines` × `width` values of `merged` rows a line; `blocks` of them side by side hold all channels."""

    lines: int
    width: int
    merged: int
    blocks: int
    warps: int = 4

    @property
    def rows(self) -> int:
        return self.lines * self.merged


def tile_of(channels: int, element_size: int) -> Tile:
    """The tile for streams of that many channels."""
    values = 4096 // element_size  # two 16-byte loads a thread and tensor; with more, sm_100 spills
    aligned = 8 // gcd(8, channels)  # so many rows are a multiple of 16 bytes in every dtype
    power = power_of_two(channels)
    choices = []  # (share of the tile in use, width, merged, blocks), the preferred first
    if aligned == 1 or channels > 64:
        for width in (128, 64, 32, 16, 8):
            if width <= power:
                blocks = cdiv(channels, width)
                choices.append((channels / (blocks * width), width, 1, blocks))
    for width in (8, 16, 32, 64, 128):
        if merged := width // channels // aligned * aligned:
            choices.append((merged * channels / width, width, merged, 1))
    choices = choices or [(channels / power, power, 1, 1)]
    _, width, merged, blocks = next((c for c in choices if c[0] >= 0.75), max(choices))
    return Tile(values // width, width, merged, blocks)


@triton.jit
def _columns(block, CHANNELS: tl.constexpr, MERGED: tl.constexpr, WIDTH: tl.constexpr):
    """The channel of every column of a tile, CHANNELS or more where there is none."""
    column = tl.arange(0, WIDTH)
    if MERGED > 1:
        channel = tl.where(column < MERGED * CHANNELS, column % CHANNELS, CHANNELS)
    else:
        channel = block * WIDTH + column
    return channel


@triton.jit
def _tile(rows, block, CHANNELS: tl.constexpr, MERGED: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr):
    """Offsets of a tile's values from its first row, and which of them exist where `rows` rows are left."""
    line = tl.arange(0, LINES)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    if MERGED > 1:
        offsets = line * (MERGED * CHANNELS) + column
        inside = (offsets < rows * CHANNELS) & (column < MERGED * CHANNELS)
    else:
        column += block * WIDTH
        offsets = line * CHANNELS + column
        inside = (line < rows) & (column < CHANNELS)
    return offsets, inside


@triton.jit
def _run(rows, rows_per_piece, piece, stream, CHANNELS: tl.constexpr):
    """Offset of a piece's first row, and how many rows it has (none where the pieces before hold them all)."""
    first = piece.to(tl.int64) * rows_per_piece
    count = tl.maximum(tl.minimum(rows - first, rows_per_piece), 0).to(tl.int32)
    return (stream * rows + first) * CHANNELS, count


@triton.jit
def _of_channels(pointer, at, column, CHANNELS: tl.constexpr, missing: tl.constexpr):
    """One float32 value a column, as a line of a tile: `missing` where there is no tensor."""
    if pointer is None:
        value = tl.full(column.shape, missing, tl.float32)
    else:
        value = tl.load(pointer + at + column, mask=column < CHANNELS, other=0.0).to(tl.float32)
    return value[None, :]


@triton.jit
def _unmerged(value, column, BLOCK: tl.constexpr):
    """(WIDTH,) → (WIDTH, BLOCK): each column's value at its channel, and zero, whatever it holds, at the others."""
    return tl.where(column[:, None] == tl.arange(0, BLOCK)[None, :], value[:, None], 0.0)


@triton.jit
def _result_channels(block, MERGED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The channels that a program has results of."""
    if MERGED > 1:
        channel = tl.arange(0, BLOCK)
    else:
        channel = block * WIDTH + tl.arange(0, WIDTH)
    return channel


@triton.jit
def moments_kernel(
    x, moments, rows, rows_per_piece,
    C: tl.constexpr, CHANNELS: tl.constexpr, MERGED: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x (streams, rows, CHANNELS) → moments (K, S, 3, C), one piece a program."""
    piece, block, stream = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, count = _run(rows, rows_per_piece, piece, stream, CHANNELS)
    x += start
    column = _columns(block, CHANNELS, MERGED, WIDTH)
    # Welford's recurrence on differences from the first row: a large common mean costs float32 nothing.
    present = tl.where(count > 0, CHANNELS, 0)  # triton 3.9's interpreter takes no mask & (a scalar > 0)
    origin = tl.load(x + column, mask=column < present, other=0.0).to(tl.float32)
    mean = tl.zeros((LINES, WIDTH), tl.float32)
    m2 = tl.zeros((LINES, WIDTH), tl.float32)
    for done in tl.range(0, count, LINES * MERGED):
        offsets, inside = _tile(count - done, block, CHANNELS, MERGED, WIDTH, LINES)
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) - origin[None, :]
        away = tl.where(inside, value - mean, 0.0)
        mean += away * (1.0 / (done // (LINES * MERGED) + 1))
        m2 += away * (value - mean)
        x += LINES * MERGED * CHANNELS

    row = tl.arange(0, LINES)[:, None] * MERGED + tl.zeros((1, WIDTH), tl.int32)
    if MERGED > 1:
        row += (tl.arange(0, WIDTH) // CHANNELS)[None, :]
    met = (tl.maximum(count - row, 0) + (LINES * MERGED - 1)) // (LINES * MERGED)
    total, mean, m2 = union(met.to(tl.float32), mean, m2)
    if MERGED > 1:
        total, mean, m2 = union(
            _unmerged(total, column, BLOCK), _unmerged(mean, column, BLOCK), _unmerged(m2, column, BLOCK)
        )
        origin = tl.sum(_unmerged(tl.where(tl.arange(0, WIDTH) < CHANNELS, origin, 0.0), column, BLOCK), 0)
    channel = _result_channels(block, MERGED, WIDTH, BLOCK)
    out = moments + ((stream + channel // C) * tl.num_programs(0) + piece) * (3 * C) + channel % C
    tl.store(out, total, mask=channel < CHANNELS)
    tl.store(out + C, mean + origin, mask=channel < CHANNELS)
    tl.store(out + 2 * C, m2, mask=channel < CHANNELS)


@triton.jit
def finalise_kernel(
    moments, merged, running_mean, running_var, mean, rstd, counter, momentum, eps, S,
    C: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """moments (K, S, 3, C) → merged (K, 1, 3, C), or mean, rstd (K, C) and the running statistics (K, C) in place.

    counter (K,): of batches, one more then.
    """
    k = tl.program_id(1).to(tl.int64)
    if counter is not None:  # noqa: SIM102 (the outer one is decided when compiling)
        if tl.program_id(0) == 0:
            tl.store(counter + k, tl.load(counter + k) + 1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < C
    moments += k * S * (3 * C)
    origin = tl.load(moments + C + channel, mask=exists, other=0.0)[None, :]
    total = tl.zeros((PIECES, BLOCK), tl.float32)
    center = tl.zeros((PIECES, BLOCK), tl.float32)
    m2 = tl.zeros((PIECES, BLOCK), tl.float32)
    piece = tl.arange(0, PIECES)[:, None]
    for first in tl.range(0, S, PIECES):
        inside = (piece < S - first) & exists[None, :]
        at = moments + piece * (3 * C) + channel[None, :]
        count = tl.load(at, mask=inside, other=0.0)
        away = tl.load(at + C, mask=inside, other=0.0) - origin - center
        m2 += tl.load(at + 2 * C, mask=inside, other=0.0)
        share = count / tl.maximum(total + count, 1.0)
        center += away * share
        m2 += away * away * total * share
        total += count
        moments += PIECES * (3 * C)
    total, center, m2 = union(total, center, m2)
    center += tl.sum(origin, 0)
    at = k * C + channel
    if merged is not None:
        at += k * (2 * C)
        tl.store(merged + at, total, mask=exists)
        tl.store(merged + at + C, center, mask=exists)
        tl.store(merged + at + 2 * C, m2, mask=exists)
    if mean is not None:
        tl.store(mean + at, center, mask=exists)
        tl.store(rstd + at, tl.div_rn(1.0, tl.sqrt_rn(m2 / tl.maximum(total, 1.0) + eps)), mask=exists)
    if running_mean is not None:
        old = tl.load(running_mean + at, mask=exists).to(tl.float32)
        tl.store(running_mean + at, (1.0 - momentum) * old + momentum * center, mask=exists)
        old = tl.load(running_var + at, mask=exists).to(tl.float32)
        tl.store(running_var + at, (1.0 - momentum) * old + momentum * (m2 / (total - 1.0)), mask=exists)


@triton.jit
def apply_kernel(
    x, y, mean, rstd, weight, bias, residual, rows, rows_per_piece, RELU: tl.constexpr,
    CHANNELS: tl.constexpr, MERGED: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """y = relu((x − mean) · rstd · weight + bias + residual)."""
    # From the end: what the pass before read or wrote last is still in the L2 cache.
    piece = tl.num_programs(0) - 1 - tl.program_id(0)
    block, stream = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, count = _run(rows, rows_per_piece, piece, stream, CHANNELS)
    column = _columns(block, CHANNELS, MERGED, WIDTH)
    at = stream * CHANNELS
    center = _of_channels(mean, at, column, CHANNELS, 0.0)
    slope = _of_channels(rstd, at, column, CHANNELS, 0.0) * _of_channels(weight, at, column, CHANNELS, 1.0)
    shift = _of_channels(bias, at, column, CHANNELS, 0.0)
    for done in tl.range(0, count, LINES * MERGED):
        offsets, inside = _tile(count - done, block, CHANNELS, MERGED, WIDTH, LINES)
        z = (tl.load(x + start + offsets, mask=inside).to(tl.float32) - center) * slope + shift
        if residual is not None:
            z += tl.load(residual + start + offsets, mask=inside).to(tl.float32)
        if RELU:
            z = tl.where(z <= 0.0, 0.0, z)  # not a maximum: NaN stays
        tl.store(y + start + offsets, z, mask=inside)
        start += LINES * MERGED * CHANNELS


@triton.jit
def backward_sums_kernel(
    dy, x, y, g, mean, rstd, weight, bias, sums, rows, rows_per_piece, RELU: tl.constexpr,
    CHANNELS: tl.constexpr, MERGED: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums (streams, S, 2, CHANNELS): Σg and Σg·x̂ of a piece, g being dy where relu let pass; y is given to write g."""
    piece, block, stream = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, count = _run(rows, rows_per_piece, piece, stream, CHANNELS)
    column = _columns(block, CHANNELS, MERGED, WIDTH)
    at = stream * CHANNELS
    center = _of_channels(mean, at, column, CHANNELS, 0.0)
    sum_g = tl.zeros((LINES, WIDTH), tl.float32)
    sum_gx = tl.zeros((LINES, WIDTH), tl.float32)
    if RELU and y is None:
        slope = _of_channels(rstd, at, column, CHANNELS, 0.0) * _of_channels(weight, at, column, CHANNELS, 1.0)
        shift = _of_channels(bias, at, column, CHANNELS, 0.0)
    for done in tl.range(0, count, LINES * MERGED):
        offsets, inside = _tile(count - done, block, CHANNELS, MERGED, WIDTH, LINES)
        grad = tl.load(dy + start + offsets, mask=inside, other=0.0)
        away = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32) - center
        if y is not None:
            z = tl.load(y + start + offsets, mask=inside, other=0.0).to(tl.float32)
            grad = tl.where(z <= 0.0, 0.0, grad)
            tl.store(g + start + offsets, grad, mask=inside)
        elif RELU:
            grad = tl.where(away * slope + shift <= 0.0, 0.0, grad)
        sum_g += grad.to(tl.float32)
        sum_gx += grad.to(tl.float32) * away
        start += LINES * MERGED * CHANNELS
    total_g = tl.sum(sum_g, 0)
    total_gx = tl.sum(sum_gx, 0)
    if MERGED > 1:
        total_g = tl.sum(_unmerged(total_g, column, BLOCK), 0)
        total_gx = tl.sum(_unmerged(total_gx, column, BLOCK), 0)
    channel = _result_channels(block, MERGED, WIDTH, BLOCK)
    out = sums + (stream * tl.num_programs(0) + piece) * (2 * CHANNELS) + channel
    tl.store(out, total_g, mask=channel < CHANNELS)
    scale = tl.load(rstd + at + channel, mask=channel < CHANNELS)
    tl.store(out + CHANNELS, total_gx * scale, mask=channel < CHANNELS)


@triton.jit
def merge_sums_kernel(
    sums, dweight, dbias, nought, cleared, SIZE, S, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
    CLEARED: tl.constexpr,
):  # fmt: skip
    """sums (streams, S, 2, CHANNELS) → dbias = Σg, dweight = Σg·x̂ (streams, CHANNELS).

    nought: zero like dbias. cleared: SIZE values that are zero then, for whoever adds to them.
    """
    if cleared is not None:
        programs = tl.num_programs(0) * tl.num_programs(1)
        for first in tl.range(
            (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * CLEARED, SIZE, programs * CLEARED
        ):
            at = first + tl.arange(0, CLEARED)
            tl.store(cleared + at, 0.0, at < SIZE)
    stream = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < CHANNELS
    piece = tl.arange(0, PIECES)[:, None]
    sums += stream * S * (2 * CHANNELS)
    sum_g = tl.zeros((PIECES, BLOCK), tl.float32)
    sum_gx = tl.zeros((PIECES, BLOCK), tl.float32)
    for first in tl.range(0, S, PIECES):
        inside = (piece < S - first) & exists[None, :]
        at = sums + piece * (2 * CHANNELS) + channel[None, :]
        sum_g += tl.load(at, mask=inside, other=0.0)
        sum_gx += tl.load(at + CHANNELS, mask=inside, other=0.0)
        sums += PIECES * (2 * CHANNELS)
    at = stream * CHANNELS + channel
    total_g = tl.sum(sum_g, 0)
    total_gx = tl.sum(sum_gx, 0)
    tl.store(dbias + at, total_g, mask=exists)
    tl.store(dweight + at, total_gx, mask=exists)
    if nought is not None:
        tl.store(nought + at, (total_g + total_gx) * 0.0, mask=exists)  # NaN of a member that has diverged


@triton.jit
def backward_input_kernel(
    dy, x, dx, mean, rstd, weight, bias, dweight, dbias, rows, rows_per_piece,
    RELU: tl.constexpr, TRAINING: tl.constexpr,
    CHANNELS: tl.constexpr, MERGED: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """dx = weight · rstd · (g − Σg / rows − x̂ · Σg·x̂ / rows), without the sums where not TRAINING."""
    piece = tl.num_programs(0) - 1 - tl.program_id(0)  # from the end, as apply_kernel
    block, stream = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, count = _run(rows, rows_per_piece, piece, stream, CHANNELS)
    column = _columns(block, CHANNELS, MERGED, WIDTH)
    at = stream * CHANNELS
    scale = _of_channels(rstd, at, column, CHANNELS, 0.0)
    slope = scale * _of_channels(weight, at, column, CHANNELS, 1.0)
    if RELU or TRAINING:
        center = _of_channels(mean, at, column, CHANNELS, 0.0)
    if RELU:
        shift = _of_channels(bias, at, column, CHANNELS, 0.0)
    if TRAINING:
        mean_g = _of_channels(dbias, at, column, CHANNELS, 0.0) / rows
        mean_gx = _of_channels(dweight, at, column, CHANNELS, 0.0) / rows * scale
    for done in tl.range(0, count, LINES * MERGED):
        offsets, inside = _tile(count - done, block, CHANNELS, MERGED, WIDTH, LINES)
        grad = tl.load(dy + start + offsets, mask=inside).to(tl.float32)
        if RELU or TRAINING:
            away = tl.load(x + start + offsets, mask=inside).to(tl.float32) - center
        if RELU:
            grad = tl.where(away * slope + shift <= 0.0, 0.0, grad)
        if TRAINING:
            grad -= mean_g + away * mean_gx
        tl.store(dx + start + offsets, grad * slope, mask=inside)
        start += LINES * MERGED * CHANNELS


def launch_moments(x: Tensor, pieces: int, out: Tensor | None = None) -> Tensor:
    """x (K, N, C, H, W) → its moments (K, pieces, 3, C), `pieces` runs of its pixels; the last ones may be empty."""
    K, C = x.shape[0], x.shape[2]
    out = x.new_empty((K, pieces, 3, C), dtype=torch.float32) if out is None else out
    _over_pieces(moments_kernel, x, pieces, moments=out, C=C, BLOCK=power_of_two(streams(x)[2]))
    return out


def launch_finalise(
    moments: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    out: tuple[Tensor, Tensor] | None = None,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """moments (K, S, 3, C) → mean and rstd (K, C); updates contiguous running statistics (K, C) in place.

    counter (K,): int64, of batches, which then are one more.
    """
    K, S, _, C = moments.shape
    mean, rstd = out or (moments.new_empty((K, C)), moments.new_empty((K, C)))
    running = dict(running_mean=running_mean, running_var=running_var, counter=counter, momentum=momentum)
    found = dict(merged=None, mean=mean, rstd=rstd)
    _over_channels(finalise_kernel, K, S, C, moments=moments, eps=eps, C=C, **found, **running)
    return mean, rstd


def merge_moments(moments: Tensor) -> Tensor:
    """(K, S, 3, C) → (K, 1, 3, C): the same pixels as one piece."""
    K, S, _, C = moments.shape
    merged = moments.new_empty((K, 1, 3, C))
    absent = dict.fromkeys(("running_mean", "running_var", "mean", "rstd", "counter"))
    _over_channels(finalise_kernel, K, S, C, moments=moments, merged=merged, momentum=0.0, eps=0.0, C=C, **absent)
    return merged


def launch_apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    out: Tensor | None = None,
) -> Tensor:
    """relu((x − mean) · rstd · weight + bias + residual), in x's layout; residual has that layout, too."""
    out = torch.empty_like(x) if out is None else out
    statistics = dict(mean=mean, rstd=rstd, weight=weight, bias=bias)
    _over_pieces(apply_kernel, x, None, y=out, residual=residual, RELU=relu, **statistics)
    return out


def launch_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    training: bool,
    pieces: int,
    out: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dx, dweight, dbias and g, dy where relu let pass: None unless y is given. dy, x, y in one layout.

    Without y relu is decided by what x, weight and bias give: enough where there was no residual, and a read less.
    """
    dx, *vectors, g = out or (torch.empty_like(x), *(torch.empty_like(mean) for _ in range(2)), None)
    sums, g = launch_sums(dy, x, y, mean, rstd, weight, bias, relu, pieces, g)
    gradients = launch_merge(sums, *vectors)
    gated = relu and y is None
    launch_input(dy if g is None else g, x, mean, rstd, weight, bias, *gradients, gated, training, dx)
    return dx, *gradients, g


def launch_sums(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    pieces: int,
    g: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Σg and Σg·x̂ of `pieces` runs of the pixels (streams, pieces, 2, channels), and g where y is given."""
    count, _, channels = streams(x)
    sums = x.new_empty((count, pieces, 2, channels), dtype=torch.float32)
    g = torch.empty_like(x) if g is None and y is not None else g
    statistics = dict(mean=mean, rstd=rstd, weight=weight, bias=bias)
    block = power_of_two(channels)
    _over_pieces(backward_sums_kernel, x, pieces, dy=dy, y=y, g=g, sums=sums, RELU=relu, BLOCK=block, **statistics)
    return sums, g


def launch_merge(
    sums: Tensor, dweight: Tensor, dbias: Tensor, nought: Tensor | None = None, cleared: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sums (streams, S, 2, channels) → dweight = Σg·x̂ and dbias = Σg (K, C); nought (K, C) and cleared become zero.

    A launch of its own: both are wanted anyway, and else every program of the next would read all sums.
    """
    count, pieces, _, channels = sums.shape
    clear = dict(nought=nought, cleared=cleared, SIZE=0 if cleared is None else cleared.numel(), CLEARED=1024)
    results = dict(dweight=dweight, dbias=dbias, CHANNELS=channels)
    _over_channels(merge_sums_kernel, count, pieces, channels, sums=sums, **results, **clear)
    return dweight, dbias


def launch_input(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    relu: bool,
    training: bool,
    dx: Tensor,
) -> Tensor:
    """dx of g, which passes relu first, and its sums, which are those of the gradient that passed."""
    statistics = dict(mean=mean, rstd=rstd, weight=weight, bias=bias, dweight=dweight, dbias=dbias)
    _over_pieces(backward_input_kernel, x, None, dy=g, dx=dx, RELU=relu, TRAINING=training, **statistics)
    return dx


def _over_pieces(kernel: Any, x: Tensor, pieces: int | None, **arguments: Any) -> None:
    """Launch `kernel` over the streams of x, each cut into `pieces`, or as many as the size suggests."""
    grid, warps, fixed = _cut(x.shape, x.stride(), x.element_size(), pieces)
    launch(kernel, grid, warps, 1, fixed, x=x, **arguments)


@functools.lru_cache(maxsize=4096)
def _cut(
    shape: tuple[int, ...], strides: tuple[int, ...], element_size: int, pieces: int | None
) -> tuple[tuple[int, int, int], int, Fixed]:
    """Grid, warps and arguments of `_over_pieces`."""
    count, rows, channels = streams(torch.empty_strided(shape, strides, device="meta"))
    tile = tile_of(channels, element_size)
    if pieces is None:
        tiles = cdiv(rows, tile.rows)
        rows_per_piece = tile.rows * min(max(tiles * tile.blocks * count // PROGRAMS, 1), 8)
        pieces = cdiv(rows, rows_per_piece)
    else:
        rows_per_piece = 16 * cdiv(rows, 16 * pieces)  # a multiple of 16 keeps the vectors of every piece aligned
    sizes = dict(rows=rows, rows_per_piece=rows_per_piece, CHANNELS=channels)
    shapes = dict(MERGED=tile.merged, WIDTH=tile.width, LINES=tile.lines)
    return (pieces, tile.blocks, count), tile.warps, Fixed(sizes | shapes)


def _over_channels(kernel: Any, count: int, pieces: int, channels: int, **arguments: Any) -> None:
    """Launch `kernel` over `count` × `channels` columns of `pieces` values."""
    grid, warps, fixed = _columns_of(count, pieces, channels)
    launch(kernel, grid, warps, 1, fixed, **arguments)


@functools.lru_cache(maxsize=1024)
def _columns_of(count: int, pieces: int, channels: int) -> tuple[tuple[int, int], int, Fixed]:
    """Grid, warps and arguments of `_over_channels`."""
    together = min(power_of_two(pieces), 512)
    block = min(power_of_two(channels), max(512 // together, 8))  # 8 are the 32 bytes memory reads at once
    warps = min(max(block * together // 512, 1), 8)
    return (cdiv(channels, block), count), warps, Fixed(S=pieces, BLOCK=block, PIECES=together)


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of what networks run: every flag for one C, the usual ones for more, and for one in float32."""
    every = [("member", 16)]
    usual = [("member", C) for C in (3, 4, 40, 64, 2048)] + [("channel-grouped", 4)]
    for dtype in (torch.bfloat16, torch.float32):
        for layout, C in every + usual if dtype == torch.bfloat16 else [("member", 4)]:
            shape = (4, 32, C, 16, 16)
            x = torch.empty_strided(shape, strides_of(layout, shape), dtype=dtype, device="meta")
            vectors = [torch.empty((4, C), device="meta") for _ in range(4)]
            pieces = pieces_of(x)
            with recording() as launches:
                launch_finalise(launch_moments(x, pieces), *vectors[:2], 0.1, 1e-5)
                merge_moments(x.new_empty((4, 900, 3, C), dtype=torch.float32))
                for relu, residual in itertools.product((True, False) if (layout, C) in every else (True,), (None, x)):
                    launch_apply(x, *vectors, residual, relu)
                    launch_backward(x, x, x if relu and residual is not None else None, *vectors, relu, True, pieces)
                    if (layout, C) in every:
                        launch_backward(x, x, None, *vectors, relu, False, pieces)
            for item in launches:
                flags = [name for name in ("RELU", "TRAINING") if item.arguments.get(name)]
                given = [name for name in ("residual", "g") if item.arguments.get(name) is not None]
                name = item.kernel.__name__.removesuffix("_kernel")
                yield " ".join([name, layout, str(dtype).removeprefix("torch."), f"C={C}", *flags, *given]), item
