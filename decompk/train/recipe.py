"""What a training is told: the network, its decomposition, and three phases. A preset is a recipe in a TOML file."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DecompkError, brief
from .augment import Augment
from .step import PRECISIONS

PRESETS = Path(__file__).parent / "presets"
OPTIMIZERS = ("sgd", "adam", "adamw")
PARALLEL = ("ddp", "fsdp")
PHASES = ("members", "global", "random")

PerMember = float | tuple[float, ...]


@dataclass(frozen=True)
class Phase:
    """How one of the three trainings runs. lr and weight_decay: one value, or one a member."""

    epochs: int
    optimizer: str = "adam"
    lr: PerMember = 1e-3
    momentum: float = 0.9  # of sgd
    weight_decay: PerMember = 0.0
    drops: tuple[tuple[int, float], ...] = ()  # (epoch, divisor): from that epoch on the rate is divided
    plateau: int = 0  # divide the rate by √10 after so many epochs without gain in accuracy; 0: never
    least_lr: float = 0.0  # what a plateau does not go below
    clip: float = 0.0  # largest norm of a member's gradient; 0: none
    patience: int = 0  # stop a member after so many epochs without gain; 0: never

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise DecompkError(f"optimizer {self.optimizer!r} is none of {', '.join(OPTIMIZERS)}; choose one.")
        for name in ("epochs", "plateau", "patience", "momentum", "clip", "least_lr"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise DecompkError(f"{name} = {getattr(self, name)} must not be negative.")
        for name in ("lr", "weight_decay"):
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if not 0 <= value < float("inf"):
                    raise DecompkError(f"{name} = {value} must not be negative.")
        if any(len(drop) != 2 or drop[1] <= 0 for drop in self.drops):
            raise DecompkError(f"drops = {list(map(list, self.drops))} must be pairs of an epoch and a divisor.")

    def of_member(self, name: str, member: int) -> float:
        """lr or weight_decay of one member."""
        value = getattr(self, name)
        return value[member] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Recipe:
    """A training by Algorithm 1: `members` train apart, are composed, and `global_` trains on; `random` is beside it.

    `random` = None leaves the comparison out. `iterations`: full batches an epoch (0: every image once).
    """

    model: str
    members: Phase
    global_: Phase
    random: Phase | None = None
    partitions: int | tuple[int, ...] = 4
    crop: int | tuple[int, ...] | None = None
    margin: int = 0
    size: int | None = None  # pixels that images are brought to; None: as they are
    batch: int = 32
    iterations: int = 0
    seeds: tuple[int, ...] = (0,)
    precision: str = "float32"
    exact: bool = False  # members in turn, each to the bit (on a CPU) what it would be if trained alone; slower
    fuse: bool = True  # the members on decompk.fuse's operators, where torch.fx can follow the network
    compile: bool = False
    graph: bool = True  # a CUDA graph of the step, where there is a GPU
    parallel: str = "ddp"  # how several processes train the global network: "ddp" or "fsdp"
    augment: Augment = field(default_factory=Augment)
    save_seconds: float = 300.0  # between checkpoints; 0: by steps alone
    save_steps: int = 0  # between checkpoints; 0: by time alone
    log_seconds: float = 5.0  # between two readings of the metrics

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise DecompkError(f"precision {self.precision!r} is none of {', '.join(PRECISIONS)}; choose one.")
        if self.parallel not in PARALLEL:
            raise DecompkError(f"parallel {self.parallel!r} is none of {', '.join(PARALLEL)}; choose one.")
        if self.batch < 2:
            raise DecompkError(f"batch = {self.batch} must be at least 2, which batch norm needs.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise DecompkError(f"seeds = {list(self.seeds)} must be one or more different numbers, none negative.")
        for name in ("iterations", "margin", "save_seconds", "save_steps", "log_seconds"):
            if getattr(self, name) < 0:
                raise DecompkError(f"{name} = {getattr(self, name)} must not be negative.")

    def phase(self, name: str) -> Phase:
        """The Phase called "members", "global" or "random"."""
        return self.global_ if name == "global" else getattr(self, name)

    def as_dict(self) -> dict[str, Any]:
        """The recipe as a TOML file would hold it."""
        return {key.rstrip("_"): value for key, value in dataclasses.asdict(self).items()}


def presets() -> tuple[str, ...]:
    """The names that --preset takes."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.toml")))


def load_recipe(
    preset: str | Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Recipe:
    """A preset by name, then a TOML file's values over it, then `changes` ("members.epochs": 3) over both.

    In the place of a preset may stand another recipe's `as_dict`.

    Raises DecompkError on an unknown preset, a file that cannot be read, an unknown key or a value of the wrong kind.
    """
    values: dict[str, Any] = {}
    if isinstance(preset, Mapping):
        _merge(values, preset)
    elif preset is not None:
        if preset not in presets():
            raise DecompkError(f"no preset is called {preset!r}; choose one of {', '.join(presets())}.")
        values = _read(PRESETS / f"{preset}.toml")
    if config is not None:
        _merge(values, _read(Path(config)))
    for key, value in (changes or {}).items():
        *tables, last = key.split(".")
        change: Any = {last: value}
        for table in reversed(tables):
            change = {table: change}
        _merge(values, change)
    return _build(Recipe, values, "")


def toml_value(text: str) -> Any:
    """'3' → 3, '[1, 2]' → [1, 2], 'true' → True; what is no TOML value is a string."""
    try:
        return _toml().loads(f"value = {text}")["value"]
    except ValueError:
        return text


def _toml() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    try:
        import tomli
    except ImportError as error:
        raise DecompkError("recipes are read with tomli on Python 3.10: pip install 'decompk[train]'.") from error
    return tomli


def _read(path: Path) -> dict[str, Any]:
    try:
        return _toml().loads(path.read_text())
    except OSError as error:
        raise DecompkError(f"the recipe {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # of TOML, or of text that is not UTF-8
        raise DecompkError(f"the recipe {path} is not TOML: {brief(error)}.") from error


def _merge(values: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = dict(value) if isinstance(value, Mapping) else value


def _build(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass from plain values, every key and type checked."""
    types_of = typing.get_type_hints(kind)
    names = {name.rstrip("_"): name for name in types_of}
    unknown = [key for key in values if key not in names]
    if unknown:
        raise DecompkError(f"the recipe has no '{where}{unknown[0]}'; known here: {', '.join(names)}.")
    arguments = {names[key]: _value(types_of[names[key]], value, where + key) for key, value in values.items()}
    needed = [f.name.rstrip("_") for f in dataclasses.fields(kind) if _required(f) and f.name not in arguments]
    if needed:
        raise DecompkError(f"the recipe lacks '{where}{needed[0]}'; give a --preset, or add it.")
    try:
        return kind(**arguments)
    except DecompkError as error:
        raise DecompkError(f"in the recipe, {where}{error}") from error


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _value(wanted: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type: lists become tuples, whole numbers floats; `false` is None where None is legal."""
    for kind in typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,):
        if kind is type(None) and (value is False or value is None):
            return None
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            return _build(kind, value, f"{where}.")
        if typing.get_origin(kind) is tuple and isinstance(value, Sequence) and not isinstance(value, str):
            inner = typing.get_args(kind)
            each = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
            if len(each) == len(value):
                return tuple(_value(t, v, where) for t, v in zip(each, value, strict=True))
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if kind in (int, bool, str) and type(value) is kind:
            return value
    wanted = str(wanted).removeprefix("<class '").removesuffix("'>").replace("decompk.train.recipe.", "")
    raise DecompkError(f"the recipe's '{where}' is {value!r}, which is no {wanted}; correct it.")
