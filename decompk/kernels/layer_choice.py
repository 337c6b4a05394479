"""How a layer, a convolution with what stands behind it, runs on a CPU: which algorithm, or its parts one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import conv, cpu
from . import device as devices
from .choose import WORTH, choose
from .conv.direct import sizes_of
from .cpu import DIRECT, WINOGRAD
from .measure import allowed, least, times
from .problem import Problem, key_of

APART = "apart"
MARGIN = 0.95  # the parts one by one are chosen where they take less than that share of the layer's time


class LayerChoice(NamedTuple):
    """Forward and backward, each one of `cpu.BY`."""

    forward: str
    backward: str


def choose_layer(problem: Problem, norm: bool, gradient: bool) -> LayerChoice | None:
    """How the layer of this fprop runs, None where its parts run apart: they have to, or were faster when measured.

    norm: whether there is a batch norm by its batch's moments; gradient: whether that of x is wanted.
    """
    return _chosen(problem, norm, gradient, allowed(), torch.get_num_threads())


@functools.lru_cache(maxsize=4096)
def _chosen(problem: Problem, norm: bool, gradient: bool, measures: bool, threads: int) -> LayerChoice | None:
    problem = replace(problem, aligned=True, deterministic=False)
    here, direct, winograd = devices.of(torch.device("cpu")), conv.named(DIRECT), conv.named(WINOGRAD)
    passes = [problem.of(kind) for kind in ("fprop", "wgrad", *(["dgrad"] if gradient else []))]
    if direct.missing() is not None or any(direct.why_not(p, None, here) is not None for p in passes):
        return None
    wide = min(problem.C, problem.O) >= 32  # enough for what the algorithm saves in products
    same = winograd.why_not(problem, None, here) is None
    back = same and (problem.out_size == (problem.H, problem.W) or not gradient)
    found = []
    flops = 2 * problem.K * problem.N * problem.C * problem.O * problem.taps * problem.out_size[0] * problem.out_size[1]
    about = f"{'norm' if norm else 'bare'}{'' if gradient else '_no_dx'}_{key_of(problem)}"
    for way, made, possible in (("forward", _forward, same), ("backward", partial(_backward, gradient=gradient), back)):
        runs = partial(made, problem, norm, possible)
        key, measured = f"layer_{way}_{about}", lambda runs=runs: least(runs())
        known = times(key, {DIRECT, APART}, measured) if flops >= WORTH else {}
        whole = known.keys() >= {DIRECT, APART}
        found.append(known if whole else {WINOGRAD if possible and wide else DIRECT: 0.0, APART: 1.0})
    best = LayerChoice(*(min((name for name in known if name != APART), key=known.__getitem__) for known in found))
    ours, apart = sum(map(dict.__getitem__, found, best)), sum(known[APART] for known in found)
    return None if apart < MARGIN * ours else best


def _forward(problem: Problem, norm: bool, winograd: bool) -> dict[str, Callable[[], object]]:
    """By name, one run each on random values."""
    t, sizes = _Tensors.of(problem, norm), sizes_of(problem)

    def layer(way: str) -> None:
        z, saved = (t.z, t.saved) if norm else (None, None)
        cpu.layer(t.x, t.weight, None, t.affine, None, t.y, z, saved, True, 0.0, 1e-5, way, sizes)

    def apart() -> None:
        y = _run(problem, t.x, t.weight, t.y)
        if norm:
            cpu.batch_norm(y, *t.affine, None, t.z, t.saved, True, True, 0.0, 1e-5)
        else:
            y.relu()

    return _by_name(layer, winograd, apart)


def _backward(problem: Problem, norm: bool, winograd: bool, gradient: bool) -> dict[str, Callable[[], object]]:
    """By name, one run each on random values."""
    t, sizes = _Tensors.of(problem, norm), sizes_of(problem)
    dx, dw, dvectors = (
        torch.empty_like(t.x) if gradient else None,
        torch.empty_like(t.weight),
        torch.empty_like(t.saved),
    )
    inputs = (t.y, None, t.saved) if norm else (None, t.z, None)
    cpu.layer(t.x, t.weight, None, t.affine, None, t.y, t.z, t.saved, True, 0.0, 1e-5, DIRECT, sizes)

    def layer(way: str) -> None:
        dy = torch.empty_like(t.y) if gradient and not in_one_go(problem) else None
        around = (dx, dw, dvectors[0], dvectors[1], None, dy, way, sizes)
        cpu.layer_backward(t.dz, t.x, t.weight, *inputs, True, *around)

    def apart() -> None:
        if norm:
            dy = torch.empty_like(t.y)
            cpu.batch_norm_backward(t.dz, t.y, None, t.saved, True, True, dy, dvectors[0], dvectors[1], None)
        else:
            dy = torch.ops.aten.threshold_backward(t.dz, t.z, 0)
            dy.sum((1, 2, 3))
        if dx is not None:
            _run(problem.of("dgrad"), dy, t.weight, dx)
        _run(problem.of("wgrad"), dy, t.x, dw)

    return _by_name(layer, winograd, apart)


def _by_name(
    layer: Callable[[str], None], winograd: bool, apart: Callable[[], None]
) -> dict[str, Callable[[], object]]:
    return {name: partial(layer, name) for name in (DIRECT, WINOGRAD)[: 1 + winograd]} | {APART: apart}


def _run(problem: Problem, first: Tensor, second: Tensor, out: Tensor) -> Tensor:
    """One pass by its fastest form, contiguous."""
    form = choose(problem, first.device).form
    return getattr(form, problem.kind)(problem, None, first, second, out).contiguous()


def in_one_go(problem: Problem) -> bool:
    """Whether dgrad and wgrad of some rows of y are found together: y is as large as x."""
    return problem.stride == (1, 1) and problem.out_size == (problem.H, problem.W)


class _Tensors(NamedTuple):
    """What a layer reads and writes, random."""

    x: Tensor
    weight: Tensor
    affine: tuple[Tensor | None, ...]
    y: Tensor
    z: Tensor
    saved: Tensor
    dz: Tensor

    @classmethod
    def of(cls, p: Problem, norm: bool) -> _Tensors:
        generator = torch.Generator().manual_seed(0)
        x, dz, y, z = (
            torch.randn(p.K, p.N, *size, channels, generator=generator)
            for size, channels in (((p.H, p.W), p.C), *((p.out_size, p.O),) * 3)
        )
        weight = torch.randn(p.K, p.O, *p.kernel, p.C, generator=generator) / (p.taps * p.C) ** 0.5
        affine = (torch.ones(p.K, p.O), torch.zeros(p.K, p.O), None, None)
        return cls(x, weight, affine if norm else (None,) * 4, y, z, torch.empty(4, p.K, p.O), dz)
