"""A stretch of a fused network in one C++ call leaves the same bits as its layers one by one."""

import copy
import pickle
import random

import pytest
import torch
import torch.utils.checkpoint
from helpers import used_members
from torch import nn

import decompk
from decompk import models
from decompk.kernels import cpu
from decompk.packed.pack import pack
from decompk.packed.program import Program
from decompk.packed.stretch import Room

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason="the C++ kernels cannot be built here")


def conv(i, o, k=3, stride=1, bias=False, relu=True, **norm):
    return [nn.Conv2d(i, o, k, stride, k // 2, bias=bias), nn.BatchNorm2d(o, **norm), *([nn.ReLU()] if relu else [])]


class Block(nn.Module):
    """A residual block, whose shortcut is what it is given or a bare convolution."""

    def __init__(self, i, o, stride=1):
        super().__init__()
        self.body = nn.Sequential(*conv(i, o, 3, stride), *conv(o, o, relu=False, bias=True))
        self.shortcut = nn.Conv2d(i, o, 1, stride) if stride > 1 or i != o else nn.Identity()

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


class Inverted(nn.Module):
    """MobileNet's block: wider, channel by channel, narrow."""

    def __init__(self, i, o, stride=1):
        super().__init__()
        wide = 2 * i
        self.body = nn.Sequential(
            *(nn.Conv2d(i, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(True)),
            *conv(wide, o, 1, relu=False),
        )
        self.adds = i == o

    def forward(self, x):
        return self.body(x) + x if self.adds else self.body(x)


class TwoEnds(nn.Module):
    """Two values of what could be a stretch are read behind it."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Sequential(*conv(4, 8)), nn.Sequential(*conv(8, 8), *conv(8, 8))

    def forward(self, x):
        x = self.stem(x)
        return torch.cat([self.body(x), x.sigmoid()], 1).mean((2, 3))


class Unread(nn.Module):
    """A layer that nobody reads."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = (nn.Sequential(*conv(i, 8)) for i in (4, 8, 8))

    def forward(self, x):
        x = self.stem(x)
        self.left(x)
        return self.right(x).mean((2, 3))


def head(channels):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)


NETS = {  # network → steps of its stretch
    "chain": (lambda: nn.Sequential(*conv(4, 8), *conv(8, 16, bias=True), *conv(16, 16, 1), *head(16)), 3),
    "pools": (lambda: nn.Sequential(*conv(4, 8), nn.MaxPool2d(2), *conv(8, 12), nn.MaxPool2d(3, 2, 1), *head(12)), 4),
    "no norms": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, 2), nn.ReLU(), *head(4)), 2),
    "not affine": (
        lambda: nn.Sequential(*conv(4, 8, affine=False), *conv(8, 8, track_running_stats=False), *head(8)),
        2,
    ),
    "residual": (lambda: nn.Sequential(*conv(4, 8), Block(8, 8), Block(8, 16, 2), Block(16, 16), *head(16)), 8),
    "identity": (lambda: nn.Sequential(*conv(4, 8), nn.Identity(), *conv(8, 8), *head(8)), 2),
    "two ends": (TwoEnds, 0),
    "unread": (Unread, 0),
    "another layer": (lambda: nn.Sequential(*conv(4, 8), *conv(8, 8), nn.GELU(), *conv(8, 8), *head(8)), 2),
    "dilated": (
        lambda: nn.Sequential(*conv(4, 8), *conv(8, 8), nn.Conv2d(8, 8, 3, dilation=2), *conv(8, 8), *head(8)),
        2,
    ),
    "layer by layer": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, dilation=2), *conv(8, 8), *head(8)), 0),
    "odd channels": (lambda: nn.Sequential(*conv(4, 18), *conv(18, 7, 1), *conv(7, 9), *head(9)), 3),
    "six channels": (lambda: nn.Sequential(*conv(4, 6, 5), nn.MaxPool2d(2), *conv(6, 10, bias=True), *head(10)), 3),
    "MobileNet": (lambda: nn.Sequential(*conv(4, 8), Inverted(8, 12, 2), Inverted(12, 12), *head(12)), 7),
    "linear": (
        lambda: nn.Sequential(*conv(4, 8), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(512, 6), nn.Linear(6, 3)),
        5,
    ),
    "flat": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(4096, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU6()), 2),
    "resnet8": (lambda: models.build("resnet8", width=8, num_classes=5), 9),
    "resnet50": (lambda: models.build("resnet50", width=8, input_size=(3, 32, 32), num_classes=5), 57),
    "vgg8": (lambda: models.build("vgg8", width=8, input_size=(3, 32, 32), num_classes=5), 12),
}


