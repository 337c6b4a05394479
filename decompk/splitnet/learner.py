"""Stage one of SplitNet: the task's loss, and what pulls weights and assignments towards groups, trained together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .assignment import Assignment
from .simplex import ReducedGradient

SETTLED = 0.05  # the share of fuzzy nodes below which groups count as found


@dataclass(frozen=True)
class Gammas:
    """The weights of the three terms beside the task's loss: R_W, disjoint groups, groups of equal size."""

    weights: float = 1e-3
    disjoint: float = 1e-3
    balance: float = 1e-4


class Learner:
    """Trains `net` by Adam and `assignment` by Adam, or ReducedGradient on the simplex, a batch a step.

    freeze: a layer's assignments stand still from when fewer than that share of its nodes are fuzzy (0.2 in the
    supplement, for a split with overlap). steps: how many were made; settled: at which of them fewer than one node in
    twenty was fuzzy for the first time, 0 before.
    """

    def __init__(
        self,
        net: nn.Module,
        assignment: Assignment,
        loss: Callable[[Tensor, Tensor], Tensor],
        gammas: Gammas,
        lr: float = 1e-3,
        assignment_lr: float = 1e-2,
        freeze: float | None = None,
    ):
        self.net, self.assignment, self.loss, self.gammas, self.freeze = net, assignment, loss, gammas, freeze
        self.optimizer = torch.optim.Adam(net.parameters(), lr)
        mover = ReducedGradient if assignment.parametrisation == "simplex" else torch.optim.Adam
        self.mover: torch.optim.Optimizer = mover(assignment.parameters(), assignment_lr)
        self.steps = self.settled = 0

    def step(self, x: Tensor, target: Tensor) -> float:
        """One step; the task's loss before it."""
        self.optimizer.zero_grad()
        self.mover.zero_grad()
        task, g = self.loss(self.net(x), target), self.gammas
        (task + self.assignment.penalty(self.net, g.weights, g.disjoint, g.balance)).backward()
        self.optimizer.step()
        self.mover.step()
        if self.freeze is not None:
            self.assignment.hold()
            self.assignment.freeze(self.freeze)
        self.steps += 1
        if not self.settled and self.assignment.fuzzy() < SETTLED:
            self.settled = self.steps
        return task.item()

    def state_dict(self) -> dict[str, Any]:
        """All that a step depends on, tensors and plain values."""
        parts = (self.net, self.assignment, self.optimizer, self.mover)
        return {"parts": [part.state_dict() for part in parts], "steps": [self.steps, self.settled]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What state_dict gave, for a network and an assignment of the same shapes."""
        parts: tuple[Any, ...] = (self.net, self.assignment, self.optimizer, self.mover)
        for part, theirs in zip(parts, state["parts"], strict=True):
            part.load_state_dict(theirs)
        self.steps, self.settled = state["steps"]


def learn(
    net: nn.Module,
    assignment: Assignment,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    gammas: Gammas,
    lr: float = 1e-3,
    assignment_lr: float = 1e-2,
    freeze: float | None = None,
    watch: Callable[[int, float, float], None] | None = None,
) -> int:
    """A Learner on `batches` of (x, target); watch(step, loss, share of fuzzy nodes) is called after every step.

    Returns after how many steps fewer than one node in twenty was fuzzy for the first time; their number + 1 if never.
    """
    learner = Learner(net, assignment, loss, gammas, lr, assignment_lr, freeze)
    for x, target in batches:
        task = learner.step(x, target)
        if watch is not None:
            watch(learner.steps, task, assignment.fuzzy())
    return learner.settled or learner.steps + 1
