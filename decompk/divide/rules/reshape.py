"""Operations that lay a tensor's axes out otherwise: reshapes and permutations."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...crops import by
from ...errors import PartitionError
from ..channel_pass import ChannelPass
from ..values import SHARED, Divided, MapExtent, TensorPair, globally
from .elementwise import join
from .registry import rule


def refuse_flattened(p: ChannelPass, x: TensorPair) -> None:
    """Operations that take channels apart know them one position each, not behind a flatten."""
    if x.ownership.flat is not None:
        p.refuse("it takes a flattened map apart", "do so before the flatten")
    if x.ownership.bare is not None:
        p.refuse(f"it takes parameter '{x.ownership.bare}' apart", "give every part a parameter of its own")


@rule("view", "flatten", "unflatten", "squeeze", "unsqueeze")
def view(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    """Any reshape, by matching runs of axes with equal products; literal sizes are rewritten for the member."""
    x = args[0]
    if not isinstance(x.ownership, Divided):
        full, part = p.run_both(args, kwargs)
        return p.wrap(full, part, join(p, name, [x], x.full.dim())[0], x.scale if full.shape == x.full.shape else ())
    full = p.run_global(args, kwargs)
    regrouping = _Regrouping(p, x, full)
    part = regrouping.member_result(name, args, kwargs)
    return regrouping.result(part)


class _Regrouping:
    """A reshape of one divided tensor: which axes become which, and what becomes of the strands."""

    def __init__(self, p: ChannelPass, x: TensorPair, full: torch.Tensor):
        self.p, self.x, self.full = p, x, full
        self.groups = _matched(tuple(x.full.shape), tuple(full.shape))
        self.cut_axis = x.ownership.axes[p.cut(x)] if x.ownership.axes else None

    def member_result(self, name: str, args: tuple, kwargs: dict) -> torch.Tensor:
        """The member's tensor: by its own code where that fits, else with literal sizes rewritten."""
        p, expected = self.p, self._expected()
        try:
            part = p.run_member(args, kwargs)
        except PartitionError:
            part = None
        if part is not None and self._fits(part, expected):
            return part
        if name == "view" and p.node.op != "call_module":
            sizes = list(_sizes(p.node.args))
            for axis, size in enumerate(sizes):
                if isinstance(size, int) and size != -1 and expected[axis] is not None:
                    sizes[axis] = expected[axis]
            member = p.rewrite((p.node.args[0], *(sizes if p.node.op == "call_method" else [tuple(sizes)])), {})
            part = p.run_member(args, kwargs, member)
            if self._fits(part, expected):
                return part
        return p.refuse("it reshapes channels in a way that has no counterpart in a member")

    def _fits(self, part: torch.Tensor, expected: list[int | None]) -> bool:
        if part.dim() != self.full.dim():
            return False
        for inside, outside in self.groups:
            if not self._channels(inside):
                continue
            known = [expected[a] for a in outside]
            own = [part.shape[a] for a in outside]
            if None not in known and own != known:
                shorter = [a for a in outside if part.shape[a] != self.full.shape[a]]
                if math.prod(own) != math.prod(known) or len(outside) == 1 or len(shorter) != 1:
                    return False
        return True

    def _channels(self, axes: list[int]) -> list[int]:
        return [a for a in axes if a in self.x.ownership.axes]

    def _expected(self) -> list[int | None]:
        """A member's size per output axis, None where only running it can tell (unflattened space)."""
        sizes: list[int | None] = [1] * self.full.dim()
        for inside, outside in self.groups:
            total = math.prod(self.x.part.shape[a] for a in inside)
            if len(outside) == 1:
                sizes[outside[0]] = total
            elif not self._channels(inside):
                for axis in outside:
                    sizes[axis] = None
            else:
                whole = [self.full.shape[a] for a in outside]
                divisible = [i for i, size in enumerate(whole) if size % self.p.K == 0]
                if self.cut_axis in inside and divisible:
                    whole[divisible[-1]] //= self.p.K
                for axis, size in zip(outside, whole, strict=True):
                    sizes[axis] = size
        return sizes

    def result(self, part: torch.Tensor) -> Any:
        p, x, ownership = self.p, self.x, self.x.ownership
        shape: list[int] = []
        axes: list[int] = []
        flat, merged_cut = ownership.flat, None
        for inside, outside in self.groups:
            channels = self._channels(inside)
            if not channels:
                continue
            rest = [a for a in inside if a not in channels]
            if inside[: len(channels)] != channels:
                p.refuse("it moves channels behind another axis of the same reshape")
            if rest:
                behind = [a for a in range(channels[-1] + 1, x.full.dim()) if x.full.shape[a] > 1]
                if rest != behind or len(x.scale) not in (0, x.full.dim() - 2):
                    p.refuse("it interleaves channels with another axis")
                if len(outside) != 1 or len(channels) != 1 or len(ownership.axes) != 1 or flat is not None:
                    p.refuse("it merges part of the channels with space")
                flat = self._flattened(rest)
            elif flat is not None and len(outside) > 1:
                if flat.order is not None or tuple(self.full.shape[a] for a in outside[1:]) != flat.full:
                    p.refuse("it reshapes flattened channels differently than they were flattened")
                return p.wrap(self.full, part, Divided(ownership.ids, (outside[0],)), flat.scale)
            if len(channels) > 1 and self.cut_axis in channels[:-1] and len(outside) == 1:
                merged_cut = ownership.axes.index(self.cut_axis)
            elif len(channels) > 1 and len(outside) > 1:
                p.refuse("it regroups channels that are already grouped")
            axes += outside
            shape += [self.full.shape[a] for a in outside] if flat is None else [len(ownership.ids)]
        if not axes and ownership.axes:
            p.refuse("its channels disappear in a reshape")
        if merged_cut is not None:
            if len(axes) != 1:
                p.refuse("it shuffles channels within groups that stay apart")
            ids = p.shuffle(ownership.ids, merged_cut)
        else:
            ids = ownership.ids.reshape(shape)
        same = self.full.dim() - len(axes) == x.full.dim() - len(ownership.axes) and x.moved is None
        moved = None if same or flat else _moved(x, self.full, part, tuple(axes), torch.reshape)
        return p.wrap(self.full, part, Divided(ids, tuple(axes), flat, ownership.bare), x.scale if same else (), moved)

    def _flattened(self, space: list[int]) -> MapExtent | None:
        if self.x.moved is not None:
            return self.x.moved
        full = tuple(self.x.full.shape[a] for a in space)
        part = tuple(self.x.part.shape[a] for a in space)
        spatial = range(2, self.x.full.dim())
        scale = tuple(self.x.scale[a - 2] if self.x.scale and a in spatial else None for a in space)
        if any(own > whole for own, whole in zip(part, full, strict=True)):
            self.p.refuse(f"a member's map of {by(part)} is larger than the global one of {by(full)}")
        if full != part and not self.x.scale:
            self.p.refuse(
                "it flattens a map whose axes were merged or moved", "flatten it as the last layer returned it"
            )
        return MapExtent(tuple(a - 2 for a in space), full, part, scale)


