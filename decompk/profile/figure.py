"""The roofline: every layer's FLOP/byte and FLOP/s under what the device can do."""

from __future__ import annotations

from math import exp, log
from pathlib import Path
from typing import Any

from ..errors import DecompkError
from ..report.figure import GREEN, RED, new_figure
from .profile import Profile

COLORS = {"global": GREEN, "packed": RED}
NAMED = ("first fc", "fc", "last fc")  # roles of the layers that are named: few, and far from the others


def draw_roofline(p: Profile, path: Path | str) -> None:
    """Write a PNG: a point for each layer with MACs, both passes together; its area is its share of the FLOPs.

    Raises DecompkError where no layer was timed or matplotlib is missing.
    """
    points = {side: [(n, r, s) for n, r, s in _layers(p, side) if s.rate] for side in COLORS}
    if p.roofs is None or not all(points.values()):
        raise DecompkError("a roofline needs layers that are modules, and their times: measure with time=True.")
    figure = new_figure(9, 5.6)
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of compulsory traffic", ylabel="GFLOP/s")
    drawn = [s for found in points.values() for _, _, s in found]
    x = [s.intensity for s in drawn]
    axes.set_xlim(min(x) / 2.5, max(*x, p.roofs.ridge(p.dtype)) * 2.5)
    axes.set_ylim(min(s.rate for s in drawn) / 2e9, p.roofs.rates[p.dtype] * 1.6 / 1e9)
    _cloud(axes, points["global"], COLORS["global"], "global network", "left")
    _cloud(axes, points["packed"], COLORS["packed"], f"{p.K} members, packed", "right")
    _lines(axes, p)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    name, _, setting = p.title.partition(", batch")
    figure.suptitle(f"{name}\nbatch{setting}", fontsize=11)
    figure.savefig(path, format="png")


def _layers(p: Profile, side: str) -> list[tuple]:
    return [(layer.name, layer.role, layer.sides[side]) for layer in p.layers if side in layer.sides]


def _cloud(axes: Any, found: list[tuple], color: str, label: str, side: str) -> None:
    """One network's layers, equal ones as one point, its name below them, and on one side the names of the FCs."""
    places: dict[tuple[float, float], int] = {}
    for _, _, s in found:
        at = s.intensity, s.rate / 1e9
        places[at] = places.get(at, 0) + sum(s.flops)
    whole = sum(places.values())
    x, y = zip(*places, strict=True)
    axes.scatter(x, y, s=[20 + 1500 * flops / whole for flops in places.values()], color=color, alpha=0.7, linewidths=0)
    middle = exp(sum(flops * log(at[0]) for at, flops in places.items()) / whole)
    low = min(at[1] for at in places if 0.3 < at[0] / middle < 3)
    axes.annotate(label, (middle, low), textcoords="offset points", xytext=(0, -20), ha="center", color=color, size=11)
    for name, role, s in found:
        if role in NAMED:
            shift = {"xytext": (-7, -3) if side == "right" else (7, -3), "textcoords": "offset points"}
            axes.annotate(name, (s.intensity, s.rate / 1e9), ha=side, color=color, fontsize=8, **shift)


def _lines(axes: Any, p: Profile) -> None:
    """The roofs: bandwidth of memory and of the cache, and the rate of matrix products, each with its name."""
    r, rate = p.roofs, p.roofs.rates[p.dtype] / 1e9
    left, right = axes.get_xlim()
    gray = {"color": "0.4", "fontsize": 8}
    for bandwidth, style in ((r.bandwidth / 1e9, "-"), (r.cached_bandwidth / 1e9, ":")):
        axes.plot([left, rate / bandwidth, right], [left * bandwidth, rate, rate], "0.4", linestyle=style, linewidth=1)
    slow, fast = r.bandwidth / 1e9, r.cached_bandwidth / 1e9
    at = max(left * 1.2, axes.get_ylim()[0] * 1.2 / slow)
    axes.text(at * 1.1, at * slow, f"memory: {slow:,.0f} GB/s", va="top", **gray)
    name = f"cache ({r.cached_bytes / 2**20:g} MiB): {fast:,.0f} GB/s "
    axes.text(rate / fast, rate * 1.06, name, ha="right" if rate / fast > 6 * left else "left", va="bottom", **gray)
    name = f"matrix product, {p.dtype}: {rate:,.0f} GFLOP/s"
    axes.text(right / 1.05, rate * 1.06, name, ha="right", va="bottom", **gray)
    axes.set_xlim(left, right)
