"""SplitNet: learn which channels of a network belong together, split it there, and run it block-diagonally."""

from .assignment import Assignment
from .learner import Gammas, Learner, learn
from .nodes import Nodes
from .parallel import Parallel
from .points import split_points
from .rearrange import fitted
from .regulariser import group_weights, imbalance, overlap
from .simplex import ReducedGradient, reduced_gradient
from .sparse import Sparsifier, without
from .splitter import Split, split

__all__ = [
    "Assignment",
    "Gammas",
    "Learner",
    "Nodes",
    "Parallel",
    "ReducedGradient",
    "Sparsifier",
    "Split",
    "fitted",
    "group_weights",
    "imbalance",
    "learn",
    "overlap",
    "reduced_gradient",
    "split",
    "split_points",
    "without",
]
