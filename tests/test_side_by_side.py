"""Members side by side in the channels of one image: what a packed network gives, on few conversions."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import leaves, used_members
from nets import NETS, conv
from torch import nn
from zoo import torchvision

import decompk
from decompk import UnsupportedOperation
from decompk.crops import Crop
from decompk.packed.schedule import schedule
from decompk.packed.side_by_side import SideBySide

K, N, SIZE = 3, 2, 8
TOLERANCE = 1e-9  # float64, of what one tensor holds
needs_torchvision = pytest.mark.skipif(torchvision is None, reason="torchvision is not installed")


def packed_of(make, dtype=torch.float64, count=K, **options):
    """Members with parameters and statistics that are not those of the start."""
    return decompk.pack(used_members(make, count, dtype), input_dims=4, **{"rehearse": False, **options})


def images(*shape, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(shape or (N, 3, SIZE, SIZE), dtype=dtype)


def step(run, net, x):
    """Outputs, gradients of x and of parameters, and statistics after one step."""
    net.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(2)
    outputs = [leaf for leaf in leaves(run(x)) if leaf.is_floating_point()]
    sum((leaf * torch.linspace(-1, 1, leaf.numel()).to(leaf).view(leaf.shape)).sum() for leaf in outputs).backward()
    found = {f"output {i}": leaf.detach() for i, leaf in enumerate(outputs)} | {"gradient of x": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return found | {name: b.detach().clone() for name, b in net.named_buffers()}


def beside(net):
    def run(x):
        with schedule("side by side"):
            return net(x)

    return run


def check(net, x, tolerance=TOLERANCE):
    """`net` as it is and with its members side by side, in its mode; → the graph that ran, as code."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        copy.deepcopy(net)(x)
    expected, found = step(net, net, x), step(beside(other), other, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert torch.allclose(found[name], value, rtol=tolerance, atol=tolerance), name
    shared = x.dim() == 4
    return other._plans.side_by_side(other)._source[net.training, shared and not net.crops][0]


def conversions(source):
    """How many values become rows, and how many rows are brought beside each other again."""
    return len(re.findall(r"layers_rows(?:_of\w+)?\(", source)), len(
        re.findall(r"(?:beside|channel_grouped)\(", source)
    )


# ---- patterns -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A stem, a middle that differs, a convolution behind it and a head."""

    width = 12

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 12)
        self.build()
        self.last, self.fc = nn.Conv2d(self.width, 6, 1), nn.Linear(6, 5)

    def build(self):
        pass

    def forward(self, x):
        return self.fc(self.last(self.middle(self.stem(x))).mean((2, 3)))


class Kinds(Net):
    """Groups, strides, dilation, "same", reflected borders, transposed, every norm, PReLU."""

    def build(self):
        self.layers = nn.Sequential(
            nn.Conv2d(12, 12, 3, padding="same", groups=12, bias=False),
            nn.GroupNorm(4, 12),
            nn.PReLU(12),
            nn.Conv2d(12, 8, 3, padding=2, dilation=2, groups=2),
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            nn.PReLU(),
            nn.Conv2d(8, 8, 3, 2, padding=1, padding_mode="reflect"),
            nn.InstanceNorm2d(8),
            nn.GELU(),
            nn.ConvTranspose2d(8, 12, 3, 2, groups=4, output_padding=1),
            nn.GroupNorm(3, 12, affine=False),
            nn.BatchNorm2d(12, momentum=None),
            nn.Hardswish(),
            nn.BatchNorm2d(12, track_running_stats=False),
            nn.Upsample(scale_factor=2),
            nn.ZeroPad2d(1),
            nn.AvgPool2d(2),
        )

    def middle(self, x):
        return self.layers(x)


class Shortcut(Net):
    """A shortcut that takes every other pixel and pads with zero channels; numbers, and sums written in place."""

    def build(self):
        self.a = nn.Conv2d(12, 16, 3, 2, 1)
        self.width = 16

    def middle(self, x):
        y = self.a(0.5 * x - 1)
        y += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return torch.relu_(1 - y)


class Gates(Net):
    """Gates by linear layers, by convolutions, of single channels."""

    def build(self):
        self.squeeze, self.excite = nn.Linear(12, 4), nn.Linear(4, 12)
        self.gate, self.attend = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 1, 3, padding=1)

    def middle(self, x):
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        y = torch.sigmoid(self.excite(F.relu(self.squeeze(y)))).view(b, c, 1, 1)
        x = x * y.expand_as(x)
        x = x * y
        x = self.gate(x.mean((2, 3), keepdim=True)).sigmoid() * x
        return x * self.attend(x).sigmoid()


