"""Losses of packed networks: sums over members, so that each member gets its own gradient.

A packed output is (K, N, …). A criterion of torch's takes it for a batch of K: F.cross_entropy(packed(x), y) fails
inside torch, and the mean of F.mse_loss is over members as well, which leaves a K-th of each member's gradient. Write
`losses.cross_entropy(packed(x), y)`, or `losses.each(criterion)(packed(x), y)` for any criterion.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import PackError, name_of
from .fx.pytree import leaves, spread

INDICES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)  # targets (N, …) of outputs (N, C, …)
ALIKE = (  # targets of the outputs' own shape
    nn.L1Loss, nn.MSELoss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.KLDivLoss,
    nn.PoissonNLLLoss, nn.GaussianNLLLoss, nn.SoftMarginLoss, nn.HingeEmbeddingLoss, nn.MultiLabelMarginLoss,
    nn.MultiLabelSoftMarginLoss, nn.TripletMarginLoss,
)  # fmt: skip
SEQUENCES = (nn.CTCLoss,)  # outputs (T, N, C), targets (N, S), lengths (N,)
FUNCTIONS = {
    F.cross_entropy: INDICES, F.nll_loss: INDICES, F.multi_margin_loss: INDICES, F.l1_loss: ALIKE, F.mse_loss: ALIKE,
    F.smooth_l1_loss: ALIKE, F.huber_loss: ALIKE, F.binary_cross_entropy: ALIKE, F.kl_div: ALIKE,
    F.binary_cross_entropy_with_logits: ALIKE, F.poisson_nll_loss: ALIKE, F.gaussian_nll_loss: ALIKE,
    F.soft_margin_loss: ALIKE, F.hinge_embedding_loss: ALIKE, F.multilabel_margin_loss: ALIKE,
    F.multilabel_soft_margin_loss: ALIKE, F.triplet_margin_loss: ALIKE, F.ctc_loss: SEQUENCES,
}  # fmt: skip


def each(criterion: Callable | Sequence[Callable], shared: bool | None | Sequence[bool | None] = None) -> Each:
    """`criterion`, a function or module for outputs (N, …), for packed outputs: call it with (out, target, …).

    out: (K, N, …), or tuples, dicts or dataclasses of such. What follows, by place or by keyword, is each shared by all
    members, (N, …), or their own, (K, N, …), and nothing is read into sizes: the losses of torch say by their number of
    dimensions which it is. To any other criterion tensors of one or no dimension, and all that is no tensor, go as they
    are; of a tensor with more, `shared` says it: True, False, or one value for each argument, None where it is known.

    Returns Σ_k of the members' losses, a scalar, so that member k gets its own gradient, be the reduction "mean" or
    "sum"; losses that are no scalar (reduction="none": (N, …)) come stacked, (K, N, …): reduce each member's own before
    the sum, `loss.mean(1).sum()`. Parameters of a criterion are one for all members and get the sum of their gradients;
    for parameters of their own, or a criterion that changes as it runs, give a list of K criteria.
    Raises PackError.
    """
    return Each(criterion, shared)


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
    alike = probabilities or target.shape == expected  # as many targets count for each member
    if target.shape == expected:
        target = target.expand(K, *expected)
    if target.shape != (K, *expected):
        raise PackError(
            f"a target of {tuple(target.shape)} does not fit logits of {tuple(logits.shape)}: give {tuple(expected)}, "
            f"shared by all members, or {(K, *expected)}."
        )
    how: dict[str, Any] = {"weight": weight, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
    rows, targets = logits.flatten(0, 1), target.flatten(0, 1)
    if alike:
        return F.cross_entropy(rows, targets, **how) * K
    sums = F.cross_entropy(rows, targets, reduction="none", **how).view(K, -1).sum(1)
    counted = target.reshape(K, -1) != ignore_index
    if weight is None:
        counts = counted.sum(1)
    else:
        counts = torch.where(counted, weight[target.reshape(K, -1).clamp(0, classes - 1)], 0).sum(1)
    return (sums / counts).sum()


def mse(predictions: Tensor, target: Tensor) -> Tensor:
    """Σ_k of the member's mean squared error: its gradient on member k is that of F.mse_loss on it alone. A scalar.

    predictions (K, N, …); target (N, …), shared by all members, or (K, N, …), such as the crops that auto-encoders
    reconstruct. Raises PackError.
    """
    return F.mse_loss(predictions, _for_each(predictions, target)) * len(predictions)


def l1(predictions: Tensor, target: Tensor) -> Tensor:
    """Σ_k of the member's mean absolute error; arguments and errors as in `mse`."""
    return F.l1_loss(predictions, _for_each(predictions, target)) * len(predictions)


