"""Theorems 2.1 and 2.2, and that their checks can fail."""

import pytest
import torch
from nets import Call
from torch import nn
from torch.nn import functional as F

from decompk import decompose, models, theory


def valid_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, dilation=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, groups=4), nn.PReLU(16), nn.Flatten(), nn.Linear(16 * 81, 32), nn.ReLU(),
        nn.Linear(32, 16), nn.Dropout(), nn.Linear(16, 10),
    ).double()  # fmt: skip


def checked(net, size, partitions=4, crop_size=None, batch=3):
    d = decompose(net, size, partitions, crop_size=crop_size)
    subnets = d.subnets(seed=0)
    for subnet in subnets:
        for module in subnet.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    composed = d.compose(subnets)
    x = torch.randn(batch, *size, dtype=torch.float64)
    return d, subnets, composed, x


def test_a_valid_padding_network_equals_its_members_layer_by_layer_and_sums_to_them():
    d, subnets, composed, x = checked(valid_cnn(), (3, 28, 28))
    check = theory.theorem_2_1(d, subnets, composed, x)
    assert check.violation < 1e-12 and check.output is not None and check.output < 1e-12
    assert all(layer.field is not None for layer in check.layers)
    assert {layer.name for layer in check.layers if layer.member == 3} >= {"_0", "_3", "_6", "_9", "_11"}
    whole_map = [layer.field for layer in check.layers if layer.name == "_6"]
    assert whole_map == [((0, 2), (0, 2))] * 4
    expected = sum(net.eval()(part) for net, part in zip(subnets, d.split(x), strict=True))
    torch.testing.assert_close(composed.eval()(x), expected, rtol=0, atol=1e-12)


def test_a_same_padding_vgg16_equals_its_members_inside_their_fields():
    net = models.vgg16(num_classes=10, input_size=(3, 128, 128), width=8, fc=32).double()
    d, subnets, composed, x = checked(net, (3, 128, 128), batch=1)
    check = theory.theorem_2_1(d, subnets, composed, x)
    assert check.violation < 1e-12
    inside = {layer.name: layer.field for layer in check.layers if layer.member == 0}
    assert inside["features_0"] == ((0, 63), (0, 63))  # one row lost at each cut edge, none at the image's border
    assert inside["features_16"] == ((0, 5), (0, 5))
    assert sum(field is not None for field in inside.values()) >= 20
    assert check.output is None  # the first FC layer reads past the fields
    reasons = {layer.reason for layer in check.layers if layer.field is None}
    assert all("left inside" in reason or "outside the field" in reason for reason in reasons)


def test_where_a_stride_does_not_divide_the_crop_the_check_says_so():
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.MaxPool2d(4), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(32, 2))
    d, subnets, composed, x = checked(net.double(), (1, 11, 11), crop_size=6)
    check = theory.theorem_2_1(d, subnets, composed, x)
    reasons = {layer.member: layer.reason for layer in check.layers if layer.name == "_1"}
    assert reasons[0] == "" and "between two positions" in reasons[3]
    assert check.output is None and check.violation < 1e-12


def test_global_pooling_has_no_field():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    d, subnets, composed, x = checked(net.double(), (3, 16, 16))
    check = theory.theorem_2_1(d, subnets, composed, x)
    assert check.violation < 1e-12 and check.output is None
    assert any(layer.name == "_2" and "looks past" in layer.reason for layer in check.layers)


def test_a_planted_violation_of_theorem_2_1_is_found():
    d, subnets, composed, x = checked(valid_cnn(), (3, 28, 28))
    with torch.no_grad():
        composed[3].weight[0, 7, 0, 0] = 0.1  # between member 0 and member 3
    assert theory.theorem_2_1(d, subnets, composed, x).violation > 1e-3


def test_grouped_shuffled_and_strided_maps_match_too():
    from nets import Shuffle

    d, subnets, composed, x = checked(Shuffle().double(), (3, 32, 32))
    check = theory.theorem_2_1(d, subnets, composed, x)
    assert check.violation < 1e-12
    assert sum(layer.field is not None for layer in check.layers) > 60


