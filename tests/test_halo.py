"""The halo kernels, built for the host with g++: against float64, with poison all around, and with faults put in."""
# ruff: noqa: E402 (the tools stand beside the package)

import ctypes
import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_right, surroundings

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools")]

import build_ext

import decompk
from decompk.errors import BackendError
from decompk.kernels import conv, extension
from decompk.kernels import device as devices
from decompk.kernels.conv.halo import blocks
from decompk.kernels.layout import strides_of as layout_strides
from decompk.kernels.problem import Config, Epilogue, Problem, Prologue

halo = conv.named("halo")

NAN = float("nan")
BEFORE = 64  # values of poison at both ends of a storage


@pytest.fixture(scope="session", autouse=True)
def emulation():
    """The emulation's library, built if its sources are newer, for ctypes."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: the emulation cannot be built")
    return ctypes.CDLL(str(build_ext.build(emulation=True)))


@pytest.fixture
def faults(emulation):
    """faults(without_barriers, shortened) breaks the emulation until the test ends."""
    call = emulation.halo_emulation_break
    call.argtypes = [ctypes.c_bool, ctypes.c_int64]
    yield call
    call(False, 0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the kernels run: in the emulation, and on a GPU where there is one and the extension is built."""
    if request.param == "cuda" and (reason := extension.why_not("cuda")):
        pytest.skip(reason)
    return request.param


def counted(emulation):
    """What the emulation did since it was last asked, by name."""
    values = (ctypes.c_int64 * 5)()
    emulation.halo_emulation_counts(values)
    return dict(zip(("matrices", "bank_conflicts", "products", "bytes_read", "bytes_written"), values, strict=True))


def strides(layout, shape):
    """Strides of (K, N, H, W, C): "member", "channel-grouped", or "gaps": rows 3 pixels and pixels 5 values longer."""
    K, N, H, W, C = shape
    if layout == "gaps":
        pixel, row = C + 5, (W + 3) * (C + 5)
        return N * H * row, H * row, row, pixel, 1
    k, n, c, h, w = layout_strides(layout, (K, N, C, H, W))
    return k, n, h, w, c


def poisoned(layout, shape, dtype, fill=None, shift=0, device="cpu"):
    """(K, N, H, W, C), random or filled, in a storage of NaN; `shift` values past an aligned address."""
    by = strides(layout, shape)
    last = sum((size - 1) * stride for size, stride in zip(shape, by, strict=True))
    storage = torch.full((BEFORE + shift + last + 1 + BEFORE,), NAN, dtype=dtype, device=device)
    t = storage.as_strided(shape, by, BEFORE + shift)
    return t.normal_() if fill is None else t.fill_(fill)


def conv(x, weight, p, dtype):
    """The convolutions of NHWC x by torch, member by member, in `dtype` on the CPU."""
    x, weight = (t.cpu().to(dtype).movedim(-1, 2).contiguous() for t in (x, weight))
    return torch.stack([F.conv2d(a, b, None, p.stride, p.padding) for a, b in zip(x, weight, strict=True)]).movedim(
        2, -1
    )


def gradient(dy, weight, p, dtype):
    """The input gradients, likewise."""
    dy, weight = (t.cpu().to(dtype).movedim(-1, 2).contiguous() for t in (dy, weight))
    shape = (p.N, p.C, p.H, p.W)
    found = [torch.nn.grad.conv2d_input(shape, b, a, p.stride, p.padding) for a, b in zip(dy, weight, strict=True)]
    return torch.stack(found).movedim(2, -1)


def problem(K, N, C, O, H, W, stride=1, padding=1, dtype="bfloat16"):
    padding = padding if isinstance(padding, tuple) else (padding,) * 2
    return Problem("fprop", dtype, K, N, C, O, H, W, (3, 3), (stride,) * 2, padding)


