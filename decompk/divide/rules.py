"""What each operation without parameters does to divided channels. `p` is the pass, at the node in question."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx.node import map_arg

from ..crops import by
from ..errors import PartitionError
from ..fx.graph import where, windows
from .values import (
    FUNCTIONAL_LAYERS,
    PARTIAL,
    SHAPE_QUERIES,
    SHARED,
    Divided,
    MapExtent,
    TensorPair,
    globally,
    in_member,
    tensors_in,
)

FUNCTION_RULES: dict[str, Callable] = {}


def rule(*names: str) -> Callable:
    def register(function: Callable) -> Callable:
        FUNCTION_RULES.update(dict.fromkeys(names, function))
        return function

    return register


# ---- elementwise ----------------------------------------------------------------------------------------------------


ELEMENTWISE_FUNCTIONS = {
    "relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "hardswish", "hardsigmoid",
    "hardtanh",
    "sigmoid", "tanh", "softplus", "softsign", "logsigmoid", "threshold", "hardshrink", "softshrink", "tanhshrink",
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout",
    "stochastic_depth", "drop_path", "clamp", "clamp_min", "clamp_max", "neg", "abs", "sqrt", "rsqrt", "square", "exp",
    "log", "log1p", "erf", "sign", "reciprocal", "pow", "nan_to_num", "contiguous", "clone", "detach", "to", "float",
    "double", "half", "bfloat16", "type", "zeros_like", "ones_like", "empty_like", "rand_like", "bernoulli",
    "requires_grad", "add", "sub", "rsub", "mul", "div", "maximum", "minimum", "where", "lerp", "addcmul", "type_as",
    "gt", "ge", "lt", "le", "eq", "ne", "floor", "round", "fill", "zero", "copy",
}  # fmt: skip


@rule(*ELEMENTWISE_FUNCTIONS)
def elementwise(p: Any, name: str, args: Any, kwargs: Any) -> Any:
    return p.elementwise(name, args, kwargs)


@rule(*SHAPE_QUERIES)
def shape_query(p: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Sizes and the like: plain Python values, which may differ in a member."""
    return p.outside(args, kwargs)


@rule(*FUNCTIONAL_LAYERS)
def functional_layer(p: Any, name: str, args: Any, kwargs: Any) -> Any:
    return p.functional_layer(name, args, kwargs)


# ---- spatial --------------------------------------------------------------------------------------------------------


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "lp_pool1d", "lp_pool2d")
def pool(p: Any, name: str, args: Any, kwargs: Any) -> Any:
    x = args[0]
    found, own = (windows(name, x.full.dim() - 2, side(args[1:]), side(kwargs)) for side in (globally, in_member))
    member, extent = None, tuple(x.part.shape[2:])
    whole = covers(found, x) and "lp_" not in name  # a last pooling over the whole map follows the member's smaller map
    if whole and tuple(w.kernel for w in own) != extent:  # which its own code does not see to
        node_kwargs = {k: v for k, v in p.node.kwargs.items() if k not in ("kernel_size", "stride", "input")}
        member = p.rewrite((p.node.args[0], extent, extent, *p.node.args[3:]), node_kwargs)
        p.adapted(p.node.name)
    return p.spatial(name, args, kwargs, found if found == own else None, member)


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
def resize(p: Any, name: str, args: Any, kwargs: Any) -> Any:
    if len(tensors_in((args, kwargs))) > 1:
        p.refuse(f"'{name}' takes tensors beside its input")
    return p.spatial(name, args, kwargs, None)


