"""What the Triton forms of a convolution share: compile-time geometry, and how wgrad shares out its pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..device import interpreted
from ..problem import Config, Problem, cdiv


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
    """`config` with the pixels of wgrad shared out, so that programs are enough; atomic if several share a sum."""
    splits = max(1, min(tiles, cdiv(PROGRAMS, programs)))
    return replace(config, splits=splits, atomic=splits > 1 and not problem.deterministic)
