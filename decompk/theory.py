"""The paper's theorems and bounds as checks on real networks: each returns the largest violation it finds.

Theorems 2.1 and 2.2 for classifiers; what becomes of them in regression (2.22 ff.), auto-encoders and recurrent
networks (2.29).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

from .divide.compose import assemble
from .divide.decompose import Decomposition
from .divide.operations import ELEMENTWISE_FUNCTIONS, ELEMENTWISE_MODULES, module_key, operation_name
from .errors import DecompkError
from .fx.graph import Window, in_mode, windows


@dataclass(frozen=True)
class Span:
    """One axis of a member's map beside the global one: position q is there q + offset, and equal on [low, high)."""

    offset: Fraction
    low: int
    high: int
    size: int
    whole: int

    @property
    def meets_start(self) -> bool:
        """The crop begins where the map begins, so that padding there is padding in both."""
        return self.offset == 0 and self.low == 0

    @property
    def meets_end(self) -> bool:
        return self.offset + self.size == self.whole and self.high == self.size


@dataclass(frozen=True)
class LayerCheck:
    """One node and one member: where its map must equal the composed network's, and by how much it does not."""

    name: str
    member: int
    field: tuple[tuple[int, int], ...] | None  # per axis, in the member's positions; None: no field
    reason: str  # why there is no field
    violation: float


@dataclass(frozen=True)
class FeatureCheck:
    """violation: the largest |composed − member| over all layers' fields, and of the output. output: |composed(x) −
    Σ_k member_k|, of the mean for head="mean", and |D_Ωk(composed(x)) − member_k| for "concat"; None where some
    member's last layer lies outside its field (padding, global pooling)."""

    violation: float
    output: float | None
    layers: tuple[LayerCheck, ...]


def theorem_2_1(
    d: Decomposition, subnets: Sequence[nn.Module], composed: nn.Module, x: torch.Tensor, head: str = "sum"
) -> FeatureCheck:
    """(2.15), (2.16): on every layer's activation field, block k of the composed network equals sub-network k.

    x: (N, *input_size), the global batch. head: as the networks were composed; "mean" is (2.22), "concat" the
    auto-encoder's D_Ωk(x̂) = x̂_k. Recurrent layers are compared at every depth, direction and time step (2.29).
    Networks are run in eval mode and left in the mode they had. The field of a layer is what depends on the crop alone:
    it shrinks with every window that reaches past a cut edge, and is empty where a stride does not divide the crop's
    start or an operation looks at the whole map. What is divided by features has no edges, and its field is all of it.
    """
    graph, places = d.division.graphs[False], _blocks(d)
    crops = d.split(x)
    whole = _features(composed, graph, x, {}, _edits(d))
    checks, outputs, exact = [], [], True
    heads = next(node for node in graph.nodes if node.op == "output").all_input_nodes
    apart = head == "concat" or bool(d.division.assemblies[False])
    states = {n: _hidden_states(composed, n, whole) for n in graph.nodes if _is_recurrent(n, composed)}
    for k, (member, crop) in enumerate(zip(subnets, crops, strict=True)):
        own = _features(member, graph, crop, d.division.member_args[False], {})
        fields = _fields(d, graph, k, own, whole)
        for node in graph.nodes:
            if node in states:
                checks += _every_step(d, node, k, _hidden_states(member, node, own), states[node])
            if node.op in ("placeholder", "get_attr", "output") or node.name not in places or node not in fields:
                continue
            found = fields[node]
            if isinstance(found, str):
                checks.append(LayerCheck(node.name, k, None, found, 0.0))
                continue
            block, mine = places[node.name](whole[node], k), own[node]
            for axis, span in enumerate(found, start=2):
                block = block.narrow(axis, span.low + int(span.offset), span.high - span.low)
                mine = mine.narrow(axis, span.low, span.high - span.low)
            violation = (block - mine).abs().max().item() if block.numel() else 0.0
            checks.append(LayerCheck(node.name, k, tuple((s.low, s.high) for s in found), "", violation))
        exact &= all(_is_whole(fields.get(h, "")) if apart else fields.get(h, "") == () for h in heads)
        parts = [_part(places, fields[h], h, whole[h], k) if apart and exact else 0 for h in heads]
        outputs.append([own[h] - part for h, part in zip(heads, parts, strict=True)])
    output = None
    if exact and apart:
        output = max(error.abs().max().item() for errors in outputs for error in errors)
    elif exact:
        scale = 1 / d.K if head == "mean" else 1
        output = max((whole[h] - scale * sum(o[i] for o in outputs)).abs().max().item() for i, h in enumerate(heads))
    violation = max([check.violation for check in checks] + ([output] if output is not None else []), default=0.0)
    return FeatureCheck(violation, output, tuple(checks))


