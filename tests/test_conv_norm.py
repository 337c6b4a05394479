"""A convolution and its batch norm as one operator each way: right, in few launches, and only where it is its turn."""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from helpers import assert_pools_as_torch, assert_right
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import decompk
from decompk.kernels.device import interpreted
from decompk.kernels.launch import recording
from decompk.ops import conv_norm as operator
from decompk.packed.fuse import Fused
from decompk.packed.fused_pool import run_pool

sys.path[:0] = [str(Path(__file__).parents[1] / "tools")]

from launched import rows_of  # noqa: E402 (a tool)

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
K, N = 2, 3


class Basic(nn.Module):
    """Two 3×3 convolutions with a shortcut, projected where it has to be."""

    def __init__(self, c_in, c_out, stride=1, bias=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=bias), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=bias), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Identity()
        if c_in != c_out or stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1; its shortcut is subsampled by a max-pool of single pixels."""

    def __init__(self, c, width, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, c, 1, bias=False), nn.BatchNorm2d(c, affine=False)
        self.shortcut = nn.MaxPool2d(1, stride)

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class Head(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, 5)

    def forward(self, x):
        return self.fc(self.pool(x).flatten(1))


def stem(channels, *pool):
    return nn.Conv2d(3, channels, 3, 1, 1, bias=True), nn.BatchNorm2d(channels), nn.ReLU(inplace=True), *pool


NETS = {
    "basic": lambda: nn.Sequential(*stem(8), Basic(8, 8), Basic(8, 16, 2, bias=True), Head(16)),
    "bottleneck": lambda: nn.Sequential(
        *stem(8, nn.MaxPool2d(3, 2, 1)), Bottleneck(8, 8), Bottleneck(8, 8, 2), Head(8)
    ),
    "odd channels": lambda: nn.Sequential(*stem(5), Basic(5, 7, 2), Head(7)),
    "vgg": lambda: nn.Sequential(*stem(8), *(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)), nn.MaxPool2d(2), Head(8)),
}


def members_of(make):
    """K members whose norms do something."""
    members = []
    for seed in range(K):
        torch.manual_seed(seed)
        members.append(make())
        for module in members[-1].modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
    return members


def packed_of(make, **options):
    return decompk.pack([copy.deepcopy(member) for member in members_of(make)], rehearse=False, **options).train()


def loss(y):
    """Of which a norm leaves something: the sum of its squares is a constant."""
    y = y if y.dtype == torch.float64 else y.float()
    return (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape) + y**3 / 9).sum()


def step(net, x):
    """Output, and gradients and buffers by name."""
    y = net(x)
    loss(y).backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return {"output": y.detach(), **gradients, **{name: b.clone() for name, b in net.named_buffers()}}


def assert_all_right(found, wanted, theirs):
    """The 2× rule for all gradients as one vector, for the output and for statistics; what is whole is equal.

    A single gradient may be what is left where larger ones cancel; it is held to ten times the floor of the rule.
    """
    for key, value in wanted.items():
        if value is not None and not value.is_floating_point():
            assert torch.equal(found[key], value), key
    alike = [key for key, value in wanted.items() if value is not None and value.is_floating_point()]
    for kind in (
        ["output"],
        [key for key in alike if "running" in key],
        [key for key in alike if "running" not in key],
    ):
        vectors = [torch.cat([one[key].flatten().double() for key in kind]) for one in (found, wanted, theirs)]
        assert_right(*vectors, kind[0])
    for key in alike:
        error, size = (found[key].double() - wanted[key]).norm(), wanted[key].norm()
        assert error <= 2 * (theirs[key].double() - wanted[key]).norm() + 1e-5 * size + 1e-12, key


def on_kernels(net, x):
    with decompk.backend("triton"):
        return step(net, x)


@pytest.mark.parametrize("name", NETS)
def test_a_step_errs_at_most_twice_as_much_as_the_layers_alone(name):
    packed, x = packed_of(NETS[name]), torch.randn(2, 3, 5, 4) + 3
    fused = decompk.fuse(packed_of(NETS[name]))
    wanted = step(packed_of(NETS[name]).double(), x.double())
    theirs, found = step(packed, x), on_kernels(fused, x)
    assert_all_right(found, wanted, theirs)
    biases = [key for key in found if key == "0.bias" or ("conv" in key and key.endswith("bias"))]
    assert all(found[key].abs().max() == 0 for key in biases)  # by algebra


def test_weights_in_half_precision_get_gradients_of_it():
    x = torch.randn(2, 3, 4, 4)
    wanted = step(packed_of(NETS["odd channels"]).double(), x.double())
    theirs = step(packed_of(NETS["odd channels"]).half(), x.half())
    found = on_kernels(decompk.fuse(packed_of(NETS["odd channels"]).half()), x.half())
    assert all(value.dtype == torch.float16 for key, value in found.items() if "tracked" not in key)
    assert_all_right(found, wanted, theirs)


# ---- launches -------------------------------------------------------------------------------------------------------


def launched(net, x):
    """The names of a step's kernels, forward and backward; nothing is computed."""
    with decompk.backend("triton"), recording() as launches, torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        forward = len(launches)
        y.float().sum().backward()
    names = [one.kernel.__name__ for one in launches]
    return names[:forward], names[forward:]


