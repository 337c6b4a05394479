"""One thread at a time where a network is read or rehearsed: torch.fx, hooks and random states are the process's."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn

_lock, _lock_inside = threading.RLock(), threading.RLock()
_inside = contextvars.ContextVar("whether this code runs for a thread that is inside", default=False)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """No other thread is inside, and none forks meanwhile: the child would keep what is changed for a while.

    A thread may enter again, but must not wait inside for another one that enters or forks; unless it works for this
    one in a copy of its context: such threads enter one at a time among themselves.
    """
    with _lock_inside if _inside.get() and not _lock._is_owned() else _lock:
        token = _inside.set(True)
        try:
            yield
        finally:
            _inside.reset(token)


def once(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function`, which runs at the first call alone: threads that call at once wait for what it returns."""
    found: list[Any] = []

    @functools.wraps(function)
    def call() -> Any:
        if not found:
            with one_at_a_time():
                if not found:
                    found.append(function())
        return found[0]

    return call


class Turn:
    """One thread at a time in what one object does; a copy of the object has another. A thread may enter again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _turns.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: Any) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple:
        return Turn, ()


_turns: weakref.WeakSet[Turn] = weakref.WeakSet()


def _renew() -> None:
    """In a forked child, where the threads that held a turn are no more; its own thread holds what it held."""
    global _lock_inside
    _lock.release()
    _lock_inside = threading.RLock()
    for turn in _turns:
        if not turn._lock._is_owned():
            turn._lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # Windows has none
    os.register_at_fork(before=lambda: _lock.acquire(), after_in_parent=lambda: _lock.release(), after_in_child=_renew)


class Tracer(fx.Tracer):
    """torch.fx's, which patches nn.Module for the whole process, for one thread: what others call runs as it is."""

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        self._thread = threading.get_ident()
        with one_at_a_time():
            return super().trace(*args, **kwargs)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return self.called(m, forward, args, kwargs)

    def called(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the traced code gets of a call of `module`."""
        return super().call_module(module, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)
