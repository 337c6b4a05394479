"""What a training came to, in words: the paper's Tables 3.3 and 3.5, the method's claims, a page of Markdown."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..crops import by
from ..report.table import Column, Table, decimals

SLACK = 0.5  # points of accuracy by which the composed network may miss the random one and still count as its equal
SHOWN = {
    "accuracy.png": "Test accuracy over epochs and over training seconds (figures 3.2 and 3.6): the composed network "
    "goes on where its members ended, beside the same network from random weights.",
    "times.png": "Training time (figures 3.1 and 3.5): ten epochs of the global network and of all members together, "
    "and each strategy as a whole.",
    "features.png": "Feature maps (figure 3.7): the members' beside the same channels of the composed network, on the "
    "positions where Theorem 2.1 claims that they are equal.",
    "cam.png": "Class activation (figure 3.8): where the members, the composed and the trained network see the true "
    "class.",
}


def has(result: dict[str, Any], phase: str) -> bool:
    """Whether every seed trained "members", "global" or "random" for at least one epoch."""
    return all(run.get(phase) and run[phase]["epoch"] for run in result["runs"])


def curve(result: dict[str, Any], phase: str, key: str) -> np.ndarray | Any:
    """One list of every seed's Curve: (seeds, epochs, columns), float64; None where nothing was measured.

    A seed that stopped early keeps its last values, as a member does.
    """
    lists = [run[phase][key] for run in result["runs"]]
    if any(values is None or None in values for values in lists):  # top5 of few classes
        return None
    longest = max(map(len, lists))
    seeds = [[*values, *values[-1:] * (longest - len(values))] for values in lists]
    return np.array(seeds, dtype=float).reshape(len(seeds), longest, -1)


def tables(result: dict[str, Any]) -> list[Table]:
    """Table 3.3, Table 3.5 where there is a top-5 accuracy, and the claims of the method against what was measured."""
    return [table for table in (_networks(result), _top_five(result), _claims(result)) if table is not None]


def summary(result: dict[str, Any], pictures: Sequence[str]) -> str:
    """A page of Markdown: what was done, the tables, and the pictures, embedded by the names given."""
    data, epochs, made = result["data"], result["epochs"], result["made_with"]
    half = len(result["crops"][0]) // 2
    starts = ", ".join(f"({', '.join(map(str, crop[:half]))})" for crop in result["crops"])
    paragraph = [
        f"{result['model']} on {data['name']}: {data['train']:,} training and {data['test']:,} test images of "
        f"{by(data['input_size'])} in {data['classes']} classes.",
        f"The network was cut into K = {result['K']} members on crops of {by(result['crops'][0][half:])} pixels that "
        f"start at {starts}.",
        f"They trained for {epochs['members']} epochs and were composed; the composed network trained for "
        f"{epochs['global']} more.",
        f"The comparison trained for {epochs['random']} epochs from random weights." if has(result, "random") else "",
        f"Batches of {result['batch']}, {_seeds(result)}; `{made['command']}`, Python {made['python']}, torch "
        f"{made['torch']}, {made['precision']}, {made['device']}.",
    ]
    parts = [f"# {result['title']}\n", " ".join(filter(None, paragraph)) + "\n"]
    parts += [table.to_markdown() for table in tables(result)]
    for picture in pictures:
        stem = Path(picture).stem
        parts.append(f"![{stem}]({picture})\n\n{SHOWN.get(Path(picture).name, f'{stem}.')}\n")
    return "\n".join(parts)


def _seeds(result: dict[str, Any]) -> str:
    seeds = [str(run["seed"]) for run in result["runs"]]
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"


def _networks(result: dict[str, Any]) -> Table:
    """Table 3.3: every member, the composed network before and after its training, the one from random weights."""
    two, seeds = decimals(2), len(result["runs"])
    columns = [
        Column("network"),
        Column("epochs", lambda value: f"{value:g}"),
        Column("test\naccuracy %", two),
        Column("±", two),
        Column("best epoch's\naccuracy %", two),
        Column("training\nseconds", decimals(1)),
        Column("training\nTFLOPs", _three_digits),
        Column("images/s", decimals(0)),
    ]
    rows: list[list[Any]] = []
    spent = {phase: _spent(result, phase) for phase in ("members", "global", "random") if has(result, phase)}
    if "members" in spent:
        epochs, accuracy = spent["members"][0], curve(result, "members", "accuracy")
        for k, member in enumerate(np.moveaxis(accuracy, 2, 0), start=1):
            rows.append([f"SNet-{k}", epochs, *_reached(member), None, None, None])
        rows.append(["SNet mean", epochs, *_reached(accuracy.mean(2)), None, None, None])
        rows.append([f"SNets, all {result['K']}", epochs, None, None, None, *spent["members"][1:]])
        if once := _once(result):
            rows.append(["  one-time: compiling and measuring", None, None, None, None, once, None, None])
    rows.append(["GNet-T", 0, *_mean(_composed(result, "accuracy")), None, 0.0, 0.0, None])
    for phase, name in (("global", "GNet-T-trained"), ("random", "GNet-R-trained")):
        if phase in spent:
            reached = _reached(curve(result, phase, "accuracy")[:, :, 0])
            rows.append([name, spent[phase][0], *reached, *spent[phase][1:]])
        if phase == "global" and phase in spent and "members" in spent:
            both = [a + b for a, b in zip(spent["members"][:3], spent[phase][:3], strict=True)]
            rows.append(["  with its members", both[0], None, None, None, *both[1:], None])
    spread = f"mean and sample standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    notes = [
        f"Accuracy after the last epoch on the {result['data']['test']:,} test images, {spread}.",
        "The best epoch is chosen on the test images, as in the legends of figure 3.2, and flatters every network.",
        "Training seconds leave evaluation out, and what is compiled and measured once before the first step; the "
        "members' are those of all together. FLOPs: 2 per MAC, a training step counted as three forward passes.",
    ]
    return Table(f"{result['title']}: test accuracy and cost", columns, rows, notes)


def _spent(result: dict[str, Any], phase: str) -> tuple[float, float, float, float | None]:
    """Epochs, seconds, TFLOPs and images a second of one phase, means over the seeds."""
    seconds, images = (curve(result, phase, key)[:, -1, 0] for key in ("seconds", "images"))
    epochs = np.mean([len(run[phase]["epoch"]) for run in result["runs"]])
    rate = (images / seconds).mean().item() if (seconds > 0).all() else None
    return epochs.item(), seconds.mean().item(), result["flops"][phase] / 1e12, rate


def _once(result: dict[str, Any]) -> float:
    """Seconds before the members' first step, in which kernels are compiled and schedules measured; mean of seeds."""
    return np.mean([run["members"].get("once_seconds", [0.0])[-1] for run in result["runs"]]).item()


