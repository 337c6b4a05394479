"""The convolution operators as torch sees them: contract, layouts, gradients, refusals; on every backend a CPU has."""

import itertools

import by_config
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import decompk
from decompk import Crop, DecompkError, ops
from decompk.kernels import conv, extension
from decompk.kernels.choose import candidates
from decompk.kernels.layout import layout_of, strides_of
from decompk.kernels.problem import Problem
from decompk.kernels.torch_limits import overruns, sees_nothing

OP, BACKWARD = torch.ops.decompk.grouped_conv2d, torch.ops.decompk.grouped_conv2d_backward
FUSED = torch.ops.decompk.fused_conv2d


def activation(layout, *shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).as_strided(shape, strides_of(layout, shape))


def case(K=3, N=2, C=16, O=24, H=6, W=7, k=3, layout="member", dtype=torch.float32):
    x = activation(layout, K, N, C, H, W, dtype=dtype)
    weight = torch.randn(K, O, C, k, k, dtype=dtype) / (C * k * k) ** 0.5
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(K, O, dtype=dtype).requires_grad_()


def alone(x, weight, bias, *geometry):
    """Each member by torch.conv2d, in float64."""
    members = zip(x.double(), weight.double(), [None] * len(x) if bias is None else bias.double(), strict=True)
    return torch.stack([F.conv2d(*member, *geometry) for member in members])


def assert_close(found, wanted, tolerance=2e-5):
    assert found.shape == wanted.shape
    assert (found.double() - wanted.double()).abs().max() <= tolerance * max(1, wanted.abs().max())


@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "member"), (torch.float64, "channel-grouped")])
def test_the_operators_keep_torchs_contract(dtype, layout):
    x, weight, bias = case(layout=layout, dtype=dtype)
    geometry = [2, 1], [1, 1], [1, 1]
    torch.library.opcheck(OP, (x, weight, bias, *geometry))
    grad = torch.randn_like(OP(x, weight, None, *geometry))
    for wanted in ([True, True, True], [False, True, False]):
        torch.library.opcheck(BACKWARD, (grad, x.detach(), weight.detach(), *geometry, wanted))
    around = torch.randn(2, 3, 24, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    nothing = None, None, None, False, None, None, False, []
    torch.library.opcheck(FUSED, (x, weight, bias, *nothing, True, *geometry))
    fused = (*around, torch.randn_like(grad), True, None, None, False, [])
    torch.library.opcheck(FUSED, (x.detach(), weight.detach(), None, *fused, False, *geometry))
    image, window = x[:1].detach(), [4, 5, 0, 2, 2, 0, 1, 1]
    torch.library.opcheck(FUSED, (image, weight, bias, *nothing[:-1], window, False, *geometry))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", ["member", "channel-grouped", "NCHW", "sliced", "expanded"])
def test_every_layout_gives_what_each_member_gives_alone(backend, layout):
    x, weight, bias = case(2, 2, 8, 16, 5, 4, layout="channel-grouped" if layout == "channel-grouped" else "member")
    if layout == "NCHW":
        x = x.detach().contiguous().requires_grad_()
    elif layout == "sliced":
        x = activation("member", 2, 2, 12, 5, 8)[:, :, 2:10, :, 1:5].detach().requires_grad_()
    elif layout == "expanded":
        x = x[:1].detach().expand(2, -1, -1, -1, -1).requires_grad_()
    wanted = alone(x, weight, bias, 1, 1)
    gradients = torch.autograd.grad(wanted.square().sum(), (x, weight, bias))
    with decompk.backend(backend):
        y = ops.grouped_conv2d(x, weight, bias, 1, 1)
        assert layout_of(y) == ("channel-grouped" if layout == "channel-grouped" else "member")
        assert_close(y, wanted)
        for found, right in zip(torch.autograd.grad(y.square().sum(), (x, weight, bias)), gradients, strict=True):
            assert_close(found, right)


def test_channels_first_costs_one_visible_copy():
    x, weight, _ = case(k=1)
    first = x.detach().contiguous()
    with torch.profiler.profile() as seen:
        ops.grouped_conv2d(first, weight.detach())
    with torch.profiler.profile() as unseen:
        ops.grouped_conv2d(x.detach(), weight.detach())

    def copies(profile):
        return sum(event.count for event in profile.key_averages() if event.key == "aten::contiguous")

    assert copies(seen) - copies(unseen) == 1


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "fails"),
    [(3, 1, 2, 1), (8, 1, 2, 1), (15, 1, 2, 1), (16, 1, 2, 0), (8, 1, 1, 0), (8, 3, 2, 0)],
)
def test_strided_pointwise_convolutions_of_few_channels_are_known_to_overrun_memory(channels, kernel, stride, fails):
    x, weight = torch.empty(7, channels, 16, 16), torch.empty(20, channels, kernel, kernel)
    assert overruns(x, weight, (stride, stride)) == fails


