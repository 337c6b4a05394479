"""Zero-skipping convolutions and linear layers, on every form, against torch's dense operators in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import decompk
from decompk import DecompkError, ops
from decompk.kernels import block_choice
from decompk.kernels.block_choice import choose_blocks, mask_text
from decompk.kernels.problem import Problem

CONV, CONV_BACKWARD = torch.ops.decompk.block_conv2d, torch.ops.decompk.block_conv2d_backward
LINEAR, LINEAR_BACKWARD = torch.ops.decompk.block_linear, torch.ops.decompk.block_linear_backward
NAN = float("nan")


def random_mask(rows, columns, density, seed):
    generator = torch.Generator().manual_seed(seed)
    return mask_text(torch.rand(rows, columns, generator=generator) < density)


MASKS = {
    "diagonal": "1000/0100/0010/0001",
    "diagonal of larger blocks": "110000/110000/001100/001100/000011/000011",
    "not square, diagonal": "1100/0011",
    "permuted diagonal": "001/100/010",
    "banded": "1100/1110/0111/0011",
    "rows in pairs, apart": "10110/01001/10110/01001",
    "empty row": "101/000/011",
    "empty column": "100/001/101",
    "wide": "101101/010011",
    "tall": "10/01/11/01/00",
    "equal counts": "110000/011000/001100/000110/000011/100001",
    "a fifth": random_mask(8, 8, 0.2, 1),
    "half": random_mask(6, 7, 0.5, 2),
    "nine tenths": random_mask(6, 6, 0.9, 3),
    "one block": "1",
    "everything": "111/111",
    "nothing": "00/00",
}
GEOMETRIES = {  # kernel, stride, padding, dilation, height, width
    "1×1": ((1, 1), (1, 1), (0, 0), (1, 1), 5, 3),
    "1×1, stride 2": ((1, 1), (2, 2), (0, 0), (1, 1), 5, 4),
    "1×1, padded": ((1, 1), (1, 1), (1, 1), (1, 1), 3, 4),
    "3×3": ((3, 3), (1, 1), (1, 1), (1, 1), 5, 4),
    "3×3, stride 2": ((3, 3), (2, 2), (1, 1), (1, 1), 6, 5),
    "2×4, mixed": ((2, 4), (2, 1), (0, 3), (2, 1), 6, 4),
    "5×5, stride 3": ((5, 5), (3, 3), (2, 2), (1, 1), 7, 6),
    "3×3, dilated": ((3, 3), (2, 1), (3, 2), (3, 2), 7, 5),
    "6×1": ((6, 1), (1, 2), (3, 0), (1, 1), 4, 5),
    "7×7, stride 2": ((7, 7), (2, 2), (3, 3), (1, 1), 8, 7),
    "one pixel": ((3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
}


@pytest.fixture(params=["as chosen", "rows"])
def form(request, monkeypatch):
    """As chosen, tiny shapes run dense; "rows" takes away what is weighed against skipping."""
    if request.param == "rows":
        skip_always(monkeypatch)
    return request.param


def skip_always(monkeypatch):
    monkeypatch.setitem(block_choice.CALL_MACS, "torch", 0)
    monkeypatch.setitem(block_choice.COPY_MACS, "torch", (0, 0))
    monkeypatch.setitem(block_choice.DENSE_FROM, "torch", 1)
    block_choice._choice.cache_clear()


@pytest.fixture(autouse=True)
def _plans_of_other_thresholds():
    yield
    block_choice._choice.cache_clear()


def elementwise(mask, out_block, in_block, dims):
    """The mask as a bool tensor (O, C, 1, …) of `dims` dimensions."""
    blocks = torch.tensor([[kept == "1" for kept in row] for row in mask.split("/")])
    whole = blocks.repeat_interleave(out_block, 0).repeat_interleave(in_block, 1)
    return whole.view(*whole.shape, *[1] * (dims - 2))


def conv_case(mask, out_block, in_block, geometry, N=2, dtype=torch.float32, skipped=NAN):
    """x, weight with poison in its skipped blocks, bias and geometry."""
    kernel, stride, padding, dilation, H, W = GEOMETRIES[geometry]
    rows = mask.split("/")
    O, C = len(rows) * out_block, len(rows[0]) * in_block
    x = torch.randn(N, C, H, W).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(O, C, *kernel) / (C * math.prod(kernel)) ** 0.5
    weight = torch.where(elementwise(mask, out_block, in_block, 4), weight, skipped).to(dtype)
    tensors = x, weight.contiguous(memory_format=torch.channels_last), torch.randn(O).to(dtype)
    return tuple(t.requires_grad_() for t in tensors), (stride, padding, dilation)


def linear_case(mask, out_block, in_block, N=7, dtype=torch.float32, skipped=NAN):
    rows = mask.split("/")
    O, C = len(rows) * out_block, len(rows[0]) * in_block
    weight = torch.where(elementwise(mask, out_block, in_block, 2), torch.randn(O, C) / C**0.5, skipped)
    tensors = torch.randn(N, 2, C), weight, torch.randn(O)
    return tuple(t.to(dtype).requires_grad_() for t in tensors)


def passes(function, tensors, dy=None):
    """(y, dx, dweight, dbias); dy is random if not given."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    y = function(*tensors)
    dy = torch.randn_like(y) if dy is None else dy
    return y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))


