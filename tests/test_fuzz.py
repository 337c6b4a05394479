"""tools/fuzz.py: the operators hold on random problems, and what is broken is found, shrunk and repeated."""
# ruff: noqa: E402 (the tools stand beside the package)

import json
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "tools")]

import fuzz

from decompk.kernels import cpu

needs_kernels = pytest.mark.skipif(cpu.why_not() is not None, reason=f"no C++ kernels: {cpu.why_not()}")


def test_random_problems_are_right_on_every_backend():
    counts, failing = fuzz.search(range(700), seconds=60, names=list(fuzz.OPS))
    assert not failing
    assert counts["problems"] > 200 and counts["refused"] < counts["problems"] / 10


def scaled(y, x):
    """The last member wrong in images of 3 or more columns."""
    if x.shape[0] > 1 and x.shape[-1] > 2:
        y[-1] *= 1.001


def mixed(y, x):
    """What is NaN in the last member reaches the others."""
    y[:-1] += 0 * x[-1].sum()


@needs_kernels
@pytest.mark.parametrize("broken, smallest", [(scaled, {"K": 2, "W": 3}), (mixed, {"K": 2})])
def test_a_broken_kernel_is_found_shrunk_and_repeated(broken, smallest, monkeypatch, capsys):
    forward = cpu.forward

    def wrong(form, x, *rest):
        y = forward(form, x, *rest)
        broken(y, x)
        return y

    monkeypatch.setattr(cpu, "forward", wrong)
    counts, failing = fuzz.search(range(60), seconds=60, names=["grouped_conv2d"], hard=broken is mixed)
    assert counts["failing"] and failing
    small = failing[0]
    assert {name: small[name] for name in smallest} == smallest and small["N"] == small["H"] == 1
    told = capsys.readouterr().out
    repeat = fuzz.command(small)
    assert repeat in told and repeat.count("'") == 2
    assert fuzz.main(["--repeat", repeat.split("'")[1]]) == 1
    monkeypatch.undo()
    assert fuzz.main(["--repeat", repeat.split("'")[1]]) == 0


def test_a_problem_is_told_without_what_is_plain_and_read_back():
    p = fuzz.draw(3, ["batch_norm"], ["default"], hard=True)
    assert fuzz.filled(json.loads(fuzz.command(p).split("'")[1])) == p


def test_the_same_seed_draws_the_same_problem():
    assert fuzz.draw(7, list(fuzz.OPS), ["default", "cpu"]) == fuzz.draw(7, list(fuzz.OPS), ["default", "cpu"])
