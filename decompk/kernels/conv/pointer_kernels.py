"""The pointer form's device code: see `pointer` for the idea."""

import triton
import triton.language as tl

from ..product import dot
from .gradient_kernels import gradient


@triton.jit
def _gather(
    x, offsets, k, p, inside, r, sk, sn, sh, sw, H, W, HO, WO, R,
    BACKWARD: tl.constexpr, CROPS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    """(pixels, taps · channels) addresses and mask: what each of the HO × WO pixels p of member k reads of (H, W)."""
    n = p // (HO * WO)
    h = p // WO % HO
    w = p % WO
    tap = r // R
    dh = (tap // KW * DH)[None, :]
    dw = (tap % KW * DW)[None, :]
    if BACKWARD:
        u = h[:, None] + PH - dh
        v = w[:, None] + PW - dw
        row = u // SH
        column = v // SW
        valid = (u >= 0) & (v >= 0) & (u % SH == 0) & (v % SW == 0)
    else:
        row = h[:, None] * SH + dh - PH
        column = w[:, None] * SW + dw - PW
        valid = (row >= 0) & (column >= 0)
    valid = valid & (row < H) & (column < W) & inside[:, None] & (r < KH * KW * R)[None, :]
    base = x + k.to(tl.int64) * sk
    if CROPS:
        base += tl.load(offsets + 2 * k).to(tl.int64) * sh + tl.load(offsets + 2 * k + 1).to(tl.int64) * sw
    address = base + n.to(tl.int64)[:, None] * sn + row.to(tl.int64) * sh + column.to(tl.int64) * sw + (r % R)[None, :]
    return address, valid


@triton.jit
def conv_pointer(
    x, offsets, weight, y, residual, bias, scale, shift, moments, in_scale, in_shift,
    added, raw, joined, mean, rstd, gamma, beta, sums,
    PIXELS, TILES, FB, R, F, H, W, HO, WO,
    xk, xn, xh, xw, wk, wf, wt, wr, yk, yn, yh, yw, rk, rn, rh, rw,
    BACKWARD: tl.constexpr, CROPS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BP: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, PRECISION: tl.constexpr,
    BIAS: tl.constexpr, MOMENTS: tl.constexpr, AFFINE: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    PROLOGUE: tl.constexpr, IN_RELU: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """y (fprop) from x, or dx (dgrad) from dy: R reduced and F free channels, BP pixels of one member a program."""
    pid = tl.program_id(0)
    f = pid % FB * BF + tl.arange(0, BF)
    tile = pid // FB
    k = tile // TILES
    p0 = tile % TILES * BP
    p = p0 + tl.arange(0, BP)
    inside = p < PIXELS
    acc = tl.zeros((BP, BF), tl.float32)
    for r0 in tl.range(0, KH * KW * R, BR):
        r = r0 + tl.arange(0, BR)
        address, valid = _gather(
            x, offsets, k, p, inside, r, xk, xn, xh, xw, H, W, HO, WO, R,
            BACKWARD, CROPS, KH, KW, SH, SW, PH, PW, DH, DW,
        )  # fmt: skip
        a = tl.load(address, valid, 0.0)
        if PROLOGUE:
            c = k * R + r % R
            value = a.to(tl.float32) * tl.load(in_scale + c, r < KH * KW * R, 0.0)[None, :]
            value += tl.load(in_shift + c, r < KH * KW * R, 0.0)[None, :]
            if IN_RELU:
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            a = tl.where(valid, value, 0.0).to(a.dtype)
        b = tl.load(
            weight + k.to(tl.int64) * wk + (r // R * wt + r % R * wr)[:, None] + (f * wf)[None, :],
            (r < KH * KW * R)[:, None] & (f < F)[None, :],
            0.0,
        ).to(a.dtype)
        acc = dot(a, b, acc, PRECISION)
    if BIAS:
        acc += tl.load(bias + k * F + f, f < F, 0.0).to(tl.float32)[None, :]
    if MOMENTS:
        number = tl.minimum(BP, PIXELS - p0).to(tl.float32)
        value = acc.to(y.dtype.element_ty).to(tl.float32)
        mean = tl.sum(tl.where(inside[:, None], value, 0.0), 0) / number
        off = tl.where(inside[:, None], value - mean[None, :], 0.0)
        piece = moments + tile.to(tl.int64) * 3 * F + f
        tl.store(piece, mean * 0 + number, f < F)
        tl.store(piece + F, mean, f < F)
        tl.store(piece + 2 * F, tl.sum(off * off, 0), f < F)
    if AFFINE:
        acc = acc * tl.load(scale + k * F + f, f < F, 0.0)[None, :]
        acc += tl.load(shift + k * F + f, f < F, 0.0)[None, :]
    n = (p // (HO * WO)).to(tl.int64)
    h = (p // WO % HO).to(tl.int64)
    w = (p % WO).to(tl.int64)
    mask = inside[:, None] & (f < F)[None, :]
    if RESIDUAL:
        rest = residual + k.to(tl.int64) * rk + (n * rn + h * rh + w * rw)[:, None] + f[None, :]
        acc += tl.load(rest, mask, 0.0).to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    at = k.to(tl.int64) * yk + (n * yn + h * yh + w * yw)[:, None] + f[None, :]
    if BACKWARD:
        acc = gradient(
            acc, 0, at, mask, k * F + f, f < F, tile.to(tl.int64) * (2 * F) + f, f < F, F,
            added, raw, joined, mean, rstd, gamma, beta, sums, GATED, 1, y.dtype.element_ty,
        )  # fmt: skip
    tl.store(y + at, acc.to(y.dtype.element_ty), mask)


@triton.jit
def wgrad_pointer(
    x, offsets, dy, out, PIXELS, SPLITS, RB, OB, C, O, H, W, HO, WO, ELEMENTS,
    xk, xn, xh, xw, yk, yn, yh, yw,
    CROPS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BP: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr, PRECISION: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """out (K, O, kh, kw, C) += (ATOMIC) or out (splits, K, …) =: one block of weights, one split of the pixels."""
    pid = tl.program_id(0)
    r = pid % RB * BR + tl.arange(0, BR)
    o = pid // RB % OB * BO + tl.arange(0, BO)
    split = pid // (RB * OB) % SPLITS
    k = pid // (RB * OB * SPLITS)
    share = tl.cdiv(tl.cdiv(PIXELS, BP), SPLITS) * BP
    acc = tl.zeros((BO, BR), tl.float32)
    for p0 in tl.range(split * share, tl.minimum(split * share + share, PIXELS), BP):
        p = p0 + tl.arange(0, BP)
        inside = p < PIXELS
        address, valid = _gather(
            x, offsets, k, p, inside, r, xk, xn, xh, xw, H, W, HO, WO, C,
            False, CROPS, KH, KW, SH, SW, PH, PW, DH, DW,
        )  # fmt: skip
        n = (p // (HO * WO)).to(tl.int64)
        pixel = n * yn + (p // WO % HO).to(tl.int64) * yh + (p % WO).to(tl.int64) * yw
        g = tl.load(dy + k.to(tl.int64) * yk + pixel[:, None] + o[None, :], inside[:, None] & (o < O)[None, :], 0.0)
        acc = dot(g.T, tl.load(address, valid, 0.0), acc, PRECISION)
    weight = out + (k.to(tl.int64) * O + o)[:, None] * (KH * KW * C) + r[None, :]
    mask = (o < O)[:, None] & (r < KH * KW * C)[None, :]
    if ATOMIC:
        tl.atomic_add(weight, acc, mask, sem="relaxed")
    else:
        tl.store(weight + split.to(tl.int64) * ELEMENTS, acc, mask)
