"""What tests, bench and tuner run: every distinct layer of a member of the papers' networks, K members at once."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from timing import Trial
from torch import Tensor, nn

import decompk
from decompk import cost
from decompk.config import PASSES, Problem

BATCH = 128  # images a member


@dataclass(frozen=True)
class Case:
    """A registered network and how it is cut, as `decompose` takes it."""

    model: str
    partitions: int | tuple[int, int]
    crop: int

    @property
    def K(self) -> int:
        return self.partitions if isinstance(self.partitions, int) else prod(self.partitions)

    @property
    def title(self) -> str:
        return f"{self.model} K={self.K}@{self.crop}"

    def decomposition(self) -> decompk.Decomposition:
        size = decompk.models.spec(self.model).input_size
        return decompk.decompose(decompk.models.build(self.model), size, self.partitions, crop_size=self.crop)


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
        """The Problems that operations ask dispatch for, one a pass."""
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
    image = decompk.models.spec(case.model).input_size[1:]
    return [
        Layer(problem("fprop", dtype, sides, kernel, layout, stride=s, padding=p, dilation=d), count, first, image)
        for (sides, kernel, s, p, d, first), count in found.items()
        for layout in (("member", "crops") if first else ("member",))
    ]


def norms(case: Case, batch: int = BATCH) -> list[Norm]:
    """The distinct batch norms of one member of `case`."""
    found = Counter((case.K, batch, *entry.in_shape) for entry in _member(case)[1] if entry.kind == "norm")
    return [Norm(shape, count) for shape, count in found.items()]


@functools.cache
def _member(case: Case) -> tuple[nn.Module, list[cost.LayerCost]]:
    """One member, without data, and what its layers cost in training."""
    with torch.device("meta"):
        member = case.decomposition().member_shell()
    return member, cost.layers(member, (decompk.models.spec(case.model).input_size[0], case.crop, case.crop), True)


def fitting_batch(case: Case, memory: float, batch: int = BATCH) -> int:
    """`batch`, halved until its largest layer leaves room for references and rivals in `memory` bytes."""
    ones = [layer.problem for layer in layers(case, batch=1)]
    values = max(p.K * (p.C * p.H * p.W + p.O * prod(p.out_size)) for p in ones)
    while batch > 1 and 64 * values * batch > memory:  # some copies in float64, ten in bfloat16
        batch //= 2
    return batch


# ---- whole networks -------------------------------------------------------------------------------------------------


class GroupedLinear(nn.Module):
    """K linear layers on features side by side: (N, K·in) → (N, K·out)."""

    def __init__(self, members: list[nn.Linear]):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([m.weight.detach() for m in members]))
        self.bias = nn.Parameter(torch.cat([m.bias.detach() for m in members]))

    def forward(self, x: Tensor) -> Tensor:
        K, _, features = self.weight.shape
        y = x.view(-1, K, features).transpose(0, 1) @ self.weight.mT.to(x.dtype)
        return y.transpose(0, 1).flatten(1) + self.bias


def side_by_side(members: list[nn.Module]) -> nn.Module:
    """The members as channel groups of one network, as one writes it without decompk: (N, K·C, H, W) → (N, K·O)."""
    net = copy.deepcopy(members[0])
    for path, leaf in list(net.named_modules()):
        leaves = [member.get_submodule(path) for member in members]
        if isinstance(leaf, nn.Conv2d):
            wide = nn.Conv2d(
                len(members) * leaf.in_channels,
                len(members) * leaf.out_channels,
                leaf.kernel_size,
                leaf.stride,
                leaf.padding,
                leaf.dilation,
                len(members) * leaf.groups,
                leaf.bias is not None,
            )
        elif isinstance(leaf, nn.BatchNorm2d):
            wide = nn.BatchNorm2d(len(members) * leaf.num_features)
        elif isinstance(leaf, nn.Linear):
            net.set_submodule(path, GroupedLinear(leaves))
            continue
        else:
            continue
        states = [one.state_dict() for one in leaves]
        wide.load_state_dict({k: torch.cat([s[k] for s in states]) if v.dim() else v for k, v in states[0].items()})
        net.set_submodule(path, wide)
    return net


Job = tuple[nn.Module, Callable[[], Tensor]]  # a network and what makes its input


def networks(members: list[nn.Module], crops: Sequence[decompk.Crop], image: Tensor) -> dict[str, list[Job]]:
    """Who trains `members` on crops of `image`: copies of them, the jobs of one run one after the other."""
    device = image.device

    def ready(net: nn.Module) -> nn.Module:
        return net.to(device, memory_format=torch.channels_last).train()

    def cut(crop: decompk.Crop) -> Tensor:
        return crop.cut(image).contiguous(memory_format=torch.channels_last)

    def packed() -> decompk.Packed:
        return decompk.pack(members, crops=crops).to(device).train()

    found = {"packed": [(packed(), lambda: image)]}
    if hasattr(decompk, "fuse"):
        found["packed_fused"] = [(decompk.fuse(packed()), lambda: image)]
    groups = ready(side_by_side(members))
    found["cudnn_groups"] = [(groups, lambda: torch.cat([cut(crop) for crop in crops], 1))]
    pairs = zip(members, crops, strict=True)
    found["members_in_turn"] = [(ready(copy.deepcopy(member)), partial(cut, crop)) for member, crop in pairs]
    return found


def training_step(jobs: list[Job], target: Tensor, K: int) -> Callable[[], Tensor]:
    """Forward in bfloat16, loss, backward and SGD of every job in turn; returns the sum of the losses."""
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, foreach=True) for net, _ in jobs]

    def step() -> Tensor:
        total = torch.zeros((), device=target.device)
        for (net, make), optimizer in zip(jobs, optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(target.device.type, torch.bfloat16):
                logits = net(make())
            members = K // len(jobs)
            if logits.dim() == 2:  # of one member, or side by side
                logits = logits.unflatten(1, (members, -1)).transpose(0, 1)
            loss = decompk.losses.cross_entropy(logits.float(), target)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return total

    return step


class Captured:
    """A training step as one CUDA graph, captured at its first call, when it has run `warm` times."""

    warm = 3

    def __init__(self, step: Callable[[], Tensor]):
        self.step, self.graph = step, None

    def __call__(self) -> Tensor:
        if self.graph is None:
            self._capture()
        self.graph.replay()
        return self.loss

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.warm):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.step()
