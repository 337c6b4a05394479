"""block_diagonal: composed networks run without their zero blocks, to 1e-10, and others are left alone by name."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import decompk
from decompk import models
from decompk.divide.blockdiag import Layerwise, Members
from decompk.divide.zero_skipping import BlockConv2d, BlockLinear, components, find_blocks

PIXELS = 64


def composed(name, partitions=4, **options):
    """A registered network of small width, composed of members with random weights and statistics, float64, in eval."""
    options = {"width": 16, "num_classes": 5, "input_size": (3, PIXELS, PIXELS)} | options
    options = {"fc": 32, **options} if name == "vgg16" else options
    torch.manual_seed(0)
    size = options["input_size"]
    d = decompk.decompose(models.build(name, **options).double(), size, partitions, size[1] // 2)
    members = d.subnets(1)
    for member in members:
        for module in member.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    net = d.compose(members).eval()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def assert_close(a, b, tolerance=1e-10):
    error = (a - b).abs().max().item() / max(1.0, b.abs().max().item())
    assert error <= tolerance, f"error {error:.1e}"


def train_step(net, x, target, holding_zeros=False):
    """One step of SGD; `holding_zeros` keeps what is zero at zero, as a network without those weights does."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=1e-3)
    y = net(x)
    F.cross_entropy(y, target).backward()
    if holding_zeros:
        for p in net.parameters():
            if p.dim() > 1:
                p.grad[p == 0] = 0
    optimizer.step()
    net.eval()
    return y.detach()


CUTS = {4: 4, 8: (2, 4), 16: 16}
LEFT_OUT = ("alexnet", "resnet32", "resnet56", "resnet101", "resnet101_food101", "resnet110")  # mixes channels; deeper


@pytest.mark.parametrize(
    ("name", "K"),
    [(n, 4) for n in models.names() if n not in LEFT_OUT]
    + [("resnet8", 8), ("resnet8", 16), ("resnet50", 16), ("vgg16", 16)],
)
def test_a_composed_network_runs_as_its_members_in_eval_and_in_a_training_step(name, K):
    pixels = min(PIXELS, models.spec(name).input_size[1])
    net = composed(name, CUTS[K], input_size=(3, pixels, pixels), **({"width": 4} if name == "wrn_16_8" else {}))
    fast = decompk.block_diagonal(net)
    assert isinstance(fast, Members) and fast.K == K
    x, target = torch.randn(2, 3, pixels, pixels, dtype=torch.double), torch.tensor([1, 3])
    with torch.no_grad():
        assert_close(fast(x), net(x))
    assert_close(train_step(fast, x, target), train_step(net, x, target, holding_zeros=True))
    with torch.no_grad():
        assert_close(fast(x), net(x))
    dense = decompk.densify(fast)
    found = dense.state_dict()
    assert type(dense) is type(net) and found.keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        assert_close(found[name].double(), value.double(), 1e-9)
        if value.dim() > 1:
            assert bool((found[name][value == 0] == 0).all()), f"{name} did not stay zero"


def test_without_a_step_densify_gives_the_same_bits_back():
    net = composed("vgg16")
    found = decompk.densify(decompk.block_diagonal(net)).state_dict()
    for name, value in net.state_dict().items():
        assert torch.equal(found[name], value), name


def test_decisions_say_what_is_left_of_each_layer():
    fast = decompk.block_diagonal(composed("vgg16"))
    by_path = {decision.path: decision for decision in fast.decisions}
    assert by_path["features.0"].kept == 1 and by_path["features.2"].gain == 4
    first_fc = by_path["classifier.0"]  # 64 px end in a map of 2×2, of which a crop's window is 1
    assert first_fc.gain == 16 and "columns" in first_fc.reason
    table = fast.skipped((3, PIXELS, PIXELS))
    rows = {row[0]: row for row in table.rows}
    assert rows["features.2"][1] == 4 * rows["features.2"][2]
    assert all(row[1] == row[2] + row[3] for row in table.rows)
    assert rows["total"][1] == sum(row[1] for row in table.rows[:-1])


