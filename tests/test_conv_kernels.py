"""The Triton convolutions in the interpreter, against float64: every form, pass and flag, with poison all around."""

from dataclasses import replace

import by_config
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_right, surroundings

from decompk.kernels import conv, device
from decompk.kernels.launch import recording
from decompk.kernels.layout import strides_of
from decompk.kernels.problem import Config, Epilogue, Offsets, Problem, Prologue

H100 = device.KNOWN[90]
NAN = float("nan")


def poisoned(layout, shape, dtype, fill=None):
    """(K, N, C, H, W) in `layout`, random or filled, inside a storage of NaN that is 64 values longer at both ends."""
    storage = torch.full((64 + torch.Size(shape).numel() + 64,), NAN, dtype=dtype)
    if layout == "strided":  # rows of W + 3 pixels, of which 3 are poison
        K, N, C, H, W = shape
        storage = torch.full((64 + K * N * C * H * (W + 3) + 64,), NAN, dtype=dtype)
        row = C * (W + 3)
        strides = (N * H * row, H * row, 1, row, C)
    else:
        strides = strides_of(layout, shape)
    t = storage.as_strided(shape, strides, 64)
    t.normal_() if fill is None else t.fill_(fill)
    return t


def channels_last(t):
    return t.permute(0, 1, 3, 4, 2)


def reference(x, weight, dy, p, dtype):
    """(y, dx, dw) member by member in `dtype`."""
    x, weight, dy = (t.to(dtype).contiguous().detach() for t in (x, weight, dy))
    x.requires_grad_(), weight.requires_grad_()
    y = torch.stack([F.conv2d(a, b, None, p.stride, p.padding, p.dilation) for a, b in zip(x, weight, strict=True)])
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def cases():
    """(form, Problem of fprop, tile, block_in, block_out, splits): small, odd, and each for a reason."""
    k1, k3, k5, k7 = (1, 1), (3, 3), (5, 5), (7, 7)

    def problem(
        K, N, C, O, H, W, kernel=k3, stride=(1, 1), padding=(1, 1), dilation=(1, 1), layout="member", dtype="float32"
    ):
        return Problem("fprop", dtype, K, N, C, O, H, W, kernel, stride, padding, dilation, layout)

    both = {
        "many tiles": problem(2, 2, 16, 16, 5, 7),
        "odd blocks, stride 2": problem(3, 2, 24, 40, 5, 6, stride=(2, 2)),
        "channel groups, mixed strides": problem(3, 2, 8, 24, 5, 6, (5, 3), (2, 1), (3, 0), (1, 2), "channel-grouped"),
        "channel groups beyond the block": problem(5, 1, 40, 24, 4, 5, layout="channel-grouped"),
        "dilated and strided": problem(2, 2, 16, 24, 6, 5, (3, 5), (2, 2), (2, 4), (2, 2)),
        "one pixel": problem(2, 2, 16, 16, 1, 1, stride=(2, 2)),
        "pointwise, stride 2": problem(2, 2, 16, 16, 5, 5, k1, (2, 2), (0, 0)),
        "more padding than kernel": problem(2, 1, 16, 16, 3, 3, k3, (1, 1), (4, 4)),
        "7×7, stride 2": problem(1, 2, 8, 16, 9, 8, k7, (2, 2), (3, 3)),
        "one row": problem(2, 2, 16, 24, 1, 13, (1, 5), (1, 2), (0, 2)),
        "half precision": problem(2, 2, 16, 24, 5, 7, dtype="float16"),
        "16 members": problem(16, 1, 8, 8, 3, 3, k1, (1, 1), (0, 0)),
    }
    for name, p in both.items():
        small = name == "many tiles"
        yield pytest.param("tile", p, (1, 4, 4) if small else (2, 4, 8), 16, 16 if small else 32, 2, id=f"tile: {name}")
        yield pytest.param("pointer", p, (1, 1, 16 if small else 64), 32, 16 if small else 64, 2, id=f"pointer: {name}")
    yield pytest.param("tile", both["one pixel"], (2, 2, 4), 32, 32, 1, id="tile: blocks wider than the channels")
    odd = {
        "rows with gaps": problem(3, 2, 24, 8, 4, 5, layout="strided"),
        "one channel": problem(3, 2, 1, 1, 5, 4),
        "three channels": problem(5, 2, 3, 4, 6, 5, k7, (2, 2), (3, 3)),
        "twelve channels": problem(3, 1, 12, 5, 5, 4),
        "four channels, half precision": problem(3, 2, 4, 12, 5, 4, dtype="float16"),
        "stride and dilation 3": problem(2, 2, 3, 5, 7, 7, k3, (3, 1), (1, 1), (3, 1)),
        "5×5": problem(2, 1, 4, 4, 5, 6, k5, (1, 2), (2, 2)),
    }
    for name, p in odd.items():
        yield pytest.param("pointer", p, (1, 1, 64), 32, 16, 2, id=f"pointer: {name}")


