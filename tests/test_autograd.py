"""Derivatives of every kind, torch.func, export and compilers: what the members alone give, or nothing at all."""

import contextlib
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from helpers import leaves
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

import decompk

K, N = 3, 4
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-10}


class Convolutions(nn.Module):
    """Convolution, batch norm, residual, ReLU in place and not, a strided 1×1 shortcut, pooling, linear head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.shortcut, self.norm3 = nn.Conv2d(8, 4, 1, stride=2), nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = F.relu(self.norm2(self.conv(x)) + x)
        x = torch.tanh(self.norm3(self.shortcut(x)))
        return self.head(x.square().mean((2, 3)))


class Groups(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, groups=3, padding="same"),
            nn.GroupNorm(3, 12),
            nn.Softplus(),
            nn.ConvTranspose2d(12, 4, 2, stride=2),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.InstanceNorm2d(4, affine=True),
            nn.Conv2d(4, 4, 3, dilation=2, padding=1, padding_mode="reflect"),
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x).square().mean((2, 3)))


class Lines(nn.Module):
    """1-D convolution and batch norm over time."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.conv(x.flatten(2)))).square().mean(2))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.GRU, **options):
        super().__init__()
        self.layer = kind(3, 5, batch_first=True, **options)
        self.head = nn.LazyLinear(2)
        self(torch.zeros(1, 3, 2, 2))

    def forward(self, x):
        y, last = self.layer(x.flatten(2).transpose(1, 2))
        last = last[1] if isinstance(last, tuple) else last
        return self.head(torch.cat([y.mean(1), last[0]], 1))


NETS = {
    "convolutions": Convolutions,
    "groups, transposed": Groups,
    "1-D": Lines,
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 2)),
    "GRU": partial(Recurrent, nn.GRU, bidirectional=True),
    "LSTM": partial(Recurrent, nn.LSTM, num_layers=2),
    "RNN": partial(Recurrent, nn.RNN, nonlinearity="relu", bias=False),
}
WAYS = {"packed": lambda packed: packed, "fused": decompk.fuse}
FUSED = [("convolutions", "fused")]
CASES = [(net, "packed") for net in NETS] + FUSED


class Case:
    """Members, the same packed or fused, and inputs of them all; sums over members make one number of both."""

    def __init__(self, net, way, dtype, training):
        self.dtype = dtype
        self.members = [self._trained(NETS[net]()).to(dtype).train(training) for _ in range(K)]
        self.packed = WAYS[way](decompk.pack(self.members, input_dims=4)).train(training)
        self.x = torch.randn(K, N, 3, 6, 6, dtype=dtype)

    @staticmethod
    def _trained(net):
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
        for name, buffer in net.named_buffers():
            if name.endswith("running_var"):
                buffer += torch.rand_like(buffer)
            elif name.endswith("running_mean"):
                buffer += torch.randn_like(buffer)
        return net

    def alone(self, of_member):
        """Members' results stacked, dictionaries of them by name."""
        with without_onednn():
            return stacked([of_member(member, self.x[k]) for k, member in enumerate(self.members)])

    def same(self, found, reference):
        """Equal up to rounding, of which what cancels to zero has as much as its fellows."""
        found, reference = leaves(found), leaves(reference)
        assert len(found) == len(reference)
        scale = max(1.0, *(t.abs().max().item() for t in reference))
        for one, other in zip(found, reference, strict=True):
            assert_close(one, other, rtol=TOLERANCE[self.dtype], atol=TOLERANCE[self.dtype] * scale)


def stacked(results):
    first = results[0]
    if isinstance(first, dict):
        return {name: stacked([r[name] for r in results]) for name in first}
    if isinstance(first, tuple):
        return tuple(stacked(list(parts)) for parts in zip(*results, strict=True))
    return torch.stack(results)


def pure(net):
    """The network as a function of parameters and input, with buffers of its own each time; and its parameters."""

    def function(parameters, x):
        buffers = {name: buffer.detach().clone() for name, buffer in net.named_buffers()}
        return functional_call(net, (parameters, buffers), (x,))

    return function, {name: p.detach().clone() for name, p in net.named_parameters()}


