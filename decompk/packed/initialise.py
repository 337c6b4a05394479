"""Initialisers written for one network, run on each member of a packed one."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from ..errors import PackError, brief, name_of
from ..optim import inside


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
        _run(function, member)
        own = _tensors(member)
        shapes = {name: (len(members), *t.shape) for name, t in own.items()}
        for name in stacks.keys() | own.keys():
            if name not in stacks or stacks[name].shape != shapes.get(name):
                raise PackError(
                    f"'{name}' of member {k} is no slice of the packed module's: initialise its members alone."
                )
    written = False
    for k, member in enumerate(members):
        for name, t in _tensors(member).items():
            written = written or not torch.equal(stacks[name][k], t)
            stacks[name][k].copy_(t)
    name = name_of(function)
    if not written and name != "<lambda>":  # it looks for layers, and got the network around them
        warnings.warn(
            f"'{name}' has changed nothing in any member, a network: if it takes a layer, write "
            f"lambda net: net.apply({name}).",
            stacklevel=3,
        )


def _run(function: Callable[[nn.Module], object], member: nn.Module) -> None:
    name = name_of(function)
    try:
        function(member)
    except (AttributeError, TypeError) as error:
        if name == "<lambda>":  # it was written for a member: what it says is its own
            raise
        raise PackError(
            f"'{name}' does not take a member, which is a network ({brief(error)}): give it what it takes, as in "
            f"lambda net: [{name}(p) for p in net.parameters() if p.dim() > 1]."
        ) from error


def _tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach() for name, t in (*net.named_parameters(), *net.named_buffers())}
