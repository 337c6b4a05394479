"""A fused network computes what the packed one does: in every mode, for every pattern, with the same tensors."""

import copy
import io
import random
import sys
import typing
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from helpers import leaves, used_members
from nets import NETS
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from zoo import torchvision

import decompk
from decompk import DecompkError, UnsupportedOperation, fuse, models
from decompk.crops import Crop
from decompk.kernels.device import interpreted
from decompk.packed import fused_layer
from decompk.packed.pack import Packed, pack

K, N, SIZE = 2, 3, 8
needs_torchvision = pytest.mark.skipif(torchvision is None, reason="torchvision is not installed")


@pytest.fixture
def as_on_kernels(monkeypatch):
    """Training takes the way it takes on Triton's kernels, on torch's operators."""
    monkeypatch.setattr(fused_layer, "on_kernels", lambda x: True)


def packed_of(make, count=K, **options):
    """`count` members that are not as they were at the start."""
    return pack(used_members(make, count), **options)


def images(*shape):
    return torch.randn(shape or (N, 3, SIZE, SIZE))


class Counted(TorchDispatchMode):
    """Counts this package's operators, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "decompk":
            self.calls[function._opname] += 1
        return function(*args, **(kwargs or {}))


def step(net, x):
    """What one step of training leaves: outputs, gradients and running statistics, each as one vector."""
    net.zero_grad()
    out = torch.cat([leaf.flatten() for leaf in leaves(net(x))])
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype)).sum().backward()
    gradients = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
    statistics = [b.flatten().to(out.dtype) for b in net.buffers()] or [out.new_zeros(1)]
    return {"output": out.detach(), "gradients": torch.cat(gradients), "statistics": torch.cat(statistics)}


def error(value, truth):
    return float((value.detach().double() - truth.detach()).norm() / truth.norm().clamp(min=1).detach())


def assert_as_exact(fused, unfused, truth, what=""):
    assert fused.shape == unfused.shape and fused.dtype == unfused.dtype
    assert error(fused, truth) <= 2 * error(unfused, truth) + 1e-6, what


def check_eval(packed, x, fused=None):
    """In eval mode without gradients; the original is left as it is."""
    packed = copy.deepcopy(packed).eval()
    fused, exact = fuse(packed), copy.deepcopy(packed).double()
    with torch.no_grad():
        assert_as_exact(fused(x.clone()), packed(x.clone()), exact(x.double()))


def check_training(packed, x, steps=2):
    """Outputs, gradients and statistics, each step from the same tensors."""
    nets = [copy.deepcopy(packed).train() for _ in range(2)]
    nets.append(copy.deepcopy(packed).double().train())
    fused = fuse(nets[0])
    for _ in range(steps):
        ours, theirs, truth = step(fused, x), step(nets[1], x), step(nets[2], x.double())
        for name in truth:
            assert_as_exact(ours[name], theirs[name], truth[name], name)
        with torch.no_grad():
            for net in nets:
                for p, q in zip(net.parameters(), nets[2].parameters(), strict=True):
                    p -= 0 if q.grad is None else 0.02 * q.grad


# ---- patterns -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A stem, a middle that differs, and a head. `parts`: what becomes of a, b and c."""

    parts = {}
    trains = True

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.b, self.c = (
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.Conv2d(8, 8, 1),
        )
        self.a_norm, self.b_norm, self.c_norm = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.middle(torch.sigmoid(self.relu(self.stem_norm(self.stem(x))))).mean((2, 3)))


class EarlierResidual(Net):
    parts = {"a": "batch norm + ReLU", "b": "batch norm + residual + ReLU"}

    def middle(self, x):
        return F.relu(self.b_norm(self.b(F.relu(self.a_norm(self.a(x))))) + x)


class LaterResidual(Net):
    parts = {"a": "batch norm + residual + ReLU", "c": "batch norm"}

    def middle(self, x):
        y = self.a_norm(self.a(x))
        z = self.c_norm(self.c(x))
        return torch.relu(z + y)


class InPlace(Net):
    """The same ReLU everywhere, and sums into the chain's own result, as torchvision writes them."""

    parts = {"a": "batch norm + ReLU", "b": "batch norm + residual + ReLU", "c": "batch norm + residual + ReLU"}

    def middle(self, x):
        y = self.b_norm(self.b(self.relu(self.a_norm(self.a(x)))))
        y += x
        x = self.relu(y)
        return self.c_norm(self.c(x)).add_(x).relu_()


