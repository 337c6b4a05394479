"""Where a network's own code turns what it computes of its samples into Python's numbers."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .nest import leaves

_TORCH = os.path.dirname(torch.__file__) + os.sep
_BATCH, _OWN = 1, 2  # what a tensor was computed of: samples; what each member has of its own
_READS = {
    *("__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "item", "is_nonzero"),
    *("equal", "allclose"),
}


@contextlib.contextmanager
def numbers(net: nn.Module, own: Sequence[bool | None]) -> Iterator[list[str]]:
    """→ the modules of `net` that make numbers of samples and of what is a member's own, as weights are.

    Such a number decides a branch, or is a factor: of all members' samples at once it would be another. own: of each
    tensor argument whether it is the member's own, or None where it is no batch. `net` is a copy, so hooks may stay.
    """
    mode = _Numbers()

    def begins(module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor, belongs in zip(tensors, own, strict=True):
            mode.mark(tensor, 0 if belongs is None else _BATCH | _OWN * belongs)

    for tensor in (*net.parameters(), *net.buffers()):
        mode.mark(tensor, _OWN)
    net.register_forward_pre_hook(begins, with_kwargs=True)
    for path, module in net.named_modules():
        module.register_forward_pre_hook(lambda m, args, path=path: mode.running.append(path))
        module.register_forward_hook(mode.ends)
    with mode:
        yield mode.found


class _Numbers(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.running: list[str] = []
        self._of: dict[int, int] = {}
        self._kept: list[Any] = []  # a storage's address tells it from others while it lives

    def ends(self, module: nn.Module, args: tuple, out: Any) -> None:
        self.running.pop()

    def mark(self, tensor: Tensor, of: int) -> None:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        self._kept.append(storage)
        self._of[storage._cdata] = self._of.get(storage._cdata, 0) | of

    def of(self, tree: Any) -> int:
        with torch._C.DisableTorchFunction():
            storages = [leaf.untyped_storage() for leaf in leaves(tree) if isinstance(leaf, Tensor)]
        return functools.reduce(operator.or_, [self._of.get(s._cdata, 0) for s in storages], 0)

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        of = self.of((args, kwargs or {}))
        name = getattr(function, "__name__", "")
        if name in _READS and of == _BATCH | _OWN and self.running and not _inside_torch(sys._getframe(1)):
            self.found.append(self.running[-1])
        for leaf in leaves(out) if of else ():
            if isinstance(leaf, Tensor):
                self.mark(leaf, of)
        return out


def _inside_torch(frame: Any) -> bool:
    return frame.f_code.co_filename.startswith(_TORCH)
