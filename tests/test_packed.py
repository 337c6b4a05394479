"""K members in one module: trained like each alone, named like the model, an ordinary nn.Module, refused by name."""

import copy
import dataclasses
import io
import threading
import typing

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from helpers import assert_packed_equals_separate, double, leaves
from torch import nn
from zoo import torchvision

from decompk import errors
from decompk.crops import Crop
from decompk.packed.pack import Packed, pack
from decompk.packed.per_member import PerMember

K, N = 3, 4
needs_torchvision = pytest.mark.skipif(torchvision is None, reason="torchvision is not installed")


def seeded(make, count=K, dtype=torch.float64):
    members = []
    for seed in range(count):
        torch.manual_seed(seed)
        members.append(make().to(dtype))
    return members


def conv_bn(c_in, c_out, kernel=3, **options):
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False, **options), nn.BatchNorm2d(c_out), nn.ReLU()
    )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 8, stride=2)
        self.body = nn.Sequential(conv_bn(8, 4, 1), conv_bn(4, 4), nn.Conv2d(4, 8, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.body(x))
        return self.head(x.mean((2, 3)))


class Gate(nn.Module):
    """Squeeze and excite, in functional and method forms."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.squeeze = nn.Conv2d(8, 2, 1)
        self.excite = nn.Conv2d(2, 8, 1)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 2)
        scale = F.adaptive_avg_pool2d(x, 1)
        scale = self.excite(F.silu(self.squeeze(scale))).sigmoid()
        return self.head((x * scale).flatten(1))


class Shuffle(nn.Module):
    """Chunks, concatenation and a channel shuffle; one convolution is used twice and registered twice."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.left = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.again = self.left
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        a, b = self.pool(self.stem(x)).chunk(2, 1)
        x = torch.cat([self.again(self.left(a)), b], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Tied(nn.Module):
    """Two layers, in different modules, that share one weight."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(6, 6)
        self.decode = nn.Sequential(nn.Linear(6, 6, bias=False))
        self.decode[0].weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x)))


class Outputs(typing.NamedTuple):
    logits: torch.Tensor
    aux: dict


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 4)
        self.aux = nn.Linear(4, 2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        features = self.stem(x)
        x = features.mean((2, 3))
        aux = {"logits": self.aux(x), "features": [features, x]} if self.training else {}
        return Outputs(self.head(x), aux)


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    note: str | None = None


class ReturnsDataclass(Residual):
    def forward(self, x):
        return Result(super().forward(x))


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x, shift=None):
        return x * self.scale if shift is None else x * self.scale + shift

    def inverse(self, x):
        return x / (self.scale + 1)


class BareParameter(nn.Module):
    """A submodule with a bare parameter, called by its forward, by keyword and by another method."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 4)
        self.scale = Scale(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.scale.inverse(self.scale(x, shift=x))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Reads its child's weight, through a property and in a lambda."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    @property
    def weight_of_qkv(self):
        return self.qkv.weight

    def forward(self, x):
        project = lambda x: F.linear(x, self.weight_of_qkv, self.qkv.bias)  # noqa: E731
        q, k, v = project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Patches, a class token at the root, a custom and a torch attention layer."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.attention = Attention()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.layer(x + self.attention(x))[:, 0])


class TokenNet(nn.Module):
    """The same attention layers below a root that owns nothing, so that the rest is packed."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.attention = Attention()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.patch(x).flatten(2).transpose(1, 2))
        x = self.layer(x + self.attention(x))
        return self.head((x + self.mix(x, x, x, need_weights=False)[0]).mean(1))


def penalty(module, x):
    return x * module.weight.mean()


class PassesItsChild(nn.Module):
    """Hands a submodule to a function, which reads its weight."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return penalty(self.head, self.head(self.stem(x).mean((2, 3))))


class ReadsByName(PassesItsChild):
    def forward(self, x):
        x = self.stem(x).mean((2, 3))
        return F.linear(x, *(getattr(self.head, name) for name in ("weight", "bias")))


class OwnBatchNorm(PassesItsChild):
    """Overrides the forward above, so only its own matters."""

    def forward(self, x):
        return self.head(F.batch_norm(self.stem(x), None, None, training=True).amax((2, 3)))


class Stateful(nn.Module):
    """A buffer it assigns, another it changes in place, and plain attributes that live from call to call."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("centre", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)
        self.count = 0
        self.seen = None

    def forward(self, x):
        x = self.linear(x)
        if self.training:
            self.count += 1
            self.calls += 1
            self.centre = 0.9 * self.centre + 0.1 * x.detach().mean(0)
            self.seen = x.detach().sum() if self.seen is None else self.seen + x.detach().sum()
        return x - self.centre / self.count + 1e-3 * self.seen


class StatefulBelow(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.state = Stateful()

    def forward(self, x):
        return self.state(self.first(x))


class PlainState(nn.Module):
    """No tensor of its own, yet its members must not see each other's samples."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.average = 0.0

    def forward(self, x):
        x = self.linear(x)
        self.average = 0.5 * self.average + 0.5 * x.detach().mean()
        return x - self.average


IMAGE, VECTOR = (N, 3, 8, 8), (N, 6)
NETWORKS = [
    (Residual, IMAGE, 0),
    (Gate, IMAGE, 0),
    (Shuffle, IMAGE, 0),
    (Tied, VECTOR, 0),
    (Auxiliary, IMAGE, 0),
    (ReturnsDataclass, IMAGE, 0),
    (BareParameter, IMAGE, 1),
    (Transformer, IMAGE, 2),
    (TokenNet, IMAGE, 3),
    (PassesItsChild, IMAGE, 1),
    (ReadsByName, IMAGE, 1),
    (OwnBatchNorm, IMAGE, 1),
    (Stateful, VECTOR, 1),
    (StatefulBelow, VECTOR, 1),
    (PlainState, VECTOR, 1),
]


@pytest.mark.parametrize(("make", "shape", "whole"), NETWORKS, ids=[make.__name__ for make, _, _ in NETWORKS])
def test_a_packed_network_trains_its_members_as_if_each_were_alone(make, shape, whole):
    members = seeded(make)
    packed = assert_packed_equals_separate(members, double(*shape), packed=pack(members, input_dims=len(shape)))
    assert packed.describe().count("member by member") == whole
    packed = assert_packed_equals_separate(members, double(K, *shape), packed=pack(members, input_dims=len(shape)))
    for k, member in enumerate(packed.unpack()):
        assert type(member) is make
        member(double(*shape))
        assert all(p.shape == q[k].shape for p, q in zip(member.parameters(), packed.parameters(), strict=True))


def test_plain_state_is_each_members_own_and_survives_unpacking():
    members = seeded(StatefulBelow)
    packed = assert_packed_equals_separate(members, double(K, *VECTOR), steps=2, packed=pack(members, input_dims=2))
    unpacked = packed.unpack()
    assert [member.state.count for member in unpacked] == [2] * K
    assert len({member.state.seen.item() for member in unpacked}) == K
    assert [member.state.count for member in members] == [0] * K


def build(name, **options):
    return lambda: torchvision.models.get_model(name, num_classes=5, **options)


def small(module, name, **options):
    return lambda: getattr(getattr(torchvision.models, module), name)(num_classes=5, **options)


# Large enough that batch norm's statistics are well conditioned: a member alone moves by 1e-5 at 32 pixels, when only
# its memory format changes.
ZOO = {
    "resnet18": (build("resnet18"), 64, 1),
    "mobilenet_v3_small": (build("mobilenet_v3_small", dropout=0.0), 64, 2),
    "shufflenet_v2_x0_5": (build("shufflenet_v2_x0_5"), 64, 2),
    "densenet": (
        small("densenet", "DenseNet", growth_rate=4, block_config=(2, 2), num_init_features=8),
        32,
        3,
    ),
    "googlenet": (build("googlenet", init_weights=False, dropout=0.0, dropout_aux=0.0), 48, 1),
    "regnet": (build("regnet_y_400mf"), 64, 1),
    "swin": (
        small(
            *("swin_transformer", "SwinTransformer"),
            patch_size=[2, 2], embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=[2, 2],
            stochastic_depth_prob=0.0,
        ),
        16,
        3,
    ),
    "vit": (
        small(
            *("vision_transformer", "VisionTransformer"),
            image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16,
        ),
        16,
        3,
    ),
}  # fmt: skip


@needs_torchvision
@pytest.mark.parametrize("name", ZOO)
def test_torchvision_networks_pack(name):
    make, size, steps = ZOO[name]
    members = seeded(make, count=2)
    packed = assert_packed_equals_separate(members, double(4, 3, size, size), steps)
    whole = {"swin": 4, "vit": 2}.get(name, 0)
    assert packed.describe().count("member by member") == whole


@needs_torchvision
def test_convnext_with_its_layer_scales_packs():
    settings = [
        torchvision.models.convnext.CNBlockConfig(8, 16, 1),
        torchvision.models.convnext.CNBlockConfig(16, None, 1),
    ]
    members = seeded(lambda: torchvision.models.ConvNeXt(settings, num_classes=5, layer_scale=0.5), count=2)
    packed = assert_packed_equals_separate(members, double(3, 3, 32, 32), 3)
    assert "layer_scale" in packed.describe()


# Names, layouts, copies.


def test_tensors_keep_the_models_names_and_gain_a_leading_dimension():
    for make in (Residual, Transformer, Stateful):
        members = seeded(make)
        packed = pack(members, input_dims=4)
        state = packed.state_dict()
        assert list(state) == list(members[0].state_dict())
        assert [n for n, _ in packed.named_parameters()] == [n for n, _ in members[0].named_parameters()]
        assert [n for n, _ in packed.named_buffers()] == [n for n, _ in members[0].named_buffers()]
        for k, member in enumerate(members):
            for name, tensor in member.state_dict().items():
                assert state[name].shape == (K, *tensor.shape) and torch.equal(state[name][k], tensor)
    assert pack(seeded(Residual)).state_dict()["stem.1.num_batches_tracked"].shape == (K,)
    assert pack(seeded(Transformer)).token.shape == (K, 1, 1, 8)


@pytest.mark.parametrize("make", [make for make, _, _ in NETWORKS], ids=lambda make: make.__name__)
def test_unpacking_returns_the_same_bits_flags_modes_and_classes(make):
    members = seeded(make)
    for member in members:
        member.eval()
        next(member.parameters()).requires_grad_(False)
        if hasattr(member, "stem"):
            member.stem[1].train()
    unpacked = pack(members, input_dims=4).unpack()
    for member, twin in zip(members, unpacked, strict=True):
        assert repr(member) == repr(twin)
        assert [type(m) for m in member.modules()] == [type(m) for m in twin.modules()]
        assert [m.training for m in member.modules()] == [m.training for m in twin.modules()]
        assert [vars(m).keys() for m in member.modules()] == [vars(m).keys() for m in twin.modules()]
        assert list(member.state_dict()) == list(twin.state_dict())
        pairs = zip((*member.parameters(), *member.buffers()), (*twin.parameters(), *twin.buffers()), strict=True)
        for a, b in pairs:
            assert torch.equal(a, b) and a.dtype == b.dtype and a.requires_grad == b.requires_grad and a is not b
            assert type(a) is type(b) and b.is_contiguous()


def test_packing_changes_neither_the_members_nor_the_random_state():
    members = seeded(Residual)
    members[0].eval(), members[1].eval(), members[2].eval()
    before = [copy.deepcopy(member.state_dict()) for member in members]
    x, random = double(*IMAGE), torch.get_rng_state()
    packed = pack(members).train()
    packed(x).sum().backward()
    packed.unpack()
    with torch.no_grad():
        for p in packed.parameters():
            p.zero_()
    assert torch.equal(random, torch.get_rng_state())
    for member, state in zip(members, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(member.state_dict().values(), state.values(), strict=True))
        assert not any(module.training for module in member.modules())
        assert all(p.grad is None for p in member.parameters())
        assert {type(m).__module__.partition(".")[0] for m in member.modules()} <= {"torch", __name__.partition(".")[0]}


def test_tied_weights_stay_tied_packed_and_unpacked():
    packed = pack(seeded(Tied))
    assert packed.encode.weight is packed.decode[0].weight
    assert len(list(packed.parameters())) == 2
    for member in packed.unpack():
        assert member.encode.weight is member.decode[0].weight
    moved = copy.deepcopy(packed).float()
    assert moved.encode.weight is moved.decode[0].weight


def test_a_weight_tied_between_a_twin_and_a_module_run_member_by_member_stays_tied():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.attention = Attention()
            self.attention.out.weight = self.first.weight

        def forward(self, x):
            return self.attention(self.first(x))

    packed = assert_packed_equals_separate(seeded(Net), double(N, 5, 8), packed=pack(seeded(Net), input_dims=3))
    assert packed.first.weight is packed.attention.out.weight
    assert all(member.first.weight is member.attention.out.weight for member in packed.unpack())


def test_the_same_network_may_be_given_several_times_and_becomes_independent_copies():
    member = seeded(Residual, 1)[0]
    packed = pack([member, member])
    with torch.no_grad():
        packed.head.weight[0].zero_()
    assert torch.equal(packed.unpack()[1].head.weight, member.head.weight)


def test_frozen_parameters_stay_frozen():
    members = seeded(Residual)
    for member in members:
        member.stem.requires_grad_(False)
    packed = assert_packed_equals_separate(members, double(*IMAGE), 2)
    assert [p.requires_grad for p in packed.stem.parameters()] == [False] * 3
    assert packed.stem[0].weight.grad is None


def test_modes_follow_even_where_a_network_overrides_train():
    class Frozen(Residual):
        def train(self, mode=True):
            super().train(mode)
            self.stem.eval()
            return self

    packed = pack(seeded(Frozen))
    assert packed.train() is packed
    assert packed.training and packed.body.training and not packed.stem[1].training
    packed = pack(seeded(Transformer), member_by_member=[""]).eval()
    assert not packed._inner._inner.training and not packed.layer.training
    assert packed.train()._inner._inner.training


def test_the_input_is_shared_or_each_members_own():
    members = seeded(Residual)
    packed = pack(members).eval()
    x = double(*IMAGE)
    shared, own = packed(x), packed(x.expand(K, *IMAGE))
    assert shared.shape == (K, N, 5)
    assert torch.allclose(shared, own, atol=1e-12)
    assert torch.allclose(packed.ensemble(x), sum(member.eval()(x) for member in members), atol=1e-12)
    assert packed(x[:0]).shape == (K, 0, 5)
    assert packed(x[:1]).shape == (K, 1, 5)


def test_one_member_can_be_packed():
    members = seeded(Residual, 1)
    assert_packed_equals_separate(members, double(*IMAGE), 2)
    assert_packed_equals_separate(members, double(1, *IMAGE), 2)


def test_further_arguments_follow_the_first():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(6, 4)

        def forward(self, x, y, scale=None, *, flag=False):
            assert flag is True
            return self.a(x).mean((2, 3)) + self.b(y["vectors"]) * scale

    members = seeded(TwoInputs)
    packed = pack(members)
    x, y, scale = double(*IMAGE), double(*VECTOR), double(1, 4)
    out = packed(x, {"vectors": y}, scale=scale, flag=True)
    own = packed(x.expand(K, *IMAGE), {"vectors": y.expand(K, *VECTOR)}, scale, flag=True)
    for k, member in enumerate(members):
        one = member(x, {"vectors": y}, scale, flag=True)
        assert torch.allclose(out[k], one, atol=1e-12) and torch.allclose(own[k], one, atol=1e-12)


def test_dropout_draws_for_each_member():
    member = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(144, 5))
    packed = pack([copy.deepcopy(member).double() for _ in range(K)])
    out = packed(double(*IMAGE))
    assert not torch.allclose(out[0], out[1]) and not torch.allclose(out[1], out[2])
    out = packed.eval()(double(*IMAGE))
    assert torch.allclose(out[0], out[1])


def test_a_module_that_draws_once_per_batch_draws_once_per_member():
    class StochasticDepth(nn.Module):
        def __init__(self, mode):
            super().__init__()
            self.mode = mode

        def forward(self, x):
            return x * torch.rand(1 if self.mode == "batch" else len(x), 1, 1, 1, dtype=x.dtype)

    for mode, whole in (("batch", True), ("row", False)):
        packed = pack([nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), StochasticDepth(mode)).double()] * K)
        x = double(*IMAGE)
        factors = (packed(x) / packed.eval().get_submodule("0")(x.repeat(K, 1, 1, 1)).unflatten(0, (K, N)))[
            ..., 0, 0, 0
        ]
        assert ("one random number per batch" in packed.describe()) == whole
        assert len({round(f, 6) for f in factors.flatten().tolist()}) == (K if whole else K * N)


