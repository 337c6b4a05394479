"""Whatever a network's code does, keeps or hooks: it packs to what its members compute alone, or is refused by name."""

import pytest
import torch
from helpers import assert_packed_equals_separate
from torch import nn

import decompk
from decompk.layers import TWINS
from decompk.layers.block import HeadConv2d, HeadLinear, WindowedLinear

K, N = 3, 4
pytestmark = pytest.mark.filterwarnings("ignore:.*member by member")


def members_of(make, count=K):
    members = []
    for seed in range(count):
        torch.manual_seed(seed)
        members.append(make().double())
    return members


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


# ---- names ----------------------------------------------------------------------------------------------------------


class Named(nn.Conv2d):
    """A convolution whose author uses the names that a twin might like to have."""

    def __init__(self):
        super().__init__(3, 4, 3)
        self.K, self.path, self.member_class, self.input_dims, self.columns = 7, "here", "mine", 2, [1, 2]
        self.check = self.fits = self.adopt = self.release = self.each_member = self.function = self.laid_out = "own"


class ReadsNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Named()

    def forward(self, x):
        conv = self.conv
        return conv(x) * conv.K * conv.input_dims + len(conv.path + conv.check + conv.member_class) + conv.columns[1]


def test_a_twin_has_no_name_that_a_users_layer_may_have():
    for twin in (*TWINS.values(), HeadConv2d, HeadLinear, WindowedLinear):
        torch_names = {name for kind in twin.__mro__ if kind.__module__.startswith("torch") for name in vars(kind)}
        added = {name for kind in twin.__mro__ for name in vars(kind)} - torch_names - {"bias"}
        assert not [name for name in added if not name.startswith(("__", "_twin_"))]
    members = members_of(ReadsNames)
    packed = assert_packed_equals_separate(members, double(N, 3, 6, 6), steps=2)
    assert packed.describe().count("twin") == 1
    for net in (packed, *packed.unpack()):
        assert net.conv.K == 7 and net.conv.path == "here" and net.conv.check == net.conv.fits == "own"
        assert vars(net.conv).keys() >= {"K", "path", "member_class", "input_dims", "columns"}
    decompk.explain(packed.float(), torch.randn(N, 3, 6, 6))
