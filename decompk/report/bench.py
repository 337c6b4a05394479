"""The bench as a page: result files of `pytest bench` → tables and plots of decompk beside its peers."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from ..errors import DecompkError
from ..kernels.cache import slug
from .figure import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, YELLOW, new_figure
from .table import Column, Table, decimals

PAPER_SECONDS = {1: 2723, 4: 1347, 8: 987, 16: 1277}  # Table 3.4, ResNet50 on one GPU: ten epochs of all K members
PARTS = {  # of the bench, in the page's order
    "training": "training steps",
    "ensembles": "training steps of ensembles",
    "K": "training steps by K",
    "batch": "training steps by batch",
    "recurrent": "recurrent training steps",
    "layers": "convolutions",
    "composed": "inference of composed networks",
    "split": "training steps of split networks",
}
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COLORS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, YELLOW, BLACK)

# ---- what was measured ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One contestant of one race, as the bench's `extra_info` has it; `seconds` of one run, one for every round."""

    part: str
    case: str
    contestant: str
    side: str  # ours, peer, global
    seconds: tuple[float, ...]
    network: str
    K: int
    batch: int
    bytes: float
    flops: float
    roof_percent: float | None = None
    layer: str | None = None
    count: int = 1  # how often a member has this layer

    @staticmethod
    def of(info: dict[str, Any]) -> Entry:
        fields = {name: info[name] for name in Entry.__dataclass_fields__ if name in info}
        return Entry(**{**fields, "seconds": tuple(info["seconds"])})

    @property
    def ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """Of two contestants' times, round by round: median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Ratio:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [*values]
        return Ratio(median, low, high)

    @property
    def spread(self) -> str:
        return f"{self.low:.2f}–{self.high:.2f}"

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.spread})"


def faster(ours: Entry, other: Entry) -> Ratio:
    """How often `ours` runs while `other` runs once; both were timed in turns, so rounds are compared one by one."""
    return Ratio.of([b / a for a, b in zip(ours.seconds, other.seconds, strict=False)])


@dataclass(frozen=True)
class Standing:
    """A race's outcome: the fastest of ours and of the peers, by their medians."""

    ours: Entry
    peer: Entry

    @property
    def ratio(self) -> Ratio:
        return faster(self.ours, self.peer)


def races(entries: Iterable[Entry], part: str) -> list[list[Entry]]:
    """The entries of one part, a list for every case."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.part == part:
            found.setdefault(entry.case, []).append(entry)
    return list(found.values())


def _fastest(entries: Iterable[Entry], side: str) -> Entry | None:
    return min((e for e in entries if e.side == side), key=lambda e: e.ms, default=None)


def standings(entries: Iterable[Entry], part: str) -> list[Standing]:
    """One for every case of `part` in which both sides were timed."""
    pairs = ((_fastest(race, "ours"), _fastest(race, "peer")) for race in races(entries, part))
    return [Standing(ours, peer) for ours, peer in pairs if ours and peer]


# ---- tables ---------------------------------------------------------------------------------------------------------

MS = decimals(2)


def summary(entries: Sequence[Entry], parts: Sequence[str] = tuple(PARTS)) -> Table:
    """A row for every case of `parts`, one for every network's layers, and the geometric mean of every part."""
    rows: list[list[Any]] = []
    for part, title in PARTS.items():
        found = standings(entries, part)
        if part in parts:
            rows += _of_layers(found) if part == "layers" else [_row(standing) for standing in found]
        if found:
            mean = geometric_mean(s.ratio.median for s in found)
            rows.append([f"{title}: geometric mean of {len(found)}", None, None, None, None, mean, None])
    columns = [
        *(Column("case"), Column("ours"), Column("ms", MS), Column("best peer"), Column("its ms", MS)),
        *(Column("peer ÷ ours", decimals(2)), Column("quartiles")),
    ]
    return Table("decompk beside its fastest peer", columns, rows)


def _row(standing: Standing) -> list[Any]:
    ours, peer, ratio = standing.ours, standing.peer, standing.ratio
    return [ours.case, ours.contestant, ours.ms, peer.contestant, peer.ms, ratio.median, ratio.spread]