# Crops.


def crops_of(size=8, step=8):
    return tuple(Crop(top, left, size, size) for top in (0, step) for left in (0, step))


def test_each_member_reads_its_crop_of_the_global_batch():
    members = seeded(Residual, 4)
    packed = pack(members, crops=crops_of(10, 6)).eval()
    x = double(N, 3, 16, 16)
    parts = [crop.cut(x) for crop in crops_of(10, 6)]
    out = packed(x)
    assert torch.equal(out, packed(torch.stack(parts)))
    for k, member in enumerate(members):
        assert torch.allclose(out[k], member.eval()(parts[k]), atol=1e-12)
    assert_packed_equals_separate(members, torch.stack(parts), 3, pack(members, crops=crops_of(10, 6)))


def test_signals_and_volumes_are_cut_too():
    signal = pack(seeded(lambda: nn.Conv1d(1, 2, 3), 2), crops=(Crop(0, 5), Crop(5, 5)))
    assert signal(double(N, 1, 10)).shape == (2, N, 2, 3)
    volume = pack(seeded(lambda: nn.Conv3d(1, 2, 3), 2), crops=(Crop(0, 0, 0, 4, 4, 4), Crop(4, 0, 0, 4, 4, 4)))
    assert volume(double(N, 1, 8, 4, 4)).shape == (2, N, 2, 2, 2, 2)


