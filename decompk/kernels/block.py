"""Convolution with a weight of kept and skipped blocks: a matrix product that steps over the kept ones alone.

A program computes pixels × channels of one output block (dgrad: of one input block). A table of compressed rows lists
the blocks it reads; a step is one of them, one tap and a chunk of its channels, all scalar: lanes differ in their pixel
and channel alone, and so channels load in vectors. Masked loads take any size and geometry.

Tensors are NHWC: x (N, H, W, C), weight dense (O, kh, kw, C), y (N, H', W', O).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from .block_choice import BlockChoice, choose_blocks
from .conv.operands import geometry, split
from .launch import GRID_LIMIT, Launch, launch, recording
from .problem import Config, Problem, dtype_name, power_of_two
from .product import dot


@triton.jit
def _pixels(p, HO, WO):
    return p // (HO * WO), p // WO % HO, p % WO


@triton.jit
def _read_by(
    n, h, w, tap, inside, sn, sh, sw, H, W,
    BACKWARD: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    """(pixels,) offsets and mask: what pixels (n, h, w) read of an image (H, W) through a tap."""
    dh = tap // KW * DH
    dw = tap % KW * DW
    if BACKWARD:
        u = h + PH - dh
        v = w + PW - dw
        row = u // SH
        column = v // SW
        valid = (u >= 0) & (v >= 0) & (u % SH == 0) & (v % SW == 0)
    else:
        row = h * SH + dh - PH
        column = w * SW + dw - PW
        valid = (row >= 0) & (column >= 0)
    valid = valid & (row < H) & (column < W) & inside
    return n.to(tl.int64) * sn + row.to(tl.int64) * sh + column.to(tl.int64) * sw, valid


@triton.jit
def conv_blocks(
    x, weight, y, bias, starts, index, PIXELS, BLOCKS, H, W, HO, WO,
    xn, xh, xw, wf, wt, wr, yn, yh, yw,
    BACKWARD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    R: tl.constexpr, F: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
    PRECISION: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y (fprop) from x, or dx (dgrad) from dy: blocks of R reduced and F free channels, BP × BF of a block a program.

    Free block b reads the reduced blocks index[starts[b]] … index[starts[b + 1] − 1].
    """
    PARTS: tl.constexpr = (F + BF - 1) // BF
    CHUNKS: tl.constexpr = (R + BR - 1) // BR
    STEPS: tl.constexpr = KH * KW * CHUNKS
    pid = tl.program_id(0)
    part = pid % PARTS
    block = pid // PARTS % BLOCKS
    p = pid // (PARTS * BLOCKS) * BP + tl.arange(0, BP)
    inside = p < PIXELS
    n, h, w = _pixels(p, HO, WO)
    f = part * BF + tl.arange(0, BF)
    free = block * F + f
    acc = tl.zeros((BP, BF), tl.float32)
    for step in tl.range(tl.load(starts + block) * STEPS, tl.load(starts + block + 1) * STEPS):
        reduced = tl.load(index + step // STEPS) * R
        tap = step % STEPS // CHUNKS
        r = step % CHUNKS * BR + tl.arange(0, BR)
        offset, valid = _read_by(n, h, w, tap, inside, xn, xh, xw, H, W, BACKWARD, KW, SH, SW, PH, PW, DH, DW)
        a = tl.load(x + offset[:, None] + (reduced + r)[None, :], valid[:, None] & (r < R)[None, :], 0.0)
        b = tl.load(
            weight + tap * wt + ((reduced + r) * wr)[:, None] + (free * wf)[None, :],
            (r < R)[:, None] & (f < F)[None, :],
            0.0,
        )
        acc = dot(a, b, acc, PRECISION)
    if BIAS:
        acc += tl.load(bias + free, f < F, 0.0).to(tl.float32)[None, :]
    pixel = n.to(tl.int64) * yn + h.to(tl.int64) * yh + w.to(tl.int64) * yw
    tl.store(y + pixel[:, None] + free[None, :], acc.to(y.dtype.element_ty), inside[:, None] & (f < F)[None, :])


@triton.jit
def wgrad_blocks(
    x, dy, out, rows, columns, PIXELS, SPLITS, KEPT, ELEMENTS, H, W, HO, WO,
    xn, xh, xw, yn, yh, yw,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    C: tl.constexpr, O: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
    PRECISION: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """out (kept, O, kh, kw, C) += (ATOMIC) or out (splits, kept, …) =: BO × BC of one kept block's tap, one split.

    O and C are channels of a block; rows and columns say which it is.
    """
    TAPS: tl.constexpr = KH * KW
    CB: tl.constexpr = (C + BC - 1) // BC
    OB: tl.constexpr = (O + BO - 1) // BO
    # Neighbouring programs are the taps of the same pixels: they meet in L2.
    pid = tl.program_id(0)
    tap = pid % TAPS
    c = pid // TAPS % CB * BC + tl.arange(0, BC)
    o = pid // (TAPS * CB) % OB * BO + tl.arange(0, BO)
    kept = pid // (TAPS * CB * OB) % KEPT
    piece = pid // (TAPS * CB * OB) // KEPT
    row = tl.load(rows + kept) * O
    column = tl.load(columns + kept) * C
    share = tl.cdiv(tl.cdiv(PIXELS, BP), SPLITS) * BP
    acc = tl.zeros((BO, BC), tl.float32)
    for p0 in tl.range(piece * share, tl.minimum(piece * share + share, PIXELS), BP):
        p = p0 + tl.arange(0, BP)
        inside = p < PIXELS
        n, h, w = _pixels(p, HO, WO)
        offset, valid = _read_by(n, h, w, tap, inside, xn, xh, xw, H, W, False, KW, SH, SW, PH, PW, DH, DW)
        pixel = n.to(tl.int64) * yn + h.to(tl.int64) * yh + w.to(tl.int64) * yw
        g = tl.load(dy + pixel[:, None] + (row + o)[None, :], inside[:, None] & (o < O)[None, :], 0.0)
        a = tl.load(x + offset[:, None] + (column + c)[None, :], valid[:, None] & (c < C)[None, :], 0.0)
        acc = dot(g.T, a, acc, PRECISION)
    at = out + ((kept.to(tl.int64) * O + o) * TAPS + tap)[:, None] * C + c[None, :]
    mask = (o < O)[:, None] & (c < C)[None, :]
    if ATOMIC:
        tl.atomic_add(at, acc, mask, sem="relaxed")
    else:
        tl.store(at + piece.to(tl.int64) * ELEMENTS, acc, mask)


# ---- launching ------------------------------------------------------------------------------------------------------


LARGEST = 64  # channels of a tile


def why_not(problem: Problem, choice: BlockChoice) -> str | None:
    """Why the kernels cannot run `problem`; None if they can."""
    p = problem
    pixels = p.N * max(p.H * p.W, prod(p.out_size))
    tiles = (len(choice.mask) * cdiv(choice.out_block, LARGEST), len(choice.mask[0]) * cdiv(choice.in_block, LARGEST))
    if pixels >= 2**31 or cdiv(pixels, _pixels_of(p)) * max(tiles) > GRID_LIMIT:
        return "2³¹ pixels or programs, or more"
    if p.O * p.C * p.taps >= 2**31:
        return "2³¹ weights or more"
    return None


def _pixels_of(problem: Problem) -> int:
    """Pixels of a tile. Found by compiling: of 128, or of 64 of 4 bytes, some kernels spill on sm_80."""
    return 64 if problem.element_size == 2 else 32


def config_of(problem: Problem, choice: BlockChoice) -> Config:
    """The config for `problem`, from shapes alone."""
    blocks = [power_of_two(min(size, LARGEST), 16) for size in (choice.in_block, choice.out_block)]
    # Operands of tf32 are rounded in registers: of 64 × 64 values, four warps spill 8 bytes on sm_100.
    warps = 8 if problem.dtype == "tf32" and min(blocks) == LARGEST else 4
    found = Config("blocks", (1, 1, _pixels_of(problem)), *blocks, warps, stages=3)
    if problem.kind != "wgrad":
        return found
    programs = (
        choice.blocks * problem.taps * cdiv(choice.in_block, found.block_in) * cdiv(choice.out_block, found.block_out)
    )
    return split(problem, found, programs, cdiv(problem.N * prod(problem.out_size), found.pixels))


@functools.lru_cache(maxsize=1024)
def _rows_of(choice: BlockChoice, transposed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """starts (rows + 1) and index, int32 on the device: the kept columns of each block row, or rows of each column."""
    mask = list(zip(*choice.mask, strict=True)) if transposed else choice.mask
    starts = itertools.accumulate(map(sum, mask), initial=0)
    index = [i for row in mask for i, keep in enumerate(row) if keep]
    return tuple(torch.tensor(list(table), dtype=torch.int32, device=device) for table in (starts, index or [0]))


@functools.lru_cache(maxsize=1024)
def _kept_of(choice: BlockChoice, device: torch.device) -> Tensor:
    """(2, kept) rows and columns of the kept blocks, on the device."""
    return torch.tensor(
        [(r, s) for r, row in enumerate(choice.mask) for s, keep in enumerate(row) if keep], device=device
    ).T.contiguous()


def fprop(problem: Problem, choice: BlockChoice, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y = conv(x, the kept blocks of weight) + bias."""
    p, config = problem, config_of(problem, choice)
    _run(
        p, choice, config, x, weight, y, bias, BACKWARD=False, H=p.H, W=p.W, HO=p.out_size[0], WO=p.out_size[1],
        R=choice.in_block, F=choice.out_block, BR=config.block_in, BF=config.block_out, wf=p.taps * p.C, wt=p.C, wr=1,
    )  # fmt: skip


def dgrad(problem: Problem, choice: BlockChoice, dy: Tensor, weight: Tensor, dx: Tensor) -> None:
    """dx from dy and the kept blocks of weight."""
    p, config = problem, config_of(problem, choice)
    _run(
        p, choice, config, dy, weight, dx, None, BACKWARD=True, H=p.out_size[0], W=p.out_size[1], HO=p.H, WO=p.W,
        R=choice.out_block, F=choice.in_block, BR=config.block_out, BF=config.block_in, wf=1, wt=p.C, wr=p.taps * p.C,
    )  # fmt: skip


def wgrad(problem: Problem, choice: BlockChoice, dy: Tensor, x: Tensor, dw: Tensor) -> None:
    """dw (O, kh, kw, C), zero in the skipped blocks: summed in float32, in one pass with atomics or in two without."""
    dw.zero_()
    if not choice.blocks:
        return
    p, config = problem, config_of(problem, choice)
    rows, columns = _kept_of(choice, x.device)
    shape = (choice.blocks, choice.out_block, *p.kernel, choice.in_block)
    make = torch.zeros if config.atomic else torch.empty
    total = make((1 if config.atomic else config.splits, *shape), dtype=torch.float32, device=x.device)
    parts = cdiv(choice.in_block, config.block_in) * cdiv(choice.out_block, config.block_out)
    HO, WO = p.out_size
    launch(
        wgrad_blocks,
        (p.taps * parts * choice.blocks * config.splits,),
        config.warps,
        config.stages,
        **dict(x=x, dy=dy, out=total, rows=rows, columns=columns, ATOMIC=config.atomic),
        **dict(PIXELS=p.N * HO * WO, SPLITS=config.splits, KEPT=choice.blocks, ELEMENTS=prod(shape)),
        **dict(H=p.H, W=p.W, HO=HO, WO=WO, C=choice.in_block, O=choice.out_block),
        **dict(BP=config.pixels, BC=config.block_in, BO=config.block_out),
        **_strides("x", x),
        **_strides("y", dy),
        **geometry(p),
    )
    blocks = dw.unflatten(3, (-1, choice.in_block)).unflatten(0, (-1, choice.out_block)).permute(0, 4, 1, 2, 3, 5)
    blocks[rows, columns] = (total[0] if len(total) == 1 else total.sum(0)).to(dw.dtype)


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return dict(zip((name + axis for axis in "nhw"), x.stride()[:3], strict=True))


def _run(
    problem: Problem, choice: BlockChoice, config: Config, x: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None,
    **sizes: int | bool,
) -> None:  # fmt: skip
    starts, index = _rows_of(choice, sizes["BACKWARD"], x.device)
    pixels = problem.N * sizes["HO"] * sizes["WO"]
    blocks = len(starts) - 1
    launch(
        conv_blocks,
        (cdiv(pixels, config.pixels) * blocks * cdiv(sizes["F"], sizes["BF"]),),
        config.warps,
        config.stages,
        **dict(x=x, weight=weight, y=y, bias=bias, BIAS=bias is not None, starts=starts, index=index),
        **dict(PIXELS=pixels, BLOCKS=blocks, BP=config.pixels),
        **sizes,
        **_strides("x", x),
        **_strides("y", y),
        **geometry(problem),
    )


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of every pass: block sizes that fill the tiles and odd ones, strides, taps, a bias, dtypes."""
    mask = "1100/0110/0001/1001"
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False)):
        for size, kernel, stride in itertools.product((8, 16, 24, 32, 64, 128), (1, 3), (1, 2)):
            choice = choose_blocks(mask, 4 * size, 4 * size, "triton")
            name = dtype_name(dtype, tf32)
            pad = kernel // 2
            sides = (1, 32, 4 * size, 4 * size, 28, 28, (kernel, kernel), (stride, stride), (pad, pad))
            p = Problem("fprop", name, *sides)
            shapes = (32, 28, 28, p.C), (32, *p.out_size, p.O), (p.O, kernel, kernel, p.C)
            x, y, w = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
            with recording() as launches:
                fprop(p, choice, x, w, w.new_empty(p.O), y)
                dgrad(p.of("dgrad"), choice, y, w, x)
                for deterministic in (False, True):
                    wgrad(replace(p, kind="wgrad", deterministic=deterministic), choice, y, x, w)
            found = {}
            for item in launches:
                flags = [flag for flag in ("BACKWARD", "ATOMIC") if item.arguments.get(flag)]
                sizes = f"{size} channels, {kernel}×{kernel}, stride {stride}"
                found[" ".join([item.kernel.__name__, name, sizes, *flags])] = item
            yield from found.items()
