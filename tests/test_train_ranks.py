"""Several processes train what one would: gloo on a CPU, once started as users start them."""

import json
import time

import numpy as np
import pytest
import torch
from helpers import save_digits
from processes import run_ranks, running_ranks, torchrun
from torch import nn

from decompk import train
from decompk.cli import main
from decompk.errors import DecompkError
from decompk.train.ranks import Ranks, SyncedBatchNorm, start, stop

SETTINGS = {
    "seeds": [0],
    "batch": 20,
    "exact": True,
    "precision": "float64",
    "members.epochs": 2,
    "global.epochs": 1,
    "random.epochs": 1,
    "global.optimizer": "sgd",
    "random.optimizer": "sgd",
    "global.lr": 0.01,
    "random.lr": 0.01,
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    return save_digits(path, 93, 41)  # nothing divides by 2 or 3


def command(digits, out, *more, **changes):
    settings = [f"--set={key}={json.dumps(value)}" for key, value in {**SETTINGS, **changes}.items()]
    return ["train", "--data", digits, "--preset", "quick", "--device=cpu", "--out", str(out), *settings, *more]


def weights(out, name):
    return torch.load(out / "seed0" / f"{name}.pt", weights_only=True)


# Under FSDP weights are contiguous, not channels_last: sums round otherwise, and ties in max-pooling magnify that.
TOLERANCE = {"ddp": 1e-9, "fsdp": 1e-5}


def assert_alike(one, other, tolerance):
    assert one.keys() == other.keys()
    for key, value in one.items():
        error = (value.double() - other[key].double()).norm() / value.double().norm().clamp(min=1e-12)
        assert error <= tolerance, f"{key}: {error:.1e}"


@pytest.fixture(scope="module")
def alone(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    train.train(train.load_recipe("quick", changes=SETTINGS), digits, out, report=False)
    return out


def assert_same_run(alone, out, tolerance):
    for name in ("members", "composed"):
        assert_alike(weights(alone, name), weights(out, name), 0)
    for name in ("global", "random"):
        assert_alike(weights(alone, name), weights(out, name), tolerance)
    one, other = (json.loads((o / "result.json").read_text())["runs"][0] for o in (alone, out))
    for phase in ("members", "global", "random"):
        for what in ("accuracy", "images", "lr"):
            assert one[phase][what] == other[phase][what], f"{phase} {what}"
        assert np.allclose(one[phase]["test_loss"], other[phase]["test_loss"], rtol=tolerance)
        assert np.allclose(one[phase]["loss"], other[phase]["loss"], rtol=tolerance)


def test_processes_together_end_where_one_alone_does(digits, alone, tmp_path):
    processes, out = 3, tmp_path / "out"
    done = torchrun(processes, *command(digits, out))
    assert done.returncode == 0, done.stderr
    assert_same_run(alone, out, TOLERANCE["ddp"])
    assert done.stderr.count("seed 0 composed, not trained further") == 1
    assert (out / "summary.md").exists()
    for rank in range(1, processes):
        lines = [json.loads(line) for line in (out / f"metrics-rank{rank}.jsonl").read_text().splitlines()]
        assert {line["phase"] for line in lines} >= {"members"}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_killed_in_the_global_phase_go_on_together(parallel, digits, alone, tmp_path):
    out = tmp_path / "out"
    with running_ranks(2, tmp_path, main, command(digits, out, save_steps=1, parallel=parallel)) as both:
        while len(list((out / "seed0" / "global").glob("step-*.ckpt"))) < 2:
            assert all(process.exitcode is None for process in both)
            time.sleep(0.002)
    assert not (out / "seed0" / "random.pt").exists()
    said, _ = run_ranks(2, tmp_path, main, command(digits, out, "--resume", save_steps=1, parallel=parallel))
    assert "members: trained before" in said and "global: going on in epoch 1" in said
    assert_same_run(alone, out, TOLERANCE[parallel])


def test_ranks_take_runs_of_members_in_order_and_share_out_the_rest():
    for K, size in ((4, 3), (4, 4), (2, 5), (16, 6)):
        ranks = [Ranks(torch.device("cpu"), rank, size) for rank in range(size)]
        shares = [list(r.share(K)) for r in ranks]
        assert sum(shares, []) == list(range(K))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("device", ["gpu", "mps", "meta", "cuda:x"])
def test_a_device_that_none_trains_on_is_refused_in_a_sentence(device):
    with pytest.raises(DecompkError, match=f"^'{device}' is none of the devices that are trained on"):
        start(device)


def test_members_begun_by_other_processes_are_not_begun_anew(digits, tmp_path):
    out = tmp_path / "out"
    train.train(train.load_recipe("quick", changes={**SETTINGS, "random": False}), digits, out, report=False)
    (out / "seed0" / "members.ckpt").unlink()
    (out / "seed0" / "members").rename(out / "seed0" / "members-1-of-3")
    with pytest.raises(train.checkpoint.CheckpointError, match=r"begun by 3 processes: go on with as many"):
        train.train(
            train.load_recipe("quick", changes={**SETTINGS, "random": False}), digits, out, resume=True, report=False
        )


def normalise(whole, cuts, folder):
    ranks = start("cpu")
    for cut in cuts:
        x = (whole[:cut], whole[cut:])[ranks.rank].clone().requires_grad_()
        norm = SyncedBatchNorm(3).double()
        (norm(x) ** 3).sum().backward()
        found = (x.grad, norm.running_mean, norm.running_var, norm.weight.grad)
        torch.save(found, folder / f"{cut}-{ranks.rank}.pt")
    stop(ranks)


def test_a_batch_norm_over_ranks_is_that_of_the_whole_batch_even_where_a_rank_has_none(tmp_path):
    whole, cuts = torch.randn(5, 3, 4, dtype=torch.double), (2, 5)
    run_ranks(2, tmp_path, normalise, whole, cuts, tmp_path)
    for cut in cuts:
        x = whole.clone().requires_grad_()
        norm = nn.BatchNorm1d(3).double()
        (norm(x) ** 3).sum().backward()
        (g0, mean, var, w0), (g1, _, _, w1) = (torch.load(tmp_path / f"{cut}-{rank}.pt") for rank in range(2))
        assert torch.allclose(torch.cat([g0, g1]), x.grad, atol=1e-10)
        assert torch.allclose(mean, norm.running_mean) and torch.allclose(var, norm.running_var)
        assert torch.allclose(w0 + w1, norm.weight.grad)