def test_dilated_windows_that_see_padding_alone_are_known():
    seen = set()
    for width, kernel, stride, padding, dilation in itertools.product(*map(range, (1, 1, 1, 0, 1), (5, 4, 6, 6, 5))):
        if width + 2 * padding > dilation * (kernel - 1):
            x, weight = torch.ones(1, 1, 3, width), torch.ones(1, 1, 1, kernel)
            geometry = (1, stride), (0, padding), (1, dilation)
            nothing = dilation > 1 and not F.conv2d(x, weight, None, *geometry).any()
            assert sees_nothing(x, weight, *geometry) == nothing
            seen.add(nothing)
    assert seen == {True, False}


def test_same_padding_may_see_padding_alone():
    x, weight = torch.ones(2, 3, 7, 2), torch.ones(4, 3, 1, 2)
    assert not F.conv2d(x, weight, padding="same", dilation=4).any()
    assert sees_nothing(x, weight, (1, 1), "same", (4, 4))
    assert not sees_nothing(x, weight, (1, 1), "same", (1, 1))


@pytest.mark.parametrize("form", ["loop", "grouped", "matmul"])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_form_on_torchs_operators_is_the_same_convolution(form, stride):
    k = 1 if form == "matmul" else 3
    x, weight, bias = case(k=k, dtype=torch.float64)
    geometry = (stride, stride), (k // 2, k // 2), (1, 1)
    wanted = alone(x, weight, bias, *geometry)
    one = conv.named(form)
    y = one.convolve(x, weight, bias, geometry)
    torch.testing.assert_close(y, wanted, atol=1e-12, rtol=0)
    grad = torch.randn_like(wanted)
    dx, dw = one.backward(grad, x, weight, geometry, (True, True))
    for found, right in zip((dx, dw), torch.autograd.grad(wanted, (x, weight), grad), strict=True):
        torch.testing.assert_close(found, right, atol=1e-12, rtol=0)
    for wanted in ((True, False), (False, True)):
        alike = one.backward(grad, x, weight, geometry, wanted)
        assert [t is not None for t in alike] == [*wanted]


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [
        (1, 0, 1, 1),
        (1, "same", 1, 3),
        (2, 1, 1, 3),
        ((1, 2), "same", 1, 1),
        ((2, 1), (1, 0), 2, 2),
        (1, "same", 2, 6),
        (1, "valid", 1, 2),
    ],
)
def test_conv2d_is_torchs_drop_in(stride, padding, dilation, groups):
    x, weight, bias = torch.randn(2, 12, 9, 8), torch.randn(18, 12 // groups, 3, 4) / 5, torch.randn(18)
    arguments = (stride, padding, dilation, groups)
    if padding == "same" and stride != 1:
        with pytest.raises(DecompkError, match="same"):
            ops.conv2d(x, weight, bias, *arguments)
        return
    assert_close(ops.conv2d(x, weight, bias, *arguments), F.conv2d(x, weight, bias, *arguments))
    assert_close(ops.conv2d(x[0], weight, None, *arguments), F.conv2d(x[0], weight, None, *arguments))


def test_compiled_in_one_graph_and_counted():
    x, weight, bias = case()

    def loss(x, weight, bias):
        return ops.grouped_conv2d(x, weight, bias, 2, 1).relu().square().sum()

    wanted = torch.autograd.grad(loss(x, weight, bias), (x, weight, bias))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, right in zip(torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias)), wanted, strict=True):
        torch.testing.assert_close(found, right)
    with FlopCounterMode(display=False) as counter:
        loss(x, weight, bias).backward()
    assert counter.get_total_flops() == 3 * 2 * 3 * 2 * (3 * 4) * 24 * 16 * 9
    with FlopCounterMode(display=False) as counter:
        y, _ = ops.conv2d_moments(x[0].detach(), weight, crops=[Crop(1, 1, 4, 5)] * 3)
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 3 * 2 * (2 * 3) * 24 * 16 * 9


