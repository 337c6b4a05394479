"""What tests, bench and tuner run: every distinct layer of a member of the papers' networks, K members at once."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, replace
from math import prod

import torch
from timing import Trial
from torch import nn

import decompk
from decompk.cost import walk
from decompk.cost.figures import LayerCost
from decompk.kernels.problem import PASSES, Problem

BATCH = 128  # images a member


@dataclass(frozen=True)
class Case:
    """A network and how it is cut, as `decompose` takes it; image: side of what an own one, module:callable, sees."""

    model: str
    partitions: int | tuple[int, int]
    crop: int
    image: int = 224

    @property
    def K(self) -> int:
        return self.partitions if isinstance(self.partitions, int) else prod(self.partitions)

    @property
    def title(self) -> str:
        return f"{self.model} K={self.K}@{self.crop}"

    @property
    def input_size(self) -> tuple[int, ...]:
        own = (3, self.image, self.image)
        return own if ":" in self.model else decompk.models.spec(self.model).input_size

    def decomposition(self) -> decompk.Decomposition:
        model = decompk.models.build(self.model)
        return decompk.decompose(model, self.input_size, self.partitions, crop_size=self.crop)


CASES = (
    Case("resnet50", 4, 140),
    Case("resnet50", 16, 70),
    Case("resnet32", 4, 20),
    Case("vgg16", 4, 112),
    Case("resnet50", (2, 4), 96),
    Case("resnet32", 4, 16),
)


@dataclass(frozen=True)
class Layer:
    """`count` convolutions of one member that are alike, in their forward pass.

    `first`: it reads the input, whose gradient nobody wants; with layout "crops" windows of an `image` (H, W).
    """

    problem: Problem
    count: int
    first: bool
    image: tuple[int, int]

    @property
    def name(self) -> str:
        p = self.problem
        crops = " of crops" if p.layout == "crops" else ""
        return f"{p.C}→{p.O} {p.kernel[0]}×{p.kernel[1]}/{p.stride[0]} @{p.H}×{p.W}{crops}"

    def passes(self) -> list[Problem]:
        """The Problems for which operators ask who runs them, one a pass."""
        kinds = [kind for kind in PASSES if kind != "dgrad" or not self.first]
        return [Trial(self.problem.of(kind), "meta", self.image).asked for kind in kinds]


@dataclass(frozen=True)
class Norm:
    """`count` batch norms of one member over (N, C, H, W) that are alike."""

    shape: tuple[int, int, int, int, int]  # (K, N, C, H, W)
    count: int

    @property
    def name(self) -> str:
        return "{2} @{3}×{4}".format(*self.shape)


def problem(
    kind: str, dtype: str, sides: tuple[int, ...], kernel: tuple[int, int], layout: str = "member", **geometry
) -> Problem:
    """The Problem of dense activations, as operations see them; `sides` are (K, N, C, O, H, W)."""
    whole = Problem(kind, dtype, *sides, kernel, layout=layout, **geometry)
    return replace(whole, aligned=Trial(whole, "meta").asked.aligned)


def layers(case: Case, dtype: str = "bfloat16", batch: int = BATCH) -> list[Layer]:
    """The distinct convolutions of one member of `case`, in the order of execution, K members of `batch` images.

    The first one comes twice: on crops that were cut, and on the image itself, as a fused network runs it.
    """
    member, costs = _member(case)
    found: Counter[tuple] = Counter()
    for entry in costs:
        if entry.kind == "conv":
            leaf = member.get_submodule(entry.name.partition("#")[0])
            sides = (case.K, batch, leaf.in_channels, leaf.out_channels, *entry.in_shape[1:])
            found[sides, leaf.kernel_size, leaf.stride, leaf.padding, leaf.dilation, entry.role == "first conv"] += 1
    image = case.input_size[1:]
    return [
        Layer(problem("fprop", dtype, sides, kernel, layout, stride=s, padding=p, dilation=d), count, first, image)
        for (sides, kernel, s, p, d, first), count in found.items()
        for layout in (("member", "crops") if first else ("member",))
    ]


def norms(case: Case, batch: int = BATCH) -> list[Norm]:
    """The distinct batch norms of one member of `case`."""
    found = Counter((case.K, batch, *entry.in_shape) for entry in _member(case)[1] if entry.kind == "norm")
    return [Norm(shape, count) for shape, count in found.items()]


def costs(case: Case) -> list[LayerCost]:
    """What the layers of one member of `case` cost in training, for one sample."""
    return _member(case)[1]


@functools.cache
def _member(case: Case) -> tuple[nn.Module, list[LayerCost]]:
    """One member, without data, and what its layers cost in training."""
    with torch.device("meta"):
        member = case.decomposition().member_skeleton()
    return member, walk.layers(member, (case.input_size[0], case.crop, case.crop), True)


def fitting_batch(case: Case, memory: float, batch: int = BATCH) -> int:
    """`batch`, halved until its largest layer leaves room for references and rivals in `memory` bytes."""
    ones = [layer.problem for layer in layers(case, batch=1)]
    values = max(p.K * (p.C * p.H * p.W + p.O * prod(p.out_size)) for p in ones)
    while batch > 1 and 64 * values * batch > memory:  # some copies in float64, ten in bfloat16
        batch //= 2
    return batch
