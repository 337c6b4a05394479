"""One tensor of K members as one, and back: its values, what else it carries, and its hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def stacked(tensors: Sequence[Tensor], parameter: bool) -> Tensor:
    """(K, …): a parameter or buffer of every member as one, with the first one's attributes and every one's hooks."""
    stack = torch.stack([t.detach() for t in tensors])
    if parameter:
        stack = nn.Parameter(stack, tensors[0].requires_grad)
    vars(stack).update(_attributes(tensors[0]))
    return stack


def hook(stack: Tensor, tensors: Sequence[Tensor]) -> None:
    """Have the hooks of each member's tensor act on its slice of the stack's gradient."""
    for kind in (GradientHooks, AccumulatedHooks):
        hooks = [list((getattr(t, kind.store) or {}).values()) for t in tensors]
        if any(hooks):
            getattr(stack, kind.register)(kind(hooks))


def unhook(stack: Tensor, k: int, own: Tensor) -> None:
    """Give member k's own tensor the attributes and hooks that it had before it was stacked."""
    vars(own).update(_attributes(stack))
    for kind in (GradientHooks, AccumulatedHooks):
        for hooks in (getattr(stack, kind.store) or {}).values():
            for one in hooks.hooks[k] if isinstance(hooks, kind) else ():
                getattr(own, kind.register)(one)


def _attributes(tensor: Tensor) -> dict[str, Any]:
    """What a user has set on a tensor, such as what optimizers are to do with it; compilers' notes are their own."""
    return {name: value for name, value in vars(tensor).items() if not name.startswith("_dynamo")}


def hooks_of(tensor: Tensor) -> Iterator[Callable]:
    for kind in (GradientHooks, AccumulatedHooks):
        yield from (getattr(tensor, kind.store) or {}).values()


class GradientHooks:
    """`register_hook`s of K members: each takes its member's gradient and may return another."""

    store, register = "_backward_hooks", "register_hook"

    def __init__(self, hooks: list[list[Callable]]):
        self.hooks = hooks

    def __call__(self, gradient: Tensor) -> Tensor:
        parts = list(gradient.unbind(0))
        for k, hooks in enumerate(self.hooks):
            for one in hooks:
                new = one(parts[k])
                parts[k] = parts[k] if new is None else new
        return torch.stack(parts)


class AccumulatedHooks:
    """`register_post_accumulate_grad_hook`s of K members: each takes its member's parameter, whose `.grad` is ready."""

    store, register = "_post_accumulate_grad_hooks", "register_post_accumulate_grad_hook"

    def __init__(self, hooks: list[list[Callable]]):
        self.hooks = hooks

    def __call__(self, stack: Tensor) -> None:
        dropped = 0
        for k, hooks in enumerate(self.hooks):
            own, gradient = nn.Parameter(stack.detach()[k]), stack.grad[k]
            own.grad = gradient
            for one in hooks:
                one(own)
            if own.grad is None:
                dropped += 1
                gradient.zero_()
            elif own.grad is not gradient:
                gradient.copy_(own.grad)
        if dropped == len(self.hooks):
            stack.grad = None


def laid_out(stack: Tensor, memory_format: torch.memory_format) -> Tensor:
    """(K, …) tensors with every member's slice in `memory_format`, where that format has its number of dimensions."""
    dims = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format)
    if dims is None:
        return stack.contiguous()
    if stack.dim() != 1 + dims:
        return stack
    stack = stack.movedim(2, -1).contiguous().movedim(-1, 2)
    strides = list(stack.stride())
    strides[2] = 1  # with one channel any stride fits, and torch knows the format by this one
    return stack.as_strided(stack.shape, strides)
