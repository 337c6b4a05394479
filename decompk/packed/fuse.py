"""Fusion of a packed network: a convolution with its crops, batch norm, residual and ReLU, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..crops import Crop
from ..errors import DecompkError, UnsupportedOperation
from .fused_layer import unhooked
from .fusion import Fusion
from .kinds import Kinds
from .pack import Packed
from .program import Program
from .surgery import Changes
from .twin import Twin

if TYPE_CHECKING:
    from typing_extensions import Self


def fuse(net: Packed) -> Fused:
    """The same packed network, running each convolution together with what follows it.

    Conv2d (groups=1, zero padding) → BatchNorm2d → + residual → ReLU, each part but the first optional, become one
    launch in eval mode without gradients; in train mode, on Triton's kernels, the convolution also takes the moments,
    and batch norm, residual and ReLU are one pass. A first convolution that alone reads the image reads its crops
    from it, so none are copied. All of this is decided at each call: where tensors, modes or hooks do not allow it
    (float64, a gradient in eval mode, a residual that broadcasts), the layers run one after the other as in `net`.

    The result shares parameters, buffers and layers with `net`, which keeps working and is what `unfuse()` gives
    back; `describe()` says what became of each layer. torch.fx reads the network's code once, in both modes: what
    that code branches on, and which layers it has, must not change afterwards. Calls with more than one argument run
    as in `net`. Raises DecompkError where `net` is not packed, UnsupportedOperation where torch.fx cannot follow it.
    """
    if not isinstance(net, Packed):
        raise DecompkError(
            f"fuse takes a packed network, from decompk.pack or decompk.grouped_subnets, not {type(net).__name__}."
        )
    return Fused(net.unfuse() if isinstance(net, Fused) else net)


class Fused(Packed):
    """A Packed that runs fused; built by `fuse`."""

    _original: Packed
    _program: _Program | None

    def __init__(self, packed: Packed):
        super().__init__(packed._inner, packed._K, packed._crops, packed._input_dims, packed._shared, packed._rehearse)
        program = _Program(packed._inner, packed._crops)
        vars(self).update(_original=packed, _program=program, _decomposition=packed._decomposition)
        vars(self).update(_ways=packed._ways, _told=packed._told)

    def unfuse(self) -> Packed:
        """The packed network this one was made of, with all that was learned since."""
        return self._original

    def train(self, mode: bool = True) -> Self:
        self._original.train(mode)
        return self

    def _run(self, x: Tensor, cuts: bool) -> Any:
        program = self._program
        if program is None or not program.applies():
            return super()._run(x, cuts)
        uncut = cuts and program.reads_image()
        return program(self._cut(x) if cuts and not uncut else x, self._crops if uncut else None)

    def _change(self, changes: Changes) -> None:
        self._original._change(changes)
        vars(self).update(_inner=self._original._inner)
        if changes.whole:
            vars(self)["_kinds"] = Kinds(self._original._kinds.switches)
            try:
                program = _Program(self._inner, self._crops)
            except UnsupportedOperation:  # nothing is left that could be fused
                program = None
            vars(self)["_program"] = program

    def _by_member(self, leaf: Tensor) -> Tensor:
        return self._original._by_member(leaf)

    def _how(self, twin: Twin) -> str:
        note = None if self._program is None else self._program.notes().get(twin._twin_path)
        return super()._how(twin) + (f", {note}" if note else "")


class _Program(Program):
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
