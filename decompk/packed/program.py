"""A packed network's fused graphs as code that runs in its place, one for train and one for eval mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..crops import Crop
from ..errors import UnsupportedOperation
from ..fx.wrapper import Rewritten
from ..kernels.call import watched
from .fused_layer import plain_attributes, unhooked
from .fusion import Fusion


class Program(Rewritten):
    """The fused graphs of `net`, for train and for eval mode."""

    _notes: dict[bool, dict[str, str]]
    _reads_image: dict[bool, bool]
    _modal: bool
    _called: dict[bool, list[nn.Module]]
    _plain: dict[bool, list[tuple[nn.Module, dict[str, Any]]]]

    def __init__(self, net: nn.Module, crops: Sequence[Crop] | None):
        fusions = {mode: Fusion(net, mode, crops) for mode in (True, False)}
        try:
            super().__init__(net, {mode: fusion.graph for mode, fusion in fusions.items()})
        except (AttributeError, ImportError) as error:
            raise UnsupportedOperation(
                f"the graph of {type(net).__name__} cannot be written down: {error}; define at the top of a module "
                "what it uses."
            ) from error
        vars(self).update(
            _notes={mode: fusion.notes for mode, fusion in fusions.items()},
            _reads_image={mode: fusion.reads_image for mode, fusion in fusions.items()},
            _modal=self._source[True][0] != self._source[False][0],
            _called={mode: fusion.called for mode, fusion in fusions.items()},
            _plain={mode: [(m, plain_attributes(m)) for m in fusion.entered] for mode, fusion in fusions.items()},
        )

    def forward(self, x: Tensor, crops: Sequence[Crop] | None = None) -> Any:
        """x: rows of all members (K·N, …), or with crops the image (N, …) that they share."""
        mode = self._inner.training
        return self._code[mode](self._inner, x, crops, all(map(unhooked, self._called[mode])))

    def applies(self) -> bool:
        """Whether the graph is what the code would do now: no hooks on the way, modes and values as it was read."""
        mode = self._inner.training
        return not (_has_any_global_hook() or watched()) and all(
            unhooked(m)
            and (m.training == mode or not self._modal)
            and all(vars(m).get(name) is value for name, value in plain.items())
            for m, plain in self._plain[mode]
        )

    def reads_image(self) -> bool:
        return self._reads_image[self._inner.training]

    def notes(self) -> dict[str, str]:
        return self._notes[self._inner.training]
