"""Layers by their classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..values import Divided
from .combine import _gated
from .registry import FUNCTION_RULES


def _as_function(name: str) -> Callable:
    return lambda p, target, module, args, kwargs: FUNCTION_RULES[name](p, name, args, kwargs)


def _resizing(p: Any, target: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return p.spatial(type(module).__name__, args, kwargs, None)


def _padding(p: Any, target: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
    x = args[0]
    full, part = p.run_both(args, kwargs)
    return p.wrap(full, part, p.join("pad", [x], full.dim())[0], x.scale)


def _softmax(p: Any, target: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
    dim = getattr(module, "dim", None)
    if isinstance(module, nn.Softmax2d) or dim is None:
        dim = 1
    x = args[0]
    if isinstance(x.ownership, Divided) and dim % x.full.dim() in x.ownership.axes:
        p.refuse(f"{type(module).__name__} mixes the channels of different members")
    return p.elementwise(type(module).__name__, args, kwargs)


def _glu(p: Any, target: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return _gated(p, args[0], module.dim % args[0].full.dim(), *p.run_both(args, kwargs))


_POOLS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._LPPoolNd)


_PADS = (
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
)


MODULE_RULES: list[tuple[Any, Callable]] = [
    ((nn.modules.conv._ConvNd, nn.Linear), lambda p, *a: p.layer(*a)),
    ((nn.RNNBase,), lambda p, *a: p.recurrent(*a)),
    (
        (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU),
        lambda p, *a: p.norm(*a),
    ),
    (_POOLS, lambda p, *a: p.pool(*a)),
    (
        (nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd, nn.Upsample),
        _resizing,
    ),
    (_PADS, _padding),
    ((nn.Flatten,), _as_function("flatten")),
    ((nn.Unflatten,), _as_function("unflatten")),
    ((nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d), _softmax),
    ((nn.GLU,), _glu),
    ((nn.LocalResponseNorm,), _as_function("local_response_norm")),
    ((nn.ChannelShuffle,), _as_function("channel_shuffle")),
    ((nn.PixelShuffle, nn.PixelUnshuffle), _as_function("pixel_shuffle")),
]