def dense(function, keep, dtype, *geometry):
    """torch's own operator on the masked weight, in `dtype`."""

    def run(x, weight, bias):
        return function(x.to(dtype), torch.where(keep, weight, 0).to(dtype), bias.to(dtype), *geometry)

    return run


def assert_right(found, wanted, torchs):
    """At most twice torch's own error in the same dtype, plus 1e-6 (of 16 bits 2e-5), relative to the norm."""
    for what, a, right, own in zip(("y", "dx", "dweight", "dbias"), found, wanted, torchs, strict=True):
        assert a.shape == right.shape and not a.isnan().any(), what
        norm = right.double().norm().clamp_min(1e-30)
        error, theirs = ((t.double() - right.double()).norm() / norm for t in (a, own))
        floor = 2e-5 if a.dtype is torch.float16 else 1e-6  # some processors' torch rounds a few values otherwise
        assert error <= 2 * theirs + floor, f"{what}: {error:.1e}, torch's own {theirs:.1e}"


def check_conv(mask, out_block, in_block, geometry, dtype=torch.float32, N=2):
    tensors, arguments = conv_case(mask, out_block, in_block, geometry, N, dtype)
    keep = elementwise(mask, out_block, in_block, 4)
    shape = F.conv2d(*(t.float() for t in tensors), *arguments).shape
    dy = torch.randn(shape, dtype=dtype)
    found = passes(lambda x, w, b: ops.block_conv2d(x, w, mask, b, *arguments), tensors, dy)
    wanted = passes(dense(F.conv2d, keep, torch.float64, *arguments), tensors, dy)
    torchs = passes(dense(F.conv2d, keep, dtype, *arguments), tensors, dy)
    assert_right(found, wanted, torchs)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert not found[2][~keep.expand_as(found[2])].any(), "a gradient in a skipped block"


# ---- right on torch's operators -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("geometry", ["3×3", "1×1", "3×3, stride 2"])
def test_the_convolution_of_every_mask_is_as_right_as_torchs_own(mask, geometry, form):
    check_conv(mask, 8, 8, geometry)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("mask", ["a fifth", "empty row", "diagonal"])
def test_the_convolution_of_every_geometry_is_as_right_as_torchs_own(mask, geometry, form):
    check_conv(MASKS[mask], 3, 5, geometry)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mask", ["a fifth", "rows in pairs, apart", "diagonal", "everything", "nothing"])
