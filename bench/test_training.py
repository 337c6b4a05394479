"""One training step, forward, loss and backward, of K members: decompk beside everybody else who can take it."""

from functools import partial

import pytest
from contestants import OWN, PAPERS, Case, Setting, builds, job, members_alone, side, who_trains
from race import CLOCK, HOPELESS, Race, Spec, race

CASES = (*PAPERS, Case("resnet32", 4, 20))
LARGE = PAPERS[:4]  # on a CPU a step of these takes a second
DEEP = (Case("resnet110", 4, 16), Case("resnet110", 4, 20))
ROUNDS = 5
LEAST, MOST = 0.05, 1.5  # seconds of a round, and of a contestant's rounds


def specs(setting: Setting, full: bool, compiled: bool) -> list[Spec]:
    batches = (16, 64) if full else (64,) if setting.gpu else (16,)
    cases = CASES + (DEEP if full or setting.gpu else ())

    def few(case: Case) -> bool:
        return case in LARGE and not (full or setting.gpu)

    return [
        spec("training", case, batch, setting, who_trains(setting, compiled, case in DEEP, few(case)))
        for case in cases
        for batch in batches
    ]


def spec(part: str, case: Case, batch: int, setting: Setting, names: list[str], most: float = MOST) -> Spec:
    facts = {"network": case.model, "K": case.K, "batch": batch}
    sides = {name: side(name) for name in names}
    return Spec(part, f"{case.title}, {batch} images", sides, partial(run, case, batch, setting, names, most), facts)


def run(case: Case, batch: int, setting: Setting, names: list[str], most: float) -> Race:
    step = job(case, batch, setting)
    own = [name for name in OWN if name in names]
    times = {"rounds": ROUNDS, "least": LEAST, "most": most, "hopeless": HOPELESS}
    return race(builds(step, names), members_alone(step), own, typical=True, **times)


@pytest.mark.benchmark(timer=CLOCK)
def test_training_step(entry):
    entry()
