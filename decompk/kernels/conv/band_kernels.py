"""The band form's device code: see `band` for the idea and `band_geometry.Bands` for the words.

R and F are the channels read and written (C and O, in dgrad O and C); i counts the values of a segment that is read, f
those of the rows that are written. q is a row that is read, counted from the first row of a group.
"""

import triton
import triton.language as tl

from ..moments import union
from ..product import dot
from .gradient_kernels import gradient


@triton.jit
def _rows(
    X, k, n0, g0, q, start, top, left, N, H, VALUES, WIDTH, IMAGE, PITCH,
    BN: tl.constexpr, BG: tl.constexpr, BLOCK: tl.constexpr, PERIOD: tl.constexpr, BEFORE: tl.constexpr,
    VECTOR: tl.constexpr, CROPS: tl.constexpr, DESCRIPTOR: tl.constexpr, TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """(BN · BG, BLOCK) values from `start` on, of rows group · PERIOD + q, and which of them lie inside the images."""
    m = tl.arange(0, BN * BG)
    m = m[None, :] if TRANSPOSED else m[:, None]
    i = tl.arange(0, BLOCK)
    i = i[:, None] if TRANSPOSED else i[None, :]
    n = n0 + m // BG
    row = (g0 + m % BG) * PERIOD + q
    lines = (n < N) & (row >= 0) & (row < H)
    inside = lines & (start + i >= 0) & (start + i < VALUES)
    if DESCRIPTOR:
        r = top + q + BEFORE * PERIOD  # made positive for truncating division
        a = X.load([0 if CROPS else k, n0, g0 + r // PERIOD - BEFORE, r % PERIOD, left + start])
        a = a.reshape(BN * BG, BLOCK)
        a = a.T if TRANSPOSED else a
    else:
        line = ((0 if CROPS else k.to(tl.int64) * N) + n.to(tl.int64)) * IMAGE + (top + row).to(tl.int64) * PITCH
        value = (left + start) // VECTOR * VECTOR + i  # says that loads start at whole vectors
        a = tl.load(X + line * VECTOR + value, lines & (value >= 0) & (value < WIDTH * VECTOR), 0.0)
    if CROPS:
        a = tl.where(inside, a, 0.0)
    return a, inside


@triton.jit
def _lead(at, R: tl.constexpr, VECTOR: tl.constexpr):
    """How far value `at`, the first of a pixel, lies behind a whole vector: where loads may start."""
    STEP: tl.constexpr = R & -R if R & -R < VECTOR else VECTOR
    return (at & (VECTOR - 1)) // STEP * STEP  # says that pixels start at multiples of STEP


@triton.jit
def _tap(
    i, f, q, DGRAD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    R: tl.constexpr, F: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Where in a member's weights (O, kh, kw, C) value i of a read segment meets value f of written rows, and if."""
    pixel = FIRST + i // R
    j = f // RUN
    if RUN % F == 0:  # the same in simpler words, in which the compiler sees runs of F
        w = f // F % (RUN // F)
        free = f % F
    else:
        w = f % RUN // F
        free = f % RUN % F
    if DGRAD:
        u = j + PH - q * SH
        v = w + PW - pixel * SW
        channels = (i % R, free)
        C: tl.constexpr = F
    else:
        u = q + PH - j * SH
        v = pixel + PW - w * SW
        channels = (free, i % R)
        C: tl.constexpr = R
    valid = (i >= 0) & (w < COLUMNS) & (u >= 0) & (u < KH * DH) & (v >= 0) & (v < KW * DW)
    valid = valid & (u % DH == 0) & (v % DW == 0)
    return ((channels[0] * KH + u // DH) * KW + v // DW) * C + channels[1], valid


@triton.jit
def conv_band(
    X, weight, Y, offsets, bias, scale, shift, residual, moments, in_scale, in_shift,
    added, raw, joined, mean, rstd, gamma, beta, sums,
    N, H, VALUES, WIDTH, IMAGE, PITCH, HO, VALUES_OUT, TN, TG, SEGMENTS, QF, QN,
    DGRAD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    R: tl.constexpr, F: tl.constexpr, QS: tl.constexpr, PERIOD: tl.constexpr, BEFORE: tl.constexpr,
    FIRST: tl.constexpr, ADVANCE: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
    STACK: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr,
    VECTOR: tl.constexpr, VECTOR_OUT: tl.constexpr, CROPS: tl.constexpr,
    LOAD: tl.constexpr, STORE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BIAS: tl.constexpr, MOMENTS: tl.constexpr, AFFINE: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    PROLOGUE: tl.constexpr, IN_RELU: tl.constexpr, GATED: tl.constexpr, EXPANDED: tl.constexpr,
    FOLDED: tl.constexpr,
):  # fmt: skip
    """y (fprop) from x, or dx (dgrad) from dy: R read and F written channels; QF, QF + QS, … are QN read rows."""
    pid = tl.program_id(0)
    s = pid % SEGMENTS
    g0 = pid // SEGMENTS % TG * BG
    n0 = pid // (SEGMENTS * TG) % TN * BN
    k = pid // (SEGMENTS * TG * TN)
    M: tl.constexpr = BN * BG
    BF: tl.constexpr = STACK * RUN
    top = 0
    left = 0
    if CROPS:
        top = tl.load(offsets + 2 * k)
        left = tl.load(offsets + 2 * k + 1) * R
    start = s * (ADVANCE * R) + FIRST * R
    lead = _lead(left + start, R, VECTOR)
    start -= lead
    i = tl.arange(0, BR) - lead
    f = tl.arange(0, BF)
    acc = tl.zeros((M, BF), tl.float32)
    for t in tl.range(0, QN):
        q = QF + t * QS
        a, inside = _rows(
            X, k, n0, g0, q, start, top, left, N, H, VALUES, WIDTH, IMAGE, PITCH,
            BN, BG, BR, PERIOD, BEFORE, VECTOR, CROPS, LOAD,
        )  # fmt: skip
        if PROLOGUE:
            c = k * R + (i + VECTOR * R) % R
            value = a.to(tl.float32) * tl.load(in_scale + c)[None, :] + tl.load(in_shift + c)[None, :]
            if IN_RELU:
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            a = tl.where(inside, value, 0.0).to(a.dtype)
        if EXPANDED:
            at = ((k * QN + t) * BR + i)[:, None] * BF + f[None, :]
            valid = (i >= 0)[:, None]
        else:
            at, valid = _tap(
                i[:, None], f[None, :], q, DGRAD, KH, KW, SH, SW, PH, PW, DH, DW, R, F, FIRST, COLUMNS, RUN
            )  # fmt: skip
            at += k * (R * F * KH * KW)
        acc = dot(a, tl.load(weight + at, valid, 0.0).to(a.dtype), acc, PRECISION)

    m = tl.arange(0, M)
    n = n0 + m // BG
    h = ((g0 + m % BG) * STACK)[:, None] + (f // RUN)[None, :]
    value_out = s * (COLUMNS * F) + f % RUN
    full = f % RUN < COLUMNS * F  # the rest pads the run
    live = (n < N)[:, None] & (h < HO) & (full & (value_out < VALUES_OUT * VECTOR_OUT))[None, :]
    free = k * F + f % RUN % F
    # A tile is one piece of its channels' pixels, or where columns do not fold evenly every column of it is one.
    FOLD: tl.constexpr = BF // F if FOLDED else 1
    piece = pid.to(tl.int64)
    of_channel = f
    kept = full
    if FOLDED:
        of_channel = tl.arange(0, F)
        kept = of_channel < F
    else:
        piece = piece * (STACK * COLUMNS) + f // RUN * COLUMNS + f % RUN // F
        of_channel = f % RUN % F
    if BIAS:
        acc += tl.load(bias + free, full, 0.0).to(tl.float32)[None, :]
    if MOMENTS:
        number = tl.sum(live.to(tl.float32), 0)
        rounded = acc.to(Y.dtype if STORE else Y.dtype.element_ty).to(tl.float32)
        mean = tl.sum(tl.where(live, rounded, 0.0), 0) / tl.maximum(number, 1.0)
        off = tl.where(live, rounded - mean[None, :], 0.0)
        m2 = tl.sum(off * off, 0)
        if FOLDED:
            means = tl.reshape(mean, (FOLD, F))
            # Differences from the first lose nothing to a large common mean.
            origin = tl.sum(tl.where((tl.arange(0, FOLD) == 0)[:, None], means, 0.0), 0)
            number, mean, m2 = union(tl.reshape(number, (FOLD, F)), means - origin[None, :], tl.reshape(m2, (FOLD, F)))
            mean += origin
        record = moments + piece * (3 * F) + of_channel
        tl.store(record, number, kept)
        tl.store(record + F, mean, kept)
        tl.store(record + 2 * F, m2, kept)
    if AFFINE:
        acc = acc * tl.load(scale + free, full, 0.0)[None, :] + tl.load(shift + free, full, 0.0)[None, :]
    column = s if SPLIT else 0
    within = 0 if SPLIT else s * (COLUMNS * F)
    line = (k.to(tl.int64) * N + n)[:, None] * HO + h
    address = line * (VALUES_OUT * VECTOR_OUT) + value_out[None, :]
    if RESIDUAL:
        if STORE:
            rest = residual.load([k, n0, g0 * STACK, column, within]).reshape(M, BF)
        else:
            rest = tl.load(residual + address, live, 0.0)
        acc += rest.to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if DGRAD:
        acc = gradient(
            acc, 0, address, live, free, full, piece * (2 * F) + of_channel, kept, F,
            added, raw, joined, mean, rstd, gamma, beta, sums, GATED, FOLD, Y.dtype if STORE else Y.dtype.element_ty,
        )  # fmt: skip
    if STORE:
        Y.store([k, n0, g0 * STACK, column, within], acc.to(Y.dtype).reshape(1, BN, BG * STACK, 1, RUN))
    else:
        tl.store(Y + address, acc.to(Y.dtype.element_ty), live)


@triton.jit
def expand_band(
    weight, bands, QF, QN,
    DGRAD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    R: tl.constexpr, F: tl.constexpr, QS: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr,
    RUN: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """bands (K, QN, BR, BF): what conv_band would gather, ROWS of one band a program."""
    pid = tl.program_id(0)
    band = pid // (BR // ROWS)
    i = (pid % (BR // ROWS) * ROWS + tl.arange(0, ROWS))[:, None]
    f = tl.arange(0, BF)[None, :]
    at, valid = _tap(
        i, f, QF + band % QN * QS, DGRAD, KH, KW, SH, SW, PH, PW, DH, DW, R, F, FIRST, COLUMNS, RUN
    )  # fmt: skip
    value = tl.load(weight + band // QN * (R * F * KH * KW) + at, valid, 0.0)
    tl.store(bands + (band * BR + i) * BF + f, value)


@triton.jit
def wgrad_band(
    X, G, offsets, out, N, H, VALUES, WIDTH, IMAGE, PITCH, HO, VALUES_OUT, TN, TG, SEGMENTS, SPLITS, SHARES,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    R: tl.constexpr, F: tl.constexpr, QF: tl.constexpr, PERIOD: tl.constexpr, BEFORE: tl.constexpr,
    FIRST: tl.constexpr, ADVANCE: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
    BN: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr, ROWS: tl.constexpr,
    VECTOR: tl.constexpr, VECTOR_OUT: tl.constexpr, CROPS: tl.constexpr,
    LOAD: tl.constexpr, LOAD_OUT: tl.constexpr, PRECISION: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Bands of ROWS kernel rows, over one split of the steps, into out (splits, K, kh, BR, RUN); ATOMIC: into dw."""
    pid = tl.program_id(0)
    kh = pid % SHARES * ROWS
    split = pid // SHARES % SPLITS
    k = pid // (SHARES * SPLITS)
    top = 0
    left = 0
    if CROPS:
        top = tl.load(offsets + 2 * k)
        left = tl.load(offsets + 2 * k + 1) * R
    lead = _lead(left + FIRST * R, R, VECTOR)
    steps = TN * TG * SEGMENTS
    begin = split * (steps // SPLITS) + tl.minimum(split, steps % SPLITS)
    end = begin + steps // SPLITS + (split < steps % SPLITS).to(tl.int32)
    bands = ()
    for t in tl.static_range(ROWS):  # noqa: B007
        bands = bands + (tl.zeros((BR, RUN), tl.float32),)
    for step in tl.range(begin, end):
        s = step % SEGMENTS
        g0 = step // SEGMENTS % TG * BG
        n0 = step // (SEGMENTS * TG) * BN
        g, _ = _rows(
            G, k, n0, g0, 0, s * (COLUMNS * F), 0, 0, N, HO, VALUES_OUT * VECTOR_OUT, VALUES_OUT,
            HO * VALUES_OUT, VALUES_OUT,
            BN, BG, RUN, 1, 0, VECTOR_OUT, False, LOAD_OUT,
        )  # fmt: skip
        start = s * (ADVANCE * R) + FIRST * R - lead
        sums = ()
        for t in tl.static_range(ROWS):
            a, _ = _rows(
                X, k, n0, g0, QF + (kh + t) * DH, start, top, left, N, H, VALUES, WIDTH, IMAGE, PITCH,
                BN, BG, BR, PERIOD, BEFORE, VECTOR, CROPS, LOAD, True,
            )  # fmt: skip
            sums = sums + (dot(a, g, bands[t], PRECISION),)
        bands = sums
    i = (tl.arange(0, BR) - lead)[:, None]
    f = tl.arange(0, RUN)[None, :]
    for t in tl.static_range(ROWS):
        at, valid = _tap(
            i, f, QF + (kh + t) * DH, False, KH, KW, SH, SW, PH, PW, DH, DW, R, F, FIRST, COLUMNS, RUN
        )  # fmt: skip
        if ATOMIC:
            tl.atomic_add(out + k.to(tl.int64) * (R * F * KH * KW) + at, bands[t], valid, sem="relaxed")
        else:
            band = (split * (tl.num_programs(0) // (SHARES * SPLITS)) + k) * KH + kh + t
            tl.store(out + band.to(tl.int64) * (BR * RUN) + i * RUN + f, bands[t], valid)


@triton.jit
def fold_band(
    bands, out, K, SHARE,
    KH: tl.constexpr, KW: tl.constexpr, C: tl.constexpr, O: tl.constexpr, SW: tl.constexpr, DW: tl.constexpr,
    COLUMNS: tl.constexpr, BR: tl.constexpr, RUN: tl.constexpr, ELEMENTS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """out (·, K, O, kh, kw, C): sums of the diagonals of bands (· · SHARE, K, kh, BR, RUN) over SHARE splits."""
    blocks = tl.cdiv(O * KH * KW * C, ELEMENTS)
    pid = tl.program_id(0)
    e = pid % blocks * ELEMENTS + tl.arange(0, ELEMENTS)
    k = pid // blocks % K
    group = pid // (blocks * K)
    c = e % C
    kw = e // C % KW
    kh = e // (C * KW) % KH
    o = e // (C * KW * KH)
    acc = tl.zeros((ELEMENTS, TERMS), tl.float32)
    for t in tl.range(0, SHARE * COLUMNS, TERMS):
        term = t + tl.arange(0, TERMS)
        w = term % COLUMNS
        band = ((group * SHARE + term // COLUMNS).to(tl.int64)[None, :] * K + k) * KH + kh[:, None]
        i = (w[None, :] * SW + (kw * DW)[:, None]) * C + c[:, None]
        f = w[None, :] * O + o[:, None]
        valid = (e < O * KH * KW * C)[:, None] & (term < SHARE * COLUMNS)[None, :]
        acc += tl.load(bands + (band * BR + i) * RUN + f, valid, 0.0)
    at = (group * K + k).to(tl.int64) * (O * KH * KW * C) + e
    tl.store(out + at, tl.sum(acc, 1).to(out.dtype.element_ty), e < O * KH * KW * C)