def test_a_layer_is_three_launches_forward_and_four_back():
    body = nn.Sequential(*stem(16), *(Basic(16, 16) for _ in range(2)))
    fused = decompk.fuse(decompk.pack([copy.deepcopy(body) for _ in range(K)], rehearse=False)).train()
    forward, backward = launched(fused, torch.randn(N, 3, 8, 8))
    assert len(forward) == 5 * 3
    # The first reads the image; the sums of the last one's own gradient are nobody's to take.
    assert len(backward) <= 5 * 4 - 1 + 1 + sum("fold" in name for name in backward)
    assert backward.count("backward_sums_kernel") == 1


def test_a_step_under_autocast_casts_copies_and_clears_no_weight():
    body = nn.Sequential(*stem(16), Basic(16, 16), Basic(16, 32, 2))
    fused = decompk.fuse(decompk.pack([copy.deepcopy(body) for _ in range(K)], rehearse=False)).train()
    x = torch.randn(K * N, 3, 8, 8).contiguous(memory_format=torch.channels_last)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            y = fused(x.view(K, N, 3, 8, 8))
        y.backward(torch.ones_like(y))

    with decompk.backend("triton"):
        rows = [row.name for row in rows_of(run) if not row.name.endswith(("kernel", "_band", "_tile", "_pointer"))]
    assert rows.count("_to_copy") <= 1 and set(rows) <= {"_to_copy", "ones_like", "clone"}  # the image is cast


# ---- what the layer above hands down --------------------------------------------------------------------------------


@pytest.fixture
def two_layers():
    torch.manual_seed(1)
    make = lambda: nn.Sequential(*stem(4), nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU())  # noqa: E731
    return packed_of(make), decompk.fuse(packed_of(make)), torch.randn(2, 3, 4, 4)


def gradients(net, run):
    net.zero_grad()
    with decompk.backend("triton") if isinstance(net, Fused) else nullcontext():
        run(net)
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def hold_alike(two_layers, run):
    packed, fused, _ = two_layers
    wanted, found = gradients(packed, run), gradients(fused, run)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=3e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_sums_are_taken_by_the_layer_above(two_layers, monkeypatch):
    _, fused, x = two_layers
    seen = []
    is_of = operator._Above.is_of
    monkeypatch.setattr(operator._Above, "is_of", lambda *a: seen.append(is_of(*a)) or seen[-1])
    gradients(fused, lambda net: net(x).sum().backward())
    assert seen == [True]


def test_a_second_backward_and_one_of_some_parameters_alone(two_layers):
    *_, x = two_layers

    def twice(net):
        value = loss(net(x))
        value.backward(retain_graph=True)
        value.backward()

    def upper_alone(net):
        value = loss(net(x))
        upper = [p for name, p in net.named_parameters() if name.startswith(("3", "4"))]
        torch.autograd.grad(value, upper, retain_graph=True)
        value.backward()

    hold_alike(two_layers, twice)
    hold_alike(two_layers, upper_alone)


def test_gradients_that_hooks_change_on_the_way_are_summed_anew(two_layers):
    packed, fused, x = two_layers

    def between(net):
        y = net(x)
        node = y.grad_fn
        while node is not None and not (type(node).__name__ == "_ConvNormBackward" and node.next_functions[0][0]):
            node = node.next_functions[0][0]
        below = node.next_functions[0][0]
        below.register_prehook(lambda grads: tuple(None if g is None else 2 * g for g in grads))
        loss(y).backward()

    found = gradients(fused, between)
    plain = gradients(fused, lambda net: loss(net(x)).backward())
    for name in found:
        scale = 2 if name.startswith(("0", "1")) else 1
        torch.testing.assert_close(found[name], scale * plain[name], rtol=1e-4, atol=1e-5)


def test_a_gradient_is_differentiated_again(two_layers):
    *_, x = two_layers

    def penalty(net):
        image = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(loss(net(image)), image, create_graph=True)
        dx.square().sum().backward()

    hold_alike(two_layers, penalty)


