"""Operations on a map's spatial axes: pooling, resizing, padding; and shuffles of its channels."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ...errors import PartitionError
from ...fx.graph import where, windows
from ..channel_pass import ChannelPass
from ..values import Divided, TensorPair, globally, in_member, tensors_in
from .elementwise import join
from .registry import rule
from .reshape import refuse_flattened


def spatial(
    p: ChannelPass, name: str, args: tuple, kwargs: dict, found: tuple | None, member: tuple | None = None
) -> Any:
    x = args[0]
    if isinstance(x.ownership, Divided) and x.ownership.axes != (1,):
        p.refuse("it pools or resizes an axis that holds channels")
    full, part = p.run_both(args, kwargs, member)
    first = full[0] if isinstance(full, tuple) else full
    own = part[0] if isinstance(part, tuple) else part
    ownership, _ = join(p, name, [x], first.dim())
    return p.wrap(full, part, ownership, scaled(x, found, first, own))


def scaled(x: TensorPair, found: tuple | None, full: torch.Tensor, part: torch.Tensor) -> tuple:
    """Input pixels per position behind a spatial operation; None where windows do not tell."""
    scale = x.scale or (None,) * (x.full.dim() - 2)
    if found is not None:
        steps = [Fraction(1, w.stride) if w.transposed else Fraction(w.stride) for w in found]
    else:
        globals_ = [Fraction(a, b) for a, b in zip(x.full.shape[2:], full.shape[2:], strict=True)]
        members = [Fraction(a, b) for a, b in zip(x.part.shape[2:], part.shape[2:], strict=True)]
        steps = [g if g == m else None for g, m in zip(globals_, members, strict=True)]
    return tuple(None if s is None or t is None else s * t for s, t in zip(scale, steps, strict=True))


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "lp_pool1d", "lp_pool2d")
def pool(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    x = args[0]
    found, own = (windows(name, x.full.dim() - 2, side(args[1:]), side(kwargs)) for side in (globally, in_member))
    member, extent = None, tuple(x.part.shape[2:])
    whole = covers(found, x) and "lp_" not in name  # a last pooling over the whole map follows the member's smaller map
    if whole and tuple(w.kernel for w in own) != extent:  # which its own code does not see to
        node_kwargs = {k: v for k, v in p.node.kwargs.items() if k not in ("kernel_size", "stride", "input")}
        member = p.rewrite((p.node.args[0], extent, extent, *p.node.args[3:]), node_kwargs)
        p.adapt(p.node.name)
    return spatial(p, name, args, kwargs, found if found == own else None, member)


def covers(found: tuple | None, x: TensorPair) -> bool:
    """The pooling sees the whole global map at once, while a member's map is smaller."""
    full, part = x.full.shape[2:], x.part.shape[2:]
    return (
        found is not None
        and full != part
        and not any(w.transposed for w in found)
        and all(w.kernel == s and w.padding == (0, 0) for w, s in zip(found, full, strict=True))
    )


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
      "adaptive_max_pool2d", "adaptive_max_pool3d", "interpolate", "instance_norm")  # fmt: skip
def resize(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    if len(tensors_in((args, kwargs))) > 1:
        p.refuse(f"'{name}' takes tensors beside its input")
    return spatial(p, name, args, kwargs, None)


@rule("pad")
def pad(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    """Padding of spatial axes; zeros added to the channels (a shortcut of ResNets) are new channels."""
    x, amounts = args[0], list(args[1] if len(args) > 1 else kwargs["pad"])
    sides = {x.full.dim() - 1 - i: (amounts[2 * i], amounts[2 * i + 1]) for i in range(len(amounts) // 2)}
    if not isinstance(x.ownership, Divided):
        full, part = p.run_both(args, kwargs)
        return p.wrap(full, part, join(p, name, [x], full.dim())[0], x.scale)
    ids = x.ownership.ids
    member = None
    for i, axis in enumerate(x.ownership.axes):
        before, after = globally(sides.get(axis, (0, 0)))
        if (before, after) == (0, 0):
            continue
        refuse_flattened(p, x)
        if len(x.ownership.axes) > 1 or min(before, after) < 0 or before % p.K or after % p.K:
            raise PartitionError(
                f"{where(p.node)}: {before} + {after} channels of padding cannot be divided into {p.K} equal parts."
            )
        ids = np.concatenate([p.strands.new(before), ids, p.strands.new(after)], axis=i)
        own = list(amounts)
        at = 2 * (x.full.dim() - 1 - axis)
        own[at : at + 2] = [before // p.K, after // p.K]
        member = p.rewrite(
            (p.node.args[0], own, *p.node.args[2:]), {k: v for k, v in p.node.kwargs.items() if k != "pad"}
        )
    full, part = p.run_both(args, kwargs, member)
    return p.wrap(full, part, replace(x.ownership, ids=ids), x.scale)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    x = args[0]
    groups = p.modules[p.node.target].groups if p.node.op == "call_module" else args[1]
    return _shuffled(p, x, groups, *p.run_both(args, kwargs))


def _shuffled(p: ChannelPass, x: TensorPair, groups: int, full: torch.Tensor, part: torch.Tensor) -> Any:
    if not isinstance(x.ownership, Divided):
        return p.wrap(full, part, x.ownership, x.scale)
    refuse_flattened(p, x)
    if (x.full.shape[1] // groups) % p.K:
        raise PartitionError(
            f"{where(p.node)}: {groups} groups of {x.full.shape[1] // groups} channels cannot each be divided into "
            f"{p.K} equal parts; choose a number of partitions that divides them."
        )
    rows = x.ownership.ids.reshape(groups, -1)
    for row in rows:
        p.strands.require(row, lambda node=p.node: where(node))
    return p.wrap(full, part, Divided(p.shuffle(rows.T, 0), (1,)), x.scale)


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    """Channels to space and back: blocks of r² channels must have one owner."""
    x = args[0]
    full, part = p.run_both(args, kwargs)
    if not isinstance(x.ownership, Divided):
        return p.wrap(full, part, x.ownership)
    refuse_flattened(p, x)
    ids = p.strands.new(full.shape[1])
    few, many = sorted([ids, x.ownership.ids], key=len)
    p.expect(lambda owner: bool((owner[many].reshape(len(few), -1) == owner[few][:, None]).all()))
    return p.wrap(full, part, Divided(ids, (1,)), scaled(x, None, full, part))