def test_the_convolution_is_as_right_in_every_dtype(mask, dtype, form):
    for geometry in ("3×3", "1×1"):
        check_conv(MASKS[mask], 8, 16, geometry, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("sizes", [(8, 8), (3, 5)], ids=str)
def test_the_linear_layer_of_every_mask_is_as_right_as_torchs_own(mask, sizes, dtype, form):
    tensors = linear_case(mask, *sizes, dtype=dtype)
    keep = elementwise(mask, *sizes, 2)
    dy = torch.randn(7, 2, tensors[1].shape[0], dtype=dtype)
    found = passes(lambda x, w, b: ops.block_linear(x, w, mask, b), tensors, dy)
    wanted = passes(dense(F.linear, keep, torch.float64), tensors, dy)
    assert_right(found, wanted, passes(dense(F.linear, keep, dtype), tensors, dy))
    assert not found[2][~keep].any()


@pytest.mark.parametrize("skipped", [NAN, math.inf, 3.0])
@pytest.mark.parametrize("mask", ["diagonal", "a fifth", "empty column", "equal counts", "nine tenths", "nothing"])
def test_what_skipped_storage_holds_changes_no_bit(mask, skipped, form):
    mask = MASKS[mask]
    for geometry in ("3×3", "1×1"):
        found = []
        for value in (0.0, skipped):
            torch.manual_seed(1)
            tensors, arguments = conv_case(mask, 8, 8, geometry, skipped=value)
            dy = torch.randn(F.conv2d(*tensors, *arguments).shape)
            found.append(passes(lambda x, w, b: ops.block_conv2d(x, w, mask, b, *arguments), tensors, dy))  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    found = []
    for value in (0.0, skipped):
        torch.manual_seed(1)
        tensors, dy = linear_case(mask, 8, 8, skipped=value), torch.randn(7, 2, 8 * len(mask.split("/")))
        found.append(passes(lambda x, w, b: ops.block_linear(x, w, mask, b), tensors, dy))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("backend", "geometry"), [("torch", "3×3"), ("torch", "1×1"), ("triton", "6×1")])
def test_channels_that_no_block_keeps_are_not_read(backend, geometry, monkeypatch):
    """NaN in x where a column is empty and in dy where a row is: only reading or multiplying it would show."""
    skip_always(monkeypatch)
    mask = "1010/0000/0010/1000"  # columns 1 and 3, row 1
    (x, weight, bias), arguments = conv_case(mask, 8, 8, geometry)
    with torch.no_grad():
        x.unflatten(1, (4, 8))[:, 1::2] = NAN
    with decompk.backend(backend):
        y = ops.block_conv2d(x, weight, mask, bias, *arguments)
        dy = torch.randn_like(y)
        dy.unflatten(1, (4, 8))[:, 1] = NAN
        gradients = torch.autograd.grad(y, (x, weight), dy)
    assert torch.equal(y[:, 8:16], bias[8:16].view(1, -1, 1, 1).expand_as(y[:, 8:16]))
    for t in (y, *gradients):
        assert not t.isnan().any()
    assert not gradients[0].unflatten(1, (4, 8))[:, 1::2].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("mask", ["diagonal", "empty column", "everything"])
