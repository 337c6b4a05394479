"""The division of one network among its members, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

# Where a member's part of a tensor lies: one index array for each of its leading axes; they broadcast.
Place = tuple[np.ndarray, ...]


@dataclass(eq=False)
class Division:
    """Whose channels of a network are whose: what decompose, extract, compose and the theorems read.

    mode: True in training, whose graph may be another.
    """

    members: int
    places: dict[str, tuple[Place, ...]] = field(default_factory=dict)  # tensor of the state dict → one a member
    summed: set[str] = field(default_factory=set)  # head biases: composition adds them
    head_weights: set[str] = field(default_factory=set)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)  # module → attribute → member's value
    member_args: dict[bool, dict[str, tuple]] = field(default_factory=dict)  # mode → node → (args, kwargs)
    reorders: dict[bool, dict[str, np.ndarray]] = field(default_factory=dict)  # mode → node → channel order
    assemblies: dict[bool, dict[str, tuple]] = field(default_factory=dict)  # mode → head's node → a box of each member
    graphs: dict[bool, fx.Graph] = field(default_factory=dict)  # by mode
    channels: dict[bool, dict[str, np.ndarray | None]] = field(default_factory=dict)  # mode → node → (K, c) of axis 1
    features: dict[bool, dict[str, np.ndarray]] = field(default_factory=dict)  # mode → node → (K, f) of the last axis
    notes: list[str] = field(default_factory=list)  # why composed(x) is not exactly the sum of the members
    noted: set[str] = field(default_factory=set)  # the nodes that the notes are about
    adapted: list[str] = field(default_factory=list)  # layers that follow a crop's smaller map, as first FC layers
