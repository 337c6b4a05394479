"""The literal call: grouped_subnets(model) alone finds the size of a sample, or lays its crops for the first batch."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_tensors
from torch import nn
from zoo import torchvision

import decompk
from decompk import Crop, PartitionError, models


class LeNet(nn.Module):
    """As people write it by hand; `reshape` is how it flattens."""

    def __init__(self, channels, padding, features=400, reshape=lambda x: x.view(x.size(0), -1)):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, 8, 5, padding=padding), nn.Conv2d(8, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(features, 120), nn.Linear(120, 84), nn.Linear(84, 10)
        self.reshape = reshape

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = self.reshape(F.max_pool2d(F.relu(self.conv2(x)), 2))
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def counted(x):
    count = 1
    for size in x.size()[1:]:
        count *= size
    return count


def pooled(channels=3, width=8):
    layers = nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


def flat(side, before=(), width=8):
    last = nn.Linear(width * side * side, width), nn.ReLU(), nn.Linear(width, 2)
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), *before, nn.Flatten(), *last)


class Timms(nn.Sequential):
    """A network with the configuration that timm's have."""

    default_cfg = {"input_size": (3, 48, 40), "num_classes": 5}


def huggings(net):
    net.config = type("Config", (), {"image_size": 56, "num_channels": 3})()
    return net


