"""What a rule may ask of the pass that follows channels, and demand of it, at the node in question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import fx, nn

from .divided_layer import DividedLayer
from .division import Division
from .strands import Strands
from .values import MapExtent, Ownership, TensorPair


class ChannelPass(Protocol):
    """The pass at one node of the graph, in training or not.

    K: how many members. modules: those of the network, by path. heads: the last layers, by path or weight's name.
    layers: those with parameters that were met so far, by path. division: what becomes of it all.
    """

    K: int
    node: fx.Node
    modules: Mapping[str, nn.Module]
    heads: set[str]
    strands: Strands
    layers: dict[str, DividedLayer]
    division: Division

    # ---- running the node's operation; full: on the global shapes, part: on a member's -----------------------------

    def run_global(self, args: tuple, kwargs: dict) -> Any:
        """The operation on the global shapes."""

    def run_member(self, args: tuple, kwargs: dict, member: tuple | None = None) -> Any:
        """The operation on a member's shapes; `member`, (args, kwargs), overrides its arguments."""

    def run_both(self, args: tuple, kwargs: dict, member: tuple | None = None) -> tuple[Any, Any]:
        """(run_global, run_member)."""

    def rewrite(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The member's node takes these arguments instead (nodes and plain numbers); returns their values."""

    def wrap(
        self, full: Any, part: Any, ownership: Ownership, scale: tuple = (), moved: MapExtent | None = None
    ) -> Any:
        """The two results as one value, TensorPairs inside; what is divided must be so evenly."""

    def without_channels(self, args: tuple, kwargs: dict) -> Any:
        """The result of an operation that holds none of the channels: numbers, shapes, new tensors."""

    # ---- whose channels are whose ----------------------------------------------------------------------------------

    def settle(self, tensors: list[TensorPair]) -> list[TensorPair]:
        """Bare parameters and buffers take the side of the activation they meet."""

    def cut(self, x: TensorPair) -> int:
        """Which of the axes that x is divided along, jointly, is the one that is K times shorter in a member."""

    def expect(self, holds: Callable[[np.ndarray], bool]) -> None:
        """The division is refused unless holds(owner of every strand)."""

    def shuffle(self, ids: np.ndarray, cut: int) -> np.ndarray:
        """New strands for channels that a member shuffles on its own: ids, cut along that axis, read row by row."""

    def pin(self, ids: np.ndarray) -> None:
        """The order of these strands matters to an operation without parameters."""

    def turn_image(self) -> None:
        """The node swaps axes of the image itself."""

    def last_output(self, full: torch.Tensor, part: torch.Tensor, scale: tuple) -> Ownership:
        """Whose channels a last layer's output holds; of maps put together, where each member's lies is kept."""

    # ---- saying so -------------------------------------------------------------------------------------------------

    def refuse(self, what: str, remedy: str = ...) -> NoReturn:
        """Raise UnsupportedOperation naming the node."""

    def misfit(self, x: TensorPair, error: Exception) -> Exception:
        """The MisfitError to raise where the operation fails on a member's x."""

    def note(self, what: str) -> None:
        """Here the composed network is not exactly the sum of its members."""

    def adapt(self, path: str) -> None:
        """The layer follows the member's smaller map; a member no longer runs on the full image."""

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter or buffer of the network."""
