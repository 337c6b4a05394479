"""SSL, the supplement's baseline (Wen et al., 2016): filters driven to zero by their ℓ2,1 norm, then taken out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..divide.compose import output_axis, tensors
from ..errors import DecompkError
from .nodes import Nodes
from .rearrange import grouped, must_agree, rearranged, vector_axis


class Filters:
    """The filters that give each node its value, as one vector a node.

    A node that a shortcut ties to others is one with them, since only all of their filters together can be taken out.
    What the network returns, and what something mixes by its number, stays.
    """

    def __init__(self, net: nn.Module, nodes: Nodes):
        known, device = tensors(net), next(net.parameters()).device

        def held(name: str, axis: int, ids: np.ndarray) -> tuple[Tensor, int, Tensor]:
            return known[name], axis, torch.from_numpy(ids).to(device)

        outputs = {f"{path}.weight": sides.outputs.nodes for path, sides in nodes.layers.items()}
        self._filters = [held(name, output_axis(net, name), ids) for name, ids in outputs.items()]
        self._others = [  # biases, scales and shifts of norms
            held(name, vector_axis(known[name]), ids)
            for name, ids in nodes.vectors.items()
            if isinstance(known[name], nn.Parameter)
        ]
        self._free = torch.ones(nodes.count, dtype=torch.bool, device=device)
        self._free[torch.from_numpy(np.concatenate([nodes.outer, nodes.pinned]))] = False
        self.gone = torch.zeros_like(self._free)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """(count,): ‖·‖₂ of each node's filters."""
        total = torch.zeros(len(self._free), dtype=torch.float64, device=self._free.device)
        for p, axis, ids in self._filters:
            total.index_add_(0, ids, p.movedim(axis, 0).flatten(1).square().sum(1).double())
        return total.sqrt()

    @torch.no_grad()
    def shrink(self, amount: float) -> None:
        """The proximal step of amount · Σ ‖·‖₂. Filters that reach 0 stay there, with their biases and norms."""
        factor = torch.where(self._free, (1 - amount / self.norms().clamp_min(1e-30)).clamp_min(0), 1)
        self.gone |= factor == 0
        factor[self.gone] = 0
        for held, by in ((self._filters, factor), (self._others, (~self.gone).double())):
            for p, axis, ids in held:
                p.mul_(by[ids].to(p.dtype).view([-1 if a == axis else 1 for a in range(p.dim())]))


class Sparsifier:
    """Trains `net` for loss + strength · Σ ‖filters of a node‖₂, a batch a step, over `steps` steps.

    By SGD with momentum 0.9 and a step that falls to 0, and by proximal steps of the norms, which give exact zeros.
    Behind a batch norm the loss does not feel how long a filter is: what keeps filters from 0 is how far the loss's
    gradient turns them, which SGD's steps show and Adam's, all of one length, do not.
    """

    def __init__(
        self,
        net: nn.Module,
        nodes: Nodes,
        loss: Callable[[Tensor, Tensor], Tensor],
        strength: float,
        steps: int,
        lr: float = 0.1,
    ):
        if strength <= 0:
            raise DecompkError(f"a strength of {strength} drives no filter to zero: give a positive number.")
        if steps < 1:
            raise DecompkError(f"{steps} steps drive no filter to zero: give one or more.")
        self.net, self.loss, self.strength, self.total, self.lr = net, loss, strength, steps, lr
        self.filters, self.steps = Filters(net, nodes), 0
        self.optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9)

    def step(self, x: Tensor, target: Tensor) -> None:
        """One step; from the last one on nothing moves."""
        rate = self.lr * max(0.0, 1 - self.steps / self.total)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        self.loss(self.net(x), target).backward()
        self.optimizer.step()
        self.filters.shrink(rate * self.strength)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """All that a step depends on, tensors and plain values."""
        parts = [self.net.state_dict(), self.optimizer.state_dict()]
        return {"parts": parts, "gone": self.filters.gone, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What state_dict gave, for a network of the same shapes."""
        parts: tuple[Any, ...] = (self.net, self.optimizer)
        for part, theirs in zip(parts, state["parts"], strict=True):
            part.load_state_dict(theirs)
        self.filters.gone.copy_(state["gone"])
        self.steps = state["steps"]


def without(net: nn.Module, nodes: Nodes, gone: Tensor) -> nn.Module:
    """`net` without the nodes that are `gone`, (count,) of bool, whose filters, biases and norms are zero.

    One node stays of every layer. Raises UnsupportedOperation where that changes what the network computes.
    """
    keep = ~gone.cpu().numpy()
    for sides in nodes.layers.values():
        for side in (sides.outputs, sides.inputs):
            if side is not None and not keep[side.nodes].any():
                keep[side.nodes[0]] = True
    out = rearranged(net, nodes, grouped(nodes, np.zeros((nodes.count, 1), dtype=bool), keep=keep)).net
    must_agree(net, out, nodes, "so they cannot be taken out; an activation that is not 0 at 0 does that, too.")
    return out
