"""Algorithm 1 for real use: data, per-member schedules, a captured step, checkpoints, many processes.

`train` runs it all; `Step`, `Augment`, `open_data`, `evaluate` and `Checkpoints` serve a loop of one's own.
"""

from .algorithm import train
from .augment import Augment, normalise
from .checkpoint import Checkpoints
from .data import Dataset, epoch_order, open_data
from .ranks import Ranks
from .recipe import Phase, Recipe, load_recipe, presets
from .schedule import Schedule
from .scores import Scores, evaluate
from .step import Step

__all__ = [
    "Augment",
    "Checkpoints",
    "Dataset",
    "Phase",
    "Ranks",
    "Recipe",
    "Schedule",
    "Scores",
    "Step",
    "epoch_order",
    "evaluate",
    "load_recipe",
    "normalise",
    "open_data",
    "presets",
    "train",
]
