"""What dgrad does to its result on the way out: device code that the tile, band and pointer forms share."""

import triton
import triton.language as tl


@triton.jit
def gradient(
    acc, start, at, live, channel, exists, record, kept, CHANNELS, added, raw, joined, mean, rstd, gamma, beta, sums,
    RELU: tl.constexpr, FOLD: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`GradientEpilogue` of acc (pixels, columns) at the offsets start + at, which are there where `live`.

    channel: where each column's vectors are, if it `exists`. FOLD columns of one channel are added up. record: where
    Σg of what is left goes if it is `kept`, and CHANNELS behind it Σg·x̂.
    """
    if added is not None:
        acc += tl.load(added + start + at, live, 0.0).to(tl.float32)
    if raw is not None:
        center = tl.load(mean + channel, exists, 0.0)
        scale = tl.load(rstd + channel, exists, 0.0)
        away = tl.load(raw + start + at, live, 0.0).to(tl.float32) - center[None, :]
        g = acc.to(DTYPE).to(tl.float32)  # the sums are those of what is stored
        if joined is not None:
            g = tl.where(tl.load(joined + start + at, live, 0.0).to(tl.float32) <= 0.0, 0.0, g)
        elif RELU:
            slope = scale
            if gamma is not None:
                slope *= tl.load(gamma + channel, exists, 0.0).to(tl.float32)
            z = away * slope[None, :]
            if beta is not None:
                z += tl.load(beta + channel, exists, 0.0).to(tl.float32)[None, :]
            g = tl.where(z <= 0.0, 0.0, g)
        acc = g
        g = tl.where(live, g, 0.0)
        sum_g = tl.sum(g, 0)
        sum_gx = tl.sum(g * away, 0) * scale
        if FOLD > 1:
            sum_g = tl.sum(tl.reshape(sum_g, (FOLD, sum_g.shape[0] // FOLD)), 0)
            sum_gx = tl.sum(tl.reshape(sum_gx, (FOLD, sum_gx.shape[0] // FOLD)), 0)
        tl.store(sums + record, sum_g, kept)
        tl.store(sums + record + CHANNELS, sum_gx, kept)
    return acc
