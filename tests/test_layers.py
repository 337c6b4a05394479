"""Every member-aware layer, in each of its forms and options, trains its members as if they were alone."""

import functools

import pytest
import torch
from helpers import assert_packed_equals_separate, double
from torch import nn

from decompk.errors import PackError
from decompk.kernels.thresholds import conv_form, linear_form, norm_form
from decompk.packed import conv, linear, norm, recurrent
from decompk.packed.pack import pack
from decompk.packed.per_member import PerMember
from decompk.packed.twin import channel_grouped, member_major
from decompk.packed.twins import TWINS

K, N = 3, 4


def members_of(make, count=K):
    """`count` members, seeded apart, whose norms do not start at one and zero."""
    members = []
    for seed in range(count):
        torch.manual_seed(seed)
        member = make().double()
        for name, tensor in member.named_parameters():
            if tensor.dim() == 1:
                nn.init.normal_(tensor, 1.0 if name.endswith("weight") else 0.0, 0.3)
        members.append(member)
    return members


def check(make, *shape, steps=3):
    """One input shared by all members, then one for each."""
    members = members_of(make)
    packed = pack(members, input_dims=len(shape))
    assert_packed_equals_separate(members, double(*shape), steps, packed)
    packed = pack(members, input_dims=len(shape))
    return assert_packed_equals_separate(members, double(K, *shape), steps, packed)


CONVS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (N, 4, 11)),
    "1d, stride, dilation, groups, no bias": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False),
        (N, 4, 11),
    ),
    "1d, pointwise": (lambda: nn.Conv1d(4, 6, 1), (N, 4, 5)),
    "1d, reflect": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), (N, 4, 7)),
    "2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (N, 4, 5, 7)),
    "2d, valid": (lambda: nn.Conv2d(4, 6, (3, 2), padding="valid"), (N, 4, 5, 7)),
    "2d, same, even kernel": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same"), (N, 4, 5, 7)),
    "2d, same, circular": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (N, 4, 5, 7)),
    "2d, replicate, uneven": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), padding_mode="replicate"),
        (N, 4, 5, 7),
    ),
    "2d, pointwise": (lambda: nn.Conv2d(4, 6, 1), (N, 4, 5, 7)),
    "2d, pointwise, stride, no bias": (lambda: nn.Conv2d(4, 6, 1, stride=(2, 3), bias=False), (N, 4, 5, 7)),
    "2d, pointwise, padding": (lambda: nn.Conv2d(4, 6, 1, padding=1), (N, 4, 3, 3)),
    "2d, pointwise, circular": (lambda: nn.Conv2d(4, 6, 1, padding=1, padding_mode="circular"), (N, 4, 3, 3)),
    "2d, pointwise, groups": (lambda: nn.Conv2d(4, 6, 1, groups=2), (N, 4, 3, 3)),
    "2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (N, 4, 5, 5)),
    "3d": (lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=1), (N, 2, 3, 4, 3)),
    "3d, circular": (lambda: nn.Conv3d(2, 4, 3, padding=1, padding_mode="circular"), (N, 2, 3, 4, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (N, 4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), (N, 4, 3, 4)),
    "transposed 2d, groups, dilation": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (N, 4, 3, 4)),
    "transposed 3d, no bias": (lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, bias=False), (N, 2, 2, 3, 2)),
}


@pytest.mark.parametrize("form", ["loop", "grouped", "chosen"])
@pytest.mark.parametrize("option", CONVS)
def test_convolutions_train_alike_in_every_form(option, form, monkeypatch):
    if form != "chosen":
        monkeypatch.setattr(conv, "conv_form", lambda *sizes: form)
    make, shape = CONVS[option]
    check(make, *shape)


def test_a_transposed_convolution_takes_an_output_size():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 2, 3, stride=2)

        def forward(self, x):
            return self.up(x, output_size=(8, 10))

    check(Net, N, 4, 3, 4)