def test_composing_needs_the_decomposition_the_members_come_from():
    class Decomposition:
        input_size = (3, 16, 16)
        origin = ""

        def compose(self, members, head):
            return members, head

    packed = pack(seeded(Residual, 4), crops=crops_of())
    assert packed.decomposition is None
    with pytest.raises(errors.PackError, match="knows no decomposition: build it with decompk.grouped_subnets"):
        packed.compose()
    packed.decomposition = Decomposition()
    members, head = packed.compose(head="mean")
    assert head == "mean" and [type(member) for member in members] == [Residual] * 4
    with pytest.raises(errors.PartitionError, match="an image of 17×17 pixels does not fit"):
        packed(double(N, 3, 17, 17))


# An ordinary nn.Module.

ORDINARY = [Residual, Tied, Transformer, TokenNet, StatefulBelow]


def inputs_for(make):
    return double(*(VECTOR if make in (Tied, StatefulBelow) else IMAGE))


@pytest.mark.parametrize("make", ORDINARY, ids=lambda make: make.__name__)
def test_copies_and_files_hold_the_same_module(make):
    x = inputs_for(make)
    packed = pack(seeded(make), input_dims=x.dim())
    packed(x)
    file, states = io.BytesIO(), io.BytesIO()
    torch.save(packed, file)
    torch.save(packed.state_dict(), states)
    file.seek(0), states.seek(0)
    copies = [copy.deepcopy(packed), torch.load(file, weights_only=False)]
    if make is not StatefulBelow:  # its plain attributes are in no state_dict
        copies.append(pack(seeded(make)[::-1], input_dims=x.dim()))
        copies[-1].load_state_dict(torch.load(states, weights_only=True))
    out = packed(x)
    for other in copies:
        assert torch.equal(other(x), out)
        assert other.state_dict().keys() == packed.state_dict().keys()
        names = {id(p): name for name, p in other.named_parameters()}
        assert not names.keys() & {id(p) for p in packed.parameters()}
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert not torch.equal(other(x), packed(x))
        assert [type(m) for m in other.unpack()] == [make] * K


