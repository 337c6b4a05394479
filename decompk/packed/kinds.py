"""Which calls of a packed module are of one kind, and so run as the first of them was found to run."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..fx.forward_code import attributes, is_plain_object
from ..fx.pytree import leaves
from ..fx.wrapper import Shell
from ..kernels.call import watched
from .norm_then import Then
from .per_member import of_torch
from .surgery import without_insides
from .twin import Twin

_NUMBERS = frozenset(range(-1, 17))  # that may decide which way code goes, and are few enough to rehearse each
_REHEARSED, _REST = 4, 64  # so many others in one place are rehearsed, too, and one more after so many calls


def kind_of(args: tuple, kwargs: dict[str, Any], K: int, N: int) -> Iterator[Any]:
    """What calls of one kind have in common: names, plain values, and which sizes of tensors are K or N."""
    yield len(args), *kwargs
    for leaf in leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            yield leaf.dim(), leaf.shape[:1] == (K,), *(size == N for size in leaf.shape[:3])
        else:
            yield leaf if _is_one_of_few(leaf) else type(leaf)


class Kinds:
    """What tells calls of one kind apart by values: modes, flags and numbers, those that a network holds and arguments.

    switches: what of the network is watched, see `switches_of`.
    """

    def __init__(self, switches: list[tuple[Any, list]]):
        self.switches = switches
        self._values: tuple[list, tuple[Hashable, ...]] = ([], ())
        self._seen: dict[Hashable, dict[Any, int]] = {}
        self._calls = 0

    def in_full(self, kind: tuple, N: int, args: tuple, kwargs: dict[str, Any] | None) -> tuple:
        """The kind of a call, its numbers and how many samples it has."""
        numbers = () if kwargs is None or watched() else self._numbers_of(args, kwargs)
        return kind, (*self.switched(), *numbers), self._number(N, "samples")

    def switched(self) -> tuple[Hashable, ...]:
        """What decides, beside arguments, which way the network's own code goes: modes, flags and numbers it holds."""
        self._calls += 1
        values = [_values(holder).get(name) for holder, names in self.switches for name in names]
        if values != self._values[0]:
            self._values = values, tuple(self._number(value, ("attribute", i)) for i, value in enumerate(values))
        return (torch.is_grad_enabled(), *self._values[1])

    def _numbers_of(self, args: tuple, kwargs: dict[str, Any]) -> Iterator[Any]:
        """The numbers among the arguments, also in tensors that lie on the CPU."""
        for place, leaf in enumerate(leaves((args, kwargs))):
            if type(leaf) is Tensor and not leaf.dim() and leaf.device.type == "cpu":
                yield self._number(leaf.item(), place)
            elif isinstance(leaf, int | float):
                yield self._number(leaf, place)

    def _number(self, value: Any, place: Hashable) -> Any:
        """What a kind of call knows of a value: itself, of many numbers in one place the first few and some more."""
        if _is_one_of_few(value):
            return value
        if not isinstance(value, int | float):
            return type(value)
        seen = self._seen.setdefault(place, {})
        if value not in seen and (len(seen) < _REHEARSED or self._calls - max(seen.values()) >= _REST):
            seen[value] = self._calls
        return value if value in seen else type(value)


def runs_own_code(module: nn.Module) -> bool:
    """Whether a user's own code stands behind what a packed module computes for all members' rows."""
    return isinstance(module, Then) or not (isinstance(module, Shell | Twin) or of_torch(module))


def switches_of(net: nn.Module) -> list[tuple[Any, list]]:
    """What a user's own code on all members' rows may read beside tensors.

    (A module, an object or a dict that it holds; the names of its mode, flags, numbers and what is None.)
    """
    own = [m for m in without_insides(net) if runs_own_code(m)]
    held = {id(v): v for m in own for v in attributes(m).values() if is_plain_object(v) or isinstance(v, dict)}
    plain = bool | str | int | float | None
    return [
        (holder, [name for name, value in _values(holder).items() if isinstance(value, plain)])
        for holder in (*own, *held.values())
    ]


def _is_one_of_few(value: Any) -> bool:
    """Whether a plain value may decide which way code goes, and is one of few."""
    return isinstance(value, bool | str | None) or (isinstance(value, int | float) and value in _NUMBERS)


def _values(holder: Any) -> dict:
    return holder if isinstance(holder, dict) else vars(holder)
