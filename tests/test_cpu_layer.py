"""Layers on a CPU, a convolution with what stands behind it, and convolutions channel by channel: both ways, in C++."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import decompk
from decompk.kernels import conv, cpu, layer_choice
from decompk.kernels.device import KNOWN
from decompk.kernels.layer_choice import DIRECT, WINOGRAD, LayerChoice, choose_layer
from decompk.kernels.problem import Problem

if reason := cpu.why_not():
    pytest.skip(f"no C++ kernels: {reason}", allow_module_level=True)

K, N = 3, 4


class Layer(nn.Module):
    """relu(norm(conv(stem(x))) + stem(x)), each part but the convolution where it is asked for; relu: or 6."""

    def __init__(self, width, stride=1, kernel=3, norm=True, residual=False, relu=True, bias=False, groups=1):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        out = 8 if residual else width
        self.conv = nn.Conv2d(8, out, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(out) if norm else None
        self.residual, self.relu = residual, relu

    def forward(self, x):
        x = self.stem(x)
        y = self.conv(x)
        y = y if self.norm is None else self.norm(y)
        y = y + x if self.residual else y
        return F.relu6(y) if self.relu == 6 else F.relu(y) if self.relu else y


def trained(net, x, weights):
    """Outputs, gradients of x and the parameters, and statistics after two steps."""
    x = x.clone().requires_grad_()
    for _ in range(2):
        y = net(x)
        (y * weights.to(y.dtype)).sum().backward()
    return {
        "y": y.detach(),
        "dx": x.grad,
        **{f"d{name}": p.grad for name, p in net.named_parameters()},
        **{name: b.clone() for name, b in net.named_buffers()},
    }


def distance(found, reference):
    return ((found.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)).item()


CASES = {
    "norm and ReLU": dict(width=16),
    "residual": dict(width=8, residual=True),
    "residual, no ReLU": dict(width=8, residual=True, relu=False),
    "norm alone": dict(width=20, relu=False),
    "bias before a norm": dict(width=12, bias=True),
    "bare": dict(width=16, norm=False, bias=True),
    "bare, no bias": dict(width=8, norm=False),
    "strided": dict(width=16, stride=2),
    "strided, bare": dict(width=16, stride=2, norm=False, bias=True),
    "1×1": dict(width=40, kernel=1),
    "1×1, strided": dict(width=16, kernel=1, stride=2),
    "5×5": dict(width=8, kernel=5),
    "ReLU6": dict(width=16, relu=6),
    "ReLU6, residual": dict(width=8, relu=6, residual=True),
    "ReLU6, bare": dict(width=16, relu=6, norm=False, bias=True),
    "6 outputs, 5×5": dict(width=6, kernel=5),
    "7 outputs, bare": dict(width=7, norm=False, bias=True),
    "by channel": dict(width=8, groups=8, bias=True),
    "by channel, strided, ReLU6": dict(width=8, groups=8, stride=2, kernel=5, relu=6),
    "by channel, residual": dict(width=8, groups=8, residual=True),
    "by channel, bare": dict(width=8, groups=8, norm=False, bias=True),
}


@pytest.mark.parametrize("way", [DIRECT, WINOGRAD])
@pytest.mark.parametrize("name", CASES)
def test_a_fused_layer_is_as_exact_as_torchs(name, way, monkeypatch):
    """Twice the error of members alone at most, but for rounding; by either algorithm, where it may."""
    used, ways = [], []

    def layer(*args, run=cpu.layer):
        ways.append(args[-2])
        run(*args)

    def choice(problem, norm, gradient):
        if choose_layer(problem, norm, gradient) is None:
            return None
        legal = conv.named(WINOGRAD).why_not(problem, None, KNOWN[90]) is None
        used.append(LayerChoice(*(way if legal else DIRECT,) * 2))
        return used[-1]

    monkeypatch.setattr("decompk.ops.cpu_layer.choose_layer", choice)
    monkeypatch.setattr(cpu, "layer", layer)
    members = [Layer(**CASES[name]) for _ in range(K)]
    x = torch.randn(K, N, 3, 9, 8)
    weights = torch.randn(K, *members[0](x[0]).shape)
    members = [copy.deepcopy(m) for m in members]
    packed = [decompk.pack(copy.deepcopy(members)) for _ in range(3)]
    reference = trained(packed[0].double(), x.double(), weights)
    with decompk.backend("loop"):
        alone = trained(packed[1], x, weights)
    found = trained(decompk.fuse(packed[2]), x, weights)
    assert cpu.BY_CHANNEL in ways if CASES[name].get("groups") else used
    for key, exact in reference.items():
        if key == "dconv.bias" and CASES[name].get("norm", True):
            assert found[key].abs().max() == 0  # the norm takes off again what it adds
            continue
        assert distance(found[key], exact) <= 2 * distance(alone[key], exact) + 2e-6, key


def test_results_do_not_depend_on_the_number_of_threads():
    members = [Layer(16) for _ in range(5)]
    x, found = torch.randn(5, 8, 3, 20, 20), []
    weights = torch.randn(5, 8, 16, 20, 20)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found.append(trained(decompk.fuse(decompk.pack(copy.deepcopy(members))), x, weights))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(other[name], t) for name, t in found[0].items())


def test_a_member_that_is_not_finite_leaves_the_others_their_bits_on_any_number_of_threads(monkeypatch):
    monkeypatch.setattr("decompk.ops.cpu_layer.choose_layer", lambda *_: LayerChoice("winograd", "winograd"))
    members = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(5)]
    x, weights, found = torch.randn(5, 4, 8, 6, 6), torch.randn(5, 4, 8, 6, 6), []
    x[0, 0, 0, 0, 0] = float("nan")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(trained(decompk.fuse(decompk.pack(copy.deepcopy(members))), x, weights))
    torch.set_num_threads(1)
    for name, t in found[0].items():
        assert torch.equal(t[1:], found[1][name][1:]), name


def test_what_follows_a_backward_follows_the_layers():
    members = [Layer(8, residual=True) for _ in range(2)]
    packed = decompk.pack(copy.deepcopy(members)).double().float()
    fused, plain, x = decompk.fuse(copy.deepcopy(packed)), packed, torch.randn(2, 3, 3, 5, 5, requires_grad=True)

    def penalty(net):
        (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), list(net.parameters()))

    with decompk.backend("loop"):
        expected = penalty(plain)
    for a, b in zip(penalty(fused), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_infinite_and_missing_numbers_stay_where_torch_has_them():
    for value, where in itertools.product((float("nan"), float("inf")), ("conv", "stem")):
        members = [Layer(8, norm=False) for _ in range(2)]
        with torch.no_grad():
            getattr(members[0], where).weight[0, 0, 0, 0] = value
        packed, x = decompk.pack(members), torch.randn(2, 2, 3, 6, 6)
        weights = torch.randn(2, 2, 8, 6, 6)
        with decompk.backend("loop"):
            expected = trained(copy.deepcopy(packed), x, weights)
        found = trained(decompk.fuse(packed), x, weights)
        for name in expected:
            assert torch.equal(found[name][1].isfinite(), expected[name][1].isfinite()), (value, where, name)
            assert torch.equal(found[name].isnan(), expected[name].isnan()) or value != value, (value, where, name)


def test_which_way_is_measured_kept_and_used(monkeypatch, tmp_path):
    monkeypatch.setenv("DECOMPK_CACHE", str(tmp_path))
    monkeypatch.setenv("DECOMPK_MEASURE", "1")
    layer_choice._chosen.cache_clear()
    problem = Problem("fprop", "float32", 2, 4, 16, 16, 12, 12, (3, 3), (1, 1), (1, 1))
    for times, expected in (
        ({DIRECT: 1.0, WINOGRAD: 2.0, "apart": 1.0}, LayerChoice(DIRECT, DIRECT)),
        ({DIRECT: 2.0, WINOGRAD: 1.0, "apart": 1.0}, LayerChoice(WINOGRAD, WINOGRAD)),
        ({DIRECT: 2.0, WINOGRAD: 2.0, "apart": 1.0}, None),
    ):
        monkeypatch.setattr(layer_choice, "times", lambda key, names, measured, times=times: times)
        layer_choice._chosen.cache_clear()
        assert layer_choice.choose_layer(problem, True, True) == expected
    monkeypatch.undo()
    monkeypatch.setenv("DECOMPK_CACHE", str(tmp_path))
    monkeypatch.setenv("DECOMPK_MEASURE", "1")
    layer_choice._chosen.cache_clear()
    first = layer_choice.choose_layer(problem, True, True)
    layer_choice._chosen.cache_clear()
    monkeypatch.setattr(layer_choice, "_forward", lambda *_: pytest.fail("what is known is measured again"))
    assert layer_choice.choose_layer(problem, True, True) == first
    layer_choice._chosen.cache_clear()


# ---- channel by channel ---------------------------------------------------------------------------------------------

DEPTHWISE = {
    "3×3": (16, 9, 8, (3, 3), (1, 1), (1, 1)),
    "strided": (20, 9, 8, (3, 3), (2, 2), (1, 1)),
    "5×5, strided": (6, 11, 12, (5, 5), (2, 2), (2, 2)),
    "7×7": (32, 8, 8, (7, 7), (1, 1), (3, 3)),
    "no padding": (5, 7, 7, (3, 3), (1, 1), (0, 0)),
    "odd": (3, 6, 7, (2, 3), (3, 1), (0, 2)),
    "one pixel": (8, 1, 1, (3, 3), (1, 1), (1, 1)),
    "one column": (4, 5, 1, (3, 3), (2, 2), (1, 1)),
}


@pytest.mark.parametrize("name", DEPTHWISE)
@pytest.mark.parametrize("threads", [1, 2])
def test_channels_by_themselves_are_as_exact_as_torchs(name, threads, monkeypatch):
    C, H, W, kernel, stride, padding = DEPTHWISE[name]
    called = []

    def layer(*args, run=cpu.layer):
        called.append(args[-2])
        run(*args)

    monkeypatch.setattr(cpu, "layer", layer)
    members = [nn.Sequential(nn.Conv2d(C, C, kernel, stride, padding, groups=C)) for _ in range(K)]
    x = torch.randn(K, N, C, H, W)
    weights = torch.randn(K, *members[0](x[0]).shape)
    packed = decompk.pack(members)
    reference = trained(copy.deepcopy(packed).double(), x.double(), weights)
    with decompk.backend("loop"):
        alone = trained(copy.deepcopy(packed), x, weights)
    assert not called
    torch.set_num_threads(threads)
    found = trained(packed, x, weights)
    torch.set_num_threads(1)
    assert set(called) == {cpu.BY_CHANNEL}
    for key, exact in reference.items():
        assert distance(found[key], exact) <= 2 * distance(alone[key], exact) + 2e-6, key


def test_channels_by_themselves_can_be_differentiated_again():
    members = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4)) for _ in range(2)]
    packed, x = decompk.pack(members), torch.randn(2, 2, 4, 5, 5, requires_grad=True)

    def penalty():
        (gradient,) = torch.autograd.grad(packed(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), packed[0].weight)[0]

    with decompk.backend("loop"):
        expected = penalty()
    torch.testing.assert_close(penalty(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
