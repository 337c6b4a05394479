"""Batch norm of K members: the kernels against float64, the operators as torch sees them, the public function."""

import contextlib
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import decompk
from decompk.kernels import norm as kernels
from decompk.kernels.device import interpreted
from decompk.kernels.layout import ORDERS, pieces_of, streams, strides_of
from decompk.ops import norm as norm_op
from decompk.ops.norm import batch_norm

DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
EPS, MOMENTUM = 1e-5, 0.3
SHAPES = [  # (K, N, C, H, W)
    (3, 2, 4, 5, 7),
    (2, 5, 1, 1, 1),
    (2, 3, 3, 9, 5),
    (1, 2, 24, 7, 7),
    (2, 3, 40, 3, 3),
    (2, 2, 20, 4, 5),
    (2, 2, 144, 3, 3),
    (1, 3, 2048, 1, 1),
    (1, 9, 8, 12, 12),
]
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(interpreted(), reason="Triton's interpreter truncates to bf16")
    ),
]
LAYOUTS = list(ORDERS)

needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU or TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def _device():
    """Tensors are made where the kernels run."""
    with torch.device(DEVICE) if DEVICE == "cuda" else contextlib.nullcontext():
        yield


def embedded(shape, dtype, layout="member", values=None):
    """A tensor in a storage of NaN that goes on before and after it; NaN itself unless it gets values."""
    strides, size = strides_of(layout, shape) if len(shape) == 5 else None, torch.Size(shape).numel()
    storage = torch.full((size + 64,), torch.nan, dtype=dtype, device=DEVICE)
    inner = storage[32 : 32 + size]
    t = inner.view(shape) if strides is None else inner.as_strided(shape, strides)
    return t if values is None else t.copy_(values)


def written_inside(t):
    """Whether every value of an embedded tensor was written, and nothing around it."""
    storage = t.new_empty(0).set_(t.untyped_storage())
    return not t.isnan().any() and int(storage.isnan().sum()) == 64


def problem(shape, dtype, mean=0.0, seed=0):
    """x, weight, bias, residual, dy of `shape`, float64 but rounded to `dtype`; the vectors to float32."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size, dtype):
        values = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
        return values.to(DEVICE, dtype).double()

    K, _, C, _, _ = shape
    x = (random(*shape, dtype=dtype) + mean).to(dtype).double()
    weight, bias = (random(K, C, dtype=torch.float32) for _ in range(2))
    residual, dy = (random(*shape, dtype=dtype) for _ in range(2))
    return dict(x=x, weight=(1 + 0.3 * weight).float().double(), bias=bias, residual=residual, dy=dy)


def by_torch(p, dtype, training=True, residual=False, relu=False, running=None):
    """y, dx, dweight, dbias, dresidual and z, y before relu, by torch's own operators in `dtype`, member by member."""
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = dict(x=dtype, weight=vectors, bias=vectors, residual=dtype)
    leaves = {name: p[name].to(kind).detach().requires_grad_() for name, kind in wanted.items()}
    mean, var = ([None] * len(p["x"]),) * 2 if running is None else running
    z = torch.stack([
        F.batch_norm(x, m, v, w, b, training, MOMENTUM, EPS)
        for x, m, v, w, b in zip(leaves["x"], mean, var, leaves["weight"], leaves["bias"], strict=True)
    ])  # fmt: skip
    z = z + leaves["residual"] if residual else z
    y = z.relu() if relu else z
    y.backward(p["dy"].to(dtype))
    return dict(y=y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}), z.detach()


