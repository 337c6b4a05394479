"""The pointer form: an implicit matrix product on masked loads, for everything that descriptors cannot address.

Any strides, any number of channels, any alignment, strides and dilations above 2, and crops: members that read windows
of one shared image through a table of offsets. Taps and channels are one reduced dimension, so that 3 channels of a 7×7
kernel fill a block. Addresses are computed element by element: right everywhere, fast nowhere.
"""

from __future__ import annotations

import functools
from math import prod
from types import ModuleType
from typing import Any

from torch import Tensor

from ..launch import Fixed, around, launch
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
    from . import pointer_kernels  # triton loads with it

    return pointer_kernels


class Pointer(KernelForm):
    """An implicit matrix product on masked loads."""

    name = "pointer"
    wants_copy_engine = False
    l2_slowdown = 4.0  # not measured

    def fits(self, problem: Problem, config: Config) -> str | None:
        """Why the pointer form cannot run `problem` with `config`; None if it can."""
        if problem.layout == "crops" and problem.kind == "dgrad":
            return "overlapping crops would write the same pixels"
        if min(config.block_in, config.block_out, config.pixels) < 16:
            return "blocks below 16 have no matrix product"
        if problem.N * max(problem.H * problem.W, prod(problem.out_size)) >= 2**31:
            return "a member has 2³¹ pixels or more"
        return None

    def configs(self, problem: Problem) -> list[Config]:
        """Candidates from shapes alone, best guess first."""
        reduced, free = (problem.C, problem.O) if problem.kind != "dgrad" else (problem.O, problem.C)
        blocks = power_of_two(min(problem.taps * reduced, 32), 16), power_of_two(min(free, 32), 16)
        if problem.kind == "dgrad":
            blocks = blocks[::-1]
        # Addresses fill the registers: of larger blocks, or of 64 pixels in two stages, some spill on some
        # architecture; of tf32's, which are rounded in registers, 32 pixels in two stages do.
        found = [Config("pointer", (1, 1, 32), *blocks, stages=1 if problem.dtype == "tf32" else 2)]
        if problem.element_size == 2:
            found.insert(0, Config("pointer", (1, 1, 64), *blocks, stages=1))
        if problem.kind == "wgrad":
            found = [split(problem, c, self.programs(problem, c), self.moments_pieces(problem, c)) for c in found]
        return found

    def programs(self, problem: Problem, config: Config) -> int:
        if problem.kind == "wgrad":
            blocks = cdiv(problem.taps * problem.C, config.block_in) * cdiv(problem.O, config.block_out)
            return problem.K * blocks * config.splits
        free = cdiv(problem.O, config.block_out) if problem.kind == "fprop" else cdiv(problem.C, config.block_in)
        return problem.K * cdiv(_pixels(problem), config.pixels) * free

    def executed_flops(self, problem: Problem, config: Config) -> int:
        """What the matrix products compute, padding of tiles and blocks included."""
        return 2 * _products(problem, config) * config.pixels * config.block_in * config.block_out

    def l2_bytes(self, problem: Problem, config: Config) -> int:
        """What programs load: both operands of every product, value by value."""
        reduced, free = config.block_in, config.block_out
        if problem.kind == "dgrad":
            reduced, free = free, reduced
        other = config.pixels if problem.kind == "wgrad" else reduced
        return _products(problem, config) * (config.pixels * reduced + other * free) * problem.element_size

    def step_bytes(self, problem: Problem, config: Config) -> int:
        """Both operands of one product."""
        pixels, a, b = config.pixels, config.block_in, config.block_out
        other = {"fprop": a * b + pixels * a, "dgrad": a * b + pixels * b, "wgrad": pixels * (a + b)}
        return other[problem.kind] * problem.element_size

    def thread_sums(self, problem: Problem, config: Config) -> int:
        pixels, a, b = config.pixels, config.block_in, config.block_out
        return {"fprop": pixels * b, "dgrad": pixels * a, "wgrad": a * b}[problem.kind] // (32 * config.warps)

    def shared_bytes(self, problem: Problem, config: Config) -> int:
        """An upper bound: the operands of each stage and a staged result."""
        pixels, a, b = config.pixels, config.block_in, config.block_out
        return config.stages * (pixels * (a + b) + a * b) * problem.element_size + pixels * max(a, b) * 4

    def moments_pieces(self, problem: Problem, config: Config) -> int:
        """S of Epilogue.moments or GradientEpilogue.sums: one piece a tile of a member's pixels."""
        return cdiv(_pixels(problem), config.pixels)

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
        self._run(problem, config, x, weight, y, around(epilogue, prologue), epilogue.residual, offsets)
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
        self._run(problem, config, dy, weight, dx, around(gradient=epilogue))
        return dx

    def _run(
        self,
        problem: Problem,
        config: Config,
        x: Tensor,
        weight: Tensor,
        y: Tensor,
        arguments: dict[str, Any],
        residual: Tensor | None = None,
        offsets: Offsets | None = None,
    ) -> None:
        fixed, grid = _convolution(problem, config)
        launch(
            _device_code().conv_pointer,
            grid,
            config.warps,
            config.stages,
            fixed,
            **dict(x=x, offsets=offsets and offsets.table, weight=weight, y=y, CROPS=offsets is not None),
            **_strides("x", x, offsets is not None),
            **_strides("y", y),
            **_strides("r", residual),
            **arguments,
        )

    def wgrad(
        self, problem: Problem, config: Config, dy: Tensor, x: Tensor, out: Tensor, offsets: Offsets | None = None
    ) -> Tensor:
        fixed, grid = _correlation(problem, config)
        launch(
            _device_code().wgrad_pointer,
            grid,
            config.warps,
            config.stages,
            fixed,
            **dict(x=x, offsets=offsets and offsets.table, dy=dy, out=out, CROPS=offsets is not None),
            **_strides("x", x, offsets is not None),
            **_strides("y", dy),
        )
        return out


