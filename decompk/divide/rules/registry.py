"""Where rules are registered, by the name of the operation."""

from __future__ import annotations

from collections.abc import Callable

FUNCTION_RULES: dict[str, Callable] = {}


def rule(*names: str) -> Callable:
    def register(function: Callable) -> Callable:
        FUNCTION_RULES.update(dict.fromkeys(names, function))
        return function

    return register
