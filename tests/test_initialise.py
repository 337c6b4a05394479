"""Initialisers of one network act on each member of a packed one as on it alone."""

import functools
import math

import pytest
import torch
from torch import nn

import decompk
from decompk.errors import PackError

K = 3


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 64)
    )


def init(module):
    """As in many a training script."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.constant_(module.weight, 0.5)
        module.running_mean.fill_(2.0)


@pytest.mark.parametrize("wrapped", [False, True])
def test_each_member_is_initialised_as_it_would_be_alone(wrapped):
    packed, nets = decompk.pack([network(k) for k in range(K)]), [network(k) for k in range(K)]
    kept = [id(p) for p in packed.parameters()]
    torch.manual_seed(7)
    decompk.initialise(torch.compile(packed, backend="eager") if wrapped else packed, lambda net: net.apply(init))
    torch.manual_seed(7)
    for net in nets:
        net.apply(init)
    assert [id(p) for p in packed.parameters()] == kept
    for name, stack in packed.state_dict().items():
        assert torch.equal(stack, torch.stack([net.state_dict()[name] for net in nets])), name
    assert not torch.equal(packed.get_parameter("0.weight")[0], packed.get_parameter("0.weight")[1])


def test_over_the_stacks_fans_are_wrong_and_over_members_right():
    packed = decompk.pack([network(k) for k in range(K)])
    expected = math.sqrt(2 / (16 * 9))
    packed.apply(init)
    assert packed.get_parameter("0.weight").std().item() < 0.8 * expected
    decompk.initialise(packed, lambda net: net.apply(init))
    assert packed.get_parameter("0.weight").std().item() == pytest.approx(expected, rel=0.02)


def test_reset_parameters_is_each_members_own():
    packed = decompk.pack([network(k) for k in range(K)])
    packed.get_submodule("0").reset_parameters()
    assert packed.get_parameter("0.weight").abs().max().item() == pytest.approx(1 / math.sqrt(16 * 9), rel=0.01)


def test_what_takes_no_network_is_told_what_it_gets():
    packed = decompk.pack([network(k) for k in range(K)])
    remedy = r"lambda net: \[kaiming_normal_\(p\) for p in net\.parameters\(\) if p\.dim\(\) > 1\]\.$"
    for given in (nn.init.kaiming_normal_, functools.partial(nn.init.kaiming_normal_, mode="fan_out")):
        with pytest.raises(PackError, match=rf"'kaiming_normal_' does not take a member, .* as in {remedy}"):
            decompk.initialise(packed, given)
    decompk.initialise(packed, lambda net: [nn.init.kaiming_normal_(p) for p in net.parameters() if p.dim() > 1])
    with pytest.warns(UserWarning, match=r"'init' has changed nothing .* lambda net: net\.apply\(init\)\.$") as caught:
        decompk.initialise(packed, init)
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="no attribute 'head'"):
        decompk.initialise(packed, lambda net: nn.init.zeros_(net.head))


def test_what_no_longer_fits_is_refused_and_changes_nothing():
    packed = decompk.pack([network(k) for k in range(K)])
    before = {name: t.clone() for name, t in packed.state_dict().items()}
    seen = []

    def swap(net):
        nn.init.zeros_(net[0].weight)
        seen.append(net)
        if len(seen) == 2:
            net[5] = nn.Linear(32, 7)

    with pytest.raises(PackError, match=r"'5\.(weight|bias)' of member 1 is no slice of the packed module's"):
        decompk.initialise(packed, swap)
    assert all(torch.equal(t, before[name]) for name, t in packed.state_dict().items())
    with pytest.raises(PackError, match="Sequential has no members"):
        decompk.initialise(network(), init)
