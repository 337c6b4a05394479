"""What `decompk train` does with its arguments."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DecompkError
from .algorithm import begun, train
from .data import check_named
from .ranks import start, stop
from .recipe import load_recipe

FITTING = {"digits": "quick", "cifar10": "cifar", "cifar100": "cifar", "food101": "food101"}  # data → preset


def run(
    out: Path,
    data: str | None = None,
    preset: str | None = None,
    config: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    resume: bool = False,
    device: str | None = None,
    workers: int = 0,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Read the recipe, join the processes that torchrun started, train. A bare `resume` takes all from `out`."""
    base: Any = preset
    if resume and (out / "run.json").exists():
        before = begun(out)
        data = data or before["data"]
        base = base if base or config else before["recipe"]
    data = data or "digits"
    if base is None and config is None:
        base = FITTING.get(data.partition(":")[0])
        if base is None:
            check_named(data)
            raise DecompkError(f"there is no preset of its own for {data}: give --preset, or a recipe with --config.")
    recipe = load_recipe(base, config, changes)
    ranks = start(device)
    try:
        command = " ".join(["decompk", *sys.argv[1:]])
        return train(
            recipe, data, out, resume=resume, ranks=ranks, workers=workers, tensorboard=tensorboard, command=command
        )
    finally:
        stop(ranks)
