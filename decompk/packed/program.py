"""A packed network's own code as torch.fx read it, written down again: what it depends on, and whether that holds."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.nn.modules.module import _has_any_global_hook

from ..errors import UnsupportedOperation
from ..fx.wrapper import Rewritten
from ..kernels.call import watched
from .fused_layer import plain_attributes, unhooked


class Program(Rewritten):
    """Edited graphs of `net`, by mode or by a tuple that begins with it."""

    _modal: bool
    _plain: dict[bool, list[tuple[nn.Module, dict[str, Any]]]]

    def __init__(
        self, net: nn.Module, graphs: Mapping[Hashable, fx.Graph], entered: Mapping[bool, Sequence[nn.Module]]
    ):
        """entered: the modules whose code a mode's graphs stand for."""
        try:
            super().__init__(net, graphs)
        except (AttributeError, ImportError) as error:
            raise UnsupportedOperation(
                f"the graph of {type(net).__name__} cannot be written down: {error}; define at the top of a module "
                "what it uses."
            ) from error
        sources: dict[bool, list[str]] = {True: [], False: []}
        for key, (source, _) in self._source.items():
            sources[key[0] if isinstance(key, tuple) else key].append(source)
        vars(self).update(
            _modal=sources[True] != sources[False],
            _plain={mode: [(m, plain_attributes(m)) for m in modules] for mode, modules in entered.items()},
        )

    def applies(self) -> bool:
        """Whether the graph is what the code would do now: no hooks on the way, modes and values as it was read."""
        mode = self._inner.training
        return not (_has_any_global_hook() or watched()) and all(
            unhooked(m)
            and (m.training == mode or not self._modal)
            and all(vars(m).get(name) is value for name, value in plain.items())
            for m, plain in self._plain[mode]
        )
