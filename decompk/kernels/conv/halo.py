"""The halo form: 3×3, each input byte read once, in CUDA C++ (csrc/), or in its emulation on CPU tensors.

A tile's input with its one-pixel halo is staged in shared memory and multiplied nine times from there, where the other
forms read it again for every tap. One tile computes all of a member's output channels, so x is read once.
"""

from __future__ import annotations

import itertools
from math import prod

import torch
from torch import Tensor

from .. import device as devices
from .. import extension
from ..problem import PLAIN, Config, Epilogue, Offsets, Problem, Prologue, cdiv, power_of_two
from .form import KernelForm

ROWS, LANES = 4, 16  # output pixels of a warp: rows, and columns times images
STAGES = 2
WARP_CHANNELS = 32  # output channels of a warp at most
DEVICE_BYTES = [pick(d.shared_bytes for d in devices.KNOWN.values()) for pick in (min, max)]


class Halo(KernelForm):
    """3×3, each input byte read once, in CUDA C++; backend "emulation" is the same on CPU tensors."""

    name = "halo"
    one_image = False
    gradient_epilogue = False

    def __init__(self, backend: str):
        self.backend = backend
        self.devices = ("cuda",) if backend == "cuda" else ()

    def missing(self) -> str | None:
        return extension.why_not(self.backend)

    def fits(self, problem: Problem, config: Config) -> str | None:
        """Why the halo form cannot run `problem` with `config`; None if it can."""
        p = problem
        if p.kind == "wgrad":
            return "the halo kernel computes no weight gradient"
        if p.dtype not in ("bfloat16", "float16"):
            return "the halo kernel computes in bfloat16 and float16"
        if p.kernel != (3, 3) or p.dilation != (1, 1) or p.stride not in ((1, 1), (2, 2)) or max(p.padding) > 2:
            return "the halo kernel is 3×3, not dilated, of stride 1 or 2 and padding 0 to 2"
        if p.kind == "dgrad" and p.stride != (1, 1):
            return "the halo kernel computes input gradients of stride 1"
        if p.layout == "crops":
            return "the halo kernel reads no crops"
        if max(p.C, p.O) > 64:
            return "the halo kernel has 64 channels a member at most"
        if p.K > 65535:
            return "the halo kernel has 65535 members at most"
        if (config.block_in, config.block_out) != blocks(p.C, p.O):
            return f"the halo kernel of {p.C} → {p.O} channels has blocks {blocks(p.C, p.O)}"
        images, rows, columns = config.tile
        if columns not in (4, 8, LANES) or rows < ROWS or images * columns < LANES:
            return f"a halo tile has {ROWS} or more rows, and 4, 8 or 16 columns of 4, 2 or 1 or more images"
        parts = cdiv(_free(p, config), WARP_CHANNELS)
        if config.pixels * parts != config.warps * ROWS * LANES or config.warps > 4 * parts:
            most = 4 * parts
            return (
                f"{config.warps} warps do not share {config.pixels} pixels by {ROWS * LANES}, or are more than {most}"
            )
        if config.stages != STAGES:
            return f"the halo kernel has {STAGES} stages"
        return None

    def configs(self, problem: Problem) -> list[Config]:
        """Candidates from shapes alone: large and small tiles that load least, and one that fits the smallest device.

        For a problem that this form does not compute at least one, of which `why_not` says why.
        """
        block_in, block_out = blocks(problem.C, problem.O)
        parts = cdiv(block_out if problem.kind == "fprop" else block_in, WARP_CHANNELS)

        def of(strips: int) -> list[Config]:
            tiles = [
                (LANES // columns * strips // rows, ROWS * rows, columns)
                for rows, columns in itertools.product((4, 2, 1), (16, 8, 4))
                if rows <= strips
            ]
            found = [Config("halo", tile, block_in, block_out, strips * parts, STAGES) for tile in tiles]
            return sorted(found, key=lambda c: _loaded_pixels(problem, c) * _tiles(problem, c))

        small, large = (
            [[c for c in of(n) if self.shared_bytes(problem, c) <= b] for n in (4, 2, 1)] for b in DEVICE_BYTES
        )
        fitting = next((found[:1] for found in small if found), [])
        return list(dict.fromkeys((*large[0][:2], *large[1][:2], *fitting))) or of(1)[:1]

    def programs(self, problem: Problem, config: Config) -> int:
        return problem.K * _tiles(problem, config)

    def thread_values(self, problem: Problem, config: Config) -> int:
        """Values that a thread adds up or loads in one step."""
        return self.thread_sums(problem, config) + 24

    def thread_sums(self, problem: Problem, config: Config) -> int:
        return ROWS * LANES * min(_free(problem, config), WARP_CHANNELS) // 32

    def executed_flops(self, problem: Problem, config: Config) -> int:
        """What the matrix products compute, padding of tiles and blocks included."""
        return 2 * self.programs(problem, config) * config.pixels * 9 * config.block_in * config.block_out

    def l2_bytes(self, problem: Problem, config: Config) -> int:
        """What tiles load: their input with its halo, once. Weights stay with a CTA, and few CTAs are resident."""
        reduced = problem.C if problem.kind == "fprop" else problem.O
        return self.programs(problem, config) * _loaded_pixels(problem, config) * reduced * problem.element_size

    def step_bytes(self, problem: Problem, config: Config) -> int:
        """A tile's input: the next tile's is loaded while it is multiplied."""
        reduced = problem.C if problem.kind == "fprop" else problem.O
        return _loaded_pixels(problem, config) * reduced * problem.element_size

    def launches(self, problem: Problem, config: Config) -> int:
        """In dgrad the weights are flipped first, and copied."""
        return 3 if problem.kind == "dgrad" else 1

    def shared_bytes(self, problem: Problem, config: Config) -> int:
        """An upper bound: the stages, the weights, the staged output and the moments of the warps."""
        images, rows, columns = config.tile
        stride = problem.stride[0]
        reduced = config.block_in if problem.kind == "fprop" else config.block_out
        row = stride * LANES // columns * (columns + 2)  # in memory, even and odd columns apart
        stage = images * columns // LANES * ((rows - 1) * stride + 3) * row * reduced * 2
        weights = 9 * config.block_in * config.block_out * 2
        free = _free(problem, config)
        moments = config.pixels // (ROWS * LANES) * 3 * free * 4
        return STAGES * (stage + 128) + weights + config.pixels * free * 2 + moments + 128

    def moments_pieces(self, problem: Problem, config: Config) -> int:
        """S of Epilogue.moments: one piece a tile of a member."""
        return _tiles(problem, config)

    def rate(self, problem: Problem, config: Config, device: devices.Device) -> float:
        """The part of the device's matrix rate that mma.sync reaches with the warps a processor holds; not measured.

        From sm_90 on only instructions that this kernel does not use reach the full rate; 8 warps keep the cores busy.
        """
        ctas = max(1, device.shared_bytes // self.shared_bytes(problem, config))
        return min(1.0, ctas * config.warps / 8) * (0.6 if device.capability >= 90 else 1.0)

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
        _run(x, weight, y, problem.stride[0], problem.padding, config, epilogue, prologue)
        return y

    def dgrad(self, problem: Problem, config: Config, dy: Tensor, weight: Tensor, dx: Tensor) -> Tensor:
        """The convolution of dy with the flipped weights, their input and output channels exchanged."""
        flipped = weight.permute(0, 4, 2, 3, 1).flip((2, 3)).contiguous()
        padding = tuple(2 - p for p in problem.padding)
        _run(dy, flipped, dx, 1, padding, config, PLAIN, None)
        return dx

    def wgrad(
        self, problem: Problem, config: Config, dy: Tensor, x: Tensor, out: Tensor, offsets: Offsets | None = None
    ) -> Tensor:
        """Not of this form: `why_not` says so."""
        raise NotImplementedError("the halo kernel computes no weight gradient")


def blocks(C: int, O: int) -> tuple[int, int]:
    """(block_in, block_out) of C → O channels a member, as the kernels are built: at most a factor of two apart."""
    return power_of_two(max(C, cdiv(O, 2)), 8), power_of_two(max(O, cdiv(C, 2)), 8)


def _run(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    stride: int,
    padding: tuple[int, ...],
    config: Config,
    epilogue: Epilogue,
    prologue: Prologue | None,
) -> None:
    extension.load("cuda" if x.device.type == "cuda" else "emulation", x.device)
    e, p = epilogue, prologue
    bias = e.bias
    if bias is not None and bias.dtype not in (torch.float32, x.dtype):
        bias = bias.float()
    weight = weight.to(x.dtype) if weight.dtype is torch.float32 else weight
    torch.ops.decompk.halo_conv2d(
        *(x, weight, y, bias, e.scale, e.shift, e.residual, e.relu, e.moments),
        *((p.scale, p.shift, p.relu) if p else (None, None, False)),
        *(stride, *padding, config.tile, config.warps),
    )


def _free(problem: Problem, config: Config) -> int:
    """Channels of a tile's output, padded."""
    return config.block_out if problem.kind == "fprop" else config.block_in


def _tiles(problem: Problem, config: Config) -> int:
    """Pixel tiles of one member: of y, or in dgrad of x."""
    size = problem.out_size if problem.kind == "fprop" else (problem.H, problem.W)
    return prod(map(cdiv, (problem.N, *size), config.tile))


def _loaded_pixels(problem: Problem, config: Config) -> int:
    """Input pixels of a tile, halo included."""
    images, *tile = config.tile
    return images * prod((size - 1) * s + 3 for size, s in zip(tile, problem.stride, strict=True))
