"""A packed network's edited graphs as code that runs in its place, for train and for eval mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from ..crops import Crop
from ..errors import UnsupportedOperation
from ..fx.wrapper import Rewritten
from ..kernels.call import runs_cpu, watched
from .fused_layer import plain_attributes, unhooked
from .fusion import Fusion
from .stretch import Reader, Whole

KINDS = 32  # of calls whose stretches are kept


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
    _crops: Sequence[Crop] | None
    _graph: fx.Graph | None  # of training, where it has been read here
    _whole: dict[Any, Whole | None]  # by kind of call, in training

    def __init__(self, net: nn.Module, crops: Sequence[Crop] | None):
        fusions = {mode: Fusion(net, mode, crops) for mode in (True, False)}
        entered = {mode: fusion.entered for mode, fusion in fusions.items()}
        super().__init__(net, {mode: fusion.graph for mode, fusion in fusions.items()}, entered)
        vars(self).update(
            _notes={mode: fusion.notes for mode, fusion in fusions.items()},
            _reads_image={mode: fusion.reads_image for mode, fusion in fusions.items()},
            _called={mode: fusion.called for mode, fusion in fusions.items()},
            _crops=crops,
            _graph=fusions[True].graph,
            _whole={},
        )

    def forward(self, x: Tensor, crops: Sequence[Crop] | None = None) -> Any:
        """x: rows of all members (K·N, …), or with crops the image (N, …) that they share."""
        mode = self._inner.training
        alone = all(map(unhooked, self._called[mode]))
        if mode and alone and torch.is_grad_enabled() and runs_cpu(x) and _saves_plainly():
            return self._by_stretch(x, crops)
        return self._code[mode](self._inner, x, crops, alone)

    def _by_stretch(self, x: Tensor, crops: Sequence[Crop] | None) -> Any:
        """The same, as much of it in one call as there is."""
        key = x.shape, x.requires_grad, crops is None, torch.get_num_threads()
        whole = self._whole.get(key)
        if whole is not None and (tensors := whole.tensors()) is not None:
            return whole.run(self._inner, x, crops, tensors)
        if key in self._whole and whole is None:
            return self._code[True](self._inner, x, crops, True)
        while len(self._whole) >= KINDS:
            del self._whole[next(iter(self._whole))]
        if self._graph is None:
            vars(self)["_graph"] = Fusion(self._inner, True, self._crops).graph
        reader = Reader(self._inner, self._graph)
        result = reader.run(x, crops, True)
        self._whole[key] = reader.whole()
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_graph": None, "_whole": {}}

    def reads_image(self) -> bool:
        return self._reads_image[self._inner.training]

    def notes(self) -> dict[str, str]:
        return self._notes[self._inner.training]


def _saves_plainly() -> bool:
    """Whether nobody saves tensors otherwise: a checkpoint that computes again counts them, the same at each call."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None
