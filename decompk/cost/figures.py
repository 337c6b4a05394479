"""What is said of a layer and of a network: FLOPs under each convention, parameters, activations, bytes.

All figures are for one sample. The printed tables of the paper follow no single convention, so several stand side by
side (CONVENTIONS).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from math import prod

from .formulas import eq210_flops, profiler_flops

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Exponents:
    """Sub-network over global network is (1/K) to these powers, for a uniform split without overlap (2.1.2)."""

    flops: int
    weights: int
    activations: int


# Layers of any other role have no ratio in the paper. Its 1/K⁴ for the FLOPs of the first FC is a slip for 1/K³.
ROLES = {
    "first conv": Exponents(2, 1, 2),
    "conv": Exponents(3, 2, 2),
    "first fc": Exponents(3, 3, 1),
    "fc": Exponents(2, 2, 1),
    "last fc": Exponents(1, 1, 0),
}


@dataclass(frozen=True)
class Cost:
    """Additive figures of a layer or a network, for one sample; they add with + and scale with *."""

    macs: int = 0
    mac_outputs: int = 0  # output elements of convolutions and matrix products
    backward_macs: int = 0  # dgrad and wgrad
    kernel_weights: int = 0  # kernel elements read: no bias, counted again at every use
    bias_flops: int = 0
    elementwise_flops: int = 0  # norms, activations, pooling, adds and everything else without MACs
    join_flops: int = 0  # the part of it that is residual adds and pooling
    params: int = 0
    param_tensors: int = 0  # weights, biases, …: how many tensors the parameters are
    statistics: int = 0  # running means and variances
    activations: int = 0  # output elements
    forward_samples: int = 0  # elements moved for every sample
    forward_weights: int = 0  # elements moved once a batch
    backward_samples: int = 0
    backward_weights: int = 0
    saved_samples: int = 0  # elements that autograd keeps for every sample, each tensor once
    saved_vectors: int = 0  # elements kept once a batch: a batch norm's mean and deviation
    saved_indices: int = 0  # int64, for every sample: which pixel a max-pool took
    saved_masks: int = 0  # what dropout drew, for every sample
    saved_image: int = 0  # the network's input, where something keeps it; not among saved_samples

    def flops(self, convention: str = "2mac") -> int:
        """Forward FLOPs under one of CONVENTIONS."""
        return CONVENTIONS[convention](self)

    @property
    def backward_flops(self) -> int:
        """Two per MAC of dgrad and wgrad; the layer that reads the image needs no dgrad."""
        return 2 * self.backward_macs

    def forward_bytes(self, element_size: int = 4, batch: int = 1) -> int:
        """Compulsory bytes of the forward pass of `batch` samples."""
        return element_size * (batch * self.forward_samples + self.forward_weights)

    def backward_bytes(self, element_size: int = 4, batch: int = 1) -> int:
        """Compulsory bytes of the backward pass of `batch` samples."""
        return element_size * (batch * self.backward_samples + self.backward_weights)

    def saved_bytes(self, element_size: int = 4, batch: int = 1, mask_size: int | None = None) -> int:
        """Bytes that autograd keeps from the forward to the backward pass, without parameters, buffers and the image.

        `mask_size`: bytes of one drawn number of dropout; by default a whole element, as on a CPU. A GPU keeps 1.
        """
        masks = self.saved_masks * (element_size if mask_size is None else mask_size)
        samples = element_size * self.saved_samples + 8 * self.saved_indices + masks
        return batch * samples + element_size * self.saved_vectors

    def image_bytes(self, element_size: int = 4, batch: int = 1) -> int:
        """Bytes of the input that autograd keeps."""
        return element_size * batch * self.saved_image

    def figures(self, element_size: int = 4, batch: int = 1) -> dict[str, int]:
        """Every figure by name: FLOPs, MACs and activations of one sample, bytes of a batch."""
        return {
            "macs": self.macs,
            "flops_2mac": self.flops("2mac"),
            "flops_eq2.10": self.flops("eq2.10"),
            "flops_profiler_w5": self.flops("paper-profiler w=5"),
            "flops_profiler_w2": self.flops("paper-profiler w=2"),
            "bias_flops": self.bias_flops,
            "elementwise_flops": self.elementwise_flops,
            "backward_flops": self.backward_flops,
            "params": self.params,
            "statistics": self.statistics,
            "activations": self.activations,
            "forward_bytes": self.forward_bytes(element_size, batch),
            "backward_bytes": self.backward_bytes(element_size, batch),
        }

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(getattr(self, f.name) * times for f in fields(Cost)))


CONVENTIONS: dict[str, Callable[[Cost], int]] = {
    "2mac": lambda c: 2 * c.macs,
    "eq2.10": lambda c: eq210_flops(c.macs, c.mac_outputs),
    "paper-profiler w=5": lambda c: profiler_flops(c.macs, c.kernel_weights, c.bias_flops, c.join_flops, 5),
    "paper-profiler w=2": lambda c: profiler_flops(c.macs, c.kernel_weights, c.bias_flops, c.join_flops, 2),
    "paper-profiler w=5 without adds and pooling": lambda c: profiler_flops(
        c.macs, c.kernel_weights, c.bias_flops, 0, 5
    ),
}


@dataclass(frozen=True)
class Saved:
    """One tensor that autograd keeps: what it holds, elements for one sample (of "vector" for a batch), shape.

    `content`: "sample", "vector", "index" or "mask"; see the fields saved_… of Cost. `shape` is (channels, *spatial) as
    it was made: a later view of the same memory does not change it.
    """

    content: str
    elements: int
    shape: Shape


SAVED_CONTENTS = ("sample", "vector", "index", "mask")


@dataclass(frozen=True)
class LayerCost(Cost):
    """One node that computes. Shapes are those of one sample.

    `name`: the module's path, or the graph's name of a functional operation; a module's second call ends in "#2".
    `kind`: conv, conv_transpose, linear, matmul, norm, activation, pool, add, mul, cat, copy (moves data), other.
    `role`: one of ROLES, or "grouped conv", "last conv", "only fc" (first and last at once), "other".
    Parameters used twice are counted at their first use; `saved` lists what autograd keeps, at the first that does.
    """

    name: str = ""
    kind: str = "other"
    role: str = "other"
    in_shapes: tuple[Shape, ...] = ()
    out_shape: Shape = ()
    kernel: Shape = ()
    groups: int = 1
    saved: tuple[Saved, ...] = ()

    @property
    def in_shape(self) -> Shape:
        """The first input's shape."""
        return self.in_shapes[0] if self.in_shapes else ()

    @property
    def positions(self) -> int:
        """How often the kernel is applied: at output pixels, at input pixels if transposed, at tokens if linear."""
        if self.kind == "linear":
            return prod(self.out_shape[:-1])
        return prod((self.in_shape if self.kind == "conv_transpose" else self.out_shape)[1:])


def total(layers: Iterable[Cost]) -> Cost:
    """The sum of the layers' figures."""
    return sum(layers, start=Cost())
