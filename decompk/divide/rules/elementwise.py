"""Elementwise operations, with broadcasting; and what only asks for a shape."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.node import map_aggregate

from ..channel_pass import ChannelPass
from ..operations import ELEMENTWISE_FUNCTIONS, LINEAR, SHAPE_QUERIES
from ..values import PARTIAL, SHARED, Both, Divided, Ownership, TensorPair, tensors_in
from .registry import rule


def join(p: ChannelPass, name: str, tensors: list[TensorPair], out_dims: int) -> tuple[Ownership, tuple]:
    """Whose channels an elementwise combination with broadcasting holds, and its scale."""
    scale = next((t.scale for t in tensors if t.scale), ())
    if len(tensors) == 1:  # one operand keeps its ownership, and a parameter is still undecided
        ownership = tensors[0].ownership
        if ownership is PARTIAL and name not in LINEAR:
            p.note(f"'{name}' acts on the sum of the members' outputs; the composed network has {name}(Σ)")
        return ownership, scale
    tensors = p.settle(tensors)
    divided = [t for t in tensors if isinstance(t.ownership, Divided)]
    if not divided:
        if any(t.ownership is PARTIAL for t in tensors):
            if any(t.ownership is not PARTIAL for t in tensors) or name not in ("add", "sub"):
                p.note(f"'{name}' acts on partial sums; the composed network applies it to Σ")
            return PARTIAL, scale
        return SHARED, scale
    if any(t.ownership is PARTIAL for t in tensors):
        p.refuse("it combines divided channels with a head's output")
    first = divided[0]
    axes = tuple(a - first.full.dim() + out_dims for a in first.ownership.axes)
    for t in tensors:
        if isinstance(t.ownership, Divided):
            moved = tuple(a - t.full.dim() + out_dims for a in t.ownership.axes)
            if moved != axes or t.ownership.ids.shape != first.ownership.ids.shape:
                p.refuse("it combines channels on different axes")
            p.strands.tie(first.ownership.ids, t.ownership.ids)
        else:
            shape = (1,) * (out_dims - t.full.dim()) + tuple(t.full.shape)
            if any(shape[a] != 1 for a in axes):
                p.refuse("it combines divided channels with channels that every member holds whole")
    return Divided(first.ownership.ids, axes, first.ownership.flat), scale


@rule(*ELEMENTWISE_FUNCTIONS)
def elementwise(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    tensors = tensors_in((args, kwargs))
    if len(tensors) > 1:
        settled = iter(p.settle(tensors))
        args, kwargs = map_aggregate((args, kwargs), lambda v: next(settled) if isinstance(v, TensorPair) else v)
        tensors = tensors_in((args, kwargs))
    if len(tensors) == 1 and tensors[0].ownership is PARTIAL:
        scaled = name == "mul" or (name == "div" and args[0] is tensors[0])
        zero = name in ("add", "sub") and args[0] == 0  # sum([a, b]) begins with 0 + a
        name = "contiguous" if scaled or zero else name + " a number" if name in ("add", "sub") else name
    numbers: list[Both] = []
    map_aggregate((args, kwargs), lambda v: numbers.append(v) if isinstance(v, Both) else None)
    if numbers and any(t.ownership is not SHARED for t in tensors):
        p.note(f"'{name}' uses a size that differs in a member: composed(x) may not be the sum")
    full, part = p.run_both(args, kwargs)
    dims = full.dim() if isinstance(full, torch.Tensor) else tensors[0].full.dim()
    ownership, scale = join(p, name, tensors, dims)
    moved = next((t.moved for t in tensors if t.moved and t.full.shape == getattr(full, "shape", None)), None)
    return p.wrap(full, part, ownership, scale, moved)


@rule(*SHAPE_QUERIES)
def shape_query(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    """Sizes and the like: plain Python values, which may differ in a member."""
    return p.without_channels(args, kwargs)
