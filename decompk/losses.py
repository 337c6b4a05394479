"""Losses of packed networks: sums over members, so that each member gets its own gradient."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .errors import PackError


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Σ_k mean_n CE (2.9): its gradient on member k is that member's own gradient. A scalar.

    logits (K, N, C, …); target (N, …) of class indices, shared by all members, or (K, N, …), or class probabilities
    (N, C, …) or (K, N, C, …); weight (C,). Each member's mean is weighted as torch's is. Raises PackError.
    """
    if logits.dim() < 3:
        raise PackError(f"logits of {tuple(logits.shape)} are not (K, N, C, …).")
    K, N, classes = logits.shape[:3]
    probabilities = target.is_floating_point()
    expected = logits.shape[1:] if probabilities else logits.shape[1:2] + logits.shape[3:]
    if target.shape == expected:
        target = target.expand(K, *expected)
    if target.shape != (K, *expected):
        raise PackError(
            f"a target of {tuple(target.shape)} does not fit logits of {tuple(logits.shape)}: give {tuple(expected)}, "
            f"shared by all members, or {(K, *expected)}."
        )
    how = {"weight": weight, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
    losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), reduction="none", **how)
    sums = losses.view(K, -1).sum(1)
    if probabilities:
        return sums.sum() / (losses.numel() // K)
    counted = target.reshape(K, -1) != ignore_index
    if weight is None:
        counts = counted.sum(1)
    else:
        counts = (weight[target.reshape(K, -1).clamp(0, classes - 1)] * counted).sum(1)
    return (sums / counts).sum()


def mse(predictions: Tensor, target: Tensor) -> Tensor:
    """Σ_k of the member's mean squared error: its gradient on member k is that of F.mse_loss on it alone. A scalar.

    predictions (K, N, …); target (N, …), shared by all members, or (K, N, …), such as the crops that auto-encoders
    reconstruct. Raises PackError.
    """
    return _mean_of_each((predictions - _for_each(predictions, target)).square())


def l1(predictions: Tensor, target: Tensor) -> Tensor:
    """Σ_k of the member's mean absolute error; arguments and errors as in `mse`."""
    return _mean_of_each((predictions - _for_each(predictions, target)).abs())


def _for_each(predictions: Tensor, target: Tensor) -> Tensor:
    if target.shape not in (predictions.shape, predictions.shape[1:]):
        raise PackError(
            f"a target of {tuple(target.shape)} does not fit predictions of {tuple(predictions.shape)}: give "
            f"{tuple(predictions.shape[1:])}, shared by all members, or {tuple(predictions.shape)}."
        )
    return target


def _mean_of_each(errors: Tensor) -> Tensor:
    return errors.sum() / (errors.numel() // errors.shape[0])
