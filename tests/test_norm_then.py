"""Norms of classes of their own, as timm has them: packed as torch's, where that is what they compute."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import decompk

K, N = 3, 4


class NormAct(nn.BatchNorm2d):
    """Batch norm, dropout and an activation in one module."""

    def __init__(self, channels: int, drop: float = 0.0):
        super().__init__(channels)
        self.drop = nn.Dropout(drop) if drop else nn.Identity()
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        statistics = (self.running_mean, self.running_var, self.weight, self.bias)
        x = F.batch_norm(x, *statistics, self.training, self.momentum, self.eps)
        return self.act(self.drop(x))


class OfChannels(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Fast(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class GroupAct(nn.GroupNorm):
    def __init__(self, channels: int):
        super().__init__(2, channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Doubled(nn.BatchNorm2d):
    """More than its base and modules."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Counted(nn.BatchNorm2d):
    """Keeps something between calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Clipped(nn.BatchNorm2d):
    """Does something else to large values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-5, 5)


class Wide(nn.BatchNorm2d):
    """Whose modules hold tensors."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(super().forward(x))


def network(norm) -> nn.Module:
    parts = [nn.Conv2d(3, 8, 3), norm(8), nn.Conv2d(8, 8, 3), norm(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(8, 5))


class Tokens(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), norm(8), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean(1)


IMAGE = (3, 9, 9)
TWINS = {
    "batch norm and activation": (lambda: network(NormAct), IMAGE),
    "over channels": (lambda: network(OfChannels), IMAGE),
    "over features": (lambda: Tokens(Fast), (7, 6)),
    "groups and activation": (lambda: network(GroupAct), IMAGE),
}
APART = {
    "a factor": Doubled,
    "what it keeps": Counted,
    "layers inside": Wide,
    "a limit": Clipped,
}


def members_of(make) -> list[nn.Module]:
    members = [make().double() for _ in range(K)]
    for member in members:
        for p in member.parameters():
            nn.init.normal_(p, 0.5, 0.5)
    return members


def assert_as_alone(packed, members, x):
    """Output, gradients and statistics, in train and in eval mode."""
    for mode in (True, False):
        packed.train(mode)
        alone = torch.stack([member.train(mode)(x) for member in members])
        out = packed(x)
        torch.testing.assert_close(out, alone, rtol=1e-10, atol=1e-10)
        for net in (packed, *members):
            net.zero_grad()
        out.square().sum().backward()
        alone.square().sum().backward()
        for name, p in packed.named_parameters():
            theirs = torch.stack([member.get_parameter(name).grad for member in members])
            torch.testing.assert_close(p.grad, theirs, rtol=1e-8, atol=1e-9)
    for name, buffer in packed.named_buffers():
        torch.testing.assert_close(buffer, torch.stack([m.get_buffer(name) for m in members]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("schedule", ["together", "fused", "side by side"])
def test_they_are_twins_in_every_schedule(name, schedule):
    make, size = TWINS[name]
    members = members_of(make)
    packed = decompk.pack(members, input_dims=1 + len(size))
    assert "member by member" not in packed.describe()
    x = torch.randn(N, *size, dtype=torch.float64)
    if len(size) < 3 and schedule != "together":
        return
    with decompk.schedule(schedule):
        assert_as_alone(packed, members, x)
    for one, member in zip(packed.unpack(), members, strict=True):
        assert [type(m) for m in one.modules()] == [type(m) for m in member.modules()]


@pytest.mark.parametrize("name", APART)
def test_what_is_no_norm_and_modules_runs_member_by_member(name):
    members = members_of(lambda: network(APART[name]))
    packed = decompk.pack(members)
    assert packed.describe().count("member by member") == 2
    assert_as_alone(packed, members, torch.randn(N, *IMAGE, dtype=torch.float64))


class Switched(nn.BatchNorm2d):
    gain = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.gain is None else y * self.gain


@pytest.mark.filterwarnings("ignore:.*member by member")
def test_a_flag_that_is_set_later_counts():
    members = members_of(lambda: network(Switched))
    for member in members:
        member[1].gain = None  # among its attributes
    packed = decompk.pack(members)
    x = torch.randn(N, *IMAGE, dtype=torch.float64)
    assert_as_alone(packed, members, x)
    for net in (packed, *members):
        net[1].gain = 3.0
    assert_as_alone(packed, members, x)


class Twice(nn.BatchNorm2d):
    """Holds one module under two names, and runs it once."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.act = self.relu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def test_a_module_of_two_names_runs_as_often_as_it_does_alone():
    members = members_of(lambda: network(Twice))
    packed = decompk.pack(members, rehearse=False)
    assert_as_alone(packed, members, torch.randn(N, *IMAGE, dtype=torch.float64))


def test_graphs_fuse_the_norm_and_show_what_is_behind_it():
    packed = decompk.pack(members_of(lambda: network(NormAct)))
    fused = decompk.fuse(packed)
    notes = fused.describe()
    assert notes.count("fused with batch norm") == 2 and notes.count("fused into") == 2
    x = torch.randn(N, *IMAGE, dtype=torch.float64)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(other(x), packed(x))


def test_hooks_of_the_module_see_what_it_gives():
    members = members_of(lambda: network(NormAct))
    packed = decompk.pack(members)
    seen = []
    x = torch.randn(N, *IMAGE, dtype=torch.float64)
    packed(x)
    packed[1].register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    theirs = torch.cat([member[1](member[0](x)) for member in members])
    fused = decompk.fuse(packed)
    packed(x), fused(x)
    assert len(seen) >= 1
    for out in seen:
        torch.testing.assert_close(out, theirs, rtol=1e-10, atol=1e-10)


def test_they_stay_norms_for_code_that_looks_for_them():
    packed = decompk.pack(members_of(lambda: network(NormAct)))
    norms = [m for m in packed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 2
    x = torch.randn(N, *IMAGE, dtype=torch.float64)
    for schedule in ("together", "fused", "side by side"):
        for norm in norms:
            norm.momentum = 0.0
        before = norms[0].running_mean.clone()
        with decompk.schedule(schedule):
            packed(x)
            assert torch.equal(norms[0].running_mean, before)
            for norm in norms:
                norm.momentum = 0.5
            packed(x)
        assert not torch.equal(norms[0].running_mean, before)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        torch.testing.assert_close(other.eval()(x), packed.eval()(x))


def test_dropout_inside_leaves_the_random_state_alone():
    members = [network(lambda channels: NormAct(channels, 0.5)) for _ in range(K)]
    state = torch.get_rng_state()
    packed = decompk.pack(members)
    assert torch.equal(torch.get_rng_state(), state) and "member by member" not in packed.describe()
    x = torch.randn(N, *IMAGE)
    torch.testing.assert_close(packed.eval()(x), torch.stack([m.eval()(x) for m in members]))
    assert not torch.equal(packed.train()(x), packed(x))
