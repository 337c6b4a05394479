"""Every analytic number the papers print, computed here: Tables 2.1, 2.2, 3.1, 3.4 and SplitNet's Tables 1 and 2."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import ROUND_DOWN, Decimal
from functools import cache, partial
from importlib.resources import files
from typing import Any

import torch

from .. import models
from ..cost.figures import CONVENTIONS, Cost, LayerCost, Shape, total
from ..cost.formulas import conv_weights
from ..cost.walk import layers
from ..splitnet.points import split_points
from .table import Column, Table, known

CLOSE = 0.05  # relative deviation up to which a miss may still be called close

PARAMS: dict[str, Callable[[Cost], int]] = {
    "2 numbers a BN channel": lambda c: c.params,
    "4 numbers a BN channel": lambda c: c.params + c.statistics,
}
HITS = ("exact", "exact (truncated)")


def paper_cells() -> list[dict[str, str | float]]:
    """One dict per printed cell: table, item, printed, ours, convention, verdict.

    `ours` is counted on the networks of decompk.models, at full precision. The papers do not say how they count, so
    each table's FLOPs, and its parameters, are counted under every convention known here, and the one that rounds to
    most of the table's cells is taken for all of them. The verdict on a cell is then
    - "exact": ours, rounded to the printed digits, is the print;
    - "exact (truncated)": ours, cut off after the printed digits, is the print, and at most 5 % off (that 0.138 could
      be cut to 0.13 confirms nothing);
    - "unexplained": a miss by more than 5 %, or one that another convention would hit: that convention does not fit the
      rest of the table, so the table contradicts itself and no single convention explains it;
    - "close": any other miss, at most 5 % off, which no convention known here hits.
    """
    data = printed_tables()
    values = [_values(data["networks"][table][network], figure) for table, network, figure, _ in data["cells"]]
    groups: dict[tuple[str, bool], list[tuple[dict[str, float], str]]] = defaultdict(list)
    for (table, _, figure, printed), value in zip(data["cells"], values, strict=True):
        groups[table, "params" in figure].append((value, printed))
    best = {group: max(cells[0][0], key=partial(_fit, cells=cells)) for group, cells in groups.items()}
    return [
        {
            "table": table,
            "item": f"{network} {figure}",
            "printed": printed,
            **judge(
                value, printed, best[table, "params" in figure], _setting(data["networks"][table][network], figure)
            ),
        }
        for (table, network, figure, printed), value in zip(data["cells"], values, strict=True)
    ]


def paper_table(cells: list[dict] | None = None) -> Table:
    """The cells as a Table."""
    columns = [
        Column("table"),
        Column("item"),
        Column("printed"),
        Column("ours", lambda value: f"{value:.6g}"),
        Column("verdict"),
        Column("convention"),
    ]
    cells = paper_cells() if cells is None else cells
    rows = [[cell[column.header] for column in columns] for cell in cells]
    verdicts = [cell["verdict"] for cell in cells]
    summary = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    notes = [
        f"{len(cells)} cells: {summary}. M: 10⁶ parameters. GFLOPs: 10⁹, one sample, forward.",
        "paper-profiler: 2 per MAC + w per kernel weight + bias adds + residual adds and pooling (k·k an output).",
        "Parameters: kernels, biases and, for a BN channel, scale and shift (2) or running mean and variance too (4).",
        "Table 2.2 is counted at 224 pixels; at the 214 of its caption VGG16 would have 111 M parameters. The crop of "
        "8 partitions is not printed; 96 fits.",
        "SN1, SN2: SplitNet's supplement; a balanced split keeps diagonal blocks whose sizes differ by at most one.",
    ]
    return Table("Printed in the papers, and counted here", columns, rows, notes)


def vgg_table() -> Table:
    """Table 2.1: output and kernel sizes of VGG16 and of its sub-network in 4 partitions, printed and counted."""
    data = printed_tables()
    ours = zip(*(_table21_rows(data["networks"]["2.2"][name]) for name in ("VGG16", "VGG16-sub")), strict=True)
    heads = ("output global", "output sub-net", "kernel global", "kernel sub-net")
    rows = []
    for number, (printed, ((out, kernel), (sub_out, sub_kernel))) in enumerate(
        zip(data["table 2.1"], ours, strict=True)
    ):
        counted = [out, sub_out, kernel, sub_kernel]
        rows.append([f"layer {number + 1}", *counted, "exact" if counted == printed else f"printed {printed}"])
    return Table("Table 2.1: VGG16 in 4 partitions", [Column(head) for head in ("layer", *heads, "verdict")], rows)


def paper_report(format: str = "table") -> str:
    """All of it in one of FORMATS: JSON is a list of the cells, CSV a line a cell; text and Markdown add Table 2.1.

    Raises DecompkError on another format.
    """
    known(format)
    cells = paper_cells()
    if format == "json":
        return json.dumps(cells, indent=1, ensure_ascii=False)
    if format == "csv":
        return paper_table(cells).to_csv()
    return "\n".join(table.render(format) for table in (paper_table(cells), vgg_table()))


@cache
def printed_tables() -> dict:
    """What paper_tables.json holds: the papers' networks, and what the papers print of them."""
    return json.loads(files(__package__).joinpath("paper_tables.json").read_text("utf-8"))