def layer_by_layer(self, x, crops):
    return self._code[True](self._inner, x, crops, True)


def steps_of(packed):
    """The steps of its stretches, one number a kind of call."""
    program = packed._plans.program(packed)
    return [0 if whole is None else len(whole.stretch._steps) for whole in program._whole.values()]


def train(packed, x, change=lambda packed: None, steps=3, other=None):
    """What `steps` of training leave, with `change` after the first, and what x's gradients are."""
    optimizer, left = torch.optim.SGD(packed.parameters(), 0.1, momentum=0.9), []
    for i in range(steps):
        x = x.detach().requires_grad_(x.requires_grad)
        torch.manual_seed(i)
        with decompk.schedule("fused"):
            y = packed(x if other is None or i % 2 == 0 else other)
        optimizer.zero_grad()
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        left += [y.detach(), *([] if x.grad is None else [x.grad])]
        left += [p.grad.clone() for p in packed.parameters() if p.grad is not None]
        optimizer.step()
        if i == 0:
            change(packed)
    return [*left, *packed.parameters(), *packed.buffers()]


def same_bits(make, x, monkeypatch, **around):
    """A network trained by stretches and another layer by layer; → the first."""
    packed = pack(used_members(make, 3), input_dims=4).train()
    other = copy.deepcopy(packed)
    found = train(packed, x, **around)
    with monkeypatch.context() as patch:
        patch.setattr(Program, "_by_stretch", layer_by_layer)
        expected = train(other, x, **around)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    return packed


@pytest.mark.parametrize(
    ("name", "wants"), [(n, w) for n in NETS for w in (False, True) if not (w and n in ("resnet50", "vgg8"))]
)
def test_a_stretch_leaves_the_same_bits_as_its_layers(name, wants, monkeypatch):
    make, steps = NETS[name]
    torch.manual_seed(0)
    channels = 3 if name in models.names() else 4
    x = torch.randn(3, 2, channels, 32, 32, requires_grad=wants)
    assert steps_of(same_bits(make, x, monkeypatch)) == [steps]