def _is_whole(field: _Field) -> bool:
    return not isinstance(field, str) and all((s.low, s.high) == (0, s.size) for s in field)


def _part(places: dict, field: Any, node: fx.Node, whole: torch.Tensor, k: int) -> torch.Tensor:
    """What of the composed network's output is member k's."""
    part = places[node.name](whole, k) if node.name in places else whole
    for axis, span in enumerate(field, start=2):
        part = part.narrow(axis, int(span.offset), span.size)
    return part


def _blocks(d: Decomposition) -> dict[str, Callable[[torch.Tensor, int], torch.Tensor]]:
    """By node: from the composed network's value and k, what has member k's channels or features."""

    def along(axis: int, index: np.ndarray) -> Callable[[torch.Tensor, int], torch.Tensor]:
        return lambda value, k: value.index_select(axis, torch.from_numpy(index[k]).to(value.device))

    division = d.division
    found = {name: along(-1, index) for name, index in division.features[False].items()}
    found |= {name: along(1, index) for name, index in division.channels[False].items() if index is not None}
    return found | {name: lambda value, k: value for name in division.assemblies[False]}


def _edits(d: Decomposition) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """What the composed network does behind a node of its graph, by name."""

    def reordered(order: np.ndarray) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda value: value.index_select(1, torch.from_numpy(order).to(value.device))

    found = {name: reordered(order) for name, order in d.division.reorders[False].items()}
    return found | {name: partial(assemble, boxes=boxes) for name, boxes in d.division.assemblies[False].items()}


def _is_recurrent(node: fx.Node, net: nn.Module) -> bool:
    return node.op == "call_module" and isinstance(net.get_submodule(str(node.target)), nn.RNNBase)


def _every_step(
    d: Decomposition, node: fx.Node, k: int, own: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]
) -> list[LayerCheck]:
    """(2.29) for one recurrent module: the hidden states of all time steps, at every depth and in both directions."""
    checks = []
    for name, states in own.items():
        rows = d.division.places[f"{node.target}.weight_hh_{name}"][k][1].reshape(
            -1
        )  # W's columns are the hidden state
        block = whole[name][..., torch.from_numpy(rows).to(states.device)]
        checks.append(LayerCheck(f"{node.name}.{name}", k, (), "", (block - states).abs().max().item()))
    return checks


@torch.no_grad()
def _hidden_states(net: nn.Module, node: fx.Node, values: dict) -> dict[str, torch.Tensor]:
    """The states at every step of each layer of a recurrent module, "l0", "l0_reverse", …; each is run as one alone."""
    rnn: Any = net.get_submodule(str(node.target))
    x = values[node.all_input_nodes[0]]
    kind, options = type(rnn), {"nonlinearity": rnn.nonlinearity} if isinstance(rnn, nn.RNN) else {}
    found = {}
    for depth in range(rnn.num_layers):
        outputs = []
        for end in ("", "_reverse")[: 1 + rnn.bidirectional]:
            alone = kind(x.shape[-1], rnn.hidden_size, bias=rnn.bias, batch_first=rnn.batch_first, **options).to(x)
            for name, parameter in alone.named_parameters():
                parameter.copy_(getattr(rnn, name.replace("_l0", f"_l{depth}{end}")))
            time = 1 if rnn.batch_first else 0
            states = alone(x.flip(time) if end else x)[0]
            outputs.append(states.flip(time) if end else states)
            found[f"l{depth}{end}"] = outputs[-1]
        x = torch.cat(outputs, -1)
    return found


