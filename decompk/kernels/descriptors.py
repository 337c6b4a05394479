"""Tensor descriptors: memory as the copy engine reads it and writes it, a block at a time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

TENSORS = (Tensor, Parameter)  # a subclass may mean anything by its address
ROOM = 1024  # entries of a table that grows with what is met


def make_room(table: dict[Any, Any]) -> None:
    if len(table) >= ROOM:
        table.clear()


@functools.cache
def descriptor_class() -> Any:
    """Triton's tensor descriptor, loaded with the first kernel that is launched."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor


class _View:
    """A descriptor that Triton found right, without its tensor."""

    def __init__(self, made: Any):
        self.fields = {name: value for name, value in vars(made).items() if name != "base"}
        self.fields["view"] = self


_views: dict[tuple[Any, ...], _View] = {}


def descriptor(x: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> Any:
    """Memory of x, seen in `shape` and `strides`, as the copy engine reads it and writes it, a block at a time."""
    if type(x) not in TENSORS or x.data_ptr() % 16:
        return descriptor_class()(x, list(shape), list(strides), list(block))
    key = tuple(shape), tuple(strides), tuple(block), x.dtype
    view = _views.get(key)
    if view is None:
        made = descriptor_class()(x, *map(list, key[:3]))
        if not hasattr(made, "__dict__"):
            return made
        make_room(_views)
        view = _views[key] = _View(made)
    made = object.__new__(descriptor_class())
    made.__dict__.update(view.fields)
    made.base = x
    return made