@pytest.mark.parametrize("form", ["loop", "grouped"])
@pytest.mark.parametrize("shape", [(N, 5), (N, 2, 5), (N, 2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_take_any_leading_dimensions(shape, bias, form, monkeypatch):
    monkeypatch.setattr(linear, "linear_form", lambda *sizes: form)
    check(lambda: nn.Linear(5, 7, bias=bias), *shape)


NORMS = {
    "batch 1d, vectors": (lambda: nn.BatchNorm1d(6), (N, 6)),
    "batch 1d, signals": (lambda: nn.BatchNorm1d(6, eps=1e-3), (N, 6, 5)),
    "batch 2d": (lambda: nn.BatchNorm2d(6), (N, 6, 3, 5)),
    "batch 2d, momentum": (lambda: nn.BatchNorm2d(6, momentum=0.7), (N, 6, 3, 5)),
    "batch 2d, cumulative": (lambda: nn.BatchNorm2d(6, momentum=None), (N, 6, 3, 5)),
    "batch 2d, not affine": (lambda: nn.BatchNorm2d(6, affine=False), (N, 6, 3, 5)),
    "batch 2d, not tracking": (lambda: nn.BatchNorm2d(6, track_running_stats=False), (N, 6, 3, 5)),
    "batch 2d, neither": (lambda: nn.BatchNorm2d(6, affine=False, track_running_stats=False), (N, 6, 3, 5)),
    "batch 3d": (lambda: nn.BatchNorm3d(4), (N, 4, 2, 3, 2)),
    "group": (lambda: nn.GroupNorm(2, 6), (N, 6, 3, 5)),
    "group, not affine": (lambda: nn.GroupNorm(2, 6, affine=False), (N, 6, 3)),
    "layer": (lambda: nn.LayerNorm(6), (N, 3, 6)),
    "layer, two axes": (lambda: nn.LayerNorm((3, 6)), (N, 3, 6)),
    "layer, no bias": (lambda: nn.LayerNorm(6, bias=False), (N, 3, 6)),
    "layer, not affine": (lambda: nn.LayerNorm(6, elementwise_affine=False), (N, 6)),
    "instance 1d": (lambda: nn.InstanceNorm1d(6), (N, 6, 5)),
    "instance 2d, affine": (lambda: nn.InstanceNorm2d(6, affine=True), (N, 6, 3, 5)),
    "instance 2d, tracking": (lambda: nn.InstanceNorm2d(6, track_running_stats=True), (N, 6, 3, 5)),
    "instance 3d, both": (lambda: nn.InstanceNorm3d(4, affine=True, track_running_stats=True), (N, 4, 2, 3, 2)),
    "rms": (lambda: nn.RMSNorm(6), (N, 3, 6)),
}


@pytest.mark.parametrize(
    ("option", "form"), [(o, f) for o in NORMS for f in ("loop", "grouped") if f == "loop" or o.startswith("batch")]
)
def test_norms_keep_each_members_own_statistics(option, form, monkeypatch):
    monkeypatch.setattr(norm, "norm_form", lambda *sizes: form)
    make, shape = NORMS[option]
    # A bias keeps something trainable where the norm has no parameters.
    check(lambda: nn.Sequential(make(), nn.PReLU(init=0.9)), *shape)


@pytest.mark.parametrize("count", [1, 6])
def test_prelu_slopes_are_each_members_own(count):
    check(lambda: nn.PReLU(count), N, 6, 3)


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}, {"max_norm": 0.5}],
    ids=["plain", "padding_idx", "scale_grad_by_freq", "max_norm"],
)
def test_embeddings_look_up_each_members_own_table(options):
    members = members_of(lambda: nn.Sequential(nn.Embedding(9, 4, **options), nn.Linear(4, 2)))
    tokens = torch.randint(9, (N, 5))
    assert_packed_equals_separate(members, tokens, packed=pack(members))
    packed = pack(members, input_dims=2)
    assert_packed_equals_separate(members, torch.randint(9, (K, N, 5)), packed=packed)
    assert isinstance(packed.get_submodule("0"), PerMember) == ("max_norm" in options)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Bilinear(4, 4, 3)

    def forward(self, x):
        return self.mix(x, x.flip(1))


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class NamedConv(nn.Conv2d):
    """A subclass that computes what its base computes."""

    def __init__(self, width):
        super().__init__(4, width, 3)


def weight_norm(kind):
    def make():
        layer = nn.Conv2d(4, 6, 3)
        wrap = {"weight": nn.utils.parametrizations.weight_norm, "spectral": nn.utils.parametrizations.spectral_norm}
        return nn.Sequential(wrap[kind](layer))

    return make


UNKNOWN = {
    "bilinear": (TwoInputs, (N, 4)),
    "weight norm": (weight_norm("weight"), (N, 4, 5, 5)),
    "spectral norm": (weight_norm("spectral"), (N, 4, 5, 5)),
    "parametrised linear without bias": (
        lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4, bias=False))),
        (N, 4),
    ),
    "an overridden forward": (lambda: nn.Sequential(StandardisedConv(4, 6, 3)), (N, 4, 5, 5)),
}


@pytest.mark.parametrize("option", UNKNOWN)
def test_leaves_without_a_twin_run_member_by_member(option):
    make, shape = UNKNOWN[option]
    packed = check(make, *shape)
    assert any(isinstance(module, PerMember) for module in packed.modules())
    assert "member by member" in packed.describe()


def test_batch_norm_over_several_processes_is_left_to_torch():
    packed = pack([nn.Sequential(nn.SyncBatchNorm(4)) for _ in range(K)], input_dims=4).eval()
    assert packed(torch.randn(N, 4, 2, 2)).shape == (K, N, 4, 2, 2)
    assert "no twin for this SyncBatchNorm" in packed.describe()


