"""The band form: rows of pixels times a banded matrix of weights, for members of few channels.

In member-major memory a row of pixels is one run of W·C values. A segment of such rows, of many images, is the left
matrix; the weights of one kernel row, repeated along the diagonal, are the right one. With 3 taps and stride 1, pixels
a to f read and A to D written, each entry a C × O block:

        A   B   C   D
    a  w₀                The taps of a kernel row cost no second read, 4 channels load as long runs, and the output
    b  w₁  w₀            leaves as one run. The zeros waste tensor cores that would wait for memory. Stride, dilation
    c  w₂  w₁  w₀        and the backward pass are other bands. Several rows of output side by side in the right matrix
    d      w₂  w₁  w₀    (`Bands.stack`) read each row of input once for all of them, and make stride 2 along the height
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

import functools
import math
from dataclasses import dataclass, field
from math import gcd
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import device
from ..device import Device
from ..launch import Fixed, Launch, around, descriptor, launch, recording
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
from . import band_geometry
from .band_geometry import Bands, bands, row_groups
from .form import KernelForm, Prediction
from .operands import geometry


@functools.cache
def _device_code() -> ModuleType:
    from . import band_kernels  # triton loads with it

    return band_kernels


class Band(KernelForm):
    """Rows of pixels times a banded matrix of weights."""

    name = "band"
    thread_bytes = {80: 144, 100: 200}

    def powers(self, config: Config) -> tuple[int, ...]:
        return *config.tile[:2], config.block_in, config.block_out  # columns end within their block

    def fits(self, problem: Problem, config: Config) -> str | None:
        return band_geometry.why_not(problem, config)

    def configs(self, problem: Problem) -> list[Config]:
        return band_geometry.configs(problem)

    def predict(self, problem: Problem, config: Config, device: Device) -> Prediction:
        if problem.dtype == "float32":
            return Prediction(math.inf, "without tensor cores a band's zeros are not free, and its products spill")
        return super().predict(problem, config, device)

    def programs(self, problem: Problem, config: Config) -> int:
        return band_geometry.programs(problem, config)

    def thread_values(self, problem: Problem, config: Config) -> int:
        return band_geometry.thread_values(problem, config)

    def thread_limit(self, problem: Problem, capability: int) -> int | None:
        if (capability, problem.taps) == (80, 1):  # two programs of 8 warps fit with 128 registers a thread, no more
            return 96
        return self.thread_bytes.get(capability)

    def executed_flops(self, problem: Problem, config: Config) -> int:
        return band_geometry.executed_flops(problem, config)

    def l2_bytes(self, problem: Problem, config: Config) -> int:
        return band_geometry.l2_bytes(problem, config)

    def shared_bytes(self, problem: Problem, config: Config) -> int:
        return band_geometry.shared_bytes(problem, config)

    def step_bytes(self, problem: Problem, config: Config) -> int:
        return band_geometry.stage_bytes(problem, config)

    def thread_sums(self, problem: Problem, config: Config) -> int:
        return band_geometry.thread_sums(problem, config)

    def sum_bytes(self, problem: Problem, config: Config) -> int:
        """The diagonals of the bands: a copy of the weights for each column of each split."""
        weights = problem.K * problem.O * problem.taps * problem.C
        return 4 * config.splits * bands(problem, config).columns * weights

    def launches(self, problem: Problem, config: Config) -> int:
        """Bands are expanded by a launch of their own; those of wgrad are folded, unless they are added up at once."""
        return 1 + (not config.atomic if problem.kind == "wgrad" else bands(problem, config).expand)

    def moments_pieces(self, problem: Problem, config: Config) -> int:
        """A piece for each tile, or each column of its pixels."""
        p = bands(problem, config)
        return p.member_tiles * (1 if p.folded else p.stack * p.columns)

    def sums(self, config: Config) -> int:
        return 1  # it adds up its own

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
        descriptors = device.of(x.device).descriptors
        _convolve(problem, config, x, weight, y, epilogue, prologue, offsets, descriptors)
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
        _convolve(problem, config, dy, weight, dx, PLAIN, None, None, device.of(dy.device).descriptors, epilogue)
        return dx

    def wgrad(
        self, problem: Problem, config: Config, dy: Tensor, x: Tensor, out: Tensor, offsets: Offsets | None = None
    ) -> Tensor:
        """`out` may also hold several partial sums, any divisor of config.splits, of any floating dtype."""
        _correlate(problem, config, dy, x, out, offsets, device.of(x.device).descriptors)
        return out


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
    offsets = Offsets((), meta(K, 2, dtype=torch.int32)) if crops else None
    with recording() as launches:
        if problem.kind == "wgrad":
            out = meta(1 if config.atomic else config.splits, *weight.shape)
            _correlate(problem, config, y, x, out, offsets, descriptors)
        elif problem.kind == "dgrad":
            _convolve(problem, config, y, weight, x, PLAIN, None, None, descriptors)
        else:
            fused = Epilogue(
                bias=meta(K, O, dtype=dtype) if epilogue.get("bias") else None,
                scale=meta(K, O) if epilogue.get("affine") else None,
                shift=meta(K, O) if epilogue.get("affine") else None,
                residual=y if epilogue.get("residual") else None,
                relu=epilogue.get("relu", False),
                moments=meta(K, Band().moments_pieces(problem, config), 3, O) if epilogue.get("moments") else None,
            )
            into = Prologue(meta(K, C), meta(K, C)) if prologue else None
            _convolve(problem, config, x, weight, y, fused, into, offsets, descriptors)
    return launches


def _convolve(
    problem: Problem,
    config: Config,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    epilogue: Epilogue,
    prologue: Prologue | None,
    offsets: Offsets | None,
    descriptors: bool,
    gradient: GradientEpilogue = PLAIN_GRADIENT,
) -> None:
    residual = epilogue.residual
    store = descriptors and _aligned(y) and (residual is None or _aligned(residual))
    run, X = _run_on(problem, config, x, offsets, descriptors, store)
    if run.expanded:
        expanded = weight.new_empty(run.expanded, dtype=x.dtype)
        launch(_device_code().expand_band, run.expand_grid, 4, 1, run.expansion, weight=weight, bands=expanded)
        weight = expanded
    fused = around(epilogue, prologue, gradient)
    if residual is not None:
        fused["residual"] = run.written(residual)
    tensors = dict(X=X, offsets=offsets and offsets.table, weight=weight, Y=run.written(y))
    launch(_device_code().conv_band, run.grid, config.warps, config.stages, run.fixed, **tensors, **fused)


def _correlate(
    problem: Problem,
    config: Config,
    dy: Tensor,
    x: Tensor,
    out: Tensor,
    offsets: Offsets | None,
    descriptors: bool,
) -> None:
    run, X = _run_on(problem, config, x, offsets, descriptors, descriptors and _aligned(dy))
    diagonals = out if config.atomic else out.new_empty(run.diagonals, dtype=torch.float32)
    tensors = dict(X=X, offsets=offsets and offsets.table, G=run.written(dy), out=diagonals)
    launch(_device_code().wgrad_band, run.grid, config.warps, config.stages, run.fixed, **tensors)
    if not config.atomic:
        elements = problem.K * problem.O * problem.taps * problem.C
        grid, fold = _fold(run, problem, config, out.numel() // elements)
        launch(_device_code().fold_band, grid, 4, 2, fold, bands=diagonals, out=out)


@dataclass(frozen=True, eq=False)
class _Run:
    """What the launches of one (problem, config) take that is no tensor, and how descriptors see what they read, write.

    expanded: the shape of bands that are laid out in memory first, by `expand_grid` programs with `expansion`.
    diagonals: the shape of what wgrad sums up. A view: shape, strides and block of a descriptor; None for a pointer.
    """

    bands: Bands
    grid: tuple[int]
    fixed: Fixed
    read_view: tuple[tuple[int, ...], ...] | None
    written_view: tuple[tuple[int, ...], ...] | None
    expanded: tuple[int, ...] = ()
    expand_grid: tuple[int, ...] = ()
    expansion: Fixed = field(default_factory=Fixed)
    diagonals: tuple[int, ...] = ()

    def read(self, x: Tensor) -> Any:
        return x if self.read_view is None else descriptor(x, *self.read_view)

    def written(self, y: Tensor) -> Any:
        return y if self.written_view is None else descriptor(y, *self.written_view)


def _run_on(
    problem: Problem, config: Config, x: Tensor, offsets: Offsets | None, descriptors: bool, store: bool
) -> tuple[_Run, Any]:
    """The run on these tensors, and x as its kernel takes it."""
    shared = None
    if offsets is not None:
        if x.stride()[-2:] != (x.shape[-1], 1):
            x = x.contiguous()  # pixels that are not side by side are no run
        shared = (x.shape[-3], x.shape[-2] * x.shape[-1], *x.stride()[-4:-2])
    run = _run(problem, config, shared, descriptors and _aligned(x), store)
    return run, run.read(x)


@functools.lru_cache(maxsize=4096)
def _run(problem: Problem, config: Config, shared: tuple[int, ...] | None, load: bool, store: bool) -> _Run:
    """shared: of the image that crops are read from, lines and values of a line, and steps from image and line to next.

    load, store: whether descriptors may read, and write, these tensors.
    """
    p = bands(problem, config)
    lines, width, image, pitch = shared or (p.read.height, p.read.values, p.read.height * p.read.values, p.read.values)
    p = bands(problem, config, gcd(width, image, pitch), load and lines % p.period == 0, store)
    read_view = (
        (1 if shared else problem.K, p.problem.N, lines // p.period, p.period, width),
        (p.problem.N * image, image, p.period * pitch, pitch, 1),
        (1, p.images, p.groups, 1, p.block_read),
    )
    taps = geometry(problem)
    fixed = {
        **dict(CROPS=shared is not None, LOAD=p.load),
        **dict(N=p.problem.N, H=p.read.height, VALUES=p.read.values, WIDTH=width // p.vector),
        **dict(IMAGE=image // p.vector, PITCH=pitch // p.vector),
        **dict(HO=p.written.height, VALUES_OUT=p.written.values // p.vector_written),
        **dict(zip(("TN", "TG", "SEGMENTS"), p.tiles, strict=True)),
        **dict(R=p.read.channels, F=p.written.channels, PERIOD=p.period, BEFORE=max(0, -p.rows.start)),
        **dict(FIRST=p.first, ADVANCE=p.advance, COLUMNS=p.columns, RUN=p.run, QF=p.rows.start),
        **dict(BN=p.images, BG=p.groups, BR=p.block_read, VECTOR=p.vector, VECTOR_OUT=p.vector_written),
        **taps,
    }
    views = read_view if p.load else None, _written_view(p) if p.store else None
    if problem.kind == "wgrad":
        rows, shares = row_groups(p, config)
        fixed |= dict(SPLITS=config.splits, SHARES=shares, ROWS=rows, LOAD_OUT=p.store, ATOMIC=config.atomic)
        diagonals = (config.splits, problem.K, problem.kernel[0], p.block_read, p.run)
        return _Run(p, (problem.K * config.splits * shares,), Fixed(fixed), *views, diagonals=diagonals)
    met = dict(QN=len(p.rows), QS=p.rows.step, DGRAD=problem.kind == "dgrad")
    grid = (problem.K * p.member_tiles,)
    written = dict(STACK=p.stack, STORE=p.store, SPLIT=p.split, EXPANDED=p.expand, FOLDED=p.folded)
    whole = Fixed(fixed | met | written)
    if not p.expand:
        return _Run(p, grid, whole, *views)
    rows, block = min(16, p.block_read), p.run * p.stack
    same = {name: fixed[name] for name in ("R", "F", "FIRST", "COLUMNS", "RUN", "BR", "QF")}
    taps.pop("PRECISION")
    expansion = Fixed(BF=block, ROWS=rows, **met, **same, **taps)
    shape = (problem.K, len(p.rows), p.block_read, block)
    return _Run(p, grid, whole, *views, shape, (problem.K * len(p.rows) * p.block_read // rows,), expansion)


@functools.lru_cache(maxsize=4096)
def _fold(run: _Run, problem: Problem, config: Config, parts: int) -> tuple[tuple[int], Fixed]:
    """Grid and arguments of the launch that adds up the diagonals into `parts` partial sums."""
    p, share, (kh, kw) = run.bands, config.splits // parts, problem.kernel
    elements = problem.O * problem.taps * problem.C
    return (parts * problem.K * cdiv(elements, 16),), Fixed(
        **dict(K=problem.K, SHARE=share, KH=kh, KW=kw, C=problem.C, O=problem.O),
        **dict(SW=problem.stride[1], DW=problem.dilation[1], COLUMNS=p.columns),
        **dict(BR=p.block_read, RUN=p.run, ELEMENTS=16, TERMS=min(128, power_of_two(share * p.columns))),
    )


def _aligned(x: Tensor) -> bool:
    """Whether descriptors may start at x."""
    start = x.storage_offset() * x.element_size() if isinstance(x, FakeTensor) else x.data_ptr()
    return start % 16 == 0


def _written_view(p: Bands) -> tuple[tuple[int, ...], ...]:
    """Dense y as (member, image, row, segment, value of it), or with one segment a row where rows clip themselves."""
    values = p.written.values
    image = p.written.height * values
    cut = (p.tiles[2], p.columns * p.written.channels) if p.split else (1, values)
    return (
        (p.problem.K, p.problem.N, p.written.height, *cut),
        (p.problem.N * image, image, values, cut[1], 1),
        (1, p.images, p.groups * p.stack, 1, p.run),
    )
