"""Derivatives of every kind, torch.func, export and compilers: what the members alone give, or nothing at all."""

import contextlib
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
import torch.utils.checkpoint
from helpers import leaves
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

import decompk
from decompk import ops
from decompk.crops import Crop
from decompk.kernels.device import interpreted

K, N = 3, 4
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-10}


class Convolutions(nn.Module):
    """Convolution, batch norm, residual, ReLU in place and not, a strided 1×1 shortcut, pooling, linear head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.shortcut, self.norm3 = nn.Conv2d(8, 4, 1, stride=2), nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = F.relu(self.norm2(self.conv(x)) + x)
        x = torch.tanh(self.norm3(self.shortcut(x)))
        return self.head(x.square().mean((2, 3)))


class Groups(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, groups=3, padding="same"),
            nn.GroupNorm(3, 12),
            nn.Softplus(),
            nn.ConvTranspose2d(12, 4, 2, stride=2),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.InstanceNorm2d(4, affine=True),
            nn.Conv2d(4, 4, 3, dilation=2, padding=1, padding_mode="reflect"),
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x).square().mean((2, 3)))


class Lines(nn.Module):
    """1-D convolution and batch norm over time."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.conv(x.flatten(2)))).square().mean(2))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.GRU, **options):
        super().__init__()
        self.layer = kind(3, 5, batch_first=True, **options)
        self.head = nn.LazyLinear(2)
        self(torch.zeros(1, 3, 2, 2))

    def forward(self, x):
        y, last = self.layer(x[..., ::3, ::2].flatten(2).transpose(1, 2))  # six steps
        last = last[1] if isinstance(last, tuple) else last
        return self.head(torch.cat([y.mean(1), last[0]], 1))


NETS = {
    "convolutions": Convolutions,
    "groups, transposed": Groups,
    "1-D": Lines,
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 2)),
    "GRU": partial(Recurrent, nn.GRU, bidirectional=True),
    "LSTM": partial(Recurrent, nn.LSTM, num_layers=2),
    "RNN": partial(Recurrent, nn.RNN, nonlinearity="relu", bias=False),
}
WAYS = {"packed": lambda packed: packed, "fused": decompk.fuse}
FUSED = [("convolutions", "fused")]
CASES = [(net, "packed") for net in NETS] + FUSED


class Case:
    """Members, the same packed or fused, and inputs of them all; sums over members make one number of both."""

    def __init__(self, net, way, dtype, training):
        self.dtype = dtype
        self.members = [self._trained(NETS[net]()).to(dtype).train(training) for _ in range(K)]
        self.packed = WAYS[way](decompk.pack(self.members, input_dims=4)).train(training)
        self.x = torch.randn(K, N, 3, 6, 6, dtype=dtype)

    @staticmethod
    def _trained(net):
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
        for name, buffer in net.named_buffers():
            if name.endswith("running_var"):
                buffer += torch.rand_like(buffer)
            elif name.endswith("running_mean"):
                buffer += torch.randn_like(buffer)
        return net

    def alone(self, of_member):
        """Members' results stacked, dictionaries of them by name."""
        with without_onednn():
            return stacked([of_member(member, self.x[k]) for k, member in enumerate(self.members)])

    def same(self, found, reference):
        same(found, reference, self.dtype)


def same(found, reference, dtype):
    """Equal up to rounding, of which what cancels to zero has as much as its fellows."""
    found, reference = leaves(found), leaves(reference)
    assert len(found) == len(reference)
    scale = max(1.0, *(t.abs().max().item() for t in reference), 0.0)
    for one, other in zip(found, reference, strict=True):
        assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


def stacked(results):
    first = results[0]
    if isinstance(first, dict):
        return {name: stacked([r[name] for r in results]) for name in first}
    if isinstance(first, tuple):
        return tuple(stacked(list(parts)) for parts in zip(*results, strict=True))
    return torch.stack(results)


def pure(net):
    """The network as a function of parameters and input, with buffers of its own each time; and its parameters."""

    def function(parameters, x):
        buffers = {name: buffer.detach().clone() for name, buffer in net.named_buffers()}
        return functional_call(net, (parameters, buffers), (x,))

    return function, {name: p.detach().clone() for name, p in net.named_parameters()}