def _of_layers(found: list[Standing]) -> list[list[Any]]:
    """A row for each network: times of one pass through all its layers, mean and quartiles of the layers' ratios."""
    rows = []
    for network in dict.fromkeys(s.ours.network for s in found):
        mine = [s for s in found if s.ours.network == network]
        ours, peers = (
            sum(e.count * e.ms for e in side) for side in zip(*((s.ours, s.peer) for s in mine), strict=True)
        )
        ratios = [s.ratio.median for s in mine]
        name = f"{network}, {len(mine)} distinct convolutions"
        spread = Ratio.of(ratios).spread
        rows.append([name, "ours", ours, "the best for each", peers, geometric_mean(ratios), spread])
    return rows


def peers(entries: Sequence[Entry], part: str) -> Table:
    """How much faster the fastest of ours is than everybody else, case by case."""
    found = [(ours, race) for race in races(entries, part) if (ours := _fastest(race, "ours"))]
    ratios = {(e.case, e.contestant): faster(ours, e) for ours, race in found for e in race if e.side == "peer"}
    names = list(dict.fromkeys(name for _, name in ratios))
    rows = [[ours.case, *(_text(ratios.get((ours.case, name))) for name in names)] for ours, _ in found]
    medians = ([ratio.median for (_, other), ratio in ratios.items() if other == name] for name in names)
    rows.append(["geometric mean", *(f"{geometric_mean(column):.2f}" for column in medians)])
    return Table(f"Time of each peer ÷ ours, {PARTS[part]}", [Column(name) for name in ("case", *names)], rows)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


@dataclass(frozen=True)
class Gain:
    """Global network over all K members, in time and in what each has to move and to compute."""

    ours: Entry
    whole: Entry

    @property
    def ratio(self) -> Ratio:
        return faster(self.ours, self.whole)

    @property
    def paper(self) -> float | None:
        """Table 3.4's ratio, where it has this network and K."""
        known = self.ours.network.startswith("resnet50") and self.ours.K > 1
        return PAPER_SECONDS[1] / PAPER_SECONDS[self.ours.K] if known and self.ours.K in PAPER_SECONDS else None


def gains(entries: Sequence[Entry]) -> list[Gain]:
    """Of every case in which the global network was timed too; by network and K."""
    found = []
    for race in (race for part in ("training", "K") for race in races(entries, part)):
        ours, whole = _fastest(race, "ours"), _fastest(race, "global")
        if ours and whole:
            found.append(Gain(ours, whole))
    return sorted(found, key=lambda gain: (gain.ours.network, gain.ours.batch, gain.ours.K))


def gains_table(entries: Sequence[Entry]) -> Table:
    """Global network over all K members, beside Table 3.4 and what bytes and FLOPs allow."""
    rows = [
        [
            *(g.ours.case, g.ours.K, g.whole.ms, g.ours.ms, g.ratio.median, g.ratio.spread, g.paper),
            *(g.whole.bytes / g.ours.bytes, g.whole.flops / g.ours.flops),
        ]
        for g in gains(entries)
    ]
    columns = [
        *(Column("case"), Column("K"), Column("global ms", MS), Column("K members ms", MS)),
        *(Column("global ÷ members", decimals(2)), Column("quartiles"), Column("paper's Table 3.4", decimals(2))),
        *(Column("bytes ratio", decimals(1)), Column("FLOPs ratio", decimals(1))),
    ]
    notes = ["bytes ratio: the limit where memory binds; K where crops do not overlap and activations outweigh weights"]
    return Table("Global network ÷ all K members, one training step", columns, rows, notes)


