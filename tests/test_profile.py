"""`decompk check`: measurement beside analysis, and that a wrong formula cannot pass."""

import json
import math
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import decompk
from decompk import DecompkError, models
from decompk.cli import main
from decompk.cost import walk
from decompk.cost.figures import ROLES, Exponents, total
from decompk.profile import measure, measure_roofs, roofs
from decompk.profile.claims import FAILS, HOLDS, UNCHECKED, explained, time_claim
from decompk.profile.counters import Figures, SavedTensors
from decompk.profile.law import GEOMETRY, Field, Part, expected
from decompk.profile.timing import Times

PNG = b"\x89PNG\r\n\x1a\n"


class Mixed(nn.Module):
    """In-place ReLU behind a conv and a norm, max-pool, a skip, a gate, both kinds of dropout, an average pool."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.a, self.norm = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.gate = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.pool = nn.AvgPool2d(2)
        self.drop_maps, self.drop = nn.Dropout2d(0.2), nn.Dropout(0.5)
        self.fc, self.head = nn.Linear(16 * 4 * 4, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.a(self.stem(x))), inplace=True)
        x = F.leaky_relu(self.b(x) + x, 0.1) * torch.sigmoid(self.gate(x))
        x = F.silu(self.pool(self.drop_maps(x)))
        return self.head(self.drop(F.relu(self.fc(x.flatten(1)))))


def signals():
    return nn.Sequential(
        nn.Conv1d(2, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.MaxPool1d(2),
        nn.Conv1d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(16, 4),
    )  # fmt: skip


def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


TINY = ("--model", f"{__name__}:tiny", "--input", "16", "--batch", "2", "--no-time", "--format")
NETS = {
    "resnet8": (lambda: models.build("resnet8"), (3, 32, 32), 20),
    "vgg8": (lambda: models.build("vgg8"), (3, 32, 32), None),
    "mixed": (Mixed, (3, 16, 16), None),
    "signals": (signals, (2, 64), 24),
}


def check(capsys, *arguments):
    """(exit code, the JSON or text on stdout, stderr) of `decompk check`."""
    try:
        code = main(("check", *arguments))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, json.loads(out) if "json" in arguments else out, err


def failures(result):
    return {row["claim"] for row in result["claims"]["rows"] if row["verdict"] == FAILS}


# ---- the analysis ---------------------------------------------------------------------------------------------------


def test_what_autograd_keeps_follows_its_rules_on_a_chain_counted_by_hand():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 8, 1),
        nn.MaxPool2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(128, 5),
    )  # fmt: skip
    layers = {layer.name: layer for layer in walk.layers(net, (3, 8, 8), training=True)}
    kept = {name: [(s.content, s.elements) for s in layer.saved] for name, layer in layers.items()}
    assert kept == {
        "0": [],  # the image, which is counted apart
        "1": [("sample", 4 * 64), ("vector", 4), ("vector", 4)],
        "2": [("sample", 4 * 64)],  # the next convolution keeps the same memory
        "3": [],
        "4": [("sample", 8 * 64), ("index", 8 * 16)],
        "5": [("mask", 8 * 16)],
        "7": [("sample", 8 * 16)],
    }
    whole = total(layers.values())
    assert (whole.saved_image, whole.param_tensors) == (3 * 64, 8)
    samples = 4 * (2 * 256 + 512 + 128) + 8 * 128
    assert whole.saved_bytes(batch=3) == 3 * (samples + 4 * 128) + 4 * 8
    assert whole.saved_bytes(batch=3, mask_size=1) == 3 * (samples + 128) + 4 * 8
    assert (whole + whole).saved_bytes() == 2 * whole.saved_bytes()


def test_in_evaluation_dropout_and_the_statistics_are_not_kept():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    kept = [s.content for layer in walk.layers(net, (3, 8, 8)) for s in layer.saved]
    assert kept == ["sample"]


def test_frozen_weights_keep_what_torch_keeps_for_them():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    net[1].requires_grad_(False)
    whole = total(walk.layers(net, (3, 8, 8), training=True))
    x = torch.randn(2, 3, 8, 8)
    with SavedTensors(net, x, x) as kept:
        net(x)
    assert (kept.image, kept.activations) == (x.nbytes, whole.saved_bytes(batch=2)) == (2 * 768, 2 * 4 * 2 * 4 * 64)


@pytest.mark.parametrize("name", NETS)
def test_flops_parameters_state_and_what_autograd_keeps_are_measured_as_analysed(name):
    build, size, crop = NETS[name]
    d = decompk.decompose(build(), size, 4, crop)
    profile = measure(d, batch=3, time=False)
    assert not profile.failed
    for side in ("global", "member"):
        figures = profile.sides[side]
        assert figures.measured == figures.analysed, side
        assert all(getattr(figures.measured, f.name) > 0 for f in fields(Figures))
    packed = profile.sides["packed"]
    for f in fields(Figures):
        if f.name != "saved":
            assert getattr(packed.measured, f.name) == 4 * getattr(profile.sides["member"].measured, f.name)
    timed = [layer for layer in profile.layers if layer.sides["global"].flops[0]]
    assert all(side.counted == side.flops for layer in timed for side in layer.sides.values())
    assert len(timed) == sum(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear)) for m in d.model.modules())


def test_measuring_leaves_the_model_and_the_random_state_alone():
    d = decompk.decompose(Mixed().eval(), (3, 16, 16))
    before = {name: t.clone() for name, t in d.model.state_dict().items()}
    state = torch.get_rng_state()
    measure(d, batch=2, time=False)
    assert torch.equal(torch.get_rng_state(), state) and not d.model.training
    assert all(torch.equal(t, before[name]) for name, t in d.model.state_dict().items())
    assert all(p.grad is None for p in d.model.parameters())


def test_saved_tensors_count_memory_once_without_parameters_and_the_image_apart():
    x = torch.randn(2, 3, 4, 4)
    weight = nn.Parameter(torch.randn(5, 3))
    net = nn.ParameterList([weight])
    with SavedTensors(net, x, x) as kept:
        y = x.permute(0, 2, 3, 1).reshape(-1, 3) @ weight.t()  # copies the image
        z = y.exp()  # kept as its result
        (z.view(-1) * z.view(-1)).sum()  # kept again, as views
    assert (kept.image, kept.activations) == (x.nbytes, y.nbytes)


# ---- the law --------------------------------------------------------------------------------------------------------


def test_overlap_and_margin_are_factors_of_the_expected_ratio():
    d = decompk.decompose(tiny(), (3, 40, 40), 4, 24, margin=4)
    field = Field.of(d.crops, (40, 40))
    assert field == Field(margin=32**2 / 40**2, overlap=4 * 24**2 / 32**2)
    found = {c.what: c for c in measure(d, batch=2, time=False).claims}
    claim = found["member/global: forward FLOPs, first conv"]
    assert claim.verdict == HOLDS
    assert claim.measured == pytest.approx(24**2 / 40**2 / 4)
    assert claim.explanation == "1/K² × margin 0.64 × overlap of crops 2.25"


def test_a_uniform_split_needs_no_factor_and_uneven_maps_are_named():
    found = measure(decompk.decompose(models.build("vgg8"), (3, 32, 32)), batch=2, time=False).claims
    even = {c.what: c.explanation for c in found}
    assert even["member/global: forward FLOPs, conv"] == "1/K³"
    assert even["member/global: forward FLOPs, first fc"] == "1/K³"
    assert "first layer" in even["member/global: forward FLOPs"]
    assert "bias and norm vectors" in even["member/global: parameters"]
    net = models.build("vgg8", input_size=(3, 40, 40))
    odd = {c.what: c for c in measure(decompk.decompose(net, (3, 40, 40)), batch=2, time=False).claims}
    claim = odd["member/global: forward FLOPs, first fc"]  # 5×5 pixels become 2×2
    assert claim.explanation == "1/K³ × uneven maps 0.64" and claim.measured == pytest.approx(4 / 25 / 16)


def test_the_expected_ratio_is_the_law_times_its_factors():
    parts = [
        Part(70, 3, "", {"margin": 0.5, "overlap of crops": 1.5}),
        Part(20, 2, "first layer", {"uneven maps": 1.2}),
        Part(10, None, "layers without a law in the paper", {"layers without a law in the paper": 0.3}),
    ]
    ratio = expected(parts, K=4, power=3)
    assert ratio.expected == pytest.approx((70 / 64 * 0.75 + 20 / 16 * 1.2 + 10 * 0.3) / 100)
    assert ratio.law * math.prod(ratio.factors.values()) == pytest.approx(ratio.expected)
    assert {*ratio.factors} <= {"first layer", "layers without a law in the paper", *GEOMETRY}
    assert explained(ratio).startswith("1/K³ × first layer ")


def test_every_figures_ratio_is_held_against_the_paper():
    found = measure(decompk.decompose(tiny(), (3, 16, 16)), batch=2, time=False).claims
    ratios = {c.what.removeprefix("member/global: "): c.explanation for c in found if c.what.startswith("member/g")}
    assert ratios["forward FLOPs, last fc"] == "1/K"
    assert ratios["backward FLOPs, first conv"] == "1/K²"
    assert ratios["parameters"].startswith("1/K²") and ratios["saved activations"].startswith("1/K²")


# ---- wrong formulas fail --------------------------------------------------------------------------------------------


def one_channel_more(positions, c_in, c_out, kernel, groups=1):
    return positions * (c_in // groups + 1) * math.prod(kernel) * c_out


WRONG = {
    "a convolution counts one channel too many": (
        lambda m: m.setattr(walk, "conv_macs", one_channel_more),
        {
            "global: forward FLOPs",
            "member: backward FLOPs",
            "packed: FLOPs of each layer alone",
            "global: forward MACs",
        },
    ),
    "ReLU is said to keep its operand": (
        lambda m: m.setattr(walk, "KEEP_RESULT", ()),
        {"global: saved activations, bytes", "member: saved activations, bytes", "packed: saved activations, bytes"},
    ),
    "the indices of max-pooling are forgotten": (
        lambda m: m.setattr(walk, "KEEP_STATISTICS", ("batch_norm",)),
        {"global: saved activations, bytes"},
    ),
    "Adam is said to have one moment": (
        lambda m: m.setattr("decompk.profile.counters.adam_bytes", lambda params, tensors, size: size * params),
        {"global: Adam's state, bytes", "packed: Adam's state, bytes"},
    ),
    "the FLOPs' power of convolutions": (
        lambda m: m.setitem(ROLES, "conv", Exponents(2, 2, 2)),
        {"member/global: forward FLOPs", "member/global: forward FLOPs, conv", "member/global: backward FLOPs, conv"},
    ),
    "the FLOPs' power of the first layer": (
        lambda m: m.setitem(ROLES, "first conv", Exponents(3, 1, 2)),
        {"member/global: forward FLOPs", "member/global: forward FLOPs, first conv"},
    ),
    "the weights' power": (
        lambda m: m.setitem(ROLES, "conv", Exponents(3, 3, 2)),
        {"member/global: parameters"},
    ),
    "the activations' power": (
        lambda m: m.setitem(ROLES, "conv", Exponents(3, 2, 1)),
        {"member/global: saved activations"},
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_formula_exits_1_and_names_the_claim(wrong, capsys, monkeypatch):
    spoil, named = WRONG[wrong]
    spoil(monkeypatch)
    code, result, _ = check(capsys, *TINY, "json")
    assert code == 1 and named <= failures(result)
    assert result["failed"] == len(failures(result))
    others = {name.partition(":")[0] for name in failures(result) - named}
    assert "power" not in wrong or others <= {"member/global"}


def test_a_packed_module_that_does_more_than_its_members_fails(monkeypatch):
    from decompk.profile import measurement

    def twice(d, *arguments):
        networks = build(d, *arguments)
        net = networks["packed"].job[0][0]
        net.register_forward_hook(lambda module, args, out: out + module._inner(module._cut(args[0])).view_as(out))
        return networks

    build = measurement.build
    monkeypatch.setattr(measurement, "build", twice)
    profile = measure(decompk.decompose(tiny(), (3, 16, 16)), batch=2, time=False)
    failed = {c.what for c in profile.failed}
    assert "packed = 4 × member: forward FLOPs" in failed
    assert "packed = 4 × member: saved activations, bytes" in failed
    assert "packed = 4 × member: parameter bytes" not in failed


def test_a_packed_step_slower_than_the_global_one_beyond_its_spread_fails():
    whole = Times([1.0, 1.1, 1.2], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0])
    assert time_claim(whole, Times([0.5] * 3, [0.5] * 3, [0.5] * 3)).verdict == HOLDS
    near, far = Times([3.15] * 3, [0.0] * 3, [0.0] * 3), Times([3.3] * 3, [0.0] * 3, [0.0] * 3)
    assert time_claim(whole, near).verdict == HOLDS
    assert time_claim(whole, far).verdict == FAILS


# ---- times, roofs, files --------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(roofs, "LARGE", {"cpu": 2**22})
    monkeypatch.setattr(roofs, "ENOUGH", 1e-3)
    monkeypatch.setitem(measure.__kwdefaults__, "seconds", 0.0)


def test_roofs_are_positive_finite_and_bind_by_whichever_is_slower(quick):
    found = measure_roofs("cpu")
    figures = [found.bandwidth, found.cached_bandwidth, *found.rates.values()]
    assert all(math.isfinite(f) and f > 0 for f in figures)
    assert {*found.rates} == {"float32", "bfloat16"}
    made = roofs.Roofs("made up", bandwidth=10.0, cached_bandwidth=20.0, cached_bytes=1, rates={"float32": 100.0})
    assert made.seconds(50, 100, "float32") == 5 and made.seconds(10, 1000, "float32") == 10
    assert made.ridge("float32") == 10


def test_a_timed_check_writes_times_a_picture_and_a_trace(quick, capsys, tmp_path):
    plot, trace = tmp_path / "roof.png", tmp_path / "trace.json"
    files = ("--plot", str(plot), "--trace", str(trace))
    code, result, err = check(capsys, *(a for a in TINY if a != "--no-time"), "json", *files)
    slow = {"packed training step ≤ global's, s"}  # on a busy machine
    assert failures(result) <= slow and code == bool(failures(result)) and err == ""
    rows = {row["network"]: row for row in result["time"]["rows"]}
    assert {*rows} == {"global", "members in turn", "packed"}
    assert all(row["step ms"] > 0 and row["% of roof forward"] > 0 for row in rows.values())
    layers = {row["layer"]: row for row in result["layers"]["rows"]}
    assert all(layers["0"][f"{side} {p} s"] > 0 for side in ("global", "packed") for p in ("forward", "backward"))
    assert result["roofs"]["bandwidth"] > 0
    assert plot.read_bytes().startswith(PNG)
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"forward", "backward", "update"} <= names and any("conv" in str(name).lower() for name in names)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_every_format_shows_the_verdicts_and_json_is_alone_on_stdout(capsys):
    arguments = ("--partitions", "2x2", "--crop", "10", *TINY)
    code, result, err = check(capsys, *arguments, "json")
    assert code == 0 and err == "" and not failures(result)
    assert result["failed"] == 0 and "time" not in result and len(result["claims"]["rows"]) > 30
    code, out, err = check(capsys, *arguments, "table")
    assert code == 0 and err == "" and max(map(len, out.splitlines())) <= 120
    assert "0 fail" in out and "overlap of crops" in out
    _, out, _ = check(capsys, *arguments, "csv")
    assert len(out.splitlines()) == len(result["claims"]["rows"]) + 1
    _, out, _ = check(capsys, *arguments, "md")
    assert "| --- |" in out and "### " in out


def test_without_fvcore_its_claims_are_not_checked_and_nothing_fails(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    code, result, _ = check(capsys, *TINY, "json")
    rows = [row for row in result["claims"]["rows"] if row["claim"].endswith("forward MACs")]
    assert code == 0 and [row["verdict"] for row in rows] == [UNCHECKED] * 2
    assert all("not installed" in row["explanation"] for row in rows)


MISTAKES = {
    "no samples": (("--batch", "0"), "batch of 0"),
    "one value a channel": (("--batch", "1", "--input", "8"), "batch"),
    "a plot without times": (("--no-time", "--plot", "roof.png"), "--no-time"),
    "a plot into nowhere": (("--plot", "no/such/folder/roof.png"), "--plot"),
    "a trace into a folder": (("--trace", "."), "--trace"),
    "unknown model": (("--model", "resnet5"), "resnet5"),
    "channels that do not divide": (("--partitions", "1x5"), "5"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_in_one_sentence_and_exit_code_2(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, words = MISTAKES[case]
    code, out, err = check(capsys, "--model", "resnet8", *arguments)
    assert code == 2 and out == "" and words in err
    assert err.startswith("decompk: ") and err.endswith(".\n") and err.count("\n") == 1


def test_what_cannot_be_measured_is_refused_by_name():
    with torch.device("meta"):
        d = decompk.decompose(models.build("resnet8"), (3, 32, 32))
    with pytest.raises(DecompkError, match="meta device"):
        measure(d)
    d = decompk.decompose(models.build("resnet8"), (3, 32, 32))
    with pytest.raises(DecompkError, match="float16"):
        measure(d, dtype=torch.float16)


def test_bfloat16_halves_every_byte_but_the_indices_and_step_counts():
    d = decompk.decompose(tiny(), (3, 16, 16))
    half, full = (measure(d, batch=2, dtype=t, time=False) for t in (torch.bfloat16, torch.float32))
    assert not half.failed
    ours, theirs = half.sides["global"].measured, full.sides["global"].measured
    assert (2 * ours.parameters, ours.forward_flops) == (theirs.parameters, theirs.forward_flops)


def test_profiling_loads_neither_matplotlib_nor_fvcore():
    code = "import sys, decompk.profile; assert not {'matplotlib', 'fvcore'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
