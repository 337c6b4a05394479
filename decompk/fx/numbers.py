"""Where a network's own code turns what it computes, or draws, into Python's numbers, or chooses rows by it."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import os
import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .forward_code import is_users
from .pytree import leaves

_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_NOT_USERS = tuple(
    os.path.join(place, "")
    for place in (os.path.dirname(torch.__file__), os.path.join(_PACKAGE, "fx"), os.path.join(_PACKAGE, "packed"))
)
_BATCH, _OWN, _DRAWN = 1, 2, 4  # what a tensor was computed of: samples; what each member has of its own; chance
_READS = {
    *("__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "item", "is_nonzero"),
    *("equal", "allclose"),
}
_LISTS = {"numpy", "tolist", "__array__"}
_CHOICES = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"}
_WRITES = {
    *("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"),
    *("__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
}
_DRAWS = {
    *("rand", "randn", "randint", "normal", "bernoulli", "poisson", "multinomial", "rand_like", "randn_like"),
    *("randint_like", "uniform_", "normal_", "bernoulli_", "random_", "exponential_", "geometric_", "cauchy_"),
    *("log_normal_", "_standard_gamma", "_sample_dirichlet"),
}
NUMBERS, CHOICES, DRAWS, WRITES = (
    "its code makes numbers of all its samples",
    "its code chooses rows by their values",
    "its code draws one number for all its samples",
    "its code changes a parameter of its own",
)


class Numbers(TorchFunctionMode):
    """What a network's own code does in one run.

    found: (path, why) of modules whose code does with values what is another thing for the samples of all members.
    shared: (path, value) of scalars that are made of what all members share alone, of which some number is made if
    reads_shared: they may be others for the samples of all at once.
    """

    def __init__(self, count: int, apart: Collection[str]):
        """count: samples of the run. apart: paths of modules that run member by member, whose code may do anything."""
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.shared: list[tuple[str, Any]] = []
        self.reads_shared = False
        self._count, self._apart = count, apart
        self._running: list[str] = []
        self._of: dict[int, int] = {}
        self._owned: set[int] = set()  # storages of parameters that a user's own code reads
        self._kept: list[Any] = []  # a storage's address tells it from others while it lives
        self._random = _random_states()

    @contextlib.contextmanager
    def watch(self, net: nn.Module, own: Sequence[bool | None]) -> Iterator[None]:
        """own: of each tensor argument whether it is the member's own, or None where it is no batch.

        `net` is a copy, so hooks may stay.
        """

        def begins(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            for tensor, belongs in zip(tensors, own, strict=True):
                self._mark(tensor, 0 if belongs is None else _BATCH | _OWN * belongs)

        for tensor in (*net.parameters(), *net.buffers()):
            self._mark(tensor, _OWN)
        for module in net.modules():
            for parameter in module._parameters.values() if is_users(type(module)) else ():
                if parameter is not None:
                    self._mark(parameter, _BATCH | _OWN)
                    self._owned.add(parameter.untyped_storage()._cdata)
        net.register_forward_pre_hook(begins, with_kwargs=True)
        for path, module in net.named_modules():
            module.register_forward_pre_hook(lambda m, args, path=path: self._enter(path))
            module.register_forward_hook(lambda m, args, out: self._leave())
        self._random = _random_states()
        with self:
            yield

    def _enter(self, path: str) -> None:
        self._note_draws()
        self._running.append(path)

    def _leave(self) -> None:
        self._note_draws()
        self._running.pop()

    def _note_draws(self) -> None:
        states = _random_states()
        if states != self._random and self._running:
            self._add(DRAWS)
        self._random = states

    def _add(self, reason: str) -> None:
        path = self._running[-1]
        if not any(path == p or path.startswith(f"{p}." if p else "") for p in self._apart):
            self.found.append((path, reason))

    def _mark(self, tensor: Tensor, of: int) -> None:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        self._kept.append(storage)
        self._of[storage._cdata] = self._of.get(storage._cdata, 0) | of

    def _made_of(self, tree: Any) -> int:
        with torch._C.DisableTorchFunction():
            storages = [leaf.untyped_storage() for leaf in leaves(tree) if isinstance(leaf, Tensor)]
        return functools.reduce(operator.or_, [self._of.get(s._cdata, 0) for s in storages], 0)

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        of = self._made_of((args, kwargs)) | _DRAWN * (name in _DRAWS)
        reads = len(self._running) > 0 and not sys._getframe(1).f_code.co_filename.startswith(_NOT_USERS)
        if reads and name in _LISTS and (args[0].dim() == 0 or args[0].shape[0] % self._count):
            name = "item"
        if reads and of & _BATCH and of & _OWN and self._chooses(name, args):
            self._add(CHOICES)
        if reads and args and isinstance(args[0], Tensor) and _writes(name):
            with torch._C.DisableTorchFunction():
                if args[0].untyped_storage()._cdata in self._owned:
                    self._add(WRITES)
        out = function(*args, **kwargs)
        if reads and name in _READS:
            if of & _DRAWN:
                self._add(DRAWS)
            elif of == _BATCH | _OWN:
                self._add(NUMBERS)
            elif of == _BATCH:
                self.reads_shared = True
        for leaf in leaves(out) if of else ():
            if isinstance(leaf, Tensor):
                self._mark(leaf, of)
                if reads and of == _BATCH and leaf.dim() == 0:
                    with torch._C.DisableTorchFunction():
                        self.shared.append((self._running[-1], leaf.item()))
        return out

    @staticmethod
    def _chooses(name: str, args: tuple) -> bool:
        if name == "where":
            return len(args) == 1
        if name == "__getitem__":
            return any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in leaves(args[1]))
        return name in _CHOICES


def _writes(name: str) -> bool:
    """Whether a method of this name changes its tensor."""
    return name in _WRITES or (name.endswith("_") and not name.endswith("__"))


def other_numbers(alone: Numbers, together: Numbers) -> list[tuple[str, str]]:
    """(path, why) where scalars made of what all members share alone are others for the samples of all at once."""
    for (path, one), (_, other) in zip(alone.shared, together.shared, strict=False):
        if not math.isclose(one, other, rel_tol=1e-3):
            return [(path, NUMBERS)]
    if len(alone.shared) != len(together.shared):
        return [(alone.shared[-1][0], NUMBERS)]
    return []


def _random_states() -> tuple:
    """Of Python's and NumPy's random numbers, which a network's own code draws from."""
    kind, keys, position, *_ = np.random.get_state()  # noqa: NPY002
    return random.getstate(), kind, keys.tobytes(), position