# name → (network, the size it must find, where from)
SIZES = {
    "LeNet of 28 pixels": (lambda: LeNet(1, 2), (1, 28, 28), "common"),
    "LeNet of 32 pixels": (lambda: LeNet(3, 0), (3, 32, 32), "common"),
    "LeNet with its features written out": (
        lambda: LeNet(1, 2, reshape=lambda x: x.view(-1, 400)),
        (1, 28, 28),
        "common",
    ),
    "LeNet that counts its features": (
        lambda: LeNet(1, 2, reshape=lambda x: x.view(-1, counted(x))),
        (1, 28, 28),
        "common",
    ),
    "LeNet that multiplies its features": (
        lambda: LeNet(1, 2, reshape=lambda x: x.view(x.shape[0], math.prod(x.shape[1:]))),
        (1, 28, 28),
        "common",
    ),
    "one size that is not common": (lambda: flat(14), (1, 14, 14), "only size"),
    "one size far from the middle": (lambda: flat(6), (1, 6, 6), "only size"),
    "vectors": (lambda: models.mlp(64, 4), (64,), "first layer"),
    "ResNet": (lambda: models.cifar_resnet8(width=8), (3, 32, 32), "declares"),
    "VGG at its size": (lambda: models.vgg8(input_size=(1, 16, 24), width=8), (1, 16, 24), "declares"),
    "signal": (lambda: models.signal_cnn(2, length=100, width=8), (2, 100), "declares"),
    "volume": (lambda: models.volume_cnn(1, width=8), (1, 20, 20, 20), "declares"),
    "timm": (lambda: Timms(*pooled()), (3, 48, 40), "default_cfg declares"),
    "timm with other channels": (lambda: Timms(*pooled(channels=1)), (1, 48, 40), "default_cfg declares"),
    "Hugging Face": (lambda: huggings(pooled()), (3, 56, 56), "config declares"),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_model_alone_is_what_it_is_with_its_size_given(name):
    make, size, source = SIZES[name]
    torch.manual_seed(0)
    net = make()
    state = torch.random.get_rng_state()
    packed, told = decompk.grouped_subnets(net, seed=0), decompk.grouped_subnets(net, size, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert packed.decomposition.input_size == size and packed.decomposition.crops == told.decomposition.crops
    assert source in packed.describe() and source in repr(packed.decomposition)
    assert_same_tensors(packed, told.unpack(), 0)
    x = torch.randn(2, *size)
    assert torch.equal(packed.eval()(x), told.eval()(x))


@pytest.mark.parametrize("name", ["pooled", "sequences", "signal", "volume"])
def test_where_any_size_fits_the_first_batch_lays_the_crops_as_its_size_would_have(name):
    conv = {"signal": (nn.Conv1d, nn.AdaptiveAvgPool1d), "volume": (nn.Conv3d, nn.AdaptiveAvgPool3d)}
    shape = {"pooled": (3, 40, 56), "sequences": (9, 12), "signal": (2, 44), "volume": (2, 6, 8, 10)}[name]
    if name in conv:
        layer, pool = conv[name]
        net = nn.Sequential(layer(2, 8, 3, padding=1), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(8, 3))
    else:
        net = pooled() if name == "pooled" else models.Recurrent(12, 3, hidden=8)
    options = {"crop_size": 30} if name == "pooled" else {}
    packed = decompk.grouped_subnets(net, seed=0, **options)
    told = decompk.grouped_subnets(net, shape, seed=0, **options)
    assert packed.decomposition.input_size is None and "first batch" in packed.describe()
    x = torch.randn(3, *shape)
    assert torch.equal(packed(x), told(x))
    assert packed.decomposition.input_size == shape and packed.decomposition.crops == told.decomposition.crops
    assert "as its first batch has" in packed.describe()
    with pytest.raises(PartitionError, match="first batch"):
        packed(torch.randn(3, *shape[:1], *(n + 4 for n in shape[1:])))


def test_before_the_first_batch_all_works_that_needs_no_crops_and_the_rest_says_what_is_missing():
    net = pooled()
    packed = decompk.grouped_subnets(net, seed=0)
    told = decompk.grouped_subnets(net, (3, 32, 32), seed=0).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(packed.compose().eval()(x), told.compose().eval()(x))
    assert packed.unpack()[3](x).shape == (2, 5)
    told.load_state_dict(packed.state_dict())
    fused = decompk.fuse(packed).eval()
    copies = [copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed]
    for wanting in (lambda: packed.decomposition.crops, packed.decomposition.report):
        with pytest.raises(PartitionError, match=r"wait for the size of its first batch: .* give .* input_size=\.$"):
            wanting()
    autoencoder = decompk.grouped_subnets(models.conv_autoencoder(width=8), head="concat")
    with pytest.raises(PartitionError, match="first batch"):
        autoencoder.compose()
    for other in copies:
        assert torch.equal(other.eval()(x), told(x))
    torch.testing.assert_close(fused(x), told(x))
    assert fused.crops == told.crops and packed.decomposition.report().K == 4


def test_a_compiled_network_may_take_the_first_batch():
    packed = decompk.grouped_subnets(pooled(), seed=0).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = copy.deepcopy(packed)(x)
    compiled = torch.compile(packed, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
    assert packed.decomposition.input_size == (3, 32, 32)


def test_batches_that_are_cut_already_leave_the_crops_to_the_first_image():
    packed = decompk.grouped_subnets(pooled(), seed=0)
    assert packed(torch.randn(4, 2, 3, 16, 16)).shape == (4, 2, 5) and packed.decomposition.input_size is None
    assert packed(torch.randn(2, 3, 20, 20)).shape == (4, 2, 5)
    assert packed.decomposition.crops[3] == Crop(10, 10, 10, 10)


def test_a_first_batch_that_does_not_fit_is_refused_and_leaves_the_next_one_be():
    packed = decompk.grouped_subnets(pooled(), seed=0, crop_size=20)
    for shape, words in (((2, 1, 32, 32), "takes samples of"), ((2, 3, 16, 16), "crop height of 20")):
        with pytest.raises(PartitionError, match=words):
            packed(torch.randn(shape))
    assert packed(torch.randn(2, 3, 32, 32)).shape == (4, 2, 5)


def test_crops_that_a_batch_laid_in_vain_can_be_laid_again():
    waiting, told = decompk.decompose(pooled()), decompk.decompose(pooled(), (3, 32, 32))
    crops = told.crops
    for d in (waiting, told):
        d.lay_crops((3, 32, 32))
        d.lift_crops()
    assert waiting.input_size is None and told.crops == crops
    assert waiting.lay_crops((3, 64, 64))[3] == Crop(32, 32, 32, 32)


def test_a_first_batch_for_which_the_members_would_be_others_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AvgPool2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), Last())
    packed = decompk.grouped_subnets(net)
    with pytest.raises(PartitionError, match=r"would be others .* input_size=\(3, 8, 8\)"):
        packed(torch.randn(2, 3, 8, 8))
    assert packed(torch.randn(2, 3, 32, 32)).shape == (4, 2, 5)
    assert decompk.grouped_subnets(net, (3, 8, 8))(torch.randn(2, 3, 8, 8)).shape == (4, 2, 5)


class Last(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(8, 5))


def test_several_sizes_whose_members_would_differ_are_named():
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AvgPool2d(37), nn.Flatten(), nn.Linear(288, 8)
    net = nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 2))  # half of 224 pixels leaves 2×2 of them, half of 227 3×3
    with pytest.raises(PartitionError, match=r"1×224×224, 1×227×227 and 1×256×256, and .* differ: give input_size="):
        decompk.decompose(net)
    assert decompk.decompose(net, (1, 224, 224)).adapted