class Beside(nn.Module):
    """Pixels of the image beside what a convolution makes of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, 2), nn.Linear(4 * 3 * 3, 5)

    def forward(self, x):
        flat = x.flatten(1)
        return self.fc(torch.relu(self.conv(x)).flatten(1)) + flat[:, :5]


def test_an_image_that_is_also_flattened_is_read_as_an_image():
    packed, x = pack([Beside() for _ in range(3)], input_dims=4).train(), torch.randn(2, 3, 8, 8)
    for _ in range(3):
        with decompk.schedule("fused"):
            found = packed(x)
        assert torch.allclose(found, torch.stack([net(x) for net in packed.unpack()]), atol=1e-5)
    assert steps_of(packed) == [3]


def test_a_flatten_that_comes_first_is_asked_at_each_call():
    def make():
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5))

    packed, x = pack([make() for _ in range(2)], input_dims=4).train(), torch.randn(3, 1, 4, 4)
    with decompk.schedule("fused"):
        for _ in range(2):
            packed(x)
        packed.get_submodule("0").start_dim = 2
        assert packed(torch.randn(3, 1, 4, 4)).shape == (2, 3, 1, 5)


@pytest.mark.parametrize("schedule", ["together", "fused"])
@pytest.mark.parametrize(
    ("first", "wrong", "named"),
    [
        (nn.Conv2d(6, 6, 3, groups=6), (5, 4, 4), "'0' takes 6 channels"),
        (nn.Conv2d(6, 6, 3, groups=6), (1, 4, 4), "'0' takes 6 channels"),
        (nn.Conv2d(1, 6, 3), (6, 4, 4), "'0' takes 1 channels|6 channels"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Unflatten(1, (6, 1, 1))), (2, 2, 2), "'0.1' takes 12 feat"),
    ],
    ids=["more channels", "one channel", "no groups", "features"],
)
def test_an_input_of_other_channels_is_refused_by_whoever_runs(first, wrong, named, schedule):
    packed = pack([nn.Sequential(copy.deepcopy(first), nn.ReLU6(), *head(6)) for _ in range(3)], input_dims=4).train()
    with pytest.raises(decompk.errors.DecompkError, match=named), decompk.schedule(schedule):
        packed(torch.randn(2, *wrong))


def test_crops_of_an_image_are_cut_for_a_stretch(monkeypatch):
    d = decompk.decompose(models.build("vgg8", width=16, input_size=(3, 32, 32)), (3, 32, 32), 4, 16)
    packed = decompk.pack(d.subnets(0), d.crops).train()
    other, x = copy.deepcopy(packed), torch.randn(2, 3, 32, 32)
    found = train(packed, x)
    monkeypatch.setattr(Program, "_by_stretch", layer_by_layer)
    assert all(map(torch.equal, found, train(other, x)))
    monkeypatch.undo()
    assert steps_of(packed) == [12]


def freeze(packed):
    next(packed.parameters()).requires_grad_(False)


def one_norm_in_eval(packed):
    next(m for m in packed.modules() if isinstance(m, nn.BatchNorm2d)).eval()


def every_norm(packed, **values):
    for m in packed.modules():
        if isinstance(m, nn.BatchNorm2d):
            vars(m).update(values)


def momentum(packed):
    every_norm(packed, momentum=0.5)


def no_momentum(packed):
    every_norm(packed, momentum=None)


def other_eps(packed):
    every_norm(packed, eps=0.1)


def other_memory(packed):
    for p in packed.parameters():
        p.data = p.data.clone(memory_format=torch.contiguous_format)


def hook(packed):
    layer = next(m for m in packed.modules() if isinstance(m, nn.Conv2d))
    layer.register_forward_hook(lambda module, args, out: out * 2)


def stride(packed):
    for m in packed.modules():
        if isinstance(m, nn.Conv2d):
            m.stride = (2, 2)


def window(packed):
    for m in packed.modules():
        if isinstance(m, nn.MaxPool2d):
            m.kernel_size = 3


CHANGES = (freeze, one_norm_in_eval, momentum, no_momentum, other_eps, other_memory, hook, stride, window)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_calls_counts(change, monkeypatch):
    same_bits(NETS["pools"][0], torch.randn(3, 2, 4, 32, 32), monkeypatch, change=change)


def test_other_batches_other_threads_and_layouts(monkeypatch):
    x = torch.randn(3, 2, 4, 32, 32)
    packed = same_bits(NETS["residual"][0], x, monkeypatch, other=torch.randn(3, 5, 4, 16, 20))
    assert steps_of(packed) == [8, 8]
    same_bits(NETS["residual"][0], x.transpose(3, 4), monkeypatch)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        same_bits(NETS["residual"][0], x, monkeypatch)
    finally:
        torch.set_num_threads(threads)


def test_gradients_of_a_stretch_can_be_followed_kept_and_taken_twice():
    packed = pack(used_members(NETS["residual"][0], 2), input_dims=4).train()
    exact = copy.deepcopy(packed).double()
    x = torch.randn(2, 3, 4, 16, 16)
    found = []
    for net, images in ((packed, x), (exact, x.double())):
        images = images.requires_grad_()
        with decompk.schedule("fused"):
            y = net(images)
        own = [images, *net.parameters()]
        first = torch.autograd.grad(y.square().sum(), own, retain_graph=True)
        again = torch.autograd.grad(y.square().sum(), own, retain_graph=True)
        assert all(map(torch.equal, first, again))
        (followed,) = torch.autograd.grad(y.square().sum(), images, create_graph=True)
        second = torch.autograd.grad(followed.square().sum(), own, allow_unused=True)
        found.append([y, *first, *(torch.zeros(1) if t is None else t for t in second)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=1e-2, atol=1e-3 * max(1.0, float(b.detach().abs().max()))
        )


def test_weights_that_change_before_the_backward_are_noticed():
    packed = pack(used_members(NETS["chain"][0], 2), input_dims=4).train()
    with decompk.schedule("fused"):
        y = packed(torch.randn(2, 3, 4, 16, 16))
    with torch.no_grad():
        next(packed.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_copies_and_pickles_of_a_fused_network_have_stretches_of_their_own(monkeypatch):
    x = torch.randn(3, 2, 4, 32, 32)
    packed = decompk.fuse(pack(used_members(NETS["residual"][0], 3), input_dims=4).train())
    packed(x).sum().backward()
    nets = [packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))]
    for net in nets:
        net.zero_grad()
        net(x).sum().backward()
        assert [len(whole.stretch._steps) for whole in net._program._whole.values()] == [8]
    for other in nets[1:]:
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(packed.parameters(), other.parameters(), strict=True))


def test_saved_tensors_may_come_back_in_another_layout():
    packed = decompk.fuse(pack(used_members(NETS["residual"][0], 3), input_dims=4).train())
    other, x = copy.deepcopy(packed), torch.randn(3, 2, 4, 32, 32)
    packed(x).sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t.contiguous()):
        other(x).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(packed.parameters(), other.parameters(), strict=True))


def other_act(packed):
    packed._inner[2] = nn.GELU()


def other_layer(packed):
    packed._inner[0] = other = copy.deepcopy(packed._inner[0])
    other.weight.data.mul_(-3)


def other_body(packed):
    packed._inner[3] = other = copy.deepcopy(packed._inner[3])
    other.body[1].weight.data.mul_(-3)


@pytest.mark.parametrize("replace", [other_act, other_layer, other_body])
def test_a_module_that_is_replaced_runs_from_then_on(replace, monkeypatch):
    same_bits(NETS["residual"][0], torch.randn(3, 2, 4, 16, 16), monkeypatch, change=replace)


@pytest.mark.parametrize("behind", [nn.Dropout(0.3, inplace=True), nn.SiLU(inplace=True)])
@pytest.mark.parametrize("relu", [True, False])
def test_what_changes_the_result_in_place_may(behind, relu, monkeypatch):
    def make():
        return nn.Sequential(*conv(4, 8), *conv(8, 8, relu=relu), copy.deepcopy(behind), *head(8))

    same_bits(make, torch.randn(3, 2, 4, 16, 16), monkeypatch)


def test_a_checkpoint_counts_what_is_saved():
    packed = decompk.fuse(pack(used_members(NETS["chain"][0], 3), input_dims=4).train())
    for _ in range(2):
        x = torch.randn(3, 2, 4, 16, 16, requires_grad=True)
        torch.utils.checkpoint.checkpoint(packed, x, use_reentrant=False).sum().backward()
        assert x.grad is not None


def test_defaults_of_device_and_dtype_are_nothing_to_a_stretch():
    packed, x = (
        decompk.fuse(pack(used_members(NETS["pools"][0], 3), input_dims=4).train()),
        torch.randn(3, 2, 4, 32, 32),
    )
    packed(x).sum().backward()
    with torch.device("meta"):
        packed(x).sum().backward()
    try:
        torch.set_default_dtype(torch.float64)
        y = packed(x)
        y.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert y.dtype is torch.float32 and y.isfinite().all()


def test_weights_that_lie_otherwise_by_the_backward_are_read_as_they_lie():
    packed = decompk.fuse(pack(used_members(NETS["chain"][0], 3), input_dims=4).train())
    packed(x := torch.randn(3, 2, 4, 16, 16)).sum().backward()
    found = []
    for moves in (False, True):
        packed.zero_grad()
        y = packed(x)
        if moves:
            other_memory(packed)
        y.square().sum().backward()
        found.append([p.grad.clone() for p in packed.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(a.abs().max())))


def test_places_of_a_room_that_are_taken_at_once_do_not_meet():
    rng, room, taken = random.Random(0), Room(), {}
    for _ in range(500):
        if taken and rng.random() < 0.5:
            room.give_back(*taken.popitem())
            continue
        count = rng.randint(1, 100)
        place = room.take(count)
        assert place % 16 == 0 and place + count <= room.size
        assert all(place + count <= first or first + size <= place for first, size in taken.items())
        taken[place] = count
