"""Soft assignments of nodes to groups: p of what a layer reads, q of what it gives, tied where nodes are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DecompkError
from .nodes import Nodes
from .regulariser import group_weights, imbalance, overlap

PARAMETRISATIONS = ("softmax", "simplex")
FUZZY = 0.1  # a node that belongs to several groups by more than this has none of its own


class Assignment(nn.Module):
    """Which group each node of the layers to split belongs to, as numbers ≥ 0 that sum to 1 over the groups.

    groups: path of a layer to split → into how many. A node's assignment is one for all layers that touch it: q of a
    layer is p of the next, and both ends of a shortcut agree. Where layers of different numbers of groups meet
    (hierarchical), groups lie inside each other, as evenly as the numbers allow: a layer of fewer groups branches, what
    each of its groups gives being dealt out to subgroups. whole_inputs: layers whose groups all read everything, as the
    first of a split behind a shared trunk. parametrisation: "softmax" of free parameters, or "simplex": the numbers
    themselves, to be trained by ReducedGradient. `spread` is how far they start from equal. level: (count,), out of how
    many groups each node has one; 0 for nodes in none. Raises DecompkError where a layer is unknown, transposed, reads
    the image or has fewer channels than groups.
    """

    def __init__(
        self,
        nodes: Nodes,
        groups: Mapping[str, int],
        whole_inputs: Collection[str] = (),
        parametrisation: str = "softmax",
        seed: int = 0,
        spread: float = 0.01,
    ):
        super().__init__()
        if parametrisation not in PARAMETRISATIONS:
            raise DecompkError(f"parametrisation {parametrisation!r} is unknown; choose one of {PARAMETRISATIONS}.")
        if not groups or min(groups.values()) < 2:
            raise DecompkError("give the layers to split, each with two groups or more.")
        for path in whole_inputs:
            if path not in groups:
                raise DecompkError(f"whole_inputs names '{path}', which is not to be split.")
        self.nodes, self.groups, self.parametrisation = nodes, dict(groups), parametrisation
        self.whole_inputs = frozenset(whole_inputs)
        self.level = np.zeros(nodes.count, dtype=int)
        for path, count in groups.items():
            found = nodes.sides(path)
            if path in nodes.transposed:
                raise DecompkError(f"'{path}' is a transposed convolution: split the layers before and behind it.")
            if found.inputs is None and path not in self.whole_inputs:
                raise DecompkError(f"'{path}' reads the image, which all groups share: name it in whole_inputs.")
            for side in (found.outputs, None if path in self.whole_inputs else found.inputs):
                if side is not None and len(side.nodes) < count:
                    raise DecompkError(f"'{path}' cannot have {count} groups: of one side there are {len(side.nodes)}.")
                if side is not None:
                    self.level[side.nodes] = np.maximum(self.level[side.nodes], count)
        self._column = np.zeros(nodes.count, dtype=int)
        generator = torch.Generator().manual_seed(seed)
        self.levels = sorted(set(self.level[self.level > 0].tolist()))
        for level in self.levels:
            mine = self.level == level
            self._column[mine] = np.arange(mine.sum())
            values = spread * torch.randn(level, int(mine.sum()), generator=generator)
            if parametrisation == "simplex":
                values = values.softmax(0)
            self.register_parameter(f"of_{level}", nn.Parameter(values))
            self.register_buffer(f"still_{level}", torch.zeros(values.shape[1], dtype=torch.bool))  # frozen columns
            self.register_buffer(f"held_{level}", torch.zeros_like(values))  # and at what they stand still

    def soft(self, level: int) -> Tensor:
        """(level, n): the assignments of all nodes in that many groups."""
        values = getattr(self, f"of_{level}")
        return values.softmax(0) if self.parametrisation == "softmax" else values

    def parents(self, level: int, count: int) -> np.ndarray:
        """(level,): in which of `count` groups each of `level` lies, by way of the numbers of groups in between."""
        found, known = np.arange(level), sorted(set(self.groups.values()))
        steps = [n for n in reversed(known) if count <= n < level]
        for fine, coarse in zip([level, *steps], steps, strict=False):
            if known.index(coarse) % 2 == 0:
                found = found * coarse // fine
            else:  # the larger ones at the other end, so that they do not add up in one branch
                found = coarse - 1 - (fine - 1 - found) * coarse // fine
        return found

    def sets(self) -> Iterator[tuple[int, np.ndarray]]:
        """Out of how many groups they are, and which: the nodes that share all their axes."""
        kinds = np.stack([self.nodes.kinds, self.level], 1)
        for kind, level in np.unique(kinds[self.level > 0], axis=0).tolist():
            yield level, np.nonzero((kinds == (kind, level)).all(1))[0]

    def coarser(self, groups: np.ndarray, levels: np.ndarray, count: int) -> np.ndarray:
        """(n, G) of bool, the groups of nodes out of levels[i] → (n, count): those that the groups of theirs lie in."""
        found = np.zeros((len(groups), count), dtype=bool)
        for level in np.unique(levels).tolist():
            mine = levels == level
            for group, parent in enumerate(self.parents(level, count)):
                found[mine, parent] |= groups[mine, group]
        return found

    def _of(self, nodes: np.ndarray, count: int) -> Tensor:
        """(count, len(nodes)): the numbers of finer groups inside a group add up."""
        rows, order = [], []
        for level in np.unique(self.level[nodes]).tolist():
            at = np.nonzero(self.level[nodes] == level)[0]
            values = self.soft(level)[:, torch.from_numpy(self._column[nodes[at]])]
            parents = torch.from_numpy(self.parents(level, count)).to(values.device)
            rows.append(values if level == count else values.new_zeros(count, len(at)).index_add(0, parents, values))
            order.append(at)
        return torch.cat(rows, 1)[:, torch.from_numpy(np.argsort(np.concatenate(order)))]

    def sides(self, path: str) -> tuple[Tensor | None, Tensor]:
        """p (G, inputs), None where every group reads everything, and q (G, outputs) of a layer's weight."""
        found, count = self.nodes.sides(path), self.groups[path]
        inputs: Any = found.inputs  # None of the image, which no group divides
        p = None if path in self.whole_inputs else self._of(inputs.of_each, count)
        return p, self._of(found.outputs.nodes, count)

    def penalty(self, net: nn.Module, weights: float, disjoint: float, balance: float) -> Tensor:
        """weights · Σ R_W + disjoint · Σ overlap + balance · Σ imbalance, sums over the layers, and over p and q."""
        total = torch.zeros(())
        for path in self.groups:
            p, q = self.sides(path)
            weight = net.get_parameter(f"{path}.weight")
            if p is not None:
                total = total + weights * group_weights(weight, p, q)
                total = total + disjoint * overlap(p) + balance * imbalance(p)
            total = total + disjoint * overlap(q) + balance * imbalance(q)
        return total

    @torch.no_grad()
    def put(self, level: int, nodes: np.ndarray, owner: np.ndarray) -> None:
        """Make the assignments of `nodes`, which have `level` groups, hard: node nodes[i] to group owner[i]."""
        values = torch.nn.functional.one_hot(torch.from_numpy(owner), level).T.float()
        if self.parametrisation == "softmax":
            values = 50 * values  # e⁻⁵⁰ is left for the others
        whole = getattr(self, f"of_{level}")
        whole[:, torch.from_numpy(self._column[nodes])] = values.to(whole.device)

    @torch.no_grad()
    def hard(self) -> np.ndarray:
        """(count,): the group that each node belongs to most, out of as many as `level` says; −1 for nodes in none."""
        owner = np.full(self.nodes.count, -1)
        for level in self.levels:
            mine = self.level == level
            owner[mine] = self.soft(level).argmax(0).cpu().numpy()[self._column[mine]]
        return owner

    def _even(self) -> np.ndarray:
        """`hard`, but of the nodes that share all their axes each group gets as many, or one more."""
        owner, more = self.hard(), Counter[int]()
        for level, mine in self.sets():
            values = self.soft(level).cpu().numpy()[:, self._column[mine]]
            room = len(mine) // level + ((np.arange(level) - more[level]) % level < len(mine) % level)
            more[level] += len(mine) % level  # the next nodes that do not divide begin where these ended
            placed = np.zeros(len(mine), dtype=bool)
            for flat in np.argsort(-values, axis=None, kind="stable"):
                group, i = divmod(int(flat), len(mine))
                if room[group] and not placed[i]:
                    owner[mine[i]], placed[i] = group, True
                    room[group] -= 1
        return owner

    @torch.no_grad()
    def members(self, overlap: float | None = None, even: bool = False) -> np.ndarray:
        """(count, most groups) of bool: the group of each node, or all to which it belongs by more than `overlap`.

        Pinned nodes have one. even: groups of equal size on every axis, the largest numbers being served first.
        """
        found = np.zeros((self.nodes.count, max(self.levels)), dtype=bool)
        owner = self._even() if even else self.hard()
        mine = owner >= 0
        found[mine, owner[mine]] = True
        if overlap is None:
            return found
        for level in self.levels:
            at = np.setdiff1d(np.nonzero(self.level == level)[0], self.nodes.pinned)
            found[at, :level] |= (self.soft(level) > overlap).T.cpu().numpy()[self._column[at]]
        return found

    @torch.no_grad()
    def fuzzy(self, threshold: float = FUZZY) -> float:
        """The share of nodes that belong to more than one group by more than `threshold`."""
        return torch.cat([self._several(level, threshold) for level in self.levels]).float().mean().item()

    def _several(self, level: int, threshold: float = FUZZY) -> Tensor:
        """(n,) of bool: which of the nodes in that many groups belong to more than one."""
        return (self.soft(level) > threshold).sum(0) > 1

    @torch.no_grad()
    def values(self) -> np.ndarray:
        """All numbers of all assignments, one after the other, on the CPU."""
        return torch.cat([self.soft(level).reshape(-1) for level in self.levels]).cpu().numpy()

    @torch.no_grad()
    def freeze(self, share: float) -> None:
        """From now on `hold` keeps the assignments of each layer's inputs, or outputs, with fewer fuzzy nodes."""
        fuzzy = np.zeros(self.nodes.count, dtype=bool)
        for level in self.levels:
            at = np.nonzero(self.level == level)[0]
            fuzzy[at] = self._several(level).cpu().numpy()[self._column[at]]
        for path in self.groups:
            found = self.nodes.sides(path)
            for side in (found.outputs, found.inputs):
                if side is not None and self.level[side.nodes].all() and fuzzy[side.nodes].mean() < share:
                    self._freeze(side.nodes)

    def _freeze(self, nodes: np.ndarray) -> None:
        for level in np.unique(self.level[nodes]).tolist():
            still, held, values = (getattr(self, f"{what}_{level}") for what in ("still", "held", "of"))
            new = torch.zeros_like(still)
            new[torch.from_numpy(self._column[nodes[self.level[nodes] == level]])] = True
            held.copy_(torch.where(new & ~still, values, held))
            still |= new

    @torch.no_grad()
    def hold(self) -> None:
        """Put frozen assignments back to what they were when they froze."""
        for level in self.levels:
            values = getattr(self, f"of_{level}")
            values.copy_(torch.where(getattr(self, f"still_{level}"), getattr(self, f"held_{level}"), values))
