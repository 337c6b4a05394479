"""What pulls weights and assignments towards a split: R_W, and the terms for disjoint and for balanced groups."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-12  # below it a norm has no direction


def group_weights(weight: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """R_W = Σ_g Σ_i ‖((I − P_g) W Q_g)_{i*}‖₂ + Σ_g Σ_j ‖(P_g W (I − Q_g))_{*j}‖₂, a scalar.

    weight: (O, I, …) as torch's Linear and Conv hold it, the paper's W transposed; norms run over the taps, too.
    p: (G, I), q: (G, O), assignments of inputs and outputs. With S_ij = Σ_taps W²: the row norms are
    (1 − p_gi) √(S q_g²)_i, and the column norms (1 − q_gj) √(Sᵀ p_g²)_j.
    """
    squares = weight.flatten(2).square().sum(2) if weight.dim() > 2 else weight.square()  # (O, I)
    squares = squares.to(q.dtype)
    rows = (1 - p) * _root(q.square() @ squares)
    columns = (1 - q) * _root(p.square() @ squares.T)
    return rows.sum() + columns.sum()


def overlap(p: Tensor) -> Tensor:
    """Σ_{g<h} p_g · p_h of assignments (G, n): 0 where groups are disjoint."""
    return (p.sum(0).square().sum() - p.square().sum()) / 2


def imbalance(p: Tensor) -> Tensor:
    """Σ_g (Σ_i p_gi)² of assignments (G, n): least, n²/G, where groups are of equal size."""
    return p.sum(1).square().sum()


def _root(squares: Tensor) -> Tensor:
    """√ whose gradient at 0 is 0."""
    return torch.where(squares > TINY, squares.clamp_min(TINY).sqrt(), 0)
