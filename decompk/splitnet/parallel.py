"""Model parallel: the groups of a split network on different processes, which talk twice in a forward pass.

The first process runs what all groups share, and its output is sent to all at once; each process runs its own groups;
the logits are added up once, every class coming from the processes that hold its groups. Backward mirrors it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..divide.blockdiag import layer_by_layer
from ..divide.compose import tensors
from ..errors import MISFITS, DecompkError, UnsupportedOperation
from ..fx.graph import in_mode, trace
from ..train.ranks import Ranks, Sum
from .cut import Cut, Handed
from .nodes import Nodes
from .rearrange import Copies, agree, grouped, rearranged, trial, vector_axis
from .splitter import Split, keep_zeros


class Parallel(nn.Module):
    """x (N, …), the same on every process → the split network's logits (N, classes), on every process.

    The coarsest groups are dealt out in runs. A process holds the parameters of its own groups, the first also those of
    what all groups share; the last layer's bias is on all of them, with the same gradient. Every process gives the same
    batch and the same loss; an optimizer of each then does what one would do for the whole network, as long as it takes
    parameters one by one (clipping by the norm of all does not). Nodes that groups of several processes read, of a
    split with overlap, lie on each of these, and their gradients are added up, one parameter after the other. Dropout
    draws each process's own numbers.

    Raises DecompkError where there are more processes than groups, UnsupportedOperation where layers behind the groups
    read all of them, where the network goes on behind its last layer, or where something looks across its groups.
    """

    bias: Tensor | None
    _rows: Tensor

    def __init__(self, split: Split, ranks: Ranks):
        super().__init__()
        assignment = split.assignment
        coarsest = min(assignment.groups.values())
        must_suffice(coarsest, ranks)
        self.ranks = ranks
        nodes = Nodes(split.dense, assignment.nodes.input_size)
        groups, levels = _groups_of(split, nodes)
        dealt = assignment.coarser(groups, levels, coarsest)
        mine = dealt[:, list(ranks.share(coarsest))].any(1)
        once = np.ones(nodes.count, dtype=bool)  # the split has made all copies there are to be
        copies = grouped(nodes, groups, once, keep=mine | (levels == 0))
        part = rearranged(split.dense, nodes, copies)
        net, whole = layer_by_layer(part.net, masks={})._inner, copy.deepcopy(split.dense)
        masks = {name: mask[part.sources[name]] for name, mask in split.masks.items()}
        self._dense, self._nets, self._sources = (split.dense,), (whole, part.net), part.sources  # no modules of ours
        self._head = _last_layer(whole, nodes)
        last: Any = whole.get_submodule(self._head)
        head: Any = net.get_submodule(self._head)
        rows, columns = (copies.node[side] for side in part.copies[self._head])
        held = _held_first(dealt, rows, columns, ranks)
        name, own = f"{self._head}.weight", torch.from_numpy(held).to(head.weight.device)
        masks[name] = masks.get(name, True) & own.view(*held.shape, *(1,) * (head.weight.dim() - 2))
        with torch.no_grad():
            head.weight.mul_(masks[name])
        keep_zeros(net, masks)
        self.classes = last.weight.shape[0]
        self.register_buffer("_rows", part.sources[f"{self._head}.weight"][0].reshape(-1).to(last.weight.device), False)
        self.bias, head.bias = last.bias, None
        self.trunk, self.groups = nn.ModuleDict(), nn.ModuleDict()
        self._handed: dict[str, list[Handed]] = {}
        cut = Cut(whole, nodes, levels, assignment.groups.keys() - assignment.whole_inputs, self._head)
        kept = np.zeros(nodes.count, dtype=bool)
        kept[copies.node] = True
        for training in (True, False):
            first, rest, self._handed[str(training)] = cut(training, kept)
            self.groups[str(training)] = fx.GraphModule(net, rest)
            if ranks.first:
                self.trunk[str(training)] = fx.GraphModule(whole, first)
        self._check(nodes, fx.GraphModule(whole, first))  # the graph of eval mode, cut last
        if ranks.size > 1:
            self._add_up(nodes, copies, _several(dealt, ranks))
        self.train(split.dense.training)

    def forward(self, x: Tensor) -> Tensor:
        mode = str(self.training)
        handed = self._handed[mode]
        values: Sequence[Tensor] = self.trunk[mode](x) if self.ranks.first else [h.empty(x) for h in handed]
        if self.ranks.size > 1 and handed:
            values = [value.to(x.dtype) for value in values]  # one dtype for all, under autocast too
            values = _FromFirst.apply(x.new_zeros((), requires_grad=torch.is_grad_enabled()), self.ranks, *values)
        logits = self._logits(mode, x, values)
        if self.ranks.size > 1:
            logits = _Together.apply(logits)
        return logits if self.bias is None else logits + self.bias

    def _logits(self, mode: str, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        """What the groups of this process add to the logits, without the bias."""
        own = self.groups[mode](x, *(h.own(value) for h, value in zip(self._handed[mode], values, strict=True)))
        return own.new_zeros(len(own), self.classes).index_add(1, self._rows, own)

    @torch.no_grad()
    def _check(self, nodes: Nodes, first: fx.GraphModule) -> None:
        """Raises on every process unless the parts add up to the whole: `first` is what comes first, in eval mode."""
        (dense,), whole = self._dense, self._nets[0]
        x = trial(dense, nodes)
        with in_mode(dense, False), in_mode(whole, False), in_mode(self, False):
            expected = dense(x)
            try:
                logits = self._logits("False", x, first(x))
                failed = logits.shape != expected.shape
            except MISFITS:
                failed = True
            total = self.ranks.sum(torch.zeros_like(expected) if failed else logits)
            total = total if self.bias is None or failed else total + self.bias
        if self.ranks.any([failed])[0] or not agree(total, expected):
            raise UnsupportedOperation(
                f"the groups of {type(dense).__name__} do not add up to it: something in them looks across channels, "
                "such as a norm, counts them, or returns more than logits (N, classes); run them in one process."
            )

    @torch.no_grad()
    def gathered(self) -> nn.Module:
        """The dense network with zeros between groups, with every process's values, on each of them; all must ask."""
        (dense,) = self._dense
        known = tensors(dense)
        held = {id(t) for t in (*self.parameters(), *self.buffers())}
        whole, part = ({n: t.cpu() for n, t in tensors(net).items() if id(t) in held} for net in self._nets)
        places = {name: _without_slices(self._sources[name]) for name in part if name in self._sources}
        known[f"{self._head}.weight"].zero_()
        for theirs, (values, where) in zip(*map(self.ranks.from_all, (whole, (part, places))), strict=True):
            for name, value in theirs.items():
                known[name].copy_(value)
            for name, value in values.items():
                index = tuple(slice(None) if i is None else i for i in where[name]) if name in where else ...
                if name == f"{self._head}.weight":  # each entry is one process's, and zero on the others
                    known[name][index] += value.to(known[name])
                else:
                    known[name][index] = value.to(known[name])
        return dense

    def _add_up(self, nodes: Nodes, copies: Copies, several: np.ndarray) -> None:
        """Add up over all processes the gradients of what gives the nodes that are `several`'s, (count,) of bool."""
        several[nodes.outer] = False  # of a class each process holds its own part
        mine = {id(p) for p in self.groups.parameters()}
        known = {name: p for name, p in self._nets[1].named_parameters() if id(p) in mine}
        held = {f"{path}.weight": (0, sides.outputs.nodes) for path, sides in nodes.layers.items()}
        for name, ids in nodes.vectors.items():
            if name in known:
                held[name] = vector_axis(known[name]), ids
        for name, (axis, ids) in held.items():
            everywhere = np.unique(ids[several[ids]])
            if len(everywhere) and name in known:
                own = copies.node[copies.along(ids)[0]]
                places = np.nonzero(several[own])[0]
                slots = np.searchsorted(everywhere, own[places])
                summed = _Summed(axis, torch.from_numpy(places), torch.from_numpy(slots), len(everywhere))
                known[name].register_hook(summed)


