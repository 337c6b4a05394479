"""The nodes of a network in another order, some of them twice or not at all: its own classes around other tensors."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..divide.compose import output_axis, tensors
from ..errors import MISFITS, DecompkError, UnsupportedOperation
from ..fx.graph import in_mode
from ..fx.pytree import tree_map
from .nodes import Nodes

# What a module calls the number of its channels.
COUNTS = {
    nn.modules.batchnorm._NormBase: "num_features",
    nn.GroupNorm: "num_channels",
    nn.PReLU: "num_parameters",
}
CLOSE = 1e-3  # of the largest output: what summing in another order may change


@dataclass(frozen=True, eq=False)
class Copies:
    """What comes to the places of a network's nodes.

    node: (copies,), of which node each is one. groups: (copies, G) of bool, the groups it belongs to, none if its node
    does to none. at: for each node, the copies that come to its place.
    """

    node: np.ndarray
    groups: np.ndarray
    at: list[np.ndarray]

    def along(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """An axis that holds nodes `ids` → the copies that it holds then, and from which of its places each comes."""
        place: dict[tuple[int, int], int] = {}
        seen: Counter[int] = Counter()
        for p, i in enumerate(ids.tolist()):  # twice the same: a concatenation of something with itself
            place[i, seen[i]] = p
            seen[i] += 1
        found, sources, seen = [], [], Counter()
        for i in ids.tolist():
            for c in self.at[i].tolist():
                found.append(c)
                sources.append(place[int(self.node[c]), seen[i]])
            seen[i] += 1
        return np.array(found, dtype=int), np.array(sources, dtype=int)


def grouped(nodes: Nodes, groups: np.ndarray, once: np.ndarray | None = None, keep: np.ndarray | None = None) -> Copies:
    """Nodes side by side that are of the same group, wherever code allows it.

    groups: (count, G) of bool. A node of several groups has a copy in each; but what a network reads or returns, and
    nodes of `once`, (count,) of bool, are there once, in all their groups. keep: (count,) of bool, the nodes that stay
    (default: all). Nodes change places only with those that the same tensors hold, and outer and pinned ones not at
    all.
    """
    fixed, single = np.zeros((2, nodes.count), dtype=bool)
    fixed[np.concatenate([nodes.outer, nodes.pinned])] = True
    single[nodes.outer] = True
    single |= False if once is None else once
    keep = np.ones(nodes.count, dtype=bool) if keep is None else keep
    node: list[int] = []
    member, at = [], [np.zeros(0, dtype=int)] * nodes.count
    for kind in np.unique(nodes.kinds):
        alike = np.nonzero(nodes.kinds == kind)[0]
        copies = [(i, row) for i in alike[keep[alike]] for row in ([groups[i]] if single[i] else _one_each(groups[i]))]
        if not fixed[alike[0]]:
            copies.sort(key=lambda copy: np.nonzero(copy[1])[0].mean() if copy[1].any() else -1)
        first = len(node)
        node += [i for i, _ in copies]
        member += [row for _, row in copies]
        if fixed[alike[0]]:  # every copy stays with its node
            for c, (i, _) in enumerate(copies, start=first):
                at[i] = np.append(at[i], c)
        else:
            for i, chunk in zip(alike, np.array_split(np.arange(first, len(node)), len(alike)), strict=True):
                at[i] = chunk
    return Copies(np.array(node, dtype=int), np.array(member, dtype=bool).reshape(len(node), groups.shape[1]), at)


def _one_each(row: np.ndarray) -> np.ndarray:
    """A node's groups (G,) → those of each copy; a node in no group has one copy, in none."""
    return np.eye(len(row), dtype=bool)[row] if row.any() else row[None]


@dataclass(frozen=True, eq=False)
class Rearranged:
    """A rearranged network, and where its tensors come from.

    net: of the same classes. copies: layer path → the copies along the outputs and, None for the image, the inputs.
    sources: tensor name → index tensors into the old one's axes, which broadcast against each other.
    """

    net: nn.Module
    copies: dict[str, tuple[np.ndarray, np.ndarray | None]]
    sources: dict[str, tuple[Tensor, ...]]


