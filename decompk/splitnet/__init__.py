"""SplitNet: learn which channels of a network belong together, split it there, and run it block-diagonally."""

from .assignment import Assignment
from .learn import Gammas, learn
from .nodes import Nodes
from .regulariser import group_weights, imbalance, overlap
from .simplex import ReducedGradient, reduced_gradient
from .split import Split, split

__all__ = [
    "Assignment",
    "Gammas",
    "Nodes",
    "ReducedGradient",
    "Split",
    "group_weights",
    "imbalance",
    "learn",
    "overlap",
    "reduced_gradient",
    "split",
]