def test_gradients_of_skipped_blocks_are_the_dense_ones_if_asked_for(backend, mask, monkeypatch):
    skip_always(monkeypatch)
    mask = MASKS[mask]
    tensors, arguments = conv_case(mask, 3, 2, "3×3", N=1)
    keep = elementwise(mask, 3, 2, 4)

    def function(x, weight, bias):
        return ops.block_conv2d(x, weight, mask, bias, *arguments, skipped_gradients=True)

    with decompk.backend(backend):
        y, dx, dw, db = passes(function, tensors, dy := torch.randn(1, len(tensors[2]), 5, 4))
    zeros = (tensors[0], torch.where(keep, tensors[1], 0), tensors[2])
    for found, wanted in zip((y, dx, dw, db), passes(lambda *t: F.conv2d(*t, *arguments), zeros, dy), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    tensors = linear_case(mask, 3, 2)
    found = passes(
        lambda x, w, b: ops.block_linear(x, w, mask, b, skipped_gradients=True),
        tensors,
        dy := torch.randn(7, 2, len(tensors[2])),
    )
    zeros = (tensors[0], torch.where(keep[..., 0, 0], tensors[1], 0), tensors[2])
    for a, wanted in zip(found, passes(F.linear, zeros, dy), strict=True):
        torch.testing.assert_close(a, wanted, atol=1e-5, rtol=1e-5)


# ---- the Triton kernels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "sizes", "geometry", "dtype"),
    [
        ("banded", (8, 8), "1×1", torch.float32),
        ("tall", (3, 5), "3×3, stride 2", torch.float32),
        ("empty column", (5, 3), "2×4, mixed", torch.float32),
        ("empty row", (8, 40), "1×1, stride 2", torch.float32),
        ("empty column", (72, 8), "1×1, padded", torch.float32),
        ("empty row", (4, 4), "3×3, dilated", torch.float32),
        ("one block", (8, 3), "5×5, stride 3", torch.float32),
        ("permuted diagonal", (4, 80), "1×1", torch.float32),
        ("nothing", (8, 8), "3×3", torch.float32),
        ("diagonal", (8, 8), "3×3", torch.float32),
        ("nine tenths", (8, 8), "1×1", torch.float16),
        ("empty row", (16, 8), "3×3", torch.float16),
        ("one block", (3, 8), "3×3, stride 2", torch.float16),
    ],
)
def test_triton_is_as_right_as_torchs_own(mask, sizes, geometry, dtype):
    with decompk.backend("triton"):
        check_conv(MASKS[mask], *sizes, geometry, dtype, N=5 if geometry == "1×1" else 1)  # 75 pixels: tiles, splits


def poisoned(shape, dtype, fill=None):
    """(N, H, W, C) inside a storage of NaN that is 64 values longer at both ends; random or filled."""
    storage = torch.full((64 + math.prod(shape) + 64,), NAN, dtype=dtype)
    inner = storage[64:-64].view(shape)
    inner.normal_() if fill is None else inner.fill_(fill)
    return storage, inner


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("geometry", ["3×3, stride 2", "1×1"])
def test_triton_reads_and_writes_nothing_around_its_operands(dtype, geometry):
    from decompk.kernels import block as block_conv

    kernel, stride, padding, dilation, H, W = GEOMETRIES[geometry]
    mask, out_block, in_block = MASKS["empty row"], 3, 5
    found = choose_blocks(mask, 9, 15, "triton")
    p = Problem("fprop", str(dtype).removeprefix("torch."), 1, 2, 15, 9, H, W, kernel, stride, padding, dilation)
    (_, x), (_, dy) = poisoned((2, H, W, 15), dtype), poisoned((2, *p.out_size, 9), dtype)
    (ys, y), (dxs, dx) = poisoned(dy.shape, dtype, NAN), poisoned(x.shape, dtype, NAN)
    keep = elementwise(mask, out_block, in_block, 4)
    oihw = torch.where(keep, torch.randn(9, 15, *kernel) / 5, NAN).to(dtype)
    _, weight = poisoned((9, *kernel, 15), dtype, 0.0)
    weight.copy_(oihw.permute(0, 2, 3, 1))
    dw = torch.full_like(weight, NAN)
    block_conv.fprop(p, found, x, weight, None, y)
    block_conv.dgrad(p.of("dgrad"), found, dy, weight, dx)
    block_conv.wgrad(p.of("wgrad"), found, dy, x, dw)
    for storage in (ys, dxs):
        assert storage[:64].isnan().all() and storage[-64:].isnan().all(), "memory around the result was written"

    def nchw(t):
        return t.permute(0, 3, 1, 2)

    tensors = nchw(x), oihw, torch.zeros(9, dtype=dtype)
    arguments = stride, padding, dilation
    wanted = passes(dense(F.conv2d, keep, torch.float64, *arguments), tensors, nchw(dy))[:3]
    torchs = passes(dense(F.conv2d, keep, dtype, *arguments), tensors, nchw(dy))[:3]
    for right, own, t in zip(wanted, torchs, (y, dx, dw), strict=True):
        assert_right([nchw(t)] * 4, [right] * 4, [own] * 4)


