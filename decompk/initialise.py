"""Initialisers written for one network, run on each member of a packed one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .errors import PackError
from .optim import inside


@torch.no_grad()
def initialise(packed: nn.Module, function: Callable[[nn.Module], object]) -> None:
    """Call `function(member)` with each member of a packed module, an ordinary network, and keep what it writes.

    nn.init reads fans off a weight's shape, and of a stack (K, O, C, kh, kw) it takes K for the outputs: over
    `packed.modules()` or `packed.apply` the numbers are wrong. So: `initialise(packed, lambda net: net.apply(init))`.
    Members come one after the other, each with random numbers of its own. Raises PackError where a member's tensors
    have other names or shapes afterwards; then nothing has changed.
    """
    packed = inside(packed)
    members, stacks = packed.unpack(), _tensors(packed)
    for k, member in enumerate(members):
        function(member)
        own = _tensors(member)
        shapes = {name: (len(members), *t.shape) for name, t in own.items()}
        for name in stacks.keys() | own.keys():
            if name not in stacks or stacks[name].shape != shapes.get(name):
                raise PackError(
                    f"'{name}' of member {k} is no slice of the packed module's: initialise its members alone."
                )
    for k, member in enumerate(members):
        for name, t in _tensors(member).items():
            stacks[name][k].copy_(t)


def _tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach() for name, t in (*net.named_parameters(), *net.named_buffers())}
