"""A member's own module, of those that run member by member: made without tensors, and kept as a user changes it."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..fx.forward_code import attributes, is_plain_object
from .twin import deep_copy

STORES = ("_parameters", "_buffers")
HOOK_STORES = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and "ward_" in name]
_was_not = object()


def own_module(module: nn.Module, parts: Collection[nn.Module] = ()) -> nn.Module:
    """A copy of a member's module with None where its parameters and buffers were: places for slices.

    parts: modules inside that are not copied, and have such places already.
    """
    tensors = [t for m in module.modules() for kind in STORES for t in getattr(m, kind).values() if t is not None]
    # None itself would not do: a GraphModule's own copy sorts what it finds by its class.
    places = {id(t): nn.Parameter(torch.empty(0)) if isinstance(t, nn.Parameter) else torch.empty(0) for t in tensors}
    new = deep_copy(module, {**places, **{id(part): part for part in parts}})
    for m in new.modules():
        for store in (m._parameters, m._buffers):
            store.update({name: None for name, t in store.items() if any(t is place for place in places.values())})
    return new


class Noted:
    """What a module of `inner` was like when its members were like it."""

    def __init__(self, module: nn.Module):
        self.module, self.values = module, list(vars(module).values())
        self.attributes = _attributes(module)
        self.insides = {name: _inside(v) for name, v in self.attributes.items() if _is_container(v)}
        self.hooks = [dict(getattr(module, name)) for name in HOOK_STORES]
        self.hookless = not any(self.hooks)
        self.children = dict(module._modules)

    def holds(self) -> bool:
        """Asked at every call of every module, so in as few steps of the interpreter as will do."""
        now = vars(self.module)
        return (
            len(now) == len(self.values)
            and all(map(operator.is_, now.values(), self.values))
            and now["_modules"] == self.children
            and (not any(map(now.__getitem__, HOOK_STORES)) if self.hookless else self._same_hooks())
            and all(_same(_inside(now[name]), inside) for name, inside in self.insides.items())
        )

    def _same_hooks(self) -> bool:
        now = [getattr(self.module, name) for name in HOOK_STORES]
        return all(hooks.keys() == known.keys() for hooks, known in zip(now, self.hooks, strict=True))

    def bring_over(self, own: nn.Module, memo: dict[int, Any]) -> None:
        """Bring into a member's module what has changed since; `memo`: what was copied for this member so far."""
        module = self.module
        own.training, own._is_full_backward_hook = module.training, module._is_full_backward_hook
        now = _attributes(module)
        for name in self.attributes.keys() - now.keys():
            vars(own).pop(name, None)
        for name, value in now.items():
            inside = self.insides.get(name)
            same = self.attributes.get(name, _was_not) is value
            if not same or (inside is not None and not _same(_inside(value), inside)):
                vars(own)[name] = _copied(value, memo)
        for name, known in zip(HOOK_STORES, self.hooks, strict=True):
            theirs, ours = getattr(module, name), getattr(own, name)
            for key in known.keys() - theirs.keys():
                ours.pop(key, None)
            ours.update({key: hook for key, hook in theirs.items() if key not in known})
        for name in self.children.keys() - module._modules.keys():
            own._modules.pop(name, None)
        for name, child in module._modules.items():
            if self.children.get(name) is not child:
                own._modules[name] = None if child is None else own_module(child)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds beside tensors, modules, hooks and its mode."""
    return {name: value for name, value in attributes(module).items() if name != "_inner"}


def held_tensors(module: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """(attribute, index or key, tensor) of the tensors in a module's lists and dicts, such as an RNN's flat weights."""
    for attribute, container in _attributes(module).items():
        pairs = enumerate(container) if isinstance(container, list) else ()
        for key, value in container.items() if isinstance(container, dict) else pairs:
            if isinstance(value, Tensor):
                yield attribute, key, value


def _is_container(value: Any) -> bool:
    return isinstance(value, list | dict | set) or is_plain_object(value)


def _inside(container: Any) -> list:
    if not isinstance(container, list | dict | set):
        container = vars(container)
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def _same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return deep_copy(value, memo)
    except Exception:  # whatever an attribute raises that cannot be copied
        return value
