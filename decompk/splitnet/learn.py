"""Stage one of SplitNet: the task's loss, and what pulls weights and assignments towards groups, trained together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .assignment import Assignment
from .simplex import ReducedGradient


@dataclass(frozen=True)
class Gammas:
    """The weights of the three terms beside the task's loss: R_W, disjoint groups, groups of equal size."""

    weights: float = 1e-3
    disjoint: float = 1e-3
    balance: float = 1e-4


def learn(
    net: nn.Module,
    assignment: Assignment,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    gammas: Gammas,
    lr: float = 1e-3,
    assignment_lr: float = 1e-2,
    watch: Callable[[int, float, float], None] | None = None,
) -> int:
    """Train `net` by Adam and `assignment` by Adam, or ReducedGradient on the simplex, on `batches` of (x, target).

    watch(step, loss, share of fuzzy nodes) is called after every step. Returns after how many steps fewer than one node
    in twenty was fuzzy for the first time; the number of steps + 1 if never.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr)
    if assignment.parametrisation == "simplex":
        mover: torch.optim.Optimizer = ReducedGradient(assignment.parameters(), assignment_lr)
    else:
        mover = torch.optim.Adam(assignment.parameters(), assignment_lr)
    settled = step = 0
    for step, (x, target) in enumerate(batches, start=1):
        optimizer.zero_grad()
        mover.zero_grad()
        task = loss(net(x), target)
        (task + assignment.penalty(net, gammas.weights, gammas.disjoint, gammas.balance)).backward()
        optimizer.step()
        mover.step()
        if settled and watch is None:
            continue
        fuzzy = assignment.fuzzy()
        if not settled and fuzzy < 0.05:
            settled = step
        if watch is not None:
            watch(step, task.item(), fuzzy)
    return settled or step + 1