def test_what_is_pooled_to_one_size_has_the_same_members_at_any():
    layers = nn.Conv2d(1, 8, 1), nn.AdaptiveMaxPool2d(7), nn.Flatten(), nn.Linear(392, 8), nn.ReLU(), nn.Linear(8, 2)
    assert decompk.decompose(nn.Sequential(*layers)).input_size is None


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), "tokens.* decompk.pack"),
        (nn.Sequential(nn.ReLU()), "give input_size="),
        (flat(600), "runs on no square image"),
        (LeNet(1, 0, 256), "larger crop_size"),
    ],
)
def test_what_has_no_size_is_refused_with_a_remedy(net, words):
    with pytest.raises(PartitionError, match=words) as caught:
        decompk.decompose(net)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((3, 48, 48), r"samples of \(3, 48, 48\): 'fc1' .*; give an input_size= that it runs on"),
        ((1, 32, 32), r"'conv1' .* such as \(3, 32, 32\)"),
        ((32, 32), r"one sample is \(channels, \*spatial\), such as \(3, 32, 32\)"),
        ((4, 3, 32, 32), r"such as \(3, 32, 32\)"),
    ],
)
def test_a_size_on_which_the_network_itself_does_not_run_is_refused_as_that(size, words):
    with pytest.raises(PartitionError, match=f"LeNet itself does not run on .*{words}") as caught:
        decompk.decompose(LeNet(3, 0), size)
    assert "\n" not in str(caught.value)


def test_a_network_that_raises_at_any_size_or_is_lazy_is_refused_with_its_own_words():
    layers = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    for size in (None, (3, 32, 32)):
        with pytest.raises(PartitionError, match="itself .* '1': running_mean should contain 8 elements not 16"):
            decompk.decompose(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(16), *layers), size)
        with pytest.raises(decompk.UnsupportedOperation, match="'0' is lazy .* run a batch through the network first"):
            decompk.decompose(nn.Sequential(nn.LazyConv2d(16, 3), *layers), size)


def test_a_size_may_be_of_any_whole_numbers_and_of_nothing_else():
    for size in (np.array([3, 32, 32]), torch.Size([3, 32, 32]), torch.tensor([3, 32, 32]), [np.int64(3), 32, 32]):
        assert decompk.decompose(LeNet(3, 0), size, margin=np.int64(0)).input_size == (3, 32, 32)
    for size in ("abc", (3.0, 32, 32), torch.zeros(2, 3, 32, 32), 2.5):
        with pytest.raises(PartitionError, match=r"input_size .* must be \(channels, \*spatial\)"):
            decompk.decompose(LeNet(3, 0), size)


def test_a_declaration_goes_with_copies_and_members_declare_their_crops():
    net = copy.deepcopy(models.cifar_resnet8(width=8))
    packed = decompk.grouped_subnets(net)
    assert [member.input_size for member in packed.unpack()] == [(3, 16, 16)] * 4
    assert packed.compose().input_size == net.input_size == (3, 32, 32)
    assert "input_size" not in net.state_dict()


@pytest.mark.skipif(torchvision is None, reason="torchvision is not installed")
@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_torchvisions_networks_take_a_step_by_the_literal_call(name):
    packed = decompk.grouped_subnets(torchvision.models.get_model(name, num_classes=8))
    optimizer = torch.optim.SGD(packed.parameters(), lr=0.01)
    x, y = torch.randn(2, 3, 64, 64), torch.randint(8, (2,))
    loss = decompk.losses.cross_entropy(packed(x), y)
    loss.backward()
    optimizer.step()
    assert packed.compose().eval()(x).shape == packed.ensemble(x).shape == (2, 8)


def test_images_given_to_members_of_vectors_are_refused_with_the_right_call():
    packed = decompk.grouped_subnets(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)))
    x = torch.randn(3, 1, 8, 8)
    with pytest.raises(PartitionError, match=r"give it x.flatten\(1\)"):
        packed(x)
    assert packed(x.flatten(1)).shape == (4, 3, 4)


def test_a_first_batch_that_members_do_not_take_lays_no_crops():
    packed = decompk.grouped_subnets(pooled())
    with pytest.raises(decompk.DecompkError, match="uint8"):
        packed(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert packed(torch.randn(2, 3, 32, 32)).shape == (4, 2, 5)
    with pytest.raises(PartitionError, match="decomposed for 32×32"):
        packed(torch.randn(2, 3, 64, 64))