class Functions(Net):
    parts = {"a": "batch norm + ReLU", "b": "batch norm + residual + ReLU", "c": "batch norm + residual + ReLU"}

    def middle(self, x):
        x = torch.relu_(self.a_norm(self.a(x)))
        x = F.relu(torch.add(x, self.b_norm(self.b(x))), True)
        return F.relu(self.c_norm(self.c(x)).add(x), inplace=False)


class WithoutNorm(Net):
    parts = {"a": "ReLU", "b": "residual + ReLU", "c": "residual"}

    def middle(self, x):
        x = self.relu(self.a(x))
        x = self.relu(self.b(x) + x)
        return x + self.c(x)


class ResidualWritten(Net):
    """The sum goes into the residual, which is read again."""

    parts = {"a": "batch norm"}

    def middle(self, x):
        y = x * 2
        z = y * 3
        y += self.a_norm(self.a(x))
        return F.relu(y) + z * y


class Aliased(Net):
    """A sum in place, which another name for its target sees."""

    parts = {"a": "batch norm"}

    def middle(self, x):
        x = x * 1
        y = x
        x += self.a_norm(self.a(x * 2))
        x *= 0.5
        return F.relu(x) * y


class InputWritten(Net):
    """What the convolution has read changes before its result is normalised or added to."""

    parts = {"b": "batch norm"}
    trains = False

    def middle(self, x):
        y = self.a(x)
        x.mul_(2)
        x = self.a_norm(y) + x
        y = self.b_norm(self.b(x))
        part = x[:, :4]
        part.mul_(0.5)
        x = y + x
        y = self.c(x)
        torch.sin(x, out=x)
        return self.relu(y) + x


class PreActivation(Net):
    parts = {"b": "residual"}

    def middle(self, x):
        x = self.a(F.relu(self.a_norm(x)))
        return x + self.b(F.relu(self.b_norm(x)))


class Broadcast(Net):
    """Sums that are none of two equal shapes, or not of two tensors, or not with weight one."""

    parts = {"a": "batch norm + residual + ReLU", "b": "batch norm + residual", "c": "batch norm"}

    def middle(self, x):
        x = F.relu(self.a_norm(self.a(x)) + x.mean((2, 3), keepdim=True))
        x = self.b_norm(self.b(x)) + x.size(2)
        return torch.add(self.c_norm(self.c(x)), x, alpha=2)


class Broadcasts(Net):
    """A residual larger than the result."""

    parts = {"a": "batch norm + residual + ReLU", "b": "batch norm"}

    def middle(self, x):
        x = self.relu(self.a_norm(self.a(x.mean((2, 3), keepdim=True))) + x)
        return F.relu(self.b_norm(self.b(x)) + 1)


class ReadTwice(Net):
    parts = {"b": "batch norm"}

    def middle(self, x):
        y = self.a(x)
        z = self.b_norm(self.b(x))
        return F.relu(self.a_norm(y) + y) + F.relu(z + z)


class Shared(Net):
    """One convolution and one batch norm that run twice."""

    parts = {}

    def middle(self, x):
        x = F.relu(self.a_norm(self.a(x)))
        return self.a(F.relu(self.a_norm(self.b(x))))


class SharedStatistics(Net):
    parts = {"c": "batch norm + residual"}
    trains = False  # .double() makes two of what was one

    def __init__(self):
        super().__init__()
        self.b_norm.running_mean, self.b_norm.running_var = self.a_norm.running_mean, self.a_norm.running_var

    def middle(self, x):
        y = self.a_norm(self.a(x))
        return y + self.b_norm(self.b(x)) + self.c_norm(self.c(x))


class Interleaved(Net):
    parts = {"a": "batch norm + ReLU", "b": "batch norm + ReLU"}

    def middle(self, x):
        y, z = self.a(x), self.b(x)
        y, z = self.a_norm(y), self.b_norm(z)
        return torch.cat([y.relu(), z.relu(), x], 1)[:, 4:12]


class Dense(Net):
    parts = {"b": "batch norm + ReLU"}

    def __init__(self):
        super().__init__()
        self.b = nn.Conv2d(16, 8, 1)

    def middle(self, x):
        return torch.cat([F.relu(self.b_norm(self.b(torch.cat([x, self.a(x)], 1)))), x], 1)[:, 2:10]