@functools.lru_cache(maxsize=4096)
def _convolution(problem: Problem, config: Config) -> tuple[Fixed, tuple[int]]:
    """What fprop or dgrad passes that is no tensor, and its grid."""
    sides, blocks = (problem.C, problem.O), (config.block_in, config.block_out)
    image, size = (problem.H, problem.W), problem.out_size
    pixel, row = problem.C, problem.taps * problem.C  # of the dense weight: from tap to tap, from output to output
    steps = dict(wf=row, wr=1)
    if problem.kind == "dgrad":
        sides, blocks, image, size = sides[::-1], blocks[::-1], size, image
        steps = dict(wf=1, wr=row)
    tiles = cdiv(problem.N * prod(size), config.pixels)
    free = cdiv(sides[1], blocks[1])
    fixed = {
        **dict(BACKWARD=problem.kind == "dgrad", R=sides[0], F=sides[1], BR=blocks[0], BF=blocks[1]),
        **dict(H=image[0], W=image[1], HO=size[0], WO=size[1], wk=problem.O * row, wt=pixel),
        **dict(PIXELS=problem.N * prod(size), TILES=tiles, FB=free, BP=config.pixels),
        **steps,
        **geometry(problem),
    }
    return Fixed(fixed), (problem.K * tiles * free,)


@functools.lru_cache(maxsize=4096)
def _correlation(problem: Problem, config: Config) -> tuple[Fixed, tuple[int]]:
    """What wgrad passes that is no tensor, and its grid."""
    (HO, WO), C, O = problem.out_size, problem.C, problem.O
    blocks = cdiv(problem.taps * C, config.block_in), cdiv(O, config.block_out)
    fixed = {
        **dict(ATOMIC=config.atomic, SPLITS=config.splits, RB=blocks[0], OB=blocks[1], C=C, O=O),
        **dict(PIXELS=problem.N * HO * WO, H=problem.H, W=problem.W, HO=HO, WO=WO),
        **dict(ELEMENTS=problem.K * O * problem.taps * C, BP=config.pixels, BR=config.block_in, BO=config.block_out),
        **geometry(problem),
    }
    return Fixed(fixed), (problem.K * config.splits * blocks[0] * blocks[1],)


def _pixels(problem: Problem) -> int:
    return problem.N * (problem.H * problem.W if problem.kind == "dgrad" else prod(problem.out_size))


def _products(problem: Problem, config: Config) -> int:
    """Products of one tile of pixels with one block of weights, over all members."""
    tiles = cdiv(_pixels(problem), config.pixels)
    if problem.kind == "dgrad":
        blocks = cdiv(problem.taps * problem.O, config.block_out) * cdiv(problem.C, config.block_in)
    else:
        blocks = cdiv(problem.taps * problem.C, config.block_in) * cdiv(problem.O, config.block_out)
    return problem.K * tiles * blocks


_NAMES = {name: tuple(name + axis for axis in "knhw") for name in "xyr"}


def _strides(name: str, x: Tensor | None, shared: bool = False) -> dict[str, int]:
    sizes = (0, 0, 0, 0) if x is None else x.stride()[:4]
    return dict(zip(_NAMES[name], (0, *sizes[1:]) if shared else sizes, strict=True))
