"""A Profile as tables."""

from __future__ import annotations

from dataclasses import fields
from statistics import median
from typing import TYPE_CHECKING, Any

from ..report.decomposition import reciprocal
from ..report.table import Column, Table, decimals
from .claims import FAILS, NAMES, UNCHECKED, span
from .counters import Figures
from .sides import SIDES, Layer, LayerSide

if TYPE_CHECKING:
    from .profile import Profile


def claim_table(p: Profile) -> Table:
    """Every claim with its verdict."""
    columns = [
        Column("claim"),
        Column("measured", number),
        Column("analysed", number),
        Column("deviation", percent),
        Column("limit", percent),
        Column("verdict"),
        Column("explanation"),
    ]
    rows = [
        [c.what, c.measured, c.analysed, c.deviation, c.tolerance, c.verdict, c.explanation or None] for c in p.claims
    ]
    left_out = sum(c.verdict == UNCHECKED for c in p.claims)
    said = f"{len(p.claims) - len(p.failed) - left_out} claims hold, {len(p.failed)} fail, {left_out} are not checked."
    failed = [f"{FAILS}: {c.what}" for c in p.failed]
    return Table(f"{p.title}: claims", columns, rows, [said, *failed])


def total_table(p: Profile) -> Table:
    """Every figure of the three networks, measured and analysed, and the compulsory bytes of both passes."""
    columns = [Column("figure")]
    for side in SIDES:
        columns += [Column(f"{side}\nmeasured", decimals(0)), Column(f"{side}\nanalysed", decimals(0))]
    columns += [Column("member/global\nmeasured", reciprocal)]
    rows: list[list[Any]] = []
    for f in fields(Figures):
        values = [(getattr(p.sides[s].measured, f.name), getattr(p.sides[s].analysed, f.name)) for s in SIDES]
        ratio = values[1][0] / values[0][0] if values[0][0] else None
        rows.append([NAMES[f.name], *(v for pair in values for v in pair), ratio])
    for name, label in (("forward_bytes", "bytes moved, forward"), ("backward_bytes", "bytes moved, backward")):
        values = [getattr(p.sides[s], name) for s in SIDES]
        rows.append([label, *(v for value in values for v in (None, value)), None])
    if p.sides["global"].peak is not None:
        rows.append(["allocator's peak (bytes)", *(v for s in SIDES for v in (p.sides[s].peak, None)), None])
    notes = [
        f"One training step on {p.batch} samples. Bytes moved: each tensor once for every use; nothing here measures "
        "them. The image is what autograd keeps of the network's input."
    ]
    return Table(f"{p.title}: totals", columns, rows, notes)


def time_table(p: Profile) -> Table:
    """Whole training steps, what the roofs allow them, and how they compare."""
    columns = [
        Column("network"),
        Column("forward ms\nmedian (min–max)"),
        Column("backward ms\nmedian (min–max)"),
        Column("update ms\nmedian (min–max)"),
        Column("step ms", decimals(2)),
        Column("% of roof\nforward", decimals(0)),
        Column("% of roof\nbackward", decimals(0)),
        Column("global is\n× slower", decimals(2)),
        Column("roofs'\nratio", decimals(2)),
    ]
    rows = []
    whole, allowed = median(p.times["global"].step), sum(p.bounds["global"])
    for name, times in p.times.items():
        forward, back = p.bounds[name]
        rows.append(
            [
                name,
                *(span(values).replace(" ms", "") for values in (times.forward, times.backward, times.update)),
                1e3 * median(times.step),
                100 * forward / median(times.forward),
                100 * back / median(times.backward),
                whole / median(times.step),
                allowed / (forward + back),
            ]
        )
    notes = [
        f"By the law all {p.K} members are K = {p.K} times faster where bytes bind, K² = {p.K**2} times where FLOPs "
        "do; the roofs' ratio takes whichever binds each layer, and nothing for launches and the update. % of roof: "
        "the roofs' time over the measured. Small networks wait for launches and Python, and fit into caches.",
    ]
    return Table(f"{p.title}: time", columns, rows, notes)


