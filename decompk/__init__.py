"""decompk trains K networks for little more than the price of one: decompose, pack, compose."""

from . import losses, models, ops, optim, theory, train
from .ahead import compile_ahead
from .blockdiag import block_diagonal, densify
from .decompose import Decomposition, decompose, grouped_subnets
from .dispatch import backend
from .errors import BackendError, CheckpointError, DecompkError, PackError, PartitionError, UnsupportedOperation
from .explain import explain
from .fuse import fuse
from .initialise import initialise
from .packed import Packed, pack
from .partition import Crop, Indices

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CheckpointError",
    "Crop",
    "DecompkError",
    "Decomposition",
    "Indices",
    "PackError",
    "Packed",
    "PartitionError",
    "UnsupportedOperation",
    "backend",
    "block_diagonal",
    "compile_ahead",
    "decompose",
    "densify",
    "explain",
    "fuse",
    "grouped_subnets",
    "initialise",
    "losses",
    "models",
    "ops",
    "optim",
    "pack",
    "theory",
    "train",
]
