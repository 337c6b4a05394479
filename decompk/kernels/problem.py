"""Problem and Config: what a grouped convolution has to compute, and how a Triton kernel computes it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, prod

import torch
from torch import Tensor

Pair = tuple[int, int]
Geometry = tuple[Pair, Pair, Pair]  # stride, padding, dilation

PASSES = ("fprop", "dgrad", "wgrad")
LAYOUTS = ("member", "channel-grouped", "strided", "crops")
DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4, "tf32": 4}  # bytes; tf32 is float32 on tensor cores


@dataclass(frozen=True)
class Problem:
    """One pass of K convolutions (N, C, H, W) → (N, O, H', W').

    `layout` is that of the activations: "member" (all of a member's images in a row, NHWC), "channel-grouped" (members
    side by side in the channels of one NHWC image), "crops" (members read windows of one shared NHWC image; H, W are
    the crop's), "strided" (anything else whose channels are contiguous). `aligned`: every base address, and every
    stride but the channels', is a multiple of 16 bytes, as tensor descriptors need. `deterministic`: sums must not
    depend on the order in which programs run. `fused`: what the caller wants summed up of the result while it is
    written, "moments" of y (fprop), or "sums" of dx and dx · x̂ for a batch norm (dgrad); it decides the price alone.
    """

    kind: str
    dtype: str
    K: int
    N: int
    C: int
    O: int  # noqa: E741 (the field's own name for output channels)
    H: int
    W: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    layout: str = "member"
    aligned: bool = True
    deterministic: bool = False
    fused: str = ""

    @functools.cached_property
    def out_size(self) -> tuple[int, int]:
        """(H', W')."""

        def along(axis: int, size: int) -> int:
            k, s, p, d = (pair[axis] for pair in (self.kernel, self.stride, self.padding, self.dilation))
            return (size + 2 * p - d * (k - 1) - 1) // s + 1

        return along(0, self.H), along(1, self.W)

    @functools.cached_property
    def taps(self) -> int:
        return prod(self.kernel)

    @property
    def element_size(self) -> int:
        return DTYPES[self.dtype]

    @property
    def pointwise(self) -> bool:
        """Whether every output pixel reads the input pixel at its own place alone."""
        return self.taps == 1 and self.stride == (1, 1) and self.padding == (0, 0)

    def one_image(self) -> Problem:
        """A pointwise problem as one image of all pixels, 8 a row or fewer: tiles stay full. Others as they are."""
        if not self.pointwise or self.layout == "crops" or not self.N:
            return self
        pixels = self.N * self.H * self.W
        width = gcd(pixels, 8)
        return replace(self, N=1, H=pixels // width, W=width)

    def of(self, kind: str) -> Problem:
        """The same convolution in another pass, with nothing fused."""
        return replace(self, kind=kind, fused="")


def key_of(problem: Problem) -> str:
    """A Problem as the name of a table's entry, whatever is fused."""
    p = problem
    pairs = "_".join(f"{name}{a}x{b}" for name, (a, b) in zip("ksp", (p.kernel, p.stride, p.padding), strict=True))
    flags = ("" if p.aligned else "_unaligned") + ("_deterministic" if p.deterministic else "")
    return (
        f"{p.kind}_{p.dtype}_{p.layout}_K{p.K}_N{p.N}_C{p.C}_O{p.O}_{p.H}x{p.W}_{pairs}_"
        f"d{p.dilation[0]}x{p.dilation[1]}{flags}"
    )


@dataclass(frozen=True)
class Config:
    """How one Triton kernel runs a Problem.

    `form`: the name of the form that it is for, in `kernels.conv.FORMS`. `tile`: images, rows and columns of output
    pixels of one program (in dgrad input pixels, per parity; in wgrad the pixels of one step). `block_in`, `block_out`:
    input and output channels of one block, powers of two; in the band form, values of a row segment. `splits`: programs
    that share the pixels of one block of wgrad. `atomic`: they add into one result, which is not deterministic.
    """

    form: str
    tile: tuple[int, int, int]
    block_in: int
    block_out: int
    warps: int = 4
    stages: int = 3
    splits: int = 1
    atomic: bool = False

    @property
    def pixels(self) -> int:
        return prod(self.tile)


@dataclass(frozen=True)
class Prologue:
    """On the input: relu(x · scale + shift), scale and shift (K, C) float32; padding stays zero."""

    scale: Tensor
    shift: Tensor
    relu: bool = True


@dataclass(frozen=True)
class Epilogue:
    """On the output, in this order: + bias, moments of that, · scale + shift, + residual, relu.

    bias (K, O) of any floating dtype; scale and shift (K, O) float32, both or neither; residual as y; moments
    (K, S, 3, O) float32 is written: count, mean and Σ(y − mean)² of S disjoint pieces of the pixels.
    """

    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False
    moments: Tensor | None = None


PLAIN = Epilogue()


@dataclass(frozen=True)
class GradientEpilogue:
    """On dx, in this order: + added, · [ReLU let pass], sums: what the batch norm that x came out of asks for.

    added as x: what reaches x by other ways. raw as x: what that norm normalised, by mean, rstd, gamma and beta (K, C)
    (gamma and beta of any floating dtype, or None). gated: whether a ReLU followed it; joined is then x itself where a
    residual was added before, else None: raw tells as much. sums (K, S, 2, C) float32 is written: Σg and Σg·x̂ of S
    disjoint pieces of the pixels, g being the result as it is stored.
    """

    added: Tensor | None = None
    raw: Tensor | None = None
    joined: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    gated: bool = False
    sums: Tensor | None = None


PLAIN_GRADIENT = GradientEpilogue()


@dataclass(frozen=True, eq=False)
class Offsets:
    """Where the members' crops begin in the image that they share: (top, left) of each, and (K, 2) on the device."""

    starts: tuple[tuple[int, int], ...]
    table: Tensor

    @classmethod
    def of(cls, starts: Sequence[Sequence[int]], device: torch.device) -> Offsets:
        return cls(tuple((top, left) for top, left in starts), torch.tensor(starts, dtype=torch.int32, device=device))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


@functools.lru_cache
def dtype_name(dtype: torch.dtype, tf32: bool = False) -> str:
    """The name of a torch dtype in Problem.dtype."""
    return "tf32" if tf32 and dtype == torch.float32 else str(dtype).removeprefix("torch.")
