"""Where the rules are: of an operation by its name, of a layer by its class or a base of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..channel_pass import ChannelPass

# (pass, name of the operation or path of the layer, args, kwargs) → the value of the node
Rule = Callable[[ChannelPass, str, tuple, dict], Any]

RULES: dict[str | type[nn.Module], Rule] = {}


def rule(*keys: str | type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register a rule for operations of these names or layers of these classes; raises ValueError where one is there.

    A class of the user's own is entered by torch.fx, unless `fx.graph` keeps it whole: its rule is not asked then.
    """

    def register(function: Rule) -> Rule:
        if known := RULES.keys() & set(keys):
            raise ValueError(f"there is a rule for {known} already")
        RULES.update(dict.fromkeys(keys, function))
        return function

    return register


def layer_rule(module: nn.Module) -> Rule | None:
    """The rule for the nearest of the module's classes that has one."""
    return next((RULES[kind] for kind in type(module).__mro__ if kind in RULES), None)
