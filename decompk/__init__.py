"""decompk trains K networks for little more than the price of one: decompose, pack, compose."""

from . import losses, models, ops, optim, theory, train
from .crops import Crop, Indices
from .divide.blockdiag import block_diagonal, densify
from .divide.decompose import Decomposition, decompose, grouped_subnets
from .errors import (
    BackendError,
    CheckpointError,
    DecompkError,
    PackError,
    PartitionError,
    UnsupportedOperation,
)
from .kernels.backend import backend
from .packed.ahead import compile_ahead
from .packed.fuse import fuse
from .packed.initialise import initialise
from .packed.pack import Packed, pack
from .packed.schedule import schedule
from .report.explain import explain
from .train.step import Step

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
    "Step",
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
    "schedule",
    "theory",
    "train",
]