def masked_net():
    """Two members, of which one convolution has zeros of its own, and a convolution as the head."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 5, 1),
    )
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    net[3].weight.data[:4, 4:] = net[3].weight.data[4:, :4] = 0
    net[3].weight.data[0, :2] = 0
    return net


SCHEDULED = {name: lambda name=name: composed(name) for name in ("vgg16", "resnet8", "resnet50", "resnet18x2")}


@pytest.mark.parametrize("schedule", ["fused", "side by side"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*SCHEDULED, "masks"])
def test_members_compute_the_same_by_other_schedules(name, dtype, schedule):
    net = (masked_net if name == "masks" else SCHEDULED[name])()
    x = torch.randn(4, net[0].in_channels if name == "masks" else 3, PIXELS, PIXELS, dtype=torch.double)
    target = torch.arange(4)
    fast = decompk.block_diagonal(net).to(dtype)
    assert isinstance(fast, Members)
    with decompk.schedule(schedule):
        with torch.no_grad():
            assert_close(fast(x.to(dtype)), net(x), 1e-4 if dtype is torch.float32 else 1e-10)
        if dtype is torch.float32:  # in training rounding grows from layer to layer
            return
        assert_close(train_step(fast, x, target), train_step(net, x, target, holding_zeros=True))
        with torch.no_grad():
            assert_close(fast(x), net(x))


def test_members_that_share_the_bias_of_their_heads_do_not_run_apart():
    fast = decompk.block_diagonal(composed("resnet8"))
    x = torch.randn(2, 3, PIXELS, PIXELS, dtype=torch.double)
    for schedule in ("in turn", "on threads"):
        with decompk.schedule(schedule), pytest.raises(decompk.DecompkError, match="one for all members|one thread"):
            fast(x)


def test_modes_of_layers_and_frozen_parameters_stay_in_both_directions():
    c = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1))
    c = c.append(nn.Flatten()).append(nn.Linear(8, 5)).double()
    c[2].weight.data[:4, 4:] = c[2].weight.data[4:, :4] = 0
    c[1].eval()
    c[2].requires_grad_(False)
    fast, z = decompk.block_diagonal(c), torch.randn(3, 4, 9, 9, dtype=torch.float64)
    assert isinstance(fast, Members)
    torch.testing.assert_close(fast(z), c(z), rtol=0, atol=1e-12)
    dense = decompk.densify(fast)
    assert [m.training for m in dense.modules()] == [m.training for m in c.modules()]
    assert [p.requires_grad for p in dense.parameters()] == [p.requires_grad for p in c.parameters()]


def test_it_is_fused_saved_and_copied_like_any_packed_network():
    net = composed("resnet8").float()
    fast = decompk.block_diagonal(net)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = net(x)
        for other in (decompk.fuse(fast), copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            torch.testing.assert_close(other(x), wanted, rtol=1e-3, atol=1e-3)
    again = decompk.block_diagonal(composed("resnet8", num_classes=5).float())
    again.load_state_dict(fast.state_dict())
    assert decompk.block_diagonal(fast) is fast


# ---- layer by layer -------------------------------------------------------------------------------------------------


def test_one_block_between_members_is_kept_and_the_rest_still_skipped():
    net = composed("resnet8", width=32)
    layer = net.layers[1][0].conv2
    with torch.no_grad():
        layer.weight[:16, -16:] = torch.randn(16, 16, 3, 3)
    fast = decompk.block_diagonal(net)
    assert isinstance(fast, Layerwise) and "not zero between members" in fast.why_not_members
    kept = {decision.path: decision for decision in fast.decisions}
    assert 1 / 4 < kept["layers.1.0.conv2"].kept < 1 / 2 and kept["layers.1.0.conv1"].kept == 1 / 4
    x, target = torch.randn(2, 3, 16, 16, dtype=torch.double), torch.tensor([1, 3])
    with torch.no_grad():
        assert_close(fast(x), net(x))
    other = copy.deepcopy(net)
    swapped = [path for path, decision in kept.items() if decision.form == "blocks"]
    y = train_step(fast, x, target)
    assert_close(y, train_step(other, x, target, holding_zeros=True), 1e-9)
    mine, theirs = dict(fast.named_parameters()), dict(other.named_parameters())
    for path in swapped:
        assert_close(mine[f"{path}.weight"], theirs[f"{path}.weight"], 1e-9)


def test_layer_by_layer_shares_every_parameter_and_comes_back():
    net = composed("resnet8")
    with torch.no_grad():
        net.layers[0][0].conv1.weight[0, -1] = 1.0
    fast = decompk.block_diagonal(net)
    assert {id(p) for p in fast.parameters()} == {id(p) for p in net.parameters()}
    assert fast.state_dict().keys() == net.state_dict().keys()
    dense = decompk.densify(fast)
    assert type(dense) is type(net) and not any(isinstance(m, BlockConv2d) for m in dense.modules())
    assert {id(p) for p in dense.parameters()} == {id(p) for p in net.parameters()}
    x = torch.randn(1, 3, 32, 32, dtype=torch.double)
    with torch.no_grad():
        assert torch.equal(dense(x), net(x))


def test_a_dense_network_comes_back_unchanged_with_the_reason():
    net = models.build("resnet32", width=16).double().eval()
    fast = decompk.block_diagonal(net)
    assert {decision.form for decision in fast.decisions} == {"dense"}
    assert fast.why_not_members == "no layer falls into blocks"
    assert all("no zeros" in decision.reason and decision.gain == 1 for decision in fast.decisions)
    x = torch.randn(1, 3, 32, 32, dtype=torch.double)
    with torch.no_grad():
        assert torch.equal(fast(x), net(x))
    assert [type(m) for m in fast._inner.modules()] == [type(m) for m in net.modules()]


class Perceptron(nn.Sequential):
    """A network that decompose refuses, since a linear layer reads its input, with a permuted block-diagonal layer."""

    def __init__(self):
        super().__init__(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        blocks = torch.block_diag(*torch.randn(4, 16, 16))
        self.orders = torch.randperm(64), torch.randperm(64)
        with torch.no_grad():
            self[2].weight.copy_(blocks[self.orders[0]][:, self.orders[1]])


def test_blocks_are_found_under_a_permutation():
    torch.manual_seed(0)
    net = Perceptron().double()
    fast = decompk.block_diagonal(net)
    layer = fast._inner[2]
    assert isinstance(layer, BlockLinear) and layer.blocks.uniform == 4 and "permutation" in fast.decisions[1].reason
    x = torch.randn(7, 24, dtype=torch.double)
    assert_close(fast(x), net(x))
    before = net[2].weight.detach().clone()
    fast(x).square().sum().backward()
    grad = fast._inner[2].weight.grad
    assert bool((grad[before == 0] == 0).all()) and bool((grad[before != 0] != 0).any())
    assert_close(decompk.densify(fast)(x), net(x), 0)


@pytest.mark.parametrize("layer", ["conv", "linear"])
@pytest.mark.parametrize(
    ("outputs", "inputs", "shared"),
    [((35, 36), (31, 40), 0), ((35, 36), (31, 40), 6), ((24, 32, 40), (18, 40, 30), 3)],
    ids=["two", "two that share inputs", "three that share inputs"],
)
def test_blocks_of_uneven_size_are_filled_up_and_their_zeros_stay(layer, outputs, inputs, shared):
    torch.manual_seed(0)
    mask = torch.block_diag(*(torch.ones(o, i) for o, i in zip(outputs, inputs, strict=True)))
    mask = torch.cat([mask, torch.ones(len(mask), shared)], 1)
    mask = mask[torch.randperm(mask.shape[0])][:, torch.randperm(mask.shape[1])].double()
    O, C = mask.shape
    if layer == "conv":
        net, x, mask = nn.Conv2d(C, O, 3, padding=1), torch.randn(2, C, 6, 5), mask[..., None, None]
    else:
        net, x = nn.Linear(C, O), torch.randn(7, C)
    net, x = nn.Sequential(net).double(), x.double().requires_grad_()
    with torch.no_grad():
        net[0].weight.mul_(mask)
    fast = decompk.block_diagonal(net)
    blocks, kept = fast._inner[0].blocks, fast.decisions[0].kept
    assert blocks.uneven and "filled up" in fast.decisions[0].reason
    largest = max(outputs) * (max(inputs) + shared)
    assert kept == pytest.approx(len(outputs) * largest / (O * C)) and kept < 0.75
    y, expected = fast(x), net(x)
    assert_close(y, expected)
    weights, grad = [net[0].weight, net[0].bias], torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, [x, *weights], grad) for out in (y, expected))
    assert_close(ours[0], theirs[0])
    assert_close(ours[1], theirs[1] * mask)
    assert bool((ours[1][mask.expand_as(ours[1]) == 0] == 0).all())
    assert_close(ours[2], theirs[2])
    dense = decompk.densify(fast)
    assert type(dense[0]) is type(net[0]) and not dense[0]._buffers and torch.equal(dense(x), expected)


def test_what_a_layer_may_not_be_is_said():
    net = nn.Sequential(
        *(nn.Conv2d(32, 32, 3, groups=4), nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")),
        *(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3), nn.ConvTranspose2d(32, 32, 2)),
    )
    with torch.no_grad():
        for layer in list(net)[1:]:
            layer.weight[:16, 16:] = 0
            layer.weight[16:, :16] = 0
        net[2].weight[0, 20] = 1.0  # a block of one value is a block
        net[4].weight.fill_(1.0)[3, 5] = 0  # a zero that fills no block
    net[3].register_forward_hook(lambda *_: None)
    reasons = [decision.reason for decision in decompk.block_diagonal(net).decisions]
    for reason, word in zip(
        reasons, ("grouped", "reflect", "blocks hold", "hooks", "fill no block", "ConvTranspose2d"), strict=True
    ):
        assert word in reason, (reason, word)
    with pytest.raises(decompk.DecompkError, match="nn.Module"):
        decompk.block_diagonal([net])
    with pytest.raises(decompk.DecompkError, match="block_diagonal returned"):
        decompk.densify(net)


def test_components_and_blocks_of_odd_patterns():
    filled = torch.zeros(24, 40, dtype=torch.bool)
    rows, columns = components(filled)
    assert rows.tolist() == list(range(24)) and set(columns.tolist()) == {24}
    weight = torch.zeros(24, 40)
    weight[:8, 32:] = 1
    blocks = find_blocks(weight)
    assert blocks.kept <= 1 / 15 + 1e-9 and blocks.mask[0][-1] and sum(map(sum, blocks.mask)) == 1
    assert find_blocks(torch.ones(16, 16)) is None
    assert find_blocks(torch.full((16, 16), float("nan"))) is None  # a NaN is no zero


# ---- zeros stay -----------------------------------------------------------------------------------------------------


def blocks(layer, K):
    """The layer with a weight of K blocks on the diagonal."""
    with torch.no_grad():
        rows, columns = (torch.arange(n) * K // n for n in layer.weight.shape[:2])
        layer.weight *= (rows[:, None] == columns).view(*layer.weight.shape[:2], *(1,) * (layer.weight.dim() - 2))
    return layer


def stack(*layers, axes=2):
    """The layers with ReLUs between, then a mean over positions and a dense head."""
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[axes]
    inner = [part for layer in layers for part in (layer, nn.ReLU())]
    return nn.Sequential(*inner, pool(1), nn.Flatten(), nn.Linear(layers[-1].out_channels, 3))


def uneven():
    """Two blocks, of 6 and 26 channels, that decompose does not cut out."""
    layer = nn.Conv2d(32, 32, 3, padding=1)
    with torch.no_grad():
        layer.weight[:6, 6:] = 0
        layer.weight[6:, :6] = 0
    return layer


def chequered():
    """A layer that falls into blocks of 8, one of which holds a zero kernel of its own."""
    layer = nn.Conv2d(32, 32, 3, padding=1)
    with torch.no_grad():
        layer.weight[:8, 8:] = 0
        layer.weight[3, 5] = 0
    return layer


class Twice(nn.Module):
    """One layer at two places."""

    def __init__(self):
        super().__init__()
        self.first = blocks(nn.Conv2d(32, 32, 3, padding=1), 4)
        self.again = self.first
        self.head = blocks(nn.Linear(32, 32), 4)

    def forward(self, x):
        return self.head(self.again(self.first(x).relu()).mean((2, 3)))


class Tied(nn.Module):
    """One weight of two layers."""

    def __init__(self):
        super().__init__()
        self.one, self.two = blocks(nn.Linear(32, 32), 4), nn.Linear(32, 32)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x.mean((2, 3))).relu())


def conv(inputs=32, outputs=32, **how):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **how)


ZEROS = {
    "first layer": lambda: stack(blocks(conv(), 4), blocks(conv(), 4)),
    "last layer": lambda: nn.Sequential(*stack(conv(3), blocks(conv(), 4))[:-1], blocks(nn.Linear(32, 32), 4)),
    "only the last": lambda: nn.Sequential(*stack(conv(3))[:-1], blocks(nn.Linear(32, 8), 4)),
    "finer in one layer": lambda: stack(conv(3), blocks(conv(), 2), blocks(conv(), 2), blocks(conv(), 8)),
    "too small": lambda: stack(blocks(conv(8, 8), 4), blocks(conv(8, 8), 4)),
    "too few": lambda: stack(conv(3), uneven()),
    "within a block": lambda: stack(conv(3), chequered()),
    "grouped": lambda: stack(conv(3), blocks(nn.Conv2d(32, 32, 3, groups=2), 2), blocks(conv(), 4)),
    "all grouped": lambda: stack(blocks(nn.Conv2d(32, 32, 3, groups=4), 4), blocks(nn.Conv2d(32, 32, 1, groups=4), 2)),
    "transposed": lambda: stack(conv(3), blocks(conv(), 4), blocks(nn.ConvTranspose2d(32, 32, 2), 4)),
    "transposed first": lambda: stack(blocks(nn.ConvTranspose2d(32, 32, 2), 4), blocks(conv(), 4)),
    "1-D": lambda: stack(blocks(nn.Conv1d(32, 32, 3), 4), blocks(nn.Conv1d(32, 32, 3), 4), axes=1),
    "3-D": lambda: stack(blocks(nn.Conv3d(32, 32, 2), 4), blocks(nn.Conv3d(32, 32, 2), 4), axes=3),
    "linear": lambda: nn.Sequential(nn.Flatten(), *(blocks(nn.Linear(32 * 8**2, 32), 4), blocks(nn.Linear(32, 32), 4))),
    "padded by reflection": lambda: stack(conv(3), blocks(conv(padding_mode="reflect"), 4), blocks(conv(), 4)),
    "shared": Twice,
    "tied": Tied,
}


def trained(net, optimizer):
    """The network block-diagonal, after two steps, and where it held zeros."""
    weights = {name: p.detach().clone() for name, p in net.named_parameters() if p.dim() > 1}
    fast = decompk.block_diagonal(net).train()
    first = next(iter(net.parameters()))
    axes = 2 if isinstance(next(net.children()), nn.Flatten) else max(2, first.dim() - 2) if first.dim() != 3 else 1
    channels = getattr(next(iter(net.children())), "in_channels", 32)
    moved = optimizer(fast.parameters())
    for t in range(2):
        moved.zero_grad()
        fast(
            torch.randn(4, channels, *[8] * axes, generator=torch.Generator().manual_seed(t))
        ).square().sum().backward()
        moved.step()
    return fast, {name: weight == 0 for name, weight in weights.items()}, weights


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
@pytest.mark.parametrize("name", ZEROS)
def test_zeros_between_channels_stay_wherever_they_are(name, optimizer):
    torch.manual_seed(0)
    net = ZEROS[name]()
    fast, zeros, before = trained(net, optimizer)
    dense = dict(decompk.densify(fast).named_parameters())
    assert sum(int(z.sum()) for z in zeros.values())
    for path, zero in zeros.items():
        assert not bool(dense[path][zero].any()), (path, [str(d) for d in fast.decisions])
        assert (dense[path] != before[path])[~zero].float().mean() > 0.9, f"{path} does not train"
    assert not any("does not keep" in d.reason for d in fast.decisions)
    assert not any(m._buffers.get("_holds") is not None for m in decompk.densify(fast).modules())


@pytest.mark.parametrize("name", ["first layer", "within a block", "transposed", "finer in one layer"])
def test_what_is_kept_at_zero_trains_as_the_dense_network_with_its_gradients_masked(name):
    torch.manual_seed(0)
    net = ZEROS[name]().double()
    other, fast = copy.deepcopy(net), decompk.block_diagonal(net)
    x = torch.randn(4, net[0].in_channels, 8, 8, dtype=torch.double)
    for model in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast), fast):
        assert_close(model(x), other(x))
    target = torch.tensor([0, 1, 2, 0])
    for _ in range(2):
        assert_close(train_step(fast, x, target), train_step(other, x, target, holding_zeros=True), 1e-9)
    dense = decompk.densify(fast)
    for name, p in other.named_parameters():
        assert_close(dense.get_parameter(name), p, 1e-9)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(32, 32, padding_idx=0), nn.GRU(32, 32, batch_first=True)
        self.head = blocks(nn.Linear(32, 32), 4)
        with torch.no_grad():
            self.rnn.weight_hh_l0[:, 16:] = 0

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0])


def test_what_does_not_keep_its_zeros_says_so():
    class Own(nn.Linear):
        pass

    torch.manual_seed(0)
    tied = nn.ModuleList([nn.Embedding(32, 32), blocks(nn.Linear(32, 32), 4)])
    tied[0].weight = tied[1].weight
    hollow = nn.Sequential(conv(3), conv())
    with torch.no_grad():
        hollow[1].weight[:, :, 1, 1] = 0
    for net, path, words in (
        (
            nn.Sequential(nn.Linear(4, 32), blocks(Own(32, 32), 4)),
            "1",
            "no zero-skipping form of Own; training does not",
        ),
        (Recurrent(), "rnn", "training does not keep the zeros of its weight_hh_l0"),
        (tied, "1", "'0.weight' is the same tensor, and training does not keep the zeros of its weight"),
        (hollow, "1", "training does not keep the zeros of its weight"),
        (nn.Sequential(nn.Linear(4, 8), nn.utils.spectral_norm(blocks(nn.Linear(8, 8), 2))), "1", "weight_orig"),
    ):
        decisions = {d.path: d for d in decompk.block_diagonal(net).decisions}
        assert words in decisions[path].reason, (words, *map(str, decisions.values()))
        assert "embed" not in decisions and len(decisions) <= 3


def test_loading_and_writing_leave_the_zeros_kept():
    torch.manual_seed(0)
    fast = decompk.block_diagonal(ZEROS["too few"]())
    layer, x = fast._inner[2], torch.randn(2, 3, 8, 8)
    fast.load_state_dict({name: torch.randn_like(t) for name, t in fast.state_dict().items()})
    assert not layer.weight[:6, 6:].any() and layer.weight[:6, :6].all()
    with torch.no_grad():
        layer.weight.mul_(2.0)
        inference = fast(x)
    assert torch.allclose(fast(x), inference) and torch.allclose(decompk.densify(fast)(x), inference)


def test_a_few_zeros_by_chance_are_left_to_train():
    net = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
    with torch.no_grad():
        net[0].weight[3, 5] = net[2].weight[1, 1] = 0
    fast = decompk.block_diagonal(net)
    assert [d.form for d in fast.decisions] == ["dense", "dense"]
    assert [type(m) for m in fast._inner] == [type(m) for m in net]


def test_the_members_of_a_block_diagonal_network_add_up_to_it():
    net = composed("resnet8")
    fast, x = decompk.block_diagonal(net), torch.randn(2, 3, 32, 32, dtype=torch.double)
    with torch.no_grad():
        assert_close(sum(member(x) for member in fast.unpack()), net(x))