def layers_table(entries: Sequence[Entry]) -> Table:
    """Every distinct convolution: how near it comes to what the machine reaches, ours and the best peer."""
    rows = [
        [
            *(s.ours.network, s.ours.layer, s.ours.ms, s.ours.roof_percent),
            *(s.peer.contestant, s.peer.ms, s.peer.roof_percent, s.ratio.median, s.ratio.spread),
        ]
        for s in standings(entries, "layers")
    ]
    percent = decimals(1)
    columns = [
        *(Column("network"), Column("layer"), Column("ours ms", MS), Column("% of roof", percent)),
        *(Column("best peer"), Column("its ms", MS), Column("its % of roof", percent)),
        *(Column("peer ÷ ours", decimals(2)), Column("quartiles")),
    ]
    return Table("Convolutions, forward and backward", columns, rows)


# ---- result files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One result file: a machine, what was run there, and what came out."""

    machine: dict[str, Any]
    command: str
    commit: str
    date: str
    entries: list[Entry]
    left_out: list[dict[str, str]]

    @property
    def device(self) -> str:
        return self.machine["device"]

    def made_with(self) -> str:
        """Command, versions, roofs and commit, in a sentence."""
        m = self.machine
        versions = [f"torch {m['torch']}", f"Python {m['python_version']}"]
        versions += [f"{name} {m[key]}" for key, name in (("cuda", "CUDA"), ("cudnn", "cuDNN")) if m.get(key)]
        versions += [f"driver {m['driver']}"] if m.get("driver") else []
        threads = "" if m.get("cuda") else f" on {m['threads']} threads"
        return (
            f"`{self.command}` on {self.device}, {self.date}, commit {self.commit[:12]}: {', '.join(versions)}, "
            f"{m['precision']}{threads}; a copy reaches {m['copy_gbps']:,.0f} GB/s, a matrix product "
            f"{m['matmul_gflops']:,.0f} GFLOP/s."
        )


def read(paths: Sequence[Path]) -> list[Run]:
    """Result files, and every bench.json below folders. Raises DecompkError for what is no result of the bench."""
    files: list[Path] = []
    for path in map(Path, paths):
        below = sorted(path.rglob("bench.json")) if path.is_dir() else [path]
        if not below:
            raise DecompkError(f"there is no bench.json in {path}; make one with `pytest bench --benchmark-only`.")
        files += below
    return [_read(path) for path in files]


def _read(path: Path) -> Run:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        commit = known["commit_info"]["id"] or "unknown"
        entries = [Entry.of(b["extra_info"]) for b in known["benchmarks"] if "part" in b["extra_info"]]
        run = Run(known["machine_info"], known["command"], commit, known["datetime"][:10], entries, known["left_out"])
        run.made_with()
    except OSError as error:
        raise DecompkError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DecompkError(
            f"{path} is no result of the bench: {type(error).__name__} {error}; make one with "
            "`pytest bench --benchmark-only`."
        ) from error
    if not entries:
        raise DecompkError(f"{path} holds no race; make a result with `pytest bench --benchmark-only`.")
    return run


def side_by_side(runs: Sequence[Run], parts: Sequence[str] = ("training", "ensembles", "split")) -> Table:
    """A row for every case of `parts` and the geometric mean of every part; three columns for every device.

    A case that a device has run several times stands there as it came out last.
    """
    devices = list(dict.fromkeys(run.device for run in runs))
    found: dict[tuple[str, str], dict[str, Standing]] = {}  # part and device → case → its outcome
    for run in sorted(runs, key=lambda run: run.date):
        for part in PARTS:
            new = {standing.ours.case: standing for standing in standings(run.entries, part)}
            found.setdefault((part, run.device), {}).update(new)
    rows: list[list[Any]] = []
    for part, title in PARTS.items():
        on = [found[part, device] for device in devices]
        if part in parts:
            cases = list(dict.fromkeys(case for standings in on for case in standings))
            rows += [[case, *(cell for standings in on for cell in _cells(standings.get(case)))] for case in cases]
        means = [_mean(standings.values()) for standings in on]
        if any(means):
            rows.append([f"{title}: geometric mean", *(cell for mean in means for cell in (mean, None, None))])
    names = [device.removeprefix("CPU ") for device in devices]
    heads = (Column("peer ÷ ours"), Column("ours ms", MS), Column("best peer"))
    columns = [replace(head, header=f"{name}:\n{head.header}") for name in names for head in heads]
    return Table("decompk beside its fastest peer", [Column("case"), *columns], rows)


