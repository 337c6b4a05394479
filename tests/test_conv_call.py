"""What one convolution costs before its kernel: the files it enters, and what is kept of a call for the next one."""

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import decompk
from decompk import ops
from decompk.kernels import cpu
from decompk.kernels.call import dgrad_call, fprop_call, settle, wgrad_call
from decompk.kernels.device import interpreted
from decompk.kernels.launch import recording
from decompk.ops.conv import convolve_now
from decompk.ops.norm import batch_norm_rows
from decompk.packed import fused_layer

PACKAGE = str(Path(decompk.__file__).parent) + "/"
LAUNCH = "kernels/launch.py"
GEOMETRY = (1, 1), (1, 1), (1, 1)


def files_entered(run):
    """The files of decompk that have a function called while `run` runs; kernels are recorded, not launched."""
    entered = set()

    def seen(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            entered.add(frame.f_code.co_filename.removeprefix(PACKAGE))

    with recording():
        sys.setprofile(seen)
        try:
            run()
        finally:
            sys.setprofile(None)
    return entered


def ways():
    """(backend, dtype) of a CPU's way and of Triton's."""
    built = pytest.mark.skipif(cpu.why_not() is not None, reason="no C++ kernels")
    runs = pytest.mark.skipif(not interpreted(), reason="runs kernels on the CPU")
    return [
        pytest.param("cpu", torch.float32, marks=built, id="cpu"),
        pytest.param("triton", torch.float16, marks=runs, id="triton"),
    ]


def layers(kernel, stride, dtype):
    members = [nn.Conv2d(16, 16, kernel, stride, kernel // 2).to(dtype) for _ in range(2)]
    packed = decompk.pack([nn.Sequential(member, nn.BatchNorm2d(16).to(dtype), nn.ReLU()) for member in members])
    x = torch.randn(4, 16, 6, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return packed, packed._inner[0], x.requires_grad_()


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize(("backend", "dtype"), ways())
def test_a_warm_packed_convolution_enters_four_files_and_its_launch(backend, dtype, kernel, stride):
    _, layer, x = layers(kernel, stride, dtype)

    def step():
        layer(x).backward(torch.ones((), dtype=dtype).expand(4, 16, -(-6 // stride), -(-6 // stride)).clone())

    with decompk.backend(backend):
        files_entered(step)
        entered = files_entered(step)
    form = {file for file in entered if file.startswith("kernels/conv/")}
    assert 1 <= len(form) <= 2  # passes may have different forms
    assert entered - form - {LAUNCH} == {"packed/conv.py", "ops/conv.py", "kernels/call.py"}


@pytest.mark.skipif(not interpreted(), reason="runs kernels on the CPU")
def test_a_warm_fused_convolution_enters_five_files_and_its_launch(monkeypatch):
    packed, _, x = layers(3, 1, torch.float16)
    fused, entered, layer = decompk.fuse(packed).eval(), [], fused_layer.run_layer
    x = x.detach().unflatten(0, (2, 2))

    def counted(*arguments):
        results = []
        entered.append(files_entered(lambda: results.append(layer(*arguments))))
        return results[0]

    with decompk.backend("triton"), torch.no_grad():
        fused(x)
        code = fused._program._code[False]
        monkeypatch.setitem(code.__globals__, next(n for n, f in code.__globals__.items() if f is layer), counted)
        fused(x)
    (found,) = entered
    form = {file for file in found if file.startswith("kernels/conv/")}
    assert len(form) == 1
    assert found - form - {LAUNCH} == {"packed/fused_layer.py", "ops/fused.py", "ops/conv.py", "kernels/call.py"}


# ---- what is kept ---------------------------------------------------------------------------------------------------


def operands(K=2, N=3, C=8, O=8, H=3, W=2, dtype=torch.float32):
    x = torch.randn(K, N, H, W, C, dtype=dtype).movedim(-1, 2)
    return x, torch.randn(K, O, 3, 3, C, dtype=dtype).movedim(-1, 2), torch.randn(K, O, dtype=dtype)


def test_a_call_is_kept_by_shapes_strides_alignment_and_dtypes():
    x, weight, bias = operands()
    call = fprop_call(x, weight, bias, GEOMETRY)
    assert fprop_call(*operands(), GEOMETRY) is call
    grouped = torch.randn(3, 3, 2, 2, 8).permute(3, 0, 4, 1, 2)
    shifted = torch.randn(x.numel() + 1)[1:].view(2, 3, 3, 2, 8).movedim(-1, 2)
    others = [
        (grouped, weight, bias, GEOMETRY),
        (shifted, weight, bias, GEOMETRY),
        (x.flatten(0, 1), weight, bias, GEOMETRY),
        (*operands(N=4), GEOMETRY),
        (*operands(dtype=torch.bfloat16), GEOMETRY),
        (x, weight.contiguous(), bias, GEOMETRY),
        (x, weight, None, GEOMETRY),
        (x, weight, bias, ((2, 2), (1, 1), (1, 1))),
    ]
    calls = [fprop_call(*other) for other in others]
    assert len({call, *calls}) == 1 + len(others)
    assert [one.problem.layout for one in calls[:3]] == ["channel-grouped", "member", "member"]
    assert call.problem.aligned and not calls[1].problem.aligned


def test_the_calls_of_gradients_are_kept_by_how_the_gradient_lies():
    x, weight, bias = operands()
    call, dy = fprop_call(x, weight, bias, GEOMETRY), operands()[0]
    for kind, of in (("dgrad", dgrad_call), ("wgrad", wgrad_call)):
        assert of(call, dy) is of(call, operands()[0]) and of(call, dy).problem == call.problem.of(kind)
        spread = torch.ones(()).expand(2, 3, 8, 3, 2)
        assert not of(call, spread).settled and of(call, settle(spread)).settled
        assert not of(call, dy.contiguous()).settled and of(call, dy).settled


@pytest.mark.parametrize(("backend", "dtype"), ways())
def test_a_kept_call_computes_with_the_tensors_of_now(backend, dtype):
    with decompk.backend(backend):
        for _ in range(2):
            x, weight, bias = (t.requires_grad_() for t in operands(dtype=dtype))
            y = ops.grouped_conv2d(x, weight, bias, padding=1)
            rows = convolve_rows(x, weight, bias)
            assert torch.equal(rows.unflatten(0, (2, 3)), y)
            for k in range(2):
                alone = nn.functional.conv2d(x[k].double(), weight[k].double(), bias[k].double(), padding=1)
                near = 0.02 if dtype == torch.float16 else 1e-4
                torch.testing.assert_close(y[k].double(), alone, rtol=near, atol=near)
            dy = torch.randn_like(y)
            found = torch.autograd.grad(y, (x, weight, bias), dy)
            again = torch.autograd.grad(rows, (x, weight, bias), dy.flatten(0, 1))
            assert all(map(torch.equal, found, again))


def convolve_rows(x, weight, bias):
    return convolve_now(x.flatten(0, 1).contiguous(memory_format=torch.channels_last), weight, bias, GEOMETRY)


def test_rows_that_lie_otherwise_are_copied_once_and_get_their_gradient():
    x, weight, bias = operands()
    rows = x.flatten(0, 1).contiguous().requires_grad_()
    y = convolve_now(rows, weight, bias, GEOMETRY)
    y.sum().backward()
    expected = x.detach().requires_grad_()
    ops.grouped_conv2d(expected, weight, bias, padding=1).sum().backward()
    torch.testing.assert_close(rows.grad.unflatten(0, (2, 3)), expected.grad)


def test_what_hooks_of_saved_tensors_give_back_may_lie_otherwise():
    x, weight, bias = operands(C=8, H=4, W=5)

    def gradients(pack):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = convolve_now(leaves[0].flatten(0, 1), *leaves[1:], GEOMETRY)
        return torch.autograd.grad(y.square().sum(), leaves)

    expected = gradients(lambda t: t)
    for pack in (torch.Tensor.contiguous, lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)):
        for found, right in zip(gradients(pack), expected, strict=True):
            torch.testing.assert_close(found, right)


@pytest.mark.parametrize("whose", ["x", "y", "both"])
def test_the_hooks_of_an_operator_may_give_back_what_lies_otherwise(whose):
    x, residual = (torch.randn(2, 3, 4, 5, 8).movedim(-1, 2) for _ in range(2))
    leaves = [x.requires_grad_(), torch.ones(2, 8, requires_grad=True)]

    def gradients(pack):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = ops.batch_norm(leaves[0], leaves[1], torch.zeros(2, 8), residual=residual, relu=True)
        return torch.autograd.grad((y**3).sum(), leaves)

    def otherwise(t):
        return t.contiguous() if whose == "both" or (whose == "y") == bool((t >= 0).all()) else t

    for found, right in zip(gradients(otherwise), gradients(lambda t: t), strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.skipif(cpu.why_not() is not None, reason="no C++ kernels")
def test_a_batch_norms_hooks_may_give_back_what_lies_otherwise():
    x = torch.randn(6, 8, 4, 5).contiguous(memory_format=torch.channels_last)
    vectors = [torch.rand(2, 8) + 0.5, torch.randn(2, 8)]
    residual = torch.randn_like(x)

    def gradients(pack):
        leaves = [t.clone().requires_grad_() for t in (x, *vectors, residual)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = batch_norm_rows(*leaves[:3], None, None, 2, True, 0.1, 1e-5, leaves[3], relu=True)
        return torch.autograd.grad(y.square().sum(), leaves)

    for found, right in zip(gradients(torch.Tensor.contiguous), gradients(lambda t: t), strict=True):
        torch.testing.assert_close(found, right)


# ---- who looks on at a part of it -----------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """The names of the operators that run under it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", [None, "triton"])
def test_a_mode_around_the_backward_alone_sees_the_operators_of_it(backend):
    x, weight, bias = (t.requires_grad_() for t in operands())
    with decompk.backend(backend) if backend else nullcontext():
        y, rows = ops.grouped_conv2d(x, weight, bias, padding=1), convolve_rows(x, weight, bias)
        wanted = torch.autograd.grad(y.square().sum(), (x, weight, bias), retain_graph=True)
        for out in (y, rows):
            with Seen() as seen:
                found = torch.autograd.grad(out.square().sum(), (x, weight, bias), retain_graph=True)
            assert seen.names.count("decompk::grouped_conv2d_backward") == 1
            for one, right in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, right)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * (2 * 3 * 8 * 8 * 9 * 6)


def test_a_gradient_of_a_class_of_its_own_is_followed():
    x, weight, bias = (t.requires_grad_() for t in operands())
    y = ops.grouped_conv2d(x, weight, bias, padding=1)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, weight, dy, retain_graph=True)[0]
    found = torch.autograd.grad(y, weight, TwoTensor(dy, 2 * dy))[0]
    torch.testing.assert_close(found.a, wanted)
    torch.testing.assert_close(found.b, 2 * wanted)


@pytest.mark.skipif(cpu.why_not() is not None, reason="no C++ kernels")
def test_a_gradient_of_a_class_of_its_own_passes_a_batch_norm():
    x, scale = torch.randn(6, 8, 4, 5).contiguous(memory_format=torch.channels_last), torch.rand(2, 8) + 0.5
    leaf = x.requires_grad_()
    y = batch_norm_rows(leaf, scale, scale - 1, None, None, 2, True, 0.1, 1e-5, None, relu=True)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]
    found = torch.autograd.grad(y, leaf, TwoTensor(dy, 2 * dy))[0]
    torch.testing.assert_close(found.a, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.b, 2 * wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_trace_before_dispatch_holds_the_operator(dtype):
    x, weight, _ = operands(dtype=dtype)
    for run in (ops.grouped_conv2d, ops.fused_conv2d):
        traced = make_fx(partial(run, stride=1, padding=1), pre_dispatch=True)(x, weight)
        assert any(str(node.target).startswith("decompk.") for node in traced.graph.nodes)
        torch.testing.assert_close(traced(2 * x, weight), run(2 * x, weight, None, 1, 1))


@pytest.mark.parametrize("backend", [None, "torch", "triton"])
def test_what_is_negated_in_name_alone_counts_as_negative(backend):
    _, weight, bias = operands()
    x, dy = (torch.randn(2, 3, 8, 3, 2, dtype=torch.complex64).conj().imag for _ in range(2))
    assert x.is_neg() and dy.is_neg()

    def gradients(x, dy):
        leaf = weight.clone().requires_grad_()
        y = ops.grouped_conv2d(x, leaf, bias, padding=1)
        return y, torch.autograd.grad(y, leaf, dy)[0]

    with decompk.backend(backend) if backend else nullcontext():
        found, wanted = gradients(x, dy), gradients(x.resolve_neg(), dy.resolve_neg())
        found += (ops.fused_conv2d(x, weight, bias, 1, 1), ops.batch_norm(x))
        wanted += (ops.fused_conv2d(x.resolve_neg(), weight, bias, 1, 1), ops.batch_norm(x.resolve_neg()))
    for one, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-4)
