"""The demos of section 2.4's networks: their data, a short run of each, what they print and draw."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from decompk import demos
from decompk.cli import NETWORKS, main
from decompk.demos import data
from decompk.errors import DecompkError


def test_the_command_knows_every_demo():
    assert NETWORKS == ("cnn", "fc", "regression", "autoencoder", "recurrent", "signal", "volume")


@pytest.mark.parametrize("name", demos.DEMOS)
def test_a_demo_shows_members_composed_and_trained(name, tmp_path, capsys, monkeypatch):
    if name == "volume":
        few = partial(data.volumes, 160, size=28)
        monkeypatch.setitem(demos.DEMOS, name, replace(demos.DEMOS[name], samples=few))
    assert main(["demo", "--network", name, "--epochs", "1,1", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for row in ("member 0", "composed ", "composed, trained", "from random weights", "Theorem 2.1", "≤"):
        assert row in printed
    files = {path.name for path in (tmp_path / "out").iterdir()}
    nets = (f"-{net}.pt" for net in ("members", "composed", "trained", "random"))
    assert files == {name + end for end in (".md", ".png", *nets)}
    state = torch.load(tmp_path / "out" / f"{name}-composed.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state.values())


def test_a_demo_says_what_is_wrong(tmp_path, capsys):
    with pytest.raises(DecompkError, match="choose one of fc, regression"):
        demos.run("fcc", tmp_path)
    (tmp_path / "file").touch()
    assert main(["demo", "--network", "fc", "--out", str(tmp_path / "file")]) == 2
    assert "cannot be made a folder" in capsys.readouterr().err


@pytest.mark.parametrize(("make", "shape"), [(data.signals, (1, 128)), (data.volumes, (1, 20, 20, 20))])
def test_generated_data_is_the_same_every_time_and_its_classes_can_be_told_apart(make, shape):
    a, b = make(count=300), make(count=300)
    assert torch.equal(a.x_train, b.x_train) and torch.equal(a.y_test, b.y_test)
    assert a.x_train.shape == (240, *shape) and a.x_test.shape == (60, *shape)
    assert set(a.y_train.tolist()) == set(range(5)) == set(range(len(a.names)))
    quiet = make(count=300, noise=0.0)
    means = torch.stack([quiet.x_train[quiet.y_train == k].abs().mean() for k in range(5)])
    assert means.unique().numel() == 5 and torch.equal(quiet.y_train, a.y_train)
