"""The band form: rows of pixels times a banded matrix of weights, for members of few channels.

In member-major memory a row of pixels is one run of W·C values. A segment of such rows, of many images, is the left
matrix; the weights of one kernel row, repeated along the diagonal, are the right one. With 3 taps and stride 1, pixels
a to f read and A to D written, each entry a C × O block:

        A   B   C   D
    a  w₀                The taps of a kernel row cost no second read, 4 channels load as long runs, and the output
    b  w₁  w₀            leaves as one run. The zeros waste tensor cores that would wait for memory. Stride, dilation
    c  w₂  w₁  w₀        and the backward pass are other bands. Several rows of output side by side in the right matrix
    d      w₂  w₁  w₀    (`Plan.stack`) read each row of input once for all of them, and make stride 2 along the height
    e          w₂  w₁    a band too. Rows and pixels outside the image arrive as zeros.
    f              w₂

wgrad is the transposed left matrix times dy: one band for each kernel row, whose diagonals are added up.

The band is gathered from the weights inside the kernel, since a launch that expands it would take as long as many of
these layers; where that gathers too much, it is expanded. Descriptors read at multiples of 16 bytes only, so a segment
starts up to 15 bytes before its first pixel. Rows that are no multiple of 16 bytes go through pointers.

In a Config `tile` is images, rows and columns of written pixels, and the blocks are values: the one that is read holds
a segment with its margins, the one that is written `stack` rows of columns · channels, padded to a power of two.

Zeros of a band turn NaN to NaN: one spreads to the pixels of its tile, in its own member, and never to another member.
Nothing outside a crop is multiplied.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import device
from ..launch import Launch, launch, recording
from ..problem import Config, Epilogue, Problem, Prologue, power_of_two
from .band_geometry import (
    Plan,
    configs,
    executed_flops,
    l2_bytes,
    plan,
    programs,
    row_groups,
    shared_bytes,
    thread_values,
    why_not,
)
from .band_kernels import conv_band, expand_band, fold_band, wgrad_band
from .operands import PLAIN, flags, geometry

__all__ = [
    "configs", "dgrad", "executed_flops", "fprop", "l2_bytes", "moments_pieces", "programs", "shared_bytes",
    "specialisations", "thread_values", "wgrad", "why_not",
]  # fmt: skip


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
    """y = epilogue(conv(prologue(x), weight)): x (K, N, H, W, C), weight (K, O, kh, kw, C), y (K, N, H', W', O), dense.

    With `offsets` (K, 2), the tops and lefts of crops, x is the shared image (1, N, H_image, W_image, C).
    """
    _convolve(x, weight, y, problem, config, epilogue, prologue, offsets, device.of(x.device).descriptors)


def dgrad(dy: Tensor, weight: Tensor, dx: Tensor, problem: Problem, config: Config) -> None:
    """dx (K, N, H, W, C) from dy (K, N, H', W', O) and weight (K, O, kh, kw, C), all dense."""
    _convolve(dy, weight, dx, problem, config, PLAIN, None, None, device.of(dy.device).descriptors)


def wgrad(dy: Tensor, x: Tensor, out: Tensor, problem: Problem, config: Config, offsets: Tensor | None = None) -> None:
    """dw from dy (K, N, H', W', O) and x as in `fprop`.

    `out` is (splits, K, O, kh, kw, C), or with fewer parts any divisor of config.splits, of any floating dtype: partial
    sums. With config.atomic it is one zeroed float32 (1, K, …), which is added to.
    """
    _correlate(dy, x, out, problem, config, offsets, device.of(x.device).descriptors)


def moments_pieces(problem: Problem, config: Config) -> int:
    """S of Epilogue.moments: a piece for each column of pixels of each tile."""
    p = plan(problem, config)
    return p.member_tiles * p.stack * p.columns


def specialisations(
    problem: Problem,
    config: Config,
    descriptors: bool = True,
    prologue: bool = False,
    image: tuple[int, int] | None = None,
    **epilogue: bool,
) -> list[Launch]:
    """The launches of `config` for `problem`, recorded on tensors without memory: what there is to compile.

    `descriptors`: as Device.descriptors. `image`: height and width of what crops are cut from (their own by default).
    `epilogue`: bias=, affine=, residual=, moments= and relu=True for what is fused.
    """
    dtype = torch.float32 if problem.dtype == "tf32" else getattr(torch, problem.dtype)

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    K, C, O = problem.K, problem.C, problem.O
    crops = problem.layout == "crops"
    size = (image or (problem.H, problem.W)) if crops else (problem.H, problem.W)
    x = meta(1 if crops else K, problem.N, *size, C, dtype=dtype)
    y = meta(K, problem.N, *problem.out_size, O, dtype=dtype)
    weight = meta(K, O, *problem.kernel, C, dtype=dtype)
    offsets = meta(K, 2, dtype=torch.int32) if crops else None
    with recording() as launches:
        if problem.kind == "wgrad":
            out = meta(1 if config.atomic else config.splits, *weight.shape)
            _correlate(y, x, out, problem, config, offsets, descriptors)
        elif problem.kind == "dgrad":
            _convolve(y, weight, x, problem, config, PLAIN, None, None, descriptors)
        else:
            fused = Epilogue(
                bias=meta(K, O, dtype=dtype) if epilogue.get("bias") else None,
                scale=meta(K, O) if epilogue.get("affine") else None,
                shift=meta(K, O) if epilogue.get("affine") else None,
                residual=y if epilogue.get("residual") else None,
                relu=epilogue.get("relu", False),
                moments=meta(K, moments_pieces(problem, config), 3, O) if epilogue.get("moments") else None,
            )
            into = Prologue(meta(K, C), meta(K, C)) if prologue else None
            _convolve(x, weight, y, problem, config, fused, into, offsets, descriptors)
    return launches


def _convolve(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    problem: Problem,
    config: Config,
    epilogue: Epilogue,
    prologue: Prologue | None,
    offsets: Tensor | None,
    descriptors: bool,
) -> None:
    stored = [y] if epilogue.residual is None else [y, epilogue.residual]
    p, reads = _reads(x, problem, config, offsets, descriptors, descriptors and all(map(_aligned, stored)))
    residual = None if epilogue.residual is None else _written(epilogue.residual, p)
    bands = dict(QF=p.rows.start, QN=len(p.rows), QS=p.rows.step, DGRAD=problem.kind == "dgrad")
    around = geometry(problem)
    if p.expand:
        block, rows = p.run * p.stack, min(16, p.block_read)
        expanded = weight.new_empty((problem.K, len(p.rows), p.block_read, block))
        same = {name: reads[name] for name in ("R", "F", "FIRST", "COLUMNS", "RUN", "BR")}
        taps = {name: value for name, value in around.items() if name != "PRECISION"}
        grid = (problem.K * len(p.rows) * p.block_read // rows,)
        launch(expand_band, grid, 4, 1, weight=weight, bands=expanded, BF=block, ROWS=rows, **bands, **same, **taps)
        weight = expanded
    launch(
        conv_band,
        (problem.K * p.member_tiles,),
        config.warps,
        config.stages,
        weight=weight,
        Y=_written(y, p),
        **reads,
        **bands,
        **dict(STACK=p.stack, STORE=p.store, SPLIT=p.split, EXPANDED=p.expand),
        **flags(epilogue, prologue) | dict(residual=residual),
        **around,
    )


def _correlate(
    dy: Tensor, x: Tensor, out: Tensor, problem: Problem, config: Config, offsets: Tensor | None, descriptors: bool
) -> None:
    p, reads = _reads(x, problem, config, offsets, descriptors, descriptors and _aligned(dy))
    rows, shares = row_groups(p, config)
    kh, kw = problem.kernel
    bands = out
    if not config.atomic:
        shape = (config.splits, problem.K, kh, p.block_read, p.run)
        bands = torch.empty(shape, dtype=torch.float32, device=out.device)
    launch(
        wgrad_band,
        (problem.K * config.splits * shares,),
        config.warps,
        config.stages,
        G=_written(dy, p),
        out=bands,
        **reads,
        **dict(SPLITS=config.splits, SHARES=shares, ROWS=rows, LOAD_OUT=p.store, ATOMIC=config.atomic),
        **dict(QF=p.rows.start),
        **geometry(problem),
    )
    if config.atomic:
        return
    elements = problem.O * problem.taps * problem.C
    parts = out.numel() // (problem.K * elements)
    share = config.splits // parts
    launch(
        fold_band,
        (parts * problem.K * cdiv(elements, 16),),
        4,
        2,
        bands=bands,
        out=out,
        **dict(K=problem.K, SHARE=share, KH=kh, KW=kw, C=problem.C, O=problem.O),
        **dict(SW=problem.stride[1], DW=problem.dilation[1], COLUMNS=p.columns),
        **dict(BR=p.block_read, RUN=p.run, ELEMENTS=16, TERMS=min(128, power_of_two(share * p.columns))),
    )


def _reads(
    x: Tensor, problem: Problem, config: Config, offsets: Tensor | None, descriptors: bool, store: bool
) -> tuple[Plan, dict[str, Any]]:
    """The Plan for these tensors, and the kernel arguments of the side that is read and of the cut into tiles."""
    crops = offsets is not None
    if crops and x.stride()[-2:] != (x.shape[-1], 1):
        x = x.contiguous()  # pixels that are not side by side are no run
    p = plan(problem, config)
    lines, width = (x.shape[-3], x.shape[-2] * x.shape[-1]) if crops else (p.read.height, p.read.values)
    image, pitch = x.stride()[-4:-2] if crops else (lines * width, width)
    load = descriptors and _aligned(x) and lines % p.period == 0
    p = plan(problem, config, gcd(width, image, pitch), load, store)
    members = 1 if crops else problem.K
    view = (
        TensorDescriptor(
            x,
            [members, p.problem.N, lines // p.period, p.period, width],
            [p.problem.N * image, image, p.period * pitch, pitch, 1],
            [1, p.images, p.groups, 1, p.block_read],
        )
        if p.load
        else x
    )
    return p, {
        **dict(X=view, offsets=offsets, CROPS=crops, LOAD=p.load),
        **dict(N=p.problem.N, H=p.read.height, VALUES=p.read.values, WIDTH=width // p.vector),
        **dict(IMAGE=image // p.vector, PITCH=pitch // p.vector),
        **dict(HO=p.written.height, VALUES_OUT=p.written.values // p.vector_written),
        **dict(zip(("TN", "TG", "SEGMENTS"), p.tiles, strict=True)),
        **dict(R=p.read.channels, F=p.written.channels, PERIOD=p.period, BEFORE=max(0, -p.rows.start)),
        **dict(FIRST=p.first, ADVANCE=p.advance, COLUMNS=p.columns, RUN=p.run),
        **dict(BN=p.images, BG=p.groups, BR=p.block_read, VECTOR=p.vector, VECTOR_OUT=p.vector_written),
    }


def _aligned(x: Tensor) -> bool:
    """Whether descriptors may start at x."""
    start = x.storage_offset() * x.element_size() if isinstance(x, FakeTensor) else x.data_ptr()
    return start % 16 == 0


def _written(y: Tensor, p: Plan) -> Tensor | TensorDescriptor:
    """Dense y as (member, image, row, segment, value of it), or with one segment a row where rows clip themselves."""
    if not p.store:
        return y
    values = p.written.values
    image = p.written.height * values
    cut = (p.tiles[2], p.columns * p.written.channels) if p.split else (1, values)
    return TensorDescriptor(
        y,
        [p.problem.K, p.problem.N, p.written.height, *cut],
        [p.problem.N * image, image, values, cut[1], 1],
        [1, p.images, p.groups * p.stack, 1, p.run],
    )
