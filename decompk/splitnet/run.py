"""`decompk split`: a wide residual network on real digits, whole, and split as the supplement splits WRN-16-8."""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import cost, models
from ..cache import processor
from ..errors import DecompkError
from ..progress import bar
from ..report.table import Column, Table, decimals
from ..train.augment import normalise
from ..train.checkpoint import write_atomically
from ..train.data import Dataset, epoch_order, open_data
from ..train.evaluate import evaluate
from .assignment import Assignment
from .learn import Gammas, learn
from .nodes import Nodes
from .split import Split, split

# Layer → groups, as in the supplement's section 4.1. What a split's first layers read belongs to all groups.
LATE = ("layer3.0.conv2", "layer3.1.conv1", "layer3.1.conv2", "fc")
EARLY = ("layer2.0.conv2", "layer2.1.conv1", "layer2.1.conv2", "layer3.0.conv1", "layer3.0.projection")
SPLITS = {
    "FC": {"fc": 4},
    "Shallow": dict.fromkeys(LATE, 2),
    "Deep": dict.fromkeys((*EARLY, *LATE), 2),
    "Hierarchical": dict.fromkeys(EARLY, 2) | dict.fromkeys(LATE, 4),
    "Random": dict.fromkeys((*EARLY, *LATE), 2),
}
DENSE = "dense"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """width: filters of the first stage. epochs: of the whole network, of learning groups, of fine-tuning the split."""

    width: int = 2
    epochs: tuple[int, int, int] = (6, 8, 6)
    pixels: int = 16
    batch: int = 64
    lr: float = 1e-3
    assignment_lr: float = 0.1
    gammas: Gammas = Gammas(weights=1e-2, disjoint=1e-2, balance=1e-3)


def run(out: Path, seeds: tuple[int, ...] = (0, 1, 2), settings: Settings | None = None) -> Table:
    """Train every variant for every seed; the folder `out` gets result.json, summary.md and each network's weights.

    What result.json holds already, made by the same settings, is not trained again. Raises DecompkError where `out` is
    of other settings or cannot be written.
    """
    settings = settings or Settings()
    file, known = out / "result.json", {"settings": dataclasses.asdict(settings), "runs": {}}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if file.exists():
            before = json.loads(file.read_text())
            if before["settings"] != json.loads(json.dumps(known["settings"])):
                raise DecompkError(f"{str(out)!r} holds a result of other settings: give another folder.")
            known = before
    except OSError as error:
        raise DecompkError(f"{str(out)!r} cannot be used as a folder ({error.strerror}).") from error
    known.setdefault(
        "made_with", {"torch": torch.__version__, "device": processor()[0], "threads": torch.get_num_threads()}
    )
    data = open_data("digits", settings.pixels)
    for seed in seeds:
        trained = None
        for name in (DENSE, *SPLITS):
            if f"{name} {seed}" in known["runs"]:
                continue
            trained = trained or _pretrained(settings, data, seed)
            found, net = _variant(name, copy.deepcopy(trained), settings, data, seed)
            torch.save(net.state_dict(), out / f"{name.lower()}-seed{seed}.pt")
            known["runs"][f"{name} {seed}"] = found
            write_atomically(file, json.dumps(known, indent=1).encode())
    write_atomically(file, json.dumps(known, indent=1).encode())
    table = summary(known["runs"], seeds, settings, known["made_with"])
    (out / "summary.md").write_text(table.to_markdown(), encoding="utf-8")
    return table