@rule("pad")
def pad(p: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Padding of spatial axes; zeros added to the channels (a shortcut of ResNets) are new channels."""
    x, amounts = args[0], list(args[1] if len(args) > 1 else kwargs["pad"])
    sides = {x.full.dim() - 1 - i: (amounts[2 * i], amounts[2 * i + 1]) for i in range(len(amounts) // 2)}
    if not isinstance(x.ownership, Divided):
        full, part = p.run_both(args, kwargs)
        return p.wrap(full, part, p.join(name, [x], full.dim())[0], x.scale)
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


# ---- reductions: fine over space, a mixture over channels -----------------------------------------------------------


@rule("mean", "sum", "amax", "amin", "max", "min", "std", "var", "norm", "prod", "logsumexp", "softmax", "log_softmax",
      "softmin", "normalize", "cumsum", "argmax", "var_mean", "std_mean")  # fmt: skip
def reduction(p: Any, name: str, args: Any, kwargs: Any) -> Any:
    operands = tensors_in((args, kwargs))
    if len(operands) > 1:
        return p.elementwise(name, args, kwargs)
    x = operands[0]
    full, part = p.run_both(args, kwargs)
    if not isinstance(x.ownership, Divided):
        return p.wrap(full, part, p.join(name, [x], x.full.dim())[0])
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
    moved = _as_laid(x, {0, *dims}) if 0 not in dims and x.moved is None else None
    return p.wrap(full, part, replace(x.ownership, axes=axes), moved=moved)


@rule("glu")
def glu(p: Any, name: str, args: Any, kwargs: Any) -> Any:
    x = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % x.full.dim()
    return _gated(p, x, dim, *p.run_both(args, kwargs))


def refuse_flattened(p: Any, x: TensorPair) -> None:
    """Operations that take channels apart know them one position each, not behind a flatten."""
    if x.ownership.flat is not None:
        p.refuse("it takes a flattened map apart", "do so before the flatten")
    if x.ownership.bare is not None:
        p.refuse(f"it takes parameter '{x.ownership.bare}' apart", "give every part a parameter of its own")


def _gated(p: Any, x: TensorPair, dim: int, full: torch.Tensor, part: torch.Tensor) -> Any:
    if not isinstance(x.ownership, Divided) or x.ownership.axes != (dim,):
        return p.wrap(full, part, p.join("glu", [x], full.dim())[0], x.scale)
    refuse_flattened(p, x)
    value, gate = np.split(x.ownership.ids, 2)
    p.strands.tie(value, gate)
    return p.wrap(full, part, replace(x.ownership, ids=value), x.scale)


# ---- moving data ----------------------------------------------------------------------------------------------------


@rule("view", "flatten", "unflatten", "squeeze", "unsqueeze")
def view(p: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Any reshape, by matching runs of axes with equal products; literal sizes are rewritten for the member."""
    x = args[0]
    if not isinstance(x.ownership, Divided):
        full, part = p.run_both(args, kwargs)
        return p.wrap(full, part, p.join(name, [x], x.full.dim())[0], x.scale if full.shape == x.full.shape else ())
    full = p.run_global(args, kwargs)
    regrouping = _Regrouping(p, x, full)
    part = regrouping.member_result(name, args, kwargs)
    return regrouping.result(part)


class _Regrouping:
    """A reshape of one divided tensor: which axes become which, and what becomes of the strands."""

    def __init__(self, p: Any, x: TensorPair, full: torch.Tensor):
        self.p, self.x, self.full = p, x, full
        self.groups = _matched(tuple(x.full.shape), tuple(full.shape))
        self.cut_axis = x.ownership.axes[p.cut(x.ownership, x.full, x.part)] if x.ownership.axes else None

    def member_result(self, name: str, args: Any, kwargs: Any) -> torch.Tensor:
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
            ids = p.strands.new(ownership.ids.size)
            p.shuffles.append((p.mode, p.node, ownership.ids, merged_cut, ids))
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
    known = x.moved or _as_laid(x)
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


def _as_laid(x: TensorPair, without: Collection[int] = ()) -> MapExtent | None:
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
def permute(p: Any, name: str, args: Any, kwargs: Any) -> Any:
    x = args[0]
    full, part = p.run_both(args, kwargs)
    labels = torch.empty(tuple(range(1, x.full.dim() + 1)), device="meta")
    order = [size - 1 for size in _method(labels, p.node, globally(args), globally(kwargs)).shape]
    if not isinstance(x.ownership, Divided):
        if x.ownership is SHARED and x.scale and order != sorted(order):
            p.turned = p.node
        return p.wrap(full, part, p.join(name, [x], x.full.dim())[0])
    turned = sorted(range(len(x.ownership.axes)), key=lambda i: order.index(x.ownership.axes[i]))
    axes = tuple(order.index(x.ownership.axes[i]) for i in turned)
    rest = [a for a in order if a not in (0, *x.ownership.axes)]
    same = rest == sorted(rest) and x.moved is None
    moved = None if same else _moved(x, full, part, axes, lambda index, shape: index.permute(order))
    ownership = replace(x.ownership, ids=np.transpose(x.ownership.ids, turned), axes=axes)
    return p.wrap(full, part, ownership, x.scale if same else (), moved)


def _method(x: torch.Tensor, node: Any, args: Any, kwargs: Any) -> torch.Tensor:
    if node.op == "call_method":
        return getattr(x, node.target)(*args[1:], **kwargs)
    return node.target(x, *args[1:], **kwargs)


@rule("chunk", "split", "unbind")
def pieces(p: Any, name: str, args: Any, kwargs: Any) -> Any:
    x = args[0]
    at = 1 if name == "unbind" else 2
    dim = (args[at] if len(args) > at else kwargs.get("dim", 0)) % x.full.dim()
    if not isinstance(x.ownership, Divided) or dim not in x.ownership.axes:
        return _apart(p, x, dim, *p.run_both(args, kwargs), None, keep=name != "unbind")
    refuse_flattened(p, x)
    axis = x.ownership.axes.index(dim)
    cut = p.cut(x.ownership, x.full, x.part) == axis
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


def _divided(p: Any, sizes: Any) -> Any:
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


def _apart(p: Any, x: TensorPair, dim: int, full: tuple, part: tuple, axis: int | None, keep: bool) -> tuple:
    """Pieces of x along `dim`; `axis` is the position of that dim among its channel axes, if it is one."""
    found, start = [], 0
    for f, q in zip(full, part, strict=True):
        ownership: Any = x.ownership
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
def getitem(p: Any, name: str, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if not isinstance(x, TensorPair):
        return p.pick(args, kwargs)
    if name != "getitem":
        p.refuse(f"'{name}' is not understood", "write it as a slice")
    if not isinstance(x.ownership, Divided):
        full, part = p.run_both(args, kwargs)
        return p.wrap(full, part, p.join(name, [x], x.full.dim())[0], _sliced_scale(x, args[1], full))
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(isinstance(i, (TensorPair, torch.Tensor, list)) for i in index):
        p.refuse("it picks channels by an index tensor")
    index = _without_ellipsis(index, x.full.dim())
    ids, axes, member_index, rewritten = x.ownership.ids, [], [], False
    source, target, channel_axis, cut = 0, 0, 0, p.cut(x.ownership, x.full, x.part)
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


def _member_slice(p: Any, x: TensorPair, axis: int, whole: slice, own: slice, literal: slice) -> tuple[slice, bool]:
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


@rule("cat", "stack")
def cat(p: Any, name: str, args: Any, kwargs: Any) -> Any:
    operands = list(args[0] if args else kwargs["tensors"])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    full, part = p.run_both(args, kwargs)
    dim %= full.dim()
    splits = [t for t in operands if isinstance(t.ownership, Divided)]
    if not splits:
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
        ownership, scale = p.join(name, operands, operands[0].full.dim())
        axes = tuple(a + (dim <= a) for a in ownership.axes)
        return p.wrap(full, part, replace(ownership, axes=axes), scale)
    if dim not in first.axes:
        ownership, scale = p.join(name, operands, full.dim())
        return p.wrap(full, part, ownership, tuple(None if a + 2 == dim else s for a, s in enumerate(scale)))
    if any(t.ownership.axes != first.axes or t.ownership.flat for t in operands):
        if any(t.ownership.flat is None or t.ownership.axes != first.axes for t in operands):
            p.refuse("it joins channels on different axes")
        p.refuse("it joins flattened maps", "join them before the flatten")
    ids = np.concatenate([t.ownership.ids for t in operands], axis=first.axes.index(dim))
    return p.wrap(full, part, replace(first, ids=ids), operands[0].scale)


@rule("expand", "expand_as", "repeat", "tile", "broadcast_to")
def expand(p: Any, name: str, args: Any, kwargs: Any) -> Any:
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
def local_response_norm(p: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Over channels next to each other: they may belong to one member alone, and stay in their order."""
    x = args[0]
    if isinstance(x.ownership, Divided):
        if p.K > 1:
            p.refuse(f"'{name}' mixes the channels of different members")
        p.pinned.append(x.ownership.ids)
    return p.elementwise(name, args, kwargs)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(p: Any, name: str, args: Any, kwargs: Any) -> Any:
    x = args[0]
    groups = p.modules[p.node.target].groups if p.node.op == "call_module" else args[1]
    return _shuffled(p, x, groups, *p.run_both(args, kwargs))


def _shuffled(p: Any, x: TensorPair, groups: int, full: torch.Tensor, part: torch.Tensor) -> Any:
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
    ids = p.strands.new(rows.size)
    p.shuffles.append((p.mode, p.node, rows.T, 0, ids))
    return p.wrap(full, part, Divided(ids, (1,)), x.scale)


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(p: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Channels to space and back: blocks of r² channels must have one owner."""
    x = args[0]
    full, part = p.run_both(args, kwargs)
    if not isinstance(x.ownership, Divided):
        return p.wrap(full, part, x.ownership)
    refuse_flattened(p, x)
    ids = p.strands.new(full.shape[1])
    few, many = sorted([ids, x.ownership.ids], key=len)
    p.checks.append((p.node, lambda owner: bool((owner[many].reshape(len(few), -1) == owner[few][:, None]).all())))
    return p.wrap(full, part, Divided(ids, (1,)), p.scaled(x, None, full, part))


# ---- modules --------------------------------------------------------------------------------------------------------


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

ELEMENTWISE_MODULES = {
    "Identity", "ReLU", "ReLU6", "GELU", "SiLU", "Mish", "ELU", "SELU", "CELU", "LeakyReLU", "RReLU", "Hardswish",
    "Hardsigmoid", "Hardtanh", "Hardshrink", "Softshrink", "Tanhshrink", "Sigmoid", "LogSigmoid", "Tanh", "Softplus",
    "Softsign", "Threshold", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout",
}  # fmt: skip