@pytest.mark.parametrize("sharpness", [0.1, 1, 10])
def test_theorem_2_2_holds_for_any_members_whose_outputs_add_up(sharpness):
    logits = torch.randn(4, 500, 6, dtype=torch.float64) * sharpness
    target = torch.randint(6, (500,))
    logits[:, :100] += 5 * sharpness * F.one_hot(target[:100], 6)
    check = theory.theorem_2_2(logits, target)
    assert check.violation < 1e-12 and check.lost == 0 and check.all_right >= 50
    assert check.loss <= check.bound


def test_a_planted_violation_of_theorem_2_2_is_found():
    logits = torch.randn(4, 50, 6, dtype=torch.float64) + 9 * F.one_hot(torch.zeros(50, dtype=int), 6)
    check = theory.theorem_2_2(logits, torch.zeros(50, dtype=int), composed=-logits.sum(0))
    assert check.lost == 50 and check.violation > 1


class Cropped(nn.Module):
    def __init__(self, crop):
        super().__init__()
        self.conv, self.crop = nn.Conv2d(8, 8, 3), crop

    def forward(self, x):
        return F.relu(self.conv(x) + self.crop(x))


def fc(inputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 5))


class OwnLinear(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(o, i) / 10)

    def forward(self, x):
        return F.linear(x, self.kernel)


def net_with(*middle, padding=0, fc=None, width=8):
    last = fc or nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=padding), *middle, last)


# Operations that see more than their own window, or that the field must not be claimed for.
WIDE = {
    "instance norm": net_with(nn.InstanceNorm2d(8, affine=True)),
    "group norm": net_with(nn.GroupNorm(4, 8)),
    "batch norm without statistics": net_with(nn.BatchNorm2d(8, track_running_stats=False)),
    "circular padding": net_with(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")),
    "transposed maps": net_with(Call(lambda x: x.transpose(2, 3))),
    "maps side by side": net_with(Call(lambda x: torch.cat([x, x], 2))),
    "shifted maps": net_with(Call(lambda x: x[:, :, 1:])),
    "indices": net_with(Call(lambda x: F.max_pool2d(x, 3, 1, 1, return_indices=True)[0])),
    "a mean over flattened space": net_with(fc=nn.Sequential(Call(lambda x: x.flatten(2).mean(-1)), nn.Linear(8, 5))),
    "a sigmoid after the head": nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                              nn.Linear(8, 5), nn.Sigmoid()),
    "a functional first FC behind same padding": net_with(
        padding=1, fc=nn.Sequential(nn.Flatten(), OwnLinear(8 * 256, 8), nn.Linear(8, 5))),
    "a convolution for a head": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)),
    "layer norm": net_with(fc=nn.Sequential(nn.Flatten(), nn.Linear(8 * 196, 8), nn.LayerNorm(8), nn.Linear(8, 5))),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
def test_no_field_is_claimed_where_values_differ(name):
    d, subnets, composed, x = checked(WIDE[name].double(), (3, 16, 16))
    check = theory.theorem_2_1(d, subnets, composed, x)
    assert check.violation < 1e-12 and check.output is None


# Where (2.16) does hold, the check says so.
HOLDS = {
    "a residual with a cropped shortcut (2.24)": net_with(Cropped(lambda y: y[:, :, 1:-1, 1:-1]), fc=fc(8 * 144)),
    "a shortcut cropped by negative padding": net_with(Cropped(lambda y: F.pad(y, (-1, -1, -1, -1))), fc=fc(8 * 144)),
    "a functional first FC": net_with(fc=nn.Sequential(nn.Flatten(), OwnLinear(8 * 196, 8), nn.Linear(8, 5))),
    "a convolution over the whole map": net_with(
        fc=nn.Sequential(nn.Conv2d(8, 8, 14), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5))),
    "strides": net_with(fc=nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 2, 2), nn.Flatten(), nn.Linear(8 * 49, 8),
                                         nn.ReLU(), nn.Linear(8, 5))),
}  # fmt: skip


@pytest.mark.parametrize("name", HOLDS)
def test_valid_padding_networks_sum_to_their_members(name):
    d, subnets, composed, x = checked(HOLDS[name].double(), (3, 16, 16))
    check = theory.theorem_2_1(d, subnets, composed, x)
    assert check.violation < 1e-12 and check.output is not None


def test_one_member_that_sees_everything_equals_the_network():
    d, subnets, composed, x = checked(net_with().double(), (3, 16, 16), partitions=1)
    assert theory.theorem_2_1(d, subnets, composed, x).violation < 1e-12
