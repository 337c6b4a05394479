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

from torch import Tensor
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import launch
from ..problem import Config, Epilogue, Problem, Prologue, power_of_two
from .operands import PLAIN, flags, geometry, split
from .tile_kernels import conv_tile, wgrad_tile


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