def rearranged(net: nn.Module, nodes: Nodes, copies: Copies) -> Rearranged:
    """A copy of `net` whose tensors hold `copies` of its nodes; what reads a node of n copies reads 1/n of each.

    So the network computes what it did, as long as no node is left out that was not zero.
    """
    out = copy.deepcopy(net)
    known, found = tensors(out), {}
    sources: dict[str, Any] = {}
    for path, sides in nodes.layers.items():
        name = f"{path}.weight"
        outputs, rows = copies.along(sides.outputs.nodes)
        inputs, columns, shares = None, np.arange(known[name].shape[1 - output_axis(out, name)]), None
        if sides.inputs is not None:
            inputs, places = copies.along(sides.inputs.nodes)
            repeat = sides.inputs.repeat
            inputs, columns = np.repeat(inputs, repeat), (places[:, None] * repeat + np.arange(repeat)).reshape(-1)
            shares = 1 / np.bincount(columns)[columns]
        found[path] = outputs, inputs
        if output_axis(out, name) == 1:
            sources[name] = torch.from_numpy(columns)[:, None], torch.from_numpy(rows)[None]
        else:
            sources[name] = torch.from_numpy(rows)[:, None], torch.from_numpy(columns)[None]
        value = known[name].detach()[sources[name]]
        if shares is not None:
            shape = [1] * value.dim()
            shape[1 - output_axis(out, name)] = -1
            value = value * torch.from_numpy(shares).to(value).view(shape)
        _replace(out, name, value)
    for name, ids in nodes.vectors.items():
        axis = vector_axis(known[name])
        _, places = copies.along(ids)
        sources[name] = (*(slice(None),) * axis, torch.from_numpy(places))
        _replace(out, name, known[name].detach()[sources[name]])
    return Rearranged(out, found, sources)


def fitted(net: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `net` with the values of a state_dict in which layers are wider or narrower than its own.

    So a split network with overlap, or one that SSL has thinned, is loaded. Raises DecompkError on other names or
    tensors of other kinds.
    """
    out = copy.deepcopy(net)
    known = out.state_dict()
    other = sorted(known.keys() ^ state.keys())
    other = other or [n for n in known if (known[n].dim(), known[n].shape[2:]) != (state[n].dim(), state[n].shape[2:])]
    if other:
        raise DecompkError(f"these are no weights of {type(net).__name__}: '{other[0]}' is not what it has.")
    for name, value in state.items():
        _replace(out, name, value.detach().clone().to(known[name]))
    return out


def vector_axis(tensor: Tensor) -> int:
    """Along which axis one of a network's `vectors` has a value, or a kernel, for each channel."""
    return next((axis for axis, size in enumerate(tensor.shape) if size > 1), 0)


def _replace(net: nn.Module, name: str, value: Tensor) -> None:
    """Put another tensor in the place of one, and let its module say how many channels it has now."""
    path, _, last = name.rpartition(".")
    module = net.get_submodule(path)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(value, net.get_parameter(name).requires_grad)
    else:
        module._buffers[last] = value
    if isinstance(module, nn.modules.conv._ConvNd):
        if last == "weight":
            rows, columns = value.shape[:2]
            if 1 < module.groups == module.in_channels == module.out_channels:  # a kernel for each channel
                module.groups = rows
            sides = [rows, columns * module.groups][:: 1 if module.transposed else -1]
            module.in_channels, module.out_channels = sides
    elif isinstance(module, nn.Linear):
        if last == "weight":
            module.out_features, module.in_features = value.shape
    elif value.dim() == 1 and isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(value.shape)
    elif value.dim() == 1:
        for kind, attribute in COUNTS.items():
            if isinstance(module, kind):
                setattr(module, attribute, len(value))


@torch.no_grad()
def must_agree(
    net: nn.Module, other: nn.Module, nodes: Nodes, so: str = "so they cannot be put into groups, or there twice."
) -> None:
    """Raises UnsupportedOperation unless both give the same for a random input: code may count on channels' places."""
    x = trial(net, nodes)
    try:
        with in_mode(net, False), in_mode(other, False):
            expected, found = (_leaves(part(x)) for part in (net, other))
        agrees = all(agree(a, b) for a, b in zip(found, expected, strict=True))
    except MISFITS:
        agrees = False
    if not agrees:
        raise UnsupportedOperation(
            f"{type(net).__name__} computes something else when its channels are rearranged: its code counts on their "
            f"number or their places, {so}"
        )


def trial(net: nn.Module, nodes: Nodes) -> Tensor:
    """Two random samples, the same every time, where and in what `net` computes."""
    return torch.rand(2, *nodes.input_size, generator=torch.Generator().manual_seed(0)).to(next(net.parameters()))


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs differ by rounding alone."""
    return found.shape == expected.shape and bool((found - expected).abs().max() <= CLOSE * expected.abs().max())


def _leaves(output: Any) -> list[Tensor]:
    leaves: list[Tensor] = []
    tree_map(leaves.append, output)
    return leaves