def must_suffice(groups: int, ranks: Ranks) -> None:
    """Raises DecompkError where a process would have no group."""
    if ranks.size > groups:
        raise DecompkError(f"{groups} groups cannot be dealt out to {ranks.size} processes: start {groups}.")


def _without_slices(index: Sequence[Any]) -> list[Tensor | None]:
    """An index that can be sent: None stands for all of an axis."""
    return [i if isinstance(i, Tensor) else None for i in index]


def _groups_of(split: Split, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
    """(count, G) of bool and (count,): the groups of each of `nodes`, those of split.dense, and out of how many."""
    groups, levels = np.zeros((nodes.count, split.copies.groups.shape[1]), dtype=bool), np.zeros(nodes.count, dtype=int)
    of_copy = split.assignment.level[split.copies.node]
    for path, sides in nodes.layers.items():
        outputs, inputs = split.along[path]
        groups[sides.outputs.nodes], levels[sides.outputs.nodes] = split.copies.groups[outputs], of_copy[outputs]
        if sides.inputs is not None:
            groups[sides.inputs.of_each], levels[sides.inputs.of_each] = split.copies.groups[inputs], of_copy[inputs]
    return groups, levels


def _last_layer(net: nn.Module, nodes: Nodes) -> str:
    returned = [_returned(net, training) for training in (True, False)]
    found: set[Any] = {node.target if isinstance(node, fx.Node) else None for node in returned}
    if len(found) != 1 or not found <= set(nodes.layers):
        raise UnsupportedOperation(
            f"{type(net).__name__} does not return the output of one last layer, so its groups cannot be added up "
            "there; let it return logits."
        )
    return found.pop()


def _returned(net: nn.Module, training: bool) -> Any:
    return next(node.args[0] for node in trace(net, training).nodes if node.op == "output")


def _held_first(dealt: np.ndarray, rows: np.ndarray, columns: np.ndarray, ranks: Ranks) -> np.ndarray:
    """(O, I) of bool: the entries of the last layer that this process adds to the sum, those that no earlier one holds.

    dealt: (count, coarsest) of bool, each node's groups; a class of none has all. rows, columns: the entries' nodes.
    """
    of_class = dealt[rows] | ~dealt[rows].any(1, keepdims=True)
    shares = [list(ranks.share(dealt.shape[1], rank)) for rank in range(ranks.rank + 1)]
    holds = np.stack([of_class[:, share] @ dealt[columns][:, share].T for share in shares])
    return holds[-1] & ~holds[:-1].any(0)


def _several(groups: np.ndarray, ranks: Ranks) -> np.ndarray:
    """(count,) of bool: the nodes whose groups, (count, coarsest) of bool, lie on several processes."""
    shares = [list(ranks.share(groups.shape[1], rank)) for rank in range(ranks.size)]
    return np.stack([groups[:, share].any(1) for share in shares]).sum(0) > 1


@dataclass(frozen=True)
class _Summed:
    """A gradient whose `places` along `axis` are the `slots` of what all processes add up."""

    axis: int
    places: Tensor
    slots: Tensor
    length: int

    def __call__(self, grad: Tensor) -> Tensor:
        import torch.distributed as dist

        rows = grad.movedim(self.axis, 0).clone()
        total = rows.new_zeros(self.length, *rows.shape[1:])
        total[self.slots] = rows[self.places]
        dist.all_reduce(total)
        rows[self.places] = total[self.slots]
        return rows.movedim(0, self.axis)


class _FromFirst(torch.autograd.Function):
    """The first process's tensors on all of them; gradients are added up there. `anchor` makes backward come."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, ranks: Ranks, *values: Tensor) -> tuple[Tensor, ...]:
        import torch.distributed as dist

        ctx.first, ctx.shapes = ranks.first, [v.shape for v in values]
        flat = torch.cat([v.reshape(-1) for v in values])
        dist.broadcast(flat, 0)
        return _unflattened(flat, ctx.shapes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        import torch.distributed as dist

        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.reduce(flat, 0)
        back = _unflattened(flat, ctx.shapes) if ctx.first else (None,) * len(grads)
        return (None, None, *back)


def _unflattened(flat: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    return tuple(t.view(s) for t, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True))


class _Together(Sum):
    """Σ over processes. Each computes the loss of the sum, so its gradient is its own part's already."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
