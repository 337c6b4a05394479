"""What a module's own forward code does to tensors, read from its bytecode without running it."""

from __future__ import annotations

import dis
import functools
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .held import content, walked
from .in_place import Change, changed_in_place

_TENSOR_ACCESS = {
    *("parameters", "named_parameters", "get_parameter", "_parameters", "state_dict"),
    *("buffers", "named_buffers", "get_buffer", "_buffers"),
}
_OF_EVERY_MODULE = vars(nn.Module()).keys()
_LRU_CACHE = type(functools.lru_cache(lambda: None))
_BATCH_STATISTICS = (F.batch_norm, torch.batch_norm)
_SETS = {"setattr", "delattr", "__setattr__", "__delattr__"}
_UNCHANGING = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, range, frozenset, type)


@dataclass(frozen=True)
class ForwardCode:
    """The attributes that the code reachable from a module's forward touches.

    `own`: read from the module itself; `foreign`: from anything else; `called`: as a method; `stored`: assigned;
    `filled`: what they hold is changed in place, as of a dict or list.
    `named`: strings in code that uses getattr. `classes`: module classes in code that uses isinstance or type, and
    `exact`: the latter. `batch_statistics`: it calls batch_norm itself.
    """

    own: set[str] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)
    filled: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    classes: set[type] = field(default_factory=set)
    exact: set[type] = field(default_factory=set)
    batch_statistics: bool = False

    @property
    def state(self) -> list[str]:
        """Attributes that carry something from one call to the next: assigned and read, or changed in place."""
        return sorted(self.filled | (self.stored & (self.own | self.foreign | self.named)))


def why_not_packed(module: nn.Module) -> str | None:
    """Why `module` cannot run on all members at once although each leaf below it could; None if it can."""
    code = read_forward(module)
    others = (m for m in walked(attributes(module), _is_module) if isinstance(m, nn.Module))  # such as to share weights
    named = (name for m in (module, *others) for name, _ in (*m.named_parameters(), *m.named_buffers()))
    tensors = {name.rpartition(".")[2] for name in named}
    reads = (code.foreign | code.named) & tensors
    if tensors:
        reads |= (code.own | code.foreign | code.called) & _TENSOR_ACCESS
    if reads:
        return f"its forward reads '{min(reads)}' of a submodule"
    if code.batch_statistics:
        return "its forward takes batch statistics"
    if code.state:
        return f"its forward keeps '{code.state[0]}' between calls"
    return _why_by_train(module, code, tensors)


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _why_by_train(module: nn.Module, forward: ForwardCode, tensors: set[str]) -> str | None:
    """Why its own `train` or `eval` asks for each member by itself; None if they do not."""
    code = read_forward(module, "train")
    kept = (code.stored | code.filled) & (forward.own | forward.foreign | forward.named) - {"training"}
    reads = (code.own | code.foreign | code.called | code.named) & (tensors | _TENSOR_ACCESS)
    if tensors and ("data" in code.stored or (kept and reads)):
        return "its train() writes what is made of weights"
    return None


def read_forward(module: nn.Module, entry: str = "forward") -> ForwardCode:
    """Follow forward, or the module's own `train`, through its methods and properties, those of its submodules and of
    the plain objects that these hold, and plain functions.

    Functions inside torch are not entered. What is called only through a value built at run time stays unseen.
    """
    found = ForwardCode()
    batch_statistics = False
    own_classes = _classes(module)
    classes_below = {klass for child in module.modules() if child is not module for klass in _classes(child)}
    helpers = _helpers(module)
    classes_below |= {klass for helper in helpers for klass in type(helper).__mro__[:-1]}
    definitions = [vars(owner)[entry] for owner in (module, *own_classes) if entry in vars(owner)]
    changes: list[Change] = []
    inputs = [f for value in definitions[:1] for f in _functions(value)]
    queue = [(f, True) for f in inputs]
    seen = set()
    while queue:
        function, is_method = queue.pop()
        if function.__code__ in seen:
            continue
        seen.add(function.__code__)
        self_name = function.__code__.co_varnames[0] if is_method and function.__code__.co_argcount else ""
        names, strings = set(), set()
        for code in _nested(function.__code__):
            names |= {*code.co_names, *code.co_freevars}
            strings.update(_strings(code.co_consts))
            for kind, name in _accesses(code, self_name):
                getattr(found, kind).add(name)
        words = {text for text in strings if text.isidentifier()}
        found.named.update(strings if "getattr" in names else ())
        found.stored.update(words if names & _SETS else ())
        values = _values(function, names)
        for change in changed_in_place(function.__code__, self_name):
            if change.names and change.names[-1] == "__dict__":
                found.stored.update(words)
                found.named.update(words)
            if not (change.is_argument and function in inputs):
                changes.append(change)
            if not change.names and _is_container(function.__globals__.get(change.root)):
                found.filled.add(change.root)
        classes = {value for value in values if isinstance(value, type) and issubclass(value, nn.Module)}
        found.classes.update(classes if names & {"isinstance", "type", "__class__"} else ())
        found.exact.update(classes if names & {"type", "__class__"} else ())
        batch_statistics |= any(value is one for value in values for one in _BATCH_STATISTICS)
        queue += [(f, False) for value in values for f in _functions(value) if not _inside_torch(f)]
        if names & {"super", entry}:
            queue += [(f, True) for value in definitions for f in _functions(value)]
        for name in names - {entry, "__init__"}:
            found.filled.update([name] if any(_is_cached(vars(klass).get(name)) for klass in own_classes) else ())
            queue += [(f, True) for klass in own_classes for f in _functions(vars(klass).get(name))]
            queue += [
                (f, True) for klass in classes_below for f in _functions(vars(klass).get(name)) if not _inside_torch(f)
            ]
    found.filled.update(_filled(changes, found, [*module.modules(), *helpers]))
    return replace(found, batch_statistics=batch_statistics)


