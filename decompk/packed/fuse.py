"""Fusion of a packed network: a convolution with its crops, batch norm, residual and ReLU, in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import DecompkError, UnsupportedOperation
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
    and batch norm, residual and ReLU are one pass. On a CPU in train mode so do convolutions channel by channel, a
    ReLU6, and Linear → ReLU; and layers, poolings and Flatten from the input on are one call each way. A first
    convolution that alone reads the image reads its crops from it, so none are copied. All of this is decided at each
    call: where tensors, modes or hooks do not allow it (float64, a gradient in eval mode, a residual that broadcasts),
    the layers run one after the other as in `net`.

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
    _program: Program | None

    def __init__(self, packed: Packed):
        super().__init__(packed._inner, packed._K, packed._crops, packed._input_dims, packed._shared, packed._rehearse)
        program = Program(packed._inner, packed._crops)
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
        return self._by_program(program, x, cuts)

    def _change(self, changes: Changes) -> None:
        self._original._change(changes)
        vars(self).update(_inner=self._original._inner)
        if changes.whole or changes.contiguous:
            self._plans.forget()
        if changes.whole:
            vars(self)["_kinds"] = Kinds(self._original._kinds.switches)
            try:
                program = Program(self._inner, self._crops)
            except UnsupportedOperation:  # nothing is left that could be fused
                program = None
            vars(self)["_program"] = program

    def _copied(self, inner: nn.Module) -> Packed:
        return Fused(self._original._copied(inner))

    def _by_member(self, leaf: Tensor) -> Tensor:
        return self._original._by_member(leaf)

    def _how(self, twin: Twin) -> str:
        note = None if self._program is None else self._program.notes().get(twin._twin_path)
        return super()._how(twin) + (f", {note}" if note else "")