@pytest.mark.parametrize(("form", "problem", "tile", "block_in", "block_out", "splits"), list(cases()))
def test_each_pass_is_as_right_as_torchs_own_and_reads_and_writes_nothing_else(
    form, problem, tile, block_in, block_out, splits
):
    p, dtype = problem, getattr(torch, problem.dtype)
    config = Config(form, tile, block_in, block_out, splits=splits)
    assert by_config.why_not(p, replace(config, splits=1), H100) is None
    inputs, outputs = (p.K, p.N, p.C, p.H, p.W), (p.K, p.N, p.O, *p.out_size)
    x, dy = poisoned(p.layout, inputs, dtype), poisoned(p.layout, outputs, dtype)
    y, dx = poisoned(p.layout, outputs, dtype, NAN), poisoned(p.layout, inputs, dtype, NAN)
    weight = torch.randn((p.K, p.O, *p.kernel, p.C), dtype=dtype) / (p.C * p.taps) ** 0.5
    dw = torch.full_like(weight, NAN)
    around = [surroundings(t) for t in (y, dx)]

    by_config.fprop(p, replace(config, splits=1), channels_last(x), weight, channels_last(y))
    by_config.dgrad(p.of("dgrad"), replace(config, splits=1), channels_last(dy), weight, channels_last(dx))
    by_config.wgrad(p.of("wgrad"), config, channels_last(dy), channels_last(x), dw)

    oihw = weight.movedim(-1, 2)
    wanted = reference(x, oihw, dy, p, torch.float64)
    torchs = reference(x, oihw, dy, p, dtype)
    for what, found, right, own in zip(("y", "dx", "dw"), (y, dx, dw.movedim(-1, 2)), wanted, torchs, strict=True):
        assert_right(found, right, own, what)
    for before, after in zip(around, (y, dx), strict=True):
        assert torch.equal(before, surroundings(after)), "memory around the result was written"


