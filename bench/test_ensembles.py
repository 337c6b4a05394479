"""A training step of K equal networks on one batch that all share, as ensembles, seeds and sweeps train."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
from contestants import OWN, Setting, builds, ensemble, members_alone, side, who_trains
from networks import ViT, lenet, mobilenet, resnet
from race import CLOCK, HOPELESS, Race, Spec, race
from torch import nn

from decompk import models

ROUNDS = 7
LEAST, MOST = 0.03, 0.6  # seconds of a round, and of a contestant's rounds


@dataclass(frozen=True)
class Ensemble:
    """K networks that `make` makes, on inputs (N, *size); N = `batch` unless all batches are asked for."""

    name: str
    K: int
    make: Callable[[], nn.Module]
    size: tuple[int, ...]
    batch: int = 16
    fused: bool = True  # whether it has what can be


IMAGE, DIGIT = (3, 32, 32), (1, 28, 28)
ENSEMBLES = (
    Ensemble("ResNet8, width 16", 8, partial(resnet, 1, 16), IMAGE),
    Ensemble("ResNet20, width 16", 4, partial(resnet, 3, 16), IMAGE),
    Ensemble("ResNet8, width 32", 16, partial(resnet, 1, 32), IMAGE),
    Ensemble("MobileNet, width 16", 8, mobilenet, IMAGE),
    Ensemble("LeNet", 8, lenet, DIGIT),
    Ensemble("LeNet", 32, lenet, DIGIT),
    Ensemble("MLP 784-256-256-10", 10, partial(models.mlp, 784, 10, (256, 256)), (784,), 64),
    Ensemble("GRU, hidden 64, 16 steps", 8, partial(models.Recurrent, 32, 10, 64), (16, 32), fused=False),
    Ensemble("ViT, dim 64, depth 4", 4, ViT, IMAGE, fused=False),
)


def specs(setting: Setting, full: bool, compiled: bool) -> list[Spec]:
    return [
        Spec(
            "ensembles",
            f"{case.name}, K={case.K}, {batch} samples",
            {name: side(name) for name in contestants(case, setting, compiled)},
            partial(run, case, batch, setting, compiled),
            {"network": case.name, "K": case.K, "batch": batch},
        )
        for case in ENSEMBLES
        for batch in ((16, 64) if full else (case.batch,))
    ]


def contestants(case: Ensemble, setting: Setting, compiled: bool) -> list[str]:
    """Who trains: what are no images have no memory format, and images are grouped with channels last alone."""
    out = {"grouped"} if len(case.size) == 3 else {"members in turn, channels_last", "grouped, channels_last"}
    out |= set() if case.fused else {"ours, fused", "ours, CUDA graph"}  # the graph is of the fused network
    return [name for name in who_trains(setting, compiled) if name not in out and side(name) != "global"]


def run(case: Ensemble, batch: int, setting: Setting, compiled: bool) -> Race:
    step, names = ensemble(case.make, case.K, case.size, batch, setting), contestants(case, setting, compiled)
    own = [name for name in OWN if name in names]
    times = {"rounds": ROUNDS, "least": LEAST, "most": MOST, "hopeless": HOPELESS}
    return race(builds(step, names), members_alone(step), own, typical=True, **times)


@pytest.mark.benchmark(timer=CLOCK)
def test_ensemble(entry):
    entry()