def _filled(changes: list[Change], found: ForwardCode, holders: list) -> set[str]:
    """The attributes of `holders` that hold what is changed in place."""
    filled = set()
    for change in changes:
        filled |= {name for name in change.names if any(_changes(holder, name) for holder in holders)}
        kinds = {"method": (dict, list, set, deque), "item": (dict,)}.get(change.how)
        if change.is_argument and kinds:  # whatever is handed to that function
            handed = (found.own | found.foreign) - _TENSOR_ACCESS
            filled |= {name for name in handed if any(isinstance(vars(h).get(name), kinds) for h in holders)}
    return filled


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds beside what every module has."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def is_users(kind: type[nn.Module]) -> bool:
    """Whether a class is neither torch's nor this package's."""
    return kind.__module__.partition(".")[0] not in ("torch", "decompk")


def is_plain_object(value: Any) -> bool:
    """Whether a plain attribute's value holds attributes of its own, such as a configuration."""
    return hasattr(value, "__dict__") and not isinstance(
        value, nn.Module | torch.Tensor | type | ModuleType | FunctionType | MethodType
    )


def is_changeable(value: Any) -> bool:
    """Whether a plain attribute's value can be changed in place."""
    return not isinstance(value, (*_UNCHANGING, nn.Module, FunctionType))


def _changes(holder: Any, name: str) -> bool:
    """Whether `holder` has an attribute of this name that can be changed in place."""
    if name in vars(holder):
        return name not in _OF_EVERY_MODULE and is_changeable(vars(holder)[name])
    return any(_is_container(vars(klass).get(name)) for klass in type(holder).__mro__)


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list | set | deque)


def _is_cached(value: Any) -> bool:
    return isinstance(value, functools.cached_property)


def _helpers(module: nn.Module) -> list:
    """The plain objects of classes written in Python that a module and those below hold in attributes."""
    found: dict[int, Any] = {}
    queue = [value for m in module.modules() for value in attributes(m).values()]
    while queue:
        value = queue.pop()
        kind = type(value)
        written = not isinstance(value, nn.Module | torch.Tensor | ModuleType | type) and hasattr(value, "__dict__")
        if (
            written
            and id(value) not in found
            and kind.__module__.partition(".")[0] not in ("torch", "builtins", "functools")
        ):
            found[id(value)] = value
            queue += vars(value).values()
    return list(found.values())


def _classes(module: nn.Module) -> list[type]:
    """The module's classes below nn.Module, most derived first."""
    return [klass for klass in type(module).__mro__ if klass is not nn.Module and issubclass(klass, nn.Module)]


def _functions(value: Any) -> Iterator[FunctionType]:
    """The Python functions behind a function, method, property or decorator."""
    if isinstance(value, property):
        value = value.fget
    if _is_cached(value):
        value = value.func
    if isinstance(value, staticmethod | classmethod | MethodType):
        value = value.__func__
    while isinstance(value, FunctionType | _LRU_CACHE):
        if isinstance(value, FunctionType):
            yield value
        value = getattr(value, "__wrapped__", None)


def _values(function: FunctionType, names: set[str]) -> list:
    """The globals and closure values that `names` mean inside `function`, and members of the modules among them."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    known = {**function.__globals__, **{name: content(cell) for name, cell in cells}}
    values = [known[name] for name in names if name in known]
    modules = [value for value in values if isinstance(value, ModuleType)]
    return values + [vars(m)[name] for m in modules for name in names if name in vars(m)]


def _inside_torch(function: FunctionType) -> bool:
    return function.__module__ is not None and function.__module__.partition(".")[0] == "torch"


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _strings(constants: Iterable) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, tuple | frozenset):
            yield from _strings(constant)
        elif isinstance(constant, str):
            yield constant


def _accesses(code: CodeType, self_name: str) -> Iterator[tuple[str, str]]:
    """(field of ForwardCode, attribute) for each attribute the code touches."""
    loaded = None
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            # From Python 3.12 the low bit of LOAD_ATTR says that a method is about to be called.
            flagged = sys.version_info >= (3, 12) and instruction.opname == "LOAD_ATTR" and instruction.arg & 1
            if instruction.opname == "LOAD_METHOD" or flagged:
                yield "called", instruction.argval
            else:
                yield "own" if self_name and loaded == self_name else "foreign", instruction.argval
        elif instruction.opname in ("STORE_ATTR", "DELETE_ATTR"):
            yield "stored", instruction.argval
        if instruction.opname != "EXTENDED_ARG":
            loaded = instruction.argval if instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) else None
            loaded = loaded[-1] if isinstance(loaded, tuple) else loaded  # Python 3.13 loads two names at once
