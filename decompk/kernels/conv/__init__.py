"""Grouped convolution: three forms in Triton and one in CUDA C++ behind one interface, and the one legality predicate.

Tensors are NHWC: x (K, N, H, W, C), weight dense (K, O, kh, kw, C), y (K, N, H', W', O); see `ops.layout`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError
from ..device import Device
from ..launch import GRID_LIMIT
from ..problem import Config, Epilogue, Problem, Prologue
from . import band, halo, pointer, tile
from .operands import PLAIN

# Bytes of what a thread adds up or loads in a step, limits found by compiling: on sm_80 their addresses take registers;
# on sm_100, where sums live in tensor memory, the assembler plans for more programs than shared memory holds.
THREAD_BYTES = {80: {"tile": 128, "band": 144}, 90: {}, 100: {"tile": 176}}

FORMS = {"tile": tile, "band": band, "pointer": pointer, "halo": halo}


def why_not(problem: Problem, config: Config, device: Device) -> str | None:
    """Why `config` may not run `problem` on `device`; None if it may. Asked by heuristic, tuner, tables and tests."""
    if config.form not in FORMS:
        return f"there is no form '{config.form}'"
    columns = config.tile[2:] if config.form != "band" else ()  # a band's columns end within its block
    blocks = (*config.tile[:2], *columns, config.block_in, config.block_out)
    if any(b < 1 or b & (b - 1) for b in blocks):
        return f"blocks {blocks} are not powers of two"
    if config.splits < 1 or (config.splits > 1 and problem.kind != "wgrad"):
        return "only wgrad is split"
    if config.atomic and (problem.deterministic or problem.kind != "wgrad"):
        return "atomic sums are for wgrad, where order may vary"
    form = FORMS[config.form]
    if reason := form.why_not(problem, config):
        return reason
    if config.form != "pointer" and problem.element_size == 4 and not device.descriptors:
        return "without a copy engine the addresses of 4-byte tiles spill"
    limit = THREAD_BYTES[max(c for c in THREAD_BYTES if c <= max(80, device.capability))].get(config.form)
    if limit and form.thread_values(problem, config) * problem.element_size > limit:
        return f"more than {limit} bytes of sums and operands a thread spill on sm_{device.capability}"
    if form.programs(problem, config) > GRID_LIMIT:
        return f"more than {GRID_LIMIT} programs"
    shared = form.shared_bytes(problem, config)
    if shared > device.shared_bytes:
        return f"{shared} bytes of shared memory are over {device.name}'s {device.shared_bytes}"
    return None


def _form(config: Config) -> Any:
    if config.form not in FORMS:
        raise BackendError(f"there is no form '{config.form}': choose one of {', '.join(FORMS)}.")
    return FORMS[config.form]


def fprop(
    problem: Problem,
    config: Config,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    epilogue: Epilogue = PLAIN,
    prologue: Prologue | None = None,
    offsets: Tensor | None = None,
) -> None:
    """y = epilogue(conv(prologue(x), weight)); with `offsets` (K, 2) x is the shared image (1, N, H_all, W_all, C)."""
    _form(config).fprop(x, weight, y, problem, config, epilogue, prologue, offsets)


def dgrad(problem: Problem, config: Config, dy: Tensor, weight: Tensor, dx: Tensor) -> None:
    """dx from dy (K, N, H', W', O) and weight."""
    _form(config).dgrad(dy, weight, dx, problem, config)


def wgrad(problem: Problem, config: Config, dy: Tensor, x: Tensor, dw: Tensor, offsets: Tensor | None = None) -> None:
    """dw (K, O, kh, kw, C), dense, from dy and x: summed in float32, in one pass with atomics or in two without."""
    if config.atomic:
        total = torch.zeros((1, *dw.shape), dtype=torch.float32, device=dw.device)
    else:
        parts = 1 if config.form == "band" else config.splits  # the band form adds up its own
        total = torch.empty((parts, *dw.shape), dtype=torch.float32, device=dw.device)
    _form(config).wgrad(dy, x, total, problem, config, offsets)
    dw.copy_(total[0] if len(total) == 1 else total.sum(0))


def moments_pieces(problem: Problem, config: Config) -> int:
    """S of Epilogue.moments (K, S, 3, O)."""
    return _form(config).moments_pieces(problem, config)
