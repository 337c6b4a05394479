"""The tile form: an implicit matrix product, tap by tap, on tensor descriptors.

One program computes one tile of a member's pixels (images × rows × columns) and one block of its output channels. For
each tap and block of input channels it loads the tile shifted by that tap: rows, columns and channels outside the
tensor arrive as zeros, so padding costs neither masks nor index arithmetic. Stride 2 reads (forward) or writes
(backward) one descriptor per parity of row and column. Where a member's pixels are contiguous and few channels wide,
rows are merged (pixels × channels in one dimension) so that the copy engine moves long runs.

Strides. A descriptor loads neighbouring rows, a strided kernel reads every s-th: so the strided tensor, x or dx, is
seen through s views along each axis (s is 1 or 2), view q holding its rows q, q + s, q + 2s, …; row j of view q is row
s·j + q of the tensor. Views of both axes are numbered q_h · SW + q_w, which orders X0 … X3 and Y0 … Y3 and the bits of
LIVE. Along an axis with padding p and dilation d, tap k of output row h reads row s·h + k·d − p of x, which is

    view  q = (k·d − p) mod s,    row  h + (k·d − p − q) / s = h + ⌊(k·d − p) / s⌋,

so a tap meets one view, the same for every h, and neighbouring output rows meet neighbouring rows of it: a tile of
pixels is one load, shifted by the tap's quotient. Each kernel takes this its own way:

- fprop, a program for a tile of y: for every view q, the taps that meet it (taps.py), at row h + (k·d − p − q) / s.
- dgrad, a program for a tile of every view of dx: row i of view r, s·i + r, was read by tap k from output row
  h = i + (r + p − k·d) / s where s divides it, which are the taps that meet view r. One that no tap meets is zero.
- wgrad, a program for one tap (or a row of three): its one view, at row h + ⌊(k·d − p) / s⌋.

Division truncates toward zero in Triton, so every dividend is made positive by a multiple of s, whose quotient is taken
off again. Rows before the first or after the last of a view are outside the tensor, too, and arrive as zeros. A view
without pixels (q = 1 of a single row) has no descriptor: its bit of LIVE is 0, and nothing loads or stores it.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from math import prod
from types import ModuleType
from typing import Any

from torch import Tensor

from ..launch import Fixed, around, descriptor, launch
from ..problem import (
    PLAIN,
    PLAIN_GRADIENT,
    Config,
    Epilogue,
    GradientEpilogue,
    Offsets,
    Problem,
    Prologue,
    cdiv,
    power_of_two,
)
from .form import KernelForm
from .operands import geometry, split


@functools.cache
def _device_code() -> ModuleType:
    from . import tile_kernels  # triton loads with it

    return tile_kernels


class Tile(KernelForm):
    """An implicit matrix product, tap by tap, on tensor descriptors."""

    name = "tile"
    thread_bytes = {80: 128, 100: 176}

    def fits(self, problem: Problem, config: Config) -> str | None:
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
        if problem.kind == "dgrad" and config.tile[0] * problem.H * problem.W * problem.C * max(1, problem.K) >= 2**31:
            return "a tile's images are 2³¹ values or more"
        sums = SUMS if size == 2 else SUMS // 2
        sums = sums // 2 if problem.fused == "sums" else sums  # beside them lies what they are taken with
        if config.pixels * _free(problem, config) > sums * 32 * config.warps:
            return f"more than {sums} sums a thread leave no registers for what is fused"
        return None

    def configs(self, problem: Problem) -> list[Config]:
        """Candidates from shapes alone, best guess first."""
        # Limits found by compiling with Triton 3.6 to 3.9: beyond them what is fused into float32 spills 8 or 16 bytes.
        exact = problem.dtype == "float32"
        deepest = 2 if exact and max(problem.stride) > 1 else 4
        if exact:  # without tensor cores the operands of a product live in registers, too
            sizes, wide, narrow = [32], 32, 16
        else:
            sizes, (wide, narrow) = [128, 64], ((64, 32) if problem.kind == "wgrad" else (128, 64))
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
            found = [split(problem, c, self.programs(problem, c), _tiles(problem, c)) for c in found]
        return found

    def programs(self, problem: Problem, config: Config) -> int:
        if problem.kind == "wgrad":
            blocks = cdiv(problem.C, config.block_in) * cdiv(problem.O, config.block_out)
            return problem.K * problem.taps // _shared_taps(problem) * blocks * config.splits
        free = cdiv(problem.O, config.block_out) if problem.kind == "fprop" else cdiv(problem.C, config.block_in)
        return problem.K * _tiles(problem, config) * free

    def thread_values(self, problem: Problem, config: Config) -> int:
        """Values that a thread adds up or loads in one step."""
        pixels, a, b = config.pixels, config.block_in, config.block_out
        taps = _shared_taps(problem)
        if problem.kind == "wgrad":
            return (taps * a * b + pixels * (taps * a + b)) // (32 * config.warps)
        reduced, free = (a, b) if problem.kind == "fprop" else (b, a)
        weights = a * b * (2 if problem.fused and problem.element_size == 2 else 1)  # float32 in training
        return (pixels * free + pixels * reduced + weights) // (32 * config.warps)

    def thread_limit(self, problem: Problem, capability: int) -> int | None:
        limit = self.thread_bytes.get(capability)
        if not limit or not problem.fused:
            return limit
        if (capability, problem.fused) == (80, "sums"):  # whose addresses are four times as many where views are parted
            return limit - (100 if max(problem.stride) > 1 else 80)
        return limit - 32  # what moments and sums are taken with needs room, too

    def executed_flops(self, problem: Problem, config: Config) -> int:
        """What the matrix products compute, padding of tiles and blocks included."""
        return 2 * _products(problem, config) * config.pixels * config.block_in * config.block_out

    def l2_bytes(self, problem: Problem, config: Config) -> int:
        """What programs load: every tap reads its tile again."""
        size = problem.element_size
        tile, weights = config.pixels * size, config.block_in * config.block_out * size
        if problem.kind == "wgrad":
            return _products(problem, config) * tile * (config.block_in + config.block_out // _shared_taps(problem))
        reduced = config.block_in if problem.kind == "fprop" else config.block_out
        return _products(problem, config) * (tile * reduced + weights)

    def step_bytes(self, problem: Problem, config: Config) -> int:
        return _stage_bytes(problem, config)

    def thread_sums(self, problem: Problem, config: Config) -> int:
        sums = config.pixels * _free(problem, config)
        if problem.kind == "wgrad":
            sums = _shared_taps(problem) * config.block_in * config.block_out
        return sums // (32 * config.warps)

    def shared_bytes(self, problem: Problem, config: Config) -> int:
        """An upper bound: the stages of the pipeline and the staged output."""
        out = config.pixels * _free(problem, config) * problem.element_size
        return config.stages * _stage_bytes(problem, config) + 2 * out + 1024

    def moments_pieces(self, problem: Problem, config: Config) -> int:
        """S of Epilogue.moments or GradientEpilogue.sums: one piece a tile of a member, in dgrad of each view."""
        return _tiles(problem, config) * (_live(problem).bit_count() if problem.kind == "dgrad" else 1)

    def fprop(
        self,
        problem: Problem,
        config: Config,
        x: Tensor,
        weight: Tensor,
        y: Tensor,
        epilogue: Epilogue = PLAIN,
        prologue: Prologue | None = None,
        offsets: Offsets | None = None,
    ) -> Tensor:
        fixed, grid = _convolution(problem, config)
        into, out = (*config.tile, config.block_in), (*config.tile, config.block_out)
        outputs = (_descriptor(y, out, fixed["MERGED_OUT"]),) * 4
        arguments = around(epilogue, prologue)
        if epilogue.residual is not None:
            arguments["residual"] = _descriptor(epilogue.residual, out, fixed["MERGED_OUT"])
        self._run(
            problem, config, grid, fixed, _parities(x, problem, into, fixed["MERGED"]), weight, outputs, arguments
        )
        return y

    def dgrad(
        self,
        problem: Problem,
        config: Config,
        dy: Tensor,
        weight: Tensor,
        dx: Tensor,
        epilogue: GradientEpilogue = PLAIN_GRADIENT,
    ) -> Tensor:
        fixed, grid = _convolution(problem, config)
        into, out = (*config.tile, config.block_out), (*config.tile, config.block_in)
        inputs = (_descriptor(dy, into, fixed["MERGED"]),) * 4
        outputs = _parities(dx, problem, out, fixed["MERGED_OUT"])
        arguments = around(gradient=epilogue)
        self._run(problem, config, grid, fixed, inputs, weight, outputs, arguments, dx.stride())
        return dx

    def _run(
        self,
        problem: Problem,
        config: Config,
        grid: tuple[int],
        fixed: Fixed,
        inputs: tuple[Any, ...],
        weight: Tensor,
        outputs: tuple[Any, ...],
        arguments: dict[str, Any],
        strides: tuple[int, ...] = (0, 0, 0, 0),
    ) -> None:
        """strides: of dx, where an epilogue reads what lies as it does."""
        K, O, C, taps = problem.K, problem.O, problem.C, problem.taps
        # Taps are numbered row · kw + column; in blocks of one tap's output × input channels.
        block = (1, config.block_out, 1, config.block_in)
        W = descriptor(weight, (K, O, taps, C), (O * taps * C, taps * C, C, 1), block)
        names = dict(zip(("X0", "X1", "X2", "X3", "Y0", "Y1", "Y2", "Y3"), (*inputs, *outputs), strict=True))
        names |= zip(("gk", "gn", "gh", "gw"), strides, strict=False)
        launch(_device_code().conv_tile, grid, config.warps, config.stages, fixed, W=W, **names, **arguments)

    def wgrad(
        self, problem: Problem, config: Config, dy: Tensor, x: Tensor, out: Tensor, offsets: Offsets | None = None
    ) -> Tensor:
        fixed, grid = _correlation(problem, config)
        inputs = _parities(x, problem, (*config.tile, config.block_in), fixed["MERGED"])
        names = dict(zip(("X0", "X1", "X2", "X3"), inputs, strict=True))
        G = _descriptor(dy, (*config.tile, config.block_out), fixed["MERGED_OUT"])
        launch(_device_code().wgrad_tile, grid, config.warps, config.stages, fixed, G=G, out=out, **names)
        return out


@functools.lru_cache(maxsize=4096)
def _convolution(problem: Problem, config: Config) -> tuple[Fixed, tuple[int]]:
    """What fprop or dgrad passes that is no tensor, and its grid."""
    sides = problem.C, problem.O
    blocks = config.block_in, config.block_out
    merges = [_merges(problem, config, *side) for side in zip(sides, blocks, strict=True)]
    merges[0] = merges[0] and problem.stride == (1, 1)  # the parities of x are parted rows and columns
    size, image = problem.out_size, (problem.H, problem.W)
    if problem.kind == "dgrad":
        sides, blocks, merges = sides[::-1], blocks[::-1], merges[::-1]
        size = _grid(problem)[1:]
    tiles = tuple(map(cdiv, (problem.N, *size), config.tile))
    free = cdiv(sides[1], blocks[1])
    fixed = {
        **dict(DGRAD=problem.kind == "dgrad", MERGED=merges[0], MERGED_OUT=merges[1], LIVE=_live(problem)),
        **dict(N=problem.N, HO=size[0], WO=size[1], HQ=image[0], WQ=image[1]),
        **dict(R=sides[0], F=sides[1], FB=free, RB=cdiv(sides[0], blocks[0]), BR=blocks[0], BF=blocks[1]),
        **dict(zip(("TN", "TH", "TW"), tiles, strict=True)),
        **dict(zip(("BN", "BH", "BW"), config.tile, strict=True)),
        **geometry(problem),
    }
    return Fixed(fixed), (problem.K * prod(tiles) * free,)


@functools.lru_cache(maxsize=4096)
def _correlation(problem: Problem, config: Config) -> tuple[Fixed, tuple[int]]:
    """What wgrad passes that is no tensor, and its grid."""
    merged = problem.stride == (1, 1) and _merges(problem, config, problem.C, config.block_in)
    # A dy of merged rows beside an x of plain ones: Triton 3.6 cannot pipeline what three products of sm_100 share.
    merged_out = (merged or config.block_out < 64) and _merges(problem, config, problem.O, config.block_out)
    fixed = {
        **dict(C=problem.C, O=problem.O, SPLITS=config.splits, ATOMIC=config.atomic),
        **dict(ELEMENTS=problem.K * problem.O * problem.taps * problem.C),
        **dict(BC=config.block_in, BO=config.block_out, MERGED=merged, MERGED_OUT=merged_out, LIVE=_live(problem)),
        **dict(zip(("TN", "TH", "TW"), map(cdiv, (problem.N, *problem.out_size), config.tile), strict=True)),
        **dict(CB=cdiv(problem.C, config.block_in), OB=cdiv(problem.O, config.block_out)),
        **dict(zip(("BN", "BH", "BW"), config.tile, strict=True)),
        **geometry(problem),
    }
    blocks = fixed["CB"] * fixed["OB"]
    return Fixed(fixed), (problem.K * problem.taps // _shared_taps(problem) * blocks * config.splits,)


def _shared_taps(problem: Problem) -> int:
    """Taps of wgrad that share a program's read of dy."""
    return 3 if problem.kernel[1] == 3 else 1