def test_autocast_casts_to_its_dtype_eager_and_compiled():
    x, weight, bias = case()
    compiled = torch.compile(lambda *t: ops.grouped_conv2d(*t, 1, 1), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        for y in (ops.grouped_conv2d(x, weight, bias, 1, 1), compiled(x, weight, bias)):
            assert y.dtype == torch.bfloat16
            assert_close(y, alone(x, weight, bias, 1, 1), 2e-2)
            assert torch.autograd.grad(y.float().sum(), weight)[0].dtype == torch.float32


def test_autocast_casts_what_is_fused():
    x, weight, bias = (t.detach() for t in case())
    wanted = alone(x, weight, bias, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.fused_conv2d(x, weight, bias, 1, 1, residual=torch.ones_like(wanted, dtype=torch.float32))
        assert found.dtype == torch.bfloat16
        assert_close(found, wanted + 1, 2e-2)
        assert ops.conv2d_moments(x, weight, bias, 1, 1)[0].dtype == torch.bfloat16


def test_one_dimension_rides_on_it():
    layer = torch.nn.Conv1d(4, 8, 3, 2, 1)
    members = [torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3, 2, 1), torch.nn.ReLU()) for _ in range(2)]
    x = torch.randn(2, 3, 4, 9)
    with decompk.backend("triton"):
        found = decompk.pack(members)(x)
    assert_close(found, torch.stack([m(v) for m, v in zip(members, x, strict=True)]))
    assert layer(x[0]).shape == found.shape[1:]


