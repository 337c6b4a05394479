"""What a value holds, however deep: containers, functions, objects."""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn
from torch.nn.modules.module import _WrappedHook


def walked(value: Any, ends: Callable[[Any], bool]) -> Iterator[Any]:
    """`value` and what it holds, but nothing inside what `ends` says."""
    seen: set[int] = set()
    queue = [value]
    while queue:
        value = queue.pop()
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            queue += () if ends(value) else _parts(value)


def _parts(value: Any) -> list:
    """What a container, function, partial, method or object holds."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return list(value)
    if isinstance(value, FunctionType):
        return inside(value)
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, _WrappedHook):  # its weak reference to the module is copied right
        return [value.hook]
    return [] if opaque(value) else list(vars(value).values())


def opaque(value: Any) -> bool:
    """Whether an object has no insides for us: none in Python, or those of a module, a class or torch's compilers."""
    kinds = ("torch.fx", "torch.jit", "torch._")
    return (
        not hasattr(value, "__dict__")
        or isinstance(value, ModuleType | type)
        or type(value).__module__.startswith(kinds)
    )


def inside(function: FunctionType) -> list:
    """What a function carries along: defaults and the contents of its closure."""
    cells = [content(cell) for cell in function.__closure__ or ()]
    return [*cells, function.__defaults__, function.__kwdefaults__]


def content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def held_at(net: nn.Module, paths: Iterable[str]) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """The modules at `paths` and those around them: where each is held, by which name."""
    found: dict[str, tuple[dict[str, Any], str, nn.Module]] = {}
    for path in sorted(paths):
        around: Any = net
        names = path.split(".")
        for i, name in enumerate(names):
            held = around._modules if name in around._modules else vars(around)
            around = getattr(around, name)
            found[".".join(names[: i + 1])] = held, name, around
    return list(found.values())