@pytest.mark.parametrize("geometry", ["6×1", "1×1"])
def test_triton_does_not_see_skipped_storage(geometry):
    found, mask = [], MASKS["empty row"]
    for value in (0.0, NAN):
        torch.manual_seed(1)
        tensors, arguments = conv_case(mask, 8, 5, geometry, N=1, skipped=value)
        with decompk.backend("triton"):
            found.append(passes(lambda x, w, b: ops.block_conv2d(x, w, mask, b, *arguments), tensors))  # noqa: B023
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_weight_gradients_with_and_without_atomics_agree_and_two_passes_repeat_bit_for_bit(monkeypatch):
    from dataclasses import replace

    from decompk.kernels import block as block_conv

    found = choose_blocks("110/011/101", 24, 24, "triton")
    p = Problem("wgrad", "float32", 1, 2, 24, 24, 9, 9, (1, 1))
    dy, x = torch.randn(2, 9, 9, 24), torch.randn(2, 9, 9, 24)
    config = block_conv.config_of(p, found)
    assert config.splits > 1
    results = []
    for atomic in (False, False, True):
        monkeypatch.setattr(block_conv, "config_of", lambda *_: replace(config, atomic=atomic))  # noqa: B023
        block_conv.wgrad(p, found, dy, x, dw := torch.full((24, 1, 1, 24), NAN))
        results.append(dw)
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    wanted = torch.where(elementwise("110/011/101", 8, 8, 2), torch.einsum("nhwo,nhwc->oc", dy.double(), x.double()), 0)
    torch.testing.assert_close(results[0][:, 0, 0].double(), wanted, atol=1e-4, rtol=1e-5)
    monkeypatch.undo()
    large = replace(p, N=512)
    assert block_conv.config_of(large, found).atomic
    assert not block_conv.config_of(replace(large, deterministic=True), found).atomic


def test_the_kernels_that_are_compiled_for_every_architecture_are_all_there_is(monkeypatch):
    from decompk.kernels import block as block_conv
    from decompk.kernels.conv import operands

    monkeypatch.setattr(operands, "interpreted", lambda: False)  # as where they are compiled
    launches = dict(found := list(block_conv.variants()))
    assert len(launches) == len(found), "two kernels of one name"
    seen = {
        (item.kernel.__name__, item.arguments.get("BACKWARD"), item.arguments.get("ATOMIC"))
        for item in launches.values()
    }
    assert seen == {
        ("conv_blocks", False, None),
        ("conv_blocks", True, None),
        ("wgrad_blocks", None, False),
        ("wgrad_blocks", None, True),
    }
    assert {item.arguments["PRECISION"] for item in launches.values()} == {"ieee", "tf32"}


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_the_plan_is_a_pure_function_that_says_why():
    def form(mask, backend="torch", channels=64, **sizes):
        rows = mask.split("/")
        return choose_blocks(mask, channels * len(rows), channels * len(rows[0]), backend, **sizes).form

    for name in ("diagonal", "diagonal of larger blocks", "not square, diagonal"):
        assert form(MASKS[name]) == form(MASKS[name], "triton") == "grouped"
    assert form("11/11") == form("1", "triton") == form("111/110/111") == "dense"
    assert form(MASKS["banded"], "triton") == "dense"
    assert form(MASKS["a fifth"], "triton") == "blocks"
    assert form(MASKS["a fifth"], "triton", channels=4) == "rows"
    assert form(MASKS["a fifth"]) == form(MASKS["a fifth"], taps=9, positions=10**4) == "rows"
    assert form(MASKS["a fifth"], taps=9, positions=10) == form(MASKS["half"], positions=10**4) == "dense"
    assert form("00/00", positions=1) == "rows"

    found = choose_blocks("110000/110000/001100/001100/000011/000011", 12, 24)
    assert found is choose_blocks(
        [[1, 1, 0, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 0, 0]] * 2 + [[0, 0, 0, 0, 1, 1]] * 2, 12, 24
    )
    assert (found.mask, found.out_block, found.in_block) == (((1, 0, 0), (0, 1, 0), (0, 0, 1)), 4, 8)
    assert str(found) == "grouped: 33% of 3×3 blocks of 4×8 channels kept, 3 independent groups"
    found = choose_blocks(MASKS["rows in pairs, apart"], 8, 10)
    assert found.by_rows == (((0, 2), (0, 2, 3)), ((1, 3), (1, 4)))
    assert found.by_columns == (((0, 2), (0, 2, 3)), ((1, 3), (1, 4)))
    assert choose_blocks(MASKS["empty column"], 3, 3).by_columns == (
        ((0, 2), (0,)),
        ((), (1,)),
        ((1, 2), (2,)),
    )


