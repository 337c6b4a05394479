"""Every member's own learning rate, epoch by epoch, and when it stops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .recipe import Phase


class Schedule:
    """A Phase's rates: each member's lr, divided at `drops`, and by √10 where `plateau` epochs brought it no gain."""

    def __init__(self, phase: Phase, members: Sequence[int]):
        self.phase = phase
        self.members = tuple(members)
        self.best = [-math.inf] * len(self.members)
        self.waited = [0] * len(self.members)  # epochs since the last gain
        self.spared = [0] * len(self.members)  # epochs since the last gain or division
        self.cuts = [0] * len(self.members)

    def rates(self, epoch: int) -> list[float]:
        """Each member's learning rate in `epoch`, counted from 0."""
        divisor = math.prod(by for start, by in self.phase.drops if epoch >= start)
        rates = []
        for member, cuts in zip(self.members, self.cuts, strict=True):
            dropped = self.phase.of_member("lr", member) / divisor
            rates.append(max(dropped / 10 ** (cuts / 2), min(self.phase.least_lr, dropped)))
        return rates

    def observe(self, accuracy: Sequence[float]) -> list[int]:
        """Hear of each member's accuracy after an epoch; returns the positions of those that now have had enough."""
        enough = []
        for i, now in enumerate(accuracy):
            if now > self.best[i]:
                self.best[i], self.waited[i], self.spared[i] = now, 0, 0
                continue
            self.waited[i] += 1
            self.spared[i] += 1
            if self.phase.plateau and self.spared[i] >= self.phase.plateau:
                self.cuts[i], self.spared[i] = self.cuts[i] + 1, 0
            if self.phase.patience and self.waited[i] == self.phase.patience:
                enough.append(i)
        return enough

    def state_dict(self) -> dict[str, Any]:
        return {name: list(getattr(self, name)) for name in ("best", "waited", "spared", "cuts")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, values in state.items():
            setattr(self, name, list(values))