def _cells(standing: Standing | None) -> tuple[str | None, float | None, str | None]:
    if standing is None:
        return None, None, None
    return str(standing.ratio), standing.ours.ms, standing.peer.contestant


def _mean(found: Collection[Standing]) -> str | None:
    return f"{geometric_mean(s.ratio.median for s in found):.2f} of {len(found)}" if found else None


# ---- the page -------------------------------------------------------------------------------------------------------

INTRODUCTION = """# decompk beside its peers

This page is written by `decompk bench-report`; nothing in it is typed by hand. All contestants of a case are timed in
turns, in the same minutes, and only after their outputs and gradients were compared with those of the members alone in
float64. All are given their inputs ready: crops are cut, and laid out for each, before the clock runs; in files from
before 2026-11-29 ours cut its own within it. A ratio is the median of the ratios of the rounds, with their quartiles;
above 1 decompk is faster. "Ours" and "best peer" are the fastest of each side. "% of roof": the time in which the
machine could move the compulsory bytes or compute the useful FLOPs, whichever takes longer, by the measured time; it
may pass 100, as Winograd's convolutions multiply less than is counted, and a machine that is shared may have been
slower when its roof was measured.
"""


def write_page(runs: Sequence[Run], out: Path) -> list[Path]:
    """The page and its pictures beside it; returns their paths."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text, written, names = [INTRODUCTION], [out], set()
    if len({run.device for run in runs}) > 1:
        text += ["## All devices\n", side_by_side(runs, [part for part in PARTS if part != "layers"]).to_markdown()]
    for run in runs:
        name = slug(run.device)
        while name in names:
            name += "-more"
        names.add(name)

        def picture(what: str, alt: str, draw: Callable[[Run, Path], None], run: Run = run, name: str = name) -> str:
            path = out.parent / f"{name}-{what}.png"
            draw(run, path)
            written.append(path)
            return f"![{alt}]({path.name})\n"

        text += [f"## {run.device}\n", run.made_with() + "\n", summary(run.entries).to_markdown()]
        for part in ("training", "ensembles", "K", "batch", "recurrent", "composed", "split"):
            if standings(run.entries, part):
                text.append(peers(run.entries, part).to_markdown())
        if standings(run.entries, "training"):
            text.append(picture("peers", "Time of each peer over ours, case by case", draw_peers))
        if gains(run.entries):
            text += [gains_table(run.entries).to_markdown(), picture("gains", "Global over members by K", draw_gains)]
        if standings(run.entries, "layers"):
            text.append(picture("layers", "Percent of the roof, convolution by convolution", draw_layers))
            text.append(layers_table(run.entries).to_markdown())
        if run.left_out:
            text += ["Not timed:\n", *(f"- {x['case']}, {x['contestant']}: {x['why']}" for x in run.left_out)]
    out.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    return written


def fill_readme(runs: Sequence[Run], readme: Path, page: Path) -> None:
    """Rewrite what stands between the two marks in `readme`. Raises DecompkError where they are missing."""
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise DecompkError(f"{readme} cannot be read: {error.strerror}.") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DecompkError(f"{readme} needs one line {BEGIN} and, below it, one line {END}; write them.")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    link = os.path.relpath(page, readme.parent).replace(os.sep, "/")
    made = [f"- {run.made_with()}" for run in runs]
    block = "\n".join([side_by_side(runs).to_markdown(), *made, "", f"All cases, every peer, plots: [{link}]({link})."])
    readme.write_text(f"{before}{BEGIN}\n{block}\n{END}{after}", encoding="utf-8")


# ---- plots ----------------------------------------------------------------------------------------------------------


def _ratio_scale(axis: Any) -> None:
    """Logarithmic, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_peers(run: Run, path: Path) -> None:
    """Time of each peer over ours: a row for every training case, a marker for every peer, quartiles as bars."""
    found = [race for race in races(run.entries, "training") if _fastest(race, "ours")]
    names = list(dict.fromkeys(e.contestant for race in found for e in race if e.side == "peer"))
    figure = new_figure(10, 1.4 + 0.55 * len(found))
    axes = figure.subplots()
    for i, name in enumerate(names):
        at, ratios = [], []
        for row, race in enumerate(found):
            ours: Any = _fastest(race, "ours")
            for entry in (e for e in race if e.contestant == name):
                at.append(row + 0.5 * (i - (len(names) - 1) / 2) / max(1, len(names) - 1))
                ratios.append(faster(ours, entry))
        reach = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
        style = {"color": COLORS[i % len(COLORS)], "marker": "os^Dv<>P"[i % 8]}
        axes.errorbar([r.median for r in ratios], at, xerr=reach, linestyle="", capsize=2, label=name, **style)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    _ratio_scale(axes.xaxis)
    axes.set_yticks(range(len(found)), [race[0].case for race in found])
    for row in range(1, len(found)):
        axes.axhline(row - 0.5, color="gray", linewidth=0.5, alpha=0.5)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set(xlabel="time of the peer ÷ ours; right of 1 decompk is faster", title=run.device)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path)