class Pieces(Net):
    """Chunks, splits, slices of channels, concatenations and shuffles."""

    def build(self):
        self.a, self.b = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 8, 1)

    def middle(self, x):
        a, b = x.chunk(2, dim=1)
        c, d = torch.split(torch.cat([self.a(b), a, x[:, 2:4]], 1), [4, 8], dim=1)
        x = torch.cat((self.b(c), d[:, :4]), dim=1)
        b, n, h, w = x.size()
        x = x.view(b, 3, n // 3, h, w).transpose(1, 2).contiguous().view(b, n, h, w)
        return F.interpolate(F.max_pool2d(x, 2), size=x.shape[-2:])


class Owner(nn.Module):
    """It has a parameter of its own, so it runs member by member."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(12, 1, 1))

    def forward(self, x):
        return x * self.scale


class Islands(Net):
    """A module that runs member by member and a sort amid the layers."""

    def build(self):
        self.owner, self.a = Owner(), nn.Conv2d(12, 12, 3, padding=1)

    def middle(self, x):
        y = self.owner(x) + self.a(x)
        return y + y.sort(3).values


class Overwriting(Owner):
    def forward(self, x):
        return x.mul_(self.scale)[:, :6]


class Overwritten(Net):
    """A module that runs member by member writes into what is read afterwards."""

    def build(self):
        self.owner, self.a, self.width = Overwriting(), nn.Conv2d(12, 6, 3, padding=1), 6

    def middle(self, x):
        y = self.owner(x)
        return y * self.a(x)


PATTERNS = {  # → conversions into rows and back
    Kinds: (1, 0),
    Shortcut: (1, 0),
    Gates: (2, 2),
    Pieces: (1, 0),
    Islands: (3, 2),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", PATTERNS)
def test_a_pattern_computes_the_same_and_stays_side_by_side(make, training):
    source = check(packed_of(make).train(training), images())
    assert conversions(source) == PATTERNS[make]


def test_what_a_module_of_its_own_writes_into_its_input_is_seen_behind_it():
    net, x = packed_of(Overwritten).eval(), images()
    with torch.no_grad():
        expected = net(x)
        assert torch.allclose(beside(net)(x), expected, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["residual", "branches", "pieces in two", "shuffle", "groups in three", "auxiliary"])
def test_the_usual_networks_compute_the_same(name):
    make, size, *_ = NETS[name]
    check(packed_of(make).train(), images(N, *size))


@pytest.mark.parametrize("input", ["own", "cut", "own crops"])
def test_inputs_of_every_kind_are_taken(input):
    crops = None if input == "own" else [Crop(0, 0, 8, 8), Crop(0, 2, 8, 8), Crop(2, 1, 8, 8)]
    shape = {"own": (K, N, 3, 8, 8), "cut": (N, 3, 10, 10), "own crops": (K, N, 3, 8, 8)}[input]
    check(packed_of(Shortcut, crops=crops).train(), images(*shape))


def test_an_image_that_all_share_is_not_repeated_for_dense_convolutions():
    source = check(packed_of(lambda: conv(3, 4)).train(), images())
    assert "convolve_shared(" in source and "layers_repeat(" not in source

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1, groups=3)

        def forward(self, x):
            x = (x - 0.5) / 0.2
            return self.a(x) * self.b(x)

    source = check(packed_of(Two).train(), images())
    assert "convolve_shared(" in source and source.count("layers_repeat(") == 1


def test_every_convolution_reads_channels_last_and_all_members_at_once(monkeypatch):
    net, seen = packed_of(Kinds, torch.float32).train(), []
    x, there = images(dtype=torch.float32), F.conv2d
    net(x)
    monkeypatch.setattr(F, "conv2d", lambda x, *args: seen.append((x, args[-1])) or there(x, *args))
    beside(net)(x)
    assert [groups for _, groups in seen] == [1, 12 * K, 2 * K, K, K]
    inner = [x for x, _ in seen[1:]]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inner)
    assert [x.shape[:2] for x in inner] == [(N, K * c) for c in (12, 12, 8, 12)]


def test_frozen_norms_and_modes_are_followed_from_call_to_call():
    net, x = packed_of(Shortcut).train(), images()
    check(net, x)
    net.stem[1].eval()
    check(net, x)
    with torch.no_grad():
        net.stem[1].running_mean += 1
    check(net.eval(), x)


def test_dropout_draws_what_it_draws_in_rows():
    class Drops(Net):
        def build(self):
            self.drop, self.channels = nn.Dropout(0.4), nn.Dropout2d(0.4, inplace=True)

        def middle(self, x):
            return self.channels(F.dropout(self.drop(x), 0.3, self.training) * 2)

    net, x = packed_of(Drops, torch.float32), images(dtype=torch.float32)
    source = check(net.train(), x, 1e-4)
    assert source.count("layers_dropout(") == 2
    check(net.eval(), x, 1e-4)


def test_a_view_behind_a_layer_gets_rows_laid_out_for_it():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

        def forward(self, x):
            return self.fc(F.relu(self.conv(x)).view(x.shape[0], -1))

    net = packed_of(Viewing, rehearse=True)
    net(images())
    check(net, images())


# ---- in single precision --------------------------------------------------------------------------------------------

ZOO = {
    "resnet8": (lambda: decompk.models.build("resnet8"), 32),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=5), 32),
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5), 32),
    "densenet": (lambda: torchvision.models.DenseNet(8, (1, 2, 1), 16, num_classes=5), 32),
}


@pytest.mark.parametrize("name", ZOO if torchvision else ["resnet8"])
def test_rounding_is_that_of_the_packed_network(name):
    make, size = ZOO[name]
    exact = packed_of(make, count=2).eval()
    x = images(2, 3, size, size)
    net, other = (copy.deepcopy(exact).float() for _ in range(2))
    truth = step(exact, exact, x)
    errors = []
    for run, one in ((net, net), (beside(other), other)):
        found = step(run, one, x.float())
        assert found.keys() == truth.keys()
        pairs = [(found[name].double() - value, value) for name, value in truth.items() if "num_batches" not in name]
        errors.append(torch.stack([(d.norm() / v.norm().clamp(min=1e-9)) for d, v in pairs]))
    assert errors[1].max() <= 2 * errors[0].max() + 1e-6
    assert errors[1].median() <= 2 * errors[0].median() + 1e-7


# ---- who is refused -------------------------------------------------------------------------------------------------


def side_by_side(net):
    return SideBySide(net._inner, net._K, net._crops)


class Written(Net):
    def middle(self, x):
        half, _ = x.chunk(2, 1)
        half.relu_()
        return x


class WrittenInput(nn.Sequential):
    def __init__(self):
        super().__init__(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Written, "writes into a tensor of which another view is read"),
        (WrittenInput, "writes into the network's input"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU()), "no 2-d convolution"),
        (Owner, "runs member by member"),
    ],
    ids=["a view", "the input", "an MLP", "member by member"],
)
def test_a_network_that_cannot_lie_so_says_why(make, reason):
    net = packed_of(make)
    with pytest.raises(UnsupportedOperation, match=reason):
        side_by_side(net)


def test_what_has_changed_since_the_network_was_read_is_noticed():
    x = images(dtype=torch.float32)

    def why_not(change):
        net = packed_of(Shortcut, torch.float32)
        program = side_by_side(net)
        assert program.why_not(x, True) is None
        change(net)
        return program.why_not(x, True)

    changed = "not those it was read with"
    assert changed in why_not(lambda net: net.a.register_forward_hook(lambda *args: None))
    assert changed in why_not(lambda net: net.stem.register_forward_hook(lambda *args: None))
    assert changed in why_not(lambda net: setattr(net._inner.stem[2], "inplace", False))
    assert changed in why_not(lambda net: setattr(net._inner, "a", copy.deepcopy(net.a)))
    assert changed in why_not(lambda net: setattr(net._inner, "stem", copy.deepcopy(net._inner.stem)))
    assert why_not(lambda net: net.fc.register_forward_hook(lambda *args: None)) is None


def test_calls_that_cannot_run_so_say_why():
    program = side_by_side(packed_of(Shortcut, torch.float32))
    x = images(dtype=torch.float32)
    assert "float32" in program.why_not(x.half(), True)
    assert "no image" in program.why_not(x[0], True)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in program.why_not(x, True)
    with decompk.backend("loop"):
        assert "'loop'" in program.why_not(x, True)
    assert program.why_not(x, True) is None
