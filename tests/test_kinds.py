"""Every kind of network of section 2.4: there and back, packed like alone, its theorem and its bound."""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors
from torch import nn

import decompk
from decompk import losses, models, theory
from decompk.crops import Crop, Indices
from decompk.demos.kinds import QUADRANTS
from decompk.divide.compose import tensors
from decompk.errors import DecompkError, PartitionError, UnsupportedOperation
from decompk.packed import recurrent


class Sum(nn.Module):
    """A vector with a residual around it: its features and the hidden ones have one owner each."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.a, self.b, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.norm(x)
        return self.head(x + self.b(torch.relu(self.a(x))))


class States(nn.Module):
    """What users do with the last states of a deep, bidirectional LSTM."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.rnn = nn.LSTM(16, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        y, (h, c) = self.rnn(self.embed(x))
        return self.head(torch.cat((h[-2], h[-1], y.mean(1)), 1) + torch.cat((c[-2], c[0], y[:, 0]), 1))


class Denoiser(nn.Module):
    """The image minus what a convolutional auto-encoder takes for noise."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 8, 3), nn.ConvTranspose2d(8, 1, 3)

    def forward(self, x):
        return x - torch.tanh(self.up(torch.relu(self.down(x))))


@dataclass
class Kind:
    build: Any
    size: tuple[int, ...]
    partitions: Any = 4
    head: str = "sum"
    crop: Any = None
    exact: bool = True  # composed(x) is what the members' outputs come to, not only inside fields


BOX = (18, 20, 20)
KINDS = {
    "fc": Kind(partial(models.mlp, 64, 10, (32, 16)), (64,)),
    "fc, index sets": Kind(partial(models.mlp, 64, 10, (32, 16)), (64,), QUADRANTS),
    "fc, residual": Kind(Sum, (16,), [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]),
    "linear regression": Kind(partial(models.mlp, 12, 2, ()), (12,), 3, "mean"),
    "regression": Kind(partial(models.mlp, 10, 1, (16,)), (10,), 2, "mean"),
    "auto-encoder": Kind(partial(models.autoencoder, 64, (32, 8, 32)), (64,), 4, "concat"),
    "auto-encoder, index sets": Kind(partial(models.autoencoder, 64, (32, 8, 32)), (64,), QUADRANTS, "concat"),
    "auto-encoder, strided": Kind(partial(models.conv_autoencoder, 2, 8), (2, 16, 16), 4, "concat"),
    "auto-encoder, valid": Kind(Denoiser, (1, 12, 12), 4, "concat", exact=False),
    "signal": Kind(partial(models.signal_cnn, 2, 5, 4, 72), (2, 72), 4, crop=24),
    "signal, mean": Kind(partial(models.signal_cnn, 1, 3, 3, 60), (1, 60), 3, "mean", crop=20),
    "volume": Kind(partial(models.volume_cnn, 1, 4, 8, (36, 36, 36)), (1, 36, 36, 36), 8, crop=20),
    "volume, grid": Kind(partial(models.volume_cnn, 1, 4, 4, (18, 36, 36)), (1, 18, 36, 36), (1, 2, 2), crop=BOX),
    "elman": Kind(partial(models.Elman, 8, 10, 16), (6, 8)),
    "elman, mean": Kind(partial(models.Elman, 8, 2, 16), (6, 8), [[0, 7], [1, 6], [2, 5], [3, 4]], "mean"),
    "rnn": Kind(partial(models.Recurrent, 8, 3, 8, "RNN", nonlinearity="relu", bias=False), (5, 8), 2),
    "gru": Kind(partial(models.Recurrent, 8, 3, 8, num_layers=3, bidirectional=True), (5, 8)),
    "gru, no bias": Kind(partial(models.Recurrent, 8, 3, 8, bias=False), (5, 8)),
    "lstm": Kind(States, (5, 8)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _steps_together(monkeypatch):
    """float64 members would run in turn, and agree to the bit with what they are compared to."""
    monkeypatch.setattr(recurrent, "recurrent_form", lambda *_: "together")


def made(name):
    kind = KINDS[name]
    torch.manual_seed(0)
    net = kind.build().double()
    d = decompk.decompose(net, kind.size, kind.partitions, kind.crop, head=kind.head)
    return kind, d, torch.randn(5, *kind.size, dtype=torch.float64)


def trained(kind, d, x, steps=5):
    """Members after `steps` of Adam in one packed module, and alone: (packed, members)."""
    members = d.subnets(seed=0)
    packed = decompk.pack(members, d.crops, input_dims=x.dim())
    together = torch.optim.Adam(packed.parameters(), 1e-2)
    alone = [torch.optim.Adam(member.parameters(), 1e-2) for member in members]
    auto = kind.head == "concat"
    shape = members[0].eval()(d.split(x)[0]).shape
    members[0].train()
    for _ in range(steps):
        target = torch.stack(d.split(x)) if auto else torch.randn(shape, dtype=x.dtype)
        together.zero_grad()
        losses.mse(packed(x), target).backward()
        together.step()
        for k, (member, part) in enumerate(zip(members, d.split(x), strict=True)):
            alone[k].zero_grad()
            nn.functional.mse_loss(member(part), target[k] if auto else target).backward()
            alone[k].step()
    return packed, members


@pytest.mark.parametrize("name", KINDS)
def test_packed_members_train_as_they_would_alone(name):
    kind, d, x = made(name)
    packed, members = trained(kind, d, x)
    assert_same_tensors(packed, members, 1e-8)
    assert "member by member" not in packed.describe()
    for member, other in zip(members, packed.unpack(), strict=True):
        part = d.crops[0].cut(x)
        torch.testing.assert_close(member(part), other(part), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", KINDS)
def test_extract_undoes_compose_to_the_bit(name):
    """But for a head's bias: composition adds up K of them, of which only the sum, or the mean, comes back."""
    kind, d, _ = made(name)
    members = d.subnets(seed=0)
    composed = d.compose(members, kind.head)
    again = d.extract(composed, *([kind.head] if kind.head == "mean" else []))
    joined = set() if kind.head == "concat" else d.division.summed
    assert len(joined) == (kind.head != "concat")
    for member, back in zip(members, again, strict=True):
        for key in tensors(member).keys() - joined:
            tolerance = 1e-15 if kind.head == "mean" and d.K == 3 else 0  # a third has no exact inverse
            torch.testing.assert_close(tensors(back)[key], tensors(member)[key], rtol=0, atol=tolerance, msg=key)
    for key in joined:
        total = sum(tensors(back)[key] for back in again) / (d.K if kind.head == "mean" else 1)
        torch.testing.assert_close(total, tensors(composed)[key], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", KINDS)
def test_the_composed_network_is_its_trained_members(name):
    kind, d, x = made(name)
    _, members = trained(kind, d, x)
    composed = d.compose(members, kind.head)
    check = theory.theorem_2_1(d, members, composed, x, kind.head)
    assert check.violation < 1e-12
    assert any(layer.field is not None for layer in check.layers) or name == "linear regression"
    assert (check.output is not None and check.output < 1e-12) if kind.exact else check.output is None
    assert composed(x).shape == d.model(x).shape

    with torch.no_grad():  # a planted violation: one weight between two members
        weights = [t for n, t in tensors(composed).items() if t.dim() > 1 and n in d.division.places]
        weight = next((t for t in weights if (t == 0).any()), weights[0])
        weight[tuple((weight == weight.abs().min()).nonzero()[0])] += 0.5
        assert theory.theorem_2_1(d, members, composed, x, kind.head).violation > 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_reports_fusion_and_zero_skipping_take_every_kind(name):
    kind, d, x = made(name)
    members = d.subnets(seed=0)
    ratio = d.report().totals["ratio"]
    assert 0 < ratio["macs"] <= 1 / d.K and 0 < ratio["params"] < 1
    assert type(d.model).__name__ in str(d.report())
    composed = d.compose(members, kind.head)
    fast = decompk.block_diagonal(composed, kind.size)
    packed = decompk.pack(members, d.crops, input_dims=x.dim())
    with torch.no_grad():
        torch.testing.assert_close(fast(x), composed(x), rtol=0, atol=1e-12)
        torch.testing.assert_close(decompk.fuse(packed)(x), packed(x), rtol=0, atol=1e-12)


def test_recurrent_states_are_compared_at_every_depth_and_direction():
    _, d, x = made("gru")
    members = d.subnets(seed=0)
    composed = d.compose(members)
    names = {layer.name for layer in theory.theorem_2_1(d, members, composed, x).layers}
    assert {f"recurrent.l{depth}{end}" for depth in range(3) for end in ("", "_reverse")} <= names
    with torch.no_grad():
        composed.recurrent.weight_hh_l1_reverse[0, 7] = 0.3  # acts from the second step on, and on later layers
    worst: dict[str, float] = {}
    for layer in theory.theorem_2_1(d, members, composed, x).layers:
        worst[layer.name] = max(worst.get(layer.name, 0.0), layer.violation)
    assert worst["recurrent.l0"] < 1e-12 and worst["recurrent.l1_reverse"] < 0.5
    assert max(v for n, v in worst.items() if n.startswith("recurrent.l2")) > 1e-6


@pytest.mark.parametrize("name", [n for n, kind in KINDS.items() if kind.head == "mean"])
@pytest.mark.parametrize("loss", ["mse", "mae"])
def test_regressions_composed_loss_is_at_most_the_members_mean(name, loss):
    kind, d, x = made(name)
    packed, members = trained(kind, d, x)
    outputs, target = packed(x).detach(), torch.randn_like(packed(x)[0])
    composed = d.compose(members, "mean")(x).detach()
    bound = theory.regression_bound(outputs, target, composed, loss)
    assert bound.violation < 1e-12 and 0 < bound.loss <= bound.bound + 1e-12
    assert bound.loss == pytest.approx(theory.regression_bound(outputs, target, loss=loss).loss, rel=1e-9)
    assert theory.regression_bound(outputs, target, d.compose(members, "sum")(x).detach() + 9, loss).violation > 1


@pytest.mark.parametrize("name", [n for n, kind in KINDS.items() if kind.head == "concat" and kind.exact])
def test_an_auto_encoders_error_is_at_most_the_sum_of_its_members(name):
    kind, d, x = made(name)
    packed, members = trained(kind, d, x)
    composed = d.compose(members)(x).detach()
    for part, output in zip(d.split(composed), packed(x), strict=True):
        torch.testing.assert_close(part, output, rtol=0, atol=1e-12)
    bound = theory.reconstruction_bound(d, list(packed(x).detach()), x, composed)
    assert bound.violation < 1e-12 and 0 < bound.loss <= bound.bound + 1e-12
    assert theory.reconstruction_bound(d, list(packed(x).detach()), x, composed + 9).violation > 0.1


def test_an_overlapping_auto_encoder_is_exact_only_inside_its_fields_and_still_puts_each_crop_in_its_place():
    kind, d, x = made("auto-encoder, valid")
    members = d.subnets(seed=0)
    composed = d.compose(members)
    assert composed.up.out_channels == 4
    outputs = [member(part) for member, part in zip(members, d.split(x), strict=True)]
    for k, (start, corner) in enumerate(((0, 0), (0, -1), (-1, 0), (-1, -1))):  # the corners of the image see one crop
        torch.testing.assert_close(composed(x)[..., start, corner], outputs[k][..., start, corner], rtol=0, atol=1e-12)
    losses.mse(composed(x)[None], x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in composed.parameters())
    copy.deepcopy(composed)


def test_fresh_members_have_the_law_of_the_global_network():
    net = models.Recurrent(64, 10, 256, "LSTM")
    d = decompk.decompose(net, (8, 64), 4)
    for member in d.subnets(seed=0):
        for name, p in member.named_parameters():
            whole = tensors(net)[name]
            if p.dim() > 1:
                fan_in = whole.shape[1] / p.shape[1]
                assert p.std().item() == pytest.approx(whole.std().item() * fan_in**0.5, rel=0.05), name


@pytest.mark.parametrize(("name", "middle", "flops"), [("fc", "2", 2), ("signal", "3", 3), ("volume", "3", 3)])
def test_reports_name_the_papers_powers_of_K(name, middle, flops):
    kind = KINDS[name]
    d = decompk.decompose(kind.build(), kind.size, kind.partitions)  # without overlap
    layer = d.report().layers[middle]
    assert layer["paper"]["macs"] == pytest.approx(d.K**-flops) and layer["paper"]["params"] == pytest.approx(d.K**-2)
    assert d.K**-2 <= layer["ratio"]["params"] < 1.1 * d.K**-2 + 1 / layer["global"]["params"] * d.K
    if name == "fc":
        assert layer["ratio"]["macs"] == d.K**-2
    else:  # convolutions without padding lose a border of every crop
        assert 0.3 * d.K**-flops < layer["ratio"]["macs"] < d.K**-flops
    assert "None" not in str(d.report())


CUTS = [(1, 4, 32), (1, 4, 20), (2, 4, 16), (2, 4, 20), (3, 8, 16), (3, 8, 20), (3, (1, 2, 4), (32, 20, 10))]


@pytest.mark.parametrize(("axes", "parts", "crop"), CUTS)
def test_a_cut_in_any_dimension_saves_channels_twice_and_pixels_once(axes, parts, crop):
    """Of a middle convolution: FLOPs fall by K² for the channels, times the crop's share of the pixels."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    size = (1, *(128,) * axes) if axes == 1 else (1, *(32,) * axes)
    net = nn.Sequential(conv(1, 16, 3, padding=1), conv(16, 16, 3, padding=1), conv(16, 4, 1))
    d = decompk.decompose(net, size, parts, crop)
    share = 1.0
    for whole, own in zip(size[1:], d.crops[0].size, strict=True):
        share *= own / whole
    sides = d.report().layers
    assert sides["1"]["ratio"]["macs"] == pytest.approx(share / d.K**2)
    assert sides["0"]["ratio"]["macs"] == pytest.approx(share / d.K)
    assert sides["1"]["ratio"]["activations"] == pytest.approx(share / d.K)


WRONG = [
    (dict(partitions=[[0, 1], [1, 2]]), (4,), r"overlap \(at 1\), but every feature"),
    (dict(partitions=[[0, 1], [2, 3]]), (6,), "2 of 6 inputs belong to no member"),
    (dict(partitions=[[0, 1], [2, 3, 4, 5]]), (6,), "differ in size"),
    (dict(partitions=[[0, 0], [1, 2]]), (4,), "no set of features"),
    (dict(partitions=[[0, 1], [2, 9]]), (4,), "outside an input of 4"),
    (dict(partitions=3), (16,), "1 of 16 inputs belong to no member"),
    (dict(partitions=2, crop_size=9), (16,), "overlap"),
    (dict(partitions=[[0, "a"], [1, 2]]), (4,), "index sets"),
]


@pytest.mark.parametrize(("arguments", "size", "message"), WRONG)
def test_wrong_index_sets_are_refused_in_one_sentence(arguments, size, message):
    with pytest.raises(PartitionError, match=message):
        decompk.decompose(models.mlp(size[0], 2, (24,)), size, **arguments)


def test_wrong_partitions_of_other_kinds_are_refused():
    with pytest.raises(PartitionError, match=r"0 partitions do not make a grid: give a positive number"):
        decompk.decompose(models.volume_cnn(size=(36,) * 3), (1, 36, 36, 36), 0)
    with pytest.raises(PartitionError, match="hidden state of 10 cannot be divided into 4"):
        decompk.decompose(models.Recurrent(8, 2, 10), (5, 8), 4)
    with pytest.raises(PartitionError, match="overlap .* but every part of an auto-encoder's output"):
        decompk.decompose(models.conv_autoencoder(), (1, 16, 16), 4, crop_size=12, head="concat")
    with pytest.raises(PartitionError, match="belong to no member"):
        decompk.decompose(models.conv_autoencoder(), (1, 16, 16), 4, margin=2, head="concat")
    with pytest.raises(PartitionError, match="cannot be put together"):
        decompk.decompose(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 1, 3)), (1, 12, 12), 4, head="concat")
    with pytest.raises(PartitionError, match="give crops, not index sets"):
        decompk.decompose(models.signal_cnn(), (1, 128), [range(64), range(64, 128)])
    with pytest.raises(UnsupportedOperation, match=r"input_size=\(features,\)"):
        decompk.decompose(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2)), (1, 8, 8), 4)
    with pytest.raises(UnsupportedOperation, match="proj_size"):
        projected = models.Recurrent(8, 2, 8, "LSTM", proj_size=4)
        projected.head = nn.Linear(4, 2)
        decompk.decompose(projected, (5, 8), 2)
    with pytest.raises(DecompkError, match="one kind"):
        decompk.decompose(models.mlp(4, 2, (4,)), (4,), [Crop(0, 2), Indices([2, 3])])


def test_packed_vectors_take_the_global_batch_or_parts_already_cut():
    packed = decompk.grouped_subnets(models.mlp(64, 10, (32, 16)), (64,), QUADRANTS, seed=0)
    x = torch.randn(7, 64)
    parts = torch.stack([crop.cut(x) for crop in packed.crops])
    torch.testing.assert_close(packed(x), packed(parts))
    assert packed(x).shape == (4, 7, 10)
    torch.testing.assert_close(packed.compose()(x), packed.ensemble(x))
    with pytest.raises(PartitionError):
        packed(torch.randn(7, 60))
