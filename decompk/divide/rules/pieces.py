"""Operations that take a tensor apart: chunk, split, unbind, slices."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch.fx.node import map_arg

from ...crops import by
from ...errors import PartitionError
from ...fx.graph import where
from ..channel_pass import ChannelPass
from ..values import Divided, TensorPair, globally, in_member
from .elementwise import join
from .registry import rule
from .reshape import refuse_flattened


@rule("chunk", "split", "unbind")
def pieces(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    x = args[0]
    at = 1 if name == "unbind" else 2
    dim = (args[at] if len(args) > at else kwargs.get("dim", 0)) % x.full.dim()
    if not isinstance(x.ownership, Divided) or dim not in x.ownership.axes:
        return _apart(p, x, dim, *p.run_both(args, kwargs), None, keep=name != "unbind")
    refuse_flattened(p, x)
    axis = x.ownership.axes.index(dim)
    cut = p.cut(x) == axis
    member = None
    if name == "split" and cut:
        sizes = args[1] if len(args) > 1 else kwargs.get("split_size", kwargs.get("split_size_or_sections"))
        own = _divided(p, sizes)
        if own is not None:
            member = p.rewrite((p.node.args[0], own, dim), {})
    if name == "unbind" and cut:
        p.refuse("it takes channels apart one by one")
    full, part = p.run_both(args, kwargs, member)
    if cut and any(f.shape[dim] != q.shape[dim] * p.K for f, q in zip(full, part, strict=False)):
        raise PartitionError(
            f"{where(p.node)}: pieces of {by([f.shape[dim] for f in full])} channels cannot each be divided into "
            f"{p.K} equal parts; choose a number of partitions that divides them."
        )
    return _apart(p, x, dim, full, part, axis, keep=name != "unbind")


def _divided(p: ChannelPass, sizes: Any) -> Any:
    """Literal split sizes of a member, or None where its own code already computes them."""
    literal = [s for s in (sizes if isinstance(sizes, (tuple, list)) else [sizes]) if isinstance(s, int)]
    if not literal or p.K == 1:
        return None
    if len(literal) != (len(sizes) if isinstance(sizes, (tuple, list)) else 1) or any(s % p.K for s in literal):
        raise PartitionError(
            f"{where(p.node)}: pieces of {by(literal)} channels cannot each be divided into {p.K} equal parts; "
            "choose a number of partitions that divides them."
        )
    return [s // p.K for s in literal] if isinstance(sizes, (tuple, list)) else literal[0] // p.K


def _apart(p: ChannelPass, x: TensorPair, dim: int, full: tuple, part: tuple, axis: int | None, keep: bool) -> tuple:
    """Pieces of x along `dim`; `axis` is the position of that dim among its channel axes, if it is one."""
    found, start = [], 0
    for f, q in zip(full, part, strict=True):
        ownership: ChannelPass = x.ownership
        if isinstance(ownership, Divided):
            ids, axes = ownership.ids, ownership.axes
            if axis is not None:
                stop = start + (f.shape[dim] if keep else 1)
                ids = ids[(slice(None),) * axis + (slice(start, stop) if keep else start,)]
                start = stop
                axes = axes if keep else axes[:axis] + axes[axis + 1 :]
            if not keep:
                axes = tuple(a - (a > dim) for a in axes)
            ownership = replace(ownership, ids=ids, axes=axes)
        scale = x.scale if keep or isinstance(x.ownership, Divided) and axis is not None else ()
        found.append(p.wrap(f, q, ownership, scale))
    return tuple(found)


@rule("getitem", "select", "narrow")
def getitem(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    x = args[0]
    if not isinstance(x, TensorPair):
        return x[globally(args[1])]  # one of several results
    if name != "getitem":
        p.refuse(f"'{name}' is not understood", "write it as a slice")
    if not isinstance(x.ownership, Divided):
        full, part = p.run_both(args, kwargs)
        return p.wrap(full, part, join(p, name, [x], x.full.dim())[0], _sliced_scale(x, args[1], full))
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(isinstance(i, (TensorPair, torch.Tensor, list)) for i in index):
        p.refuse("it picks channels by an index tensor")
    index = _without_ellipsis(index, x.full.dim())
    ids, axes, member_index, rewritten = x.ownership.ids, [], [], False
    source, target, channel_axis, cut = 0, 0, 0, p.cut(x)
    for item in (*index, *[slice(None)] * (x.full.dim() - sum(i is not None for i in index))):
        own = in_member(item) if not isinstance(item, slice) else slice(*in_member((item.start, item.stop, item.step)))
        whole = globally(item) if not isinstance(item, slice) else slice(*globally((item.start, item.stop, item.step)))
        if item is None:
            member_index.append(None)
            target += 1
            continue
        if source in x.ownership.axes:
            position = x.ownership.axes.index(source)
            if whole != slice(None):
                refuse_flattened(p, x)
            if position == cut and whole != slice(None):
                if not isinstance(whole, slice):
                    p.refuse("it picks a single channel")
                literal = slice(*(v if isinstance(v, int) else None for v in (item.start, item.stop, item.step)))
                own, changed = _member_slice(p, x, source, whole, own, literal)
                rewritten |= changed
            ids = ids[(slice(None),) * channel_axis + (whole,)]
            if isinstance(whole, slice):
                axes.append(target)
                channel_axis += 1
        member_index.append(own)
        source += 1
        target += isinstance(whole, slice)
    member = None
    if rewritten:
        member = p.rewrite((p.node.args[0], _node_index(p.node.args[1], member_index, x.full.dim())), {})
    full, part = p.run_both(args, kwargs, member)
    return p.wrap(full, part, replace(x.ownership, ids=ids, axes=tuple(axes)), _sliced_scale(x, args[1], full))


def _without_ellipsis(index: tuple, dims: int) -> tuple:
    at = next((i for i, item in enumerate(index) if item is Ellipsis), None)
    if at is None:
        return index
    fill = dims - sum(item is not None for item in index) + 1
    return index[:at] + (slice(None),) * fill + index[at + 1 :]


def _member_slice(
    p: ChannelPass, x: TensorPair, axis: int, whole: slice, own: slice, literal: slice
) -> tuple[slice, bool]:
    """The member's slice of a divided axis; literal bounds are divided by K, computed ones are already its own."""
    size, own_size = x.full.shape[axis], x.part.shape[axis]
    start, stop, step = whole.indices(size)
    if own.indices(own_size)[:2] == (start // p.K, stop // p.K) and start % p.K == stop % p.K == 0:
        return own, False
    if start % p.K or stop % p.K:
        raise PartitionError(
            f"{where(p.node)}: channels {start} to {stop} cannot be divided into {p.K} equal parts; "
            "choose a number of partitions that divides both bounds."
        )
    if literal == slice(None):
        p.refuse("it slices channels at a bound that does not follow the member's width")
    return slice(start // p.K, stop // p.K, step), True


def _node_index(original: Any, own: list, dims: int) -> tuple:
    """The member's index with every part that is computed in the graph left as it was."""
    original = _without_ellipsis(original if isinstance(original, tuple) else (original,), dims)
    kept = []
    for item, mine in zip(original, own, strict=False):
        computed = []
        map_arg(item, computed.append)
        kept.append(item if computed else mine)
    return tuple(kept)


def _sliced_scale(x: TensorPair, index: Any, full: torch.Tensor) -> tuple:
    if full.dim() != x.full.dim() or not x.scale or not isinstance(index, tuple) or Ellipsis in index:
        return x.scale if full.shape == x.full.shape else ()
    scale = list(x.scale)
    for axis, item in enumerate(index[2:]):
        step = item.step or 1
        if step == 1 and item not in (slice(None), slice(0, None)) or isinstance(item.start, int) and item.start:
            scale[axis] = None
        elif scale[axis] is not None:
            scale[axis] *= Fraction(step)
    return tuple(scale)
