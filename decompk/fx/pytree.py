"""Nested values: tensors inside tuples, lists, dicts, named tuples and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def children(tree: Any) -> list | None:
    """What a container holds, in order; None for anything else, such as a PackedSequence, which makes sense whole."""
    if isinstance(tree, PackedSequence):
        return None
    if isinstance(tree, tuple | list):  # first: dynamo of torch 2.11 cannot ask a tuple's class for fields
        return list(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    if isinstance(tree, dict):
        return list(tree.values())
    return None


def rebuild(tree: Any, parts: list) -> Any:
    """A container like `tree` that holds `parts` instead."""
    if isinstance(tree, tuple | list):
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if dataclasses.is_dataclass(tree):
        names = [field.name for field in dataclasses.fields(tree)]
        return dataclasses.replace(tree, **dict(zip(names, parts, strict=True)))
    if type(tree) is dict:
        return dict(zip(tree, parts, strict=True))
    new = copy.copy(tree)
    for key, part in zip(tree, parts, strict=True):
        new[key] = part
    return new


def tree_map(function: Callable, tree: Any, *others: Any) -> Any:
    """`function` of every leaf of `tree`, with the leaves at the same place in `others`; a misfit counts as a leaf."""
    held = [children(value) for value in (tree, *others)]
    kinds = {(type(value), None if h is None else len(h)) for value, h in zip((tree, *others), held, strict=True)}
    if held[0] is None or len(kinds) > 1:
        return function(tree, *others)
    return rebuild(tree, [tree_map(function, *column) for column in zip(*held, strict=True)])


def spread(function: Callable[[Any], list], tree: Any, count: int) -> list:
    """`count` trees like `tree`: `function` gives each leaf's `count` successors."""
    held = children(tree)
    if held is None:
        return function(tree)
    columns = [spread(function, part, count) for part in held]
    return [rebuild(tree, [column[k] for column in columns]) for k in range(count)]


def leaves(tree: Any) -> list:
    held = children(tree)
    return [tree] if held is None else [leaf for part in held for leaf in leaves(part)]


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]
