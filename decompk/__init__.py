"""decompk trains K networks for little more than the price of one: decompose, pack, compose."""

from . import losses, models, theory
from .decompose import Decomposition, decompose, grouped_subnets
from .errors import CheckpointError, DecompkError, PackError, PartitionError, UnsupportedOperation
from .packed import Packed, pack
from .partition import Crop

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Crop",
    "DecompkError",
    "Decomposition",
    "PackError",
    "Packed",
    "PartitionError",
    "UnsupportedOperation",
    "decompose",
    "grouped_subnets",
    "losses",
    "models",
    "pack",
    "theory",
]