def test_a_subclass_that_changes_nothing_has_its_bases_twin():
    packed = check(lambda: NamedConv(6), N, 4, 5, 5)
    assert "member by member" not in packed.describe()
    assert type(packed.unpack()[1]) is NamedConv


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **{"num_layers": 2, "bidirectional": True, **options})
        self.pair = kind is nn.LSTM
        self.head = nn.LazyLinear(2)
        self(torch.zeros(1, 1, 3))

    def forward(self, x):
        lanes = self.rnn.num_layers * (1 + self.rnn.bidirectional)
        start = x.new_full((lanes, x.shape[0], self.rnn.proj_size or 4), 0.1)
        y, state = self.rnn(x, (start, x.new_full((lanes, x.shape[0], 4), 0.2)) if self.pair else start)
        return self.head(y), state[0][-1] if self.pair else state[-1]


@pytest.mark.parametrize("options", [{}, {"bidirectional": False}, {"num_layers": 1, "bias": False}], ids=str)
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("form", ["loop", "together"])
def test_recurrent_layers_train_alike_in_every_form(form, kind, options, monkeypatch):
    monkeypatch.setattr(recurrent, "recurrent_form", lambda *_: form)
    packed = check(lambda: Recurrent(kind, **options), N, 5, 3)
    assert "member by member" not in packed.describe()
    assert packed.rnn.hidden_size == 4  # what a caller may read of it
    assert isinstance(packed.unpack()[0].rnn, kind) and "Packed" not in type(packed.unpack()[0].rnn).__name__


def test_one_loop_over_time_runs_all_members():
    packed = pack([Recurrent(nn.GRU, num_layers=1, bidirectional=True) for _ in range(6)])
    with torch.profiler.profile() as seen:
        packed(torch.zeros(N, 9, 3))
    products = {
        e.key: e.count for e in seen.key_averages() if e.key in ("aten::baddbmm", "aten::baddbmm_", "aten::bmm")
    }
    assert sum(products.values()) <= 2 * 9 + 4  # two a step, and the inputs' of both directions; not once a member


def test_recurrent_layers_without_a_twin_split_hidden_states_by_sample():
    packed = check(lambda: Recurrent(nn.LSTM, proj_size=2), N, 5, 3)
    assert isinstance(packed.rnn, PerMember)
    assert packed.rnn.hidden_size == 4


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_compute_in_bfloat16_under_autocast_and_drop_out_between_layers(kind):
    packed = pack([Recurrent(kind, dropout=0.5) for _ in range(3)]).train()
    x = torch.randn(N, 5, 3)
    assert not torch.equal(packed(x)[0], packed(x)[0])
    exact = packed.eval()(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = packed(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=0.05)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in packed.parameters())


def test_recurrent_layers_take_padded_batches_only():
    packed = pack([nn.GRU(3, 4, batch_first=True) for _ in range(2)])
    with pytest.raises(PackError, match="padded batch"):
        packed(torch.zeros(N, 0, 3))
    with pytest.raises(PackError, match="neither one batch of 3 dimensions"):
        packed(torch.zeros(N, 3))


class AsksForItsKind(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        y, state = self.rnn(x)
        state = state[0] if isinstance(self.rnn, nn.LSTM) else state
        return self.head(state[-1] if type(self.head) is nn.Linear else y)


def test_a_network_that_asks_for_the_class_of_a_layer_gets_the_same_answer():
    packed = check(AsksForItsKind, N, 5, 3)
    assert "asks what kind of module" in packed.describe()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.asks, self.asks_too = nn.Linear(2, 2), AsksForItsKind()
            self.asks_too_much = nn.Linear(2, 2)

        def forward(self, x):
            return self.asks_too_much(self.asks(self.asks_too(x)))

    packed = check(Net, N, 5, 3)  # names that begin alike stay apart
    assert [line.split()[0] for line in packed.describe().splitlines()[1:]] == ["asks", "asks_too", "asks_too_much"]


class StepsFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x.transpose(0, 1))[1][-1])


def test_a_layer_with_its_samples_in_dimension_one_makes_the_whole_network_run_member_by_member():
    packed = check(StepsFirst, N, 5, 3)
    assert "'rnn' has batch_first=False" in packed.describe()