@contextlib.contextmanager
def without_onednn():
    """Members alone: oneDNN's LSTM has a first derivative only."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["train", "eval"])
def training(request):
    return request.param


@pytest.fixture(params=CASES, ids=[" ".join(case) for case in CASES])
def case(request, dtype, training):
    return Case(*request.param, dtype, training)


def loss(outputs):
    return outputs.sin().sum() + outputs.square().sum()


def test_functional_gradients_are_those_of_the_members_alone(case):
    def gradients(net, x):
        function, parameters = pure(net)
        outputs, pull = vjp(lambda x: function(parameters, x), x)
        by_call = grad(lambda p, x: loss(function(p, x)), argnums=(0, 1))(parameters, x)
        return *by_call, outputs, pull(torch.ones_like(outputs))[0]

    case.same(gradients(case.packed, case.x), case.alone(gradients))


@pytest.mark.parametrize("of_x, of_parameters", [(True, False), (False, True), (True, True)])
def test_forward_mode_carries_the_tangents_of_inputs_and_parameters(case, of_x, of_parameters):
    def tangent(net, x):
        function, parameters = pure(net)
        return jvp(
            function, (parameters, x), ({n: p.cos() * of_parameters for n, p in parameters.items()}, x.cos() * of_x)
        )

    reference = case.alone(tangent)
    assert reference[1].abs().max() > 1e-4
    case.same(tangent(case.packed, case.x), reference)


def test_dual_numbers_pass(case):
    def tangent(net, x):
        with forward_ad.dual_level(), torch.no_grad():
            return forward_ad.unpack_dual(net(forward_ad.make_dual(x, x.cos()))).tangent

    case.same(tangent(case.packed, case.x), case.alone(tangent))


def test_the_gradient_of_a_gradient_penalty_is_that_of_the_members_alone(case):
    def penalty(net, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        ((slope.flatten(-3).norm(dim=-1) - 1) ** 2).sum().backward()
        own = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}
        return {"slope": slope.detach(), "x": x.grad, **own}

    case.same(penalty(case.packed, case.x), case.alone(penalty))


def test_second_derivatives_in_the_parameters_are_those_of_the_members_alone(case):
    def twice(net, x):
        parameters = dict(net.named_parameters())
        first = torch.autograd.grad(loss(net(x)), list(parameters.values()), create_graph=True)
        second = sum(g.square().sum() for g in first)
        return dict(zip(parameters, torch.autograd.grad(second, list(parameters.values())), strict=True))

    case.same(twice(case.packed, case.x), case.alone(twice))


EVAL = pytest.mark.parametrize("training", [False], ids=["eval"])


@EVAL
def test_gradients_of_every_sample_come_from_vmap(case):
    function, parameters = pure(case.packed)
    of_one = grad(lambda p, x: loss(function(p, x.unsqueeze(1))))
    found = vmap(of_one, (None, 1))(parameters, case.x)

    def one_by_one(net, x):
        function, parameters = pure(net)
        return stacked([grad(lambda p, x=one: loss(function(p, x)))(parameters) for one in x.split(1)])

    case.same({name: g.transpose(0, 1) for name, g in found.items()}, case.alone(one_by_one))


@EVAL
def test_a_batch_of_batches_goes_through_vmap(case):
    x = torch.stack([case.x, case.x.cos()])
    with torch.no_grad():
        case.same(vmap(case.packed)(x), torch.stack([case.packed(one) for one in x]))


@pytest.mark.parametrize("dtype", [torch.float64], ids=["float64"])
def test_jacobians_and_hessians_are_those_of_the_members_alone(case):
    case.x = case.x[:, :2]
    last = list(dict(case.packed.named_parameters()))[-1]

    def functions(net, x):
        function, parameters = pure(net)
        of_bias = lambda bias: loss(function({**parameters, last: bias}, x))  # noqa: E731
        return partial(function, parameters), of_bias, parameters[last]

    outputs, of_bias, bias = functions(case.packed, case.x)
    jacobians = [
        jacrev(outputs)(case.x),
        jacfwd(outputs)(case.x),
        torch.autograd.functional.jacobian(outputs, case.x, vectorize=True),
        torch.autograd.functional.jacobian(outputs, case.x, vectorize=True, strategy="forward-mode"),
    ]
    hessians = [hessian(of_bias)(bias), torch.autograd.functional.hessian(of_bias, bias, vectorize=True)]
    for k, member in enumerate(case.members):
        outputs, of_bias, bias = functions(member, case.x[k])
        own = torch.autograd.functional.jacobian(outputs, case.x[k]), torch.autograd.functional.hessian(of_bias, bias)
        for found in jacobians:
            case.same(found[k, :, :, k], own[0])
            assert not found[k, :, :, k - 1].any()
        for found in hessians:
            case.same(found[k, ..., k, :] if own[1].dim() == 2 else found[k], own[1])