def feature_maps(
    d: Decomposition, subnets: Sequence[nn.Module], composed: nn.Module, x: torch.Tensor, names: Sequence[str]
) -> dict[str, list[tuple[torch.Tensor, torch.Tensor, tuple[Span, ...] | str]]]:
    """What theorem_2_1 compares at the nodes called `names`: for each of them, one triple a member.

    The member's map on its crop; its channels of the composed network's map on the whole of x; the field, a Span for
    every axis, or the sentence that says why there is none. Networks are run as theorem_2_1 runs them.
    """
    graph, places = d.division.graphs[False], _blocks(d)
    whole = _features(composed, graph, x, {}, _edits(d))
    maps: dict[str, list] = {name: [] for name in names}
    for k, (member, crop) in enumerate(zip(subnets, d.split(x), strict=True)):
        own = _features(member, graph, crop, d.division.member_args[False], {})
        fields = _fields(d, graph, k, own, whole)
        for node in graph.nodes:
            if node.name in maps:
                maps[node.name].append((own[node], places[node.name](whole[node], k), fields[node]))
    return maps


@dataclass(frozen=True)
class BoundCheck:
    """What Theorem 2.2 says of N samples; violation ≤ rounding means that it holds.

    all_right: samples every member classifies correctly; lost: those of them that the composed network does not.
    loss, bound: both sides of (2.19), summed over the samples. violation: the largest excess over any of the claims.
    """

    all_right: int
    lost: int
    loss: float
    bound: float
    violation: float


def theorem_2_2(logits: torch.Tensor, target: torch.Tensor, composed: torch.Tensor | None = None) -> BoundCheck:
    """(2.19): what K members classify correctly, their sum does too, at no higher loss; else min over the right
    members plus the sum over the wrong ones bounds it.

    logits: (K, N, classes), the members' outputs. target: (N,), class numbers. composed: (N, classes), the composed
    network's outputs; the theorem rests on (2.16), so that is Σ_k logits, the default.
    """
    members, samples, classes = logits.shape
    composed = logits.sum(0) if composed is None else composed
    flat = F.cross_entropy(logits.reshape(-1, classes), target.repeat(members), reduction="none")
    losses = flat.reshape(members, samples)
    loss = F.cross_entropy(composed, target, reduction="none")
    at_target = logits.gather(2, target.expand(members, samples)[..., None])
    right = (logits <= at_target).all(2)
    best = torch.where(right, losses, torch.inf).amin(0)
    bound = torch.where(best.isinf(), 0, best) + torch.where(right, 0, losses).sum(0)
    agreed = right.all(0)
    composed_right = (composed <= composed.gather(1, target[:, None])).all(1)
    lost = int((agreed & ~composed_right).sum())
    excess = [(loss - bound).max().item()]
    if agreed.any():
        excess.append((loss - losses.amin(0))[agreed].max().item())
        excess.append((composed.amax(1) - composed.gather(1, target[:, None])[:, 0])[agreed].max().item())
    return BoundCheck(int(agreed.sum()), lost, loss.sum().item(), bound.sum().item(), max(0.0, *excess))


@dataclass(frozen=True)
class Bound:
    """Both sides of an inequality, means over the samples; violation ≤ rounding means that it holds for each."""

    loss: float
    bound: float
    violation: float

    @staticmethod
    def of(losses: torch.Tensor, bounds: torch.Tensor) -> Bound:
        return Bound(losses.mean().item(), bounds.mean().item(), max(0.0, (losses - bounds).max().item()))