def _for_each(predictions: Tensor, target: Tensor) -> Tensor:
    if target.shape not in (predictions.shape, predictions.shape[1:]):
        raise PackError(
            f"a target of {tuple(target.shape)} does not fit predictions of {tuple(predictions.shape)}: give "
            f"{tuple(predictions.shape[1:])}, shared by all members, or {tuple(predictions.shape)}."
        )
    return target.expand_as(predictions)


class Each(nn.Module):
    """What `each` returns: a criterion of packed outputs, whose submodules are the criteria that it was given."""

    __call__: Callable[..., Tensor]

    def __init__(self, criterion: Any, shared: bool | None | Sequence[bool | None]):
        super().__init__()
        self._several = isinstance(criterion, list | tuple | nn.ModuleList)
        criteria = list(criterion) if self._several else [criterion]
        for one in criteria or [None]:
            if isinstance(one, type):
                raise PackError(f"each takes a criterion: give it {one.__name__}(), not the class.")
            if not callable(one):
                raise PackError(f"each takes a criterion, or a list of one a member, not {type(one).__name__}.")
        self.criteria = nn.ModuleList(criteria) if all(isinstance(one, nn.Module) for one in criteria) else criteria
        self.shared = shared

    def forward(self, out: Any, *targets: Any, **further: Any) -> Tensor:
        one = self.criteria[0]
        plain = (
            isinstance(out, Tensor) and len(targets) == 1 and not (self._several or further or self.shared is not None)
        )
        if plain and type(one) is nn.CrossEntropyLoss and one.reduction == "mean":  # one call, not K
            return cross_entropy(out, targets[0], one.weight, one.label_smoothing, one.ignore_index)
        K, N = _members_and_samples(out)
        criteria = list(self.criteria) if self._several else [*self.criteria] * K
        if len(criteria) != K:
            raise PackError(f"{len(criteria)} criteria do not fit {K} members: give one for all, or {K}.")
        parts = self._targets(criteria[0], out, K, N, {**dict(enumerate(targets)), **further})
        outs = spread(lambda leaf: list(leaf.unbind()) if isinstance(leaf, Tensor) else [leaf] * K, out, K)
        losses = []
        for k, (one, own) in enumerate(zip(criteria, outs, strict=True)):
            args, kwargs = ([parts[i][k] for i in range(len(targets))], {name: parts[name][k] for name in further})
            kept = {} if self._several or K == 1 or torch.compiler.is_compiling() else _buffers(one)
            losses.append(one(own, *args, **kwargs))
            _check_kept(one, kept)
        if not all(isinstance(loss, Tensor) for loss in losses):
            raise PackError(
                f"{name_of(criteria[0])} returns a {type(losses[0]).__name__}: let it return the loss alone."
            )
        stacked = torch.stack(losses)
        return stacked.sum() if stacked.dim() == 1 else stacked

    def _targets(self, criterion: Callable, out: Any, K: int, N: int, values: dict) -> dict[int | str, list]:
        """K values of each argument behind the output, by place or name."""
        shared = self.shared if isinstance(self.shared, list | tuple) else [self.shared] * len(values)
        if len(shared) != len(values):
            raise PackError(
                f"shared has {len(shared)} values for {len(values)} arguments: give one for all, or one each."
            )
        kind = _kind(criterion) if isinstance(out, Tensor) else ()
        N = out.shape[2] if kind is SEQUENCES and out.dim() == 4 else N
        parts = {}
        for i, ((place, value), how) in enumerate(zip(values.items(), shared, strict=True)):
            first = place in (0, "target") or (i == 0 and len(values) == 1)
            expected = None
            if how is None and isinstance(value, Tensor) and (first or value.dim() > 1):
                expected = _expected(kind, out, value, first)
            where = f"argument {place + 2}" if isinstance(place, int) else f"'{place}'"
            loose = kind is ALIKE and not first  # variances and weights broadcast, as they do for a member alone
            split = functools.partial(_for_members, K, N, f"{where} of {name_of(criterion)}", how, expected, loose)
            parts[place] = spread(split, value, K)
        return parts

    def extra_repr(self) -> str:
        names = ", ".join(map(name_of, self.criteria))
        return names if self.shared is None else f"{names}, shared={self.shared}"


