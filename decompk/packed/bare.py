"""Parameters that a user's own module reads, such as a ViT's positions: packed, a row of them for every sample."""

from __future__ import annotations

import copyreg
import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .twin import batch_rows

_DECIDED = ("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__deepcopy__")
_last_rows: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


class Bare:
    """Mixin of a user's module whose own parameters, (1, …) each, are stacks (K, 1, …).

    Its code adds them to samples, or puts them beside these: where a packed batch is under way it reads (K·N, …), each
    member's for its own rows. What it does with them otherwise, a rehearsal tells from a member alone.
    """

    _bare_class: type[nn.Module]
    _bare_rows = 0  # of the batch that is compiled, where no context is seen


def is_bare(module: nn.Module) -> bool:
    """Whether a module around others owns parameters alone, each of one row, which all samples may share."""
    own = [p for p in module._parameters.values() if p is not None]
    kind = type(module)
    copies = any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in _DECIDED)
    if copies or type(kind) is not type or any("__init_subclass__" in vars(klass) for klass in kind.__mro__[:-1]):
        return False  # whoever wrote it decides what a subclass is, or a copy
    buffers = any(b is not None for b in module._buffers.values())
    inside = any(child is not None for child in module._modules.values())
    return len(own) > 0 and inside and not buffers and all(p.dim() > 1 and p.shape[0] == 1 for p in own)


def adopt(module: nn.Module) -> None:
    """Have a module that already holds stacks read their rows, in place."""
    names = tuple(name for name, p in module._parameters.items() if p is not None)
    module.__class__ = _kind(type(module), names)


def compiled_batch(net: nn.Module, rows: int) -> None:
    """Tell those inside `net` how many rows a batch has that is being compiled."""
    for module in net.modules():
        if isinstance(module, Bare):
            module._bare_rows = rows


def release(module: nn.Module) -> None:
    """Turn a module that already holds one member's parameters back into what it was, in place."""
    if isinstance(module, Bare):
        vars(module).pop("_bare_rows", None)
        module.__class__ = module._bare_class


@functools.cache
def _kind(klass: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class in whose place a subclass of it reads rows of the parameters of these names."""
    scope: dict[str, Any] = {name: property(functools.partial(_rows, name)) for name in names}
    scope.update(_bare_class=klass, __module__=klass.__module__, __doc__=klass.__doc__)
    kind = type(klass)(klass.__name__, (Bare, klass), scope)
    copyreg.pickle(kind, functools.partial(_reduced, klass, names))  # type: ignore[arg-type]
    return kind


def _rows(name: str, module: Any) -> Tensor:
    """(K·N, …) where a packed batch is under way, else the stack (K, 1, …)."""
    stack = module._parameters[name]
    if torch.compiler.is_compiling():
        rows = module._bare_rows
    elif rows := batch_rows.get():
        _last_rows[module] = rows
    elif torch._C._current_graph_task_id() != -1:  # a checkpoint computes again in a backward
        rows = _last_rows.get(module, 0)
    if not rows:
        return stack
    K = stack.shape[0]
    return stack.expand(K, rows // K, *stack.shape[2:]).flatten(0, 1)


def _reduced(klass: type[nn.Module], names: tuple[str, ...], module: nn.Module) -> tuple:
    return _new, (klass, names), vars(module)


def _new(klass: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    kind = _kind(klass, names)
    return kind.__new__(kind)
