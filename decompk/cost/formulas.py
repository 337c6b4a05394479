"""Every formula: what one operation costs, from its sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ..kernels.problem import Problem


def conv_macs(positions: int, c_in: int, c_out: int, kernel: Sequence[int], groups: int = 1) -> int:
    """Multiply-accumulates of a convolution with `positions` output pixels (input pixels, if it is transposed).

    A fully connected layer is a convolution with one position whose kernel is its whole input.
    """
    return positions * (c_in // groups) * prod(kernel) * c_out


def conv_weights(c_in: int, c_out: int, kernel: Sequence[int], groups: int = 1) -> int:
    """Elements of a convolution's kernel, bias apart."""
    return (c_in // groups) * prod(kernel) * c_out


def eq210_flops(macs: int, outputs: int) -> int:
    """(2.10): HW(2·c_in·t1·t2 − 1)·c_out, which is two per MAC less the first addition of every output element."""
    return 2 * macs - outputs


def profiler_flops(macs: int, weights: int, bias_adds: int, joins: int, w: int) -> int:
    """What the paper's profiler reports: 2 · MAC + w · kernel weights + bias adds + residual adds and pooling.

    w counts the weights' initialiser and regulariser operations: 5 fits Tables 2.2 and 3.1, 2 fits Table 3.4.
    """
    return 2 * macs + w * weights + bias_adds + joins


def pool_flops(outputs: int, window: Sequence[int]) -> int:
    """k · k operations for each output element: comparisons, or additions and one division."""
    return outputs * prod(window)


def norm_flops(elements: int, statistics: bool) -> int:
    """Two operations an element (scale, shift), and three more where mean and variance are computed as well."""
    return elements * (5 if statistics else 2)


def pass_bytes(inputs: int, weights: int, outputs: int, element_size: int = 4) -> int:
    """Compulsory traffic of one pass over a layer, each tensor moved once; the same sum for all three passes.

    Forward reads X and W and writes Y; dgrad reads dY and W and writes dX; wgrad reads dY and X and writes dW.
    """
    return element_size * (inputs + weights + outputs)


def adam_bytes(params: int, tensors: int, element_size: int = 4) -> int:
    """State of Adam: two moments for each parameter, and a float32 step count for each of `tensors` tensors.

    A packed optimizer holds one step count for each tensor of each member, so K members cost K times one.
    """
    return 2 * element_size * params + 4 * tensors


@dataclass(frozen=True)
class OpCost:
    """One pass of a grouped convolution with one config: what it has to do, and what that config does."""

    compulsory_bytes: int  # each tensor once: the floor of device memory
    useful_flops: int
    executed_flops: int  # padding of tiles, blocks and bands included
    l2_bytes: int  # loads of all programs: what is re-read is served by L2


def conv_bytes(problem: Problem) -> int:
    """Compulsory traffic of one pass of K convolutions; an overlap of crops is counted for every member."""
    p = problem
    images = p.K * p.N
    weights = p.K * p.O * p.C * p.taps
    return pass_bytes(images * p.C * p.H * p.W, weights, images * p.O * prod(p.out_size), p.element_size)


def conv_flops(problem: Problem) -> int:
    """Useful FLOPs of one pass of K convolutions: the same for fprop, dgrad and wgrad."""
    p = problem
    return 2 * p.K * p.N * conv_macs(prod(p.out_size), p.C, p.O, p.kernel)