def regression_bound(
    outputs: torch.Tensor, target: torch.Tensor, composed: torch.Tensor | None = None, loss: str = "mse"
) -> Bound:
    """(2.23) ff.: what K regressors' mean gets wrong is at most what they get wrong on average.

    outputs: (K, N, …), the members'. target: (N, …). composed: (N, …), the composed network's outputs; by (2.22) that
    is the mean over members, the default. loss: "mse", ‖·‖² of a sample, or "mae", ‖·‖₁.
    """
    composed = outputs.mean(0) if composed is None else composed
    return Bound.of(_distance(composed, target, loss), _distance(outputs, target.expand_as(outputs), loss, 2).mean(0))


def reconstruction_bound(
    d: Decomposition, outputs: Sequence[torch.Tensor], x: torch.Tensor, composed: torch.Tensor
) -> Bound:
    """‖x − x̂‖ ≤ Σ_k ‖D_Ωk(x) − x̂_k‖: an auto-encoder's error is at most the sum of its members'. Norms are Euclidean.

    outputs: what each of the K members makes of its part of x (N, *input_size). composed: x̂ (N, *input_size).
    """
    members = zip(outputs, d.split(x), strict=True)
    bounds: Any = sum(_distance(output, part, "l2") for output, part in members)
    return Bound.of(_distance(composed, x, "l2"), bounds)


def _distance(a: torch.Tensor, b: torch.Tensor, norm: str, kept: int = 1) -> torch.Tensor:
    """‖a − b‖ of each sample; the first `kept` axes stay. "mse" is the square of "l2"."""
    away = (a - b).flatten(kept) if a.dim() > kept else (a - b).unsqueeze(-1)
    if norm not in ("mse", "mae", "l2"):
        raise DecompkError(f"loss={norm!r} is unknown; choose 'mse' or 'mae'.")
    return away.abs().sum(-1) if norm == "mae" else away.norm(dim=-1) ** (2 if norm == "mse" else 1)