def test_a_mask_is_given_as_text_sequence_or_tensor():
    tensors, arguments = conv_case(MASKS["wide"], 4, 4, "3×3")
    wanted = ops.block_conv2d(tensors[0], tensors[1], MASKS["wide"], None, *arguments)
    rows = [[int(kept) for kept in row] for row in MASKS["wide"].split("/")]
    for mask in (rows, tuple(map(tuple, rows)), torch.tensor(rows, dtype=torch.bool), torch.tensor(rows).float()):
        assert torch.equal(ops.block_conv2d(tensors[0], tensors[1], mask, None, *arguments), wanted)


# ---- as torch sees it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "geometry"), [("diagonal", "3×3, stride 2"), ("banded", "3×3"), ("banded", "1×1")])
def test_the_convolution_keeps_torchs_contract(mask, geometry, monkeypatch):
    skip_always(monkeypatch)
    (x, weight, bias), arguments = conv_case(mask := MASKS[mask], 4, 3, geometry, skipped=0.0)
    torch.library.opcheck(CONV, (x, weight, bias, mask, *arguments, geometry == "1×1"))
    grad = torch.randn_like(CONV(x, weight, None, mask, *arguments, False))
    backward = grad, x.detach(), weight.detach(), mask, *arguments, False, [True, True, geometry == "1×1"]
    torch.library.opcheck(CONV_BACKWARD, backward)


@pytest.mark.parametrize("mask", ["diagonal", "equal counts", "banded"])
def test_the_linear_layer_keeps_torchs_contract(mask, monkeypatch):
    skip_always(monkeypatch)
    x, weight, bias = linear_case(mask := MASKS[mask], 4, 3, dtype=torch.float64, skipped=0.0)
    torch.library.opcheck(LINEAR, (x, weight, bias, mask, False))
    grad = torch.randn(7, 2, len(bias), dtype=torch.float64)
    torch.library.opcheck(LINEAR_BACKWARD, (grad, x.detach(), weight.detach(), mask, False, [True, True, False]))


