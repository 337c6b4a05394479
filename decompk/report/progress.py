"""A bar on a terminal while something takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any


def bar(
    rounds: Iterable[Any], what: str, unit: str = "epoch", total: int | None = None, done: int = 0
) -> Iterable[Any]:
    """`rounds`, with tqdm's bar on stderr where that is a terminal and tqdm is there; `done` of `total` came before."""
    try:
        from tqdm import tqdm
    except ImportError:
        return rounds
    quiet = not sys.stderr.isatty()
    return tqdm(rounds, desc=what, unit=unit, total=total, initial=done, file=sys.stderr, disable=quiet, leave=False)
