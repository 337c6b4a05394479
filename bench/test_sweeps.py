"""How the gain grows with the number of members, and what the batch does to it."""

import pytest
from contestants import Case, Setting
from race import CLOCK, Spec
from test_training import spec

PARTS = {1: 1, 2: (1, 2), 4: 4, 8: (2, 4), 16: 16, 32: (4, 8), 64: 64}  # K: rows and columns of crops without overlap
QUICK = (1, 4, 16, 64)  # on a CPU, unless all are asked for
SMALL = {"model": "resnet8", "width": 64}  # wide enough for 64 members
BATCHES = (1, 4, 16, 64)
MOST = 0.5  # seconds of a contestant's rounds


def crop(parts: int | tuple[int, int], pixels: int = 32) -> int | tuple[int, int]:
    return pixels // round(parts**0.5) if isinstance(parts, int) else tuple(pixels // n for n in parts)


def specs(setting: Setting, full: bool, compiled: bool) -> list[Spec]:
    names = ["ours", "ours, fused", "members in turn, channels_last", "grouped, channels_last"]
    return [
        *(
            spec("K", Case(partitions=parts, crop=crop(parts), **SMALL), 16, setting, [*names, "global"], MOST)
            for K, parts in PARTS.items()
            if full or setting.gpu or K in QUICK
        ),
        *(spec("batch", Case("resnet32", 4, 16), batch, setting, names, MOST) for batch in BATCHES),
    ]


@pytest.mark.benchmark(timer=CLOCK)
def test_sweep(entry):
    entry()
