"""The C++ kernels for CPUs, how packed layers reach them, and the choices measured between them and torch's."""

import copy
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import asked_by_operators, assert_pools_as_torch, by_form
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import decompk
from decompk import ops
from decompk.errors import BackendError
from decompk.kernels import cache as kept
from decompk.kernels import conv, cpu, measure
from decompk.kernels.choose import choose
from decompk.kernels.device import KNOWN
from decompk.kernels.problem import PASSES, Problem, key_of
from decompk.ops.norm import batch_norm_rows

FORMS = [form.name for form in conv.FORMS if form.backend == "cpu"]

if reason := cpu.why_not():
    pytest.skip(f"no C++ kernels: {reason}", allow_module_level=True)

# K, N, C, O, H, W, kernel, stride, padding
SHAPES = {
    "3×3": (2, 3, 8, 16, 7, 9, (3, 3), (1, 1), (1, 1)),
    "images": (3, 2, 3, 20, 13, 10, (7, 7), (2, 2), (3, 3)),
    "one channel": (2, 2, 1, 4, 6, 6, (3, 3), (1, 1), (1, 1)),
    "few channels": (5, 2, 4, 4, 8, 9, (3, 3), (1, 1), (1, 1)),
    "12 and 28": (2, 2, 12, 28, 5, 5, (3, 3), (1, 1), (1, 1)),
    "24 and 40, no padding": (2, 2, 24, 40, 6, 5, (3, 3), (1, 1), (0, 0)),
    "padding 2": (2, 2, 8, 8, 6, 6, (3, 3), (1, 1), (2, 2)),
    "padding 3": (2, 2, 8, 8, 4, 4, (3, 3), (1, 1), (3, 3)),
    "one pixel": (4, 3, 16, 8, 1, 1, (3, 3), (1, 1), (1, 1)),
    "many pixels": (1, 2, 8, 16, 40, 37, (3, 3), (1, 1), (1, 1)),
    "many channels": (1, 2, 128, 144, 5, 4, (3, 3), (1, 1), (1, 1)),
    "1×1": (3, 2, 16, 8, 5, 6, (1, 1), (1, 1), (0, 0)),
    "1×1, padded": (2, 2, 8, 8, 4, 4, (1, 1), (1, 1), (1, 1)),
    "1×1, strided": (2, 2, 12, 8, 7, 8, (1, 1), (2, 2), (0, 0)),
    "strided": (2, 3, 8, 12, 9, 8, (3, 3), (2, 2), (1, 1)),
    "strides 3 and 1": (2, 2, 4, 8, 10, 9, (2, 3), (3, 1), (0, 2)),
    "stride above kernel": (2, 2, 4, 4, 9, 9, (2, 2), (3, 3), (0, 0)),
    "5×5": (2, 2, 4, 8, 6, 5, (5, 5), (1, 1), (2, 2)),
}


def distance(found, reference):
    return ((found - reference).norm() / reference.norm()).item()


def every_case():
    for name, shape in SHAPES.items():
        for kind in PASSES:
            problem = Problem(kind, "float32", *shape)
            for form in FORMS:
                if conv.named(form).why_not(problem, None, KNOWN[90]) is None:
                    yield pytest.param(problem, form, id=f"{name}-{kind}-{form}")


@pytest.mark.parametrize("problem, form", list(every_case()))
def test_a_convolution_is_as_exact_as_torchs(problem, form):
    p = problem
    x, weight = torch.randn(p.K, p.N, p.C, p.H, p.W), torch.randn(p.K, p.O, p.C, *p.kernel) / (p.C * p.taps) ** 0.5
    dy = torch.randn(p.K, p.N, p.O, *p.out_size)
    reference = by_form("loop", p, x.double(), weight.double(), dy.double())
    torchs = by_form("loop", p, x, weight, dy)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = by_form(form, p, x, weight, dy)
        torch.set_num_threads(1)
        assert found.shape == reference.shape
        assert distance(found, reference) <= 2 * distance(torchs, reference) + 1e-6
        assert (found - reference).abs().max() <= 2 * (torchs - reference).abs().max() + 1e-6 * reference.abs().max()
    assert torch.equal(by_form(form, p, x, weight, dy), found), "the sums must not depend on the number of threads"


def test_a_bias_is_added_and_strided_tensors_are_taken():
    x = torch.randn(3, 2, 20, 7, 6)[:, :, ::2][:, :, :8]  # no stride as the kernels need them
    weight, bias = torch.randn(3, 8, 8, 3, 3), torch.randn(8, 3).mT
    p = Problem("fprop", "float32", 3, 2, 8, 8, 7, 6, (3, 3), (1, 1), (1, 1))
    for form in FORMS:
        found, expected = (by_form(name, p, x, weight, None, bias) for name in (form, "loop"))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("channels, pixels", [(4, 9), (8, 40), (12, 5), (10, 7), (96, 3), (1, 30)])
