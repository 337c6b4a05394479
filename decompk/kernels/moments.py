"""Counts, means and sums of squared deviations of pieces, as those of their union: device code."""

import triton
import triton.language as tl


@triton.jit
def union(count, mean, m2):
    """Moments of the union of all pieces along axis 0 (Chan, Golub, LeVeque)."""
    total = tl.sum(count, 0)
    center = tl.sum(count * mean, 0) / tl.maximum(total, 1.0)
    away = mean - center[None, :]
    return total, center, tl.sum(m2 + count * away * away, 0)
