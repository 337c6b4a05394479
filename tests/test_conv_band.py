"""The band form in the interpreter, against float64: every pass and flag, poison all around; and its arithmetic."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from decompk.kernels import conv, device
from decompk.kernels.conv import band as form_of_bands
from decompk.kernels.conv import band_geometry
from decompk.kernels.launch import recording
from decompk.kernels.problem import Config, Epilogue, Offsets, Problem, Prologue

band = conv.named("band")

if not device.interpreted():
    pytest.skip("runs in Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

NAN = float("nan")
AROUND = 64  # values of poison at both ends of a storage


def problem(
    K, N, C, O, H, W, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), dtype="float32", layout="member"
):
    return Problem("fprop", dtype, K, N, C, O, H, W, kernel, stride, padding, dilation, layout)


def dtype_of(p):
    return torch.float16 if p.dtype == "float16" else torch.float32


def poisoned(values, shift=0):
    """A copy of `values` with NaN on both sides; its address is a multiple of 16 bytes plus `shift` values."""
    storage = torch.full((2 * AROUND + shift + values.numel(),), NAN, dtype=values.dtype)
    t = storage.as_strided(values.shape, values.contiguous().stride(), AROUND + shift)
    return t.copy_(values)


def random(p, *shape, shift=0):
    return poisoned(torch.randn(shape).to(dtype_of(p)), shift)


def empty(p, *shape, shift=0):
    return poisoned(torch.full(shape, NAN, dtype=dtype_of(p)), shift)


def untouched(t):
    """Whether nothing around t in its storage was written."""
    storage = t.as_strided((t.untyped_storage().size() // t.element_size(),), (1,), 0)
    before, after = storage[: t.storage_offset()], storage[t.storage_offset() + t.numel() :]
    return bool(before.isnan().all() and after.isnan().all())


def reference(p, x, weight, dy, dtype):
    """(y, dx, dw), NHWC and member by member, in `dtype`."""
    x, weight = (t.to(dtype).movedim(-1, 2).detach().requires_grad_() for t in (x, weight))
    y = torch.stack([F.conv2d(a, b, None, p.stride, p.padding, p.dilation) for a, b in zip(x, weight, strict=True)])
    dx, dw = torch.autograd.grad(y, (x, weight), dy.to(dtype).movedim(-1, 2))
    return tuple(t.detach().movedim(2, -1) for t in (y, dx, dw))


def assert_right(found, wanted, torchs):
    """At most twice torch's own error in the same dtype, plus 1e-6."""
    error, theirs = ((t.double() - wanted).abs().max() for t in (found, torchs))
    assert error <= 2 * theirs + 1e-6, f"error {error:.1e}, torch's own {theirs:.1e}"  # a NaN fails too


def small(p, kind="fprop", which=0):
    """The candidate of `p` with the fewest programs, or one of the next: the interpreter is slow."""
    p = p.of(kind)
    found = sorted(band.configs(p), key=lambda c: (band.programs(p, replace(c, splits=1)), c.atomic == (which > 0)))
    config = found[which % len(found)]
    return replace(config, splits=min(config.splits, 2))


def gradient_of(p, dy, x, config, offsets=None, parts=None):
    shape = p.O, *p.kernel, p.C
    if config.atomic:
        out = poisoned(torch.zeros(1, p.K, *shape))
    else:
        out = poisoned(torch.full((parts or config.splits, p.K, *shape), NAN))
    band.wgrad(p.of("wgrad"), config, dy, x, out, offsets)
    assert untouched(out)
    return out.sum(0)