def roof_table(p: Profile) -> Table:
    """What the device was measured to reach."""
    r = p.roofs
    assert r is not None
    rows: list[list[Any]] = [
        ["copy, from memory", r.bandwidth / 1e9, "GB/s"],
        [f"copy, {r.cached_bytes / 2**20:g} MiB in cache", r.cached_bandwidth / 1e9, "GB/s"],
        *([f"matrix product, {name}", rate / 1e9, "GFLOP/s"] for name, rate in r.rates.items()),
        [f"ridge, {p.dtype}", r.ridge(p.dtype), "FLOP/byte"],
    ]
    return Table(f"Roofs of {r.device}", [Column("roof"), Column("measured", decimals(1)), Column("unit")], rows)


def layer_table(p: Profile) -> Table:
    """Every layer with every figure; for programs."""
    figures = {
        "forward FLOPs": lambda s: s.flops[0],
        "backward FLOPs": lambda s: s.flops[1],
        "forward FLOPs counted": lambda s: s.counted and s.counted[0],
        "backward FLOPs counted": lambda s: s.counted and s.counted[1],
        "forward bytes": lambda s: s.moved[0],
        "backward bytes": lambda s: s.moved[1],
        "forward s": lambda s: s.seconds and s.seconds[0],
        "backward s": lambda s: s.seconds and s.seconds[1],
        "% of roof": lambda s: _of_roof(p, s),
    }
    columns = [Column(h) for h in ("layer", "kind", "role", *(f"{side} {name}" for side in SIDES for name in figures))]
    rows = []
    for layer in p.layers:
        values = [f(layer.sides[s]) if s in layer.sides else None for s in SIDES for f in figures.values()]
        rows.append([layer.name, layer.kind, layer.role, *values])
    return Table(f"{p.title}: layers", columns, rows)


def brief_layer_table(p: Profile) -> Table:
    """The layers with MACs; for readers."""
    columns = [
        Column("layer"),
        Column("role"),
        Column("MFLOPs\nglobal", decimals(1)),
        Column("MFLOPs\nmember", decimals(1)),
        Column("member/\nglobal", reciprocal),
        Column("counted"),
    ]
    if p.roofs:
        columns += [
            *(Column(f"FLOP/byte\n{side}", decimals(1)) for side in ("global", "packed")),
            *(Column(f"ms\n{side}", decimals(2)) for side in ("global", "packed")),
            *(Column(f"% of roof\n{side}", decimals(0)) for side in ("global", "packed")),
        ]
    both = [layer for layer in p.layers if layer.sides.keys() == {*SIDES}]
    rows = [_brief(p, layer) for layer in both if layer.sides["global"].flops[0]]
    notes = [
        f"Forward and backward of {p.batch} samples; each layer alone, packed: all {p.K} members. counted: torch's "
        "counter agrees with the analysis on all three networks."
    ]
    if p.roofs:
        notes.append("Above 100 % of the roof a layer's tensors stay in cache.")
    return Table(p.title, columns, rows, notes)


def _brief(p: Profile, layer: Layer) -> list[Any]:
    whole, member, packed = (layer.sides[side] for side in SIDES)
    known = [s.counted == s.flops for s in (whole, member, packed) if s.counted is not None]
    row = [layer.name, layer.role, sum(whole.flops) / 1e6, sum(member.flops) / 1e6]
    row += [sum(member.flops) / sum(whole.flops), ("yes" if all(known) else "NO") if known else None]
    if p.roofs:
        both = whole, packed
        row += [s.intensity for s in both]
        row += [s.seconds and 1e3 * sum(s.seconds) for s in both]
        row += [_of_roof(p, s) for s in both]
    return row


def _of_roof(p: Profile, side: LayerSide) -> float | None:
    """Percent: what the roof that binds each pass allows, over what was measured."""
    if p.roofs is None or side.seconds is None:
        return None
    return 100 * sum(side.bound(p.roofs, p.dtype)) / sum(side.seconds)


def number(value: float) -> str:
    """Counts in full, ratios and seconds with six digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def percent(value: float) -> str:
    """0 as "0", an exact claim's tolerance as "0", the rest in percent."""
    return "0" if abs(value) <= 1e-9 else f"{100 * value:.3g} %"