def by_kernels(p, dtype, layout, training=True, residual=False, relu=False, running=None, pieces=None):
    """The same by our kernels, every result written into NaN."""
    shape = p["x"].shape
    K, C = shape[0], shape[2]
    x, dy, other = (embedded(shape, dtype, layout, p[name]) for name in ("x", "dy", "residual"))
    weight, bias = (embedded((K, C), torch.float32, values=p[name]) for name in ("weight", "bias"))
    statistics = tuple(embedded((K, C), torch.float32) for _ in range(2))
    if training:
        pieces = pieces or pieces_of(x)
        moments = kernels.launch_moments(x, pieces, embedded((1, K, pieces, 3, C), torch.float32)[0])
        mean, rstd = kernels.launch_finalise(moments, *(running or (None, None)), MOMENTUM, EPS, statistics)
    else:
        mean, rstd = running[0].float(), torch.rsqrt(running[1].float() + EPS)
    other = other if residual else None
    y = kernels.launch_apply(x, mean, rstd, weight, bias, other, relu, embedded(shape, dtype, layout))
    masks = relu and residual
    out = (embedded(shape, dtype, layout), *(embedded((K, C), torch.float32) for _ in range(2)))
    out = (*out, embedded(shape, dtype, layout) if masks else None)
    kernels.launch_backward(
        dy, x, y if masks else None, mean, rstd, weight, bias, relu, training, pieces or pieces_of(x), out
    )
    assert p["x"].isnan().any() or all(written_inside(t) for t in (y, *out) if t is not None)
    dx, dweight, dbias, g = out
    assert y.stride() == x.stride() == dx.stride()
    return dict(y=y, dx=dx, dweight=dweight, dbias=dbias, dresidual=(g if masks else dy) if residual else None)


def error(result, exact):
    """The largest error, on the scale of one."""
    return float((result.double() - exact).abs().max() / exact.abs().max().clamp(min=1))


def check(shape, dtype, layout, mean=0.0, pieces=None, running=None, **options):
    p = problem(shape, dtype, mean)
    copies = [None if running is None else tuple(t.clone() for t in running) for _ in range(3)]
    exact, z = by_torch(p, torch.float64, running=copies[0] and tuple(t.double() for t in copies[0]), **options)
    if options.get("relu"):  # where rounding decides what relu lets pass there is nothing to compare
        p["dy"] = p["dy"].where(z.abs() > 1e-3, 0)
        exact, _ = by_torch(p, torch.float64, running=copies[0] and tuple(t.double() for t in copies[1]), **options)
    own, _ = by_torch(p, dtype, running=copies[1], **options)
    ours = by_kernels(p, dtype, layout, pieces=pieces, running=copies[2], **options)
    for name, result in ours.items():
        if result is not None:
            assert error(result, exact[name]) <= 2 * error(own[name], exact[name]) + 1e-6, name
    return ours


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_are_as_exact_as_torch_in_every_shape_and_layout(shape, layout):
    check(shape, torch.float32, layout, residual=True, relu=True)
    check(shape, torch.float16, layout, relu=True)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("residual", "relu"), [(False, False), (True, False), (False, True), (True, True)])
def test_every_option_is_as_exact_as_torch(dtype, training, residual, relu):
    running = torch.randn(3, 4, device=DEVICE), 0.5 + torch.rand(3, 4, device=DEVICE)
    check(SHAPES[0], dtype, "member", training=training, residual=residual, relu=relu, running=running)


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_far_from_zero_costs_no_more_than_in_torch(dtype, layout):
    check((2, 9, 8, 12, 12), dtype, layout, mean=100.0, pieces=3, residual=True)


@needs_kernels
@pytest.mark.parametrize("pieces", [1, 4, 9])
def test_pieces_may_be_empty_or_of_several_tiles(pieces):
    check((1, 5, 3, 7, 5), torch.float32, "member", pieces=pieces)
    check((1, 9, 8, 12, 12), torch.float32, "member", pieces=pieces)


