"""The pointer form: an implicit matrix product on masked loads, for everything that descriptors cannot address.

Any strides, any number of channels, any alignment, strides and dilations above 2, and crops: members that read windows
of one shared image through a table of offsets. Taps and channels are one reduced dimension, so that 3 channels of a 7×7
kernel fill a block. Addresses are computed element by element: right everywhere, fast nowhere.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor
from triton import cdiv

from ..launch import launch
from ..problem import Config, Epilogue, Problem, Prologue, power_of_two
from .operands import PLAIN, flags, geometry, split
from .pointer_kernels import conv_pointer, wgrad_pointer


def why_not(problem: Problem, config: Config) -> str | None:
    """Why the pointer form cannot run `problem` with `config`; None if it can."""
    if problem.layout == "crops" and problem.kind == "dgrad":
        return "overlapping crops would write the same pixels"
    if min(config.block_in, config.block_out, config.pixels) < 16:
        return "blocks below 16 have no matrix product"
    if problem.N * max(problem.H * problem.W, prod(problem.out_size)) >= 2**31:
        return "a member has 2³¹ pixels or more"
    return None


def configs(problem: Problem) -> list[Config]:
    """Candidates from shapes alone, best guess first."""
    reduced, free = (problem.C, problem.O) if problem.kind != "dgrad" else (problem.O, problem.C)
    blocks = power_of_two(min(problem.taps * reduced, 32), 16), power_of_two(min(free, 32), 16)
    if problem.kind == "dgrad":
        blocks = blocks[::-1]
    # Addresses fill the registers: of larger blocks, or of 64 pixels in two stages, some spill on some architecture;
    # of tf32's, which are rounded in registers, 32 pixels in two stages do.
    found = [Config("pointer", (1, 1, 32), *blocks, stages=1 if problem.dtype == "tf32" else 2)]
    if problem.element_size == 2:
        found.insert(0, Config("pointer", (1, 1, 64), *blocks, stages=1))
    if problem.kind == "wgrad":
        found = [split(problem, c, programs(problem, c), moments_pieces(problem, c)) for c in found]
    return found


def programs(problem: Problem, config: Config) -> int:
    if problem.kind == "wgrad":
        blocks = cdiv(problem.taps * problem.C, config.block_in) * cdiv(problem.O, config.block_out)
        return problem.K * blocks * config.splits
    free = cdiv(problem.O, config.block_out) if problem.kind == "fprop" else cdiv(problem.C, config.block_in)
    return problem.K * cdiv(_pixels(problem), config.pixels) * free


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


def executed_flops(problem: Problem, config: Config) -> int:
    """What the matrix products compute, padding of tiles and blocks included."""
    return 2 * _products(problem, config) * config.pixels * config.block_in * config.block_out


def l2_bytes(problem: Problem, config: Config) -> int:
    """What programs load: both operands of every product, value by value."""
    reduced, free = config.block_in, config.block_out
    if problem.kind == "dgrad":
        reduced, free = free, reduced
    other = config.pixels if problem.kind == "wgrad" else reduced
    return _products(problem, config) * (config.pixels * reduced + other * free) * problem.element_size


def shared_bytes(problem: Problem, config: Config) -> int:
    """An upper bound: the operands of each stage and a staged result."""
    pixels, a, b = config.pixels, config.block_in, config.block_out
    return config.stages * (pixels * (a + b) + a * b) * problem.element_size + pixels * max(a, b) * 4


def fprop(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    problem: Problem,
    config: Config,
    epilogue: Epilogue = PLAIN,
    prologue: Prologue | None = None,
    offsets: Tensor | None = None,
) -> None:
    """y = epilogue(conv(prologue(x), weight)): x (K, N, H, W, C), weight (K, O, kh, kw, C), y (K, N, H', W', O).

    With `offsets` (K, 2), the tops and lefts of crops, x is the shared image (1, N, H_image, W_image, C).
    """
    HO, WO = problem.out_size
    wk, wf, _, wt, _ = weight.stride()
    _run(
        x, weight, y, problem, config, epilogue, prologue, offsets,
        BACKWARD=False, R=problem.C, F=problem.O, H=problem.H, W=problem.W, HO=HO, WO=WO,
        BR=config.block_in, BF=config.block_out, wk=wk, wf=wf, wt=wt, wr=1,
    )  # fmt: skip


def dgrad(dy: Tensor, weight: Tensor, dx: Tensor, problem: Problem, config: Config) -> None:
    """dx (K, N, H, W, C) from dy (K, N, H', W', O) and weight (K, O, kh, kw, C)."""
    H, W = problem.out_size
    wk, wr, _, wt, _ = weight.stride()
    _run(
        dy, weight, dx, problem, config, PLAIN, None, None,
        BACKWARD=True, R=problem.O, F=problem.C, H=H, W=W, HO=problem.H, WO=problem.W,
        BR=config.block_out, BF=config.block_in, wk=wk, wf=1, wt=wt, wr=wr,
    )  # fmt: skip


def wgrad(dy: Tensor, x: Tensor, out: Tensor, problem: Problem, config: Config, offsets: Tensor | None = None) -> None:
    """dw in float32 from dy (K, N, H', W', O) and x as in `fprop`.

    `out` is (splits, K, O, kh, kw, C), of which every split is written; or with config.atomic one zeroed (1, K, …).
    """
    HO, WO = problem.out_size
    blocks = cdiv(problem.taps * problem.C, config.block_in), cdiv(problem.O, config.block_out)
    launch(
        wgrad_pointer,
        (problem.K * config.splits * blocks[0] * blocks[1],),
        config.warps,
        config.stages,
        **dict(x=x, offsets=offsets, dy=dy, out=out, CROPS=offsets is not None, ATOMIC=config.atomic),
        **dict(PIXELS=problem.N * HO * WO, SPLITS=config.splits, RB=blocks[0], OB=blocks[1]),
        **dict(C=problem.C, O=problem.O, H=problem.H, W=problem.W, HO=HO, WO=WO, ELEMENTS=out[0].numel()),
        **_strides("x", x, offsets is not None),
        **_strides("y", dy),
        **dict(BP=config.pixels, BR=config.block_in, BO=config.block_out),
        **geometry(problem),
    )


def moments_pieces(problem: Problem, config: Config) -> int:
    """S of Epilogue.moments: one piece a tile of a member's pixels."""
    HO, WO = problem.out_size
    return cdiv(problem.N * HO * WO, config.pixels)


def _strides(name: str, x: Tensor | None, shared: bool = False) -> dict[str, int]:
    sizes = (0,) * 4 if x is None else x.stride()[:4]
    return dict(zip((name + axis for axis in "knhw"), (0, *sizes[1:]) if shared else sizes, strict=True))


def _run(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    problem: Problem,
    config: Config,
    epilogue: Epilogue,
    prologue: Prologue | None,
    offsets: Tensor | None,
    **sizes: Any,
) -> None:
    pixels = problem.N * sizes["HO"] * sizes["WO"]
    tiles, blocks = cdiv(pixels, config.pixels), cdiv(sizes["F"], sizes["BF"])
    launch(
        conv_pointer,
        (problem.K * tiles * blocks,),
        config.warps,
        config.stages,
        **dict(x=x, offsets=offsets, weight=weight, y=y, CROPS=offsets is not None),
        **dict(PIXELS=pixels, TILES=tiles, FB=blocks, BP=config.pixels),
        **sizes,
        **_strides("x", x, offsets is not None),
        **_strides("y", y),
        **_strides("r", epilogue.residual),
        **flags(epilogue, prologue),
        **geometry(problem),
    )