def test_batch_norm_with_what_follows_is_right(training, relu, added, channels, pixels):
    K, N = 3, 5
    x = torch.randn(K * N, channels, pixels, pixels) * 2 + 7
    vectors = [torch.rand(K, channels) + 0.5, torch.randn(K, channels), torch.randn(K, channels) + 7]
    vectors.append(torch.rand(K, channels) + 1)
    residual = torch.randn_like(x) if added else None
    dy = torch.randn_like(x)

    def run(dtype):
        weight, bias, mean, var = (t.clone().to(dtype) for t in vectors)
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias, *([residual] if added else []))]
        options = (training, 0.2, 1e-5, leaves[3] if added else None, relu)
        if dtype == torch.float64:
            x5 = leaves[0].unflatten(0, (K, N))
            more = None if not added else leaves[3].unflatten(0, (K, N))
            y = ops.batch_norm(x5, *leaves[1:3], mean, var, *options[:3], more, relu).flatten(0, 1)
        else:
            y = batch_norm_rows(leaves[0], *leaves[1:3], mean, var, K, *options)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype)), mean, var]

    for found, reference in zip(run(torch.float32), run(torch.float64), strict=True):
        assert distance(found, reference) <= 2e-5  # a value at the ReLU's edge may fall on its other side


@pytest.mark.parametrize(
    "window", [(2,), (2, 2, 1), (3, 2, 1), (3, 1, 1), ((3, 2), (1, 3)), (2, 3), (5, 5, 2)], ids=str
)
@pytest.mark.parametrize("channels", [1, 3, 4, 6, 16, 20, 64])
def test_pools_give_torchs_values_and_gradients(channels, window):
    assert_pools_as_torch(nn.MaxPool2d(*window), channels)


def test_large_means_do_not_cancel():
    x = (torch.randn(2 * 8, 16, 30, 30) + 3000).contiguous(memory_format=torch.channels_last)
    y = batch_norm_rows(x, None, None, None, None, 2, True, 0.1, 1e-5)
    reference, torchs = (F.batch_norm(t, None, None, training=True) for t in (x[:8].double(), x[:8]))
    assert distance(y[:8], reference) <= 2 * distance(torchs, reference) + 1e-6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.fc = nn.Conv2d(8, 16, 1, 2), nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(F.relu_(self.conv3(x)).mean((2, 3)))


def trained(net, x, y):
    decompk.losses.cross_entropy(net(x), y).backward()
    return [p.grad.clone() for p in net.parameters()] + [b.clone() for b in net.buffers()]


def test_a_packed_network_reaches_them_and_equals_its_members(monkeypatch):
    members = [Net() for _ in range(3)]
    x, y = torch.randn(3, 4, 3, 12, 10), torch.randint(5, (4,))
    reference = trained(decompk.pack(copy.deepcopy(members)).double(), x.double(), y)
    called, asked = [], asked_by_operators(monkeypatch)
    for name in ("batch_norm", "batch_norm_backward", "layer", "layer_backward"):
        function = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, f=function, n=name: called.append(n) or f(*a))
    for make, layers in ((lambda net: net, 0), (decompk.fuse, 4)):
        called.clear()
        asked.clear()
        for found, expected in zip(trained(make(decompk.pack(members)), x, y), reference, strict=True):
            torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5)
        if layers:
            assert not asked and sorted(called) == ["layer"] * 4 + ["layer_backward"] * 4
            continue
        assert sorted(called) == ["batch_norm"] * 2 + ["batch_norm_backward"] * 2
        assert {choice.backend for _, choice in asked} == {"cpu"}
        assert [sum(one.kind == kind for one, _ in asked) for kind in PASSES] == [3, 2, 3]


@pytest.mark.parametrize("name", ["torch", "loop"])
def test_other_backends_do_not_reach_them(name, monkeypatch):
    monkeypatch.setattr(cpu, "library", None)
    with decompk.backend(name):
        trained(decompk.pack([Net(), Net()]), torch.randn(4, 3, 8, 8), torch.randint(5, (4,)))


