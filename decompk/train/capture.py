"""An optimizer that a CUDA graph can hold: what changes each step is on the device, and what else it holds shows."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ..errors import DecompkError


class Capturable:
    """`optimizer`, one of decompk.optim or of torch, made so that a graph of its step follows the learning rates.

    torch's get their rates as tensors on `device`, where schedulers and assignments reach them by `version`. Raises
    DecompkError for an optimizer that no graph can hold; it is then as it was.
    """

    def __init__(self, optimizer: Any, device: torch.device):
        for group in getattr(optimizer, "param_groups", [{}]):
            if not (isinstance(optimizer, torch.optim.SGD) or "capturable" in group or group.get("fused")):
                raise DecompkError(f"{type(optimizer).__name__} is not capturable")
        self.optimizer, self.device = optimizer, device
        self._rates: list[Tensor] = []
        self._adapt()

    def _adapt(self) -> None:
        optimizer = self.optimizer
        if "capturable" in optimizer.defaults:
            optimizer.defaults["capturable"] = True
        for group in optimizer.param_groups:
            group.update({"capturable": True} if "capturable" in group else {"fused": True, "foreach": False})
        for p, state in optimizer.state.items():
            if isinstance(step := state.get("step"), Tensor) and step.device != p.device:
                state["step"] = step.to(p.device)
        optimizer._warned_capturable_if_run_uncaptured = True  # torch's warning of the steps that precede a capture

    def version(self) -> Hashable:
        """Learning rates brought to the device; what it returns changes whenever a graph must be captured again."""
        optimizer = self.optimizer
        groups = optimizer.param_groups
        if not all(group.get("capturable", group.get("fused")) for group in groups):  # a checkpoint was loaded
            self._adapt()
        if hasattr(optimizer, "prepare"):
            return optimizer.prepare()
        self._rates += [torch.zeros((), device=self.device) for _ in groups[len(self._rates) :]]
        for group, rate in zip(groups, self._rates, strict=True):
            if group["lr"] is not rate:
                group["lr"] = rate.fill_(group["lr"])
        names = [name for name in optimizer.defaults if name != "lr"]
        stored = [p for group in groups for p in group["params"]]
        stored += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return tuple(group[name] for group in groups for name in names), tuple(map(Tensor.data_ptr, stored))