class Attention(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mask = mask

    def forward(self, x):
        length = x.shape[1]
        masks = {
            "none": {},
            "tokens": {"key_padding_mask": torch.arange(length).expand(x.shape[:2]) > 3},
            "causal": {"attn_mask": torch.ones(length, length, dtype=torch.bool).triu(1)},
            "samples": {"attn_mask": torch.eye(length, dtype=torch.bool).expand(2 * len(x), length, length)},
        }
        return self.attention(x, x, x, **masks[self.mask])


@pytest.mark.parametrize("mask", ["none", "tokens", "causal", "samples"])
def test_attention_masks_reach_the_right_samples(mask):
    check(lambda: Attention(mask), N, K * N, 4)  # as many tokens as rows: a causal mask must not be cut


class Holder(nn.Module):
    """Layers whose tensors live in containers without a forward."""

    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList([torch.rand(6), torch.rand(6)])
        self.layers = nn.ModuleList([nn.Linear(6, 6)])
        self.table = nn.ModuleDict({"a": nn.ParameterDict({"shift": torch.rand(6)})})

    def forward(self, x):
        return self.layers[0](x * self.scales[0]) * self.scales[1] + self.table["a"]["shift"]


def test_tensors_held_by_modules_without_a_forward_belong_to_the_module_that_reads_them():
    packed = check(lambda: nn.Sequential(nn.Linear(4, 6), Holder()), N, 4)
    assert "holds tensors and has no forward" in packed.describe() and packed.describe().count("member by member") == 1


class Bias(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.rand(6))

    def bias(self):
        return self.table.exp()

    @property
    def negated(self):
        return -self.table

    def forward(self):
        return self.table


@pytest.mark.parametrize("use", ["forward", "method", "property"])
def test_a_module_asked_for_a_value_without_samples_runs_with_the_module_that_asks(use):
    uses = {
        "forward": lambda self, x: self.linear(x) + self.bias(),
        "method": lambda self, x: self.linear(x) + self.bias.bias(),
        "property": lambda self, x: self.linear(x) + self.bias.negated,
    }

    def init(self):
        nn.Module.__init__(self)
        self.linear, self.bias = nn.Linear(4, 6), Bias()

    Net = type("Net", (nn.Module,), {"__init__": init, "forward": uses[use]})
    packed = check(lambda: nn.Sequential(Net()), N, 4)
    assert "without samples" in packed.describe()


def test_a_twin_initialises_every_member_from_its_own_fan_in():
    packed = pack([nn.Sequential(nn.Conv2d(100, 8, 5), nn.BatchNorm2d(8), nn.Linear(400, 3)) for _ in range(K)])
    nn.init.zeros_(packed.get_submodule("0").weight)
    for module in packed.children():
        module.reset_parameters()
    for name, fan_in in (("0", 2500), ("2", 400)):
        weight = packed.get_submodule(name).weight
        assert weight.shape[0] == K and 0.99 < weight.abs().max() * fan_in**0.5 <= 1
        assert not torch.equal(weight[0], weight[1])
    assert torch.equal(packed.get_submodule("1").weight, torch.ones(K, 8))


def test_every_table_entry_is_a_subclass_of_what_it_stands_for():
    for leaf, twin in TWINS.items():
        assert issubclass(twin, leaf) and twin.__name__ == "Packed" + leaf.__name__


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 4, 3, 5), (6, 4, 3, 5, 2), (0, 4, 3, 5)])
def test_channel_grouped_and_member_major_are_inverse(shape):
    x = torch.randn(shape)
    groups = channel_grouped(x, 3)
    assert groups.shape == (shape[0] // 3, 12, *shape[2:])
    assert torch.equal(member_major(groups, 3), x)
    assert torch.equal(groups[:, 4:8], x[shape[0] // 3 : 2 * (shape[0] // 3)])


def test_images_stay_channels_last_through_every_form(monkeypatch):
    x = torch.randn(K * N, 4, 5, 5).to(memory_format=torch.channels_last)
    net = pack([nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)) for _ in range(K)])._inner
    for form in ("loop", "grouped"):
        monkeypatch.setattr(norm, "norm_form", functools.partial(lambda form, *sizes: form, form))
        for form_of_conv in ("loop", "grouped", "matmul"):
            monkeypatch.setattr(
                conv, "conv_form", lambda *sizes, f=form_of_conv: f if sizes[2] or f != "matmul" else "loop"
            )
            y = x
            for layer in net:
                y = layer(y)
                assert y.is_contiguous(memory_format=torch.channels_last), (layer, form, conv_form)


def test_few_large_members_run_in_turn_and_many_small_ones_in_one_call():
    assert conv_form((3, 3), (1, 1), False, 16, 16, 16 * 35 * 35) == "loop"
    assert conv_form((3, 3), (1, 1), False, 8, 8, 16 * 9 * 9) == "grouped"
    assert conv_form((1, 1), (1, 1), True, 16, 64, 16 * 35 * 35) == "matmul"
    assert conv_form((1, 1), (2, 2), True, 64, 128, 16 * 18 * 18) == "loop"
    assert norm_form(16 * 64 * 35 * 35, 64, True) == "loop"
    assert norm_form(16 * 32 * 3 * 3, 32, True) == "grouped"
    assert linear_form(16, 512, 1000) == "loop"
    assert linear_form(16, 32, 10) == "grouped"
