"""What `decompk train` says and draws of its result: tables, verdicts, figures, class activation."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from matplotlib import image as png
from torch import nn
from torch.nn import functional as F

from decompk import DecompkError, decompose
from decompk.models import cifar_resnet8
from decompk.train import figures
from decompk.train.summary import summary, tables

CROPS = [[0, 0, 20, 20], [0, 12, 20, 20], [12, 0, 20, 20], [12, 12, 20, 20]]


def made_curve(accuracy, seconds, top5=True):
    """accuracy: per epoch, a number a member; top-5 is half way from there to 100 %."""
    epochs = len(accuracy)
    return {
        "epoch": [e + 1 for e in range(epochs)],
        "loss": [[1.0] * len(row) for row in accuracy],
        "train_accuracy": accuracy,
        "accuracy": accuracy,
        "top5": [[50 + a / 2 for a in row] if top5 else None for row in accuracy],
        "test_loss": [[1.0] * len(row) for row in accuracy],
        "lr": [[1e-3] * len(row) for row in accuracy],
        "seconds": [seconds * (e + 1) for e in range(epochs)],
        "images": [100 * (e + 1) for e in range(epochs)],
    }


def made_result(seeds=1, random=True, top5=True):
    """Members end at 70, 72, 74, 76 + seed; composed 80 + seed; trained 90 + seed; from random weights 92 − seed."""
    runs = [
        {
            "seed": s,
            "members": made_curve([[50 + s] * 4, [80 + s, 72 + s, 74 + s, 60 + s], [70 + s, 72 + s, 74 + s, 76 + s]],
                                  2 + s, top5),
            "composed": {"accuracy": 80 + s, "top5": 95.0 if top5 else None, "loss": 0.5},
            "global": made_curve([[85 + s], [90 + s]], 5, top5),
            "random": made_curve([[20], [50], [93], [91], [92 - s]], 5, top5) if random else None,
        }
        for s in range(seeds)
    ]  # fmt: skip
    return {
        "title": "digits, VGG8",
        "data": {"name": "digits", "train": 1437, "test": 360, "classes": 10, "input_size": [1, 32, 32]},
        "model": "VGG8",
        "K": 4,
        "crops": CROPS,
        "batch": 64,
        "epochs": {"members": 3, "global": 2, "random": 5},
        "flops": {"members": 3e10, "global": 2e12, "random": 5e12},
        "made_with": {"command": "decompk train", "python": "3.11", "torch": "2.13", "device": "2 threads",
                      "precision": "float32"},
        "runs": runs,
    }  # fmt: skip


def rows_of(table):
    return {row[0].strip(): row[1:] for row in table.rows}


def test_one_seed_fills_table_3_3_without_a_spread():
    networks, top, claims = tables(made_result())
    rows = rows_of(networks)
    assert rows["SNet-1"] == [3, 70, None, 80, None, None, None]
    assert rows["SNet-4"][1] == 76 and rows["SNet mean"][1] == 73 and rows["SNet mean"][3] == 73
    assert rows["SNets, all 4"] == [3, None, None, None, 6, 0.03, 50]
    assert rows["GNet-T"] == [0, 80, None, None, 0, 0, None]
    assert rows["GNet-T-trained"] == [2, 90, None, 90, 10, 2, 20]
    assert rows["with its members"] == [5, None, None, None, 16, pytest.approx(2.03), None]
    assert rows["GNet-R-trained"] == [5, 92, None, 93, 25, 5, 20]
    assert rows_of(top)["GNet-T"] == [80, None, 95, None] and rows_of(top)["GNet-R-trained"] == [92, None, 96, None]
    assert "0.0300" in networks.to_text() and "5.00" in networks.to_text()


def test_three_seeds_give_means_and_sample_deviations():
    rows = rows_of(tables(made_result(3))[0])
    assert rows["SNet-2"][1:3] == [73, 1] and rows["GNet-T-trained"][1:3] == [91, 1]
    assert rows["SNets, all 4"][4] == pytest.approx(9) and rows["SNets, all 4"][6] == pytest.approx(
        (50 + 100 / 3 + 25) / 3
    )
    assert rows["GNet-R-trained"][1:4] == [91, 1, 93]


def test_verdicts_go_by_the_means_and_count_the_seeds():
    claims = rows_of(tables(made_result(3))[2])
    assert claims["composed > best member"] == ["81.00 ± 1.00", "77.00 ± 1.00", 4, "yes", "3 of 3"]
    assert claims["trained composed > composed"][2:] == [10, "yes", "3 of 3"]
    assert claims["trained composed ≥ random − 0.5 points"] == ["91.00 ± 1.00", "91.00 ± 1.00", 0, "yes", "2 of 3"]


def test_a_claim_that_fails_is_reported_as_failed():
    result = made_result(2)
    for run in result["runs"]:
        run["composed"]["accuracy"] = 76 + run["seed"]  # the best member's: not above it
        run["global"]["accuracy"][-1] = [60.0]
    claims = rows_of(tables(result)[2])
    assert claims["composed > best member"][2:] == [0, "no", "0 of 2"]
    assert claims["trained composed > composed"][3:] == ["no", "0 of 2"]
    assert claims["trained composed ≥ random − 0.5 points"][3:] == ["no", "0 of 2"]


def test_half_a_point_behind_random_still_holds_whatever_the_rounding():
    result = made_result()
    result["runs"][0]["random"]["accuracy"][-1] = [64.4]
    result["runs"][0]["global"]["accuracy"][-1] = [63.9]
    assert 63.9 - 64.4 < -0.5
    assert rows_of(tables(result)[2])["trained composed ≥ random − 0.5 points"][3:] == ["yes", "1 of 1"]


def test_what_was_not_trained_or_measured_is_left_out():
    networks, claims = tables(made_result(2, random=False, top5=False))
    assert "GNet-R-trained" not in rows_of(networks) and len(claims.rows) == 2
    result = made_result(top5=False)
    for phase in ("members", "global", "random"):
        result["runs"][0][phase]["top5"] = None
    assert len(tables(result)) == 2


def test_a_phase_without_an_epoch_is_left_out(tmp_path):
    result = made_result()
    result["runs"][0]["global"] = made_curve([], 1)
    del result["flops"]["global"]
    assert "GNet-T-trained" not in rows_of(tables(result)[0])
    figures.draw_accuracy(result, tmp_path / "a.png")
    figures.draw_times(result, tmp_path / "b.png")


def test_a_seed_that_stopped_early_keeps_its_last_values():
    result = made_result(2)
    result["runs"][1]["global"] = made_curve([[95]], 5)
    row = rows_of(tables(result)[0])["GNet-T-trained"]
    assert row[0] == 1.5 and row[1] == 92.5 and row[4] == 7.5


def test_broken_runs_are_shown_as_such(tmp_path):
    result = made_result(2)
    result["runs"][0]["members"] = made_curve([[math.nan] * 4] * 3, 2)
    result["runs"][0]["random"] = made_curve([[math.nan]] * 5, math.nan)
    claims = rows_of(tables(result)[2])
    assert claims["composed > best member"][3:] == ["no", "1 of 2"] and "nan" in summary(result, [])
    for draw in (figures.draw_accuracy, figures.draw_times):
        draw(result, tmp_path / "nan.png")
        assert_drawn(tmp_path / "nan.png")


def test_the_summary_says_what_was_done_and_embeds_the_pictures():
    text = summary(made_result(3), ["accuracy.png", "cam.png"])
    assert text.startswith("# digits, VGG8\n")
    for fact in (
        "K = 4",
        "20×20",
        "(0, 12)",
        "3 epochs",
        "seeds 0, 1, 2",
        "`decompk train`",
        "torch 2.13",
        "2 threads",
    ):
        assert fact in text, fact
    assert "| SNet-4 |" in text and "![accuracy](accuracy.png)\n\nTest accuracy" in text and "![cam](cam.png)" in text
    assert "times.png" not in text


def assert_drawn(path):
    pixels = png.imread(path)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 600
    assert pixels.std() > 0.01


@pytest.mark.parametrize(("seeds", "random", "top5"), [(1, True, True), (3, True, False), (2, False, True)])
def test_curves_and_times_are_drawn(tmp_path, seeds, random, top5):
    result = made_result(seeds, random, top5)
    figures.draw_accuracy(result, tmp_path / "accuracy.png")
    figures.draw_times(result, tmp_path / "times.png")
    assert_drawn(tmp_path / "accuracy.png")
    assert_drawn(tmp_path / "times.png")


def vgg():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 64, 16), nn.ReLU(), nn.Linear(16, 10),
    )  # fmt: skip


def resnet():
    return cifar_resnet8(10, (1, 32, 32), width=8)


def decomposed(net, crop=20):
    d = decompose(net, (1, 32, 32), 4, crop_size=crop)
    subnets = [member.eval() for member in d.subnets(seed=0)]
    composed = d.compose(subnets).eval()
    return d, subnets, composed


def state(nets):
    """All that drawing must leave alone: values, gradients, modes, hooks."""
    return [
        [
            [(name, t.clone(), t.requires_grad, t.grad) for name, t in net.state_dict(keep_vars=True).items()],
            [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()],
        ]
        for net in nets
    ]


def assert_untouched(nets, before):
    for (tensors, modes), (others, other_modes) in zip(state(nets), before, strict=True):
        assert modes == other_modes
        for (_, a, grad_a, g), (_, b, grad_b, h) in zip(tensors, others, strict=True):
            assert torch.equal(a, b) and grad_a == grad_b and g is None and h is None


@pytest.mark.parametrize("make", [vgg, resnet])
def test_all_figures_are_drawn_and_the_networks_left_as_they_were(tmp_path, make):
    d, subnets, composed = decomposed(make())
    trained = copy.deepcopy(composed)
    nets = [*subnets, composed, trained]
    before = state(nets)
    images, labels = torch.randn(6, 1, 32, 32), torch.tensor([3, 3, 1, 0, 2, 1])
    names = figures.draw_all(
        made_result(2), d, subnets, composed, trained, images, labels, [str(c) for c in range(10)], tmp_path, (0.3,)
    )
    assert names == ["accuracy.png", "times.png", "features.png", "cam.png"]
    for name in names:
        assert_drawn(tmp_path / name)
    assert_untouched(nets, before)


def test_maps_agree_on_the_fields_of_theorem_2_1():
    d, subnets, composed = decomposed(vgg())
    panels = figures.feature_panels(d, subnets, composed, torch.randn(2, 1, 32, 32))
    assert [panel.layer for panel in panels] == [
        "convolution 1 of 3, '0'", "convolution 2 of 3, '4'", "convolution 3 of 3, '7'"
    ]  # fmt: skip
    for panel in panels:
        assert all(panel.claimed) and panel.difference < 1e-5
    assert panels[0].maps[0][0].shape == (2, 2, 19, 19)  # one row and one column are lost at the cut edges
    assert panels[0].maps[0][0].min() == 0 and panels[0].maps[0][0].max() > 0.1  # behind norm and ReLU


def test_a_planted_difference_shows_in_the_panel():
    d, subnets, composed = decomposed(vgg())
    with torch.no_grad():
        composed[4].weight[0, 7] = 1.0  # between member 0 and member 3
    panels = figures.feature_panels(d, subnets, composed, torch.randn(1, 1, 32, 32))
    assert panels[0].difference < 1e-5 and panels[1].difference > 1e-2


def test_where_no_field_is_claimed_the_same_place_is_shown(tmp_path):
    d, subnets, composed = decomposed(vgg(), crop=18)  # which starts at 14: not between two positions of 4 pixels
    panels = figures.feature_panels(d, subnets, composed, torch.randn(1, 1, 32, 32))
    assert panels[1].claimed == [True] * 4 and panels[2].claimed == [True, False, False, False]
    assert panels[2].maps[3][0].shape == panels[2].maps[3][1].shape == (1, 4, 4, 4)
    assert panels[2].difference < 1e-5
    figures.draw_features(d, subnets, composed, torch.randn(2, 1, 32, 32), tmp_path / "features.png", samples=2)
    assert_drawn(tmp_path / "features.png")


class Averaged(nn.Module):
    """The paper's network for class activation, its pooling spelt as a mean that no hook could see."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