def _walk(network: dict) -> list[LayerCost]:
    return _walked(network["build"], json.dumps(network.get("options", {})))


@cache
def _walked(name: str, options: str) -> list[LayerCost]:
    given = json.loads(options)
    with torch.device("meta"):
        model = models.build(name, **given)
    return layers(model, given.get("input_size", models.spec(name).input_size))


def _values(network: dict, figure: str) -> dict[str, float]:
    """The figure under every convention that could be meant, in the printed unit."""
    whole, split = balanced_split(network["build"], network.get("setting"), **network.get("options", {}))
    conventions = PARAMS if "params" in figure else CONVENTIONS
    if figure.endswith("red. %"):
        return {name: 100 * (1 - count(split) / count(whole)) for name, count in conventions.items()}
    scale = 1e6 if "params" in figure else 1e9
    return {name: count(split) / scale for name, count in conventions.items()}


def balanced_split(build: str, setting: str | None = None, **options: Any) -> tuple[Cost, Cost]:
    """A registered network's cost for one sample, whole, and with the diagonal blocks alone of a balanced split.

    `setting` is one of `split_points`, None for no split; the sizes of a layer's groups differ by at most one.
    """
    walked = _walk({"build": build, "options": options})
    groups, whole_inputs = split_points(build, setting) if setting else ({}, ())
    blocks = {path: count for path, count in groups.items() if path not in whole_inputs}
    return total(walked), total(_split(layer, blocks.get(layer.name, 1)) for layer in walked)


def _split(layer: LayerCost, groups: int) -> LayerCost:
    """A layer that keeps the diagonal blocks of a balanced split, whose group sizes differ by at most one."""
    if groups == 1:
        return layer
    c_in, c_out = layer.in_shape[0], layer.out_shape[0]
    sizes = [[c // groups + (g < c % groups) for g in range(groups)] for c in (c_in, c_out)]
    kept = sum(conv_weights(i, o, layer.kernel) for i, o in zip(*sizes, strict=True))
    dropped = layer.kernel_weights - kept
    return replace(layer, macs=kept * layer.positions, kernel_weights=kept, params=layer.params - dropped)


def _hit(ours: float, printed: str) -> str | None:
    digits = Decimal(printed)
    if Decimal(ours).quantize(digits) == digits:
        return HITS[0]
    return HITS[1] if Decimal(ours).quantize(digits, ROUND_DOWN) == digits and _near(ours, printed) else None


def _near(ours: float, printed: str) -> bool:
    return abs(ours - float(printed)) <= CLOSE * abs(float(printed))


def _fit(convention: str, cells: list[tuple[dict[str, float], str]]) -> tuple[int, ...]:
    """How many cells a convention rounds to, then how many it truncates to: the greater, the better it fits a table."""
    hits = [_hit(values[convention], printed) for values, printed in cells]
    return tuple(hits.count(hit) for hit in HITS)


def _setting(network: dict, figure: str) -> str:
    """What else a number depends on: the input size of FLOPs, and a split's form."""
    height, width = network.get("options", {}).get("input_size", models.spec(network["build"]).input_size)[1:]
    pixels = "" if "params" in figure else f" at {height}×{width}"
    return pixels + (", balanced split" if "setting" in network else "")


def judge(values: dict[str, float], printed: str, best: str, setting: str = "") -> dict[str, str | float]:
    """ours, convention and verdict of one cell whose table is counted under convention `best`."""
    ours, convention = values[best], best + setting
    verdict = _hit(ours, printed)
    if verdict is None:
        others = [name for name, value in values.items() if _hit(value, printed)]
        verdict = "close" if _near(ours, printed) and not others else "unexplained"
        if others:
            convention += f", which fits the rest of the table; this cell is hit by {', '.join(others)}"
    return {"ours": ours, "convention": convention, "verdict": verdict}


def _table21_rows(network: dict) -> list[tuple[str, str]]:
    """(output, kernel) of every layer with a kernel, as Table 2.1 writes them: H×W×C and t1×t2×c_in×c_out."""
    rows: list[tuple[str, str]] = []
    last_map: Shape = (1, 1, 1)
    kernel: Sequence[int]
    for layer in _walk(network):
        if layer.kind in ("conv", "linear"):
            if layer.kind == "conv":
                (c_in, *_), kernel, out = layer.in_shape, layer.kernel, _last(layer.out_shape)
            else:  # a convolution whose receptive field is its whole input
                c_in, *kernel = last_map
                out = (1, 1, *layer.out_shape)
            rows.append(("×".join(map(str, out)), "×".join(map(str, (*kernel, c_in, layer.out_shape[0])))))
        last_map = layer.out_shape if len(layer.out_shape) == 3 else (*layer.out_shape, 1, 1)
    return rows


def _last(shape: Shape) -> Shape:
    return (*shape[1:], shape[0])
