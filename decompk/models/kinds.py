"""A small network of every further kind that section 2.4 names: vectors, signals, volumes, auto-encoders, sequences."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from ..errors import DecompkError
from .declared import declares


def mlp(features: int, outputs: int, hidden: Sequence[int] = (128, 128)) -> nn.Sequential:
    """(N, features) → (N, outputs): fully connected layers with ReLU between them; for classes, or for regression."""
    widths = (features, *hidden)
    layers: list[nn.Module] = []
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def autoencoder(features: int, hidden: Sequence[int] = (64, 16, 64)) -> nn.Sequential:
    """(N, features) → (N, features), through `hidden` widths; values between 0 and 1."""
    return mlp(features, features, hidden).append(nn.Sigmoid())


def conv_autoencoder(channels: int = 1, width: int = 32) -> nn.Sequential:
    """(N, C, H, W) → (N, C, H, W) for sides divisible by 4: two strided convolutions down, two transposed ones up.

    Windows do not overlap, so that no position sees past its member's crop where crops begin at multiples of 4.
    """
    return nn.Sequential(
        nn.Conv2d(channels, width, 2, 2), nn.ReLU(), nn.Conv2d(width, width, 2, 2), nn.ReLU(),
        nn.ConvTranspose2d(width, width, 2, 2), nn.ReLU(), nn.ConvTranspose2d(width, channels, 2, 2), nn.Sigmoid(),
    )  # fmt: skip


@declares(lambda channels, length: (channels, length))
def signal_cnn(channels: int = 1, classes: int = 10, width: int = 32, length: int = 128) -> nn.Sequential:
    """(N, C, length) → (N, classes): three 1-D convolutions without padding, two poolings, two FC layers."""
    return _cnn(nn.Conv1d, nn.MaxPool1d, channels, classes, width, (length,))


@declares(lambda channels, size: (channels, *size))
def volume_cnn(channels: int = 1, classes: int = 10, width: int = 32, size: Sequence[int] = (20,) * 3) -> nn.Sequential:
    """(N, C, D, H, W) → (N, classes): signal_cnn in three dimensions; volumes of `size`."""
    return _cnn(nn.Conv3d, nn.MaxPool3d, channels, classes, width, tuple(size))


def _cnn(conv: type, pool: type, channels: int, classes: int, width: int, size: tuple[int, ...]) -> nn.Sequential:
    last = [((pixels - 2) // 2 - 2) // 2 - 2 for pixels in size]
    if min(last) < 1:
        raise DecompkError(f"{min(size)} positions are too few for three convolutions and two poolings; give 18.")
    return nn.Sequential(
        conv(channels, width, 3), nn.ReLU(), pool(2), conv(width, 2 * width, 3), nn.ReLU(), pool(2),
        conv(2 * width, 2 * width, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(2 * width * prod(last), 4 * width), nn.ReLU(), nn.Linear(4 * width, classes),
    )  # fmt: skip


class ElmanBlock(nn.Module):
    """One block of (2.27), (2.28): s_t = σ(U x_t + W s_(t−1) + b), o_t = σ(V s_t + c), σ = tanh.

    (N, T, inputs) → (N, T, outputs).
    """

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.recurrent = nn.RNN(inputs, hidden, batch_first=True)  # holds U, W and b, the latter in two summands
        self.V = nn.Linear(hidden, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.V(self.recurrent(x)[0]))


class Elman(nn.Module):
    """(N, T, features) → (N, classes): a stack of Elman blocks, and a linear layer on the last step's output."""

    def __init__(self, features: int, classes: int, hidden: int = 64, blocks: int = 2):
        super().__init__()
        widths = (features, *(hidden,) * blocks)
        self.blocks = nn.Sequential(*(ElmanBlock(width, hidden, hidden) for width in widths[:-1]))
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x)[:, -1])


class Recurrent(nn.Module):
    """(N, T, features) → (N, classes): torch's "RNN", "GRU" or "LSTM", and a linear layer on the last step's state."""

    def __init__(self, features: int, classes: int, hidden: int = 64, kind: str = "GRU", **options: Any):
        super().__init__()
        if kind not in ("RNN", "GRU", "LSTM"):
            raise DecompkError(f"kind {kind!r} is unknown; choose 'RNN', 'GRU' or 'LSTM'.")
        self.recurrent = getattr(nn, kind)(features, hidden, batch_first=True, **options)
        self.head = nn.Linear(hidden * (1 + self.recurrent.bidirectional), classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.recurrent(x)[0][:, -1])
