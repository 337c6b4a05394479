"""Soft assignments of nodes to groups: p of what a layer reads, q of what it gives, tied where nodes are the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DecompkError
from .nodes import Nodes
from .regulariser import group_weights, imbalance, overlap

PARAMETRISATIONS = ("softmax", "simplex")


class Assignment(nn.Module):
    """Which group each node of the layers to split belongs to, as numbers ≥ 0 that sum to 1 over the groups.

    groups: path of a layer to split → into how many. A node's assignment is one for all layers that touch it: q of a
    layer is p of the next, and both ends of a shortcut agree. Where layers of different numbers of groups meet
    (hierarchical), the one is a multiple of the other, and groups lie inside each other: a layer of fewer groups
    branches, what each of its groups gives being dealt out to subgroups. whole_inputs: layers whose groups all read
    everything, as the first of a split behind a shared trunk. parametrisation: "softmax" of free parameters, or
    "simplex": the numbers themselves, to be trained by ReducedGradient. `spread` is how far they start from equal.
    level: (count,), out of how many groups each node has one; 0 for nodes in none.
    Raises DecompkError where a layer is unknown, reads the image, or the numbers of groups do not fit.
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
            self._give(path, found.outputs.nodes, count)
            if path in self.whole_inputs:
                continue
            if found.inputs is None:
                raise DecompkError(f"'{path}' reads the image, which all groups share: name it in whole_inputs.")
            self._give(path, found.inputs.nodes, count)
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

    def _give(self, path: str, mine: np.ndarray, count: int) -> None:
        """Nodes that a layer of `count` groups touches have as many, or more where another layer has more."""
        for level in np.unique(self.level[mine]):
            if level and max(level, count) % min(level, count):
                raise DecompkError(
                    f"'{path}' is to have {count} groups and touches nodes in {level}, through a shortcut or as the "
                    "next layer: groups lie inside each other, so give it a multiple or a divisor."
                )
        self.level[mine] = np.maximum(self.level[mine], count)

    def soft(self, level: int) -> Tensor:
        """(level, n): the assignments of all nodes in that many groups."""
        values = getattr(self, f"of_{level}")
        return values.softmax(0) if self.parametrisation == "softmax" else values

    def _of(self, nodes: np.ndarray, count: int) -> Tensor:
        """(count, len(nodes)): a coarser group's number stands for each of its subgroups, finer groups' add up."""
        rows, order = [], []
        for level in np.unique(self.level[nodes]).tolist():
            at = np.nonzero(self.level[nodes] == level)[0]
            values = self.soft(level)[:, torch.from_numpy(self._column[nodes[at]])]
            if level > count:
                values = values.unflatten(0, (count, -1)).sum(1)
            rows.append(values.repeat_interleave(count // min(level, count), 0))
            order.append(at)
        return torch.cat(rows, 1)[:, torch.from_numpy(np.argsort(np.concatenate(order)))]

    def sides(self, path: str) -> tuple[Tensor | None, Tensor]:
        """p (G, inputs), None where every group reads everything, and q (G, outputs) of a layer's weight."""
        found, count = self.nodes.sides(path), self.groups[path]
        p = None if path in self.whole_inputs else self._of(found.inputs.of_each, count)
        return p, self._of(found.outputs.nodes, count)

    def penalty(self, net: nn.Module, weights: float, disjoint: float, balance: float) -> Tensor:
        """weights · Σ R_W + disjoint · Σ overlap + balance · Σ imbalance, sums over the layers, and over p and q."""
        total = torch.zeros(())
        for path in self.groups:
            p, q = self.sides(path)
            weight = net.get_submodule(path).weight
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

    @torch.no_grad()
    def fuzzy(self, threshold: float = 0.1) -> float:
        """The share of nodes that belong to more than one group by more than `threshold`."""
        several = torch.cat([((self.soft(level) > threshold).sum(0) > 1).float() for level in self.levels])
        return several.mean().item()
