"""Tuned tables: for each GPU a file of what tools/tune.py measured, and how a Choice is kept in it."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, replace
from pathlib import Path

from ..errors import BackendError
from . import conv
from .cache import slug
from .conv.form import Choice
from .device import Device
from .problem import Config, Problem, key_of
from .timer import is_a_time

TABLES = Path(__file__).parent / "configs"


def table_path(device: Device) -> Path:
    """Where `tools/tune.py` writes what it measured on `device`."""
    return TABLES / f"{slug(device.name)}.json"


@functools.lru_cache
def table(device: Device) -> dict[str, dict]:
    """The tuned entries for `device`: key → {"backend", "form", "config", "ms"}; empty where none is whole."""
    try:
        return dict(json.loads(table_path(device).read_text())["entries"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # without a table, the model decides
        return {}


def lookup(problem: Problem, device: Device) -> Choice | None:
    """The measured winner for exactly this problem, if it is in the table, still legal, and built here."""
    try:
        choice = choice_of(table(device)[key_of(problem)])
        if choice.form.missing() or choice.form.why_not(problem, choice.config, device):
            return None
        predicted = choice.form.predict(problem, choice.config, device)
        return replace(choice, cost=predicted.cost, terms=predicted.terms)
    except (BackendError, KeyError, TypeError, ValueError, AttributeError):  # none, or none of this version
        return None


def entry_of(choice: Choice) -> dict:
    """A Choice as a table keeps it."""
    config = choice.config and asdict(choice.config)
    return {"backend": choice.backend, "form": choice.form.name, "config": config, "ms": choice.ms}


def choice_of(entry: dict) -> Choice:
    """The Choice that a table keeps as `entry`; raises BackendError for names that nobody has and no numbers."""
    config, ms = entry["config"], entry["ms"]
    if config is not None:
        config = Config(**{**entry["config"], "tile": tuple(entry["config"]["tile"])})
        sizes = *config.tile, config.block_in, config.block_out, config.warps, config.stages, config.splits
        if len(sizes) != 8 or any(type(size) is not int for size in sizes):
            raise BackendError(f"{config} is not made of eight whole numbers.")
    if not is_a_time(ms):
        raise BackendError(f"{ms} is no time in ms.")
    form = conv.named(entry["form"], entry["backend"])
    if form.configurable != (config is not None) or (config and config.form != form.name):
        raise BackendError(f"the form '{form.name}' of backend '{form.backend}' does not take {config}.")
    return Choice(form, config, ms, "measured when tuned")
