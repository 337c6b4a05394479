"""Norms of classes of their own, such as timm's: torch's norm, over channels first or last, then modules they hold."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..fx.forward_code import read_forward
from ..fx.unseen import seeded, unseen
from .norm import PackedBatchNorm1d, PackedBatchNorm2d, PackedBatchNorm3d, PackedGroupNorm, PackedLayerNorm
from .twin import Twin, deep_copy


class Then:
    """Mixin before a norm's twin: its class has a forward of its own, which a trial found to be the norm and then the
    modules below it, in their order."""

    _modules: dict[str, nn.Module | None]

    def forward(self, x: Tensor) -> Tensor:
        return self._then(super().forward(x))  # type: ignore[misc]

    def _then(self, y: Tensor) -> Tensor:
        for module in self._modules.values():
            y = y if module is None else module(y)
        return y


class PackedBatchNormThen1d(Then, PackedBatchNorm1d):
    pass


class PackedBatchNormThen2d(Then, PackedBatchNorm2d):
    @property
    def _norm(self) -> PackedBatchNorm2d:
        """The norm alone, for graphs: the same attributes, seen as an object of another class."""
        if self not in _norms:
            norm = PackedBatchNorm2d.__new__(PackedBatchNorm2d)
            object.__setattr__(norm, "__dict__", vars(self))
            _norms[self] = norm
        return _norms[self]


class PackedBatchNormThen3d(Then, PackedBatchNorm3d):
    pass


class PackedGroupNormThen(Then, PackedGroupNorm):
    pass


class PackedLayerNormThen(Then, PackedLayerNorm):
    pass


class PackedLayerNormThen2d(Then, PackedLayerNorm):
    """Over the channels of images (K·N, c, H, W)."""

    _twin_dims = 4

    def forward(self, x: Tensor) -> Tensor:
        y = PackedLayerNorm.forward(self, x.permute(0, 2, 3, 1))
        return self._then(self._twin_laid_out(y.permute(0, 3, 1, 2)))


_norms: weakref.WeakKeyDictionary[nn.Module, PackedBatchNorm2d] = weakref.WeakKeyDictionary()

ALONE = "_norm"  # the attribute
_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_SCALES = (1.0, -40.0)  # of what is tried: code may do something else to large values
_SIDES = ((3, 5), (5, 7))  # of images tried: the first that are no channels
_KINDS: dict[type[nn.Module], tuple[type[Twin], ...]] = {
    nn.BatchNorm1d: (PackedBatchNormThen1d,),
    nn.BatchNorm2d: (PackedBatchNormThen2d,),
    nn.BatchNorm3d: (PackedBatchNormThen3d,),
    nn.GroupNorm: (PackedGroupNormThen,),
    nn.LayerNorm: (PackedLayerNormThen2d, PackedLayerNormThen),
}


def twin_of_norm(leaf: nn.Module) -> type[Twin] | None:
    """The twin of a norm whose class has a forward of its own, where that is the norm and then the modules it holds."""
    base = next((klass for klass in type(leaf).__mro__ if klass in _KINDS), None)
    below = (tensor for child in leaf.children() for tensor in (*child.parameters(), *child.buffers()))
    if base is None or next(below, None) is not None or {*leaf._parameters, *leaf._buffers} - _TENSORS:
        return None
    if read_forward(leaf).stored:
        return None
    return next((kind for kind in _KINDS[base] if _alike(leaf, base, kind)), None)


def _alike(leaf: nn.Module, base: type[nn.Module], kind: type[Twin]) -> bool:
    """Whether `leaf` computes what `base` does, and then its modules; tried on copies, unseen, in float64."""
    if (shape := _shape(leaf, base, kind)) is None:
        return False
    images = kind is PackedLayerNormThen2d

    def plain(norm: Any, x: Tensor) -> Tensor:
        y: Any = base.forward(norm, x.permute(0, 2, 3, 1) if images else x)
        return Then._then(norm, y.permute(0, 3, 1, 2) if images else y)

    try:
        with unseen(), torch.no_grad():
            pairs = zip(_tried(leaf, shape, lambda norm, x: norm(x)), _tried(leaf, shape, plain), strict=True)
        return all(a.shape == b.shape and torch.allclose(a, b, 1e-9, 1e-9, equal_nan=True) for a, b in pairs)
    except Exception:  # whatever the leaf's code raises at what is tried
        return False


def _tried(leaf: nn.Module, shape: tuple[int, ...], run: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    """What `run` gives of a copy of `leaf`, and what the copy keeps, in both modes at every scale."""
    norm = deep_copy(leaf, {}).cpu().double()
    before, found = [p.detach() for p in norm.parameters()], []
    with seeded(0, ()):
        for training, scale in itertools.product((False, True), _SCALES):
            norm.train(training)
            for i, (p, value) in enumerate(zip(norm.parameters(), before, strict=True)):
                p.data = (value + _wave(value.shape, i + 1)) * scale
            found += [run(norm, _wave(shape, 0) * scale), *(b.clone() for b in norm.buffers())]
    return found


def _shape(leaf: Any, base: type[nn.Module], kind: type[Twin]) -> tuple[int, ...] | None:
    """Of something that a norm takes, samples first."""
    if base is nn.LayerNorm:
        size = tuple(leaf.normalized_shape)
        if kind is not PackedLayerNormThen2d:
            return 2, 3, *size
        return (2, *size, *next(sides for sides in _SIDES if size[0] not in sides)) if len(size) == 1 else None
    channels = leaf.num_channels if base is nn.GroupNorm else leaf.num_features
    return 3, channels, *{nn.BatchNorm1d: (4,), nn.BatchNorm3d: (2, 3, 2)}.get(base, (3, 4))


def _wave(shape: tuple[int, ...], phase: int) -> Tensor:
    """Numbers without a pattern that needs random ones."""
    count = torch.Size(shape).numel()
    return (torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + phase) + 0.3).view(shape)
