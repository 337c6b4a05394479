"""Operations that join or combine channels: reductions, gates, cat, expand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..channel_pass import ChannelPass
from ..values import PARTIAL, SHARED, Divided, TensorPair, tensors_in
from .elementwise import elementwise, join
from .registry import rule
from .reshape import as_laid, refuse_flattened


@rule("mean", "sum", "amax", "amin", "max", "min", "std", "var", "norm", "prod", "logsumexp", "softmax", "log_softmax",
      "softmin", "normalize", "cumsum", "argmax", "var_mean", "std_mean")  # fmt: skip
def reduction(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    operands = tensors_in((args, kwargs))
    if len(operands) > 1:
        return elementwise(p, name, args, kwargs)
    x = operands[0]
    full, part = p.run_both(args, kwargs)
    if not isinstance(x.ownership, Divided):
        return p.wrap(full, part, join(p, name, [x], x.full.dim())[0])
    at = 2 if name == "norm" else 1
    given = kwargs.get("dim", args[at] if len(args) > at else None)
    if given is None:
        p.refuse(f"'{name}' combines all channels")
    dims = {d % x.full.dim() for d in ([given] if isinstance(given, int) else given)}
    if dims & set(x.ownership.axes):
        p.refuse(f"'{name}' mixes the channels of different members")
    first = full[0] if isinstance(full, tuple) else full
    if first.dim() == x.full.dim():
        scale = tuple(None if axis + 2 in dims else s for axis, s in enumerate(x.scale))
        return p.wrap(full, part, x.ownership, scale)
    axes = tuple(a - sum(d < a for d in dims) for a in x.ownership.axes)
    moved = as_laid(x, {0, *dims}) if 0 not in dims and x.moved is None else None
    return p.wrap(full, part, replace(x.ownership, axes=axes), moved=moved)


@rule("glu")
def glu(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    x = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % x.full.dim()
    return gated(p, x, dim, *p.run_both(args, kwargs))


def gated(p: ChannelPass, x: TensorPair, dim: int, full: torch.Tensor, part: torch.Tensor) -> Any:
    if not isinstance(x.ownership, Divided) or x.ownership.axes != (dim,):
        return p.wrap(full, part, join(p, "glu", [x], full.dim())[0], x.scale)
    refuse_flattened(p, x)
    value, gate = np.split(x.ownership.ids, 2)
    p.strands.tie(value, gate)
    return p.wrap(full, part, replace(x.ownership, ids=value), x.scale)


@rule("cat", "stack")
def cat(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    operands = list(args[0] if args else kwargs["tensors"])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    full, part = p.run_both(args, kwargs)
    dim %= full.dim()
    divided = [t for t in operands if isinstance(t.ownership, Divided)]
    if not divided:
        if any(t.ownership is PARTIAL for t in operands) and any(t.ownership is SHARED for t in operands):
            p.note("joins partial sums with tensors that every member holds whole")
        return p.wrap(
            full, part, PARTIAL if any(t.ownership is PARTIAL for t in operands) else SHARED, operands[0].scale
        )
    operands = p.settle(operands)
    if any(not isinstance(t.ownership, Divided) for t in operands):
        p.refuse("it joins divided channels with channels that every member holds whole")
    first = operands[0].ownership
    if name == "stack":
        ownership, scale = join(p, name, operands, operands[0].full.dim())
        axes = tuple(a + (dim <= a) for a in ownership.axes)
        return p.wrap(full, part, replace(ownership, axes=axes), scale)
    if dim not in first.axes:
        ownership, scale = join(p, name, operands, full.dim())
        return p.wrap(full, part, ownership, tuple(None if a + 2 == dim else s for a, s in enumerate(scale)))
    if any(t.ownership.axes != first.axes or t.ownership.flat for t in operands):
        if any(t.ownership.flat is None or t.ownership.axes != first.axes for t in operands):
            p.refuse("it joins channels on different axes")
        p.refuse("it joins flattened maps", "join them before the flatten")
    ids = np.concatenate([t.ownership.ids for t in operands], axis=first.axes.index(dim))
    return p.wrap(full, part, replace(first, ids=ids), operands[0].scale)


@rule("expand", "expand_as", "repeat", "tile", "broadcast_to")
def expand(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    x = args[0]
    full, part = p.run_both(args, kwargs)
    if not isinstance(x.ownership, Divided):
        if full.shape[1:2] == part.shape[1:2]:
            return p.wrap(full, part, x.ownership)
        return p.refuse("it spreads an undivided tensor over divided channels")
    axes = tuple(a + full.dim() - x.full.dim() for a in x.ownership.axes)
    if any(full.shape[a] != x.full.shape[b] for a, b in zip(axes, x.ownership.axes, strict=True)):
        p.refuse("it repeats channels")
    if any(part.shape[a] != x.part.shape[b] for a, b in zip(axes, x.ownership.axes, strict=True)):
        p.refuse("it expands channels to a fixed number", "write -1 for the channel axis")
    return p.wrap(full, part, replace(x.ownership, axes=axes))


@rule("local_response_norm")
def local_response_norm(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    """Over channels next to each other: they may belong to one member alone, and stay in their order."""
    x = args[0]
    if isinstance(x.ownership, Divided):
        if p.K > 1:
            p.refuse(f"'{name}' mixes the channels of different members")
        p.pin(x.ownership.ids)
    return elementwise(p, name, args, kwargs)
