"""What the channel pass refuses, and how it says so."""

import ast
from pathlib import Path

import pytest
import torch
from nets import Branching, Call, Head, NormAct, conv
from torch import nn
from torch.nn import functional as F
from zoo import torchvision

import decompk
from decompk import PartitionError, UnsupportedOperation, decompose
from decompk.crops import Crop
from decompk.divide import rules
from decompk.divide.channel_pass import ChannelPass
from decompk.divide.channels import Walk
from decompk.errors import DecompkError
from decompk.fx.graph import on_meta, shape_of


class Between(nn.Module):
    """conv → `middle` → head, so that `middle` reads divided channels."""

    def __init__(self, middle, width: int = 8, after: int | None = None):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3, padding=1), Head(after or width)
        self.middle = middle

    def forward(self, x):
        return self.head(self.middle(self.stem(x)))


class Attention(nn.Module):
    def forward(self, x):
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).reshape(n, c, h, w)


class Eca(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        return x * self.conv(x.mean((2, 3)).unsqueeze(1)).squeeze(1)[:, :, None, None].sigmoid()


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.gain


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(8, 8, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.kernel * 2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


class Image(nn.Module):
    """Adds the image's channels to divided ones."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(4, 4, 3, padding=1), Head(4)

    def forward(self, x):
        return self.head(self.stem(x) + x)


REFUSED = {
    "attention": (Between(Attention()), "scaled_dot_product_attention", "test_channels.py"),
    "nn attention": (Between(Call(nn.MultiheadAttention(8, 2))), "MultiheadAttention", ""),
    "softmax over channels": (Between(nn.Softmax(dim=1)), "Softmax mixes", "'middle'"),
    "functional softmax": (Between(Call(lambda x: F.softmax(x, 1))), "'softmax' mixes", "'softmax'"),
    "mean over channels": (Between(Call(lambda x: x * x.mean(1, keepdim=True))), "'mean' mixes", "mean"),
    "a channel by number": (Between(Call(lambda x: x * x[:, 0:1])), "channels 0 to 1", "getitem"),
    "one channel": (Between(Call(lambda x: x * x[:, 0][:, None])), "single channel", "getitem"),
    "everything summed": (Between(Call(lambda x: x * x.sum())), "combines all channels", "sum"),
    "efficient channel attention": (Between(Eca()), "does not read the divided axis", "'middle.conv'"),
    "local response norm": (Between(nn.LocalResponseNorm(3)), "local_response_norm", "'middle'"),
    "one gain for all": (Between(Gain()), "'middle.gain'", "mul"),
    "one slope for all": (Between(nn.PReLU()), "one slope", "'middle'"),
    "tied layers": (Between(Tied()), "share parameter", "middle.b"),
    "control flow": (Between(Branching()), "cannot trace", "Between"),
    "image added": (Image(), "every member holds whole", "add"),
    "batch norm on the image": (nn.Sequential(nn.BatchNorm2d(3), conv(3, 8), Head(8)), "image itself", "'0'"),
    "depthwise on the image": (nn.Sequential(nn.Conv2d(3, 6, 1, groups=3), Head(6)), "grouped convolution", "'0'"),
    "batch norm after the last layer": (
        nn.Sequential(conv(3, 8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), "head's output", "'2'",
    ),
    "no head": (nn.Sequential(conv(3, 8), NormAct(8)), "", ""),
    "layer norm over space": (Between(nn.LayerNorm((8, 16, 16))), "not one per channel", "'middle'"),
    "weight computed first": (Between(Doubled()), "computed", "conv2d"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_divided_is_refused_by_name_in_one_sentence(case):
    net, words, place = REFUSED[case]
    with pytest.raises((UnsupportedOperation, PartitionError)) as caught:
        decompose(net, (4 if case == "image added" else 3, 16, 16), 4)
    message = str(caught.value)
    assert words in message and place in message
    assert "\n" not in message and message.endswith(".")


def pooled_by_sides(x):
    n, c, h, w = x.shape
    return F.avg_pool2d(x, (h, w))


OVER_THE_MAP = [
    lambda x: F.avg_pool2d(x, x.size()[3]),
    lambda x: F.avg_pool2d(x, x.size(2)),
    lambda x: F.avg_pool2d(x, x.size()[2:]),
    lambda x: F.avg_pool2d(x, kernel_size=x.shape[-2:], stride=1),
    lambda x: F.avg_pool1d(x.flatten(2), x.size(2) * x.size(3))[..., None],
    pooled_by_sides,
]


@pytest.mark.parametrize("pool", OVER_THE_MAP)
@pytest.mark.parametrize("partitions", [4, (1, 2)])
def test_a_pooling_whose_window_is_the_maps_own_size_is_a_global_pooling(pool, partitions):
    nets = [Between(nn.Sequential(nn.ReLU(), Call(f))).double() for f in (lambda x: x.mean((2, 3), True), pool)]
    nets[1].load_state_dict(nets[0].state_dict())
    known, d = (decompose(net, (3, 16, 16), partitions) for net in nets)
    members, same = d.subnets(seed=0), known.subnets(seed=0)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for one, other, part in zip(members, same, d.split(x), strict=True):
        torch.testing.assert_close(one(part), other(part), rtol=0, atol=1e-12)
    torch.testing.assert_close(d.compose(members)(x), known.compose(same)(x), rtol=0, atol=1e-12)
    assert not d.notes and (not d.adapted or partitions != 4)


@pytest.mark.parametrize(
    ("net", "K", "words"),
    [
        (nn.Sequential(conv(3, 64), Head(64)), 5, "64 channels cannot be divided into 5"),
        (nn.Sequential(conv(3, 20), nn.GroupNorm(2, 20), Head(20)), 4, "2 groups do not divide"),
        (nn.Sequential(conv(3, 20), nn.Conv2d(20, 60, 1, groups=4), Head(60)), 10, None),
        (nn.Sequential(conv(3, 12), nn.Conv2d(12, 12, 1, groups=4), Head(12)), 6, None),
        (nn.Sequential(conv(3, 6), nn.Conv2d(6, 6, 1, groups=2), Head(6)), 3, None),
        (nn.Sequential(conv(3, 12), nn.Conv2d(12, 18, 1, groups=2), Head(18)), 3, None),
        (nn.Sequential(conv(3, 8), nn.Conv2d(8, 24, 1, groups=8), Head(24)), 4, None),
        (nn.Sequential(conv(3, 24), nn.ConvTranspose2d(24, 36, 2, 2, groups=3), Head(36)), 4, None),
        (Between(Call(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)), 28), 4, "pieces of 14×14"),
        (Between(Call(lambda x: torch.cat(x.split([10, 18], 1), 1)), 28), 4, "pieces of 10×18"),
        (Between(nn.ChannelShuffle(2), 28), 4, "another number of partitions"),
        (Between(nn.PixelShuffle(2), 16, 4), 8, "another number of partitions"),
    ],
)
def test_widths_that_divide_compose_to_the_sum_and_others_are_refused_with_the_remedy(net, K, words):
    if words is not None:
        with pytest.raises(PartitionError, match=words) as caught:
            decompose(net, (3, 20, 20), (1, K))
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
        return
    d = decompose(net.double(), (3, 20, 20), (1, K))
    members = [member.eval() for member in d.subnets(seed=0)]
    x = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    with torch.no_grad():
        whole, parts = d.compose(members)(x), sum(member(x) for member in members)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)


def test_crops_too_small_for_the_network_are_refused():
    net = nn.Sequential(conv(3, 8), nn.MaxPool2d(4), nn.Conv2d(8, 8, 3), Head(8))
    with pytest.raises(PartitionError, match="choose other crops"):
        decompose(net, (3, 16, 16), 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: decompose("resnet", (3, 8, 8)), "nn.Module"),
        (lambda: decompose(nn.Sequential(conv(3, 8), Head(8)), (224,)), "itself does not run"),
        (lambda: decompose(nn.Sequential(conv(3, 8), Head(8)), ()), "spatial axes"),
        (lambda: decompose(nn.Sequential(conv(3, 8), Head(8)), (3, 8, 8), head="max"), "unknown"),
        (lambda: decompose(nn.ReLU(), (3, 8, 8)), "no layer"),
    ],
)
def test_wrong_arguments_are_refused(call, words):
    with pytest.raises(decompk.DecompkError, match=words):
        call()


def test_members_that_are_not_of_this_decomposition_are_refused():
    net = nn.Sequential(conv(3, 8), Head(8))
    d, other = decompose(net, (3, 8, 8)), decompose(nn.Sequential(conv(3, 16), Head(16)), (3, 8, 8))
    with pytest.raises(decompk.PackError, match=r"'0.0.weight' of shape \(4, 3, 3, 3\) where \(2, 3, 3, 3\)"):
        d.compose(other.subnets())
    with pytest.raises(decompk.PackError, match="3 sub-networks"):
        d.compose(d.subnets()[:3])
    with pytest.raises(decompk.PackError, match="network 0"):
        d.extract(nn.Sequential(conv(3, 16), Head(16)))
    with pytest.raises(PartitionError, match="not a batch"):
        d.split(torch.zeros(2, 3, 9, 8))


# One of each family, with the reason where its widths do not divide by 4.
ZOO = {
    "alexnet": None, "densenet121": None, "efficientnet_v2_s": None, "googlenet": None, "mnasnet0_5": None,
    "mobilenet_v2": None, "mobilenet_v3_small": None, "regnet_x_400mf": None, "resnet18": None, "resnet50": None,
    "resnext50_32x4d": None, "shufflenet_v2_x0_5": None, "squeezenet1_1": None, "vgg11_bn": None,
    "convnext_tiny": None, "efficientnet_b0": "features.2.1.block.2.fc1", "regnet_y_400mf": "se.fc1",
    "shufflenet_v2_x1_0": "stage2.0.branch1.2", "vit_b_32": "",
}  # fmt: skip


@pytest.mark.skipif(torchvision is None, reason="torchvision is not installed")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ZOO)
def test_torchvision_networks_decompose_or_are_refused_by_name(name):
    net = torchvision.models.get_model(name, num_classes=8)
    refused = ZOO[name]
    if refused is not None:
        with pytest.raises((PartitionError, UnsupportedOperation), match=refused):
            decompose(net, (3, 224, 224), 4)
        return
    d = decompose(net, (3, 96, 96), 4, crop_size=64)
    member = d.member_skeleton()
    whole = sum(p.numel() for p in net.parameters())
    assert sum(p.numel() for p in member.parameters()) < whole / 3
    assert [*member.state_dict()] == [*net.state_dict()]
    crop = torch.empty(2, 3, 64, 64, device="meta")
    assert member.eval()(crop).shape == (2, 8)


def noted(middle_or_net, **options):
    net = middle_or_net if isinstance(middle_or_net, nn.Sequential) else Between(middle_or_net)
    return decompose(net, (3, 16, 16), 4, **options).notes


def test_numbers_that_break_the_sum_are_noted_and_scaling_is_not():
    head = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1)]
    assert not noted(nn.Sequential(*head, Call(lambda x: 3 * x.mean((2, 3)) / 2)))
    assert "add a number" in noted(nn.Sequential(*head, Call(lambda x: x + 1)))[0]
    assert "Softmax" in noted(nn.Sequential(*head, nn.Softmax(1)))[0]
    assert "a size that differs" in noted(Call(lambda x: x / x.shape[1]))[0]
    assert not noted(Call(lambda x: x / x.shape[0]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize(
    "kind, axes", [(nn.BatchNorm1d, 0), (nn.BatchNorm1d, 1), (nn.BatchNorm2d, 2), (nn.BatchNorm3d, 3)]
)
def test_a_batch_norm_keeps_its_inputs_shape_as_torch_finds(kind, axes, options, training):
    for dtype in (torch.float32, torch.bfloat16):
        leaf = on_meta(kind(6, **options, dtype=dtype)).train(training)
        x = torch.empty(2, 6, *(5, 4, 3)[:axes], device="meta", dtype=dtype)
        found, known = shape_of(leaf, x), leaf(x)
        assert found.shape == known.shape and found.dtype == known.dtype == dtype and found.is_meta


def test_a_batch_norm_that_torch_refuses_is_refused_and_one_with_a_forward_of_its_own_is_run():
    for shape in ((2, 5, 4, 4), (2, 6, 4), (2, 6, 4, 4, 4), (6,), (1, 6, 1, 1)):
        with pytest.raises((ValueError, RuntimeError)) as known:
            nn.BatchNorm2d(6, device="meta")(torch.empty(shape, device="meta"))
        with pytest.raises(type(known.value)) as found:
            shape_of(nn.BatchNorm2d(6, device="meta"), torch.empty(shape, device="meta"))
        assert str(found.value) == str(known.value)
    for name in ("weight", "running_mean"):  # of another length than the norm says
        net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
        setattr(net[1], name, nn.Parameter(torch.ones(16)) if name == "weight" else torch.ones(16))
        with pytest.raises(DecompkError, match=f"{name} should contain 8 elements not 16"):
            decompose(net, (3, 4, 4))

    class Pooled(nn.BatchNorm2d):
        def forward(self, x):
            return F.avg_pool2d(super().forward(x), 2)

    x, hooked = torch.empty(2, 6, 4, 4, device="meta"), nn.BatchNorm2d(6, device="meta")
    hooked.register_forward_hook(lambda module, inputs, output: output[..., 1:])
    assert shape_of(Pooled(6, device="meta"), x).shape == (2, 6, 2, 2)
    assert shape_of(hooked, x).shape == (2, 6, 4, 3)


def test_what_a_module_is_called_with_is_its_own_affair():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.last = conv(4, 4), nn.MultiheadAttention(4, 1), conv(4, 4)

        def forward(self, x):
            y = self.conv(x).flatten(2).transpose(1, 2)
            return self.last(self.a(query=y, key=y, value=y)[0].transpose(1, 2).unflatten(2, (8, 8)))

    with pytest.raises(UnsupportedOperation, match="MultiheadAttention mixes channels or has no rule"):
        decompose(Attends(), (4, 8, 8), head="concat")

    class Twofold(nn.Conv2d):
        def forward(self, inp, x=None):
            return super().forward(inp)

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.leaf, self.last = Twofold(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, image):
            return self.last(self.leaf(image, x=None))

    assert decompose(Calls(), (4, 8, 8), head="concat").K == 4


def test_rules_touch_of_the_pass_only_what_its_protocol_declares():
    declared = {name for name in (*vars(ChannelPass), *ChannelPass.__annotations__) if not name.startswith("_")}
    touched = set()
    for path in Path(rules.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("p", "self.p"):
                touched.add(node.attr)
    assert touched == declared
    walk = Walk(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (4,), (Crop(0, 4),), "sum")
    walk.run()
    assert all(hasattr(walk, name) for name in declared)