def test_what_is_saved_may_be_offloaded_or_computed_again(two_layers):
    *_, x = two_layers

    def offloaded(net):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy):
            y = net(x)
        loss(y).backward()

    def again(net):
        y = torch.utils.checkpoint.checkpoint(net, x.requires_grad_(), use_reentrant=False)
        loss(y).backward()

    hold_alike(two_layers, offloaded)
    before = {name: b.clone() for name, b in two_layers[1].named_buffers() if "tracked" in name}
    hold_alike(two_layers, again)
    after = dict(two_layers[1].named_buffers())
    assert all(torch.equal(after[name], count + 2) for name, count in before.items())  # as torch's own are


def test_flops_are_those_of_the_layers(two_layers):
    packed, fused, x = two_layers
    totals = []
    for net in (packed, fused):
        with decompk.backend("triton"):
            y = net(x)
            with FlopCounterMode(display=False) as counter:
                y.sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_sums_are_the_same_from_run_to_run_where_that_is_asked_for(two_layers):
    _, fused, x = two_layers
    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradients(fused, lambda net: loss(net(x)).backward()) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_nothing_reads_memory_that_nobody_wrote(two_layers, monkeypatch):
    _, fused, x = two_layers

    def poisoned(make):
        def run(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() and t.device.type == "cpu" else t

        return run

    wanted = gradients(fused, lambda net: loss(net(x)).backward())
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    found = gradients(fused, lambda net: loss(net(x)).backward())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


# ---- who reads an activation ----------------------------------------------------------------------------------------


class Readers(nn.Module):
    """An activation that several layers read, in an order to choose."""

    def __init__(self, *order):
        super().__init__()
        self.order = order
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.plain, self.pool = nn.Conv2d(8, 8, 1), nn.MaxPool2d(3, 1, 1)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        reads = {
            "conv1": lambda: F.relu(self.bn1(self.conv1(x)) + x),
            "conv2": lambda: self.bn2(self.conv2(x)),
            "plain": lambda: self.plain(x),
            "pool": lambda: self.pool(x),
            "sine": lambda: x.sin(),
            "itself": lambda: x,
        }
        return torch.cat([reads[name]() for name in self.order], 1)


@pytest.mark.parametrize(
    "order",
    [
        ("conv2", "conv1", "plain"),
        ("plain", "conv2", "pool"),
        ("conv2", "pool", "plain", "conv1"),
        ("conv2", "sine"),
        ("itself", "conv2"),
    ],
    ids="-".join,
)
def test_all_who_read_an_activation_have_their_gradient_in_its(order):
    x = torch.randn(2, 3, 5, 4)
    make = lambda: Readers(*order)  # noqa: E731
    wanted = step(packed_of(make).double(), x.double())
    theirs, found = step(packed_of(make), x), on_kernels(decompk.fuse(packed_of(make)), x)
    assert_all_right(found, wanted, theirs)


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2),
        nn.MaxPool2d(1, 2),
        nn.MaxPool2d((3, 2), (1, 2), (1, 0)),
        nn.MaxPool2d(2, 3),
    ],
    ids=str,
)
def test_pools_give_torchs_values_and_gradients(pool):
    with decompk.backend("triton"):
        assert_pools_as_torch(pool, 5)


@pytest.mark.parametrize("reader", ["plain", "pool", "conv2"])
def test_whoever_looks_at_an_activation_sees_all_of_its_gradient(reader):
    x, packed = torch.randn(2, 3, 5, 4), packed_of(lambda: Readers("conv2", "plain", "pool"))
    seen = []

    def look(net):
        def note(module, inputs):
            inputs[0].register_hook(lambda g: seen.append(g.clone()) or g / g.norm())

        net._inner.get_submodule(reader).register_forward_pre_hook(note)
        loss(net(x)).backward()
        return seen.pop(), {name: p.grad for name, p in net.named_parameters()}

    wanted = look(packed)
    with decompk.backend("triton"):
        found = look(decompk.fuse(packed_of(lambda: Readers("conv2", "plain", "pool"))))
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-3, atol=1e-4)
    for name in ("stem.weight", "bn.weight", "bn.bias"):
        torch.testing.assert_close(found[1][name], wanted[1][name], rtol=1e-3, atol=1e-4)


def test_an_activation_that_the_network_returns_has_all_its_gradients():
    class Features(Readers):
        def forward(self, x):
            z = F.relu(self.bn(self.stem(x)))
            return z, self.bn2(self.conv2(z))

    x, found = torch.randn(2, 3, 5, 4), []
    for net in (packed_of(Features), decompk.fuse(packed_of(Features))):
        with decompk.backend("triton"):
            z, y = net(x)
            found.append(torch.autograd.grad(loss(y) + loss(z), net._inner.stem.weight)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_what_needs_no_gradient_is_passed_on_without_one():
    net = packed_of(lambda: Readers("conv2", "plain"))
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith(("conv2", "bn2")))
    fused, plain = decompk.fuse(net), []
    fused._inner.plain.register_forward_hook(lambda module, inputs, out: plain.append(out.requires_grad))
    with decompk.backend("triton"):
        fused(torch.randn(2, 3, 5, 4))
    assert plain == [False]