def config_of(p, tile):
    """The Config of this tile, its warps counted."""
    block_in, block_out = blocks(p.C, p.O)
    config = Config("halo", tile, block_in, block_out)
    parts = -(-(block_out if p.kind == "fprop" else block_in) // 32)
    config = replace(config, warps=config.pixels // 64 * parts, stages=2)
    assert halo.fits(p, config) is None
    return config


def weights(p):
    return (torch.randn(p.K, p.O, 3, 3, p.C) / (9 * p.C) ** 0.5).to(getattr(torch, p.dtype))


CASES = {
    "one pixel": (problem(2, 1, 8, 8, 1, 1), (2, 4, 8), "member"),
    "wide rows, many tiles": (problem(2, 2, 8, 16, 9, 37), (1, 8, 16), "member"),
    "four images a warp": (problem(2, 9, 16, 16, 5, 4, dtype="float16"), (8, 4, 4), "member"),
    "four images a warp, stride 2": (problem(1, 6, 16, 8, 9, 7, 2), (4, 8, 4), "channel-grouped"),
    "three channels, five members": (problem(5, 2, 3, 12, 7, 6), (2, 8, 8), "member"),
    "four channels, stride 2": (problem(3, 2, 4, 4, 11, 18, 2, dtype="float16"), (1, 8, 16), "member"),
    "four channels, grouped": (problem(4, 1, 4, 8, 6, 6), (2, 8, 8), "channel-grouped"),
    "12 → 24, no padding": (problem(3, 2, 12, 24, 10, 9, 1, 0), (2, 8, 8), "channel-grouped"),
    "24 → 12, stride 2, no padding": (problem(2, 3, 24, 12, 10, 9, 2, 0, "float16"), (4, 4, 4), "gaps"),
    "16 → 32, padding of one axis": (problem(2, 2, 16, 32, 6, 17, 1, (1, 0)), (1, 16, 16), "channel-grouped"),
    "32 → 16, padding 2": (problem(2, 1, 32, 16, 5, 7, 1, (0, 2)), (2, 4, 16), "member"),
    "32 → 32": (problem(2, 3, 32, 32, 7, 7), (4, 8, 8), "gaps"),
    "40 → 48": (problem(2, 1, 40, 48, 8, 9), (1, 8, 16), "channel-grouped"),
    "48 → 40, stride 2": (problem(1, 2, 48, 40, 9, 11, 2, dtype="float16"), (1, 4, 16), "member"),
    "64 → 32": (problem(1, 2, 64, 32, 5, 5), (2, 4, 16), "member"),
    "32 → 64, stride 2": (problem(1, 1, 32, 64, 9, 18, 2), (1, 8, 16), "member"),
    "64 → 64": (problem(2, 3, 64, 64, 4, 4, dtype="float16"), (4, 4, 8), "member"),
    "3 → 64": (problem(1, 1, 3, 64, 6, 7), (2, 4, 16), "gaps"),
    "64 → 5": (problem(1, 1, 64, 5, 6, 7), (2, 8, 8), "gaps"),
    "odd channels, gaps": (problem(2, 2, 5, 7, 5, 6), (4, 4, 8), "gaps"),
}


@pytest.mark.parametrize(("p", "tile", "layout"), CASES.values(), ids=CASES)
def test_each_pass_is_as_right_as_torchs_own_and_reads_and_writes_nothing_else(p, tile, layout, device):
    dtype = getattr(torch, p.dtype)
    inputs, outputs = (p.K, p.N, p.H, p.W, p.C), (p.K, p.N, *p.out_size, p.O)
    weight = weights(p).to(device)
    x, y = poisoned(layout, inputs, dtype, device=device), poisoned(layout, outputs, dtype, NAN, device=device)
    around = surroundings(y)
    halo.fprop(p, config_of(p, tile), x, weight, y)
    assert_right(y, conv(x, weight, p, torch.float64), conv(x, weight, p, dtype), "y")
    assert torch.equal(around, surroundings(y)), "memory around y was written"

    if p.stride == (1, 1):
        p = p.of("dgrad")
        columns = tile[2]
        tile = (32 // columns, 4, columns)  # of few pixels, so that 64 channels have 4 warps, too
        dy, dx = poisoned(layout, outputs, dtype, device=device), poisoned(layout, inputs, dtype, NAN, device=device)
        around = surroundings(dx)
        halo.dgrad(p, config_of(p, tile), dy, weight, dx)
        assert_right(dx, gradient(dy, weight, p, torch.float64), gradient(dy, weight, p, dtype), "dx")
        assert torch.equal(around, surroundings(dx)), "memory around dx was written"


@pytest.mark.parametrize("shift", [1, 2, 4, 8])
def test_any_alignment_of_base_addresses_and_weights(shift):
    p = problem(2, 1, 8, 16, 5, 9)
    x, y = (poisoned("member", (2, 1, 5, 9, c), torch.bfloat16, fill, shift) for c, fill in ((8, None), (16, NAN)))
    storage = torch.full((shift + 2 * 16 * 9 * 8,), NAN, dtype=torch.bfloat16)
    weight = storage[shift:].view(2, 16, 3, 3, 8).copy_(weights(p))
    around = surroundings(y)
    halo.fprop(p, config_of(p, (1, 8, 16)), x, weight, y)
    assert_right(y, conv(x, weight, p, torch.float64), conv(x, weight, p, torch.bfloat16), "y")
    assert torch.equal(around, surroundings(y))


FLAGS = ("bias", "moments", "affine", "residual", "relu", "prologue", "in_relu")
ALONE = [{"bias"}, {"moments"}, {"affine", "relu"}, {"residual"}, {"relu"}, {"prologue"}, {"prologue", "in_relu"}]


@pytest.mark.parametrize("flags", [*ALONE, {"bias", "moments"}, set(FLAGS)], ids=lambda f: "+".join(sorted(f)))
@pytest.mark.parametrize(
    ("p", "tile", "layout"),
    [
        (problem(2, 3, 8, 7, 9, 7), (2, 8, 8), "member"),  # odd channels
        (problem(2, 5, 16, 16, 5, 5, 2, dtype="float16"), (8, 4, 4), "channel-grouped"),
        (problem(1, 1, 64, 64, 9, 18), (1, 8, 16), "member"),
        (problem(2, 1, 12, 24, 9, 18, 2), (1, 8, 16), "gaps"),
    ],
    ids=["8 → 7", "16 → 16, stride 2", "64 → 64", "12 → 24, stride 2"],
)
def test_every_flag_of_prologue_and_epilogue(p, tile, layout, flags, device):
    dtype, config = getattr(torch, p.dtype), config_of(p, tile)
    outputs = (p.K, p.N, *p.out_size, p.O)
    x = poisoned(layout, (p.K, p.N, p.H, p.W, p.C), dtype, device=device)
    y, residual = (poisoned(layout, outputs, dtype, fill, device=device) for fill in (NAN, None))
    weight, bias = weights(p).to(device), torch.randn(p.K, p.O, device=device)
    bias = bias.to(dtype if len(flags) < 3 else torch.float64)
    scale, shift, in_scale, in_shift = (torch.randn(p.K, c, device=device) for c in (p.O, p.O, p.C, p.C))
    pieces = torch.full((p.K, halo.moments_pieces(p, config), 3, p.O), NAN, device=device)
    around = surroundings(y)

    epilogue = Epilogue(
        bias if "bias" in flags else None,
        *((scale, shift) if "affine" in flags else (None, None)),
        residual if "residual" in flags else None,
        "relu" in flags,
        pieces if "moments" in flags else None,
    )
    prologue = Prologue(in_scale, in_shift, "in_relu" in flags) if "prologue" in flags else None
    halo.fprop(p, config, x, weight, y, epilogue, prologue)
    assert torch.equal(around, surroundings(y))
    x, y, residual, bias, pieces = (t.cpu() for t in (x, y, residual, bias, pieces))
    scale, shift, in_scale, in_shift = (t.cpu() for t in (scale, shift, in_scale, in_shift))

    def channels(t):
        return t.double()[:, None, None, None]

    value = x
    if prologue:  # rounded to x's dtype, as an operator before would
        value = torch.addcmul(channels(in_shift), x.double(), channels(in_scale)).float()
        value = (value.relu() if prologue.relu else value).to(dtype)
    wanted = conv(value, weight, p, torch.float64)
    wanted = wanted + channels(bias) if "bias" in flags else wanted
    before = wanted
    wanted = wanted * channels(scale) + channels(shift) if "affine" in flags else wanted
    wanted = wanted + residual.double() if "residual" in flags else wanted
    wanted = wanted.relu() if "relu" in flags else wanted
    assert_right(y, wanted, wanted.to(dtype), "y")  # no more than rounding once costs, twice
    if "moments" in flags:
        summed = y.double() if flags <= {"bias", "moments"} else before.to(dtype).double()
        tolerance = 1e-6 if flags <= {"bias", "moments"} else 1e-3  # else some values round to the other side
        count, means, m2 = pieces.double().unbind(2)
        mean = (count * means).sum(1) / count.sum(1)
        var = (m2 + count * (means - mean[:, None]) ** 2).sum(1) / count.sum(1)
        wanted_var, wanted_mean = torch.var_mean(summed, (1, 2, 3), correction=0)
        assert (count.sum(1) == y[0, ..., 0].numel()).all()
        torch.testing.assert_close(mean, wanted_mean, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(var, wanted_var, atol=tolerance, rtol=tolerance)


def test_moments_are_exact_far_from_zero_and_repeat_bit_for_bit():
    p = problem(1, 2, 8, 8, 9, 9, dtype="float16")
    config, bias = config_of(p, (2, 8, 8)), torch.full((1, 8), 500.0)
    x, weight = torch.randn(1, 2, 9, 9, 8).half(), weights(p)
    found = []
    for _ in range(2):
        y, moments = torch.empty(1, 2, 9, 9, 8).half(), torch.empty(1, halo.moments_pieces(p, config), 3, 8)
        halo.fprop(p, config, x, weight, y, Epilogue(bias, moments=moments))
        found.append(moments)
    assert torch.equal(*found)
    count, means, m2 = found[0].double().unbind(2)
    mean = (count * means).sum(1) / count.sum(1)
    var = (m2 + count * (means - mean[:, None]) ** 2).sum(1) / count.sum(1)
    torch.testing.assert_close(
        var, y.double().var((1, 2, 3), correction=0), rtol=1e-4, atol=0
    )  # sums of squares: 100 %


def test_a_nan_reaches_its_own_members_neighbourhood_and_nothing_else_and_relu_keeps_it():
    p = problem(3, 2, 12, 16, 7, 9)
    for layout in ("member", "channel-grouped"):
        x, weight, config = poisoned(layout, (3, 2, 7, 9, 12), torch.bfloat16), weights(p), config_of(p, (1, 8, 16))
        scale, shift = torch.ones(3, 12), torch.zeros(3, 12)
        results = []
        for value in (1.0, NAN):
            x[1, 0, 3, 4, 5] = value
            y = poisoned(layout, (3, 2, 7, 9, 16), torch.bfloat16, 0.0)
            halo.fprop(p, config, x, weight, y, Epilogue(relu=True), Prologue(scale, shift))
            results.append(y)
        clean, spoiled = results
        reached = torch.zeros(3, 2, 7, 9, 16, dtype=torch.bool)
        reached[1, 0, 2:5, 3:6] = True
        assert torch.equal(spoiled.isnan(), reached)
        assert torch.equal(clean[~reached], spoiled[~reached])


def test_every_input_byte_is_read_once_and_every_output_byte_written_once(emulation):
    p = problem(2, 1, 16, 24, 8, 16)
    x, weight, y = torch.randn(2, 1, 8, 16, 16).bfloat16(), weights(p), torch.empty(2, 1, 8, 16, 24).bfloat16()
    counted(emulation)
    halo.fprop(p, config_of(p, (1, 8, 16)), x, weight, y)
    did = counted(emulation)
    assert did["bytes_read"] == (x.numel() + weight.numel()) * 2
    assert did["bytes_written"] == y.numel() * 2


def test_no_matrix_is_loaded_with_a_bank_conflict_and_products_are_those_of_the_formula(emulation):
    for c, stride, columns in itertools.product((8, 16, 32, 64), (1, 2), (4, 8, 16)):
        p = problem(1, 1, c, c, 5, 6, stride)
        config = config_of(p, (16 // columns, 4, columns))
        counted(emulation)
        x, y = torch.randn(1, 1, 5, 6, c).bfloat16(), torch.empty(1, 1, *p.out_size, c).bfloat16()
        halo.fprop(p, config, x, weights(p), y)
        did = counted(emulation)
        assert did["matrices"] > 0
        assert did["bank_conflicts"] == 0, (c, stride, columns)
        if c > 8:
            assert did["products"] * 2 * 16 * 8 * 16 == halo.executed_flops(p, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["x", "y"])
def test_offsets_beyond_2_to_the_31_values(which, dtype):
    p = problem(1, 2, 8, 8, 4, 4, dtype=str(dtype).removeprefix("torch."))
    tensors = {name: torch.empty(1, 2, 4, 4, 8, dtype=dtype) for name in "xy"}
    far = torch.empty(2**31 + 2**10, dtype=dtype)  # of which only the used pages become real
    tensors[which] = far.as_strided((1, 2, 4, 4, 8), (2**31, 2**31, 32, 8, 1))
    x, y, weight = tensors["x"].normal_(), tensors["y"].fill_(NAN), weights(p)
    halo.fprop(p, config_of(p, (2, 8, 8)), x, weight, y)
    assert_right(y, conv(x, weight, p, torch.float64), conv(x, weight, p, dtype), "y")


# ---- the emulation itself: each of its traps must spring -------------------------------------------------------------


@pytest.mark.parametrize("c", [3, 4, 8, 64])
def test_an_access_past_the_end_of_a_tensor_is_trapped(faults, c):
    p = problem(1, 1, c, c, 4, 4)
    x, weight, y = torch.randn(1, 1, 4, 4, c).bfloat16(), weights(p), torch.empty(1, 1, 4, 4, c).bfloat16()
    halo.fprop(p, config_of(p, (2, 4, 8)), x, weight, y)
    faults(False, 2)  # every tensor is one value shorter than the parameters say
    with pytest.raises(RuntimeError, match="global (read|write) out of bounds"):
        halo.fprop(p, config_of(p, (2, 4, 8)), x, weight, y)


@pytest.mark.parametrize("c", [4, 8, 16, 64])
@pytest.mark.parametrize("flag", ["plain", "moments"])
def test_a_missing_barrier_is_noticed(faults, c, flag):
    p = problem(1, 1, c, c, 16, 16)
    config = config_of(p, (1, 8, 16))
    x, weight, y = torch.randn(1, 1, 16, 16, c).bfloat16(), weights(p), torch.empty(1, 1, 16, 16, c).bfloat16()
    moments = torch.empty(1, halo.moments_pieces(p, config), 3, c) if flag == "moments" else None
    halo.fprop(p, config, x, weight, y, Epilogue(moments=moments))
    faults(True, 0)
    with pytest.raises(RuntimeError, match="race|in flight"):
        halo.fprop(p, config, x, weight, y, Epilogue(moments=moments))


# ---- what stands around the kernels ----------------------------------------------------------------------------------


def test_every_candidate_is_legal_and_right():
    for C, O, H, stride in itertools.product((3, 16, 64), (8, 32), (1, 4, 7, 18), (1, 2)):
        for kind in ("fprop", "dgrad")[: 3 - stride]:
            p = problem(2, 3, C, O, H, H, stride).of(kind)
            found = halo.configs(p)
            assert found
            assert len(set(found)) == len(found)
            assert [halo.fits(p, c) for c in found] == [None] * len(found)
            assert any(halo.shared_bytes(p, c) <= 166_912 for c in found), "none for an A100"
            assert all(0 < halo.rate(p, c, devices.KNOWN[90]) <= 0.6 for c in found)
            assert all(halo.programs(p, c) * c.pixels >= p.K * p.N * p.out_size[0] ** 2 for c in found)
    p = problem(2, 1, 40, 24, 6, 6)
    x, weight = torch.randn(2, 1, 6, 6, 40).bfloat16(), weights(p)
    for config in halo.configs(p):
        y = torch.full((2, 1, 6, 6, 24), NAN).bfloat16()
        halo.fprop(p, config, x, weight, y)
        assert_right(y, conv(x, weight, p, torch.float64), conv(x, weight, p, torch.bfloat16), config)


def test_illegal_problems_and_configs_are_named():
    p = problem(2, 8, 32, 64, 14, 14)
    good = halo.configs(p)[0]
    for wrong, config, word in (
        (p.of("wgrad"), good, "no weight gradient"),
        (replace(p, dtype="float32"), good, "bfloat16"),
        (replace(p, kernel=(5, 5)), good, "3×3"),
        (replace(p, stride=(2, 1)), good, "stride"),
        (replace(p, dilation=(2, 2)), good, "dilated"),
        (replace(p, padding=(3, 1)), good, "padding"),
        (replace(p, kind="dgrad", stride=(2, 2)), good, "gradients of stride 1"),
        (replace(p, layout="crops"), good, "crops"),
        (replace(p, C=65), good, "64 channels"),
        (replace(p, K=65536), good, "members"),
        (p, replace(good, block_in=64), "blocks (32, 64)"),
        (p, replace(good, tile=(1, 8, 32)), "columns"),
        (p, replace(good, tile=(1, 2, 16)), "rows"),
        (p, replace(good, warps=4), "warps"),
        (p, replace(good, stages=3), "stages"),
    ):
        reason = halo.fits(wrong, config)
        assert reason and word in reason, (reason, word)
    for wrong in (replace(p, C=512, O=2048), replace(p, kernel=(1, 1), stride=(4, 3)), p.of("wgrad")):
        assert halo.configs(wrong)
        assert all(halo.fits(wrong, config) for config in halo.configs(wrong))


def test_wrong_tensors_are_refused_by_name():
    p = problem(2, 1, 8, 8, 4, 4)
    config = config_of(p, (2, 4, 8))
    x, weight, y = torch.randn(2, 1, 4, 4, 8).bfloat16(), weights(p), torch.empty(2, 1, 4, 4, 8).bfloat16()
    for wrong, word in (
        ((x.float(), weight, y), "bf16"),
        ((x, weight.half(), y), "weight"),
        ((x, weight[:, :4].contiguous(), y), "weight"),
        ((x, weight, y[:, :, :3]), "y"),
        ((x.movedim(-1, 2).contiguous().movedim(2, -1), weight, y), "channels of x"),
    ):
        with pytest.raises(RuntimeError, match=word):
            halo.fprop(p, config, *wrong)
    with pytest.raises(RuntimeError, match="the tile's pixels"):
        halo.fprop(p, replace(config, warps=2), x, weight, y)
    p = problem(1, 1, 64, 64, 4, 4, 2)
    x, weight, y = torch.randn(1, 1, 4, 4, 64).bfloat16(), weights(p), torch.empty(1, 1, 2, 2, 64).bfloat16()
    with pytest.raises(RuntimeError, match="does not fit"):
        halo.fprop(p, config_of(p, (1, 16, 16)), x, weight, y)


def test_moments_of_another_number_of_pieces_are_refused():
    p = problem(2, 1, 8, 8, 4, 4)
    config = config_of(p, (2, 4, 8))
    x, weight, y = torch.randn(2, 1, 4, 4, 8).bfloat16(), weights(p), torch.empty(2, 1, 4, 4, 8).bfloat16()
    with pytest.raises(RuntimeError, match="moments has the wrong shape"):
        halo.fprop(p, config, x, weight, y, Epilogue(moments=torch.empty(2, 7, 3, 8)))


def test_where_the_extension_is_not_built_one_sentence_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "LIBRARIES", tmp_path)
    assert extension.why_not("cuda") == "the extension is not built: run python tools/build_ext.py"
    extension.load.cache_clear()
    with pytest.raises(BackendError, match="run python tools/build_ext.py --emulation"):
        extension.load("emulation")


def test_which_machine_code_runs_on_which_device():
    runs = {"80": [(8, 0), (8, 6), (8, 9)], "90": [(9, 0)], "90a": [(9, 0)], "100": [(10, 0), (10, 3)]}
    for architecture, capability in itertools.product(runs, [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3)]):
        assert extension.runs_on(architecture, capability) == (capability in runs[architecture])
    assert not extension.runs_on("86", (8, 0))
    assert not extension.runs_on("100a", (10, 3))


def test_nothing_is_built_twice_and_a_missing_compiler_is_named(tmp_path, monkeypatch, capsys):
    library = build_ext.build(emulation=True)
    built = library.stat().st_mtime_ns
    assert build_ext.build(emulation=True).stat().st_mtime_ns == built
    monkeypatch.setattr(build_ext, "SOURCES", tmp_path)  # other sources than it was built from
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sys, "argv", ["build_ext.py", "--emulation"])
    assert build_ext.main() == 1
    assert capsys.readouterr().err == "g++ is not installed: there is none in CUDA_HOME, PATH or /usr/local/cuda.\n"
    assert library.stat().st_mtime_ns == built


def _cut(library, beside):
    library.write_bytes(library.read_bytes()[:-4096])


def _of_another_build(library, beside):
    beside.write_text(beside.read_text().replace('"sha256": "', '"sha256": "0'))


DAMAGES = [_cut, _of_another_build, lambda library, beside: beside.unlink()]
for text in ("", "null", "5", "[]", "{}", '{"sha256": 1, "architectures": [80]}', "[" * 200_000, b"\xff"):
    content = text if isinstance(text, bytes) else text.encode()
    DAMAGES.append(lambda library, beside, content=content: beside.write_bytes(content))


@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_extension_is_not_loaded_and_is_built_again(tmp_path, monkeypatch, damage):
    library = Path(shutil.copy(build_ext.build(emulation=True), tmp_path))
    beside = Path(shutil.copy(extension.library("emulation").with_suffix(".json"), tmp_path))
    made = {name: value for name, value in json.loads(beside.read_text()).items() if name != "sha256"}
    assert build_ext._is_built(library, beside, made)
    damage(library, beside)
    assert not build_ext._is_built(library, beside, made)
    monkeypatch.setattr(extension, "LIBRARIES", tmp_path)
    monkeypatch.setattr(extension, "_load", extension._load.__wrapped__)
    monkeypatch.setattr(torch.ops, "load_library", None)  # would raise
    assert extension.why_not("emulation") == "the extension is damaged: run python tools/build_ext.py --emulation"
    library.rename(extension.library("cuda"))
    if beside.exists():
        beside.rename(extension.library("cuda").with_suffix(".json"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert extension.why_not("cuda") == "the extension is damaged: run python tools/build_ext.py"


@pytest.mark.parametrize("layout", ["member", "channel-grouped"])
def test_the_operator_runs_on_it_where_it_is_asked_for(layout):
    shape, geometry = (3, 2, 12, 9, 7), ((1, 1), (1, 1))
    x = torch.empty_strided(shape, layout_strides(layout, shape), dtype=torch.bfloat16).normal_().requires_grad_()
    weight, bias = (t.bfloat16() for t in (torch.randn(3, 20, 12, 3, 3) / 10, torch.randn(3, 20)))
    with decompk.backend("emulation"):
        y = decompk.ops.grouped_conv2d(x, weight, bias, *geometry)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
    with decompk.backend("torch"):
        theirs = decompk.ops.grouped_conv2d(x, weight, bias, *geometry)
        (their_dx,) = torch.autograd.grad(theirs.square().sum(), x)
    assert y.stride() == theirs.stride()
    exact = torch.stack([F.conv2d(*(t.double() for t in one), *geometry) for one in zip(x, weight, bias, strict=True)])
    error, others = ((t.double() - exact).norm() / exact.norm() for t in (y, theirs))
    assert error <= 2 * others + 1e-6
    assert (dx - their_dx).float().norm() <= 0.02 * their_dx.float().norm()
    with decompk.backend("emulation"), pytest.raises(BackendError, match="bfloat16 and float16"):
        decompk.ops.grouped_conv2d(x.float(), weight.float(), None, *geometry)