def test_a_state_dict_of_another_number_of_members_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for stem.0.weight"):
        pack(seeded(Residual, 2)).load_state_dict(pack(seeded(Residual, 3)).state_dict())


@pytest.mark.parametrize("make", ORDINARY, ids=lambda make: make.__name__)
def test_dtypes_and_memory_formats_change_in_place(make):
    x = inputs_for(make)
    packed = pack(seeded(make), input_dims=x.dim()).eval()
    if make is StatefulBelow:
        packed.train()(x)
        packed.eval()
    out = packed(x)
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        assert packed.to(memory_format=memory_format) is packed
        assert torch.allclose(packed(x), out, atol=1e-12)
    half = copy.deepcopy(packed).to(torch.float32, memory_format=torch.channels_last)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert torch.allclose(half(x.float()).double(), out, atol=1e-4)
    assert {p.dtype for p in half.double().parameters()} == {torch.float64}
    assert torch.equal(half.get_parameter(next(iter(dict(half.named_parameters())))), next(half.parameters()))
    packed.to(dtype=torch.bfloat16)
    assert packed(x.bfloat16()).dtype == torch.bfloat16


def test_weights_are_ohwi_for_every_member_and_so_are_their_gradients_and_moments():
    packed = pack([member.float() for member in seeded(Residual)])
    optimizer = torch.optim.Adam(packed.parameters())
    packed(double(*IMAGE).float()).sum().backward()
    optimizer.step()
    weight = packed.stem[0].weight
    for tensor in (weight, weight.grad, optimizer.state[weight]["exp_avg"], copy.deepcopy(packed).stem[0].weight):
        assert all(one.is_contiguous(memory_format=torch.channels_last) for one in tensor.unbind(0))
    packed.to(memory_format=torch.contiguous_format)
    assert weight.is_contiguous()
    packed.to(memory_format=torch.channels_last)
    assert weight[1].is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_functional_call_swaps_parameters():
    for make in ORDINARY[:4]:
        packed, other = pack(seeded(make)).eval(), pack(seeded(make)[::-1]).eval()
        x = inputs_for(make)
        swapped = torch.func.functional_call(packed, dict(other.named_parameters()), (x,))
        assert torch.allclose(swapped, other(x), atol=1e-12)
        assert not torch.allclose(swapped, packed(x), atol=1e-3)


