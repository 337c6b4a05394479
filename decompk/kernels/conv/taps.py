"""Which taps of a strided kernel meet which parity of rows: arithmetic at compile time, along one axis.

With stride s, the input rows u = h·s + k·d − p of tap k all have the parity q = (k·d − p) mod s, and of that parity
they are row h + (k·d − p − q) / s. Backward, the input row s·i + r meets the output row i + (r + p − k·d) / s where s
divides it. Either way the taps of one parity are first, first + step, …
"""

import triton


@triton.constexpr_function
def first(parity, padding, stride, dilation):
    return (parity + padding) % stride if dilation % stride else 0


@triton.constexpr_function
def step(stride, dilation):
    return stride if dilation % stride else 1


@triton.constexpr_function
def count(parity, kernel, padding, stride, dilation):
    """Number of taps of this parity, for stride 1 or 2."""
    if dilation % stride:
        return len(range((parity + padding) % stride, kernel, stride))
    return 0 if (parity + padding) % stride else kernel


@triton.constexpr_function
def rank(bits, i):
    """How many of the lowest i bits are set."""
    return (bits & ((1 << i) - 1)).bit_count()