def _moved(
    x: TensorPair, full: torch.Tensor, part: torch.Tensor, axes: tuple[int, ...], move: Callable
) -> MapExtent | None:
    """The map that x holds or once was, with where its positions lie behind move(x, shape); None if that is unknown.

    axes: those of the channels behind it.
    """
    known = x.moved or as_laid(x)
    if known is None:
        return None
    orders = []
    for before, after, order in zip((x.full, x.part), (full, part), known.order, strict=True):
        if after.shape[:1] != before.shape[:1]:  # the batch moved
            return None
        spatial = [1 if a == 0 or a in x.ownership.axes else n for a, n in enumerate(before.shape)]
        moved = move(torch.from_numpy(order).reshape(spatial).expand(before.shape), after.shape)
        first = tuple(0 if a == 0 or a in axes else slice(None) for a in range(moved.dim()))
        orders.append(moved[first].reshape(-1).numpy())
    return replace(known, order=tuple(orders))


def as_laid(x: TensorPair, without: Collection[int] = ()) -> MapExtent | None:
    """The map that x holds, without some of its axes; None if it is not known how its positions lie."""
    spatial = [a for a in range(1, x.full.dim()) if a not in x.ownership.axes]
    if not x.ownership.axes or x.ownership.flat or len(x.scale) != len(spatial):
        return None
    kept = [i for i, a in enumerate(spatial) if a not in without]
    full, part = (tuple(side.shape[spatial[i]] for i in kept) for side in (x.full, x.part))
    orders = tuple(np.arange(math.prod(sizes)) for sizes in (full, part))
    return MapExtent(tuple(kept), full, part, tuple(x.scale[i] for i in kept), orders)


def _matched(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Minimal runs of axes (longer than 1) of two shapes whose products agree."""
    inside = [(a, s) for a, s in enumerate(before) if s > 1]
    outside = [(a, s) for a, s in enumerate(after) if s > 1]
    groups, i, j = [], 0, 0
    while i < len(inside) and j < len(outside):
        left, right = [inside[i][0]], [outside[j][0]]
        a, b = inside[i][1], outside[j][1]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                left.append(inside[i][0])
                a *= inside[i][1]
                i += 1
            else:
                right.append(outside[j][0])
                b *= outside[j][1]
                j += 1
        groups.append((left, right))
    return groups


def _sizes(args: tuple) -> tuple:
    return tuple(args[1]) if len(args) == 2 and isinstance(args[1], (tuple, list)) else tuple(args[1:])


@rule("permute", "transpose", "movedim")
def permute(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    x = args[0]
    full, part = p.run_both(args, kwargs)
    labels = torch.empty(tuple(range(1, x.full.dim() + 1)), device="meta")
    order = [size - 1 for size in _method(labels, p.node, globally(args), globally(kwargs)).shape]
    if not isinstance(x.ownership, Divided):
        if x.ownership is SHARED and x.scale and order != sorted(order):
            p.turn_image()
        return p.wrap(full, part, join(p, name, [x], x.full.dim())[0])
    turned = sorted(range(len(x.ownership.axes)), key=lambda i: order.index(x.ownership.axes[i]))
    axes = tuple(order.index(x.ownership.axes[i]) for i in turned)
    rest = [a for a in order if a not in (0, *x.ownership.axes)]
    same = rest == sorted(rest) and x.moved is None
    moved = None if same else _moved(x, full, part, axes, lambda index, shape: index.permute(order))
    ownership = replace(x.ownership, ids=np.transpose(x.ownership.ids, turned), axes=axes)
    return p.wrap(full, part, ownership, x.scale if same else (), moved)


def _method(x: torch.Tensor, node: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    if node.op == "call_method":
        return getattr(x, node.target)(*args[1:], **kwargs)
    return node.target(x, *args[1:], **kwargs)