@pytest.mark.parametrize("make", [Residual, Gate, TokenNet], ids=lambda make: make.__name__)
def test_autocast_gives_the_dtypes_and_values_of_the_members_alone(make):
    members = seeded(make, dtype=torch.float32)
    packed = pack(members)
    x = torch.randn(IMAGE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = packed(x)
        alone = [member(x) for member in members]
    for k in range(K):
        assert out.dtype == alone[k].dtype == torch.bfloat16
        assert (out[k] - alone[k]).abs().max() <= 0.05 * alone[k].abs().max()
    out.float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in packed.parameters())


def compiled_equals_eager(packed, x, backend):
    torch._dynamo.reset()
    eager = copy.deepcopy(packed)
    compiled = torch.compile(packed, backend=backend, fullgraph=True)
    for _ in range(2):
        out, expected = leaves(compiled(x)), leaves(eager(x))
        for a, b in zip(out, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-9)
        sum(leaf.square().sum() for leaf in out).backward()
        sum(leaf.square().sum() for leaf in expected).backward()
    for (name, a), (_, b) in zip(packed.named_parameters(), eager.named_parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.allclose(a.grad, b.grad, atol=1e-8), name
    for (name, a), (_, b) in zip(packed.named_buffers(), eager.named_buffers(), strict=True):
        assert torch.allclose(a, b), name


@pytest.mark.parametrize(
    "make", [Residual, Shuffle, Auxiliary, BareParameter, Transformer, Tied], ids=lambda make: make.__name__
)
def test_a_packed_network_compiles_into_one_graph(make):
    compiled_equals_eager(pack(seeded(make)), inputs_for(make), "aot_eager")


def test_a_packed_network_with_crops_compiles_into_one_graph():
    compiled_equals_eager(pack(seeded(Residual, 4), crops=crops_of()), double(N, 3, 16, 16), "aot_eager")


def test_inductor_compiles_a_packed_network():
    make = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Scale(4))  # noqa: E731
    compiled_equals_eager(pack(seeded(make)), double(*IMAGE), "inductor")