@pytest.mark.parametrize("mask", ["diagonal", "banded"])
def test_compiled_in_one_graph_and_counted(mask):
    text = MASKS[mask]
    rows = tuple(tuple(kept == "1" for kept in row) for row in text.split("/"))
    tensors, _ = conv_case(text, 4, 4, "3×3")
    matrix = torch.randn(8, 16, requires_grad=True)

    def loss(x, weight, bias, matrix):
        y = ops.block_conv2d(x, weight, rows, bias, 2, 1).relu()
        return ops.block_linear(y.mean((2, 3)), matrix, text.replace("/", "")[:4] + "/" + "0110").square().sum()

    tensors = *tensors, matrix
    wanted = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, right in zip(torch.autograd.grad(compiled(*tensors), tensors), wanted, strict=True):
        torch.testing.assert_close(found, right)
    with FlopCounterMode(display=False) as counter:
        loss(*tensors).backward()
    kept, of_linear = text.count("1"), text[:4].count("1") + 2
    assert counter.get_total_flops() == 3 * 2 * (2 * 3 * 2 * kept * 4 * 4 * 9 + 2 * of_linear * 4 * 4)


def test_gradients_that_nobody_asks_for_are_not_computed():
    tensors, arguments = conv_case(MASKS["banded"], 8, 8, "3×3")
    x, weight, bias = tensors
    y = ops.block_conv2d(x.detach(), weight, MASKS["banded"], bias.detach(), *arguments)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 20 * 10 * 8 * 8 * 9
    assert x.grad is None and bias.grad is None and weight.grad is not None


def test_autocast_casts_to_its_dtype():
    tensors, arguments = conv_case(MASKS["banded"], 8, 8, "3×3")
    x, weight, bias = tensors
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.block_conv2d(x, weight, MASKS["banded"], bias, *arguments)
        assert y.dtype == torch.bfloat16
        assert torch.autograd.grad(y.float().sum(), weight)[0].dtype == torch.float32
        x, weight, bias = linear_case(MASKS["banded"], 8, 8)
        assert ops.block_linear(x, weight, MASKS["banded"], bias).dtype == torch.bfloat16
        assert ops.block_linear(x.double(), weight.double(), MASKS["banded"]).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
def test_every_memory_format_and_padding_of_torchs_gives_the_same():
    (x, weight, bias), _ = conv_case(MASKS["banded"], 4, 4, "2×4, mixed", skipped=0.0)
    wanted = F.conv2d(x, weight, bias, 1, "same")
    for image in (x, x.contiguous(), torch.cat([x, x], 1)[:, :16]):
        y = ops.block_conv2d(image, weight.contiguous(), MASKS["banded"], bias, 1, "same")
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(ops.block_conv2d(x[0], weight, MASKS["banded"], bias, 1, "same"), wanted[0])
    expanded = torch.autograd.grad(ops.block_conv2d(x, weight, MASKS["banded"]).sum(), x)
    torch.testing.assert_close(expanded, torch.autograd.grad(F.conv2d(x, weight).sum(), x))


