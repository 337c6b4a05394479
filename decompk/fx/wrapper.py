"""Modules that stand in for another: the same parameter names, a forward of their own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from .imports import imported

if TYPE_CHECKING:
    from typing_extensions import Self


class Shell(nn.Module):
    """A module around another that shows the other's children, parameters and buffers under their own names.

    What a shell adds is private: any public name may be one of the wrapped module's.
    """

    _inner: nn.Module

    def __init__(self, inner: nn.Module):
        super().__init__()
        checkpoints = (name for name in vars(inner) if name.endswith("_hooks") and "state_dict" in name)
        shared = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", *checkpoints)
        vars(self).update(_inner=inner, **{name: vars(inner)[name] for name in shared})

    @property
    def training(self) -> bool:
        """The mode, which is the wrapped module's own: some set it by attribute, and list the shell alone."""
        return self._inner.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_inner" in vars(self):  # else nn.Module's own constructor sets it
            self._inner.training = mode

    def train(self, mode: bool = True) -> Self:
        self._inner.train(mode)
        return self


def innermost(net: Any) -> Any:
    """The network itself, without shells around it."""
    while isinstance(net, Shell):
        net = vars(net).get("_inner")
    return net


class Rewritten(Shell):
    """A network that runs an edited copy of its own torch.fx graph, one for each key: train and eval mode.

    Needed where the author's code holds a number or an order of channels that a member or the composed network must
    have otherwise: `split(x, 64, dim=1)`, a channel shuffle.
    """

    def __init__(self, net: nn.Module, graphs: Mapping[Any, fx.Graph]):
        super().__init__(net)
        self._reads_tensors = any(node.op == "get_attr" for graph in graphs.values() for node in graph.nodes)
        self._source = {mode: source_of(graph) for mode, graph in graphs.items()}
        self._code: dict[Any, Callable] = {mode: compiled(*source) for mode, source in self._source.items()}

    def forward(self, x: torch.Tensor) -> Any:
        return self._code[self.training](self._inner, x)

    def extra_repr(self) -> str:
        return f"{type(self._inner).__name__} with its graph edited"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_code": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._code = {mode: compiled(*source) for mode, source in self._source.items()}


@dataclass(frozen=True)
class Buffer:
    """An argument that is read from the network's buffer of this name."""

    name: str


def edited(graph: fx.Graph, arguments: dict[str, tuple], behind: dict[str, tuple[Callable, tuple]]) -> fx.Graph:
    """A copy of `graph` with other arguments for some nodes and calls behind others.

    `arguments`: node name → (args, kwargs) in terms of the old graph's nodes. `behind`: node name → (function, further
    arguments: plain values or a Buffer), called with the node's value.
    """
    copy = fx.Graph()
    twin: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        twin[node] = copy.node_copy(node, twin.__getitem__)
        if node.name in arguments:
            twin[node].args, twin[node].kwargs = map_arg(arguments[node.name], twin.__getitem__)
        if node.name in behind:
            function, further = behind[node.name]
            further = tuple(copy.get_attr(a.name) if isinstance(a, Buffer) else a for a in further)
            twin[node] = copy.call_function(function, (twin[node], *further))
    return copy


def source_of(graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    code = graph.python_code("self")
    imports: dict[str, Any] = {}
    for name, value in code.globals.items():
        if not re.search(rf"\b{name}\b", code.src):  # torch.fx always brings inf, nan and NoneType along
            continue
        if inspect.ismodule(value):
            imports[name] = (value.__name__, "")
        elif hasattr(value, "__qualname__"):
            imports[name] = (value.__module__, value.__qualname__)
        else:
            imports[name] = value
    return code.src, imports


def compiled(source: str, imports: dict[str, Any]) -> Callable:
    scope: dict[str, Any] = {}
    for name, value in imports.items():
        if isinstance(value, tuple):
            found: Any = imported(value[0], f"the network calls the module '{value[0]}', which is not found here")
            for part in filter(None, value[1].split(".")):
                found = getattr(found, part)
            value = found
        scope[name] = value
    exec(compile(source, "<decompk graph>", "exec"), scope)
    return scope["forward"]
