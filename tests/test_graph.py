"""Tracing: checks of shapes are no branches, what cannot be followed says why, and the network stays as it was.

PYTEST_DONT_REWRITE: networks here hold assertions, which are to be traced as Python compiles them.
"""

import collections
import pickle

import numpy as np
import pytest
import torch
from nets import Call
from torch import nn
from torch.nn import functional as F

import decompk
from decompk import PartitionError, UnsupportedOperation, decompose
from decompk.errors import MisfitError


class Checked(nn.Module):
    """conv → mean → fc, with `check` called on what it reads and `inside` on divided channels."""

    def __init__(self, check=lambda x: x, inside=lambda x: x):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.check, self.inside = check, inside

    def forward(self, x):
        return self.fc(self.inside(F.relu(self.conv(self.check(x)))).mean((2, 3)))


def channels(x):
    assert x.size(1) == 3
    return x


def dimensions(x):
    assert x.dim() == 4, f"four dimensions, not {x.dim()}: {x.shape}"
    return x


def raises(x):
    if x.shape[1] != 3:
        raise ValueError("three channels" if x.dim() == 4 else f"images, not {x.shape}")
    return x


def several(x):
    n, c, h, w = x.shape
    assert x.dim() == 4 and c == 3, "images"
    assert 2 < c < 5
    for side in (h, w):
        if side % 2 or not side > 2:
            raise ValueError("even sides")
    fits = h == w
    if not fits:
        raise ValueError("squares")
    return x if fits else -x


def values(x):
    assert torch.isfinite(x).all()
    return x


@pytest.mark.parametrize("check", [channels, dimensions, raises, several, values])
def test_a_branch_whose_other_side_only_raises_is_followed(check):
    net = Checked(check)
    torch.manual_seed(0)
    d, x = decompose(net, (3, 16, 16)), torch.randn(2, 3, 16, 16)
    parts = d.extract(net)
    plain = Checked()
    plain.load_state_dict(net.state_dict())
    for member, other in zip(parts, decompose(plain, (3, 16, 16)).extract(plain), strict=True):
        assert torch.equal(member(x), other(x))
    assert d.compose(parts)(x).shape == (2, 5)


def test_a_check_that_samples_or_members_do_not_pass_is_refused_where_it_stands():
    with pytest.raises(PartitionError, match=r"samples of \(1, 8, 8\): .*test_graph.py:\d+\): .* own check"):
        decompose(Checked(channels), (1, 8, 8))

    def width(x):
        assert x.size(1) == 8
        return x

    def side(x):
        assert x.size(2) == 64
        return x

    with pytest.raises(MisfitError, match="check refuses a member"):
        decompose(Checked(inside=width), (3, 8, 8))
    with pytest.raises(PartitionError, match="own check there refuses such samples"):
        decompose(Checked(side), (3, 8, 8), 1)
    assert decompose(Checked(side), partitions=1).input_size == (3, 64, 64)


def on_shape(x):
    return x if x.shape[1] == 3 else x[:, :3]


def on_values(x):
    return x if x.sum() > 0 else -x


def counted(x):
    return x[: int(np.prod(x.shape[1:]))]


def counted_by_tensor(x):
    return x[: torch.tensor(x.shape[1:]).prod()]


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (on_shape, "branches on a tensor's shape"),
        (on_values, "branches on the values of a tensor"),
        (counted, r"a number .* features as x.flatten\(1\)"),
        (counted_by_tensor, r"a number .* features as x.flatten\(1\)"),
        (lambda x: x.nothing, "no attribute 'nothing'"),
        (lambda x: undefined(x), "raises NameError .name 'undefined' is not defined"),  # noqa: F821
    ],
)
def test_what_cannot_be_followed_is_refused_with_its_line_and_its_cause(check, words):
    with pytest.raises(decompk.DecompkError, match=words) as caught:
        decompose(Checked(check), (3, 8, 8))
    assert "test_graph.py:" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flat", [lambda x: x.view(-1, np.prod(x.shape[1:])), lambda x: x.view(*tuple(x.size()[:1]), -1)]
)
def test_numpy_and_tuple_may_count_features(flat):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), Call(flat), nn.Linear(8 * 64, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    d, x = decompose(net, (3, 8, 8)), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    members = d.subnets(seed=0)
    total = sum(member(part) for member, part in zip(members, d.split(x), strict=True))
    torch.testing.assert_close(d.compose(members)(x), total, rtol=0, atol=1e-12)


class Notes:
    def __init__(self):
        self.calls, self.last = 0, None


class Keeps(nn.Module):
    """Keeps activations and counts its calls, in attributes of its own, in lists and in objects."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.inner = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), KeepsMore()
        self.kept, self.calls, self.all, self.named, self.notes = None, 0, [], {"first": None}, Notes()
        self.recent = collections.deque([None], maxlen=1)

    def forward(self, x):
        self.kept = F.relu(self.conv(x))
        self.calls += 1
        self.all.append(self.kept)
        self.recent.append(self.kept)
        self.named["first"] = self.named["more"] = self.kept
        self.notes.calls, self.notes.last = self.notes.calls + 1, self.kept
        return self.fc(self.inner(self.kept).mean((2, 3)))


class KeepsMore(nn.Module):
    def forward(self, x):
        self.seen = x
        return x


def test_tracing_leaves_every_attribute_as_it_was():
    net = Keeps()
    packed = decompk.grouped_subnets(net)
    assert (net.kept, net.calls, net.all, net.named, [*net.recent]) == (None, 0, [], {"first": None}, [None])
    assert (net.notes.calls, net.notes.last) == (0, None) and not hasattr(net.inner, "seen")
    for made in (net, packed, packed.compose()):
        pickle.loads(pickle.dumps(made))
    assert packed(torch.randn(2, 3, 16, 16)).shape == (4, 2, 5)


def test_a_tensor_that_forward_makes_is_refused():
    with pytest.raises(UnsupportedOperation, match="makes a tensor of its own, .* register it as a buffer"):
        decompose(Checked(inside=lambda x: x * torch.ones(8, 1, 1)), (3, 8, 8))
