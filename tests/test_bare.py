"""Parameters that a user's own module reads beside its layers: packed, each member's for its own rows."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import decompk

K, N = 3, 4


class Positions(nn.Module):
    """Tokens (N, T, c) behind a class token, all at learned positions."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 6, 8))
        self.body = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position[:, : x.shape[1] + 1]
        return self.body(x)[:, 0]


class Scale(nn.Module):
    """Images through a convolution, times a factor a channel; inside a network that owns nothing."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.factor


class Weights(nn.Module):
    """What looks like a row for samples, and is a layer's weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 8))
        self.body = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(x), self.weight)


class Centre(Positions):
    """Mixes what it owns as if there were one row."""

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + self.position.mean(0)[1:] + self.token.mean(0))[:, 0]


class Clamped(Positions):
    """Changes what it owns."""

    def forward(self, x: Tensor) -> Tensor:
        self.token.data.clamp_(-0.5, 0.5)
        with torch.no_grad():
            self.position.mul_(0.9)
        return super().forward(x)


class Decides(Positions):
    """Goes by what it owns."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.token.abs().max() < 1.5 else 2 * y


class Checkpointed(Positions):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def _scaled() -> nn.Module:
    return nn.Sequential(Scale(), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


NETS = {
    "class token and positions": (Positions, (5, 8), True),
    "a factor a channel": (_scaled, (3, 8, 8), True),
    "a weight": (Weights, (8,), False),
    "a mean over its row": (Centre, (5, 8), False),
    "what it changes": (Clamped, (5, 8), False),
    "what it goes by": (Decides, (5, 8), False),
    "what it computes again": (Checkpointed, (5, 8), True),
}


def _members(make) -> list[nn.Module]:
    return [make().double() for _ in range(K)]


@pytest.mark.filterwarnings("ignore:.*member by member")
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("shared", [True, False])
def test_each_member_reads_its_own_parameters(name, shared):
    make, size, together = NETS[name]
    members = _members(make)
    packed = decompk.pack(members, input_dims=1 + len(size))
    x = torch.randn(*([] if shared else [K]), N, *size, dtype=torch.float64)
    out = packed(x)
    alone = torch.stack([m(x if shared else x[k]) for k, m in enumerate(members)])
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-12)
    out.square().sum().backward()
    alone.square().sum().backward()
    for key, p in packed.named_parameters():
        theirs = torch.stack([m.get_parameter(key).grad for m in members])
        torch.testing.assert_close(p.grad, theirs, rtol=0, atol=1e-11)
    assert ("reads its own parameters by rows" in packed.describe()) == together
    assert ("member by member" in packed.describe()) != together


def test_members_come_back_as_they_were():
    members = _members(Positions)
    packed = decompk.pack(members, input_dims=3)
    x = torch.randn(N, 5, 8, dtype=torch.float64)
    out = packed(x)
    assert packed.position.shape == (K, 1, 6, 8) and packed.state_dict()["token"].shape == (K, 1, 1, 8)
    for one, member in zip(packed.unpack(), members, strict=True):
        assert type(one) is Positions and torch.equal(one(x), member(x))
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(x), out)
    packed.token = nn.Parameter(torch.zeros(K, 1, 1, 8, dtype=torch.float64))
    assert not torch.equal(packed(x), out)


@pytest.mark.parametrize("schedule", ["together", "in turn", "on threads"])
def test_every_schedule_runs_them(schedule):
    members = _members(Positions)
    packed = decompk.pack(members, input_dims=3)
    x = torch.randn(N, 5, 8, dtype=torch.float64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with decompk.schedule(schedule):
            torch.testing.assert_close(packed(x), torch.stack([m(x) for m in members]), rtol=0, atol=1e-12)
    finally:
        torch.set_num_threads(threads)


def test_a_class_that_says_how_it_is_copied_keeps_its_say():
    class Locked(Positions):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

        def __getstate__(self):
            return {name: value for name, value in vars(self).items() if name != "lock"}

        def __setstate__(self, state):
            super().__setstate__(state)
            self.lock = threading.Lock()

    with pytest.warns(UserWarning, match="member by member"):
        packed = decompk.pack(_members(Locked), input_dims=3)
    x = torch.randn(N, 5, 8, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))


def test_compiled():
    packed = decompk.pack(_members(Positions), input_dims=3)
    x = torch.randn(N, 5, 8, dtype=torch.float64)
    compiled = torch.compile(packed, backend="eager")
    for batch in (x, x[:2], x):
        torch.testing.assert_close(compiled(batch), packed(batch))


def test_what_no_rehearsal_sees_runs_member_by_member():
    packed = decompk.pack(_members(Positions), input_dims=3, rehearse=False, member_by_member=[])
    assert "it owns 'token'" in packed.describe()
