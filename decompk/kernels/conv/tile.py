"""The tile form: an implicit matrix product, tap by tap, on tensor descriptors.

One program computes one tile of a member's pixels (images × rows × columns) and one block of its output channels. For
each tap and block of input channels it loads the tile shifted by that tap: rows, columns and channels outside the
tensor arrive as zeros, so padding costs neither masks nor index arithmetic. Stride 2 reads (forward) or writes
(backward) one descriptor per parity of row and column. Where a member's pixels are contiguous and few channels wide,
rows are merged (pixels × channels in one dimension) so that the copy engine moves long runs.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import prod
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import launch
from ..problem import Config, Epilogue, Problem, Prologue, power_of_two
from ..product import dot
from .operands import PLAIN, flags, geometry, split
from .taps import count, first, step


@triton.jit
def _accumulate(
    acc, X, W, k, n0, h0, w0, free, in_scale, in_shift, N, HQ, WQ, R,
    rh: tl.constexpr, rw: tl.constexpr, qh: tl.constexpr, qw: tl.constexpr,
    DGRAD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, RB: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
    MERGED: tl.constexpr, PROLOGUE: tl.constexpr, IN_RELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc += Σ over the taps of one parity and all reduced channels."""
    NH: tl.constexpr = count(qh, KH, PH, SH, DH)
    NW: tl.constexpr = count(qw, KW, PW, SW, DW)
    for i in tl.range(0, NH * NW * RB):
        t = i // RB
        r0 = i % RB * BR
        kh = first(qh, PH, SH, DH) + t // NW * step(SH, DH)
        kw = first(qw, PW, SW, DW) + t % NW * step(SW, DW)
        if DGRAD:  # exact: the dividend is a multiple of the stride, made positive for truncating division
            h = h0 + (rh + PH - kh * DH + KH * DH * SH) // SH - KH * DH
            w = w0 + (rw + PW - kw * DW + KW * DW * SW) // SW - KW * DW
        else:
            h = h0 + (kh * DH - PH - qh + PH * SH + SH) // SH - PH - 1
            w = w0 + (kw * DW - PW - qw + PW * SW + SW) // SW - PW - 1
        if MERGED:
            a = X.load([k, n0, h, w * BR]).reshape(BN * BH * BW, BR)
        else:
            a = X.load([k, n0, h, w, r0]).reshape(BN * BH * BW, BR)
        if PROLOGUE:
            p = tl.arange(0, BN * BH * BW)
            row = h + p // BW % BH
            column = w + p % BW
            inside = (row >= 0) & (row < HQ) & (column >= 0) & (column < WQ)
            c = r0 + tl.arange(0, BR)
            value = a.to(tl.float32) * tl.load(in_scale + k * R + c, c < R, 0.0)
            value += tl.load(in_shift + k * R + c, c < R, 0.0)
            if IN_RELU:
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            a = tl.where(inside[:, None], value, 0.0).to(a.dtype)
        if DGRAD:
            b = W.load([k, r0, kh * KW + kw, free]).reshape(BR, BF)
        else:
            b = W.load([k, free, kh * KW + kw, r0]).reshape(BF, BR).T
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def conv_tile(
    X0, X1, X2, X3, W, Y0, Y1, Y2, Y3, residual, bias, scale, shift, moments, in_scale, in_shift,
    N, HO, WO, HQ, WQ, R, F, TN, TH, TW, FB,
    DGRAD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, RB: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
    LIVE: tl.constexpr, MERGED: tl.constexpr, MERGED_OUT: tl.constexpr, PRECISION: tl.constexpr,
    BIAS: tl.constexpr, MOMENTS: tl.constexpr, AFFINE: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    PROLOGUE: tl.constexpr, IN_RELU: tl.constexpr,
):  # fmt: skip
    """y (fprop) from x or dx (dgrad) from dy; R reduced, F free channels; LIVE: a bit for each parity with pixels."""
    pid = tl.program_id(0)
    free = pid % FB * BF
    tile = pid // FB
    w0 = tile % TW * BW
    h0 = tile // TW % TH * BH
    n0 = tile // (TW * TH) % TN * BN
    k = tile // (TW * TH * TN)
    pixels: tl.constexpr = BN * BH * BW
    for out in tl.static_range(SH * SW if DGRAD else 1):
        if not DGRAD or (LIVE >> out) % 2:
            acc = tl.zeros((pixels, BF), tl.float32)
            for into in tl.static_range(1 if DGRAD else SH * SW):
                if DGRAD or (LIVE >> into) % 2:
                    X = X0 if into == 0 else (X1 if into == 1 else (X2 if into == 2 else X3))
                    acc = _accumulate(
                        acc, X, W, k, n0, h0, w0, free, in_scale, in_shift, N,
                        (HQ - into // SW + SH - 1) // SH, (WQ - into % SW + SW - 1) // SW, R,
                        out // SW, out % SW, out // SW if DGRAD else into // SW, out % SW if DGRAD else into % SW,
                        DGRAD, KH, KW, SH, SW, PH, PW, DH, DW, RB, BN, BH, BW, BR, BF,
                        MERGED, PROLOGUE, IN_RELU, PRECISION,
                    )  # fmt: skip
            Y = Y0 if out == 0 else (Y1 if out == 1 else (Y2 if out == 2 else Y3))
            f = free + tl.arange(0, BF)
            if BIAS:
                acc += tl.load(bias + k * F + f, f < F, 0.0).to(tl.float32)[None, :]
            if MOMENTS:
                p = tl.arange(0, pixels)
                inside = (n0 + p // (BW * BH) < N) & (h0 + p // BW % BH < HO) & (w0 + p % BW < WO)
                number = (tl.minimum(BN, N - n0) * tl.minimum(BH, HO - h0) * tl.minimum(BW, WO - w0)).to(tl.float32)
                value = acc.to(Y.dtype).to(tl.float32)
                mean = tl.sum(tl.where(inside[:, None], value, 0.0), 0) / number
                off = tl.where(inside[:, None], value - mean[None, :], 0.0)
                piece = moments + (tile.to(tl.int64) * 3) * F + f
                tl.store(piece, mean * 0 + number, f < F)
                tl.store(piece + F, mean, f < F)
                tl.store(piece + 2 * F, tl.sum(off * off, 0), f < F)
            if AFFINE:
                acc = acc * tl.load(scale + k * F + f, f < F, 0.0)[None, :]
                acc += tl.load(shift + k * F + f, f < F, 0.0)[None, :]
            if RESIDUAL:
                if MERGED_OUT:
                    acc += residual.load([k, n0, h0, w0 * BF]).reshape(pixels, BF).to(tl.float32)
                else:
                    acc += residual.load([k, n0, h0, w0, free]).reshape(pixels, BF).to(tl.float32)
            if RELU:
                acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if MERGED_OUT:
                Y.store([k, n0, h0, w0 * BF], acc.to(Y.dtype).reshape(1, BN, BH, BW * BF))
            else:
                Y.store([k, n0, h0, w0, free], acc.to(Y.dtype).reshape(1, BN, BH, BW, BF))


def why_not(problem: Problem, config: Config) -> str | None:
    """Why the tile form cannot run `problem` with `config`; None if it can."""
    size = problem.element_size
    if problem.layout == "crops" or not problem.aligned or problem.C * size % 16 or problem.O * size % 16:
        return f"descriptors do not address {problem.C} → {problem.O} channels, {problem.layout}, of {size} bytes"
    if max(*problem.stride, *problem.dilation) > 2:
        return "strides and dilations above 2 have no parity form"
    if max(*config.tile, config.block_in, config.block_out) > 256:
        return "a descriptor's block has at most 256 values a dimension"
    if min(config.block_in, config.block_out, config.pixels) < 16:
        return "blocks below 16 have no matrix product"
    sums = SUMS if size == 2 else SUMS // 2
    if config.pixels * _free(problem, config) > sums * 32 * config.warps:
        return f"more than {sums} sums a thread leave no registers for what is fused"
    return None


def thread_values(problem: Problem, config: Config) -> int:
    """Values that a thread adds up or loads in one step."""
    pixels, a, b = config.pixels, config.block_in, config.block_out
    taps = _shared_taps(problem)
    if problem.kind == "wgrad":
        return (taps * a * b + pixels * (taps * a + b)) // (32 * config.warps)
    reduced, free = (a, b) if problem.kind == "fprop" else (b, a)
    return (pixels * free + pixels * reduced + a * b) // (32 * config.warps)


def configs(problem: Problem) -> list[Config]:
    """Candidates from shapes alone, best guess first."""
    # Limits found by compiling with Triton 3.6 to 3.9: beyond them what is fused into float32 spills 8 or 16 bytes.
    exact = problem.dtype == "float32"
    deepest = 2 if exact and max(problem.stride) > 1 else 4
    if exact:  # without tensor cores the operands of a product live in registers, too
        sizes, wide, narrow = (32,), 32, 16
    else:
        sizes, wide, narrow = (128, 64), *((64, 32) if problem.kind == "wgrad" else (128, 64))
    found = []
    for warps, pixels in itertools.product((4, 8), sizes):
        tile = _best_tile(problem, pixels)
        for block_out in {power_of_two(min(problem.O, cap), 16) for cap in (wide, narrow)}:
            for block_in in {power_of_two(min(problem.C, cap), 16) for cap in (narrow, wide)}:
                if exact and problem.kind == "fprop" and pixels * block_out > EXACT_SUMS * 32 * warps:
                    continue
                config = Config("tile", tile, block_in, block_out, warps)
                stages = min(deepest, max(2, 160 * 1024 // max(1, _stage_bytes(problem, config))))
                found.append(replace(config, stages=stages))
    if problem.kind == "wgrad":
        found = [split(problem, c, programs(problem, c), _tiles(problem, c)) for c in found]
    return found


def programs(problem: Problem, config: Config) -> int:
    if problem.kind == "wgrad":
        blocks = cdiv(problem.C, config.block_in) * cdiv(problem.O, config.block_out)
        return problem.K * problem.taps // _shared_taps(problem) * blocks * config.splits
    free = cdiv(problem.O, config.block_out) if problem.kind == "fprop" else cdiv(problem.C, config.block_in)
    return problem.K * _tiles(problem, config) * free


def _shared_taps(problem: Problem) -> int:
    """Taps of wgrad that share a program's read of dy."""
    return 3 if problem.kernel[1] == 3 else 1


def _grid(problem: Problem) -> tuple[int, int, int]:
    """Images, rows and columns of the pixels that tiles cut: those of y, or in dgrad of one parity of x."""
    if problem.kind != "dgrad":
        return problem.N, *problem.out_size
    return problem.N, *map(cdiv, (problem.H, problem.W), problem.stride)


def _tiles(problem: Problem, config: Config) -> int:
    """Pixel tiles of one member."""
    return prod(map(cdiv, _grid(problem), config.tile))


SUMS = 64  # a thread, of 2-byte dtypes; with twice as many every flag of the epilogue spills, 64 to 88 bytes
EXACT_SUMS = 4  # a thread, of float32 with what may be fused

# (images, rows, columns); few, since each is a kernel to compile.
TILES = {
    128: ((1, 8, 16), (1, 16, 8), (2, 8, 8), (8, 4, 4), (32, 2, 2), (128, 1, 1)),
    64: ((1, 4, 16), (1, 8, 8), (4, 4, 4), (16, 2, 2), (64, 1, 1)),
    32: ((1, 4, 8), (2, 4, 4), (8, 2, 2)),
}


def _best_tile(problem: Problem, pixels: int) -> tuple[int, int, int]:
    """The tile of so many pixels that pads the grid least; short runs to load count as padding, too."""
    channels = min(problem.C, problem.O)

    def price(tile: tuple[int, int, int]) -> float:
        padded = prod(cdiv(n, b) for n, b in zip(_grid(problem), tile, strict=True))
        run = channels * (tile[2] if problem.layout == "member" else 1)
        return padded * max(1.0, 64 / run) ** 0.5

    return min(TILES[pixels], key=price)


def _products(problem: Problem, config: Config) -> int:
    """Products of one pixel tile with one block of one tap's weights, over all members."""
    blocks = cdiv(problem.C, config.block_in) * cdiv(problem.O, config.block_out)
    return problem.K * _tiles(problem, config) * blocks * problem.taps


def executed_flops(problem: Problem, config: Config) -> int:
    """What the matrix products compute, padding of tiles and blocks included."""
    return 2 * _products(problem, config) * config.pixels * config.block_in * config.block_out


def l2_bytes(problem: Problem, config: Config) -> int:
    """What programs load: every tap reads its tile again."""
    size = problem.element_size
    tile, weights = config.pixels * size, config.block_in * config.block_out * size
    if problem.kind == "wgrad":
        return _products(problem, config) * tile * (config.block_in + config.block_out // _shared_taps(problem))
    reduced = config.block_in if problem.kind == "fprop" else config.block_out
    return _products(problem, config) * (tile * reduced + weights)


def _stage_bytes(problem: Problem, config: Config) -> int:
    pixels, a, b = config.pixels, config.block_in, config.block_out
    if problem.kind == "wgrad":
        return pixels * (_shared_taps(problem) * a + b) * problem.element_size
    return (pixels * (a if problem.kind == "fprop" else b) + a * b) * problem.element_size


def shared_bytes(problem: Problem, config: Config) -> int:
    """An upper bound: the stages of the pipeline and the staged output."""
    out = config.pixels * _free(problem, config) * problem.element_size
    return config.stages * _stage_bytes(problem, config) + 2 * out + 1024


def _free(problem: Problem, config: Config) -> int:
    """Channels of a program's output; in wgrad pixels are what it sums over."""
    return {"fprop": config.block_out, "dgrad": config.block_in, "wgrad": 0}[problem.kind]


def _merges(problem: Problem, config: Config, channels: int, block: int) -> bool:
    """Whether rows of pixels × channels can be one dimension of at most 256 values."""
    return problem.layout == "member" and channels == block and config.tile[2] * channels <= 256


def _descriptor(x: Tensor, block: tuple[int, ...], merged: bool = False) -> TensorDescriptor:
    """(K, N, H, W, C) memory in blocks of (images, rows, columns, channels) of one member; merged: (K, N, H, W·C)."""
    *outer, columns, channels = block
    if not merged:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, *block])
    shape = [*x.shape[:3], x.shape[3] * x.shape[4]]
    return TensorDescriptor(x, shape, [*x.stride()[:3], 1], [1, *outer, columns * channels])


def _parities(x: Tensor, problem: Problem, block: tuple[int, ...]) -> tuple[list[TensorDescriptor], int]:
    """Four descriptors, of the parities of x's rows and columns, and a bit for each parity that has pixels."""
    height, width = problem.stride
    views = [x[:, :, i // width :: height, i % width :: width] for i in range(height * width)]
    live = sum(bool(view.numel()) << i for i, view in enumerate(views))
    descriptors = [_descriptor(view if view.numel() else x, block) for view in views]
    return (descriptors * 4)[:4], live


def _taps(weight: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """(K, O, kh, kw, C) in blocks of one tap's output × input channels."""
    K, O, _, _, C = weight.shape  # noqa: E741
    taps = weight.view(K, O, -1, C)
    return TensorDescriptor(taps, list(taps.shape), list(taps.stride()), [1, block[0], 1, block[1]])


def fprop(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    problem: Problem,
    config: Config,
    epilogue: Epilogue = PLAIN,
    prologue: Prologue | None = None,
    offsets: None = None,
) -> None:
    """y = epilogue(conv(prologue(x), weight)): x (K, N, H, W, C), weight (K, O, kh, kw, C), y (K, N, H', W', O)."""
    block = (*config.tile, config.block_in)
    merged = problem.stride == (1, 1) and _merges(problem, config, problem.C, config.block_in)
    inputs, live = ([_descriptor(x, block, merged)] * 4, 1) if merged else _parities(x, problem, block)
    out = (*config.tile, config.block_out)
    merged_out = _merges(problem, config, problem.O, config.block_out)
    outputs = [_descriptor(y, out, merged_out)] * 4
    residual = None if epilogue.residual is None else _descriptor(epilogue.residual, out, merged_out)
    weights = _taps(weight, (config.block_out, config.block_in))
    sizes = (problem.C, problem.O, config.block_in, config.block_out, *problem.out_size)
    arguments = {
        **{f"X{i}": x for i, x in enumerate(inputs)},
        **{f"Y{i}": y for i, y in enumerate(outputs)},
        **dict(MERGED=merged, MERGED_OUT=merged_out, LIVE=live, DGRAD=False, HQ=problem.H, WQ=problem.W),
        **flags(epilogue, prologue),
        "residual": residual,
    }
    _run(problem, config, sizes, W=weights, **arguments)


def dgrad(dy: Tensor, weight: Tensor, dx: Tensor, problem: Problem, config: Config) -> None:
    """dx (K, N, H, W, C) from dy (K, N, H', W', O) and weight (K, O, kh, kw, C)."""
    merged = _merges(problem, config, problem.O, config.block_out)
    inputs = [_descriptor(dy, (*config.tile, config.block_out), merged)] * 4
    merged_out = problem.stride == (1, 1) and _merges(problem, config, problem.C, config.block_in)
    out = (*config.tile, config.block_in)
    outputs, live = ([_descriptor(dx, out, merged_out)] * 4, 1) if merged_out else _parities(dx, problem, out)
    height, width = (cdiv(size, s) for size, s in zip((problem.H, problem.W), problem.stride, strict=True))
    sizes = (problem.O, problem.C, config.block_out, config.block_in, height, width)
    arguments = {
        **{f"X{i}": x for i, x in enumerate(inputs)},
        **{f"Y{i}": y for i, y in enumerate(outputs)},
        **dict(MERGED=merged, MERGED_OUT=merged_out, LIVE=live, DGRAD=True, HQ=0, WQ=0),
        **flags(PLAIN, None),
    }
    _run(problem, config, sizes, W=_taps(weight, (config.block_out, config.block_in)), **arguments)


def moments_pieces(problem: Problem, config: Config) -> int:
    """S of Epilogue.moments: one piece a tile of a member."""
    return _tiles(problem, config)


def _run(problem: Problem, config: Config, sizes: tuple[int, ...], **arguments: Any) -> None:
    R, F, reduced, free, height, width = sizes
    tiles = dict(zip(("TN", "TH", "TW"), map(cdiv, (problem.N, height, width), config.tile), strict=True))
    blocks = cdiv(F, free)
    launch(
        conv_tile,
        (problem.K * prod(tiles.values()) * blocks,),
        config.warps,
        config.stages,
        **dict(N=problem.N, HO=height, WO=width, R=R, F=F, FB=blocks, RB=cdiv(R, reduced), BR=reduced, BF=free),
        **tiles,
        **dict(zip(("BN", "BH", "BW"), config.tile, strict=True)),
        **geometry(problem),
        **arguments,
    )


# ---- weight gradient ------------------------------------------------------------------------------------------------


@triton.jit
def _pick(X0, X1, X2, X3, parity: tl.constexpr):
    return X0 if parity == 0 else (X1 if parity == 1 else (X2 if parity == 2 else X3))


@triton.jit
def _shifted(
    X, k, n0, h, w, reduced,
    BN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    if MERGED:
        x = X.load([k, n0, h, w * BC])
    else:
        x = X.load([k, n0, h, w, reduced])
    return x.reshape(BN * BH * BW, BC)


@triton.jit
def _correlate(
    A, B, C, G, k, begin, end, free, reduced, dh, dwa, dwb, dwc, TH, TW,
    TAPS: tl.constexpr, LIVE_A: tl.constexpr, LIVE_B: tl.constexpr, LIVE_C: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
    MERGED: tl.constexpr, MERGED_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ over the pixel tiles begin … end of dyᵀ · x for one tap, or three of a row, each with its view and shift."""
    a = tl.zeros((BO, BC), tl.float32)
    b = tl.zeros((BO, BC), tl.float32)
    c = tl.zeros((BO, BC), tl.float32)
    for tile in tl.range(begin, end):
        w0 = tile % TW * BW
        h0 = tile // TW % TH * BH
        n0 = tile // (TW * TH) * BN
        if MERGED_OUT:
            g = G.load([k, n0, h0, w0 * BO]).reshape(BN * BH * BW, BO).T
        else:
            g = G.load([k, n0, h0, w0, free]).reshape(BN * BH * BW, BO).T
        if LIVE_A:
            a = dot(g, _shifted(A, k, n0, h0 + dh, w0 + dwa, reduced, BN, BH, BW, BC, MERGED), a, PRECISION)
        if TAPS == 3 and LIVE_B:
            b = dot(g, _shifted(B, k, n0, h0 + dh, w0 + dwb, reduced, BN, BH, BW, BC, MERGED), b, PRECISION)
        if TAPS == 3 and LIVE_C:
            c = dot(g, _shifted(C, k, n0, h0 + dh, w0 + dwc, reduced, BN, BH, BW, BC, MERGED), c, PRECISION)
    return a, b, c


@triton.jit
def _put(out, acc, k, tap, o, c, C, O, split, ELEMENTS, TAPS: tl.constexpr, ATOMIC: tl.constexpr):
    weight = out + ((k.to(tl.int64) * O + o) * TAPS + tap)[:, None] * C + c[None, :]
    inside = (o < O)[:, None] & (c < C)[None, :]
    if ATOMIC:
        tl.atomic_add(weight, acc, inside, sem="relaxed")
    else:
        tl.store(weight + split.to(tl.int64) * ELEMENTS, acc, inside)


@triton.jit
def wgrad_tile(
    X0, X1, X2, X3, G, out, C, O, TN, TH, TW, CB, OB, SPLITS, ELEMENTS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
    LIVE: tl.constexpr, MERGED: tl.constexpr, MERGED_OUT: tl.constexpr, PRECISION: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """out (K, O, kh, kw, C) += (ATOMIC) or out (splits, K, …) =: one block of weights of one tap, one split of tiles.

    Three taps of a kernel's row share the program, and so their read of dy.
    """
    ROW: tl.constexpr = 3 if KW == 3 else 1
    GROUPS: tl.constexpr = KH * KW // ROW
    # Neighbouring programs are the taps of the same pixels: they meet in L2.
    pid = tl.program_id(0)
    tap = pid % GROUPS * ROW
    reduced = pid // GROUPS % CB * BC
    free = pid // (GROUPS * CB) % OB * BO
    split = pid // (GROUPS * CB * OB) % SPLITS
    k = pid // (GROUPS * CB * OB * SPLITS)
    tiles = TN * TH * TW
    share = tl.cdiv(tiles, SPLITS)
    begin = split * share
    end = tl.minimum(begin + share, tiles)
    u = tap // KW * DH - PH + PH * SH  # made positive for truncating division
    v = tap % KW * DW - PW + PW * SW
    dh = u // SH - PH
    a = tl.zeros((BO, BC), tl.float32)
    b = tl.zeros((BO, BC), tl.float32)
    c = tl.zeros((BO, BC), tl.float32)
    for row in tl.static_range(SH):
        if u % SH == row:
            if ROW == 3:  # v of its taps is known when compiling: 0, DW and 2 · DW more than that of the first
                va: tl.constexpr = PW * SW - PW
                vb: tl.constexpr = va + DW
                vc: tl.constexpr = vb + DW
                a, b, c = _correlate(
                    _pick(X0, X1, X2, X3, row * SW + va % SW), _pick(X0, X1, X2, X3, row * SW + vb % SW),
                    _pick(X0, X1, X2, X3, row * SW + vc % SW), G, k, begin, end, free, reduced,
                    dh, va // SW - PW, vb // SW - PW, vc // SW - PW, TH, TW, ROW,
                    (LIVE >> (row * SW + va % SW)) % 2, (LIVE >> (row * SW + vb % SW)) % 2,
                    (LIVE >> (row * SW + vc % SW)) % 2, BN, BH, BW, BC, BO, MERGED, MERGED_OUT, PRECISION,
                )  # fmt: skip
            else:
                for column in tl.static_range(SW):
                    if v % SW == column:
                        X = _pick(X0, X1, X2, X3, row * SW + column)
                        a, b, c = _correlate(
                            X, X, X, G, k, begin, end, free, reduced, dh, v // SW - PW, 0, 0, TH, TW, ROW,
                            (LIVE >> (row * SW + column)) % 2, 0, 0, BN, BH, BW, BC, BO, MERGED, MERGED_OUT, PRECISION,
                        )  # fmt: skip
    os = free + tl.arange(0, BO)
    cs = reduced + tl.arange(0, BC)
    _put(out, a, k, tap, os, cs, C, O, split, ELEMENTS, KH * KW, ATOMIC)
    if ROW == 3:
        _put(out, b, k, tap + 1, os, cs, C, O, split, ELEMENTS, KH * KW, ATOMIC)
        _put(out, c, k, tap + 2, os, cs, C, O, split, ELEMENTS, KH * KW, ATOMIC)


def wgrad(dy: Tensor, x: Tensor, out: Tensor, problem: Problem, config: Config, offsets: None = None) -> None:
    """dw in float32 from dy (K, N, H', W', O) and x (K, N, H, W, C).

    `out` is (splits, K, O, kh, kw, C), of which every split is written; or with config.atomic one zeroed (1, K, …).
    """
    merged = problem.stride == (1, 1) and _merges(problem, config, problem.C, config.block_in)
    # A dy of merged rows beside an x of plain ones: Triton 3.6 cannot pipeline what three products of sm_100 share.
    merged_out = (merged or config.block_out < 64) and _merges(problem, config, problem.O, config.block_out)
    block = (*config.tile, config.block_in)
    inputs, live = ([_descriptor(x, block, merged)] * 4, 1) if merged else _parities(x, problem, block)
    tiles = dict(zip(("TN", "TH", "TW"), map(cdiv, (problem.N, *problem.out_size), config.tile), strict=True))
    blocks = dict(CB=cdiv(problem.C, config.block_in), OB=cdiv(problem.O, config.block_out))
    launch(
        wgrad_tile,
        (programs(problem, config),),
        config.warps,
        config.stages,
        **{f"X{i}": x for i, x in enumerate(inputs)},
        G=_descriptor(dy, (*config.tile, config.block_out), merged_out),
        out=out,
        **dict(C=problem.C, O=problem.O, SPLITS=config.splits, ELEMENTS=out[0].numel()),
        **dict(BC=config.block_in, BO=config.block_out, LIVE=live, MERGED=merged, MERGED_OUT=merged_out),
        ATOMIC=config.atomic,
        **tiles,
        **blocks,
        **dict(zip(("BN", "BH", "BW"), config.tile, strict=True)),
        **geometry(problem),
    )
