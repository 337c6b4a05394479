"""Nested values: tensors inside tuples, lists, dicts, named tuples and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any


def children(tree: Any) -> list | None:
    """What a container holds, in order; None for anything else."""
    if _is_dataclass(tree):
        return [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    if isinstance(tree, dict):
        return list(tree.values())
    if isinstance(tree, tuple | list):
        return list(tree)
    return None


def _is_dataclass(tree: Any) -> bool:
    """Whether tree is an instance of one; dataclasses.is_dataclass says as much, but dynamo of torch 2.11 cannot."""
    return hasattr(type(tree), "__dataclass_fields__")


def rebuild(tree: Any, parts: list) -> Any:
    """A container like `tree` that holds `parts` instead."""
    if _is_dataclass(tree):
        names = [field.name for field in dataclasses.fields(tree)]
        return dataclasses.replace(tree, **dict(zip(names, parts, strict=True)))
    if isinstance(tree, dict):
        if type(tree) is dict:
            return dict(zip(tree, parts, strict=True))
        new = copy.copy(tree)
        for key, part in zip(tree, parts, strict=True):
            new[key] = part
        return new
    if hasattr(tree, "_fields"):
        return type(tree)(*parts)
    return type(tree)(parts)


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