def test_an_empty_batch_gives_an_empty_output_and_zero_gradients():
    for backend, k in itertools.product(("torch", "triton"), (1, 3)):
        x, weight, bias = case(N=0, k=k)
        with decompk.backend(backend):
            y = ops.grouped_conv2d(x, weight, bias, 1, k // 2)
            assert y.shape == (3, 0, 24, 6, 7)
            dx, dw, db = torch.autograd.grad(y.sum(), (x, weight, bias))
            assert ops.fused_conv2d(x.detach(), weight.detach(), padding=k // 2, relu=True).shape == y.shape
        assert dx.shape == x.shape
        assert not dw.any() and not db.any() and dw.shape == weight.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda x, w, b: (x[0], w, b), r"takes x \(K, N, C, H, W\)"),
        (lambda x, w, b: (x, w[0], b), "takes x"),
        (lambda x, w, b: (x.half(), w, b), "x is torch.float16, weight is torch.float32"),
        (lambda x, w, b: (x.int(), w.int(), None), "floating"),
        (lambda x, w, b: (x, w, b.double()), "bias is torch.float64"),
        (lambda x, w, b: (x[:2], w, b), "2 members of 16 channels"),
        (lambda x, w, b: (x[:, :, :8], w, b), "3 members of 8 channels"),
        (lambda x, w, b: (x, w, b[:, :3]), r"has to be \(K, O\)"),
        (lambda x, w, b: (x, w, b, 0), "stride"),
        (lambda x, w, b: (x, w, b, 1, -1), "padding"),
        (lambda x, w, b: (x, w, b, 1, (1, -2)), "padding"),
        (lambda x, w, b: (x, w, b, 1, 1, 0), "dilation"),
        (lambda x, w, b: (x, w, b, (1, 2, 3)), "one or two integers"),
        (lambda x, w, b: (x, w, b, 1, 0, 4), "does not fit images of 6×7"),
        (lambda x, w, b: (x[:0], w[:0], None), "only the batch may be empty"),
        (lambda x, w, b: (x.to("meta"), w, b), "is on"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(arguments, message):
    with pytest.raises(DecompkError, match=message) as caught:
        ops.grouped_conv2d(*arguments(*(t.detach() for t in case())))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_fused_refuses_what_it_cannot_do():
    x, weight, bias = case()
    scale = torch.randn(3, 24)
    crops = [Crop(0, 0, 4, 4)] * 3
    for call, message in (
        (lambda: ops.fused_conv2d(x, weight, scale=scale), "needs its shift"),
        (lambda: ops.fused_conv2d(x, weight, scale=scale[:, :3], shift=scale), "float32"),
        (lambda: ops.fused_conv2d(x, weight, residual=x), "residual"),
        (lambda: ops.fused_conv2d(x[0], weight, crops=crops[:2]), "2 crops"),
        (lambda: ops.fused_conv2d(x[0], weight, crops=[Crop(4, 0, 4, 4)] * 3), "does not fit an image"),
        (lambda: ops.fused_conv2d(x, weight, crops=crops), "image"),
        (lambda: ops.fused_conv2d(x, weight, relu=True).sum().backward(), "for inference"),
    ):
        with pytest.raises(DecompkError, match=message):
            call()


def test_backends_are_forced_by_name_and_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "LIBRARIES", tmp_path)
    x, weight, bias = (t.detach() for t in case(dtype=torch.float64))
    for name, message in (("cuda", "not built"), ("emulation", "not built"), ("tpu", "there is no backend")):
        with pytest.raises(decompk.BackendError, match=message), decompk.backend(name):
            pass
    with pytest.raises(decompk.BackendError, match="float64"), decompk.backend("triton"):
        ops.grouped_conv2d(x, weight, bias)


def test_sizes_past_2_to_the_31_elements_keep_their_offsets():
    """Shapes alone: every launch takes such sizes as 64-bit integers, or as descriptors, whose strides have 40 bits."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from decompk.kernels import device
    from decompk.kernels.launch import recording

    problem = Problem("fprop", "bfloat16", 4, 2**17, 64, 64, 16, 16, (3, 3), (1, 1), (1, 1))
    shape = (4, 2**17, 16, 16, 64)
    for choice in candidates(problem, device.KNOWN[90]):
        if choice.config is None:
            continue
        with FakeTensorMode(), recording() as launches:
            x, weight = torch.empty(shape, dtype=torch.bfloat16), torch.empty((4, 64, 3, 3, 64), dtype=torch.bfloat16)
            assert x.numel() > 2**31
            by_config.fprop(problem, choice.config, x, weight, torch.empty_like(x))
        for launch in launches:
            assert max(launch.grid) < 2**31
            for name, value in launch.arguments.items():
                if isinstance(value, int) and value >= 2**31:
                    assert name in {"xk", "yk", "rk"}, name  # multiplied in 64 bits
    too_many = Problem("fprop", "bfloat16", 1, 2**23, 8, 8, 16, 16, (3, 3), (1, 1), (1, 1), aligned=False)
    assert all(c.backend == "torch" or c.form.name == "band" for c in candidates(too_many, device.KNOWN[90]))


def test_every_problem_is_answered_with_something_legal():
    from decompk.kernels import device

    grid = [
        Problem(
            kind, dtype, K, 8, C, O, H, H, (k, k), (s, s), (k // 2, k // 2), layout=layout, aligned=C % 8 == O % 8 == 0
        )
        for kind in ("fprop", "dgrad", "wgrad")
        for dtype in ("bfloat16", "tf32")
        for K in (1, 256)
        for C, O in ((1, 3), (3, 16), (24, 40), (512, 2048))
        for H, k, s in ((1, 1, 1), (7, 3, 2), (33, 7, 2), (18, 1, 1))
        for layout in ("member", "channel-grouped", "strided", "crops")
    ]
    for here in device.KNOWN.values():
        for problem in grid[:: 1 if here.capability == 90 else 7]:
            found = candidates(problem, here)
            assert found and found == sorted(found, key=lambda choice: choice.ms)
            assert all(c.form.why_not(problem, c.config, here) is None for c in found)
            if problem.kind != "dgrad" or problem.layout != "crops":
                assert any(c.config for c in found), f"no kernel for {problem}"


def test_explain_prints_the_choice_and_why(capsys):
    decompk.explain(Problem("fprop", "bfloat16", 4, 128, 64, 64, 18, 18, (3, 3), (1, 1), (1, 1)))
    text = capsys.readouterr().out
    assert "torch loop" in text and "triton tile" in text and "bound by" in text
    decompk.explain(Problem("fprop", "bfloat16", 4, 0, 64, 64, 18, 18, (1, 1), (1, 1), (0, 0)))
    assert "there is nothing to compute" in capsys.readouterr().out
    packed = decompk.pack([torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)) for _ in range(2)])
    decompk.explain(packed, torch.randn(2, 3, 9, 9))
    text = capsys.readouterr().out
    assert "1 convolutions" in text and "wgrad" in text and "3→8" in text
    with pytest.raises(DecompkError, match="a Problem or a packed module, not int"):
        decompk.explain(3)
    with pytest.raises(DecompkError, match=r"write explain\(packed, x\)"):
        decompk.explain(packed)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 2)
    )
    decompk.explain(decompk.grouped_subnets(net, (3, 16, 16), partitions=2))  # knows its size
    assert "1 convolutions" in capsys.readouterr().out