def test_class_activation_is_the_papers_formula():
    net, x, labels = Averaged().eval(), torch.randn(2, 1, 6, 6), torch.tensor([2, 0])
    seen, sure, method = figures.class_activation(net, x, labels)
    maps = F.relu(net.conv(x))
    expected = torch.stack([sum(net.fc.weight[c, n] * maps[i, n] for n in range(4)) for i, c in enumerate([2, 0])])
    assert method == "CAM"
    torch.testing.assert_close(seen, expected.detach())
    torch.testing.assert_close(sure, net(x).softmax(1)[[0, 1], labels].detach())


def test_class_activation_is_grad_cam_where_the_head_is_another():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(18, 3)).eval()
    net.requires_grad_(False)  # frozen networks are drawn too
    x, labels = torch.randn(2, 1, 3, 3), torch.tensor([1, 2])
    seen, _, method = figures.class_activation(net, x, labels)
    slopes = net[2].weight[labels].reshape(2, 2, 9).mean(2)  # the mean gradient of the score by each map
    expected = F.relu((slopes[:, :, None, None] * net[0](x)).sum(1))
    assert method == "Grad-CAM"
    torch.testing.assert_close(seen, expected)


def test_networks_without_convolutions_have_no_class_activation(tmp_path):
    net = nn.Sequential(nn.Conv1d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
    x = torch.randn(2, 1, 32)
    with pytest.raises(DecompkError, match="no 2-D convolution"):
        figures.class_activation(net, x, torch.tensor([0, 1]))
    d = decompose(net, (1, 32), 4, crop_size=10)
    subnets = d.subnets(seed=0)
    names = figures.draw_all(
        made_result(), d, subnets, d.compose(subnets), net, x, torch.tensor([0, 1]), "0123456789", tmp_path
    )
    assert names == ["accuracy.png", "times.png"]


def test_matplotlib_is_loaded_only_to_draw_and_missed_by_name(tmp_path, monkeypatch):
    code = "import sys, decompk.train.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DecompkError, match=r"pip install 'decompk\[plot\]'"):
        figures.draw_times(made_result(), tmp_path / "times.png")
