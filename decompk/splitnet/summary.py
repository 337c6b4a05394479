"""The table of `decompk split`, from its result.json alone."""

from __future__ import annotations

import statistics
from typing import Any

from ..report.table import Column, Table, decimals
from .variants import DENSE


def summary(known: dict[str, Any]) -> Table:
    """A row for each network: mean and standard deviation over its seeds; costs beside the dense network's."""
    runs, settings = known["runs"], known["settings"]
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for key, run in runs.items():
        name, _, seed = key.rpartition(" ")
        by_name.setdefault(name, {})[int(seed)] = run
    rows = [_row(name, mine, by_name.get(DENSE, {})) for name, mine in by_name.items()]
    seeds = sorted({seed for mine in by_name.values() for seed in mine})
    whole, learning, tuning = settings["epochs"]
    notes = [
        f"{settings['model']} of width {settings['width']} on {settings['data']}"
        + (f" of {settings['pixels']}² pixels" if settings["pixels"] else "")
        + f", seeds {', '.join(map(str, seeds))}; epochs: {whole} whole, {learning} learning groups, {tuning} "
        "fine-tuning what is split on the block engine; dense trains as many.",
        *_verdicts(by_name),
        "fuzzy: nodes that belonged to several groups by more than 0.1 when they were split; overlap gives each of "
        "them a copy in every such group. simplex: the reduced gradient; the others are learned by softmax. even: "
        "groups of equal size.",
        "MFLOPs done: by the block engine, whose blocks are of equal size and of 8 channels or more.",
        *(["SSL: strength of the ℓ2,1 norm over filters; those that reach 0 are taken out."] if _ssl(by_name) else []),
        "Made by `decompk split`, torch {torch} on {threads} threads of {device}.".format(**known["made_with"]),
    ]
    one, two = decimals(1), decimals(2)
    columns = [
        Column("network"), Column("test\nerror %", two), Column("±", two), Column("error %\nwhen split", one),
        Column("fuzzy\n%", one), Column("settled\nat step", decimals(0)), Column("params k", one),
        Column("reduced\n%", one), Column("MFLOPs", two), Column("FLOPs\nreduced %", one), Column("MFLOPs\ndone", two),
    ]  # fmt: skip
    return Table("SplitNet", columns, rows, notes)


def _row(name: str, mine: dict[int, dict[str, Any]], dense: dict[int, dict[str, Any]]) -> list[Any]:
    errors = [run["error"] for run in mine.values()]
    row: list[Any] = [name, statistics.mean(errors), statistics.stdev(errors) if len(errors) > 1 else None]
    for key, scale in (("split", 1), ("fuzzy", 100), ("settled", 1)):
        values: list[Any] = [run.get(key) for run in mine.values()]
        row.append(None if None in values else scale * statistics.mean(values))
    for key, unit in (("params", 1e3), ("flops", 1e6)):
        left = statistics.mean(run[key] for run in mine.values())
        whole = [run[key] for seed, run in dense.items() if seed in mine]
        row += [left / unit, 100 * (1 - left / statistics.mean(whole)) if whole else None]
    return [*row, statistics.mean(run["done"] for run in mine.values()) / 1e6]


def _verdicts(by_name: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """How learned groups compare with random ones of the same layers."""
    found = []
    for name in by_name:
        setting = name.removesuffix(" random")
        hows = ("", " even", " simplex", " simplex even")
        for learned in (f"{setting}{how}" for how in hows) if name != setting else ():
            theirs = by_name.get(learned, {})
            both = [(theirs[seed]["error"], run["error"]) for seed, run in by_name[name].items() if seed in theirs]
            if both:
                means = [statistics.mean(side) for side in zip(*both, strict=True)]
                found.append(
                    f"Learned groups ({learned}) against random ones of the same layers ({name}): {means[0]:.2f} % "
                    f"error against {means[1]:.2f} %; better with {sum(a < b for a, b in both)} of {len(both)} seeds, "
                    f"equal with {sum(a == b for a, b in both)}."
                )
    return found


def _ssl(by_name: dict[str, Any]) -> bool:
    return any(name.startswith("SSL ") for name in by_name)