@pytest.mark.parametrize("arguments", [(2, 2, -1), (0, 1), (2, 0), (2.0,), (2, 2, 2)], ids=str)
def test_pools_that_torch_refuses_are_refused_as_torch_does(arguments):
    pool, x = nn.MaxPool2d(*arguments), torch.randn(4, 3, 6, 6)
    with pytest.raises(Exception) as theirs:  # noqa: B017 (whatever torch raises)
        pool(x)
    with pytest.raises(theirs.type, match=str(theirs.value).split("(")[0][:30]), decompk.backend("triton"):
        run_pool(x, pool)


def test_a_pool_may_be_given_tuples_of_one():
    x = torch.randn(4, 3, 6, 6)
    with decompk.backend("triton"):
        torch.testing.assert_close(run_pool(x, nn.MaxPool2d((3,), (2,), (1,))), nn.MaxPool2d(3, 2, 1)(x))


def test_a_linear_layer_of_another_dtype_is_refused_as_by_torch():
    layer = decompk.pack([nn.Sequential(nn.Linear(4, 3)) for _ in range(K)], rehearse=False)._inner[0]
    with decompk.backend("triton"), pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(K * N, 4, dtype=torch.float16))


@pytest.mark.parametrize("training", [True, False])
def test_weights_of_another_dtype_are_refused_where_no_autocast_casts(training):
    packed = decompk.pack([nn.Sequential(*stem(4)) for _ in range(K)], rehearse=False).train(training)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float16)
    sentences = []
    for net in (packed, decompk.fuse(packed)):
        with decompk.backend("triton"), torch.no_grad(), pytest.raises(decompk.DecompkError) as refused:
            net(x)
        sentences.append(str(refused.value))
    assert "one floating dtype" in sentences[0] and sentences[0] == sentences[1]


def test_operators_refuse_weights_of_another_dtype():
    x, weight = torch.randn(K, 2, 3, 4, 4, dtype=torch.float16), torch.randn(K, 4, 3, 3, 3)
    with decompk.backend("triton"), pytest.raises(decompk.DecompkError, match="one floating dtype"):
        decompk.ops.fused_conv2d(x, weight)


@pytest.mark.parametrize(("stride", "size"), [(1, 4), (2, 1)])
def test_a_pool_of_single_pixels_gives_memory_of_its_own(stride, size):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.shortcut = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.MaxPool2d(1, stride)

        def forward(self, x):
            z = torch.sigmoid(self.norm(self.conv(x)))
            short = self.shortcut(z)
            short *= 3
            return short + z[..., ::stride, ::stride]

    member, x = Block(), torch.randn(N, 3, size, size)
    fused = decompk.fuse(decompk.pack([copy.deepcopy(member) for _ in range(K)]))
    with decompk.backend("triton"):
        found = fused(x)
        found.sum().backward()
    expected = member(x)
    expected.sum().backward()
    assert torch.allclose(found[1], expected, atol=1e-5)
    assert torch.allclose(fused.get_parameter("conv.weight").grad[1], member.conv.weight.grad, atol=1e-5)


def test_a_hook_may_write_into_the_gradient_below_a_mean():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def double(module, inputs, output):
        output.register_hook(lambda grad: (grad.mul_(2), None)[1])

    alone, fused = net(), decompk.fuse(decompk.pack([net() for _ in range(K)]))
    alone[1].register_forward_hook(double)
    fused._inner[1].register_forward_hook(double)
    x = torch.randn(N, 3, 6, 6)
    alone(x).square().sum().backward()
    with decompk.backend("triton"):
        fused(x).square().sum().backward()
    assert torch.allclose(fused.get_parameter("1.weight").grad[1], alone[1].weight.grad, rtol=1e-4, atol=1e-5)


def test_what_no_gradient_reads_may_change_before_the_backward():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))

    alone, fused = net(), decompk.fuse(decompk.pack([net() for _ in range(K)]))
    first = decompk.pack([nn.Linear(3, 2) for _ in range(K)])
    x = torch.randn(N, 3, 4, 4)
    with decompk.backend("triton"):
        losses = [net(x).square().sum() for net in (alone, fused)]
        rows = first(torch.randn(N, 3)).sum()
        with torch.no_grad():
            for one in (alone, fused):
                one.get_parameter("0.bias").add_(0.1)
                one.get_parameter("3.bias").add_(0.1)
            first.get_parameter("weight").add_(0.1)
        for loss in (*losses, rows):
            loss.backward()
    assert torch.allclose(fused.get_parameter("0.weight").grad[1], alone[0].weight.grad, rtol=1e-4, atol=1e-5)