def test_who_watches_sees_the_operators():
    packed, x = decompk.pack([Net(), Net()]), torch.randn(4, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        packed(x).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    assert counted[torch.ops.decompk.grouped_conv2d] > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16


def test_gradients_only_where_they_are_wanted():
    packed = decompk.pack([Net(), Net()])
    packed.conv1.weight.requires_grad_(False)
    packed.bn1.bias.requires_grad_(False)
    x = torch.randn(2, 4, 3, 8, 8, requires_grad=True)
    packed(x).sum().backward()
    assert x.grad is not None and packed.conv1.bias.grad is not None
    assert packed.conv1.weight.grad is None and packed.bn1.bias.grad is None
    packed.requires_grad_(False)
    assert not packed(x.detach()).requires_grad


@pytest.mark.parametrize("name", ["torch", "loop"])
def test_torchs_operators_are_kept_from_writing_past_their_memory(name):
    """1×1, stride 2, 4 channels, channels_last: without care, torch 2.13 dies of it."""
    script = (
        "import torch, decompk\n"
        "packed = decompk.pack([torch.nn.Conv2d(4, 24, 1, 2) for _ in range(2)])\n"
        f"with decompk.backend('{name}'):\n"
        "    for _ in range(40):\n"
        "        packed(torch.randn(16, 4, 56, 56)).sum().backward()\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_torchs_operators_are_kept_from_dying_of_windows_that_see_padding_alone():
    """Dilated, channels_last, no pixel read along the last axis: without care, torch 2.13 dies of it.

    Every output is then the bias, and every other gradient zero.
    """
    script = """
import contextlib, torch, decompk
from torch import nn
computed = nn.utils.parametrizations.weight_norm
problems = [  # the first is as it was found: H, W, kernel, stride, padding, dilation
    ((37, 1), (2, 2), (3, 2), (2, 3), (2, 2)), ((5, 2), (2, 1), (1, 5), (0, 3), (1, 2)),
    ((3, 1), (1, 2), (1, 1), (0, 3), (1, 5)), ((2, 1), (1, 2), (2, 2), (0, 3), (1, 2)),
]
def network(front, layer, size, dtype=torch.float32):
    packed = decompk.pack([nn.Sequential(front(18, 18, 1), layer()) for _ in range(2)], rehearse=False).to(dtype)
    for _ in range(3):
        y = packed(torch.randn(16, 18, *size, dtype=dtype))
    bias = packed[1].bias.detach()
    assert torch.equal(y, bias[:, None, :, *[None] * len(size)].expand_as(y)), "not the bias"
    y.sum().backward()
    assert not any(p.grad.any() for name, p in packed.named_parameters() if name != "1.bias"), "a gradient"
for name in (None, "torch", "loop"):
    with decompk.backend(name) if name else contextlib.nullcontext():
        for size, *geometry in problems:
            k, s, p, d = geometry
            x = torch.randn(5, 2, 19, *size, requires_grad=True)
            weight, bias = torch.randn(5, 20, 19, *k, requires_grad=True), torch.randn(5, 20, requires_grad=True)
            for _ in range(3):
                y = decompk.ops.grouped_conv2d(x, weight, bias, s, p, d)
            assert torch.equal(y, bias[:, None, :, None, None].expand_as(y)), "not the bias"
            y.sum().backward()
            assert not (x.grad.any() or weight.grad.any()), "a gradient"
            for groups in (1, 2):
                network(nn.Conv2d, lambda: nn.Conv2d(18, 20, *geometry, groups=groups), size)
            network(nn.Conv2d, lambda: nn.Conv2d(18, 20, *geometry), size, torch.bfloat16)
            network(nn.Conv2d, lambda: computed(nn.Conv2d(18, 20, *geometry)), size)
            network(nn.Conv3d, lambda: nn.Conv3d(18, 20, *[(1 if g is not p else 0, *g) for g in geometry]), (3, *size))
            network(nn.Conv1d, lambda: nn.Conv1d(18, 20, *[g[1] for g in geometry]), size[1:])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_asked_for_by_name_it_runs_or_says_why_not():
    x, weight = torch.randn(2, 3, 8, 5, 5), torch.randn(2, 18, 8, 3, 3)
    with decompk.backend("cpu"):
        assert ops.grouped_conv2d(x, weight[:, :4]).shape == (2, 3, 4, 3, 3)
        assert ops.grouped_conv2d(x, weight).shape == (2, 3, 18, 3, 3)
        with pytest.raises(BackendError, match="dilated"):
            ops.grouped_conv2d(x, weight[:, :4], dilation=2)
        with pytest.raises(BackendError, match="bfloat16"):
            ops.grouped_conv2d(x.bfloat16(), weight.bfloat16())
    assert ops.grouped_conv2d(x, weight, dilation=2).shape == (2, 3, 18, 1, 1)  # torch's own take what it does not


# ---- measured choices -----------------------------------------------------------------------------------------------

LAYER = Problem("fprop", "float32", 4, 4, 16, 16, 12, 12, (3, 3), (1, 1), (1, 1))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DECOMPK_CACHE", str(tmp_path))
    monkeypatch.setenv("DECOMPK_MEASURE", "1")
    return tmp_path


def chosen():
    return choose(LAYER, torch.device("cpu"))


def test_a_choice_is_measured_once_kept_and_read_again(cache, monkeypatch):
    first = chosen()
    known = json.loads(measure.path().read_text())[key_of(LAYER)]
    assert set(known) == {"direct", "winograd", "loop", "grouped"} and all(ms > 0 for ms in known.values())
    assert measure.path().parent == cache and first.reason.startswith("measured here")
    monkeypatch.setattr(measure, "time_each", None)  # would raise
    again = chosen()
    assert again.form is first.form and again.ms == pytest.approx(first.ms, rel=0.01)
    measure.path().unlink()
    with pytest.raises(TypeError):
        chosen()


def test_the_fastest_wins_and_torchs_by_a_margin(cache):
    def told(**ms):
        measure.path().write_text(json.dumps({key_of(LAYER): ms}))
        os.utime(measure.path(), ns=(told.time, told.time))
        told.time += 10**9
        return chosen()

    told.time = 10**18
    assert told(direct=2.0, winograd=1.0, loop=0.98, grouped=3.0).form.name == "winograd"
    assert told(direct=0.7, winograd=1.0, loop=0.98, grouped=3.0).form.name == "direct"
    found = told(direct=2.0, winograd=1.0, loop=0.98, grouped=0.5)
    assert (found.backend, found.form.name, found.ms) == ("torch", "grouped", 0.5)


KEY = key_of(LAYER)
TIMES = [math.nan, math.inf, -1.0, 0, True, [1], 10**400]
DAMAGED = [
    *("", "{", "[1]", "null", "5", '"x"', "NaN", "[" * 200_000, "1" * 5000, b"\xff\xfe{}", b"\0" * 100, '{"x": {}}'),
    *(json.dumps({KEY: value}) for value in (None, 3, "direct", ["direct"], {"direct": "1.0"}, {"direct": None})),
    *(json.dumps({KEY: {"direct": 2.0, "grouped": ms}}) for ms in TIMES),
]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_table_is_measured_again(cache, monkeypatch, content):
    monkeypatch.setattr(measure, "time_each", lambda problem, forms: {form.name: 1.0 for form in forms})
    measure.path().write_bytes(content if isinstance(content, bytes) else content.encode())
    assert chosen().ms == 1.0
    assert set(json.loads(measure.path().read_text())[KEY]) == {"direct", "winograd", "loop", "grouped"}


def test_what_is_whole_in_a_damaged_table_stays(cache):
    measure.path().write_text(json.dumps({"a": {"direct": 1.0}, "b": {"direct": "slow"}}))
    measure.keep(measure.path(), "c", {"direct": 2.0})
    assert json.loads(measure.path().read_text()) == {"a": {"direct": 1.0}, "c": {"direct": 2.0}}


def test_what_is_no_file_in_the_tables_place_is_no_table(cache, monkeypatch):
    monkeypatch.setattr(measure, "time_each", lambda problem, forms: {form.name: 1.0 for form in forms})
    for make in (os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere", path), lambda path: os.symlink(path, path)):
        make(measure.path())
        assert chosen().ms == 1.0 and KEY in json.loads(measure.path().read_text())
        measure.path().unlink()
    monkeypatch.setattr(kept, "LARGEST", 10**4)
    measure.path().write_text(json.dumps({KEY: {"direct": 2.0}}) + " " * 10**4)
    assert chosen().ms == 1.0 and measure.path().stat().st_size < 10**4


def test_where_nothing_can_be_kept_the_process_measures_once(cache, monkeypatch):
    asked = []
    monkeypatch.setattr(
        measure, "time_each", lambda problem, forms: asked.append(1) or {form.name: 1.0 for form in forms}
    )
    (cache / "a file").touch()
    monkeypatch.setenv("DECOMPK_CACHE", str(cache / "a file"))
    assert chosen() == chosen() and len(asked) == 1
    monkeypatch.setenv("DECOMPK_CACHE", str(cache))
    (measure.path() / "kept").mkdir(parents=True)  # not a file, and not to be replaced by one
    assert chosen() == chosen() and len(asked) == 2


def test_threads_that_write_at_once_lose_nothing(cache):
    def keep(number):
        measure.keep(measure.path(), f"problem {number}", {"direct": 1.0})

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(keep, range(40)))
    assert len(measure.entries(measure.path())) == 40


def test_nothing_is_measured_where_it_may_not_be(cache, monkeypatch):
    monkeypatch.setenv("DECOMPK_MEASURE", "0")
    assert chosen().form.name == "direct" and not list(cache.iterdir())
    monkeypatch.setenv("DECOMPK_MEASURE", "1")
    assert choose(LAYER, torch.device("cpu"), measure=False).reason == "not measured"
    assert not list(cache.iterdir())
