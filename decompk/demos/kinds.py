"""The demos: for each kind of network its data, model, division and measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from .. import models
from . import data
from .data import Samples

# The pixels of an 8×8 digit, written as a vector, by quadrant: index sets that are no ranges.
QUADRANTS = [
    [8 * row + column for row in range(r, r + 4) for column in range(c, c + 4)] for r in (0, 4) for c in (0, 4)
]


@dataclass(frozen=True)
class Demo:
    """One kind of network: `what` it is, where its samples come from, and how it is divided, trained and judged.

    measure: "accuracy" in %, "mse" of a regression, "reconstruction" (mse) of an auto-encoder.
    """

    what: str
    samples: Callable[[], Samples]
    model: Callable[[], nn.Module]
    partitions: Any
    crop_size: int | None = None
    head: str = "sum"
    measure: str = "accuracy"
    epochs: tuple[int, int] = (20, 10)  # of the members and of the composed network
    lr: float = 2e-3

    @property
    def higher_is_better(self) -> bool:
        return self.measure == "accuracy"


def _vectors() -> Samples:
    found = data.digits()
    return replace(found, x_train=found.x_train.flatten(1), x_test=found.x_test.flatten(1))


def _reconstructions() -> Samples:
    found = _vectors()
    return replace(found, y_train=found.x_train, y_test=found.x_test, names=())


DEMOS = {
    "fc": Demo(
        "a fully connected network; each member reads a quadrant of a digit as 16 numbers",
        _vectors,
        partial(models.mlp, 64, 10, (128, 128)),
        QUADRANTS,
    ),
    "regression": Demo(
        "a fully connected regression whose outputs are averaged (2.22); each member reads 5 of 10 measurements",
        data.diabetes,
        partial(models.mlp, 10, 1, (32, 32)),
        2,
        head="mean",
        measure="mse",
        epochs=(10, 5),
        lr=1e-3,
    ),
    "autoencoder": Demo(
        "an auto-encoder, 64 → 96 → 32 → 96 → 64; each member reconstructs its quadrant of a digit",
        _reconstructions,
        partial(models.autoencoder, 64, (96, 32, 96)),
        QUADRANTS,
        head="concat",
        measure="reconstruction",
        epochs=(40, 20),
    ),
    "recurrent": Demo(
        "two Elman blocks (2.27), (2.28) reading a digit row by row; each member sees two of eight columns",
        data.digits,
        partial(models.Elman, 8, 10, 96),
        4,
        epochs=(30, 15),
    ),
    "signal": Demo(
        "a 1-D convolutional network on noisy waves; each member hears a stretch, overlapping its neighbours'",
        data.signals,
        partial(models.signal_cnn, 1, 5, 32),
        4,
        crop_size=44,
        epochs=(15, 8),
    ),
    "volume": Demo(
        "a 3-D convolutional network on noisy bodies; each member sees an overlapping eighth of the volume",
        partial(data.volumes, 800, size=28),
        partial(models.volume_cnn, 1, 5, 16, (28, 28, 28)),
        8,
        crop_size=20,
        epochs=(6, 3),
    ),
}
