"""SplitNet's Tables 1 and 2 beside what is counted here, and the splits of its ImageNet networks, counted alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cost.figures import Cost
from ..splitnet.run import summary_of
from .paper import balanced_split, judge, paper_cells, printed_tables
from .table import Column, Table, decimals, known

# What the tables print of a split, from its cost whole and as it is left; parameters with two numbers a BN channel.
FIGURES: dict[str, Callable[[Cost, Cost], float]] = {
    "params M": lambda whole, kept: kept.params / 1e6,
    "params red. %": lambda whole, kept: 100 * (1 - kept.params / whole.params),
    "GFLOPs": lambda whole, kept: kept.flops("2mac") / 1e9,
    "FLOPs red. %": lambda whole, kept: 100 * (1 - kept.flops("2mac") / whole.flops("2mac")),
}
BALANCED = {  # settings of split_points
    "alexnet": (None, "2-4-8", "2x5"),
    "resnet18x2": (None, "1-1-2", "1-2-2", "2-2-2", "2-2-4", "2-4-8"),
}
COUNTED = "Ours: diagonal blocks of a balanced split, group sizes differing by at most one."
UNITS = "M: 10⁶ parameters, two numbers a batch norm channel. GFLOPs: 10⁹ at 2 per multiply-accumulate, one image"
TWO = decimals(2)


def networks_table(cells: list[dict] | None = None) -> Table:
    """Table 1: what each split of WRN-16-8 keeps, printed and counted; `cells` are those of paper_cells()."""
    cells = paper_cells() if cells is None else cells
    columns = [Column("network")]
    for head in (figure.replace(" red", "\nred") for figure in FIGURES):
        columns += [Column(f"{head}\nprinted"), Column(f"{head}\nours", TWO)]
    columns += [Column("test error %\nprinted"), Column("verdict")]
    rows = []
    for row in printed_tables()["splitnet printed"]["SN1"]:
        judged = _judged("SN1", row, cells)
        pairs = [value for printed, ours, _ in judged.values() for value in (printed, ours)]
        rows.append([row["row"], *pairs, row["test error %"], _verdict({f: cell[2] for f, cell in judged.items()})])
    notes = [
        f"{UNITS} of 32×32. {COUNTED}",
        "Overlapping nodes, what SSL leaves and test errors come of training alone: ours has no figure for them.",
        "The supplement's groups are learnt and need not be of equal size; its Shallow split in 2 groups has 32.54 % "
        "here and 32.44 % in Table 2.",
    ]
    return Table("Table 1 of SplitNet's supplement: WRN-16-8 on CIFAR-100", columns, rows, notes)


def groups_table(cells: list[dict] | None = None) -> Table:
    """Table 2: the Shallow split in 2, 3 and 4 groups, printed and counted; `cells` are those of paper_cells()."""
    cells = paper_cells() if cells is None else cells
    columns = [
        Column("model"), Column("groups"), Column("params\nred. %\nprinted"), Column("params\nred. %\nours", TWO),
        Column("test error %\nprinted"), Column("verdict"),
    ]  # fmt: skip
    rows = []
    for row in printed_tables()["splitnet printed"]["SN2"]:
        printed, ours, verdict = _judged("SN2", row, cells)["params red. %"]
        rows.append([row["row"], row.get("groups"), printed, ours, row["test error %"], verdict])
    return Table("Table 2 of SplitNet's supplement: WRN-16-8 in more groups", columns, rows, [COUNTED])


def balanced_table() -> Table:
    """AlexNet and ResNet-18x2 whole and in balanced splits of the forms that the supplement describes."""
    columns = [Column("network"), Column("split"), *(Column(figure, TWO) for figure in FIGURES)]
    rows = [
        [build, setting or "whole", *_counted(build, setting).values()]
        for build, settings in BALANCED.items()
        for setting in settings
    ]
    notes = [
        f"{UNITS} of 224×224. {COUNTED}",
        "The supplement prints no costs of these; it names 2-4-8 and 2x5 of alexnet, and the form a-b-c of resnet18x2.",
        "alexnet: groups of fc6, fc7 and fc8; 2x5: conv4, conv5, fc6, fc7 and fc8 in 2 groups each. The whole network "
        "is one tower, without the two groups of 2012.",
        "resnet18x2: groups of conv4-1&2, conv5-1&2 and fc; the first convolution and the projection of the first "
        "split stage read everything.",
    ]
    return Table("Balanced splits of SplitNet's networks for ImageNet, 1000 classes", columns, rows, notes)


def splitnet_report(format: str = "table", folder: Path | None = None) -> str:
    """The tables in one of FORMATS, with those of `folder`, which `decompk split` made, if one is given.

    JSON is an object of "table 1", "table 2", "balanced" and, of a folder, "learned"; CSV has an empty line between
    them. Raises DecompkError on another format and where the folder holds no result.
    """
    known(format)
    cells = paper_cells()
    tables = {"table 1": networks_table(cells), "table 2": groups_table(cells), "balanced": balanced_table()}
    if folder is not None:
        tables["learned"] = summary_of(folder)
    if format == "json":
        return json.dumps({name: table.as_object() for name, table in tables.items()}, indent=1, ensure_ascii=False)
    return "\n".join(table.render(format) for table in tables.values())


def _counted(build: str, setting: str | None) -> dict[str, float]:
    costs = balanced_split(build, setting)
    return {figure: count(*costs) for figure, count in FIGURES.items()}


def _judged(table: str, row: dict[str, Any], cells: list[dict]) -> dict[str, tuple[Any, float | None, str | None]]:
    """(printed, ours, verdict) of each of FIGURES in a printed row: those of its cell, or, where it is none, new."""
    of_item = {cell["item"]: cell for cell in cells if cell["table"] == table}
    network = printed_tables()["networks"][table].get(row.get("network"))
    found: dict[str, tuple[Any, float | None, str | None]] = {}
    for figure in FIGURES:
        cell, printed = of_item.get(f"{row.get('network')} {figure}"), row.get(figure)
        if cell is None and network and printed:
            ours = _counted(network["build"], network.get("setting"))[figure]
            cell = {"printed": printed, **judge({"ours": ours}, printed, "ours")}
        found[figure] = (cell["printed"], cell["ours"], cell["verdict"]) if cell else (printed, None, None)
    return found


def _verdict(verdicts: dict[str, str | None]) -> str | None:
    """'4 of 4 exact', or '3 of 4 exact, close: GFLOPs'; None of a row that nothing was counted of."""
    judged = {figure: verdict for figure, verdict in verdicts.items() if verdict}
    if not judged:
        return None
    missed: dict[str, list[str]] = {}
    for figure, verdict in judged.items():
        if verdict != "exact":
            missed.setdefault(verdict, []).append(figure)
    exact = len(judged) - sum(map(len, missed.values()))
    return f"{exact} of {len(judged)} exact" + "".join(f", {v}: {', '.join(names)}" for v, names in missed.items())