class Gate(Net):
    parts = {"a": "batch norm", "b": "ReLU"}

    def middle(self, x):
        y = self.a_norm(self.a(x))
        gate = self.c(F.relu(self.b(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        return F.relu(y * gate + x)


class OtherConvs(Net):
    """Groups, padding that is not zero or not even, strides, dilation."""

    parts = {"d": "batch norm + ReLU"}

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.b = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.d, self.d_norm = nn.Conv2d(8, 8, (3, 2), (2, 1), padding=(2, 1), dilation=2), nn.BatchNorm2d(8)

    def middle(self, x):
        x = self.relu(self.b_norm(self.b(self.relu(self.a_norm(self.a(x))))))
        return self.relu(self.d_norm(self.d(x)))


class OtherNorms(Net):
    """Everything a batch norm may be told."""

    parts = {
        "a": "batch norm + ReLU",
        "b": "batch norm + residual + ReLU",
        "c": "batch norm",
        "stem": "batch norm + ReLU",
    }

    def __init__(self):
        super().__init__()
        self.stem_norm = nn.BatchNorm2d(8, momentum=None)
        self.a_norm = nn.BatchNorm2d(8, affine=False, eps=0.1)
        self.b_norm = nn.BatchNorm2d(8, track_running_stats=False)
        self.c_norm = nn.BatchNorm2d(8, momentum=0.7)
        self.c_norm.bias.requires_grad_(False)

    def middle(self, x):
        return self.c_norm(self.c(F.relu(self.b_norm(self.b(F.relu(self.a_norm(self.a(x))))) + x)))


class Sometimes(Net):
    """Other code in train than in eval mode."""

    parts = {"a": "batch norm + ReLU"}

    def middle(self, x):
        x = F.relu(self.a_norm(self.a(x)))
        return self.b_norm(self.b(x)) if self.training else x


PATTERNS = [
    *(
        EarlierResidual,
        LaterResidual,
        InPlace,
        Functions,
        WithoutNorm,
        ResidualWritten,
        Aliased,
        InputWritten,
        PreActivation,
    ),
    *(Broadcast, Broadcasts, ReadTwice, Shared, SharedStatistics, Interleaved, Dense, Gate, OtherConvs, OtherNorms),
    Sometimes,
]
patterns = pytest.mark.parametrize("make", PATTERNS, ids=lambda make: make.__name__)


def table(fused):
    """path → how that layer runs, from the description."""
    rows = [line.split(maxsplit=2) for line in fused.describe().splitlines()[1:]]
    return {path: how.removeprefix("twin, ") for path, _, how in rows}


@patterns
def test_each_pattern_fuses_as_far_as_it_goes_and_stays_right_in_eval_mode(make):
    packed = packed_of(make)
    check_eval(packed, images())
    how = table(fuse(packed.eval()))
    wanted = {"stem": "batch norm + ReLU"} | make.parts
    assert {path: text.removeprefix("fused with ") for path, text in how.items() if "fused with" in text} == wanted


@patterns
def test_each_pattern_trains_the_same_on_the_way_of_the_kernels(make, as_on_kernels):
    if make.trains:
        check_training(packed_of(make), images())


@patterns
def test_each_pattern_trains_the_same_on_a_cpu_and_is_bit_equal_where_nothing_fuses(make):
    """In training, with gradients in eval mode, and in float64."""
    packed = packed_of(make)
    fused, x = fuse(copy.deepcopy(packed)), images()
    if make.trains:
        for net in (packed, fused):
            net.train()
        ours, theirs = step(fused, x), step(packed, x)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4 * theirs[name].abs().max().item())
        for net in (packed, fused):
            net.eval().requires_grad_()
        torch.testing.assert_close(fused(x), packed(x))
    for net in (packed, fused):
        net.eval()
    with torch.no_grad(), Counted() as counted:
        assert torch.equal(fused.double()(x.double()), packed.double()(x.double()))
    assert not counted.calls["fused_conv2d"]


# ---- networks -------------------------------------------------------------------------------------------------------

WHOLE = ("scaled pieces", "custom")  # run member by member, as a whole
IMAGES = {name: case for name, case in NETS.items() if len(case[1]) == 3 and name not in WHOLE}


@pytest.mark.parametrize("name", IMAGES)
def test_decomposed_networks_compute_the_same_fused(name, as_on_kernels):
    make, size, partitions, crop = IMAGES[name]
    torch.manual_seed(1)
    packed = decompk.grouped_subnets(make(), size, partitions, crop)
    check_eval(packed, images(N, *size))
    check_training(packed, images(N, *size), steps=1)


@pytest.mark.parametrize(
    ("name", "size", "convs", "options"),
    [
        ("resnet18x2", 32, 20, {"width": 16}),
        ("resnet50", 64, 53, {"width": 8}),
        ("resnet50_food101", 64, 53, {"width": 8}),
        ("resnet32", 16, 33, {"width": 8}),
        ("vgg16", 64, 13, {"width": 8, "fc": 16, "input_size": (3, 64, 64)}),
    ],
)
def test_every_convolution_of_the_papers_networks_fuses(name, size, convs, options):
    torch.manual_seed(0)
    net = models.MODELS[name].factory(num_classes=5, **options)
    packed = decompk.grouped_subnets(net, (3, size, size), 4)
    packed.train()(images(4, 3, size, size))
    check_eval(packed, images(2, 3, size, size))
    how = [text for text in table(fuse(packed)).values() if "fused with" in text]
    assert len(how) == convs - (2 if name == "resnet32" else 0)
    assert sum("crops" in text for text in how) == 1


@needs_torchvision
@pytest.mark.parametrize("name", ["resnet", "densenet", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_torchvision_networks_compute_the_same_fused(name, as_on_kernels):
    if name == "resnet":
        bottleneck = torchvision.models.resnet.Bottleneck
        make = lambda: torchvision.models.ResNet(bottleneck, [1, 2, 1, 1], num_classes=5, width_per_group=8)  # noqa: E731
    elif name == "densenet":
        make = lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=5)  # noqa: E731
    else:
        make = lambda: torchvision.models.get_model(name, num_classes=5)  # noqa: E731
    packed = packed_of(make)
    check_eval(packed, images(2, 3, 32, 32))
    if name == "resnet":
        check_training(packed, images(4, 3, 64, 64), steps=1)
        assert sum("fused with" in how for how in table(fuse(packed)).values()) == 1 + 5 * 3 + 4


# ---- launches -------------------------------------------------------------------------------------------------------


def test_in_eval_mode_a_layer_is_one_operator_and_in_training_the_moments_come_with_it(as_on_kernels):
    fused = fuse(packed_of(InPlace))
    with torch.no_grad(), Counted() as counted:
        fused.eval()(images())
    assert counted.calls == {"fused_conv2d": 4}
    with Counted() as counted:
        fused.train()(images())
    assert counted.calls == {"fused_conv2d": 4, "batch_norm_finalise": 4, "batch_norm_apply": 4}


@pytest.mark.skipif(not interpreted(), reason="runs kernels on a CPU")
def test_fused_kernels_compute_the_same():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.stem_norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.body, self.body_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            x = F.relu(self.stem_norm(self.stem(x)))
            return F.relu(self.body_norm(self.body(x)) + x)

    packed = packed_of(Tiny, crops=(Crop(0, 0, 6, 6), Crop(1, 2, 6, 6)))
    x = images(2, 2, 8, 8)
    with decompk.backend("triton"):
        check_eval(packed, x)
        check_training(packed, x, steps=1)


# ---- crops ----------------------------------------------------------------------------------------------------------

CROPS = (Crop(0, 0, SIZE, SIZE), Crop(3, 2, SIZE, SIZE))


class Inputs(Counted):
    """The shapes that fused convolutions read."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "decompk" and function._opname == "fused_conv2d":
            self.shapes.append(tuple(args[0].shape))
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.mark.parametrize("make", [EarlierResidual, OtherNorms, WithoutNorm], ids=lambda make: make.__name__)
def test_the_first_convolution_reads_its_crops_from_the_image(make, as_on_kernels):
    packed, x = packed_of(make, crops=CROPS), images(N, 3, 12, 12)
    check_eval(packed, x)
    check_training(packed, x)
    fused = fuse(packed)
    for mode in (True, False):
        with torch.no_grad(), Inputs() as inputs:
            fused.train(mode)(x)
        assert inputs.shapes[0] == (1, N, 3, 12, 12)
    cut = torch.stack([crop.cut(x) for crop in CROPS])
    with torch.no_grad():
        assert torch.allclose(fused(cut), fused(x), atol=1e-5)
    wanted = images(*x.shape).requires_grad_()
    for net in (fused, packed):
        net.train()(wanted).sum().backward()
    half = wanted.grad / 2
    wanted.grad = None
    packed(wanted).sum().backward()
    assert torch.allclose(half, wanted.grad, atol=1e-4)


def test_crops_are_cut_where_more_than_one_convolution_reads_the_image():
    class Two(EarlierResidual):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return super().forward(x) + self.c(x).mean()

    class Normalised(EarlierResidual):
        def forward(self, x):
            return super().forward((x - 0.5) / 2)

    for make in (Two, Normalised):
        packed = packed_of(make, crops=CROPS, input_dims=4)
        check_eval(packed, images(N, 3, 12, 12))
        assert "crops" not in fuse(packed).describe()


def test_a_lone_first_convolution_reads_its_crops_too():
    packed = packed_of(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)), crops=CROPS)
    check_eval(packed, images(N, 3, 12, 12))
    assert table(fuse(packed))["0"] == "reads its crops from the image"


# ---- one network, two ways to run it --------------------------------------------------------------------------------


def test_a_fused_network_is_the_packed_one_under_the_same_names():
    packed = packed_of(EarlierResidual, crops=CROPS)
    fused = fuse(packed)
    assert isinstance(fused, Packed) and fused.unfuse() is packed and fuse(fused).unfuse() is packed
    assert [*fused.state_dict()] == [*packed.state_dict()]
    for (name, ours), (other, theirs) in zip(fused.named_parameters(), packed.named_parameters(), strict=True):
        assert name == other and ours is theirs
    assert all(a is b for a, b in zip(fused.buffers(), packed.buffers(), strict=True))
    assert [type(m) for m in fused.unpack()] == [EarlierResidual] * K
    assert (fused.K, fused.crops, fused.stem) == (packed.K, packed.crops, packed.stem)


def test_training_one_is_seen_in_the_other_and_modes_follow():
    packed, x = packed_of(EarlierResidual), images()
    fused = fuse(packed)
    step(fused.train(), x)
    torch.optim.SGD(fused.parameters(), 0.1).step()
    assert packed.training and packed._inner.training
    fused.eval()
    assert not packed.training
    with torch.no_grad():
        before = fused(x)
        assert torch.allclose(before, packed(x), atol=1e-5)
        packed.train()(x)
        packed.eval()
        packed.a.weight.mul_(2)
        packed.stem_norm.weight.data.mul_(3)
        assert torch.allclose(fused(x), packed(x), atol=1e-4) and not torch.allclose(fused(x), before, atol=1e-2)
        fused.load_state_dict(packed_of(EarlierResidual, count=K).state_dict())
        assert torch.allclose(fused(x), packed(x), atol=1e-4)
        half = fused.to(torch.bfloat16, memory_format=torch.channels_last)
        assert half is fused and packed(x.bfloat16()).dtype == fused(x.bfloat16()).dtype == torch.bfloat16


def test_copies_and_files_of_a_fused_network_are_fused():
    fused, x = fuse(packed_of(InPlace, crops=CROPS)).eval(), images(N, 3, 12, 12)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    with torch.no_grad():
        out = fused(x)
        for other in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
            with Counted() as counted:
                assert torch.equal(other(x), out)
            assert counted.calls == {"fused_conv2d": 4}
            assert other.unfuse().a.weight is other.a.weight is not fused.a.weight
            other.a.weight.zero_()
            assert not torch.equal(other(x), out) and torch.equal(fused(x), out)
            assert other.describe() == fused.describe()


def test_a_decomposed_network_composes_and_adds_up_fused():
    torch.manual_seed(0)
    packed = decompk.grouped_subnets(models.cifar_resnet32(5, width=8), (3, 16, 16), 4).eval()
    fused, x = fuse(packed), images(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(fused.ensemble(x), packed(x).sum(0), atol=1e-4)
        composed, other = fused.compose(), packed.compose()
        assert torch.equal(composed(x), other(x))


def test_functional_calls_swap_parameters():
    packed, other, x = packed_of(EarlierResidual).eval(), packed_of(EarlierResidual, 4).eval(), images()
    other = {name: p.detach()[2:] for name, p in other.named_parameters()}
    with torch.no_grad():
        ours, theirs = (torch.func.functional_call(net, other, (x,)) for net in (fuse(packed), packed))
        assert torch.allclose(ours, theirs, atol=1e-5) and not torch.allclose(theirs, packed(x), atol=1e-2)


def test_the_description_says_what_became_of_each_layer():
    assert table(fuse(packed_of(OtherConvs)).eval()) == {
        "stem": "fused with batch norm + ReLU",
        "stem_norm": "fused into 'stem'",
        "a": "not fused: it has 2 groups",
        "a_norm": "twin",
        "b": "not fused: its padding is reflect",
        "b_norm": "twin",
        "c": "twin",
        "c_norm": "twin",
        "d": "fused with batch norm + ReLU",
        "d_norm": "fused into 'd'",
        "head": "twin",
    }
    assert table(fuse(packed_of(Shared)))["a"] == "not fused: it runs 2 times"
    how = table(fuse(packed_of(ReadTwice)))
    assert (how["a"], how["b"]) == ("not fused: 2 operations follow", "fused with batch norm")
    assert table(fuse(packed_of(Dense)))["a"] == "not fused: 'cat' follows"
    uneven = packed_of(lambda: nn.Sequential(nn.Conv2d(3, 4, 2, padding="same"), nn.ReLU()))
    assert table(fuse(uneven))["0"] == "not fused: its padding is uneven"
    fused = fuse(packed_of(Sometimes))
    assert table(fused.train())["b_norm"] == "fused into 'b'" and table(fused.eval())["b_norm"] == "twin"
    assert fused.describe().splitlines()[0] == "2 members of Sometimes"


# ---- what must not fuse ---------------------------------------------------------------------------------------------


def calls_of(fused, x):
    with torch.no_grad(), Counted() as counted:
        fused(x)
    return counted.calls["fused_conv2d"]


@pytest.mark.parametrize("path", ["", "a", "a_norm", "relu", "body", "body.0"])
def test_hooks_run_as_if_nothing_was_fused(path):
    class Net(InPlace):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())

        def middle(self, x):
            return self.body(super().middle(x))

    packed, x = packed_of(Net, input_dims=4).eval(), images()
    fused, seen = fuse(packed), []
    assert calls_of(fused, x) == 5
    hooked = packed._inner.get_submodule(path)
    handle = hooked.register_forward_hook(lambda module, args, out: seen.append(module) or out * 1.5)
    with torch.no_grad():
        assert torch.allclose(fused(x), packed(x), atol=1e-5)
        times = len(seen) // 2
        assert set(seen) == {hooked} and len(seen) == 2 * (3 if path == "relu" else 1)
    again = fuse(packed)  # tracing runs no hook
    assert len(seen) == 2 * times
    with torch.no_grad():
        assert torch.allclose(again(x), packed(x), atol=1e-5)
    handle.remove()
    assert calls_of(fused, x) == calls_of(again, x) == 5


def test_hooks_on_all_modules_see_every_layer():
    packed, x = packed_of(EarlierResidual).eval(), images()
    fused, counts = fuse(packed), []
    for net in (packed, fused):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_network_with_parts_that_run_member_by_member_fuses_around_them():
    def make():
        net = EarlierResidual()
        net.a.register_forward_hook(lambda module, args, out: out + 1)
        return net

    packed = packed_of(make)
    check_eval(packed, images())
    assert table(fuse(packed))["a"].startswith("member by member: it has hooks")
    assert table(fuse(packed))["b"] == "fused with batch norm + residual + ReLU"


def test_a_layer_that_is_changed_after_fusing_runs_as_changed():
    packed, x = packed_of(EarlierResidual).eval(), images()
    fused = fuse(packed)
    packed.b.forward = lambda x: x.sin()
    packed._inner.a = nn.Identity()
    with torch.no_grad():
        assert torch.allclose(fused(x), packed(x), atol=1e-5)
    torch.nn.utils.parametrize.register_parametrization(packed.stem, "weight", nn.Tanh())
    with torch.no_grad():
        assert torch.allclose(fused(x), packed(x), atol=1e-5)


def test_gradients_in_eval_mode_are_those_of_the_unfused_network():
    packed, x = packed_of(EarlierResidual).eval(), images().requires_grad_()
    fused = fuse(copy.deepcopy(packed))
    for net in (packed, fused):
        net(x).square().sum().backward()
    twice = x.grad.clone()
    x.grad = None
    packed(x).square().sum().backward()
    assert torch.equal(twice, 2 * x.grad)
    x, frozen = x.detach(), fused.requires_grad_(False)
    frozen.head.requires_grad_(True)
    with Counted() as counted:
        out = frozen(x)
    assert counted.calls["fused_conv2d"] == 3 and torch.allclose(out, packed(x), atol=1e-5)
    out.sum().backward()
    assert frozen.head.weight.grad is not None


def test_batch_norms_in_another_mode_than_the_network_keep_it(as_on_kernels):
    packed, x = packed_of(InPlace), images()
    packed.a_norm.eval().requires_grad_(False)
    fused, exact = fuse(copy.deepcopy(packed)), copy.deepcopy(packed).double()
    ours, theirs, truth = step(fused, x), step(packed, x), step(exact, x.double())
    for name in truth:
        assert_as_exact(ours[name], theirs[name], truth[name], name)
    packed.eval()
    packed.b_norm.train()
    for net in (fused, exact):
        net.eval()
        net.b_norm.train()
    with torch.no_grad():
        assert_as_exact(fused(x), packed(x), exact(x.double()))
    for name, buffer in exact.named_buffers():
        assert torch.allclose(fused.get_buffer(name).to(buffer), buffer, atol=1e-5), name


def test_code_that_depends_on_the_mode_of_a_part_runs_as_it_stands():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = F.relu(self.norm(self.conv(x)))
            return y + 1 if self.training else y

    packed, x = packed_of(lambda: nn.Sequential(Part()), input_dims=4).eval(), images()
    fused = fuse(packed)
    assert calls_of(fused, x) == 1
    packed._inner[0].training = True
    with torch.no_grad():
        assert torch.equal(fused(x), packed(x))


def test_one_value_a_channel_is_refused_in_training_as_before(as_on_kernels):
    packed = packed_of(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    fused, x = fuse(packed), images(1, 3, 3, 3)
    for net in (packed, fused):
        with pytest.raises((ValueError, DecompkError), match="more than 1 value|two values"):
            net.train()(x)
        assert net.eval()(x).shape == (K, 1, 4, 1, 1)


def test_an_empty_batch_passes():
    packed = packed_of(EarlierResidual, crops=CROPS).eval()
    with torch.no_grad():
        assert fuse(packed)(images(0, 3, 12, 12)).shape == packed(images(0, 3, 12, 12)).shape == (K, 0, 5)


@pytest.mark.parametrize("make", [EarlierResidual, WithoutNorm, Broadcast], ids=lambda make: make.__name__)
def test_autocast_gives_the_dtypes_and_values_of_the_unfused_network(make, as_on_kernels):
    packed = packed_of(make, crops=CROPS)
    nets = copy.deepcopy(packed), packed, copy.deepcopy(packed).double()
    fused, x = fuse(nets[0]), images(N, 3, 12, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert calls_of(fused.eval(), x) >= 2
        with torch.no_grad():
            assert_as_exact(fused(x), packed.eval()(x), nets[2].eval()(x.double()))
        for net in nets:
            net.train()
        ours, theirs = fused(x), packed(x)
    assert_as_exact(ours, theirs, nets[2](x.double()))
    ours.float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in fused.parameters())


def test_further_arguments_go_to_the_unfused_network():
    class Scaled(EarlierResidual):
        def forward(self, x, scale=None, twice=False):
            y = super().forward(x)
            return y * (2 if twice else 1) if scale is None else y * scale

    packed, x, scale = packed_of(Scaled, input_dims=4).eval(), images(), torch.rand(N, 1)
    fused = fuse(packed)
    assert calls_of(fused, x) == 3
    with torch.no_grad():
        assert torch.equal(fused(x, scale), packed(x, scale)) and torch.equal(
            fused(x, twice=True), packed(x, twice=True)
        )


# ---- refusals -------------------------------------------------------------------------------------------------------


class Refused(Net):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def middle(self, x):
        y = self.a_norm(self.a(x))
        if self.kind == "branch":
            return y if x.sum() > 0 else x
        if self.kind == "constant":
            return y * torch.arange(8.0).view(8, 1, 1)
        if self.kind == "torch's chance":
            return y if torch.rand(()) < 0.5 else x
        if self.kind == "Python's chance":
            return y if random.random() < 0.5 else x
        if self.kind == "no_grad":
            with torch.no_grad():
                return self.b(y)
        if self.kind == "autocast":
            with torch.autocast("cpu", enabled=False):
                return self.b(y)
        return torch.utils.checkpoint.checkpoint(self.b, y, use_reentrant=False)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("branch", "torch.fx cannot trace Refused: .* only networks of one input whose forward does not branch"),
        ("constant", "Refused.forward makes a tensor of its own"),
        ("torch's chance", "Refused.forward draws a random number to decide"),
        ("Python's chance", "Refused.forward draws a random number to decide"),
        ("no_grad", "changes the gradient mode or autocast, or checkpoints"),
        ("autocast", "changes the gradient mode or autocast, or checkpoints"),
        ("checkpoint", "changes the gradient mode or autocast, or checkpoints"),
    ],
)
def test_what_torch_fx_cannot_follow_is_refused_and_nothing_has_changed(kind, sentence):
    packed = packed_of(lambda: Refused(kind), input_dims=4).eval()
    packed.a_norm.train()
    state, modes = copy.deepcopy(packed.state_dict()), [m.training for m in packed.modules()]
    attributes, states = set(vars(packed._inner)), (random.getstate(), torch.get_rng_state())
    with pytest.raises(UnsupportedOperation, match=sentence):
        fuse(packed)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert [m.training for m in packed.modules()] == modes
    assert set(vars(packed._inner)) == attributes
    assert all(torch.equal(tensor, state[name]) for name, tensor in packed.state_dict().items())


def test_networks_of_two_inputs_or_with_results_of_no_lasting_class_are_refused():
    class Local(typing.NamedTuple):
        y: torch.Tensor

    class Two(EarlierResidual):
        def forward(self, x, y):
            return super().forward(x + y)

    class Wraps(EarlierResidual):
        def forward(self, x):
            return Local(super().forward(x))

    with pytest.raises(UnsupportedOperation, match="cannot trace Two: .*missing 1 required positional argument: 'y'"):
        fuse(packed_of(Two, input_dims=4))
    with pytest.raises(UnsupportedOperation, match="the graph of Wraps cannot be written down"):
        fuse(packed_of(Wraps, input_dims=4))


def test_what_is_not_a_packed_network_is_refused():
    for net in (nn.Conv2d(3, 3, 1), None):
        with pytest.raises(DecompkError, match="fuse takes a packed network"):
            fuse(net)
    with pytest.raises(UnsupportedOperation, match="a single Conv2d"):
        fuse(packed_of(lambda: nn.Conv2d(3, 3, 1)))
    with pytest.raises(UnsupportedOperation, match="runs member by member, since asked for"):
        fuse(packed_of(EarlierResidual, member_by_member=[""], input_dims=4))


# ---- compiling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["eval", "train", "train as on kernels"])
def test_a_fused_network_compiles_into_one_graph(way, monkeypatch):
    monkeypatch.setattr(sys.modules["decompk.packed.fused_layer"], "on_kernels", lambda x: way == "train as on kernels")
    torch._dynamo.reset()
    fused, x = fuse(packed_of(EarlierResidual, crops=CROPS)).train(way != "eval"), images(N, 3, 12, 12)
    eager, graphs = copy.deepcopy(fused), []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return aot_eager(graph, inputs)

    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    if way == "eval":
        with torch.no_grad():
            assert torch.allclose(compiled(x), eager(x), atol=1e-5)
    assert torch.allclose(step(compiled, x)["gradients"], step(eager, x)["gradients"], atol=1e-4)
    for ours, theirs in zip(fused.buffers(), eager.buffers(), strict=True):
        assert torch.allclose(ours, theirs)
    calls = [code.count("ops.decompk.fused_conv2d") for code in graphs]
    assert calls == {"eval": [3, 0], "train": [0], "train as on kernels": [3]}[way]


def test_packed_bottlenecks_compile_into_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = models.resnet.ResNet((2, 2, 1, 1), 5, "table2.2", 3, 8)  # resnet50's stages, fewer of a kind
    packed = decompk.grouped_subnets(net, (3, 64, 64), (1, 2))
    x = images(2, 3, 64, 64)
    eager = copy.deepcopy(packed)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    ours, theirs = step(compiled, x), step(eager, x)
    # Batch norms over eight values magnify rounding: each of the two is a thousandth off its float64 twin.
    assert error(ours["output"], theirs["output"].double()) <= 1e-2
    assert error(ours["gradients"], theirs["gradients"].double()) <= 1e-2


def test_a_number_that_is_set_later_is_read():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.factor = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), 1.0

        def forward(self, x):
            return torch.relu(self.norm(self.conv(x))) * self.factor

    for make, path in ((Scales, ""), (lambda: nn.Sequential(Scales()), "0")):
        packed, x = packed_of(make, input_dims=4).eval(), images()
        fused = fuse(packed)
        before = fused(x)
        (fused if path == "" else fused.get_submodule(path)).factor = 3.0
        torch.testing.assert_close(fused(x), 3 * before)
