"""Stage two: assignments made hard, channels of a group side by side, and no weights between groups."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..divide.blockdiag import ZeroSkipping, layer_by_layer
from ..errors import DecompkError
from .assignment import Assignment
from .rearrange import Copies, grouped, must_agree, rearranged


@dataclass(frozen=True, eq=False)
class Split:
    """A split network.

    dense: the network with zeros between groups, its classes and names. masks: name of a weight → which of its entries
    lie inside a group, for fine-tuning it as it is. copies: the nodes of `dense`, with their groups; along: layer path
    → which of them lie along its outputs and, None for the image, its inputs. assignment: what it was split by.
    """

    dense: nn.Module
    masks: dict[str, Tensor]
    copies: Copies
    along: dict[str, tuple[np.ndarray, np.ndarray | None]]
    assignment: Assignment
    _masked: set[int] = field(default_factory=set, repr=False)  # ids of the weights whose gradients are masked

    @property
    def kept(self) -> float:
        """The share of the split layers' weights that is left."""
        return sum(int(m.sum()) for m in self.masks.values()) / sum(m.numel() for m in self.masks.values())

    def fast(self) -> ZeroSkipping:
        """`dense` without its zeros, sharing its parameters: layers skip blocks as `decompk.block_diagonal`'s do.

        It trains on with the zeros kept: those that fill no block worth skipping around by masks of the gradients,
        which hang on the parameters of `dense`, and which a deepcopy of it has not.
        """
        known = dict(self.dense.named_parameters())
        new = {name: mask for name, mask in self.masks.items() if id(known[name]) not in self._masked}
        self._masked.update(keep_zeros(self.dense, new))
        return layer_by_layer(self.dense, "its groups are learned", self.masks)


def keep_zeros(net: nn.Module, masks: dict[str, Tensor]) -> set[int]:
    """From now on the gradients of the weights that `masks` names are zero outside: so are the weights' steps.

    Returns the ids of those weights; frozen ones are left out.
    """
    known, found = dict(net.named_parameters()), set()
    for name, mask in masks.items():
        weight = known[name]
        if weight.requires_grad:
            found.add(id(weight))
            if not bool(mask.all()):
                weight.register_hook(_Inside(mask.clone()))
    return found


@dataclass
class _Inside:
    """A gradient without what is outside of `mask`, on whatever device it is."""

    mask: Tensor

    def __call__(self, grad: Tensor) -> Tensor:
        self.mask = self.mask.to(grad.device)
        return grad * self.mask


def split(net: nn.Module, assignment: Assignment, overlap: float | None = None, even: bool = False) -> Split:
    """`net` split by its learned `assignment`; `net` itself is not changed.

    Every node goes to the group it belongs to most; nodes inside the network are put in the order of their groups,
    which changes nothing but rounding; then every weight between different groups becomes zero. even: groups of equal
    size, which run as one grouped operation, a few nodes going to their second choice. overlap: nodes that belong to
    several groups by more than this (the supplement has 0.1) are duplicated, one for each, with all that leads to them
    in that group; where nothing that leads to them is split all copies would be alike, and several groups read the one;
    a class of several groups is the sum of what they say of it. Raises UnsupportedOperation where the network's code
    counts on its channels' places, DecompkError where nothing of a layer would be left.
    """
    if overlap is not None and not 0 < overlap < 0.5:
        raise DecompkError(f"an overlap of {overlap} is no share of a node between 0 and 0.5: the supplement's is 0.1.")
    if overlap is not None and even:
        raise DecompkError("groups with overlap are not of equal size: leave out overlap or even.")
    nodes = assignment.nodes
    copies = grouped(nodes, assignment.members(overlap, even), _given_whole(assignment))
    moved = rearranged(net, nodes, copies)
    must_agree(net, moved.net, nodes)
    levels, masks = assignment.level[copies.node], {}
    for path, count in assignment.groups.items():
        weight = moved.net.get_parameter(f"{path}.weight")
        mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        if path not in assignment.whole_inputs:
            rows, columns = moved.copies[path]
            sides = [assignment.coarser(copies.groups[side], levels[side], count) for side in (rows, columns)]
            inside = sides[0] @ sides[1].T  # both have a group in common
            if not inside.any():
                raise DecompkError(
                    f"all inputs of '{path}' are in other groups than its outputs, and nothing of it would be left: "
                    "learn more slowly, or raise the weight of balance."
                )
            mask = torch.from_numpy(inside).to(weight.device).view(*inside.shape, *(1,) * (weight.dim() - 2))
            shares = _shares(inside, moved.sources[f"{path}.weight"][1].numpy().reshape(-1))
            with torch.no_grad():
                weight.mul_(mask if shares is None else torch.from_numpy(shares).to(weight).view(mask.shape))
        masks[f"{path}.weight"] = mask.expand_as(weight)
    return Split(moved.net, masks, copies, moved.copies, assignment)


def _given_whole(assignment: Assignment) -> np.ndarray:
    """(count,) of bool: the nodes that no layer gives that is split on the side of its inputs."""
    found = np.ones(assignment.nodes.count, dtype=bool)
    for path in assignment.groups.keys() - assignment.whole_inputs:
        found[assignment.nodes.sides(path).outputs.nodes] = False
    return found


def _shares(inside: np.ndarray, old: np.ndarray) -> np.ndarray | None:
    """By what to multiply weights that read 1/n of each of n copies, now that a row reads those `inside` its groups.

    inside: (O, I) of bool. old: (I,), of which column each is a copy. None where there are no copies.
    """
    order = np.argsort(old, kind="stable")
    _, starts, inverse, count = np.unique(old[order], return_index=True, return_inverse=True, return_counts=True)
    if count.max() == 1:
        return None
    read = np.add.reduceat(inside[:, order].astype(int), starts, axis=1)
    back = np.empty_like(order)
    back[order] = inverse.reshape(-1)
    return inside * (count / np.maximum(read, 1))[:, back]
