"""The paper's powers of 1/K, and by name what keeps a real network from them.

A member's figure over the global network's is (1/K)^p times factors. The powers are cost.figures.ROLES'; the factors
come from the shapes alone, so a wrong power is not absorbed by any of them. A total begins at the law of convolutions;
each factor is what the total gains when one more of its causes is let in, and their product is the expected ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

from ..cost.figures import ROLES, LayerCost, Saved
from ..crops import Crop
from ..report.decomposition import Pair

# How often a role divides (output pixels, what one output reads, outputs) by K; a first FC reads channels and pixels.
DIVIDES = {"first conv": (1, 0, 1), "conv": (1, 1, 1), "first fc": (0, 2, 1), "fc": (0, 1, 1), "last fc": (0, 1, 0)}
NO_LAW = "layers without a law in the paper"
VECTORS = "bias and norm vectors"
POOLED = "global pooling and vectors"
MARGIN, OVERLAP, MAPS, CHANNELS = "margin", "overlap of crops", "uneven maps", "uneven channels"
ROLE_FACTORS = {
    "first conv": "first layer",
    "first fc": "fully connected layers",
    "fc": "fully connected layers",
    "last fc": "last layer",
}
GEOMETRY = (MARGIN, OVERLAP, MAPS, CHANNELS)
FACTORS = (*dict.fromkeys(ROLE_FACTORS.values()), VECTORS, POOLED, NO_LAW, *GEOMETRY)


@dataclass(frozen=True)
class Field:
    """Where the crops lie: the part of the input they reach over, and how often they cover it."""

    margin: float
    overlap: float

    @classmethod
    def of(cls, crops: Sequence[Crop], size: Sequence[int]) -> Field:
        """size: the input's pixels per axis."""
        spans = [(min(c.start[i] for c in crops), max(c.start[i] + c.size[i] for c in crops)) for i in range(len(size))]
        reached = prod(end - start for start, end in spans)
        return cls(reached / prod(size), sum(prod(c.size) for c in crops) / reached)


@dataclass(frozen=True)
class Part:
    """One addend of a figure: the global network's amount, the power of 1/K it follows, and what else acts on it.

    `why`: the factor that accounts for a power other than the whole network's; "" for the usual one.
    """

    amount: float
    power: float | None  # None: the paper has no law, `geometry` then holds the whole ratio as NO_LAW
    why: str
    geometry: dict[str, float]


@dataclass(frozen=True)
class Ratio:
    """A law's ratio of member to global, the factors that act on it, and their product with it."""

    law: float
    power: int
    factors: dict[str, float]
    expected: float


def expected(parts: Iterable[Part], K: int, power: int) -> Ratio:
    """Of a total that would follow (1/K)^power if all its parts did."""
    parts = [part for part in parts if part.amount]
    whole = sum(part.amount for part in parts)
    law = before = K**-power
    factors = {}
    for i, name in enumerate(FACTORS):
        active = FACTORS[: i + 1]
        after = sum(part.amount * _value(part, K, power, active) for part in parts) / whole if whole else law
        if abs(after / before - 1) > 1e-12:
            factors[name] = after / before
        before = after
    return Ratio(law, power, factors, before)


def _value(part: Part, K: int, power: int, active: Sequence[str]) -> float:
    own = part.power is not None and (not part.why or part.why in active)
    value = K ** -(part.power if own else power)
    if part.power is None and NO_LAW in active:
        return part.geometry[NO_LAW]
    return value * prod(part.geometry.get(name, 1.0) for name in active)


def flops_parts(pairs: Iterable[Pair], K: int, field: Field, amount: Callable[[LayerCost], int]) -> list[Part]:
    """Of every layer with MACs; `amount`: its forward or backward FLOPs."""
    parts = []
    for pair in pairs:
        if pair.whole is None or pair.member is None or not pair.whole.macs:
            continue
        role, powers = role_of(pair), pair.exponents
        if powers is None:
            parts.append(_lawless(amount(pair.whole), pair.member.macs / pair.whole.macs))
            continue
        geometry = _geometry(_ratios(pair.whole, pair.member), DIVIDES[role], K, field)
        parts.append(Part(amount(pair.whole), powers.flops, ROLE_FACTORS.get(role, ""), geometry))
    return parts