@needs_kernels
def test_moments_are_those_of_their_pieces():
    shape, pieces = (2, 4, 24, 5, 5), 9
    p = problem(shape, torch.float32, mean=3.0)
    moments = kernels.launch_moments(embedded(shape, torch.float32, values=p["x"]), pieces).double()
    rows = p["x"].movedim(2, -1).flatten(1, 3).split(16, 1)
    assert len(rows) == 7
    for s in range(pieces):
        count, mean, m2 = moments[:, s].unbind(1)
        assert (count == (rows[s].shape[1] if s < 7 else 0)).all()
        exact = torch.var_mean(rows[s], 1, correction=0) if s < 7 else (torch.zeros_like(m2), torch.zeros_like(mean))
        torch.testing.assert_close(mean, exact[1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(m2, exact[0] * count, rtol=1e-6, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("pieces", [1, 5, 1500])
@pytest.mark.parametrize("form", ["kernel", "torch"])
def test_moments_of_any_number_of_pieces_merge_and_empty_ones_do_not_count(pieces, form):
    K, C, generator = 2, 12, torch.Generator().manual_seed(0)
    values = 100 + torch.randn(K, pieces, 3, C, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE)
    filled = torch.arange(pieces) % 3 != 1
    var, mean = torch.var_mean(values, 2, correction=0)
    moments = torch.stack([torch.full_like(mean, 3), mean, 3 * var], 2)
    moments[:, ~filled] = 0
    var, mean = torch.var_mean(values[:, filled].flatten(1, 2), 1, correction=0)
    running = torch.full_like(mean, 2).float(), torch.full_like(var, 3).float()
    if form == "kernel":
        results = kernels.launch_finalise(moments.float(), *running, MOMENTUM, EPS)
    else:
        results = torch.ops.decompk.batch_norm_finalise(moments.float(), *running, MOMENTUM, EPS)
    count = 3 * int(filled.sum())
    exact = mean, torch.rsqrt(var + EPS), 2 + MOMENTUM * (mean - 2), 3 + MOMENTUM * (var * count / (count - 1) - 3)
    for result, wanted, tolerance in zip((*results, *running), exact, (1e-7, 2e-6, 1e-6, 2e-6), strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=tolerance, atol=0)


@needs_kernels
def test_a_member_full_of_nan_changes_no_bit_of_its_neighbours():
    shape = (3, 2, 4, 5, 7)
    p = problem(shape, torch.float32)
    options = dict(residual=True, relu=True)
    clean = by_kernels(p, torch.float32, "channel-grouped", **options)
    for name in ("x", "residual", "dy"):
        p[name][1] = torch.nan
    shown = by_kernels(p, torch.float32, "channel-grouped", **options)
    for name, result in shown.items():
        assert result[1].isnan().any()
        assert torch.equal(result[[0, 2]], clean[name][[0, 2]]), name


@needs_kernels
def test_the_kernels_give_the_same_bits_twice():
    p = problem((2, 9, 8, 12, 12), torch.float16)
    first, second = (by_kernels(p, torch.float16, "member", residual=True, relu=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tiles_hold_every_channel_in_whole_vectors():
    for channels, element_size in itertools.product((*range(1, 200), 256, 320, 1000, 2048), (2, 4)):
        tile = kernels.tile_of(channels, element_size)
        assert tile.lines * tile.width * element_size == 4096
        assert tile.blocks * tile.width >= channels * tile.merged
        assert tile.merged == 1 or tile.blocks == 1
        assert channels * tile.merged % 8 == 0 or channels > 64 or tile.merged == 1 and 8 * channels > 128


@pytest.fixture(params=["torch", "triton"])
def form(request, monkeypatch):
    """The operators on plain torch, and on the kernels in the interpreter."""
    if request.param == "triton" and DEVICE == "cpu" and not interpreted():
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    monkeypatch.setattr(norm_op, "runs_triton", lambda x: request.param == "triton" and x.dtype != torch.float64)
    return request.param


def public(p, dtype, layout, running, **options):
    """batch_norm on leaves in `layout`, with gradients."""
    leaves = {n: embedded(p[n].shape, dtype, layout, p[n]) for n in ("x", "residual")}
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {**leaves, **{name: p[name].to(vectors) for name in ("weight", "bias")}}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    residual = leaves["residual"] if options.pop("residual") else None
    vectors = (leaves["weight"], leaves["bias"], *running)
    y = batch_norm(leaves["x"], *vectors, momentum=MOMENTUM, eps=EPS, residual=residual, **options)
    y.backward(p["dy"].to(dtype))
    return dict(y=y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("residual", "relu"), [(False, True), (True, False), (True, True)])
def test_the_public_function_equals_torch_member_by_member(training, residual, relu, layout, form):
    for dtype, tolerance in {torch.float32: 1e-5, torch.float16: 4e-3, torch.float64: 1e-12}.items():
        p = problem((3, 2, 4, 5, 7), dtype)
        vectors = torch.float64 if dtype == torch.float64 else torch.float32
        running = [torch.randn(3, 4, dtype=vectors), 0.5 + torch.rand(3, 4, dtype=vectors)]
        theirs = [t.clone() for t in running]
        _, z = by_torch(p, torch.float64, training, residual, running=[t.double().clone() for t in running])
        p["dy"] = p["dy"].where(z.abs() > 1e-2, 0)
        wanted, _ = by_torch(p, dtype, training, residual, relu, theirs)
        got = public(p, dtype, layout, running, training=training, residual=residual, relu=relu)
        for name, exact in wanted.items():
            if exact is not None:
                torch.testing.assert_close(got[name], exact, rtol=tolerance, atol=tolerance)
        for a, b in zip(running, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert got["y"].stride() == strides_of(layout, p["x"].shape)


def test_other_strides_are_copied_and_moments_may_be_given(form):
    p = problem((2, 3, 4, 5, 3), torch.float32)
    x, other = p["x"].float(), p["residual"].float()
    wanted = batch_norm(x, relu=True, residual=other)
    for order in [(0, 1, 2, 3, 4), (2, 1, 0, 4, 3), (1, 0, 3, 4, 2)]:
        strided = x.permute(order).contiguous().permute([order.index(d) for d in range(5)])
        torch.testing.assert_close(batch_norm(strided, relu=True, residual=other), wanted)
        torch.testing.assert_close(batch_norm(x, relu=True, residual=strided - x + other), wanted)
    moments = torch.ops.decompk.batch_norm_moments(x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3))
    torch.testing.assert_close(batch_norm(x, relu=True, residual=other, moments=moments), wanted)


def test_one_pixel_is_normalised_by_running_statistics_and_refused_in_training(form):
    x, mean, var = torch.randn(2, 1, 3, 1, 1), torch.randn(2, 3), torch.rand(2, 3)
    y = batch_norm(x, running_mean=mean, running_var=var, training=False)
    torch.testing.assert_close(y[:, 0, :, 0, 0], (x[:, 0, :, 0, 0] - mean) / (var + 1e-5).sqrt())
    with pytest.raises(decompk.DecompkError, match="two values a channel"):
        batch_norm(x, running_mean=mean, running_var=var)
    empty = torch.empty(2, 0, 3, 4, 4)
    assert batch_norm(empty, running_mean=mean, running_var=var, training=False).shape == empty.shape


def test_every_dtype_of_vectors_is_taken_and_its_gradient_has_it(form):
    x = torch.randn(2, 3, 4, 5, 5).half()
    weight, bias = (torch.randn(2, 4).bfloat16().requires_grad_() for _ in range(2))
    mean, var = torch.zeros(2, 4).half(), torch.ones(2, 4).half()
    y = batch_norm(x, weight, bias, mean, var)
    y.sum().backward()
    assert (y.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.float16, torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(y, batch_norm(x, weight.float(), bias.float()))
    torch.testing.assert_close(mean.float(), 0.1 * x.float().mean((1, 3, 4)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("residual", "relu"), [(False, False), (True, True), (False, True)])
def test_the_gradient_is_the_functions_own(training, residual, relu):
    shape = (2, 2, 3, 2, 2)
    p = problem(shape, torch.float64)
    x, weight, bias, other = (p[n].clone().requires_grad_() for n in ("x", "weight", "bias", "residual"))
    running = () if training else (torch.zeros(2, 3).double(), torch.ones(2, 3).double())

    def function(x, weight, bias, other):
        return batch_norm(x, weight, bias, *running, training=training, residual=other if residual else None, relu=relu)

    assert torch.autograd.gradcheck(function, (x, weight, bias, other))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_accepts_the_operators(layout, form):
    p = problem((2, 3, 4, 9, 9), torch.float32)
    x, dy, other = (embedded(p[n].shape, torch.float32, layout, p[n]).requires_grad_() for n in ("x", "dy", "residual"))
    weight, bias = (p[n].float().requires_grad_() for n in ("weight", "bias"))
    mean, rstd = torch.randn(2, 4), torch.rand(2, 4)
    ops = torch.ops.decompk
    moments = ops.batch_norm_moments(x.detach())
    torch.library.opcheck(ops.batch_norm_moments, (x.detach(),))
    for running in ((mean.clone(), rstd.clone()), (None, None)):
        torch.library.opcheck(ops.batch_norm_finalise, (moments, *running, 0.1, 1e-5))
    for relu, residual in ((True, other), (True, None), (False, None)):
        torch.library.opcheck(ops.batch_norm_apply, (x, mean, rstd, weight, bias, residual, relu, True))
    inputs = [t.detach() for t in (dy, x, other, mean, rstd, weight, bias)]
    torch.library.opcheck(ops.batch_norm_backward, (*inputs, True, True))
    torch.library.opcheck(ops.batch_norm_backward, (*inputs[:2], None, *inputs[3:5], None, None, False, False))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_compiles_without_a_graph_break(layout, dynamic, form):
    p = problem((2, 3, 4, 9, 9), torch.float32)

    def step(function, running):
        x, other = (embedded(p[n].shape, torch.float32, layout, p[n]).requires_grad_() for n in ("x", "residual"))
        y = function(x, p["weight"].float(), p["bias"].float(), *running, residual=other, relu=True)
        y.backward(p["dy"].float())
        return y, x.grad, other.grad, *running

    running = [torch.zeros(2, 4), torch.ones(2, 4)]
    wanted = step(batch_norm, [t.clone() for t in running])
    torch._dynamo.reset()
    compiled = torch.compile(batch_norm, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for a, b in zip(step(compiled, running), wanted, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def test_what_does_not_fit_is_refused_in_a_sentence():
    x, vector = torch.randn(2, 3, 4, 5, 5), torch.ones(2, 4)
    for message, arguments in {
        r"x \(K, N, C, H, W\)": dict(x=x[0]),
        "of torch.int64": dict(x=x.long()),
        "weight": dict(weight=torch.ones(4)),
        "bias": dict(bias=vector.long()),
        "both or neither": dict(running_mean=vector),
        "contiguous": dict(running_mean=torch.ones(4, 2).T, running_var=vector),
        "residual as x": dict(residual=x.half()),
        "moments": dict(moments=torch.zeros(2, 1, 2, 4)),
        "on meta": dict(weight=vector.to("meta")),
        "not training": dict(training=False),
    }.items():
        with pytest.raises(decompk.DecompkError, match=message):
            batch_norm(**{"x": x, **arguments})
    with pytest.raises(decompk.DecompkError, match="member-major or channel-grouped"):
        torch.ops.decompk.batch_norm_moments(x)


def test_pieces_fill_a_gpu_and_are_far_larger_than_their_sums():
    for layout in LAYOUTS:
        for K, N, C, size in [(1, 1, 1, 1), (4, 128, 16, 32), (4, 128, 512, 7), (16, 128, 4, 56), (1, 256, 2048, 7)]:
            x = torch.empty_strided((K, N, C, size, size), strides_of(layout, (K, N, C, size, size)), device="meta")
            count, rows, channels = streams(x)
            assert 1 <= pieces_of(x) <= 1024
            assert pieces_of(x) == 1 or 100 * pieces_of(x) <= rows
            assert count * channels == K * C


def test_importing_the_operators_does_not_load_their_kernels():
    code = "import sys, decompk.ops.norm; sys.exit('decompk.kernels.norm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_merged_pieces_are_the_moments_of_all_of_them():
    moments = kernels.launch_moments(torch.randn(2, 3, 4, 3, 5).movedim(-1, 2) + 3, 4)
    merged = kernels.merge_moments(moments)
    assert merged.shape == (2, 1, 3, 5)
    results = [kernels.launch_finalise(m, None, None, MOMENTUM, EPS) for m in (merged, moments)]
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
