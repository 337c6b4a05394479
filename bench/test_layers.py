"""Every distinct convolution of the papers' members, forward and backward, all K members at once.

On a CPU the ResNet50 of 16 members stands for those of 4 and 8, unless all are asked for.
"""

from functools import partial

import pytest
from contestants import PAPERS, Setting
from convolutions import CONVOLUTIONS, Operands, reference
from layers import Layer, layers
from race import CLOCK, Race, Spec, race

SLACK = {"output": 1e-5, "gradient": 1e-5}  # float32 sums of a few thousand products
LEAST, MOST = 2e-3, 0.1  # seconds of a round, and of a contestant's rounds


def specs(setting: Setting, full: bool, compiled: bool) -> list[Spec]:
    batch = 64 if setting.gpu else 16
    sides = {name: "ours" if name == "ours" else "peer" for name in CONVOLUTIONS}
    return [
        Spec(
            "layers",
            f"{case.title}, {layer.name}, {batch} images",
            sides,
            partial(run, layer, setting),
            {"network": case.title, "layer": layer.name, "count": layer.count, "K": case.K, "batch": batch},
        )
        for case in (PAPERS if full or setting.gpu else PAPERS[2:])
        for layer in layers(case, str(setting.dtype).removeprefix("torch."), batch)
        if layer.problem.layout == "member"
    ]


def run(layer: Layer, setting: Setting) -> Race:
    operands = Operands.random(layer, setting)
    contestants = {name: partial(build, operands) for name, build in CONVOLUTIONS.items()}
    own = ("members in turn, channels_last",)
    return race(contestants, reference(operands), own, SLACK, rounds=5, least=LEAST, most=MOST)


@pytest.mark.benchmark(timer=CLOCK)
def test_layer(entry):
    entry()