def test_backward_hooks_and_gradient_checks_work():
    packed = pack(seeded(lambda: nn.Sequential(nn.Conv2d(2, 2, 2), nn.PReLU()), 2))
    x = double(2, 1, 2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(packed, (x,))


def test_a_description_names_every_layer_and_why_it_runs_as_it_does():
    lines = pack(seeded(TokenNet)).describe().splitlines()
    assert lines[0] == "3 members of TokenNet"
    table = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines[1:]}
    assert table["patch"] == ["Conv2d", "twin"]
    assert table["attention"] == ["Attention", "member by member: its forward reads 'bias' of a submodule"]
    assert table["mix"] == ["MultiheadAttention", "member by member: no twin for this MultiheadAttention"]
    assert table["layer"][1].startswith("member by member: its forward reads")
    assert list(table) == ["patch", "norm", "attention", "layer", "mix", "head"]
    assert "K=3" in repr(pack(seeded(TokenNet)))


def test_member_by_member_can_be_asked_for():
    members = seeded(Residual)
    packed = pack(members, member_by_member=["body"])
    assert "body" in packed.describe() and "member by member: asked for" in packed.describe()
    assert_packed_equals_separate(members, double(*IMAGE), 2, packed)
    assert "stem" not in pack(members, member_by_member=[""]).describe()
    with pytest.raises(errors.PackError, match="names 'bodi', which is no module of Residual"):
        pack(members, member_by_member=["bodi"])


def test_hooks_of_the_members_see_one_member_at_a_time():
    shapes = []
    members = seeded(Residual)
    for member in members:
        member.body.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    packed = pack(members)
    packed(double(*IMAGE))
    assert shapes == [(N, 8, 4, 4)] * K
    assert "it has hooks" in packed.describe()


def test_a_packed_module_works_inside_another_module():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.packed = pack(seeded(Residual))
            self.extra = nn.Linear(5, 2).double()

        def forward(self, x):
            return self.extra(self.packed(x).mean(0))

    both = Both()
    assert "packed.stem.0.weight" in both.state_dict()
    both.eval()
    assert not both.packed._inner.training
    assert both(double(*IMAGE)).shape == (N, 2)


# Refusals.


def differing(change):
    members = seeded(Residual)
    change(members[2])
    return members


def set_attribute(path, name, value):
    return lambda member: setattr(member.get_submodule(path), name, value)


