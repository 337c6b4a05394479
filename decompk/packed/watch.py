"""Copies of a network that run unseen: without the user's hooks, and with some that note what happens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..fx.pytree import tensors_of
from .per_member import PerMember
from .surgery import without_insides
from .twin import HOOKS, Twin

Watch = Callable[[nn.Module], contextlib.AbstractContextManager] | None


class Narrowest(TorchDispatchMode):
    """Notes the epsilon of the narrowest dtype that tensors are computed in."""

    eps = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        narrow = [torch.finfo(t.dtype).eps for t in tensors_of(out) if t.is_floating_point() or t.is_complex()]
        self.eps = max([self.eps, *narrow])
        return out


def drop_hooks(net: nn.Module) -> None:
    """Drop the user's hooks of a copy, which may keep what they see; torch's own make weights."""
    insides = [
        m for shell in net.modules() if isinstance(shell, PerMember) for own in shell._members for m in own.modules()
    ]
    for module in (*net.modules(), *insides):
        for hooks in (getattr(module, name) for name in HOOKS):
            for key in [k for k, hook in hooks.items() if _home(hook) != "torch"]:
                del hooks[key]


def _home(hook: Any) -> str:
    return str(getattr(hook, "__module__", type(hook).__module__)).partition(".")[0]


@contextlib.contextmanager
def noting(net: nn.Module, order: list[str]) -> Iterator[None]:
    """Note the layers that lay out images as they run; the network is a copy, so hooks may stay."""
    for module in without_insides(net):
        if isinstance(module, Twin) and module._twin_dims == 4:
            module.register_forward_hook(lambda twin, args, out: order.append(twin._twin_path))
    yield


@contextlib.contextmanager
def recording(net: nn.Module, events: list[tuple[str, bool, Any]]) -> Iterator[None]:
    """Record (path, whether it is entered or left, the first tensor) of every module, in order."""

    def first(tree: Any) -> Any:
        tensor = next(iter(tensors_of(tree)), None)
        return None if tensor is None else tensor.clone()

    for path, module in net.named_modules():
        module.register_forward_pre_hook(
            lambda m, args, kwargs, path=path: events.append((path, True, first((args, kwargs)))), with_kwargs=True
        )
        module.register_forward_hook(lambda m, args, out, path=path: events.append((path, False, first(out))))
    yield
