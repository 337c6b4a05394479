"""The three networks that are compared, and what is known of each: as a whole, and layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from .counters import Figures
from .roofs import Roofs

SIDES = ("global", "member", "packed")


@dataclass(frozen=True)
class Side:
    """One network on a batch: its figures measured and analysed, and the compulsory bytes of both passes."""

    measured: Figures
    analysed: Figures
    forward_bytes: int
    backward_bytes: int
    peak: int | None  # bytes at the allocator's peak above weights and optimizer; None off a GPU


@dataclass(frozen=True)
class LayerSide:
    """One layer of one network on a batch, (forward, backward): analysed, and what was measured of it alone."""

    flops: tuple[int, int]
    moved: tuple[int, int]  # compulsory bytes
    counted: tuple[int, int] | None = None  # FLOPs
    seconds: tuple[float, float] | None = None

    @property
    def intensity(self) -> float:
        """FLOP/byte of both passes."""
        return sum(self.flops) / sum(self.moved)

    @property
    def rate(self) -> float | None:
        """FLOP/s of both passes."""
        return sum(self.flops) / sum(self.seconds) if self.seconds else None

    def bound(self, roofs: Roofs, dtype: str) -> tuple[float, float]:
        """Seconds that the roofs allow for each pass."""
        passes = zip(self.moved, self.flops, strict=True)
        forward, back = (roofs.seconds(moved, flops, dtype) for moved, flops in passes)
        return forward, back


@dataclass(frozen=True)
class Layer:
    """One layer: `role` names its law (cost.figures.ROLES), `sides` holds the networks that have it."""

    name: str
    kind: str
    role: str
    sides: dict[str, LayerSide]
