"""The reduced gradient on the simplex (supplement, section 1): assignments trained as they are, without a softmax."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import DecompkError


def reduced_gradient(d: Tensor, gradient: Tensor) -> Tensor:
    """Equation (2): the gradient along the simplex, of every column of d (M, n); each column of the result sums to 0.

    μ is the largest component of a column, and takes what the others give. A component at 0 whose reduced gradient is
    positive stays; one whose is negative may leave 0, which the printed cases leave open.
    """
    largest = d.argmax(0, keepdim=True)
    away = gradient - gradient.gather(0, largest)
    away = torch.where((d == 0) & (away > 0), 0, away)
    return away.scatter(0, largest, -away.sum(0, keepdim=True))


def largest_step(d: Tensor, direction: Tensor) -> Tensor:
    """(n,): how far each column of d can go against `direction` until a component reaches 0; infinite if none falls."""
    falls = direction > 0
    return torch.where(falls, d / direction.where(falls, 1), torch.inf).amin(0)


class ReducedGradient(torch.optim.Optimizer):
    """d ← d − γ ∇_red J for parameters (M, n) whose columns are on the simplex: they never leave it.

    γ is `lr`, cut, for each column by itself, at the largest admissible step; a column whose gradient is not finite
    stays where it is. Raises DecompkError for parameters whose
    columns are not on the simplex.
    """

    def __init__(self, params: Iterable, lr: float = 0.1):
        if lr <= 0:
            raise DecompkError(f"a step of {lr} goes nowhere: give a positive lr.")
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                if (
                    p.dim() != 2
                    or bool((p < 0).any())
                    or not torch.allclose(p.sum(0), p.new_ones(p.shape[1]), atol=1e-5)
                ):
                    raise DecompkError(
                        f"a parameter of {tuple(p.shape)} does not hold columns of numbers ≥ 0 that sum to 1."
                    )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                direction = reduced_gradient(p, p.grad)
                direction = direction.where(direction.isfinite().all(0), 0)  # without a direction a column stays
                limit = largest_step(p, direction)
                step = limit.clamp(max=group["lr"])
                moved = p - step * direction
                reached = (direction > 0) & (p <= limit * direction) & (step == limit)  # exactly 0, without rounding
                moved = moved.masked_fill(reached, 0).clamp_(min=0)
                largest = moved.argmax(0, keepdim=True)
                rest = moved.scatter(0, largest, 0).sum(0, keepdim=True)
                p.copy_(moved.scatter(0, largest, 1 - rest))
        return loss
