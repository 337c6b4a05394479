"""Types of arguments that the tools share: argparse ends with exit code 2 and the sentence where one is wrong."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def between(kind: type, least: float, most: float = float("inf")) -> Callable[[str], float]:
    """A type for argparse: numbers of a kind, int or float, from least to most."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            whole = "a whole number" if kind is int else "a number"
            limits = f"of at least {least}" if most == float("inf") else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"'{text}' is not {whole} {limits}")
        return value

    return read
