"""Data of the demos: what scikit-learn ships, and seeded generators where it ships nothing of the kind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DecompkError


@dataclass(frozen=True)
class Samples:
    """x (N, *input_size) and y, a class (N,) or targets (N, outputs); `names` of the classes, empty for targets."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    names: tuple[str, ...] = ()


def train_and_test(x: Tensor, y: Tensor, names: tuple[str, ...] = ()) -> Samples:
    """A fifth, drawn from seed 0, is held out."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(x) // 5], order[len(x) // 5 :]
    return Samples(x[train], y[train], x[test], y[test], names)


def digits() -> Samples:
    """scikit-learn's 1,797 handwritten digits: (N, 8, 8), 0 to 1."""
    found = _sklearn().load_digits()
    x = torch.from_numpy(found.images).float() / 16
    return train_and_test(x, torch.from_numpy(found.target), tuple(map(str, range(10))))


def diabetes() -> Samples:
    """scikit-learn's 442 patients: ten standardised measurements, and how their disease went on, standardised."""
    found = _sklearn().load_diabetes()
    x, y = torch.from_numpy(found.data).float(), torch.from_numpy(found.target).float()[:, None]
    return train_and_test(x / x.std(0), (y - y.mean()) / y.std())


def _sklearn() -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DecompkError("the demo's data comes with scikit-learn: pip install 'decompk[train]'.") from error
    return datasets


WAVES = ("sine", "square", "sawtooth", "chirp", "bursts")


def signals(count: int = 2500, length: int = 128, noise: float = 0.8) -> Samples:
    """(N, 1, length): one of five waves of random period, phase and height in white noise; drawn from seed 0."""
    g = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=g)

    label = torch.randint(len(WAVES), (count,), generator=g)
    time = torch.arange(length)[None] / uniform(14, 30) + uniform(0, 1)  # in periods
    sine = torch.sin(2 * math.pi * time)
    kinds = [
        sine,
        sine.sign(),
        2 * (time % 1) - 1,
        torch.sin(2 * math.pi * time * (1 + time / 4)),
        torch.sin(8 * math.pi * time) * (time % 1 < 0.4),
    ]
    x = torch.stack(kinds)[label, torch.arange(count)] * uniform(0.7, 1.3)
    return train_and_test((x + noise * torch.randn(x.shape, generator=g))[:, None], label, WAVES)


SHAPES = ("ball", "cube", "shell", "cylinder", "cross")


def volumes(count: int = 1200, size: int = 20, noise: float = 0.5) -> Samples:
    """(N, 1, size, size, size): one of five bodies of random place and radius in white noise; drawn from seed 0."""
    g = torch.Generator().manual_seed(0)
    label = torch.randint(len(SHAPES), (count,), generator=g)
    radius = (5 + 3 * torch.rand(count, 1, 1, 1, generator=g)) * size / 20
    centre = size / 2 - 0.5 + (torch.rand(count, 3, generator=g) - 0.5) * size / 5
    grid = torch.stack(torch.meshgrid(*[torch.arange(size)] * 3, indexing="ij"))
    away = (grid[None] - centre[:, :, None, None, None]).abs()
    distance, largest = away.norm(dim=1), away.amax(1)
    thin = (away < radius[:, None] / 3).sum(1)
    kinds = [
        distance < radius,
        largest < 0.8 * radius,
        (distance < 1.1 * radius) & (distance > 0.7 * radius),
        (away[:, :2].norm(dim=1) < 0.6 * radius) & (away[:, 2] < 1.2 * radius),
        (thin >= 2) & (largest < 1.2 * radius),
    ]
    x = torch.stack(kinds)[label, torch.arange(count)].float()
    return train_and_test((x + noise * torch.randn(x.shape, generator=g))[:, None], label, SHAPES)
