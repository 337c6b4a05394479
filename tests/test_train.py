"""Algorithm 1 from data to weights: what it makes, and that a killed run loses nothing."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import save_digits
from torch import nn

import decompk
from decompk import losses, optim, train
from decompk.cli import main
from decompk.errors import CheckpointError, DecompkError, UnsupportedOperation
from decompk.kernels import measure
from decompk.packed import schedule
from decompk.train import algorithm, checkpoint, loop, summary

SHORT = {"seeds": [0], "members.epochs": 2, "global.epochs": 1, "random.epochs": 3}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return save_digits(tmp_path_factory.mktemp("digits") / "digits.npz", 96, 40)


def small(**changes):
    """A run of under a second: 5 batches an epoch."""
    return train.load_recipe(
        "quick",
        changes={**SHORT, "batch": 20, "log_seconds": 0.0, **{k.replace("__", "."): v for k, v in changes.items()}},
    )


@pytest.fixture(scope="module")
def trainings(digits, tmp_path_factory):
    """Folders of trainings that others copy: "plain" and "saved" have ended, "killed" has when its members had.

    All are `small(random=False)`; the last two leave checkpoints every 3 steps.
    """
    folder = tmp_path_factory.mktemp("trainings")
    train.train(small(random=False), digits, folder / "plain", report=False)
    saved = small(random=False, save_steps=3)
    train.train(saved, digits, folder / "saved", report=False)
    with mock.patch.object(algorithm._Run, "_global", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        train.train(saved, digits, folder / "killed", report=False)
    return folder


@pytest.fixture
def trained(trainings, tmp_path):
    """trained(name) is a copy of one of these."""
    return lambda name: Path(shutil.copytree(trainings / name, tmp_path / "out"))


def weights(out, seed=0):
    return {
        name: torch.load(out / f"seed{seed}" / f"{name}.pt", weights_only=True)
        for name in ("members", "composed", "global", "random")
    }


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, state in one.items():
        for key, value in state.items():
            assert torch.equal(value, other[name][key]), f"{name}: {key}"


def test_a_training_leaves_weights_figures_and_a_summary(digits, tmp_path, capsys):
    out = tmp_path / "out"
    pairs = [f"{key}={json.dumps(value)}" for key, value in {**SHORT, "batch": 20, "seeds": [0, 3]}.items()]
    settings = [part for pair in pairs for part in ("--set", pair)]
    assert main(["train", "--data", digits, "--preset", "quick", "--out", str(out), *settings]) == 0
    shown = capsys.readouterr().err
    assert "GNet-T-trained" in shown and "images/s" in shown
    result = json.loads((out / "result.json").read_text())
    assert [run["seed"] for run in result["runs"]] == [0, 3] and result["K"] == 4
    for run in result["runs"]:
        assert [len(run[name]["accuracy"]) for name in ("members", "global", "random")] == [2, 1, 3]
        assert len(run["members"]["accuracy"][-1]) == 4 and run["members"]["images"] == [96, 192]
    for picture in ("accuracy.png", "times.png", "features.png", "cam.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG"), picture
        assert picture in (out / "summary.md").read_text()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["phase"] for line in lines} == {"members", "global", "random"}
    assert [line["step"] for line in lines if line["seed"] == 3 and line["phase"] == "random" and "epoch" in line] == [
        5,
        10,
        15,
    ]
    net = decompk.models.vgg8(input_size=(1, 16, 16))
    for name in ("composed", "global", "random"):
        net.load_state_dict(torch.load(out / "seed3" / f"{name}.pt", weights_only=True))
    assert not (weights(out)["composed"]["features.3.weight"][:4, 4:] != 0).any()


def test_members_trained_here_are_those_trained_alone_by_hand(digits, tmp_path):
    """K = 4 separate trainings, with torch's own optimizer and nothing of ours but the order of the images."""
    recipe = small(exact=True, augment__flip=True, random=False)
    train.train(recipe, digits, tmp_path / "out", report=False)
    data = train.open_data(digits)
    d = decompk.decompose(algorithm.build_model(recipe, data, 0), data.input_size, 4)
    found = weights_of_members(tmp_path / "out")
    for k, member in enumerate(d.subnets([train.data.seed_of(0, k) for k in range(4)])):
        member.to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(member.parameters(), 3e-3, fused=True)
        for epoch in range(2):
            order = train.epoch_order(len(data.train), 20, 0, epoch)
            for i, (x, y) in enumerate(data.train.batches(order, "cpu")):
                x = train.normalise(recipe.augment(x, train.data.seed_of(0, 0, epoch, i)), data.mean)
                optimizer.zero_grad()
                nn.functional.cross_entropy(member(d.crops[k].cut(x)), y).backward()
                optimizer.step()
        for name, value in member.state_dict().items():
            assert torch.equal(found[name][k], value), f"member {k}: {name}"