def _grid(problem: Problem) -> tuple[int, int, int]:
    """Images, rows and columns of the pixels that tiles cut: those of y, or in dgrad of one parity of x."""
    if problem.kind != "dgrad":
        return problem.N, *problem.out_size
    return problem.N, cdiv(problem.H, problem.stride[0]), cdiv(problem.W, problem.stride[1])


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


def _stage_bytes(problem: Problem, config: Config) -> int:
    pixels, a, b = config.pixels, config.block_in, config.block_out
    if problem.kind == "wgrad":
        return pixels * (_shared_taps(problem) * a + b) * problem.element_size
    return (pixels * (a if problem.kind == "fprop" else b) + a * b) * problem.element_size


def _free(problem: Problem, config: Config) -> int:
    """Channels of a program's output; in wgrad pixels are what it sums over."""
    return {"fprop": config.block_out, "dgrad": config.block_in, "wgrad": 0}[problem.kind]


def _merges(problem: Problem, config: Config, channels: int, block: int) -> bool:
    """Whether rows of pixels × channels can be one dimension of at most 256 values."""
    return problem.layout == "member" and channels == block and config.tile[2] * channels <= 256


def _live(problem: Problem) -> int:
    """LIVE: a bit for each view of x, by parity of row and column, that has pixels."""
    height, width = problem.stride
    return sum((i // width < problem.H and i % width < problem.W) << i for i in range(height * width))


def _descriptor(x: Tensor, block: tuple[int, ...], merged: bool = False) -> Any:
    """(K, N, H, W, C) memory in blocks of (images, rows, columns, channels) of one member; merged: (K, N, H, W·C)."""
    if not merged:
        return descriptor(x, x.shape, x.stride(), (1, *block))
    images, rows, columns, channels = block
    K, N, H, W, C = x.shape
    return descriptor(x, (K, N, H, W * C), (*x.stride()[:3], 1), (1, images, rows, columns * channels))


def _parities(x: Tensor, problem: Problem, block: tuple[int, ...], merged: bool) -> tuple[Any, ...]:
    """Descriptors of the views of x by parity of row and column.

    Always four, as kernels have arguments: those beyond the strides, or without pixels, are stand-ins that none reads.
    """
    if problem.stride == (1, 1):
        return (_descriptor(x, block, merged),) * 4
    height, width = problem.stride
    views = [x[:, :, i // width :: height, i % width :: width] for i in range(height * width)]
    return (tuple(_descriptor(view if view.numel() else x, block) for view in views) * 4)[:4]