REFUSED = {
    "only one of them has a module 'body.3'": lambda m: m.body.append(nn.Identity()),
    "'body.0.2' is ReLU in member 0 and GELU in member 2": lambda m: m.body[0].__setitem__(2, nn.GELU()),
    r"'head' is Linear\(in_features=8, out_features=5, bias=True\) in member 0, \(in_features=8, out_features=6": (
        lambda m: setattr(m, "head", nn.Linear(8, 6).double())
    ),
    r"'stem.0' is Conv2d\(3, 8, .* stride=\(2, 2\).* in member 0, .*stride=\(1, 1\).* in member 2": (
        lambda m: setattr(m.stem[0], "stride", (1, 1))
    ),
    r"'stem.1' is BatchNorm2d\(8, eps=1e-05.* in member 0, \(8, eps=0.001": set_attribute("stem.1", "eps", 1e-3),
    r"'stem.0.weight' has shape \(8, 3, 3, 3\) in member 0 and \(8, 3, 5, 5\) in member 2": (
        lambda m: setattr(m.stem[0], "weight", nn.Parameter(torch.zeros(8, 3, 5, 5).double()))
    ),
    "'stem.0.weight' has dtype torch.float64 in member 0 and torch.float32 in member 2": lambda m: m.stem[0].float(),
    "'stem.0.weight' has device cpu in member 0 and meta in member 2": lambda m: m.stem[0].to("meta"),
    "'stem.0.weight' requires a gradient in only one of members 0 and 2; freeze it in all or none": (
        lambda m: m.stem[0].requires_grad_(False)
    ),
    "only one of members 0 and 2 has a tensor 'stem.1.running_var'": set_attribute("stem.1", "running_var", None),
    "only one of members 0 and 2 has a tensor 'extra'": lambda m: m.register_buffer("extra", torch.zeros(1)),
    "'stem' is in train mode in only one of members 0 and 2": set_attribute("stem", "training", False),
    "the network has different hooks in members 0 and 2": lambda m: m.register_forward_hook(print),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_members_that_differ_are_refused_with_the_place(sentence):
    with pytest.raises(errors.PackError, match=sentence) as caught:
        pack(differing(REFUSED[sentence]))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("drop", (0.1, 0.1, 0.2)),
        ("activation", (F.relu, F.relu, F.gelu)),
        ("widths", ([1, 2], [1, 2], [1, 3])),
        ("table", (torch.zeros(2), torch.zeros(2), None)),
        ("options", ({"a": 1}, {"a": 1}, {"a": 2})),
        ("function", (lambda x: x, lambda x: x + 1, lambda x: x)),
    ],
)
def test_members_with_different_settings_are_refused(name, values):
    members = seeded(Residual)
    for member, value in zip(members, values, strict=True):
        setattr(member.body, name, value)
    with pytest.raises(errors.PackError, match=f"'body.{name}' has different values in members 0 and"):
        pack(members)
    for member in members:
        setattr(member.body, name, values[0])
    pack(members)


def test_members_tied_differently_are_refused():
    members = seeded(Tied)
    members[1].decode[0].weight = nn.Parameter(members[1].decode[0].weight.clone())
    with pytest.raises(errors.PackError, match=r"'decode.0.weight' is shared .* in only one of members 0 and 1"):
        pack(members)