def draw_gains(run: Run, path: Path) -> None:
    """Global network over all K members against K, with the paper's Table 3.4 and the limits of memory."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    found = gains(run.entries)
    lines = list(dict.fromkeys((g.ours.network, g.ours.batch) for g in found))
    for color, (network, batch) in zip(COLORS * len(lines), lines, strict=False):
        mine = [g for g in found if (g.ours.network, g.ours.batch) == (network, batch)]
        ratios, K = [g.ratio for g in mine], [g.ours.K for g in mine]
        reach = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
        label = f"{network}, {batch} images"
        axes.errorbar(K, [r.median for r in ratios], yerr=reach, color=color, marker="o", capsize=3, label=label)
        if (network, batch) == next(line for line in lines if line[0] == network):  # the batch hardly moves it
            limit = [g.whole.bytes / g.ours.bytes for g in mine]
            axes.plot(K, limit, color=color, linestyle=":", marker="_", label=f"{network}: ratio of compulsory bytes")
    most = max(g.ours.K for g in found)
    axes.plot([1, most], [1, most], color="gray", linewidth=1, linestyle="--", label="K, where memory binds")
    paper = {K: PAPER_SECONDS[1] / seconds for K, seconds in PAPER_SECONDS.items() if 1 < K <= most}
    if paper:
        axes.plot([*paper], [*paper.values()], "k*", markersize=10, label="the paper's Table 3.4, ResNet50, one GPU")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _ratio_scale(axes.yaxis)
    ticks = sorted({g.ours.K for g in found} | set(paper))
    axes.set_xticks(ticks, [str(K) for K in ticks])
    axes.grid(alpha=0.3)
    axes.set(xlabel="members K", ylabel="time of the global network ÷ all K members", title=run.device)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def draw_layers(run: Run, path: Path) -> None:
    """Percent of the roof of every convolution, in the order of execution: ours and the best peer."""
    found = standings(run.entries, "layers")
    networks = list(dict.fromkeys(s.ours.network for s in found))
    columns = min(3, len(networks))
    figure = new_figure(4.2 * columns, 0.6 + 2.6 * math.ceil(len(networks) / columns))
    panels = figure.subplots(math.ceil(len(networks) / columns), columns, sharey=True, squeeze=False).flatten()
    for axes, network in zip(panels, networks, strict=False):
        mine = [s for s in found if s.ours.network == network]
        for color, marker, label, side in ((COLORS[0], "o", "ours", "ours"), (COLORS[1], "x", "best peer", "peer")):
            percent = [getattr(s, side).roof_percent or 0 for s in mine]
            line = axes.plot(range(1, len(mine) + 1), percent, color=color, marker=marker, linestyle="", label=label)
            line[0].set_markersize(5)
        axes.set(title=network, xlabel="distinct convolution, in order")
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)  # of all panels, when all is drawn
    for axes in panels[len(networks) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel("% of the roof")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    figure.suptitle(run.device)
    figure.savefig(path)
