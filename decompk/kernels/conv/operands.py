"""What convolution kernels take beside x, weight and y, and the tiles they cut the pixels into."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from triton import cdiv

from ..device import interpreted
from ..problem import Config, Epilogue, Problem, Prologue

PLAIN = Epilogue()


def flags(epilogue: Epilogue, prologue: Prologue | None) -> dict[str, Any]:
    """Kernel arguments: the tensors (None where absent, the residual as it is) and a compile-time flag for each."""
    e, p = epilogue, prologue
    return {
        **dict(bias=e.bias, scale=e.scale, shift=e.shift, residual=e.residual, moments=e.moments),
        **dict(BIAS=e.bias is not None, AFFINE=e.scale is not None, RESIDUAL=e.residual is not None),
        **dict(MOMENTS=e.moments is not None, RELU=e.relu),
        **dict(in_scale=p and p.scale, in_shift=p and p.shift, PROLOGUE=p is not None, IN_RELU=bool(p and p.relu)),
    }


def geometry(problem: Problem) -> dict[str, Any]:
    """Kernel arguments that every form takes: kernel, stride, padding, dilation and precision of the dot.

    The interpreter, which has no tensor cores, multiplies tf32 as the float32 that it is.
    """
    pairs = dict(K=problem.kernel, S=problem.stride, P=problem.padding, D=problem.dilation)
    return {
        **{name + axis: pair[i] for name, pair in pairs.items() for i, axis in enumerate("HW")},
        "PRECISION": "tf32" if problem.dtype == "tf32" and not interpreted() else "ieee",
    }


PROGRAMS = 512  # of a wgrad: some waves on 132 processors


def split(problem: Problem, config: Config, programs: int, tiles: int) -> Config:
    """`config` with the pixels of wgrad shared out, so that there are enough programs; atomic if many share a sum."""
    splits = max(1, min(tiles, cdiv(PROGRAMS, programs)))
    return replace(config, splits=splits, atomic=splits > 16 and not problem.deterministic)