def test_an_empty_batch_gives_an_empty_output_and_zero_gradients():
    for backend in ("torch", "triton"):
        for mask in (MASKS["diagonal"], MASKS["banded"]):
            tensors, arguments = conv_case(mask, 8, 8, "3×3", N=0)
            with decompk.backend(backend):
                y, dx, dw, db = passes(lambda x, w, b: ops.block_conv2d(x, w, mask, b, *arguments), tensors)  # noqa: B023
            assert y.shape == (0, 32, 5, 4) and dx.shape == tensors[0].shape
            assert dw.shape == tensors[1].shape and not dw.any() and not db.any()
    tensors = linear_case(MASKS["banded"], 8, 8, N=0)
    y, dx, dw, db = passes(lambda x, w, b: ops.block_linear(x, w, MASKS["banded"], b), tensors)
    assert y.shape == (0, 2, 32) and dx.shape == (0, 2, 32) and not dw.any() and not db.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda x, w, m, b: (x[0, 0], w, m, b), r"takes x \(N, C, H, W\)"),
        (lambda x, w, m, b: (x, w[0], m, b), "takes x"),
        (lambda x, w, m, b: (x.half(), w, m, b), "x is torch.float16, weight is torch.float32"),
        (
            lambda x, w, m, b: (x.int(), w.int(), m, None),
            "block_conv2d takes real floating dtypes, and weight is torch.int32",
        ),
        (lambda x, w, m, b: (x, w, m, b.double()), "bias is torch.float64"),
        (lambda x, w, m, b: (x[:, :8], w, m, b), "x has 8 channels, and weight .* takes 32"),
        (lambda x, w, m, b: (x, w, m, b[:3]), r"has to be \(O\)"),
        (lambda x, w, m, b: (x, w, m, b, 0), "stride"),
        (lambda x, w, m, b: (x, w, m, b, 1, -1), "padding"),
        (lambda x, w, m, b: (x, w, m, b, 1, 0, 4), "does not fit images"),
        (lambda x, w, m, b: (x.to("meta"), w, m, b), "x is on meta and weight on cpu"),
        (lambda x, w, m, b: (x, w, "10/01/11", b), "32 output channels do not divide into the 3 rows"),
        (lambda x, w, m, b: (x, w, "101/011", b), "32 input channels do not divide into the 3 columns"),
        (lambda x, w, m, b: (x, w, "10/0", b), "not a rectangle"),
        (lambda x, w, m, b: (x, w, "12/01", b), "kept .1. or skipped .0."),
        (lambda x, w, m, b: (x, w, "", b), "not a rectangle"),
        (lambda x, w, m, b: (x, w, [[1, 2], [0, 1]], b), "kept .1. or skipped .0."),
        (lambda x, w, m, b: (x, w, [[0.5, 1], [0, 1]], b), "kept .1. or skipped .0."),
        (lambda x, w, m, b: (x, w, [1, 0], b), "two dimensions"),
        (lambda x, w, m, b: (x, w, torch.ones(2, 2, 2), b), "two dimensions"),
        (lambda x, w, m, b: (x, w, torch.ones(2, 2, device="meta"), b), "block_mask is on meta"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(arguments, message):
    tensors, _ = conv_case(MASKS["banded"], 8, 8, "3×3")
    x, weight, bias = (t.detach() for t in tensors)
    with pytest.raises(DecompkError, match=message) as caught:
        ops.block_conv2d(*arguments(x, weight, MASKS["banded"], bias))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_the_linear_layer_and_triton_refuse_by_name():
    x, weight, bias = (t.detach() for t in linear_case(MASKS["banded"], 8, 8))
    for call, message in (
        (lambda: ops.block_linear(x, weight[None], "1"), r"takes x \(…, C\)"),
        (lambda: ops.block_linear(x[..., :8], weight, "1"), "x has 8 channels"),
        (lambda: ops.block_linear(x, weight, "111/111"), "32 input channels do not divide"),
        (lambda: ops.block_linear(x, weight, "1", bias[:3]), r"has to be \(O\)"),
        (lambda: ops.block_linear(x, weight[:0], "1"), "only the batch may be empty"),
        (lambda: ops.block_linear(x.double(), weight, "1"), "block_linear needs one floating dtype"),
    ):
        with pytest.raises(DecompkError, match=message):
            call()
    tensors, arguments = conv_case(MASKS["banded"], 8, 8, "3×3", dtype=torch.float64)
    with pytest.raises(decompk.BackendError, match="float64"), decompk.backend("triton"):
        ops.block_conv2d(tensors[0], tensors[1], MASKS["banded"], None, *arguments)
    from decompk.kernels import block as block_conv

    found = choose_blocks(MASKS["banded"], 16, 16, "triton")
    sizes = (16, 16, 16, 16, (3, 3), (1, 1), (1, 1))
    assert block_conv.why_not(Problem("fprop", "bfloat16", 1, 2**22, *sizes), found) is None
    assert "pixels" in block_conv.why_not(Problem("fprop", "bfloat16", 1, 2**23, *sizes), found)
    wide = Problem("fprop", "bfloat16", 1, 1, 2**15, 2**15, 4, 4, (3, 3))
    assert "weights" in block_conv.why_not(wide, choose_blocks("110/011/000/001", 2**15, 3 * 2**15, "triton"))
