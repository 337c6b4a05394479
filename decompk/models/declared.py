"""The networks of this package say what one sample looks like, so that nobody need say it again to decompose them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import nn

Arguments = ParamSpec("Arguments")
Network = TypeVar("Network", bound=nn.Module)


def declares(
    size: Callable[..., tuple[int, ...]],
) -> Callable[[Callable[Arguments, Network]], Callable[Arguments, Network]]:
    """Let what a factory makes have `input_size`, (C, *spatial) of one sample. size: its arguments of these names → it.

    A plain attribute: it goes with copies, is no part of the state dict, and nothing in the network reads it.
    """
    names = tuple(inspect.signature(size).parameters)

    def decorate(factory: Callable[Arguments, Network]) -> Callable[Arguments, Network]:
        signature = inspect.signature(factory)

        @functools.wraps(factory)
        def make(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Network:
            net: Any = factory(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            net.input_size = tuple(size(*(given.arguments[name] for name in names)))
            return net

        return make

    return decorate


image = declares(lambda input_size: input_size)