def _members_and_samples(out: Any) -> tuple[int, int]:
    shapes = [leaf.shape for leaf in leaves(out) if isinstance(leaf, Tensor)]
    if not shapes or any(not shape or shape[0] != shapes[0][0] for shape in shapes):
        what = [tuple(shape) for shape in shapes] or type(out).__name__
        raise PackError(f"{what} is no packed output: give tensors (K, N, …), as packed(x) returns them.")
    return shapes[0][0], next((shape[1] for shape in shapes if len(shape) > 1), 1)


def _kind(criterion: Any) -> tuple:
    """INDICES, ALIKE or SEQUENCES, where the targets of a criterion are known, or ()."""
    while isinstance(criterion, functools.partial):
        criterion = () if criterion.args else criterion.func
    if isinstance(criterion, nn.Module):
        for kind in (INDICES, ALIKE, SEQUENCES):
            if any(isinstance(criterion, known) and type(criterion).forward is known.forward for known in kind):
                return kind
        return ()
    return next((kind for function, kind in FUNCTIONS.items() if function is criterion), ())


def _expected(kind: tuple, out: Tensor, target: Tensor, first: bool) -> torch.Size | None:
    """The shape of a target that all members share, the first one or a further one; None if nobody knows."""
    if kind is SEQUENCES and out.dim() == 4:
        return None if target.dim() < 2 else out.shape[2:3] + target.shape[-1:] * first
    if kind is INDICES and first:
        if out.dim() < 3:
            raise PackError(f"logits of {tuple(out.shape)} are not (K, N, C, …).")
        return out.shape[1:] if target.is_floating_point() else out.shape[1:2] + out.shape[3:]
    return out.shape[1:] if kind is ALIKE else None


def _for_members(
    K: int, N: int, where: str, shared: bool | None, expected: torch.Size | None, loose: bool, leaf: Any
) -> list:
    """K values of an argument's leaf, of the expected shape or, if `loose`, what broadcasts to it."""
    if not isinstance(leaf, Tensor):
        return [leaf] * K
    if expected is not None:
        shared = leaf.dim() <= len(expected)  # sizes do not say it: N may be K
        of_member = leaf.shape if shared else leaf.shape[1:]
        if not (shared or leaf.shape[0] == K) or not _fits(of_member, expected, loose):
            raise PackError(
                f"{where} is {tuple(leaf.shape)}, which does not fit: give {tuple(expected)}, shared by all members, "
                f"or {(K, *expected)}{', or what broadcasts to them' * loose}."
            )
    if shared is None and leaf.dim() > 1:
        raise PackError(
            f"{where} is {tuple(leaf.shape)}, which may be (N, …), shared by all members, or (K, N, …): say which with "
            "each(criterion, shared=True) or shared=False."
        )
    if shared is False and leaf.dim() and leaf.shape[:2] != (K, N):
        raise PackError(f"{where} is {tuple(leaf.shape)}: with shared=False it must be ({K}, {N}, …).")
    return list(leaf.unbind()) if shared is False and leaf.dim() else [leaf] * K


def _fits(shape: torch.Size, expected: torch.Size, loose: bool) -> bool:
    if not loose:
        return shape == expected
    broadcasts = all(n in (1, wanted) for n, wanted in zip(reversed(shape), reversed(expected), strict=False))
    return (broadcasts and len(shape) <= len(expected)) or shape == expected[:-1]  # the latter: gaussian_nll_loss


def _buffers(criterion: Any) -> dict[str, tuple[Tensor, int, Tensor]]:
    if not isinstance(criterion, nn.Module):
        return {}
    return {name: (b, b._version, b.clone()) for name, b in criterion.named_buffers() if not b.is_inference()}


@torch.no_grad()
def _check_kept(criterion: Any, kept: dict[str, tuple[Tensor, int, Tensor]]) -> None:
    """Raise, with the buffers as they were, if one member's loss has changed what the next one would read."""
    now = dict(criterion.named_buffers()) if kept else {}
    changed = [name for name, (b, version, _) in kept.items() if now.get(name) is not b or b._version != version]
    for name in changed:
        path, _, last = name.rpartition(".")
        kept[name][0].copy_(kept[name][2])
        setattr(criterion.get_submodule(path), last, kept[name][0])
    if changed:
        raise PackError(f"{name_of(criterion)} changes its buffer '{changed[0]}' as it runs: give a list of K of it.")
