"""Bars on a terminal while something takes long."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


def tqdm_on(stream: TextIO) -> type | None:
    """tqdm's bar; None where `stream` is no terminal or tqdm is not installed."""
    if not stream.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


def bar(
    rounds: Iterable[Any], what: str, unit: str = "epoch", total: int | None = None, done: int = 0
) -> Iterable[Any]:
    """`rounds`, with a bar on stderr where there can be one; `done` of `total` came before."""
    tqdm = tqdm_on(sys.stderr)
    if tqdm is None:
        return rounds
    return tqdm(rounds, desc=what, unit=unit, total=total, initial=done, file=sys.stderr, leave=False)


@contextmanager
def naming(wanted: bool) -> Iterator[Callable[[str], None]]:
    """What to call with the name of what is done next: a bar on stderr shows it, where it is wanted and can be."""
    tqdm = tqdm_on(sys.stderr) if wanted else None
    if tqdm is None:
        yield lambda text: None
        return
    with tqdm(file=sys.stderr, bar_format="{desc} ({elapsed})", leave=False) as bar:
        yield bar.set_description
