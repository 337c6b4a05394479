"""Several processes train what one would: gloo on a CPU, started as users start them."""

import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import save_digits
from torch import nn

from decompk import train
from decompk.train.ranks import Ranks, SyncedBatchNorm

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


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    return save_digits(path, 93, 41)  # nothing divides by 2 or 3


def command(digits, out, processes, **changes):
    settings = [f"--set={key}={json.dumps(value)}" for key, value in {**SETTINGS, **changes}.items()]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    start = [sys.executable, *launch, "-m", "decompk", "train", "--data", digits, "--preset", "quick", "--device=cpu"]
    return [*start, "--out", str(out), *settings]


def run(digits, out, processes, *more, **changes):
    whole = [*command(digits, out, processes, **changes), *more]
    return subprocess.run(whole, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


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
    done = run(digits, out, processes)
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            command(digits, out, 1, save_steps=1, parallel=parallel),
            stderr=subprocess.DEVNULL,
            env={**ENVIRONMENT, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    while len(list((out / "seed0" / "global").glob("step-*.ckpt"))) < 2:
        assert all(process.poll() is None for process in both)
        time.sleep(0.002)
    for process in both:
        process.kill()
        process.wait()
    assert not (out / "seed0" / "random.pt").exists()
    done = run(digits, out, 2, "--resume", save_steps=1, parallel=parallel)
    assert done.returncode == 0, done.stderr
    assert "members: trained before" in done.stderr and "global: going on in epoch 1" in done.stderr
    assert_same_run(alone, out, TOLERANCE[parallel])


def test_ranks_take_runs_of_members_in_order_and_share_out_the_rest():
    for K, size in ((4, 3), (4, 4), (2, 5), (16, 6)):
        ranks = [Ranks(torch.device("cpu"), rank, size) for rank in range(size)]
        shares = [list(r.share(K)) for r in ranks]
        assert sum(shares, []) == list(range(K))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_members_begun_by_other_processes_are_not_begun_anew(digits, tmp_path):
    out = tmp_path / "out"
    train.train(train.load_recipe("quick", changes={**SETTINGS, "random": False}), digits, out, report=False)
    (out / "seed0" / "members.ckpt").unlink()
    (out / "seed0" / "members").rename(out / "seed0" / "members-1-of-3")
    with pytest.raises(train.checkpoint.CheckpointError, match=r"begun by 3 processes: go on with as many"):
        train.train(
            train.load_recipe("quick", changes={**SETTINGS, "random": False}), digits, out, resume=True, report=False
        )


def _one_of_two(rank, port, whole, cuts, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo")
    for cut in cuts:
        x = (whole[:cut], whole[cut:])[rank].clone().requires_grad_()
        norm = SyncedBatchNorm(3).double()
        (norm(x) ** 3).sum().backward()
        results[cut, rank] = (x.grad, norm.running_mean.clone(), norm.running_var.clone(), norm.weight.grad)
    torch.distributed.destroy_process_group()


def test_a_batch_norm_over_ranks_is_that_of_the_whole_batch_even_where_a_rank_has_none():
    import torch.multiprocessing as mp

    whole, cuts = torch.randn(5, 3, 4, dtype=torch.double), (2, 5)
    with mp.get_context("spawn").Manager() as manager:
        shared = manager.dict()
        mp.spawn(_one_of_two, (29711, whole, cuts, shared), nprocs=2)
        results = dict(shared)
    for cut in cuts:
        x = whole.clone().requires_grad_()
        norm = nn.BatchNorm1d(3).double()
        (norm(x) ** 3).sum().backward()
        (g0, mean, var, w0), (g1, _, _, w1) = results[cut, 0], results[cut, 1]
        assert torch.allclose(torch.cat([g0, g1]), x.grad, atol=1e-10)
        assert torch.allclose(mean, norm.running_mean) and torch.allclose(var, norm.running_var)
        assert torch.allclose(w0 + w1, norm.weight.grad)