def check(p, which=0, shift=0, offsets=None, image=None):
    """All passes of p with one config of each, against float64."""
    x, weight = random(p, p.K, p.N, p.H, p.W, p.C, shift=shift), random(p, p.K, p.O, *p.kernel, p.C)
    if image is not None:
        x = torch.stack([image[0, :, t : t + p.H, l : l + p.W] for t, l in offsets.starts])
    dy = random(p, p.K, p.N, *p.out_size, p.O, shift=shift)
    wanted, torchs = reference(p, x, weight, dy, torch.float64), reference(p, x, weight, dy, dtype_of(p))
    for kind in ("fprop", "wgrad") if image is not None else ("fprop", "dgrad", "wgrad"):
        config = small(p, kind, which)
        if kind == "fprop":
            out = empty(p, *dy.shape, shift=shift)
            band.fprop(p, config, x if image is None else image, weight, out, offsets=offsets)
        elif kind == "dgrad":
            out = empty(p, *x.shape, shift=shift)
            band.dgrad(p.of(kind), config, dy, weight, out)
        else:
            out = gradient_of(p, dy, x if image is None else image, config, offsets)
        assert kind == "wgrad" or untouched(out)
        i = ("fprop", "dgrad", "wgrad").index(kind)
        assert_right(out, wanted[i], torchs[i])


K1, K5, K7, HALF = (1, 1), (5, 5), (7, 7), dict(dtype="float16")
PROBLEMS = {
    "rows of whole vectors": problem(2, 3, 4, 4, 6, 8),
    "rows of whole vectors, half": problem(2, 3, 4, 4, 6, 8, **HALF),
    "rows that are no multiple of 16 bytes": problem(3, 2, 3, 1, 5, 7),
    "the same in half": problem(3, 2, 3, 4, 5, 7, **HALF),
    "many members": problem(16, 1, 1, 3, 2, 3),
    "wide": problem(1, 2, 12, 24, 4, 9, (3, 1), padding=(1, 0)),
    "one pixel": problem(3, 1, 4, 8, 1, 1, stride=(2, 2)),
    "stride 2": problem(1, 3, 8, 4, 8, 8, stride=(2, 2), **HALF),
    "stride 2, odd": problem(2, 2, 4, 8, 5, 9, stride=(2, 2)),
    "mixed strides": problem(2, 2, 3, 3, 7, 6, K5, (2, 1), (0, 3)),
    "mixed strides, dilated": problem(1, 2, 4, 12, 9, 7, (3, 5), (1, 2), (2, 3), (2, 1)),
    "dilated both ways": problem(2, 1, 8, 3, 7, 8, dilation=(2, 2), padding=(2, 2), **HALF),
    "dilated and strided": problem(1, 2, 4, 4, 9, 9, stride=(2, 2), dilation=(2, 2), padding=(1, 2)),
    "7×7": problem(1, 2, 3, 8, 8, 9, K7, (2, 2), (3, 3)),
    "7×7 on one row": problem(1, 2, 1, 4, 1, 12, K7, padding=(3, 3)),
    "more padding than kernel": problem(2, 2, 4, 3, 3, 4, padding=(3, 4)),
    "unequal kernel": problem(2, 2, 8, 8, 4, 6, (1, 5), padding=(0, 1)),
    "pointwise": problem(2, 3, 4, 12, 4, 6, K1, padding=(0, 0)),
    "pointwise, half": problem(3, 2, 24, 4, 4, 4, K1, padding=(0, 0), **HALF),
    "pointwise on an odd number of pixels": problem(2, 3, 4, 3, 5, 7, K1, padding=(0, 0)),
    "pointwise, stride 2": problem(2, 2, 4, 8, 5, 6, K1, (2, 2), (0, 0)),
}


@pytest.mark.parametrize("p", PROBLEMS.values(), ids=PROBLEMS)
def test_every_pass_errs_at_most_twice_as_much_as_torch_whatever_lies_around(p):
    check(p)