def _top_five(result: dict[str, Any]) -> Table | None:
    """Table 3.5: top-1 and top-5 of the global networks."""
    keys = ("accuracy", "top5")
    if any(run["composed"]["top5"] is None for run in result["runs"]):
        return None
    rows = [["GNet-T", *(number for key in keys for number in _mean(_composed(result, key)))]]
    for phase, name in (("global", "GNet-T-trained"), ("random", "GNet-R-trained")):
        if has(result, phase):
            last = (curve(result, phase, key)[:, -1, 0] for key in keys)
            rows.append([name, *(number for values in last for number in _mean(values))])
    columns = [Column("network"), *(Column(name, decimals(2)) for name in ("top-1 %", "±", "top-5 %", "± of top-5"))]
    return Table(f"{result['title']}: top-1 and top-5", columns, rows)


def _claims(result: dict[str, Any]) -> Table | None:
    """The three comparisons that the method rests on, by the means and seed by seed."""
    at = {"composed": _composed(result, "accuracy")}
    for phase in ("members", "global", "random"):
        if has(result, phase):
            at[phase] = curve(result, phase, "accuracy")[:, -1].max(1)  # of the members, the best
    rows = []
    for claim, above, below, holds, least in (
        ("composed > best member", "composed", "members", operator.gt, 0),
        ("trained composed > composed", "global", "composed", operator.gt, 0),
        (f"trained composed ≥ random − {SLACK} points", "global", "random", operator.ge, -SLACK),
    ):
        if below in at and above in at:
            ahead = (at[above] - at[below]).round(9)
            mean, times = ahead.mean().round(9).item(), int(holds(ahead, least).sum())
            verdict = "yes" if holds(mean, least) else "no"
            rows.append([claim, _text(at[above]), _text(at[below]), mean, verdict, f"{times} of {len(ahead)}"])
    columns = [
        Column("claim"),
        Column("left side %"),
        Column("right side %"),
        Column("difference\npoints", lambda value: f"{value:+.2f}"),
        Column("by the\nmeans"),
        Column("by seed"),
    ]
    return Table(f"{result['title']}: what the method claims", columns, rows) if rows else None


def _composed(result: dict[str, Any], key: str) -> np.ndarray:
    return np.array([run["composed"][key] for run in result["runs"]], dtype=float)


def _reached(accuracy: np.ndarray) -> tuple[float, float | None, float]:
    """(seeds, epochs) → mean and deviation of the last epoch, mean of the best."""
    return *_mean(accuracy[:, -1]), accuracy.max(1).mean().item()


def _mean(values: np.ndarray) -> tuple[float, float | None]:
    """The mean and the sample standard deviation; None of a single seed."""
    return values.mean().item(), values.std(ddof=1).item() if len(values) > 1 else None


def _text(values: np.ndarray) -> str:
    mean, spread = _mean(values)
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


def _three_digits(value: float) -> str:
    """Three significant digits without an exponent: 0.0312, 5.19, 1,234."""
    if not value or not math.isfinite(value):
        return f"{value:.0f}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
