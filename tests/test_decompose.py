"""Decompose, extract, compose: the way there and back."""

import copy
import pickle

import pytest
import torch
from helpers import leaves
from nets import ADAPTED, EXACT, NETS, NOTED, build
from torch import nn

import decompk
from decompk.divide.compose import tensors
from decompk.fx.wrapper import Rewritten


def awake(nets):
    """Running statistics that are not 0 and 1, in eval mode."""
    for net in nets:
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        net.eval()
    return nets


@pytest.mark.parametrize("name", EXACT)
def test_the_composed_network_is_the_sum_of_its_members_on_the_full_image(name):
    _, d = build(name)
    subnets = awake(d.subnets(seed=0))
    composed = d.compose(subnets)
    x = torch.randn(3, *d.input_size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(composed(x), sum(net(x) for net in subnets), rtol=0, atol=1e-12)
    assert not d.notes


def test_every_head_of_a_training_network_is_the_sum_of_the_members(name="auxiliary"):
    _, d = build(name)
    subnets = d.subnets(seed=0)
    composed = d.compose(subnets).train()
    x = torch.randn(3, *d.input_size, dtype=torch.float64)
    outputs = [net.train()(x) for net in subnets]
    for i, whole in enumerate(composed(x)):
        torch.testing.assert_close(whole, sum(out[i] for out in outputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_extract_gives_back_the_bits_that_compose_was_given(name):
    net, d = build(name)
    subnets = awake(d.subnets(seed=0))
    composed = d.compose(subnets)
    again = d.extract(composed)
    for member, back in zip(subnets, again, strict=True):
        assert tensors(member).keys() == tensors(back).keys()
        for key, value in tensors(member).items():
            if key not in d.division.summed:
                assert torch.equal(value, tensors(back)[key]), key
    for key, value in tensors(d.compose(again)).items():
        assert torch.equal(value, tensors(composed)[key]), key


@pytest.mark.parametrize("name", ADAPTED)
def test_composing_extracted_blocks_of_any_network_keeps_its_blocks_and_head_bias(name):
    net, d = build(name)
    once = d.compose(d.extract(net))
    for key, value in tensors(once).items():
        kept = value != 0
        assert torch.equal(value[kept], tensors(net)[key][kept]), key
    for bias in d.division.summed:
        assert torch.equal(tensors(once)[bias], tensors(net)[bias])


@pytest.mark.parametrize("K", [2, 3, 5, 6, 7])
def test_a_head_bias_survives_extract_and_compose_to_the_bit(K):
    net = nn.Sequential(nn.Conv1d(1, 420, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(420, 9))
    d = decompk.decompose(net, (1, 42), K)
    assert torch.equal(d.compose(d.extract(net))[3].bias, net[3].bias)


@pytest.mark.parametrize("name", NETS)
def test_members_run_on_their_crops_and_keep_class_and_names(name):
    net, d = build(name)
    x = torch.randn(2, *d.input_size, dtype=torch.float64)
    for member, crop in zip(d.subnets(seed=0), d.split(x), strict=True):
        inner = member._inner if isinstance(member, Rewritten) else member
        assert type(inner) is type(net)
        assert [*member.state_dict()] == [*net.state_dict()]
        with torch.no_grad():
            shapes = [tuple(t.shape) for t in leaves(member.eval()(crop))]
            whole = [tuple(t.shape) for t in leaves(net.eval()(x))]
        assert [s[:2] for s in shapes] == [s[:2] for s in whole]


@pytest.mark.parametrize("name", NOTED)
def test_what_is_not_exact_is_said_and_still_composes(name):
    _, d = build(name)
    assert d.notes
    composed = d.compose(d.subnets(seed=0))
    assert composed.eval()(torch.randn(2, *d.input_size, dtype=torch.float64)).shape == (2, 5)


def test_a_shuffling_network_composes_to_one_that_shuffles_within_members_and_can_be_kept(tmp_path):
    _, d = build("shuffle")
    composed = d.compose(awake(d.subnets(seed=0)))
    assert isinstance(composed, Rewritten)
    x = torch.randn(2, *d.input_size, dtype=torch.float64)
    expected = composed(x)
    assert torch.equal(copy.deepcopy(composed)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(composed))(x), expected)
    assert torch.equal(torch.compile(composed, backend="aot_eager", fullgraph=True)(x), expected)
    assert composed.float()(x.float()).dtype == torch.float32
    assert not [key for key in composed.state_dict() if "order" in key]


def test_numbers_written_into_the_code_follow_the_members_width():
    net, d = build("pieces")
    member = d.subnets(seed=0)[0]
    assert isinstance(member, Rewritten)
    member.train()
    member(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in member.parameters())


def test_the_global_network_and_its_mode_are_left_alone():
    net, _ = build("residual")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.eval()
    net.stem.train()
    d = decompk.decompose(net, (3, 16, 16))
    d.compose(d.subnets())
    assert (net.training, net.stem.training, net.a.training) == (False, True, False)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_composed_and_extracted_networks_have_the_modes_and_the_frozen_parameters_of_what_they_are_made_of():
    net, d = build("residual")
    members = d.subnets(seed=0)
    for member in members:
        member.a.eval()
        for part in (member.stem, member.c):
            part.requires_grad_(False)
    frozen = {"stem.0.weight", "stem.1.weight", "stem.1.bias", "c.weight", "c.bias"}
    for made in (d.compose(members), d.compose(decompk.pack(members))):
        for each in (made, d.extract(made)[3]):
            assert (each.training, each.a.training) == (True, False)
            assert {name for name, p in each.named_parameters() if not p.requires_grad} == frozen
    members[2].a.train()  # one is enough
    members[2].c.requires_grad_(True)
    made = d.compose(members)
    assert made.a.training and made.c.weight.requires_grad and not made.stem[0].weight.requires_grad
    assert net.a.training and net.stem[0].weight.requires_grad


def test_compose_takes_members_packed_and_says_what_it_takes():
    _, d = build("residual")
    members = d.subnets(seed=0)
    for given in (decompk.pack(members), torch.nn.ModuleList(members), iter(members)):
        for key, value in tensors(d.compose(given)).items():
            assert torch.equal(value, tensors(d.compose(members))[key])
    for given in (members[0], nn.Sequential(*members), None):
        with pytest.raises(decompk.PackError, match="takes the 4 sub-networks in a list, or packed, not"):
            d.compose(given)


def test_a_seed_gives_the_same_members_and_leaves_the_random_state_alone():
    _, d = build("residual")
    state = torch.random.get_rng_state()
    first, second = d.subnets(seed=3), d.subnets(seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(first, second, strict=True):
        other = b.state_dict()
        assert all(torch.equal(v, other[key]) for key, v in a.state_dict().items())
    assert not torch.equal(first[0].a.weight, first[1].a.weight)


def test_fresh_members_keep_the_authors_initialisation():
    net = decompk.models.vgg16(num_classes=10, input_size=(3, 32, 32), width=32, fc=64)
    for name, module in decompk.decompose(net, (3, 32, 32)).subnets(seed=0)[0].named_modules():
        if isinstance(module, nn.Conv2d):
            own = net.get_submodule(name)
            gain = module.weight.std() * module.weight[0].numel() ** 0.5
            torch.testing.assert_close(gain, own.weight.std() * own.weight[0].numel() ** 0.5, rtol=1e-3, atol=0)
            assert not module.bias.any()


def test_mean_heads_average_and_extract_undoes_it():
    _, d = build("residual")
    subnets = awake(d.subnets(seed=0))
    composed = d.compose(subnets, head="mean")
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(composed(x), sum(net(x) for net in subnets) / 4, rtol=0, atol=1e-12)
    for net, back in zip(subnets, d.extract(composed, head="mean"), strict=True):
        assert torch.equal(net.head.fc.weight, back.head.fc.weight)


def test_concatenated_heads_put_the_members_outputs_side_by_side():
    _, d = build("residual")
    subnets = awake(d.subnets(seed=0))
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    composed = d.compose(subnets, head="concat")
    assert composed.head.fc.out_features == 20
    torch.testing.assert_close(composed(x), torch.cat([net(x) for net in subnets], 1), rtol=0, atol=1e-12)


def test_a_network_may_be_divided_to_its_very_outputs():
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1)
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    d = decompk.decompose(net, (3, 8, 8), 4, head="concat")
    subnets = d.subnets(seed=0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(d.compose(subnets)(x), torch.cat([m(x) for m in subnets], 1), rtol=0, atol=1e-12)
    assert torch.equal(d.extract(d.compose(subnets))[2][2].bias, subnets[2][2].bias)


def test_the_first_fc_layer_lies_where_its_crop_is():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(32), nn.Flatten(), nn.Linear(4 * 49, 4), nn.Linear(4, 2))
    d = decompk.decompose(net, (3, 224, 224), 4)
    members = d.extract(net)
    assert members[0][3].weight.shape == (1, 9)
    for member, rows in zip(members, ([0, 1, 2], [0, 1, 2], [4, 5, 6], [4, 5, 6]), strict=True):
        k = members.index(member)
        columns = [0, 1, 2] if k % 2 == 0 else [4, 5, 6]
        block = net[3].weight[k].reshape(4, 7, 7)[k][rows][:, columns]
        assert torch.equal(member[3].weight[0].reshape(3, 3), block)


def test_the_first_fc_layer_of_a_map_one_position_high_lies_where_its_crop_is():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.MaxPool2d((8, 1)), nn.Flatten(), nn.Linear(4 * 16, 4), nn.Linear(4, 2))
    d = decompk.decompose(net.double(), (1, 8, 16), (1, 4))
    members = d.subnets(seed=0)
    x = torch.randn(2, 1, 8, 16, dtype=torch.float64)
    total = sum(member(part) for member, part in zip(members, d.split(x), strict=True))
    torch.testing.assert_close(d.compose(members)(x), total, rtol=0, atol=1e-12)


def test_a_bare_linear_layer_is_a_network():
    net = nn.Linear(8, 4)
    packed = decompk.grouped_subnets(net, seed=0)
    assert [member.in_features for member in packed.unpack()] == [2] * 4
    x = torch.randn(3, 8)
    torch.testing.assert_close(packed(x).sum(0), packed.compose()(x))


class Flattens(nn.Module):
    """Two convolutions, whose map `flat` makes vectors of."""

    def __init__(self, flat, features=200):
        super().__init__()
        self.a, self.b, self.flat = nn.Conv2d(3, 8, 5), nn.Conv2d(8, 8, 5), flat
        self.fc, self.norm, self.last = nn.Linear(features, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.a(x).relu(), 2)
        x = nn.functional.max_pool2d(self.b(x).relu(), 2)
        return self.last(self.fc(self.flat(self, x)).relu())


FLATTENS = {
    "at once": lambda net, x: x.flatten(1),
    "space first": lambda net, x: x.flatten(2).flatten(1),
    "space turned": lambda net, x: x.transpose(2, 3).flatten(1),
    "all of it": lambda net, x: x.transpose(2, 3).reshape(x.size(0), x.size(1), -1).relu().flatten(1),
    "turned twice": lambda net, x: x.permute(0, 2, 3, 1).permute(0, 3, 2, 1).flatten(1),
    "by features": lambda net, x: x.flatten(2).transpose(1, 2).transpose(1, 2).flatten(1),
    "with an axis more": lambda net, x: x.unsqueeze(2).flatten(1),
    "normalised": lambda net, x: net.norm(x.flatten(2)).flatten(1),
    "one axis": lambda net, x: x.amax(2).flatten(1),
}


@pytest.mark.parametrize("partitions", [4, (1, 2), (2, 1)])
@pytest.mark.parametrize("name", FLATTENS)
def test_the_first_fc_layer_lies_where_its_crop_is_whichever_way_the_map_is_flattened(name, partitions):
    torch.manual_seed(0)
    one_axis = name == "one axis"
    net = Flattens(FLATTENS[name], 40 if one_axis else 200).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    d = decompk.decompose(net, (3, 32, 32), (1, 2) if one_axis else partitions)
    assert d.adapted == ["fc"] and not d.notes
    members = d.extract(net)
    total = sum(member(part) for member, part in zip(members, d.split(x), strict=True))
    if one_axis:  # a member's 1 of 5 columns: which are they?
        assert torch.equal(members[0].fc.weight[:, :1], net.fc.weight[:4, :1])
        assert torch.equal(members[1].fc.weight[:, :1], net.fc.weight[4:, 24:25])
    torch.testing.assert_close(d.compose(members)(x), total, rtol=0, atol=1e-12)


def test_windows_of_a_turned_image_are_refused_and_what_needs_none_is_not():
    net = Flattens(FLATTENS["at once"]).eval()
    turned = nn.Sequential(Turned(), net)
    with pytest.raises(decompk.UnsupportedOperation, match="swaps axes of the image"):
        decompk.decompose(turned, (3, 32, 32))
    last = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    assert not decompk.decompose(nn.Sequential(Turned(), nn.Conv2d(3, 8, 3), *last), (3, 32, 32)).notes


class Turned(nn.Module):
    def forward(self, x):
        return x.transpose(2, 3)


def test_a_width_that_does_not_divide_names_the_numbers_that_divide_all():
    layers = nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 18, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    with pytest.raises(decompk.PartitionError, match=r"divides 18 \(all widths: 2, 3, 6\)\.$"):
        decompk.decompose(nn.Sequential(*layers, nn.Linear(18, 5)), (3, 32, 32), 4)


def test_splitting_a_batch_copies_nothing():
    d = build("residual")[1]
    x = torch.randn(2, 3, 16, 16)
    parts = d.split(x)
    assert [tuple(p.shape) for p in parts] == [(2, 3, 8, 8)] * 4
    assert all(p.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for p in parts)
    assert torch.equal(parts[3], x[:, :, 8:, 8:])