class ExtraState(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


UNPACKABLE = {
    "pack needs at least one member": list,
    "member 1 is not an nn.Module but int": lambda: [nn.ReLU(), 3],
    "'0' keeps extra state": lambda: [nn.Sequential(ExtraState(2, 2))],
    "the network is compiled; pack the plain modules": lambda: [torch.compile(nn.Linear(2, 2))],
    "the network is packed already": lambda: [pack([nn.Linear(2, 2)])],
    "'0.bias' has no shape yet": lambda: [nn.Sequential(nn.LazyLinear(2))] * 2,
}


@pytest.mark.parametrize("sentence", UNPACKABLE)
def test_what_cannot_be_packed_is_refused_by_name(sentence):
    with pytest.raises(errors.PackError, match=sentence) as caught:
        pack(UNPACKABLE[sentence]())
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_network_that_cannot_be_copied_is_refused():
    member = nn.Linear(2, 2)
    member.lock = threading.Lock()
    with pytest.raises(errors.PackError, match="member 0 cannot be copied, which packing needs: "):
        pack([member])


def test_wrong_inputs_are_refused_with_both_shapes():
    packed = pack(seeded(Residual))
    for shape in [(3, 8, 8), (K + 1, N, 3, 8, 8), (K, 1, N, 3, 8, 8)]:
        with pytest.raises(
            errors.PackError, match=r"is neither one batch of 4 dimensions .* nor \(3, N, …\) of 5"
        ) as e:
            packed(double(*shape))
        assert str(shape) in str(e.value)
    with pytest.raises(errors.PackError, match=r"'stem.0' takes a tensor, and got list"):
        packed([double(*IMAGE)])
    vectors = pack(seeded(Tied))
    assert vectors(double(*VECTOR)).shape == (K, *VECTOR)
    with pytest.raises(errors.PackError, match=r"\(3, 4, 6\) may be one batch .* tell pack with input_dims="):
        vectors(double(K, *VECTOR))
    assert pack(seeded(Tied), input_dims=2)(double(K, *VECTOR)).shape == (K, *VECTOR)
    with pytest.raises(errors.PackError, match="input_dims="):
        pack(seeded(Tied), input_dims=2)(double(*IMAGE))


def test_images_that_crops_do_not_fit_are_refused():
    packed = pack(seeded(Residual, 4), crops=crops_of())
    for shape, sentence in [
        ((N, 3, 15, 16), "does not fit an image of 15×16 pixels"),
        ((4, N, 3, 16, 16), r"\(4, 4, 3, 16, 16\) is not cut into crops of 8×8 pixels"),
        ((3, N, 3, 8, 8), "is neither a global batch of 4 dimensions nor"),
        ((3, 16, 16), "is neither a global batch of 4 dimensions nor"),
    ]:
        with pytest.raises(errors.PartitionError, match=sentence):
            packed(double(*shape))
    with pytest.raises(errors.PackError, match="2 crops do not fit 4 members"):
        pack(seeded(Residual, 4), crops=crops_of()[:2])
    with pytest.raises(errors.PartitionError, match="unequal size"):
        pack(seeded(Residual, 2), crops=[Crop(0, 0, 8, 8), Crop(0, 0, 9, 8)])


class StepsFirst(nn.Module):
    """Brings its samples to dimension 1 before a packed layer."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        return self.linear(self.patch(x).flatten(2).permute(2, 0, 1))[0]


def test_samples_outside_dimension_zero_are_refused_compiled_and_run_member_by_member_otherwise():
    members, x = seeded(StepsFirst), double(*IMAGE)
    sentence = r"'linear' got an input of \(4, \d+, 8\), whose dimension 0 is not a multiple of the packed batch of \d+"
    with pytest.raises(errors.PackError, match=sentence):
        pack(members, rehearse=False)(x)
    packed = pack(members)
    with pytest.warns(UserWarning, match=f"the network runs member by member: packed, {sentence}"):
        packed(x)
    assert_packed_equals_separate(members, x, 2, packed)
    assert_packed_equals_separate(members, x, 2, pack(members, member_by_member=[""]))


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 8, 3), nn.Conv1d(3, 8, 3), nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 8, 3)]
)
@pytest.mark.parametrize("channels", [1, 4, 64])
def test_another_number_of_channels_is_refused_by_the_layers_name(layer, channels):
    packed = pack(
        [nn.Sequential(copy.deepcopy(layer)) for _ in range(3)], input_dims=3 if isinstance(layer, nn.Conv1d) else 4
    )
    with pytest.raises(errors.PackError, match=r"'0' takes 3 channels, and got an input of"):
        packed(torch.randn(4, channels, *[9] * (1 if isinstance(layer, nn.Conv1d) else 2)))


def test_weights_of_another_shape_never_reach_a_kernel():
    packed = pack([nn.Sequential(nn.Conv2d(4, 8, 3)) for _ in range(3)])
    conv = packed.get_submodule("0")
    conv.weight = nn.Parameter(torch.randn(3, 8, 3, 3, 3))
    with pytest.raises(errors.DecompkError, match="members of 4 channels"):
        packed(torch.randn(4, 4, 9, 9))


class ScalarBelow(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()))

    def forward(self, x):
        return (x * self.scale).mean()


def test_outputs_that_are_not_one_row_per_sample_are_one_value_per_member():
    class Scalar(Residual):
        def forward(self, x):
            return super().forward(x).mean()

    for make in (Scalar, lambda: nn.Sequential(nn.Conv2d(3, 4, 1), ScalarBelow())):
        members, x = seeded(make), double(*IMAGE)
        packed = pack(members)
        with pytest.warns(UserWarning, match="the network runs member by member"):
            out = packed(x)
        assert torch.allclose(out, torch.stack([member(x) for member in members]), atol=1e-12)
    with pytest.raises(
        errors.PackError, match=r"return a tensor of \(\) for 3 · 4 samples, which is no row per sample"
    ):
        pack(seeded(Scalar), rehearse=False)(double(*IMAGE))
    packed = pack(seeded(make), rehearse=False)
    with pytest.raises(
        errors.PackError, match=r"'1' returned a tensor of \(\) for 4 rows: name the module that calls it"
    ):
        packed(double(*IMAGE))


def test_gradient_checkpoints_around_twins_recompute_the_right_members():
    class Checkpointed(Residual):
        def forward(self, x):
            body = torch.utils.checkpoint.checkpoint(self.body, self.stem(x), use_reentrant=False)
            return self.head(body.mean((2, 3)))

    packed = assert_packed_equals_separate(seeded(Checkpointed), double(*IMAGE), 1)
    assert "member by member" not in packed.describe()


def test_a_packed_module_is_a_packed_and_its_parts_are_what_they_say():
    packed = pack(seeded(BareParameter))
    assert isinstance(packed, Packed) and isinstance(packed.scale, PerMember)
    assert isinstance(packed.stem[0], nn.Conv2d) and packed.stem[0].out_channels == 4
    assert packed.K == K and packed.crops is None
