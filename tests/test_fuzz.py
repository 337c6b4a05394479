"""tools/fuzz.py: the operators hold on random problems, and what is broken is found, shrunk and repeated."""
# ruff: noqa: E402 (the tools stand beside the package)

import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "tools")]

import fuzz

from decompk.kernels import cpu
from decompk.kernels.conv.direct import Direct

needs_kernels = pytest.mark.skipif(cpu.why_not() is not None, reason=f"no C++ kernels: {cpu.why_not()}")


def test_random_problems_are_right_on_every_backend():
    counts, failing = fuzz.search(range(450), seconds=120, names=list(fuzz.OPS))
    assert not failing
    assert counts["problems"] == 450 and counts["refused"] < 45
    assert not [pair for pair in fuzz.pairs(list(fuzz.OPS), fuzz.available()) if not counts[pair]]


def scaled(y, x):
    """The last member wrong in images of 3 or more columns."""
    if x.shape[0] > 1 and x.shape[-2] > 2:
        y[-1] *= 1.001


def mixed(y, x):
    """What is NaN in the last member reaches the others."""
    y[:-1] += 0 * x[-1].sum()


@needs_kernels
@pytest.mark.parametrize("broken, smallest", [(scaled, {"K": 2, "W": 3}), (mixed, {"K": 2})])
def test_a_broken_kernel_is_found_shrunk_and_repeated(broken, smallest, monkeypatch, capsys):
    fprop = Direct.fprop

    def wrong(form, problem, config, x, *rest):
        y = fprop(form, problem, config, x, *rest)
        broken(y, x)
        return y

    monkeypatch.setattr(Direct, "fprop", wrong)
    counts, failing = fuzz.search(range(60), seconds=60, names=["grouped_conv2d"], hard=broken is mixed)
    assert counts["failing"] and all(small["N"] == small["H"] == 1 for small in failing)
    # Of the default backend's another form may run what is smaller still.
    small = next(small for small in failing if {name: small[name] for name in smallest} == smallest)
    told = capsys.readouterr().out
    repeat = fuzz.command(small)
    assert repeat in told and repeat.count("'") == 2
    assert fuzz.main(["--repeat", repeat.split("'")[1]]) == 1
    monkeypatch.undo()
    assert fuzz.main(["--repeat", repeat.split("'")[1]]) == 0


def lost(dweight):
    """What is NaN in dweight is 0."""
    return dweight.nan_to_num(0)


def spread(dweight):
    """One NaN in dweight makes it NaN in all of the member."""
    return dweight + 0 * dweight.flatten(1).sum(1).view(-1, 1, 1, 1, 1)


def infinite(dweight):
    """What is NaN in dweight is infinite."""
    return dweight.masked_fill(dweight.isnan(), float("inf"))


@pytest.mark.parametrize("broken", [lost, spread, infinite])
def test_a_nan_that_dweight_loses_spreads_or_changes_is_found(broken, monkeypatch):
    def wrong(p, t):
        weight = t["weight"].view_as(t["weight"])
        if weight.requires_grad:
            weight.register_hook(broken)
        return op.ours(p, t | dict(weight=weight))

    op = fuzz.OPS["grouped_conv2d"]
    monkeypatch.setitem(fuzz.OPS, "grouped_conv2d", dataclasses.replace(op, ours=wrong, backends={"default": 1}))
    counts, failing = fuzz.search(range(40), seconds=60, names=["grouped_conv2d"], hard=True)
    assert counts["failing"] and all(p["wanted"] == "all" for p in failing)


def test_float64_computed_in_float32_is_found(monkeypatch):
    def wrong(p, t):
        return {name: y.float().to(y.dtype) for name, y in op.ours(p, t).items()}

    op = fuzz.OPS["conv2d"]
    monkeypatch.setitem(fuzz.OPS, "conv2d", dataclasses.replace(op, ours=wrong, dtypes=("float64",)))
    counts, _ = fuzz.search(range(1, 5), seconds=60, names=["conv2d"])
    assert counts["failing"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--problems", "0"],
        ["--seconds", "0"],
        ["--repeat", "{"],
        ["--repeat", "{}"],
        ["--repeat", "[]"],
        ["--repeat", '{"op": "none"}'],
        ["--repeat", '{"op": "conv2d", "seed": 1}'],
        ["--repeat", '{"op": "conv2d", "seed": 1, "backend": "none", "dtype": "float32"}'],
        ["--repeat", '{"op": "conv2d", "seed": 1, "backend": "torch", "dtype": "float32", "Q": 1}'],
        ["--repeat", '{"op": "conv2d", "seed": 1, "backend": "torch", "dtype": "float32", "K": "1"}'],
    ],
)
def test_wrong_arguments_end_with_a_sentence(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        fuzz.main(arguments)
    assert ended.value.code == 2
    assert f"error: argument {arguments[0]}: " in capsys.readouterr().err.splitlines()[-1]


def test_a_problem_that_is_refused_ends_with_a_sentence(capsys):
    p = dict(op="conv2d", seed=1, backend="torch", dtype="float32", kh=9)
    assert fuzz.main(["--repeat", json.dumps(p)]) == 2
    assert "refused" in capsys.readouterr().err


def test_a_problem_is_told_without_what_is_plain_and_read_back():
    p = fuzz.draw(3, ["batch_norm"], ["default"], hard=True)
    assert fuzz.filled(json.loads(fuzz.command(p).split("'")[1])) == p


def test_the_same_seed_draws_the_same_problem():
    assert fuzz.draw(7, list(fuzz.OPS), ["default", "cpu"]) == fuzz.draw(7, list(fuzz.OPS), ["default", "cpu"])