@contextlib.contextmanager
def without_onednn():
    """Members alone: oneDNN's LSTM has a first derivative only."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["train", "eval"])
def training(request):
    return request.param


@pytest.fixture(params=CASES, ids=[" ".join(case) for case in CASES])
def case(request, dtype, training):
    return Case(*request.param, dtype, training)


def loss(outputs):
    return outputs.sin().sum() + outputs.square().sum()


def test_functional_gradients_are_those_of_the_members_alone(case):
    def gradients(net, x):
        function, parameters = pure(net)
        outputs, pull = vjp(lambda x: function(parameters, x), x)
        by_call = grad(lambda p, x: loss(function(p, x)), argnums=(0, 1))(parameters, x)
        return *by_call, outputs, pull(torch.ones_like(outputs))[0]

    case.same(gradients(case.packed, case.x), case.alone(gradients))


@pytest.mark.parametrize("of_x, of_parameters", [(True, False), (False, True), (True, True)])
def test_forward_mode_carries_the_tangents_of_inputs_and_parameters(case, of_x, of_parameters):
    def tangent(net, x):
        function, parameters = pure(net)
        return jvp(
            function, (parameters, x), ({n: p.cos() * of_parameters for n, p in parameters.items()}, x.cos() * of_x)
        )

    reference = case.alone(tangent)
    assert reference[1].abs().max() > 1e-4
    case.same(tangent(case.packed, case.x), reference)


def test_dual_numbers_pass(case):
    def tangent(net, x):
        with forward_ad.dual_level(), torch.no_grad():
            return forward_ad.unpack_dual(net(forward_ad.make_dual(x, x.cos()))).tangent

    case.same(tangent(case.packed, case.x), case.alone(tangent))


def test_the_gradient_of_a_gradient_penalty_is_that_of_the_members_alone(case):
    def penalty(net, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        ((slope.flatten(-3).norm(dim=-1) - 1) ** 2).sum().backward()
        own = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}
        return {"slope": slope.detach(), "x": x.grad, **own}

    case.same(penalty(case.packed, case.x), case.alone(penalty))


def test_second_derivatives_in_the_parameters_are_those_of_the_members_alone(case):
    def twice(net, x):
        parameters = dict(net.named_parameters())
        first = torch.autograd.grad(loss(net(x)), list(parameters.values()), create_graph=True)
        second = sum(g.square().sum() for g in first)
        return dict(zip(parameters, torch.autograd.grad(second, list(parameters.values())), strict=True))

    case.same(twice(case.packed, case.x), case.alone(twice))


EVAL = pytest.mark.parametrize("training", [False], ids=["eval"])


@EVAL
def test_gradients_of_every_sample_come_from_vmap(case):
    function, parameters = pure(case.packed)
    of_one = grad(lambda p, x: loss(function(p, x.unsqueeze(1))))
    found = vmap(of_one, (None, 1))(parameters, case.x)

    def one_by_one(net, x):
        function, parameters = pure(net)
        return stacked([grad(lambda p, x=one: loss(function(p, x)))(parameters) for one in x.split(1)])

    case.same({name: g.transpose(0, 1) for name, g in found.items()}, case.alone(one_by_one))


@EVAL
def test_a_batch_of_batches_goes_through_vmap(case):
    x = torch.stack([case.x, case.x.cos()])
    with torch.no_grad():
        case.same(vmap(case.packed)(x), torch.stack([case.packed(one) for one in x]))


@pytest.mark.parametrize("dtype", [torch.float64], ids=["float64"])
def test_jacobians_and_hessians_are_those_of_the_members_alone(case):
    case.x = case.x[:, :2]
    last = list(dict(case.packed.named_parameters()))[-1]

    def functions(net, x):
        function, parameters = pure(net)
        of_bias = lambda bias: loss(function({**parameters, last: bias}, x))  # noqa: E731
        return partial(function, parameters), of_bias, parameters[last]

    outputs, of_bias, bias = functions(case.packed, case.x)
    jacobians = [
        jacrev(outputs)(case.x),
        jacfwd(outputs)(case.x),
        torch.autograd.functional.jacobian(outputs, case.x, vectorize=True),
        torch.autograd.functional.jacobian(outputs, case.x, vectorize=True, strategy="forward-mode"),
    ]
    hessians = [hessian(of_bias)(bias), torch.autograd.functional.hessian(of_bias, bias, vectorize=True)]
    for k, member in enumerate(case.members):
        outputs, of_bias, bias = functions(member, case.x[k])
        own = torch.autograd.functional.jacobian(outputs, case.x[k]), torch.autograd.functional.hessian(of_bias, bias)
        for found in jacobians:
            case.same(found[k, :, :, k], own[0])
            assert not found[k, :, :, k - 1].any()
        for found in hessians:
            case.same(found[k, ..., k, :] if own[1].dim() == 2 else found[k], own[1])


# ---- the operators alone --------------------------------------------------------------------------------------------

BACKENDS = ["any", "torch", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return contextlib.nullcontext if request.param == "any" else partial(decompk.backend, request.param)


def convolved(x, weight, bias, stride=1, padding=1, dilation=1):
    members = zip(x, weight, [None] * len(x) if bias is None else bias, strict=True)
    return torch.stack([F.conv2d(*member, stride, padding, dilation) for member in members])


def normalised(x, weight, bias, residual, mean=None, var=None):
    K = len(x)
    running = zip([None] * K if mean is None else mean, [None] * K if var is None else var, strict=True)
    parts = zip(x, running, weight, bias, strict=True)
    y = torch.stack([F.batch_norm(x, m, v, w, b, m is None) for x, (m, v), w, b in parts])
    return torch.relu(y + residual)


def cut_out(image):
    return torch.stack([crop.cut(image) for crop in CROPS])


CROPS = (Crop(0, 0, 5, 5), Crop(1, 2, 5, 5))
MEAN, VAR = torch.linspace(-1, 1, 8).view(2, 4), torch.linspace(0.5, 2, 8).view(2, 4)
MASK = "10/11"


def blocks(weight):
    keep = torch.ones_like(weight)
    keep[:4, 4:] = 0
    return weight * keep


# name: (ours, reference, shapes of the arguments)
OPERATORS = {
    "grouped_conv2d": (
        lambda x, w, b: ops.grouped_conv2d(x, w, b, padding=1),
        convolved,
        ((2, 2, 4, 5, 5), (2, 4, 4, 3, 3), (2, 4)),
    ),
    "grouped_conv2d, strided 1×1": (
        lambda x, w: ops.grouped_conv2d(x, w, None, 2),
        lambda x, w: convolved(x, w, None, 2, 0),
        ((2, 2, 4, 5, 5), (2, 4, 4, 1, 1)),
    ),
    "grouped_conv2d, same": (
        lambda x, w: ops.grouped_conv2d(x, w, padding="same", dilation=2),
        lambda x, w: convolved(x, w, None, 1, "same", 2),
        ((2, 2, 4, 5, 5), (2, 3, 4, 2, 3)),
    ),
    "conv2d": (
        lambda x, w, b: ops.conv2d(x, w, b, 2, 1, groups=2),
        lambda x, w, b: F.conv2d(x, w, b, 2, 1, groups=2),
        ((2, 8, 5, 5), (8, 4, 3, 3), (8,)),
    ),
    "batch_norm": (
        lambda *t: ops.batch_norm(*t[:3], residual=t[3], relu=True),
        normalised,
        ((2, 2, 4, 3, 3), (2, 4), (2, 4), (2, 2, 4, 3, 3)),
    ),
    "batch_norm, running statistics": (
        lambda x, w, b, r: ops.batch_norm(x, w, b, MEAN.to(x.dtype), VAR.to(x.dtype), False, residual=r, relu=True),
        lambda x, w, b, r: normalised(x, w, b, r, MEAN.to(x.dtype), VAR.to(x.dtype)),
        ((2, 2, 4, 3, 3), (2, 4), (2, 4), (2, 2, 4, 3, 3)),
    ),
    "conv2d_moments and batch_norm": (
        lambda x, w, nw, nb: _norm_by_moments(*ops.conv2d_moments(x, w, padding=1), nw, nb),
        lambda x, w, nw, nb: normalised(convolved(x, w, None), nw, nb, 0),
        ((2, 2, 4, 5, 5), (2, 4, 4, 3, 3), (2, 4), (2, 4)),
    ),
    "conv2d_moments, crops": (
        lambda image, w, b: ops.conv2d_moments(image, w, b, padding=1, crops=CROPS)[0],
        lambda image, w, b: convolved(cut_out(image), w, b),
        ((2, 3, 7, 7), (2, 4, 3, 3, 3), (2, 4)),
    ),
    "block_conv2d": (
        lambda x, w, b: ops.block_conv2d(x, w, MASK, b, padding=1),
        lambda x, w, b: F.conv2d(x, blocks(w), b, padding=1),
        ((2, 8, 5, 5), (8, 8, 3, 3), (8,)),
    ),
    "block_linear": (
        lambda x, w, b: ops.block_linear(x, w, MASK, b),
        lambda x, w, b: F.linear(x, blocks(w), b),
        ((3, 2, 8), (8, 8), (8,)),
    ),
}


def _norm_by_moments(y, moments, weight, bias):
    return ops.batch_norm(y, weight, bias, relu=True, moments=moments)


def operands(shapes, dtype):
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_has_every_derivative_of_torchs(name, dtype, backend):
    ours, reference, shapes = OPERATORS[name]
    tensors = operands(shapes, dtype)

    def second(function):
        inputs = [t.clone().requires_grad_() for t in tensors]
        first = torch.autograd.grad(loss(function(*inputs)), inputs, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    def forward(function):
        return jvp(function, tensors, tuple(t.cos() for t in tensors))

    def batched(function):
        return vmap(grad(lambda *t: loss(function(*t)), tuple(range(len(tensors)))))(*(t[None] for t in tensors))

    def gradients_at_once(function):
        inputs = [t.clone().requires_grad_() for t in tensors]
        y = function(*inputs)
        grads = torch.stack([torch.ones_like(y), y.detach().cos()])
        return torch.autograd.grad(y, inputs, grads, is_grads_batched=True)

    for derivative in (second, forward, batched, gradients_at_once):
        with backend() if dtype == torch.float32 else contextlib.nullcontext():
            found = derivative(ours)
        same(found, derivative(reference), dtype)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operators_derivatives_are_those_of_differences(name):
    ours, _, shapes = OPERATORS[name]
    tensors = [t.requires_grad_() for t in operands(shapes, torch.float64)]
    assert torch.autograd.gradcheck(
        ours, tensors, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(ours, tensors, fast_mode=True, check_batched_grad=True)


def test_a_fused_convolution_carries_tangents():
    x, weight, scale, shift, residual = operands(
        ((2, 3, 7, 7), (2, 4, 3, 3, 3), (2, 4), (2, 4), (2, 2, 4, 5, 5)), torch.float32
    )

    def ours(image, weight, scale, shift, residual):
        options = dict(scale=scale, shift=shift, residual=residual, relu=True, crops=CROPS)
        return ops.fused_conv2d(image, weight, padding=1, **options)

    def reference(image, weight, scale, shift, residual):
        y = convolved(cut_out(image), weight, None)
        return torch.relu(y * scale[:, None, :, None, None] + shift[:, None, :, None, None] + residual)

    tensors = x, weight, scale, shift, residual
    directions = tuple(t.cos() for t in tensors)
    same(jvp(ours, tensors, directions), jvp(reference, tensors, directions), torch.float32)


@pytest.mark.parametrize("operator", ["block_conv2d", "block_linear"])
def test_gradients_of_skipped_blocks_are_the_dense_operators_at_every_turn(operator):
    images = operator == "block_conv2d"
    x, weight = operands(((2, 8, 4, 4), (8, 8, 3, 3)) if images else ((5, 8), (8, 8)), torch.float64)

    def ours(x, weight):
        return getattr(ops, operator)(x, weight, MASK, skipped_gradients=True)

    def dense(x, weight):
        return (F.conv2d if images else F.linear)(x, weight)

    own = blocks(weight)
    (found,) = torch.autograd.grad(ours(x, w := weight.clone().requires_grad_()).sin().sum(), w, create_graph=True)
    (reference,) = torch.autograd.grad(dense(x, v := own.requires_grad_()).sin().sum(), v, create_graph=True)
    assert_close(found, reference)
    assert_close(grad(lambda w: ours(x, w).sin().sum())(weight), reference)
    assert_close(torch.autograd.grad(found.square().sum(), w), torch.autograd.grad(reference.square().sum(), v))
    direction = weight.cos()
    assert_close(
        jvp(lambda w: ours(x, w), (weight,), (direction,))[1],
        jvp(lambda w: dense(x, w), (own.detach(),), (direction,))[1],
    )
    weight[:4, 4:] = torch.nan
    assert_close(grad(lambda w: ours(x, w).sin().sum())(weight), reference)


@pytest.mark.parametrize("backend", ["cpu", "triton", "torch"])
def test_gradients_of_many_outputs_at_once_go_through_a_packed_convolution(backend):
    if backend == "triton" and not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    packed = decompk.pack([nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3)) for _ in range(K)])
    x = torch.randn(1, 4, 3, 3)
    with decompk.backend(backend):
        together = torch.autograd.functional.jacobian(packed, x, vectorize=True)
        assert_close(together, torch.autograd.functional.jacobian(packed, x), rtol=1e-4, atol=1e-5)


def test_under_a_transform_operands_are_cast_and_checked_as_ever():
    x, weight = operands(((2, 2, 4, 5, 5), (2, 4, 4, 3, 3)), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, tangent = jvp(ops.grouped_conv2d, (x, weight), (x, weight))
        assert y.dtype == tangent.dtype == ops.grouped_conv2d(x, weight).dtype == torch.bfloat16
    with pytest.raises(decompk.DecompkError, match="needs one floating dtype"):
        jvp(lambda x: ops.grouped_conv2d(x, weight.double()), (x,), (x,))
    with pytest.raises(decompk.DecompkError, match="the residual"):
        jvp(lambda x: ops.fused_conv2d(x, weight, residual=x), (x,), (x,))


# ---- exports, traces, compilers, and what stands around a module ----------------------------------------------------


@EVAL
@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_an_export_holds_torchs_operators_alone_and_takes_other_batches(case, shared):
    sizes = ({0 if shared else 1: torch.export.Dim("samples", min=2, max=64)},)
    try:
        exported = torch.export.export(case.packed, (case.x[0] if shared else case.x,), dynamic_shapes=sizes)
    except RuntimeError:
        with pytest.raises(RuntimeError):  # torch 2.11: an LSTM's last state has a dimension more in an export
            torch.export.export(case.members[0], (case.x[0],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        pytest.skip("torch exports no such member alone")
    assert not [node for node in exported.graph.nodes if "decompk" in str(node.target)]
    for samples in (2, 7):
        x = torch.randn(*([] if shared else [K]), samples, 3, 6, 6)
        case.same(exported.module()(x), case.packed(x))


@EVAL
@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_takes_other_batches(case):
    with torch.no_grad():
        traced = torch.jit.trace(case.packed, (case.x[0],), check_trace=False)
        x = torch.randn(7, 3, 6, 6)
        case.same(traced(x), case.packed(x))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "none"])
def test_compiled_code_may_hold_a_transform(transform):
    plain = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(128, 2))  # noqa: E731
    kind = plain if transform in ("jvp", "none") else Convolutions  # torch compiles no tangent of a batch norm
    packed = decompk.pack([kind().eval() for _ in range(K)])
    x = torch.randn(2, N, 3, 6, 6)

    def run(x):
        if transform == "vmap":
            return vmap(packed)(x)
        if transform == "jvp":
            return jvp(packed, (x[0],), (x[0].cos(),))
        return grad(lambda x: packed(x).square().sum())(x[0]) if transform == "grad" else packed(x[0])

    same(torch.compile(run, backend="aot_eager", dynamic=transform == "none")(x), run(x), torch.float32)


def saved_on_cpu(net, x):
    with torch.autograd.graph.save_on_cpu():
        return net(x)


def with_a_hook(net, x):
    net.register_full_backward_hook(lambda module, into, out: None)
    return net(x)


AROUND = {
    "checkpoint": partial(torch.utils.checkpoint.checkpoint, use_reentrant=False),
    "reentrant checkpoint": partial(torch.utils.checkpoint.checkpoint, use_reentrant=True),
    "saved on the CPU": saved_on_cpu,
    "backward hook": with_a_hook,
}


@EVAL
@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
@pytest.mark.parametrize("around", AROUND)
def test_what_stands_around_a_module_changes_no_gradient(case, around):
    def gradients(run):
        x = case.x.clone().requires_grad_()
        case.packed.zero_grad()
        loss(run(case.packed, x)).backward()
        return [x.grad, *(p.grad for p in case.packed.parameters())]

    reference = gradients(lambda net, x: net(x))
    case.same(gradients(AROUND[around]), reference)


@EVAL
@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
def test_inference_mode_gives_the_same_outputs(case):
    reference = case.packed(case.x).detach()
    with torch.inference_mode():
        case.same(case.packed(case.x), reference)


def test_a_loss_is_scaled_under_autocast():
    packed = decompk.pack([Convolutions() for _ in range(K)])
    optimizer, scaler = torch.optim.SGD(packed.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in packed.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        value = packed(torch.randn(K, N, 3, 6, 6)).float().square().mean()
    scaler.scale(value).backward()
    scaled = [p.grad.clone() for p in packed.parameters()]
    scaler.step(optimizer)
    for p, old, slope in zip(packed.parameters(), before, scaled, strict=True):
        assert_close(p.detach(), old - 0.1 * slope / 8)
