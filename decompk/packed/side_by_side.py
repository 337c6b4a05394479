"""A packed network with all members' channels side by side, on torch's own grouped convolutions, without copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..crops import Part
from ..errors import UnsupportedOperation
from ..fx.held import held_at
from ..kernels.backend import forced
from ..kernels.layout import side_by_side
from .fused_layer import unhooked
from .fusion import read
from .per_member import PerMember
from .program import Edited
from .side_graph import SideGraph
from .side_layers import cut

_DECIDES = ("inplace", "_twin_contiguous")  # attributes of a layer that the graph is made by


class SideBySide(Edited):
    """`net` computed in the layout (N, K·C, H, W), channels_last, from its first convolution on as far as it goes.

    Convolutions, norms, pools and what works number by number keep the layout; so do additions, gates, concatenations,
    chunks and shuffles of channels. Whatever else reads a value gets its rows (K·N, C, H, W), as in `net`, and gives
    rows. torch.fx reads the network's code once, in both modes. Raises UnsupportedOperation where it cannot, and where
    nothing would lie side by side.
    """

    _crops: Sequence[Part] | None
    _layers: dict[bool, list[tuple[dict[str, Any], str, nn.Module, list]]]

    def __init__(self, net: nn.Module, K: int, crops: Sequence[Part] | None):
        """crops: of the image that members share; None where each sees all of it."""
        if isinstance(net, PerMember):
            raise UnsupportedOperation(f"the whole network runs member by member, since {net._reason}.")
        entered, graphs, paths = {}, {}, {}
        for mode in (True, False):
            graph, entered[mode] = read(net, mode)
            sides = {shared: SideGraph(net, K, graph, shared) for shared in (False, *([] if crops else [True]))}
            graphs.update({(mode, shared): side.new for shared, side in sides.items()})
            paths[mode] = sorted(set().union(*(side.paths for side in sides.values())))
        super().__init__(net, graphs, entered)
        vars(self).update(_crops=crops, _layers={mode: _noted(net, found) for mode, found in paths.items()})

    def why_not(self, x: Tensor, shared: bool) -> str | None:
        """Why a call with x cannot run so, in one sentence, or None."""
        if torch.compiler.is_compiling():
            return "it is compiled"
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
            return "it is for float32 and float64 on a CPU, without autocast"
        if forced.get() not in (None, "torch"):
            return f"backend '{forced.get()}' is asked for"
        if x.dim() != 5 - shared:
            return "its input is no image"
        return None if self.applies() else "hooks, transforms, modes, values or layers are not those it was read with"

    def applies(self) -> bool:
        """Whether the graph is what the code would do now."""
        layers = self._layers[self._inner.training]
        return super().applies() and all(
            store.get(name) is layer and unhooked(layer) and list(map(vars(layer).get, _DECIDES)) == noted
            for store, name, layer, noted in layers
        )

    def forward(self, x: Tensor, shared: bool = True) -> Any:
        """What `net` gives for the rows (K·N, …) of x: (N, C, H, W) that all members share, or (K, N, C, H, W)."""
        mode = self._inner.training
        if shared and not self._crops:
            return self._code[mode, True](self._inner, x)
        beside = cut(x, self._crops) if shared and self._crops else side_by_side(x)
        return self._code[mode, False](self._inner, beside)


def _noted(net: nn.Module, paths: Sequence[str]) -> list[tuple[dict[str, Any], str, nn.Module, list]]:
    """The layers at `paths` and the modules around them: where each is held, by which name, and what decides."""
    return [(held, name, m, list(map(vars(m).get, _DECIDES))) for held, name, m in held_at(net, paths)]