def parameter_parts(pairs: Iterable[Pair], K: int, field: Field) -> list[Part]:
    """Kernels by their role; vectors divide like the outputs they belong to."""
    parts = []
    for pair in pairs:
        whole, member, powers = pair.whole, pair.member, pair.exponents
        if whole is None or member is None or not whole.params:
            continue
        kernel, own = (min(layer.kernel_weights, layer.params) for layer in (whole, member))
        if kernel and powers:
            role, (_, reads, outputs) = role_of(pair), _ratios(whole, member)
            geometry = _geometry((1, reads, outputs), (0, *DIVIDES[role][1:]), K, field)
            parts.append(Part(kernel, powers.weights, ROLE_FACTORS.get(role, ""), geometry))
        elif kernel:
            parts.append(_lawless(kernel, own / kernel))
        if vectors := whole.params - kernel:
            ratio = (member.params - own) / vectors
            parts.append(_vector(vectors, ratio, VECTORS, K))
    return parts


def saved_parts(pairs: Iterable[Pair], K: int, field: Field, size: Callable[[Saved], int]) -> list[Part]:
    """Every tensor that autograd keeps; `size`: its bytes."""
    parts = []
    for pair in pairs:
        if pair.whole is None or pair.member is None:
            continue
        for whole, member in zip(pair.whole.saved, pair.member.saved, strict=False):
            ratio = member.elements / whole.elements
            channels = member.shape[0] / whole.shape[0]
            if prod(whole.shape[1:]) == 1:
                why = VECTORS if whole.content == "vector" else POOLED
                parts.append(_vector(size(whole), ratio, why, K))
            elif channels == 1:
                parts.append(_lawless(size(whole), ratio))
            else:
                geometry = _geometry((ratio / channels, 1, channels), (1, 0, 1), K, field)
                parts.append(Part(size(whole), ROLES["conv"].activations, "", geometry))
    return parts


def _lawless(amount: float, ratio: float) -> Part:
    return Part(amount, None, NO_LAW, {NO_LAW: ratio})


def _vector(amount: float, ratio: float, why: str, K: int) -> Part:
    """One number a channel: 1/K, or all of them in a last layer."""
    divided = ratio != 1
    law = ROLES["fc" if divided else "last fc"].activations
    return Part(amount, law, why, {CHANNELS: ratio * K if divided else 1.0})


def role_of(pair: Pair) -> str:
    """The role whose law holds: a last layer whose outputs are divided is like any other."""
    role = pair.either.role
    divided = pair.whole and pair.member and pair.whole.out_shape != pair.member.out_shape
    return "fc" if role == "last fc" and divided else role


def _ratios(whole: LayerCost, member: LayerCost) -> tuple[float, float, float]:
    """Member over global: output pixels, what one output reads, outputs."""
    sides = [(layer.positions, _reads(layer), _outputs(layer)) for layer in (whole, member)]
    return tuple(b / a if a else 1.0 for a, b in zip(*sides, strict=True))


def _reads(layer: LayerCost) -> int:
    channels = layer.in_shape[-1 if layer.kind == "linear" else 0] if layer.in_shape else 1
    return channels // layer.groups * prod(layer.kernel)


def _outputs(layer: LayerCost) -> int:
    return layer.out_shape[-1 if layer.kind == "linear" else 0] if layer.out_shape else 1


def _geometry(ratios: Sequence[float], divides: Sequence[int], K: int, field: Field) -> dict[str, float]:
    """The factors beyond 1/K for each division: of pixels, and of what is read and put out."""
    pixels, reads, outputs = (ratio * K**times for ratio, times in zip(ratios, divides, strict=True))
    if divides[1] == 2:  # a first FC reads the pixels as well
        pixels, reads = pixels * reads, 1.0
    elif not divides[0]:
        return {MAPS: pixels, CHANNELS: reads * outputs}
    crops = field.margin * field.overlap
    return {MARGIN: field.margin, OVERLAP: field.overlap, MAPS: pixels / crops, CHANNELS: reads * outputs}