@pytest.mark.parametrize("form", ["tile", "pointer"])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_flag_of_prologue_and_epilogue(form, stride):
    p = Problem("fprop", "float32", 2, 2, 16, 24, 5, 6, (3, 2), (stride, stride), (1, 1))
    config = Config(form, (1, 4, 8), 16, 32)
    x, residual = poisoned("member", (2, 2, 16, 5, 6), torch.float32), None
    shape = (2, 2, 24, *p.out_size)
    weight, bias = torch.randn(2, 24, 3, 2, 16) / 10, torch.randn(2, 24)
    scale, shift, in_scale, in_shift = (torch.randn(2, c) for c in (24, 24, 16, 16))

    def compute(dtype, with_bias, moments, affine, with_residual, relu, prologue, in_relu):
        def channels(t):
            return t.to(dtype)[:, None, :, None, None]

        value = x.to(dtype)
        if prologue:
            value = value * channels(in_scale) + channels(in_shift)
            value = value.relu() if in_relu else value
        w = weight.to(dtype).movedim(-1, 2)
        y = torch.stack([F.conv2d(a, b, None, stride, 1) for a, b in zip(value, w, strict=True)])
        y = y + channels(bias) if with_bias else y
        var, mean = torch.var_mean(y, (1, 3, 4), correction=0)
        y = y * channels(scale) + channels(shift) if affine else y
        y = y + residual.to(dtype) if with_residual else y
        return y.relu() if relu else y, mean, var

    for flags in (
        (True, False, False, False, False, False, False),
        (False, True, False, False, False, False, False),
        (False, False, True, False, True, False, False),
        (False, False, False, True, False, False, False),
        (False, False, False, False, False, True, False),
        (True, True, True, True, True, True, True),
    ):
        with_bias, moments, affine, with_residual, relu, prologue, in_relu = flags
        residual = poisoned("member", shape, torch.float32)
        y = poisoned("member", shape, torch.float32, NAN)
        pieces = torch.full((2, by_config.moments_pieces(p, config), 3, 24), NAN) if moments else None
        epilogue = Epilogue(
            bias if with_bias else None,
            *((scale, shift) if affine else (None, None)),
            channels_last(residual) if with_residual else None,
            relu,
            pieces,
        )
        before = Prologue(in_scale, in_shift, in_relu) if prologue else None
        by_config.fprop(p, config, channels_last(x), weight, channels_last(y), epilogue, before)
        wanted, mean, var = compute(torch.float64, *flags)
        assert_right(y, wanted, compute(torch.float32, *flags)[0], f"y with {flags}")
        if moments:
            count, means, m2 = pieces.double().unbind(2)
            total = (count * means).sum(1) / count.sum(1)
            assert (count.sum(1) == y[0, :, 0].numel()).all()
            torch.testing.assert_close(total, mean, atol=1e-5, rtol=1e-5)
            spread = (m2 + count * (means - total[:, None]) ** 2).sum(1) / count.sum(1)
            torch.testing.assert_close(spread, var, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_crops_are_read_from_the_shared_image_and_nothing_around_them_is(stride):
    p = Problem("fprop", "float32", 3, 2, 3, 5, 6, 7, (3, 3), (stride, stride), (1, 1), layout="crops")
    config = Config("pointer", (1, 1, 32), 16, 16)
    corners = [(1, 2), (0, 5), (5, 1)]
    for k, (top, left) in enumerate(corners):
        image = torch.full((2, 12, 13, 3), NAN)
        image[:, top : top + 6, left : left + 7] = torch.randn(2, 6, 7, 3)
        # The other members read poison; only member k's result is looked at.
        weight, y = torch.randn(3, 5, 3, 3, 3) / 5, torch.full((3, 2, *p.out_size, 5), NAN)
        offsets = Offsets.of(corners, torch.device("cpu"))
        by_config.fprop(p, config, image[None], weight, y, offsets=offsets)
        crop = image[:, top : top + 6, left : left + 7].permute(0, 3, 1, 2)
        w = weight[k].movedim(-1, 1)
        wanted, own = (F.conv2d(crop.to(t), w.to(t), None, stride, 1) for t in (torch.float64, torch.float32))
        assert_right(y[k].permute(0, 3, 1, 2), wanted, own, f"member {k}")


def test_atomic_and_two_pass_weight_gradients_agree_and_two_passes_repeat_bit_for_bit():
    p = Problem("wgrad", "float32", 2, 3, 16, 16, 4, 4, (2, 2), (1, 1), (1, 1))
    for form in ("tile", "pointer"):
        config = Config(form, (1, 4, 8), 16, 16, splits=3)
        dy, x = torch.randn(2, 3, 5, 5, 16), torch.randn(2, 3, 4, 4, 16)
        results = []
        for c in (config, config, replace(config, atomic=True)):
            results.append(torch.full((2, 16, 2, 2, 16), NAN))
            by_config.wgrad(p, c, dy, x, results[-1])
        assert torch.equal(results[0], results[1])
        torch.testing.assert_close(results[0], results[2])
        assert by_config.why_not(replace(p, deterministic=True), replace(config, atomic=True), H100)


def test_three_products_share_no_dy_of_merged_rows_beside_an_x_of_plain_ones():
    p = Problem("wgrad", "bfloat16", 1, 4, 64, 64, 4, 4, (3, 3), (1, 1), (1, 1))
    dy, x, dw = torch.empty(1, 4, 4, 4, 64), torch.empty(1, 4, 4, 4, 64), torch.empty(1, 1, 64, 3, 3, 64)
    for block_in, merged in ((64, True), (32, False)):
        with recording() as launches:
            by_config.wgrad(p, Config("tile", (4, 4, 4), block_in, 64), dy.bfloat16(), x.bfloat16(), dw)
        flags = launches[0].arguments
        assert (flags["MERGED"], flags["MERGED_OUT"]) == (merged, merged)


def test_illegal_configs_are_named():
    a100, b200 = device.KNOWN[80], device.KNOWN[100]
    p = Problem("fprop", "bfloat16", 2, 8, 64, 64, 14, 14, (3, 3), (1, 1), (1, 1))
    good = Config("tile", (1, 8, 16), 64, 64)
    assert by_config.why_not(p, good, H100) is None
    assert by_config.why_not(p, replace(good, tile=(1, 4, 16), warps=8), a100) is None
    assert "a thread spill" in by_config.why_not(p, good, a100) and "a thread spill" in by_config.why_not(p, good, b200)
    assert "registers" in by_config.why_not(p, replace(good, tile=(2, 8, 16)), H100)
    assert "copy engine" in by_config.why_not(replace(p, dtype="tf32"), replace(good, tile=(1, 4, 16)), a100)
    for problem, config, word in (
        (p, replace(good, tile=(1, 7, 16)), "powers of two"),
        (p, replace(good, splits=2), "wgrad"),
        (p, replace(good, atomic=True), "wgrad"),
        (p, replace(good, stages=40), "shared memory"),
        (p, replace(good, block_in=8), "below 16"),
        (p, replace(good, tile=(1, 1, 512)), "256"),
        (replace(p, C=12), good, "descriptors"),
        (replace(p, aligned=False), good, "descriptors"),
        (replace(p, layout="crops"), good, "descriptors"),
        (replace(p, stride=(3, 1)), good, "parity"),
        (replace(p, N=2**28, H=32, W=32), good, "programs"),
        (replace(p, N=2**26, H=32, W=32), replace(good, form="pointer"), "pixels"),
        (replace(p, kind="dgrad", layout="crops"), replace(good, form="pointer"), "overlapping"),
    ):
        reason = by_config.why_not(problem, config, H100)
        assert reason and word in reason, (reason, word)
    assert "no config of the tile form" in conv.named("tile").why_not(p, replace(good, form="pointer"), H100)
