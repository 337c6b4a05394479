"""Networks that once decomposed wrongly, or not at all, each with what must hold."""

import copy

import pytest
import torch
from nets import Head, conv
from torch import nn
from torch.nn import functional as F

import decompk
from decompk import DecompkError, decompose


class Net(nn.Module):
    """conv → `step` → head; `parts` become attributes that `step` may use."""

    def __init__(self, step, width=8, after=None, head=None, **parts):
        super().__init__()
        self.stem, self.step = conv(3, width), step
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.head = head or Head(after or width)

    def forward(self, x):
        return self.head(self.step(self, self.stem(x)))


class First(nn.Module):
    """Something done to the image before the network."""

    def __init__(self, step, channels, **buffers):
        super().__init__()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        self.step, self.net = step, nn.Sequential(nn.Conv2d(channels, 12, 3, padding=1), nn.ReLU(), Head(12))

    def forward(self, x):
        return self.net(self.step(self, x))


def deviation(net, K, size=(3, 12, 12)):
    """|composed(x) − Σ members(x)| on full images."""
    d = decompose(net.double(), size, (1, K))
    members = [member.eval() for member in d.subnets(seed=0)]
    assert not d.notes and not d.division.adapted
    x = torch.randn(2, *size, dtype=torch.float64)
    for member, part in zip(members, d.split(x), strict=True):
        member(part)
    with torch.no_grad():
        return (d.compose(members).eval()(x) - sum(member(x) for member in members)).abs().max().item()


EXACT = {
    "a bound computed behind an ellipsis": (
        Net(lambda n, x: torch.cat([x[..., :4, : x.shape[-2] // 2, :], x[:, 4:, : x.shape[2] // 2]], 1)),
        2,
    ),
    "reshape by keyword": (Net(lambda n, x: torch.reshape(x, shape=(x.shape[0], 8, -1, x.shape[3]))), 2),
    "a deconvolution as large as the map": (
        Net(lambda n, x: n.up(F.max_pool2d(x, 3)), up=nn.ConvTranspose2d(8, 8, 4, 2)),
        2,
    ),
    "a convolutional head": (
        Net(lambda n, x: x, head=nn.Sequential(nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())),
        2,
    ),
    "the image normalised by three means": (First(lambda n, x: x - n.mean.view(1, 3, 1, 1), 3, mean=torch.rand(3)), 3),
    "a sum that starts with zero": (Net(lambda n, x: sum([x, x])), 4),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_composed_network_is_the_sum(name):
    net, K = EXACT[name]
    assert deviation(net, K) < 1e-12


def test_spellings_of_arguments_do_not_matter():
    assert deviation(Net(lambda n, x: torch.concatenate([F.relu(input=x), x], axis=-3), after=16), 2) < 1e-12
    assert deviation(Net(lambda n, x: x * x.mean(axis=(2, 3), keepdims=True)), 2) < 1e-12
    assert deviation(Net(lambda n, x: torch.cat(tensors=x.chunk(chunks=2, axis=1), dim=1)), 2) < 1e-12
    assert deviation(Net(lambda n, x: n.more(input=x), more=nn.Conv2d(8, 8, 1)), 2) < 1e-12


class Scaled(nn.BatchNorm2d):
    def __init__(self, width):
        super().__init__(width)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.gain


class Two(nn.Module):
    def forward(self, x, y):
        return x + y


REFUSED = {
    "a gain inside a norm": Net(lambda n, x: n.norm(x), norm=Scaled(8)),
    "a piece of a parameter": Net(lambda n, x: x * n.p.chunk(2)[0], p=nn.Parameter(torch.rand(16, 1, 1))),
    "a piece of a flattened map": Net(lambda n, x: x, head=nn.Sequential(
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), type("Cut", (nn.Module,), {"forward": lambda s, x: x[:, :16]})(),
        nn.Linear(16, 5))),
    "interleaved channels": Net(lambda n, x: torch.stack([x, x.relu()], 2).view(2, 16, 12, 12), after=16),
    "two inputs": Two(),
    "a tensor made on the way": Net(lambda n, x: x * torch.tensor([2.0])),
    "a random number": Net(lambda n, x: x * torch.rand(1)),
    "a slice of the means": First(lambda n, x: x - n.mean[:3, None, None], 3, mean=torch.rand(6)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused_in_one_sentence(name):
    net, state = REFUSED[name], torch.random.get_rng_state()
    before = set(vars(net))
    with pytest.raises(DecompkError) as caught:
        decompose(net, (3, 12, 12), (1, 2 if "means" not in name else 3))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert set(vars(net)) == before and torch.equal(torch.random.get_rng_state(), state)


def test_outputs_that_every_member_holds_whole_and_gated_heads_are_noted():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(conv(3, 8), Head(8))

        def forward(self, x):
            return self.net(x), x.mean((2, 3))

    assert "holds whole" in decompose(Both(), (3, 8, 8)).notes[0]
    gated = nn.Sequential(conv(3, 8), nn.Conv2d(8, 6, 1), nn.GLU(1))
    assert decompose(gated, (3, 8, 8)).notes


def test_a_pooling_that_follows_the_crop_is_listed_as_adapted():
    net = nn.Sequential(conv(3, 8), nn.MaxPool2d(16), Head(8))
    assert decompose(net, (3, 16, 16)).division.adapted == ["1"]


def test_a_buffer_of_two_modules_stays_shared_and_filled():
    table = torch.rand(1, 1, 1, 1)
    net = nn.Sequential(conv(3, 8), conv(8, 8), Head(8))
    for block in net[:2]:
        block.register_buffer("table", table)
    d = decompose(net, (3, 8, 8))
    for member in [*d.subnets(seed=0), d.compose(d.subnets(seed=0))]:
        assert member[0].table is member[1].table and torch.equal(member[0].table, table)


def test_members_of_two_dtypes_are_refused():
    d = decompose(nn.Sequential(conv(3, 8), Head(8)), (3, 8, 8))
    members = d.subnets()
    members[2] = copy.deepcopy(members[2]).half()
    with pytest.raises(decompk.PackError, match="torch.float16"):
        d.compose(members)


@pytest.mark.parametrize("arguments", [(3, 4), ((3, 8, 8), 2.0), ((3, 8, 8), True)])
def test_sizes_and_partitions_of_the_wrong_kind_are_refused(arguments):
    with pytest.raises(decompk.PartitionError):
        decompose(nn.Sequential(conv(3, 8), Head(8)), *arguments)


def test_only_networks_divided_to_their_outputs_extract_concatenated():
    net = nn.Sequential(conv(3, 8), Head(8))
    d = decompose(net, (3, 8, 8))
    with pytest.raises(DecompkError, match="head='concat'"):
        d.extract(net, head="concat")


def test_layers_that_forward_never_reaches_are_kept_as_they_are():
    net = Net(lambda n, x: x, unused=nn.Linear(3, 3))
    d = decompose(net, (3, 8, 8))
    for member in d.extract(d.compose(d.subnets(seed=0))):
        assert torch.equal(member.unused.weight, net.unused.weight)