@pytest.mark.parametrize("name", ["rows of whole vectors, half", "stride 2, odd", "pointwise", "7×7"])
def test_every_pass_errs_at_most_twice_as_much_as_torch_with_other_tiles(name):
    check(PROBLEMS[name], which=2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_addresses_that_descriptors_refuse_are_read_through_pointers(dtype):
    check(problem(2, 2, 4, 4, 4, 8, dtype=dtype), shift=1)


def test_bands_that_are_expanded_first_give_the_same_bits(monkeypatch):
    p = problem(2, 3, 3, 4, 6, 9, **HALF)
    x, weight = random(p, 2, 3, 6, 9, 3), random(p, 2, 4, 3, 3, 3)
    config, outputs, launched = small(p), [], []
    for vectors in (2e12, 0.0):
        monkeypatch.setattr("decompk.kernels.conv.band_geometry.VECTORS", vectors)
        for cached in (band_geometry.bands, form_of_bands._run):
            cached.cache_clear()
        outputs.append(empty(p, 2, 3, 6, 9, 4))
        band.fprop(p, config, x, weight, outputs[-1])
        with recording() as launches:
            band.fprop(p, config, x, weight, outputs[-1])
        launched.append(len(launches))
    for cached in (band_geometry.bands, form_of_bands._run):
        cached.cache_clear()
    assert launched == [1, 2]
    assert torch.equal(*outputs)


# ---- crops ----------------------------------------------------------------------------------------------------------

CROPS = {
    "7×7, stride 2": problem(2, 2, 3, 4, 9, 9, K7, (2, 2), (3, 3), layout="crops"),
    "7×7, stride 2, half": problem(1, 2, 3, 8, 10, 11, K7, (2, 2), (3, 3), layout="crops", **HALF),
    "3×3": problem(3, 2, 3, 4, 6, 7, layout="crops", **HALF),
    "4 channels": problem(2, 2, 4, 4, 6, 5, layout="crops", **HALF),
}


@pytest.mark.parametrize("p", CROPS.values(), ids=CROPS)
def test_crops_err_at_most_twice_as_much_as_torch_wherever_they_lie(p):
    width = 19 if p.K == 3 else 16  # rows of the image that are whole vectors, and such that are not
    offsets = Offsets.of([(14 - p.H, width - p.W), (3, 1), (0, 0)][: p.K], torch.device("cpu"))
    check(p, offsets=offsets, image=random(p, 1, p.N, 14, width, p.C))


@pytest.mark.parametrize("name", ["7×7, stride 2", "3×3"])
def test_nothing_outside_a_crop_is_multiplied(name):
    p = replace(CROPS[name], K=2)
    offsets = Offsets.of([(2, 3), (4, 5)], torch.device("cpu"))
    image, weight = random(p, 1, p.N, 15, 16, p.C), random(p, p.K, p.O, *p.kernel, p.C)
    dy = random(p, p.K, p.N, *p.out_size, p.O)
    forward, backward = small(p), replace(small(p, "wgrad"), splits=1)
    results = []
    for fill in (0.0, NAN):
        outside = torch.full_like(image, fill)
        outside[:, :, 2 : 2 + p.H, 3 : 3 + p.W] = image[:, :, 2 : 2 + p.H, 3 : 3 + p.W]
        y = empty(p, p.K, p.N, *p.out_size, p.O)
        band.fprop(p, forward, poisoned(outside), weight, y, offsets=offsets)
        results.append((y[0], gradient_of(p, dy, poisoned(outside), backward, offsets)[0]))
    assert not results[1][0].isnan().any()
    assert all(map(torch.equal, *results))


def test_crops_of_an_image_that_is_itself_a_window_are_right():
    p = CROPS["3×3"]
    starts, cpu = [(0, 0), (2, 3), (1, 2)], torch.device("cpu")
    check(p, offsets=Offsets.of(starts, cpu), image=random(p, 1, 2, 12, 20, 3)[:, :, 2:11, 5:17])
    p = replace(p, K=1)
    check(p, offsets=Offsets.of(starts[:1], cpu), image=random(p, 1, 2, 12, 20, 5)[:, :, :, :, 1:4])


# ---- what is fused --------------------------------------------------------------------------------------------------

FUSED = {
    "bias": ["bias"],
    "affine": ["affine"],
    "residual and relu": ["residual", "relu"],
    "moments": ["bias", "moments"],
    "prologue": ["prologue"],
    "everything": ["bias", "affine", "residual", "relu", "moments", "prologue"],
}
SHAPES = {
    "whole vectors": problem(2, 3, 4, 4, 6, 8),
    "odd rows, half": problem(2, 2, 3, 8, 5, 7, **HALF),
    "pointwise": problem(2, 2, 4, 8, 4, 4, K1, padding=(0, 0), **HALF),
    "stride 2": problem(2, 2, 4, 3, 7, 6, stride=(2, 2)),
}


def fused_reference(p, x, weight, e, prologue, dtype):
    """(y, the value whose moments are taken) in `dtype`, plain torch."""
    cast = {name: None if t is None else t.to(dtype) for name, t in vars(e).items() if name not in ("relu", "moments")}
    wide = {name: t[:, None, None, None] for name, t in cast.items() if t is not None and t.dim() == 2}
    x = x.to(dtype)
    if prologue is not None:
        x = x * prologue.scale.to(dtype)[:, None, None, None] + prologue.shift.to(dtype)[:, None, None, None]
        x = x.relu() if prologue.relu else x
    y = torch.stack(
        [
            F.conv2d(a.movedim(-1, 1), b.to(dtype).movedim(-1, 1), None, p.stride, p.padding, p.dilation)
            for a, b in zip(x, weight, strict=True)
        ]
    ).movedim(2, -1)
    y = y + wide.get("bias", 0)
    value = y
    y = y * wide.get("scale", 1) + wide.get("shift", 0)
    y = y if cast["residual"] is None else y + cast["residual"]
    return y.relu() if e.relu else y, value


@pytest.mark.parametrize(
    ("shape", "what"),
    [(s, w) for s in SHAPES for w in FUSED if w == "everything" or s in ("whole vectors", "odd rows, half")],
)
def test_what_is_fused_errs_at_most_twice_as_much_as_torch(shape, what):
    p, what = SHAPES[shape], FUSED[what]
    config = small(p)
    x, weight = random(p, p.K, p.N, p.H, p.W, p.C), random(p, p.K, p.O, *p.kernel, p.C)
    shape = (p.K, p.N, *p.out_size, p.O)
    affine = "affine" in what
    pieces = torch.full((p.K, band.moments_pieces(p, config), 3, p.O), NAN)
    e = Epilogue(
        bias=random(p, p.K, p.O) if "bias" in what else None,
        scale=poisoned(torch.randn(p.K, p.O)) if affine else None,
        shift=poisoned(torch.randn(p.K, p.O)) if affine else None,
        residual=random(p, *shape) if "residual" in what else None,
        relu="relu" in what,
        moments=poisoned(pieces) if "moments" in what else None,
    )
    prologue = None
    if "prologue" in what:
        prologue = Prologue(poisoned(torch.randn(p.K, p.C)), poisoned(torch.randn(p.K, p.C)), relu=len(what) > 1)
    y = empty(p, *shape)
    band.fprop(p, config, x, weight, y, e, prologue)
    wanted, value = fused_reference(p, x, weight, e, prologue, torch.float64)
    torchs, rounded = fused_reference(p, x, weight, e, prologue, dtype_of(p))
    assert untouched(y)
    assert_right(y, wanted, torchs)
    if e.moments is not None:
        count, mean, squares = e.moments.double().unbind(2)
        assert untouched(e.moments)
        assert (count.sum(1) == value[0, ..., 0].numel()).all()
        merged = (count * mean).sum(1) / count.sum(1)
        exact, theirs = value.mean((1, 2, 3)), rounded.double().mean((1, 2, 3))
        spread = value.var((1, 2, 3), unbiased=False).sqrt().norm()  # of what is averaged: the mean itself may be tiny
        assert (merged - exact).norm() <= 2 * (theirs - exact).norm() + 1e-6 * spread
        variance = (squares + count * (mean - merged[:, None]) ** 2).sum(1) / count.sum(1)
        theirs = rounded.double().var((1, 2, 3), unbiased=False)
        exact = value.var((1, 2, 3), unbiased=False)
        off, own = ((t - exact).norm() / exact.norm() for t in (variance, theirs))
        assert off <= 2 * own + 1e-6


# ---- who reads whom -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [PROBLEMS["rows of whole vectors"], PROBLEMS["pointwise"]], ids=["3×3", "pointwise"])
def test_a_diverged_member_changes_no_bit_of_another(p):
    p = replace(p, K=3, N=1)
    x, dy = random(p, 3, p.N, p.H, p.W, p.C), random(p, 3, p.N, *p.out_size, p.O)
    weight = random(p, 3, p.O, *p.kernel, p.C)
    forward, backward, weights = (small(p, kind) for kind in ("fprop", "dgrad", "wgrad"))
    weights = replace(weights, splits=1)
    results = []
    for _ in range(2):
        y, dx = empty(p, *dy.shape), empty(p, *x.shape)
        band.fprop(p, forward, x, weight, y)
        band.dgrad(p.of("dgrad"), backward, dy, weight, dx)
        results.append([t[::2].clone() for t in (y, dx, gradient_of(p, dy, x, weights))])
        for t in (x, dy, weight):
            t[1] = NAN
    assert all(map(torch.equal, *results))
    assert not any(t.isnan().any() for t in results[1])


def test_an_image_of_nan_changes_no_bit_of_the_next():
    p = PROBLEMS["rows of whole vectors"]
    x, weight, y = random(p, 2, 3, 6, 8, 4), random(p, 2, 4, 3, 3, 4), empty(p, 2, 3, 6, 8, 4)
    config = small(p)
    band.fprop(p, config, x, weight, y)
    clean = y[:, ::2].clone()
    x[:, 1] = NAN
    band.fprop(p, config, x, weight, y)
    assert torch.equal(y[:, ::2], clean)


def test_the_weight_gradient_is_the_same_however_it_is_shared_out():
    p = problem(1, 4, 4, 4, 6, 8)
    x, dy = random(p, 1, 4, 6, 8, 4), random(p, 1, 4, 6, 8, 4)
    base = Config("band", (4, 4, 4), 32, 16, stages=2)
    first = gradient_of(p, dy, x, base)
    for splits, atomic, parts in ((3, False, None), (4, False, 2), (4, False, 1), (4, True, None)):
        found = gradient_of(p, dy, x, replace(base, splits=splits, atomic=atomic), parts=parts)
        torch.testing.assert_close(found, first, rtol=1e-4, atol=1e-5)
    again = [gradient_of(p, dy, x, replace(base, splits=3)) for _ in range(2)]
    assert torch.equal(*again)


# ---- arithmetic -----------------------------------------------------------------------------------------------------

LAYERS = {  # of ResNet50 in 16 and 8 parts and CIFAR ResNet32 in 4
    "3×3 4→4 at 18": problem(16, 128, 4, 4, 18, 18, dtype="bfloat16"),
    "1×1 4→16 at 18": problem(16, 128, 4, 16, 18, 18, K1, padding=(0, 0), dtype="bfloat16"),
    "3×3 8→8 at 18, stride 2": problem(16, 128, 8, 8, 18, 18, stride=(2, 2), dtype="bfloat16"),
    "7×7 3→4 of crops of 70": problem(16, 128, 3, 4, 70, 70, K7, (2, 2), (3, 3), dtype="bfloat16", layout="crops"),
    "3×3 8→8 at 24": problem(8, 128, 8, 8, 24, 24, dtype="tf32"),
    "3×3 4→4 at 35": problem(16, 128, 4, 4, 35, 35, dtype="bfloat16"),
    "3×3 4→8 at 20, stride 2": problem(4, 128, 4, 8, 20, 20, stride=(2, 2)),
}


@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("p", LAYERS.values(), ids=LAYERS)
def test_candidates_are_legal_few_and_fit_the_oldest_gpu(p, kind):
    p = p.of(kind)
    if kind == "dgrad" and p.layout == "crops":
        assert band.fits(p, Config("band", (64, 2, 8), 64, 64)) == "overlapping crops would write the same pixels"
        return
    found = band.configs(p)
    useful = 2 * p.K * p.N * p.O * p.C * p.taps * p.out_size[0] * p.out_size[1]
    assert 1 <= len(found) <= 12 and len(set(found)) == len(found)
    for config in found:
        assert band.fits(p, config) is None
        assert band.shared_bytes(p, config) <= device.KNOWN[80].shared_bytes
        assert 0 < useful * 0.9 <= band.executed_flops(p, config)
        assert 0 < band.programs(p, config) < 2**31 and band.l2_bytes(p, config) > 0
    assert not any(config.atomic for config in band.configs(replace(p, deterministic=True)))


def test_a_kernel_row_is_read_once_and_not_once_a_tap():
    p = LAYERS["3×3 4→4 at 18"]
    once = p.K * p.N * p.H * p.W * p.C * p.element_size
    assert band.l2_bytes(p, band.configs(p)[0]) < 5 * once  # with the margins of segments; 9 taps would be 9


BASE = Config("band", (64, 2, 4), 32, 16)


@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        ({}, replace(BASE, form="tile"), "a config of the tile form"),
        (dict(layout="channel-grouped"), BASE, "channel-grouped activations"),
        (dict(layout="strided"), BASE, "strided activations"),
        ({}, replace(BASE, block_in=24), "powers of two"),
        ({}, replace(BASE, block_in=8), "powers of two"),
        ({}, replace(BASE, tile=(3, 2, 4)), "powers of two"),
        ({}, replace(BASE, tile=(64, 2, 8)), "do not fit a segment"),
        ({}, replace(BASE, tile=(8, 1, 4)), "takes 16 to 1024 rows"),
        ({}, replace(BASE, block_in=16), "does not cover the taps"),
        ({}, replace(BASE, splits=2), "only wgrad"),
        (dict(kind="wgrad"), replace(BASE, splits=999), "cannot be shared"),
        (dict(kind="wgrad"), replace(BASE, block_out=32), "one row a segment"),
        (dict(kind="dgrad", stride=(2, 2)), replace(BASE, block_in=16), "a multiple of 2 rows"),
        (dict(kind="dgrad", stride=(1, 2)), replace(BASE, tile=(64, 2, 3), block_out=32), "do not start at a pixel"),
    ],
)
def test_what_is_not_legal_is_refused_with_its_reason(change, config, reason):
    assert reason in band.fits(replace(problem(2, 64, 4, 4, 8, 8), **change), config)


def kind_of(value):
    """What of an argument decides the code that is compiled."""
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, value.shape, value.strides, value.block_shape
    return value.dtype if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
def test_specialisations_are_what_a_launch_compiles(kind):
    p = problem(2, 3, 4, 4, 6, 8, **HALF).of(kind)
    config = band.configs(p)[-1]
    x, dy, weight = random(p, 2, 3, 6, 8, 4), random(p, 2, 3, 6, 8, 4), random(p, 2, 4, 3, 3, 4)
    with recording() as launches:
        if kind == "fprop":
            band.fprop(p, config, x, weight, dy, Epilogue(relu=True))
        elif kind == "dgrad":
            band.dgrad(p, config, dy, weight, x)
        else:
            band.wgrad(p, config, dy, x, torch.zeros(1 if config.atomic else config.splits, *weight.shape))
    found = form_of_bands.specialisations(p, config, relu=True)
    assert [(one.kernel, one.grid, one.warps, one.stages) for one in launches] == [
        (one.kernel, one.grid, one.warps, one.stages) for one in found
    ]
    for ours, theirs in zip(launches, found, strict=True):
        assert {n: kind_of(v) for n, v in ours.arguments.items()} == {
            n: kind_of(v) for n, v in theirs.arguments.items()
        }