def _pretrained(settings: Settings, data: Dataset, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = models.wrn_16_8(len(data.classes), data.input_size, settings.width)
    _train(net, _batches(settings, data, settings.epochs[0], seed, f"seed {seed}, whole network"), settings)
    return net


def _variant(
    name: str, net: nn.Module, settings: Settings, data: Dataset, seed: int
) -> tuple[dict[str, Any], nn.Module]:
    """What result.json says of one network, and the network, dense with zeros."""
    _, learning, tuning = settings.epochs

    def batches(epochs: int, what: str, offset: int) -> Iterator[tuple[Tensor, Tensor]]:
        return _batches(settings, data, epochs, seed + offset, f"seed {seed}, {name}: {what}")

    size = data.input_size
    if name == DENSE:
        _train(net, batches(learning, "trains on", 1000), settings)
        _train(net, batches(tuning, "trains on", 2000), settings)
        return {**_cost(net, size, {}), "error": _error(net, data)}, net
    assignment = Assignment(Nodes(net, size), SPLITS[name], seed=seed)
    settled = None
    if name == "Random":
        _train(net, batches(learning, "trains on", 1000), settings)
        deal(assignment, seed)
    else:
        steps = batches(learning, "learns groups", 1000)
        settled = learn(net, assignment, steps, F.cross_entropy, settings.gammas, settings.lr, settings.assignment_lr)
    whole = _error(net, data)
    result: Split = split(net, assignment)
    found = {"before": whole, "split": _error(result.dense, data), "settled": settled, "fuzzy": assignment.fuzzy()}
    fast = result.fast(size)
    _train(fast, batches(tuning, "fine-tunes", 2000), settings)
    return {**found, **_cost(result.dense, size, result.masks), "error": _error(fast, data)}, result.dense


def deal(assignment: Assignment, seed: int) -> None:
    """Hard, random, even groups: of every set of nodes that layers share, each group gets as many."""
    rng = np.random.default_rng(seed)
    nodes = assignment.nodes
    for path in assignment.groups:
        for side in (nodes.sides(path).outputs, nodes.sides(path).inputs):
            for level in np.unique(assignment.level[side.nodes]) if side is not None else ():
                if level:
                    mine = np.unique(side.nodes[assignment.level[side.nodes] == level])
                    assignment.put(int(level), mine, rng.permutation(len(mine)) % level)


def _train(net: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], settings: Settings) -> None:
    optimizer = torch.optim.Adam(net.parameters(), settings.lr)
    net.train()
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def _batches(settings: Settings, data: Dataset, epochs: int, seed: int, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in bar(range(epochs), what):
        for x, y in data.train.batches(epoch_order(len(data.train), settings.batch, seed, epoch), CPU):
            yield normalise(x, data.mean), y


def _error(net: nn.Module, data: Dataset) -> float:
    return 100 - evaluate(net, data, CPU).accuracy[0]


def _cost(net: nn.Module, size: tuple[int, ...], masks: dict[str, Tensor]) -> dict[str, float]:
    """Parameters, and FLOPs of one image at 2 per multiply-accumulate, without what `masks` leaves out."""
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    kept = {name.removesuffix(".weight"): mask.double().mean().item() for name, mask in masks.items()}
    flops = sum(2 * layer.macs * kept.get(layer.name, 1) for layer in cost.layers(net, size))
    return {"params": sum(p.numel() for p in net.parameters()) - zeros, "flops": flops}


def summary(
    runs: dict[str, dict[str, Any]], seeds: tuple[int, ...], settings: Settings, made_with: dict[str, Any]
) -> Table:
    """A row for each network: mean and standard deviation over the seeds."""
    whole = [runs[f"{DENSE} {seed}"] for seed in seeds]
    rows: list[list[Any]] = []
    for name in (DENSE, *SPLITS):
        mine = [runs[f"{name} {seed}"] for seed in seeds]
        errors = [run["error"] for run in mine]
        sizes = [[statistics.mean(run[key] for run in side) for side in (mine, whole)] for key in ("params", "flops")]
        spread = statistics.stdev(errors) if len(errors) > 1 else None
        cells = [cell for part, of in sizes for cell in (part, 100 * (1 - part / of))]
        split_ = None if name == DENSE else statistics.mean(run["split"] for run in mine)
        fuzzy = None if name == DENSE else 100 * statistics.mean(run["fuzzy"] for run in mine)
        rows.append(
            [name, statistics.mean(errors), spread, split_, fuzzy, cells[0] / 1e3, cells[1], cells[2] / 1e6, cells[3]]
        )
    better = sum(runs[f"Deep {seed}"]["error"] < runs[f"Random {seed}"]["error"] for seed in seeds)
    equal = sum(runs[f"Deep {seed}"]["error"] == runs[f"Random {seed}"]["error"] for seed in seeds)
    notes = [
        f"WRN-16-8 of width {settings.width} on digits of {settings.pixels}² pixels, {len(seeds)} seeds; epochs: "
        f"{settings.epochs[0]} whole, {settings.epochs[1]} learning groups, {settings.epochs[2]} fine-tuning the split "
        "network on the block engine; dense trains as many.",
        f"Learned groups (Deep) against random ones of the same layers: better with {better} seeds of {len(seeds)}, "
        f"equal with {equal}.",
        "fuzzy: nodes that belonged to several groups by more than 0.1 when they were split.",
        "Made by `decompk split`, torch {torch} on {threads} threads of {device}.".format(**made_with),
    ]
    one, two = decimals(1), decimals(2)
    columns = [
        Column("network"), Column("test\nerror %", two), Column("±", two), Column("error %\nwhen split", one),
        Column("fuzzy\n%", one), Column("params k", one), Column("reduced\n%", one), Column("MFLOPs", two),
        Column("FLOPs\nreduced %", one),
    ]  # fmt: skip
    return Table("SplitNet on digits", columns, rows, notes)
