"""A packed network's edited graphs as code that runs in its place, for train and for eval mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from ..crops import Crop
from ..errors import UnsupportedOperation
from ..fx.wrapper import Rewritten
from ..kernels.call import watched
from .fused_layer import plain_attributes, unhooked
from .fusion import Fusion


class Edited(Rewritten):
    """Edited graphs of `net`, and whether they are still what its code does. A key is a mode, or begins with one."""

    _modal: bool
    _plain: dict[bool, list[tuple[nn.Module, dict[str, Any]]]]

    def __init__(self, net: nn.Module, graphs: Mapping[Any, fx.Graph], entered: Mapping[bool, Sequence[nn.Module]]):
        """entered: the modules whose code the graphs of a mode stand for."""
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


class Program(Edited):
    """The fused graphs of `net`, for train and for eval mode."""

    _notes: dict[bool, dict[str, str]]
    _reads_image: dict[bool, bool]
    _called: dict[bool, list[nn.Module]]

    def __init__(self, net: nn.Module, crops: Sequence[Crop] | None):
        fusions = {mode: Fusion(net, mode, crops) for mode in (True, False)}
        entered = {mode: fusion.entered for mode, fusion in fusions.items()}
        super().__init__(net, {mode: fusion.graph for mode, fusion in fusions.items()}, entered)
        vars(self).update(
            _notes={mode: fusion.notes for mode, fusion in fusions.items()},
            _reads_image={mode: fusion.reads_image for mode, fusion in fusions.items()},
            _called={mode: fusion.called for mode, fusion in fusions.items()},
        )

    def forward(self, x: Tensor, crops: Sequence[Crop] | None = None) -> Any:
        """x: rows of all members (K·N, …), or with crops the image (N, …) that they share."""
        mode = self._inner.training
        return self._code[mode](self._inner, x, crops, all(map(unhooked, self._called[mode])))

    def reads_image(self) -> bool:
        return self._reads_image[self._inner.training]

    def notes(self) -> dict[str, str]:
        return self._notes[self._inner.training]