class _Features(fx.Interpreter):
    """Runs the division's graph on a network and keeps every value; applies the division's edits on the way."""

    def __init__(self, net: nn.Module, graph: fx.Graph, arguments: dict, behind: dict):
        super().__init__(net, garbage_collect_values=False, graph=graph)
        self._arguments, self._behind = arguments, behind

    def run_node(self, node: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.name in self._arguments:
            args, kwargs = map_arg(self._arguments[node.name], self.env.__getitem__)
        value = getattr(self, node.op)(node.target, args, kwargs)
        return self._behind[node.name](value) if node.name in self._behind else value


def _features(net: nn.Module, graph: fx.Graph, x: torch.Tensor, arguments: dict, behind: dict) -> dict[fx.Node, Any]:
    interpreter = _Features(net, graph, arguments, behind)
    with in_mode(net, training=False), torch.no_grad():
        interpreter.run(x)
    return interpreter.env


_Field = tuple[Span, ...] | str  # a string says why there is none


def _fields(d: Decomposition, graph: fx.Graph, k: int, own: dict, whole: dict) -> dict[fx.Node, _Field]:
    """The activation field of crop k at every node that holds a tensor."""
    fields: dict[fx.Node, _Field] = {}
    modules = dict(d.model.named_modules(remove_duplicate=False))
    for node in graph.nodes:
        if not isinstance(own.get(node), (torch.Tensor, tuple)) or node.op == "output":
            continue
        if node.op == "placeholder" and node.name in d.division.features[False]:
            fields[node] = ()
            continue
        if node.op == "placeholder":
            sizes = zip(d.crops[k].start, d.crops[k].size, d.input_size[1:], strict=True)
            fields[node] = tuple(Span(Fraction(start), 0, size, size, full) for start, size, full in sizes)
            continue
        sources = [fields[n] for n in node.all_input_nodes if n in fields]
        if sources:
            fields[node] = _step(node, modules, _meet(sources), own[node], whole[node], d)
    return fields


def _meet(sources: list[_Field]) -> _Field:
    """Where several operands all are as they should be."""
    for source in sources:
        if isinstance(source, str):
            return source
    maps: list[Any] = [s for s in sources if s]
    if not maps:
        return ()
    if any([s.offset for s in m] != [s.offset for s in maps[0]] for m in maps) or len({len(m) for m in maps}) > 1:
        return "operands lie at different offsets"
    spans = [replace(s[0], low=max(t.low for t in s), high=min(t.high for t in s)) for s in zip(*maps, strict=True)]
    return tuple(spans)


def _step(node: fx.Node, modules: dict, field: _Field, own: Any, whole: Any, d: Decomposition) -> _Field:
    """The field behind one operation. () means no space is left and the member's values are the composed network's."""
    if node.name in d.division.noted:
        return f"'{node.name}' is not exact: see the decomposition's notes"
    if isinstance(field, str) or field == ():
        return field
    module = modules.get(node.target) if node.op == "call_module" else None
    name = operation_name(node)
    space = len(field)
    if isinstance(module, nn.Linear) or name == "linear":
        if own.dim() == 2:
            return _first_fc(module_key(node), node.name, field, d)
        return field
    if isinstance(module, nn.modules.conv._ConvNd) and node.target in d.division.adapted:
        return _first_fc(module_key(node), node.name, field, d)
    if isinstance(own, tuple):
        return field if name in ("chunk", "split") and _dim(node, own[0].dim()) == 1 else _past(node)
    if own.dim() == 2:
        flat = isinstance(module, nn.Flatten) or name in ("flatten", "view", "squeeze")
        if flat and d.division.channels[False].get(node.name) is not None:  # a map of one pixel, now without space
            inside = all(s.offset.denominator == 1 and (s.low, s.high) == (0, s.size) for s in field)
            return () if inside else f"'{node.name}' reads positions outside the field"
        return field if flat or _elementwise(module, name) else _past(node)
    untouched = tuple(own.shape[-space:]) == tuple(s.size for s in field)
    if name in ("view", "contiguous") or (name == "transpose" and max(_axes(node, own.dim())) < own.dim() - space):
        return field if untouched else _past(node)
    if _elementwise(module, name):
        return field
    if name == "getitem" and isinstance(node.args[0], fx.Node):
        return _sliced(node, field, own, whole)
    if name == "cat":
        return field if _dim(node, own.dim()) == 1 else _past(node)
    if name == "pad":
        return _padded(node, field, own, whole)
    if getattr(module, "padding_mode", "zeros") == "circular":
        return _past(node)
    found = windows(module if module is not None else name, space, *_arguments(node))
    return _past(node) if found is None else _behind(node, field, found, own, whole)


def _elementwise(module: nn.Module | None, name: str) -> bool:
    """Whether every output position depends on the same input position alone, in eval mode."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.running_mean is not None
    if module is not None:
        return isinstance(module, nn.PReLU | nn.ChannelShuffle) or type(module).__name__ in ELEMENTWISE_MODULES
    return name in ELEMENTWISE_FUNCTIONS or name == "channel_shuffle"


def _past(node: fx.Node) -> str:
    return f"'{node.name}' looks past the crop"


def _behind(node: fx.Node, field: tuple[Span, ...], found: tuple[Window, ...], own: Any, whole: Any) -> _Field:
    sizes = zip(field, found, own.shape[2:], whole.shape[2:], strict=True)
    spans = [_through(span, window, size, full) for span, window, size, full in sizes]
    if any(s.offset.denominator != 1 for s in spans):
        return f"the crop starts between two positions of '{node.name}'"
    if any(s.low >= s.high for s in spans):
        return f"nothing of the crop is left inside at '{node.name}'"
    return tuple(spans)


def _cropped(span: Span, start: int, size: int, whole: int) -> Span:
    """The axis without its first `start` positions, as (2.25) crops a shortcut."""
    return Span(span.offset, max(span.low - start, 0), min(span.high - start, size), size, whole)


def _padded(node: fx.Node, field: tuple[Span, ...], own: Any, whole: Any) -> _Field:
    amounts: Any = node.args[1] if len(node.args) > 1 else node.kwargs["pad"]
    if (node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")) != "constant":
        return _past(node)
    spans = []
    for axis, span in enumerate(field):
        at = 2 * (len(field) - 1 - axis)
        sides = tuple(amounts[at : at + 2]) or (0, 0)
        sizes = own.shape[2 + axis], whole.shape[2 + axis]
        if max(sides) <= 0:
            spans.append(_cropped(span, -sides[0], *sizes))
        elif min(sides) >= 0:
            spans.append(_through(span, Window(1, 1, sides), *sizes))
        else:
            return _past(node)
    return tuple(spans)


def _sliced(node: fx.Node, field: tuple[Span, ...], own: Any, whole: Any) -> _Field:
    """Slices of channels leave the field as it is; over space, steps are windows and borders are cropped."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if isinstance(node.args[1], int) and isinstance(node.args[0], fx.Node) and own.dim() == 2 + len(field):
        return field  # one of several pieces
    if any(item is None or item is Ellipsis or isinstance(item, int) for item in index):
        return _past(node)
    space = (*index[2:], *[slice(None)] * (2 + len(field) - len(index)))
    if any(not isinstance(i.start or 0, int) or (i.start or 0) < 0 or not _from_end(i.stop) for i in space):
        return _past(node)
    if all(item.step in (None, 1) for item in space):
        sizes = zip(field, space, own.shape[2:], whole.shape[2:], strict=True)
        return tuple(_cropped(span, item.start or 0, size, full) for span, item, size, full in sizes)
    if any(item.start or item.stop is not None for item in space):
        return _past(node)
    return _behind(node, field, tuple(Window(1, item.step or 1) for item in space), own, whole)


def _from_end(stop: Any) -> bool:
    return stop is None or (isinstance(stop, int) and stop < 0)


def _axes(node: fx.Node, dims: int) -> list[int]:
    axes: Any = (*node.args[1:], *node.kwargs.values())
    return [axis % dims for axis in axes]


def _dim(node: fx.Node, dims: int) -> int:
    at = 1 if operation_name(node) == "cat" else 2
    dim: Any = node.args[at] if len(node.args) > at else node.kwargs.get("dim", 0)
    return dim % dims


def _arguments(node: fx.Node) -> tuple[tuple, dict]:
    return (tuple(node.args[1:]), dict(node.kwargs)) if node.op != "call_module" else ((), {})


def _first_fc(key: str, name: str, field: tuple[Span, ...], d: Decomposition) -> _Field:
    """The first FC layer reads its crop of the map: right if all of it is, and lies where (2.13) placed the kernel."""
    whole_map = all(s.low == 0 and s.high == s.size and s.offset.denominator == 1 for s in field)
    if not whole_map or not (key in d.division.adapted or all(s.size == s.whole for s in field)):
        return f"'{name}' reads positions outside the field"
    return ()


def _through(span: Span, w: Window, size: int, whole: int) -> Span:
    """The field behind one window along one axis; `size` and `whole` are the member's and the global output sizes."""
    before, _ = w.padding
    reach = (w.kernel - 1) * w.dilation
    if w.transposed:
        offset = span.offset * w.stride
        low = 0 if span.meets_start else (span.low - 1) * w.stride - before + reach + 1
        high = size if span.meets_end else span.high * w.stride - before
    else:
        offset = span.offset / w.stride
        low = 0 if span.meets_start else -(-(span.low + before) // w.stride)
        high = size if span.meets_end else (span.high - 1 + before - reach) // w.stride + 1
    return Span(offset, max(low, 0), min(high, size), size, whole)
