"""The tile form's device code: see `tile` for the idea."""

import triton
import triton.language as tl

from ..product import dot
from .gradient_kernels import gradient
from .taps import count, first, rank, step


@triton.jit
def _accumulate(
    acc, X, W, k, n0, h0, w0, free, in_scale, in_shift, N, HQ, WQ, R,
    rh: tl.constexpr, rw: tl.constexpr, qh: tl.constexpr, qw: tl.constexpr,
    DGRAD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, RB: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
    MERGED: tl.constexpr, PROLOGUE: tl.constexpr, IN_RELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc += Σ over the taps that meet one view and all reduced channels, of the tile at row h0, column w0.

    fprop: X is view (qh, qw) of x, of HQ rows and WQ columns; dgrad: X is dy, and (rh, rw) = (qh, qw) the view of dx.
    Element p of the tile's BN · BH · BW pixels is image p // (BH · BW), row p // BW % BH, column p % BW of it.
    """
    NH: tl.constexpr = count(qh, KH, PH, SH, DH)
    NW: tl.constexpr = count(qw, KW, PW, SW, DW)
    for i in tl.range(0, NH * NW * RB):
        t = i // RB  # the t-th of NH × NW taps; blocks of channels innermost
        r0 = i % RB * BR
        kh = first(qh, PH, SH, DH) + t // NW * step(SH, DH)
        kw = first(qw, PW, SW, DW) + t % NW * step(SW, DW)
        # Exact divisions; dividends are positive by what is taken off again: kh < KH, and qh < SH.
        if DGRAD:
            h = h0 + (rh + PH - kh * DH + KH * DH * SH) // SH - KH * DH
            w = w0 + (rw + PW - kw * DW + KW * DW * SW) // SW - KW * DW
        else:
            h = h0 + (kh * DH - PH - qh + PH * SH + SH) // SH - PH - 1
            w = w0 + (kw * DW - PW - qw + PW * SW + SW) // SW - PW - 1
        if MERGED:
            a = X.load([k, n0, h, w * BR]).reshape(BN * BH * BW, BR)
        else:
            a = X.load([k, n0, h, w, r0]).reshape(BN * BH * BW, BR)
        if PROLOGUE:
            p = tl.arange(0, BN * BH * BW)
            row = h + p // BW % BH
            column = w + p % BW
            # Padding is of the prologue's result: zeros stay zeros.
            inside = (row >= 0) & (row < HQ) & (column >= 0) & (column < WQ)
            c = r0 + tl.arange(0, BR)
            value = a.to(tl.float32) * tl.load(in_scale + k * R + c, c < R, 0.0)
            value += tl.load(in_shift + k * R + c, c < R, 0.0)
            if IN_RELU:
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            a = tl.where(inside[:, None], value, 0.0).to(a.dtype)
        if DGRAD:
            b = W.load([k, r0, kh * KW + kw, free]).reshape(BR, BF).to(a.dtype)
        else:
            b = W.load([k, free, kh * KW + kw, r0]).reshape(BF, BR).to(a.dtype).T
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def conv_tile(
    X0, X1, X2, X3, W, Y0, Y1, Y2, Y3, residual, bias, scale, shift, moments, in_scale, in_shift,
    added, raw, joined, mean, rstd, gamma, beta, sums,
    N, HO, WO, HQ, WQ, R, F, TN, TH, TW, FB, gk, gn, gh, gw,
    DGRAD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, RB: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
    LIVE: tl.constexpr, MERGED: tl.constexpr, MERGED_OUT: tl.constexpr, PRECISION: tl.constexpr,
    BIAS: tl.constexpr, MOMENTS: tl.constexpr, AFFINE: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    PROLOGUE: tl.constexpr, IN_RELU: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """y (fprop) from x or dx (dgrad) from dy; R reduced, F free channels; LIVE: a bit for each view with pixels.

    fprop sums the views X0 … X3 of x, of HQ × WQ pixels, into Y0; dgrad writes the views Y0 … Y3 of dx, of HQ × WQ
    pixels and strides gk, gn, gh and gw, from X0.
    """
    pid = tl.program_id(0)
    free = pid % FB * BF
    tile = pid // FB
    w0 = tile % TW * BW
    h0 = tile // TW % TH * BH
    n0 = tile // (TW * TH) % TN * BN
    k = tile // (TW * TH * TN)
    pixels: tl.constexpr = BN * BH * BW
    for out in tl.static_range(SH * SW if DGRAD else 1):
        if not DGRAD or (LIVE >> out) % 2:
            acc = tl.zeros((pixels, BF), tl.float32)
            for into in tl.static_range(1 if DGRAD else SH * SW):
                if DGRAD or (LIVE >> into) % 2:
                    X = X0 if into == 0 else (X1 if into == 1 else (X2 if into == 2 else X3))
                    acc = _accumulate(
                        acc, X, W, k, n0, h0, w0, free, in_scale, in_shift, N,
                        # rows q, q + SH, … < HQ: ⌈(HQ − q) / SH⌉ of them
                        (HQ - into // SW + SH - 1) // SH, (WQ - into % SW + SW - 1) // SW, R,
                        out // SW, out % SW, out // SW if DGRAD else into // SW, out % SW if DGRAD else into % SW,
                        DGRAD, KH, KW, SH, SW, PH, PW, DH, DW, RB, BN, BH, BW, BR, BF,
                        MERGED, PROLOGUE, IN_RELU, PRECISION,
                    )  # fmt: skip
            Y = Y0 if out == 0 else (Y1 if out == 1 else (Y2 if out == 2 else Y3))
            f = free + tl.arange(0, BF)
            if BIAS:
                acc += tl.load(bias + k * F + f, f < F, 0.0).to(tl.float32)[None, :]
            if MOMENTS:
                p = tl.arange(0, pixels)
                inside = (n0 + p // (BW * BH) < N) & (h0 + p // BW % BH < HO) & (w0 + p % BW < WO)
                number = (tl.minimum(BN, N - n0) * tl.minimum(BH, HO - h0) * tl.minimum(BW, WO - w0)).to(tl.float32)
                value = acc.to(Y.dtype).to(tl.float32)
                mean = tl.sum(tl.where(inside[:, None], value, 0.0), 0) / number
                off = tl.where(inside[:, None], value - mean[None, :], 0.0)
                piece = moments + (tile.to(tl.int64) * 3) * F + f
                tl.store(piece, mean * 0 + number, f < F)
                tl.store(piece + F, mean, f < F)
                tl.store(piece + 2 * F, tl.sum(off * off, 0), f < F)
            if AFFINE:
                acc = acc * tl.load(scale + k * F + f, f < F, 0.0)[None, :]
                acc += tl.load(shift + k * F + f, f < F, 0.0)[None, :]
            if RESIDUAL:
                if MERGED_OUT:
                    acc += residual.load([k, n0, h0, w0 * BF]).reshape(pixels, BF).to(tl.float32)
                else:
                    acc += residual.load([k, n0, h0, w0, free]).reshape(pixels, BF).to(tl.float32)
            if RELU:
                acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if DGRAD and (added is not None or raw is not None):
                p = tl.arange(0, pixels)
                n = p // (BW * BH)
                row = (h0 + p // BW % BH) * SH + out // SW
                column = (w0 + p % BW) * SW + out % SW
                start = k.to(tl.int64) * gk + n0.to(tl.int64) * gn
                at = (n * gn + row * gh + column * gw)[:, None] + f[None, :]
                live = ((n < N - n0) & (row < HQ) & (column < WQ))[:, None] & (f < F)[None, :]
                piece = tile.to(tl.int64) * rank(LIVE, SH * SW) + rank(LIVE, out)
                acc = gradient(
                    acc, start, at, live, k * F + f, f < F, piece * (2 * F) + f, f < F, F,
                    added, raw, joined, mean, rstd, gamma, beta, sums, GATED, 1, Y.dtype,
                )  # fmt: skip
            if MERGED_OUT:
                Y.store([k, n0, h0, w0 * BF], acc.to(Y.dtype).reshape(1, BN, BH, BW * BF))
            else:
                Y.store([k, n0, h0, w0, free], acc.to(Y.dtype).reshape(1, BN, BH, BW, BF))


# ---- weight gradient ------------------------------------------------------------------------------------------------


@triton.jit
def _pick(X0, X1, X2, X3, parity: tl.constexpr):
    """View number `parity` = q_h · SW + q_w: descriptors make no array, so it is known when compiling."""
    return X0 if parity == 0 else (X1 if parity == 1 else (X2 if parity == 2 else X3))


@triton.jit
def _shifted(
    X, k, n0, h, w, reduced,
    BN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """The tile of a view at (h, w), outside of which are zeros: (pixels, BC)."""
    if MERGED:
        x = X.load([k, n0, h, w * BC])
    else:
        x = X.load([k, n0, h, w, reduced])
    return x.reshape(BN * BH * BW, BC)


@triton.jit
def _correlate(
    A, B, C, G, k, begin, end, free, reduced, dh, dwa, dwb, dwc, TH, TW,
    TAPS: tl.constexpr, LIVE_A: tl.constexpr, LIVE_B: tl.constexpr, LIVE_C: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
    MERGED: tl.constexpr, MERGED_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ over the pixel tiles begin … end of dyᵀ · x, (BO, BC): of one tap (A), or three of a row (A, B and C).

    A, B and C are the views that the taps meet; dh rows and dwa, dwb, dwc columns, the shifts of the taps in them.
    """
    a = tl.zeros((BO, BC), tl.float32)
    b = tl.zeros((BO, BC), tl.float32)
    c = tl.zeros((BO, BC), tl.float32)
    for tile in tl.range(begin, end):
        w0 = tile % TW * BW
        h0 = tile // TW % TH * BH
        n0 = tile // (TW * TH) * BN
        if MERGED_OUT:
            g = G.load([k, n0, h0, w0 * BO]).reshape(BN * BH * BW, BO).T
        else:
            g = G.load([k, n0, h0, w0, free]).reshape(BN * BH * BW, BO).T
        if LIVE_A:
            a = dot(g, _shifted(A, k, n0, h0 + dh, w0 + dwa, reduced, BN, BH, BW, BC, MERGED), a, PRECISION)
        if TAPS == 3 and LIVE_B:
            b = dot(g, _shifted(B, k, n0, h0 + dh, w0 + dwb, reduced, BN, BH, BW, BC, MERGED), b, PRECISION)
        if TAPS == 3 and LIVE_C:
            c = dot(g, _shifted(C, k, n0, h0 + dh, w0 + dwc, reduced, BN, BH, BW, BC, MERGED), c, PRECISION)
    return a, b, c


@triton.jit
def _put(out, acc, k, tap, o, c, C, O, split, ELEMENTS, TAPS: tl.constexpr, ATOMIC: tl.constexpr):
    """acc into out[split, k, o, tap, c], of ELEMENTS a split; or added to the only split."""
    weight = out + ((k.to(tl.int64) * O + o) * TAPS + tap)[:, None] * C + c[None, :]
    inside = (o < O)[:, None] & (c < C)[None, :]
    if ATOMIC:
        tl.atomic_add(weight, acc, inside, sem="relaxed")
    else:
        tl.store(weight + split.to(tl.int64) * ELEMENTS, acc, inside)


@triton.jit
def wgrad_tile(
    X0, X1, X2, X3, G, out, C, O, TN, TH, TW, CB, OB, SPLITS, ELEMENTS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
    LIVE: tl.constexpr, MERGED: tl.constexpr, MERGED_OUT: tl.constexpr, PRECISION: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """out (K, O, kh, kw, C) += (ATOMIC) or out (splits, K, …) =: one block of weights of one tap, one split of tiles.

    Three taps of a kernel's row share the program, and so their read of dy.
    """
    ROW: tl.constexpr = 3 if KW == 3 else 1
    GROUPS: tl.constexpr = KH * KW // ROW
    # Neighbouring programs are the taps of the same pixels: they meet in L2.
    pid = tl.program_id(0)
    tap = pid % GROUPS * ROW
    reduced = pid // GROUPS % CB * BC
    free = pid // (GROUPS * CB) % OB * BO
    split = pid // (GROUPS * CB * OB) % SPLITS
    k = pid // (GROUPS * CB * OB * SPLITS)
    tiles = TN * TH * TW
    share = tl.cdiv(tiles, SPLITS)
    begin = split * share
    end = tl.minimum(begin + share, tiles)
    # The (first) tap's row of x beside s·h, k·d − p, made positive by PH multiples of the stride: its view is
    # u mod SH, its shift u // SH − PH. The same of its column.
    u = tap // KW * DH - PH + PH * SH
    v = tap % KW * DW - PW + PW * SW
    dh = u // SH - PH
    a = tl.zeros((BO, BC), tl.float32)
    b = tl.zeros((BO, BC), tl.float32)
    c = tl.zeros((BO, BC), tl.float32)
    # The tap is known when running, a view when compiling: one branch for each view that a tap may meet.
    for row in tl.static_range(SH):
        if u % SH == row:
            if ROW == 3:  # columns 0, 1 and 2: v is known when compiling
                va: tl.constexpr = PW * SW - PW
                vb: tl.constexpr = va + DW
                vc: tl.constexpr = vb + DW
                a, b, c = _correlate(
                    _pick(X0, X1, X2, X3, row * SW + va % SW), _pick(X0, X1, X2, X3, row * SW + vb % SW),
                    _pick(X0, X1, X2, X3, row * SW + vc % SW), G, k, begin, end, free, reduced,
                    dh, va // SW - PW, vb // SW - PW, vc // SW - PW, TH, TW, ROW,
                    (LIVE >> (row * SW + va % SW)) % 2, (LIVE >> (row * SW + vb % SW)) % 2,
                    (LIVE >> (row * SW + vc % SW)) % 2, BN, BH, BW, BC, BO, MERGED, MERGED_OUT, PRECISION,
                )  # fmt: skip
            else:
                for column in tl.static_range(SW):
                    if v % SW == column:
                        X = _pick(X0, X1, X2, X3, row * SW + column)
                        a, b, c = _correlate(
                            X, X, X, G, k, begin, end, free, reduced, dh, v // SW - PW, 0, 0, TH, TW, ROW,
                            (LIVE >> (row * SW + column)) % 2, 0, 0, BN, BH, BW, BC, BO, MERGED, MERGED_OUT, PRECISION,
                        )  # fmt: skip
    os = free + tl.arange(0, BO)
    cs = reduced + tl.arange(0, BC)
    _put(out, a, k, tap, os, cs, C, O, split, ELEMENTS, KH * KW, ATOMIC)
    if ROW == 3:
        _put(out, b, k, tap + 1, os, cs, C, O, split, ELEMENTS, KH * KW, ATOMIC)
        _put(out, c, k, tap + 2, os, cs, C, O, split, ELEMENTS, KH * KW, ATOMIC)
