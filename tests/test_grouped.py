"""grouped_subnets: K members in one module train as K networks trained one by one, and compose."""

import pytest
import torch
from helpers import assert_packed_equals_separate, assert_same_tensors
from nets import NETS, build

import decompk
from decompk import models


def check(d, steps=5, batch=3):
    subnets = d.subnets(seed=0)
    packed = decompk.pack(subnets, crops=d.crops)
    packed.decomposition = d
    x = torch.randn(batch, *d.input_size, dtype=torch.float64)
    crops = torch.stack(d.split(x))
    assert_packed_equals_separate(subnets, crops, steps, packed=packed)
    with torch.no_grad():
        packed.eval()
        from_image, from_crops = packed(x), packed(crops)
    torch.testing.assert_close(from_image, from_crops, rtol=0, atol=0)
    return packed


@pytest.mark.parametrize("name", NETS)
def test_packed_members_train_as_if_alone(name):
    check(build(name)[1])


SMALL = {
    "vgg16": (models.vgg16(10, (3, 64, 64), width=8, fc=32), (3, 64, 64), 4, None),
    "resnet50": (models.resnet50(10, width=8), (3, 64, 64), 4, 40),
    "resnet50_food101": (models.resnet50(11, width=8, variant="table3.4"), (3, 64, 64), (2, 4), 40),
    "resnet32": (models.cifar_resnet32(width=8), (3, 32, 32), 4, 20),
    "resnet8": (models.cifar_resnet8(width=8), (3, 16, 16), 4, None),
}  # those of 101 and 110 layers have more of the same blocks


@pytest.mark.parametrize("name", SMALL)
def test_the_papers_networks_train_packed_as_alone_and_compose_to_their_sum(name):
    net, size, partitions, crop = SMALL[name]
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # members draw independently, packed or alone
    d = decompk.decompose(net.double(), size, partitions, crop_size=crop)
    packed = check(d, steps=2, batch=2)
    members = packed.eval().unpack()
    assert_same_tensors(packed, members, 0)
    again = decompk.pack(members).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in packed.state_dict().items())
    x = torch.randn(2, *size, dtype=torch.float64)
    composed = packed.compose().eval()
    if not d.division.adapted:
        with torch.no_grad():
            whole = composed(x)
            parts = sum(member.eval()(x) for member in members)
        torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12 * max(1.0, float(parts.abs().max())))
    for member, back in zip(members, d.extract(composed), strict=True):
        found = back.state_dict()
        for key, value in member.state_dict().items():
            assert key in d.division.summed or torch.equal(value, found[key]), key


def test_in_float64_packed_members_train_to_the_same_bits_as_alone():
    d = decompk.decompose(models.cifar_resnet8(width=8).double(), (3, 32, 32), crop_size=20)
    members = d.subnets(seed=0)
    packed = decompk.pack(members, crops=d.crops)
    x, y = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(10, (4,))
    together = torch.optim.Adam(packed.parameters())
    alone = [torch.optim.Adam(member.parameters()) for member in members]
    for _ in range(2):
        together.zero_grad()
        decompk.losses.cross_entropy(packed(x), y).backward()
        together.step()
        for member, crop, optimizer in zip(members, d.split(x), alone, strict=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(member(crop), y).backward()
            optimizer.step()
    assert_same_tensors(packed, members, 0)


def test_the_ensemble_adds_the_members_outputs():
    packed = decompk.grouped_subnets(models.cifar_resnet32(width=8), (3, 32, 32), 4, crop_size=20, seed=1)
    x = torch.randn(2, 3, 32, 32)
    packed.eval()
    assert packed(x).shape == (4, 2, 10)
    torch.testing.assert_close(packed.ensemble(x), packed(x).sum(0))
    assert packed.decomposition.crops[3].start == (12, 12)


def test_a_batch_of_the_wrong_size_is_refused():
    packed = decompk.grouped_subnets(models.cifar_resnet32(width=8), (3, 32, 32))
    with pytest.raises(decompk.PartitionError, match="28"):
        packed(torch.randn(2, 3, 28, 28))