def test_the_demo_is_a_training_by_the_quick_preset_and_is_not_done_twice(tmp_path, capsys, monkeypatch):
    plain = train.open_data
    monkeypatch.setattr(algorithm, "open_data", lambda *given: plain("digits", size=16))
    command = ["demo", "--epochs", "2,1", "--seed", "4", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [len(result["runs"][0][phase]["epoch"]) for phase in ("members", "global", "random")] == [2, 1, 3]
    assert result["runs"][0]["seed"] == 4 and "SNet-4" in capsys.readouterr().err
    assert main(command) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["runs"] == result["runs"]
    assert capsys.readouterr().err.count("trained before") == 3


def test_members_train_fused_to_the_weights_of_the_packed_ones_and_packed_where_they_cannot(digits, tmp_path, capsys):
    seen = []
    with mock.patch.object(loop, "fuse", side_effect=lambda net: seen.append(net) or decompk.fuse(net)):
        for name, changes in {"fused": {}, "packed": {"fuse": False}, "exact": {"exact": True}}.items():
            train.train(small(random=False, **changes), digits, tmp_path / name, report=False)
    assert len(seen) == 1
    fused, plain = (weights_of_members(tmp_path / name) for name in ("fused", "packed"))
    assert fused.keys() == plain.keys()
    for key, value in fused.items():
        assert torch.allclose(value, plain[key], rtol=1e-3, atol=1e-5), key
    with mock.patch.object(loop, "fuse", side_effect=UnsupportedOperation("torch.fx cannot trace it.")):
        train.train(small(random=False), digits, tmp_path / "refused", report=False)
    assert capsys.readouterr().err.count("members: not fused: torch.fx cannot trace it.") == 1
    assert_same_bits({"members": weights_of_members(tmp_path / "refused")}, {"members": plain})


def test_theorem_2_2_holds_for_trained_members_that_can_see_whole_images(digits, tmp_path, capsys):
    recipe = small(random=False, model="resnet8", crop=10)
    found = train.train(recipe, digits, tmp_path / "out", report=False)["theorem_2_2"]
    assert found["violation"] < 1e-9 and found["lost"] == 0 and found["loss"] <= found["bound"]
    assert "Theorem 2.2" in capsys.readouterr().err
    assert train.train(small(random=False), digits, tmp_path / "other", report=False)["theorem_2_2"] is None


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--epochs", "1,1", "--out", str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err
    assert "cannot be made" in said and "Traceback" not in said


def weights_of_members(out):
    return torch.load(out / "seed0" / "members.pt", weights_only=True)


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_two_epochs_of_digits_give_packed_members_the_weights_of_separate_trainings(kind):
    """Float32: to the bit in the "loop" backend."""
    data = train.open_data("digits", size=16)
    torch.manual_seed(0)
    d = decompk.decompose(decompk.models.vgg8(input_size=(1, 16, 16)), data.input_size, 4)
    members = d.subnets(seed=0)
    packed = decompk.pack(members, d.crops).to(memory_format=torch.channels_last)
    together = getattr(optim, kind)(packed, lr=[0.01, 0.02, 0.03, 0.04])
    alone = []
    for k, member in enumerate(members):
        member.to(memory_format=torch.channels_last)
        alone.append(getattr(torch.optim, kind)(member.parameters(), lr=0.01 * (k + 1), fused=True))
    with decompk.backend("loop"):
        for epoch in range(2):
            for x, y in data.train.batches(train.epoch_order(len(data.train), 64, 0, epoch), "cpu"):
                x = train.normalise(x, data.mean)
                together.zero_grad()
                losses.cross_entropy(packed(x), y).backward()
                together.step()
                for member, optimizer, crop in zip(members, alone, d.crops, strict=True):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(member(crop.cut(x)), y).backward()
                    optimizer.step()
    for k, member in enumerate(members):
        for name, value in member.state_dict().items():
            error = (packed.state_dict()[name][k] - value).double().norm() / value.double().norm()
            assert error <= 1e-6, f"member {k}: {name} differs by {error:.1e}"


KILLS = 10
LIVES = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from decompk import train

data, folder, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
recipe = train.load_recipe("quick", changes=CHANGES)
train.train(recipe, data, folder / "whole", report=False)  # never killed; and every life below starts warm
out = folder / "killed"
chance = random.Random(seed)

def live():
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stderr = open(os.devnull, "w")
            train.train(recipe, data, out, resume=True, report=False)
            code = 0
        finally:
            os._exit(code)
    return child

def position():  # checkpoints written so far, over all phases
    found = 0
    for phase, steps in (("members", 10), ("global", 5), ("random", 15)):
        last = [int(p.stem[5:]) for p in (out / "seed0" / phase).glob("step-*.ckpt")]
        if not last:
            return found, phase
        found += max(last)
        if max(last) < steps:
            return found, phase
    return found, "end"

killed = []
targets = sorted(chance.randrange(0, 30) for _ in range(KILLS))
for target in targets:
    child = live()
    while position()[0] < target:
        time.sleep(0.001)
        done, status = os.waitpid(child, os.WNOHANG)
        assert not done, f"the training ended by itself ({status})"
    time.sleep(chance.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed.append(position()[1] if os.WIFSIGNALED(status) else "end")
child = live()
_, status = os.waitpid(child, 0)
assert status == 0
print(",".join(killed))
"""


def test_a_run_killed_at_ten_moments_ends_in_the_bits_of_one_never_killed(digits, tmp_path):
    changes = {**SHORT, "batch": 20, "save_steps": 1, "augment.flip": True, "members.plateau": 1, "log_seconds": 0.0}
    script = LIVES.replace("CHANGES", repr(changes)).replace("KILLS", str(KILLS))
    command = [sys.executable, "-c", script, digits, str(tmp_path), "7"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    killed = done.stdout.strip().split(",")
    assert len(killed) == KILLS and {"members", "global", "random"} <= set(killed), killed
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    whole, pieces = (
        json.loads((tmp_path / name / "result.json").read_text())["runs"][0] for name in ("whole", "killed")
    )
    for phase in ("members", "global", "random"):
        for run in (whole, pieces):
            del run[phase]["seconds"], run[phase]["once_seconds"]
    assert whole == pieces
    lines = {name: (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")}
    steps = {name: [(r["phase"], r["step"], "epoch" in r) for r in map(json.loads, lines[name])] for name in lines}
    assert steps["whole"] == steps["killed"]


@pytest.mark.parametrize("file", ["members.pt", "members.ckpt"])
def test_a_phase_that_is_cut_off_while_its_results_are_written_leaves_all_of_them_in_the_end(digits, tmp_path, file):
    recipe, write = small(random=False), checkpoint.write_atomically

    def cut_off(path, *content):
        if path.name == file:
            raise KeyboardInterrupt
        return write(path, *content)

    places = [mock.patch.object(module, "write_atomically", cut_off) for module in (algorithm, checkpoint)]
    with places[0], places[1], pytest.raises(KeyboardInterrupt):
        train.train(recipe, digits, tmp_path / "out", report=False)
    train.train(recipe, digits, tmp_path / "out", resume=True, report=False)
    assert {path.name for path in (tmp_path / "out" / "seed0").glob("*.pt")} == {
        "members.pt",
        "composed.pt",
        "global.pt",
    }


def test_a_training_can_be_stopped_by_a_signal_and_goes_on_behind_a_checkpoint(digits, tmp_path):
    out = tmp_path / "out"
    settings = [
        f"--set={key}={json.dumps(value)}" for key, value in {**SHORT, "batch": 20, "members.epochs": 999}.items()
    ]
    command = [
        sys.executable,
        "-m",
        "decompk",
        "train",
        "--data",
        digits,
        "--preset",
        "quick",
        "--out",
        str(out),
        *settings,
    ]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    last = said.strip().splitlines()[-1]
    assert "stopped by SIGTERM in the phase 'members'" in last and "--resume" in last and "Traceback" not in said
    assert train.checkpoint.Checkpoints(out / "seed0" / "members", {}).files()


def test_a_run_killed_between_a_phases_last_checkpoint_and_its_end_goes_on_there(digits, trained):
    recipe, out = small(random=False), trained("plain")
    before = {name: torch.load(out / "seed0" / f"{name}.pt", weights_only=True) for name in ("members", "global")}
    for name in before:
        (out / "seed0" / f"{name}.ckpt").unlink()
        (out / "seed0" / f"{name}.pt").unlink()
    train.train(recipe, digits, out, resume=True, report=False)
    assert_same_bits(before, {n: torch.load(out / "seed0" / f"{n}.pt", weights_only=True) for n in before})


def test_a_folder_that_holds_a_training_is_neither_overwritten_nor_resumed_as_another(digits, trained, tmp_path):
    out = trained("plain")
    before = weights_of_members(out)
    with pytest.raises(CheckpointError, match=r"holds a training already: go on with --resume"):
        train.train(small(random=False), digits, out, report=False)
    with pytest.raises(CheckpointError, match=r"its members\.epochs is 2, here it is 3; resume with its own settings"):
        train.train(small(random=False, members__epochs=3), digits, out, resume=True, report=False)
    data = dict(np.load(digits))
    np.savez(tmp_path / "other.npz", **{**data, "y_train": data["y_train"][::-1]})
    with pytest.raises(CheckpointError, match=r"holds another training: its (data|fingerprint) is"):
        train.train(small(random=False), str(tmp_path / "other.npz"), out, resume=True, report=False)
    known = json.loads((out / "run.json").read_text())
    for text in ("{", "[" * 10**5, *(json.dumps({**known, key: 5}) for key in ("data", "recipe", "identity"))):
        (out / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"run\.json cannot be read"):
            train.train(small(random=False), digits, out, resume=True, report=False)
    assert all(torch.equal(before[key], value) for key, value in weights_of_members(out).items())


def test_a_start_that_failed_over_its_recipe_leaves_the_folder_free(digits, tmp_path):
    out = tmp_path / "out"
    for wrong in ({"members__lr": [1e-3, 2e-3]}, {"crop": 99}, {"model": "nope"}):
        with pytest.raises(DecompkError, match=r"2 values for 4 members|does not fit|no model is called"):
            train.train(small(**wrong), digits, out, report=False)
    train.train(small(random=False), digits, out, report=False)


def test_a_network_whose_code_has_changed_is_not_resumed(digits, trained, monkeypatch):
    out, recipe = trained("plain"), small(random=False)
    wider = decompk.models.vgg8(input_size=(1, 16, 16), width=32)
    monkeypatch.setattr(algorithm, "build_model", lambda *given: wider)
    (out / "seed0" / "members.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"is of another run: its network is"):
        train.train(recipe, digits, out, resume=True, report=False)


def test_a_bare_resume_reads_recipe_and_data_from_the_folder_and_may_add_seeds(trained):
    out = trained("plain")
    assert main(["train", "--out", str(out), "--resume", "--seeds", "0,1"]) == 0
    result = json.loads((out / "result.json").read_text())
    assert [run["seed"] for run in result["runs"]] == [0, 1] and result["runs"][1]["random"] is None
    assert json.loads((out / "run.json").read_text())["recipe"]["seeds"] == [0, 1]


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped bit":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "foreign":
        torch.save({"model": nn.Linear(2, 2)}, path)
    elif how == "another run's":
        state = checkpoint.load(content[len(checkpoint.MAGIC) :].partition(b"\n")[2])
        head = json.loads(content[len(checkpoint.MAGIC) :].partition(b"\n")[0])
        checkpoint.write(path, state, {**head["run"], "members.lr": 1.0})
    elif how == "code":
        head = json.loads(content[len(checkpoint.MAGIC) :].partition(b"\n")[0])
        checkpoint.write(path, {"model": Boom()}, head["run"])


class Boom:
    def __reduce__(self):
        return (os.system, ("touch boom",))


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("truncated", "is truncated"),
        ("empty", "is empty"),
        ("flipped bit", "is damaged"),
        ("foreign", "is no checkpoint of decompk"),
        ("another run's", "is of another run: its members.lr is 1.0, here it is 0.003"),
        ("code", "holds more than tensors and plain values"),
    ],
)
def test_a_bad_checkpoint_is_refused_by_name_and_the_one_before_it_used(
    how, sentence, digits, trainings, trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    recipe, whole, out = small(random=False, save_steps=3), trainings / "saved", trained("killed")
    (out / "seed0" / "members.ckpt").unlink()
    newest = max((out / "seed0" / "members").glob("step-*.ckpt"))
    damage(newest, how)
    capsys.readouterr()
    train.train(recipe, digits, out, resume=True, report=False)
    said = capsys.readouterr().err
    assert f"checkpoint refused: {newest.name} {sentence}" in said and "going on in epoch 2" in said
    assert not (tmp_path / "boom").exists()
    for name in ("members", "composed", "global"):
        one, other = (torch.load(o / "seed0" / f"{name}.pt", weights_only=True) for o in (whole, out))
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_a_damaged_head_of_a_checkpoint_is_named(tmp_path):
    sizes = (f'{{"sha256": 1, "bytes": {size}, "run": {{}}}}' for size in ("[]", "1e999"))
    for head in ("", "null", "[" * 10**5, "{}", *sizes):
        (tmp_path / "step-1.ckpt").write_bytes(checkpoint.MAGIC + head.encode() + b"\n")
        with pytest.raises(CheckpointError, match=r"step-1\.ckpt has a damaged head"):
            checkpoint.read(tmp_path / "step-1.ckpt", {})


def test_with_no_usable_checkpoint_left_nothing_is_thrown_away(digits, trained):
    recipe, out = small(random=False, save_steps=3), trained("saved")
    (out / "seed0" / "members.ckpt").unlink()
    for path in (out / "seed0" / "members").glob("step-*.ckpt"):
        damage(path, "truncated")
    files = sorted(path.name for path in (out / "seed0" / "members").iterdir())
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .* is truncated.* is truncated"):
        train.train(recipe, digits, out, resume=True, report=False)
    assert sorted(path.name for path in (out / "seed0" / "members").iterdir()) == files


def test_a_full_disk_ends_in_one_sentence_and_the_checkpoint_before_stays_whole(digits, tmp_path, monkeypatch, capsys):
    out, before = tmp_path / "out", os.fsync
    written = []

    def full(descriptor):
        written.append(descriptor)
        if len(written) > 12:
            raise OSError(28, "No space left on device")
        before(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    settings = [f"--set={key}={json.dumps(value)}" for key, value in {**SHORT, "batch": 20, "save_steps": 1}.items()]
    assert main(["train", "--data", digits, "--preset", "quick", "--out", str(out), *settings]) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said.splitlines()[-1] and "--resume" in said.splitlines()[-1]
    assert not list(out.rglob("*.part"))
    kept = train.checkpoint.Checkpoints(out / "seed0" / "members", {}).files()
    assert kept and all(checkpoint.MAGIC in path.read_bytes()[:40] for path in kept)
    monkeypatch.undo()
    assert main(["train", "--out", str(out), "--resume", "--set", "save_steps=0"]) == 0


def test_a_loss_that_is_not_finite_names_the_member_and_leaves_the_last_checkpoint(digits, tmp_path):
    recipe = small(random=False, members__optimizer="sgd", members__lr=[0.01, 0.01, 1e30, 0.01], save_steps=1)
    with pytest.raises(DecompkError, match=r"(loss of member 2 became (nan|inf)|is no longer finite).*lower its lr"):
        train.train(recipe, digits, tmp_path / "out", report=False)
    for path in (tmp_path / "out" / "seed0" / "members").glob("step-*.ckpt"):
        state = checkpoint.load(path.read_bytes()[len(checkpoint.MAGIC) :].partition(b"\n")[2])
        assert all(t.isfinite().all() for t in state["model"].values() if t.is_floating_point())


def test_one_loader_serves_all_members_so_that_each_file_is_read_once_an_epoch(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 12), ("test", 4)):
        for label in ("a", "b"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for i in range(count // 2):
                pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
                image.fromarray(pixels).save(tmp_path / "data" / split / label / f"{i}.png")
    opened, plain = [], image.open
    monkeypatch.setattr(image, "open", lambda *arguments: (opened.append(1), plain(*arguments))[1])
    read = []
    for parts in (1, 4):
        recipe = small(random=False, partitions=parts, size=16, global__epochs=0, batch=4)
        opened.clear()
        train.train(recipe, str(tmp_path / "data"), tmp_path / f"out{parts}", report=False)
        read.append(len(opened))
    assert read[0] == read[1] > 2 * 12


def test_a_stopped_member_stands_still_while_the_others_go_on(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(
        train.Schedule, "observe", lambda self, accuracy: [2] if self.rates(0) and len(accuracy) == 4 else []
    )
    result = train.train(small(random=False, members__epochs=4), digits, tmp_path / "out", report=False)
    losses = np.array(result["runs"][0]["members"]["test_loss"])
    assert (losses[:, 2] == losses[0, 2]).all()
    assert all(len(set(losses[:, k])) == 4 for k in (0, 1, 3))


def test_a_training_holds_no_more_after_many_steps_than_after_a_few(digits):
    data = train.open_data(digits)
    packed = decompk.grouped_subnets(decompk.models.vgg8(input_size=(1, 16, 16)), (1, 16, 16), seed=0)
    step = train.Step(packed, optim.Adam(packed, lr=1e-3))

    def held():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
        return len(tensors), sum(t.numel() for t in tensors)

    counts = []
    for _ in range(3):
        for _ in range(10):
            for x, y in data.train.batches(train.epoch_order(96, 20, 0, 0), "cpu"):
                step(train.normalise(x, data.mean), y)
        counts.append(held())
    assert counts[0] == counts[1] == counts[2]


def test_a_resumed_run_computes_by_the_schedules_of_its_checkpoint(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("DECOMPK_MEASURE", "1")
    monkeypatch.setattr(measure, "path", lambda: tmp_path / "choices.json")
    times, measured, ran = {"in turn": 1.0}, [], []

    def time_each(call, offered):
        if len(offered) > 1:
            measured.append(schedule.kind_of(call.packed, call.x, call.shared, call.N))
        return {one.name: times.get(one.name, 2.0) for one in offered}

    monkeypatch.setattr(schedule, "time_each", time_each)
    run = schedule.InTurn.run
    monkeypatch.setattr(schedule.InTurn, "run", lambda self, call: ran.append(call.N) or run(self, call))
    recipe, whole, out = small(random=False, global__epochs=0, save_steps=2), tmp_path / "whole", tmp_path / "out"
    result = train.train(recipe, digits, whole, report=False)
    assert [kind.partition(", shared")[0] for kind in measured] == ["train, gradients", "eval, no gradients"]
    assert ran == 2 * [20, 20, 20, 20, 16, 40]
    once, seconds = (result["runs"][0]["members"][name] for name in ("once_seconds", "seconds"))
    assert once[0] == once[1] > 0 and seconds[1] > seconds[0] > 0
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["once_seconds"] == once[1]
    assert "one-time: compiling and measuring" in "".join(table.to_text() for table in summary.tables(result))

    def killed(self, *rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Fit, "_due", lambda self: killed(self) if self.steps == 7 else [False] * 3)
    (tmp_path / "choices.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        train.train(recipe, digits, out, report=False)
    monkeypatch.setattr(loop.Fit, "_due", lambda self: [False] * 3)
    (tmp_path / "choices.json").unlink()
    times["together"] = 0.5  # which a new measurement would choose
    ran.clear()
    train.train(recipe, digits, out, resume=True, report=False)
    assert len(measured) == 4 and ran == [20, 20, 20, 16, 40]
    assert_same_bits(*({"members": torch.load(o / "seed0" / "members.pt", weights_only=True)} for o in (whole, out)))
