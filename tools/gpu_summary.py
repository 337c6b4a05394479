"""The records of a GPU suite in one page that a person can decide from. Loads nothing heavy."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

Line = dict[str, Any]
MARKS = ("8 warps", "tf32")
CHECKED = ("checks", "odd")


def summary(lines: list[Line], limit: int) -> str:
    """Every section as far as there is room; long lists are cut first, to end with how many more there are."""
    for most in (12, 8, 5, 3):
        text = "\n".join(line for section in SECTIONS for line in section(lines, most))
        if len(text) <= limit:
            return text
    return text[: limit - 30].rstrip() + "\n… cut: see records.jsonl"


def results(lines: list[Line], *stages: str) -> list[Line]:
    """What came of items, of all stages or of these."""
    found = [line for line in lines if "begun" not in line and "event" not in line]
    return [line for line in found if not stages or line.get("stage") in stages]


def failures(lines: list[Line]) -> list[Line]:
    """Where ours failed or was wrong, or a process broke; peers may fail."""
    return [line for line in results(lines) if "fault" in line or ("error" in line and not is_peer(line))]


def is_peer(line: Line) -> bool:
    impl = line.get("impl", "")
    return bool(impl) and not impl.startswith(("ours", "kernel", "timing", "their")) and not line.get("lost")


def cut(items: list[str], most: int) -> list[str]:
    return items if len(items) <= most else [*items[:most], f"… {len(items) - most} more"]


def number(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}g}" if isinstance(value, int | float) and not isinstance(value, bool) else "–"


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values if value > 0]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def table(head: tuple[str, ...], rows: list[tuple]) -> list[str]:
    """Columns as wide as they need to be."""
    cells = [head, *(tuple(map(str, row)) for row in rows)]
    wide = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, wide, strict=True))).rstrip()
        for row in cells
    ]


# ---- the machine ----------------------------------------------------------------------------------------------------

ROOFS = ("copy_gbps", "l2_gbps", "bfloat16_tflops", "float16_tflops", "tf32_tflops", "float32_tflops")
LAUNCHES = ("launch_ms", "graph_node_ms")


def machine(lines: list[Line], most: int) -> Iterator[str]:
    """Versions, and measured roofs beside what predictions assume."""
    versions: Line = {}
    for line in results(lines):
        if line.get("case") == "versions":
            versions = line
            run = f", run {line.get('run', 1)}" if line.get("run", 1) > 1 else ""
            yield f"{line.get('device')}{run}: {line.get('smi') or 'no nvidia-smi'}"
            names = ("torch", "triton", "cuda", "cudnn", "python", "numpy", "cores", "commit")
            yield (
                ", ".join(f"{name} {str(line.get(name))[:14]}" for name in names)
                + f"; extension: {line.get('extension')}"
            )
    if not versions:
        yield "no stage said what machine this is"
    found = {line["case"]: line for line in results(lines, "machine") if line.get("part") == "roof"}
    assumed = versions.get("assumed", {})
    assumed = {**assumed, "graph_node_ms": assumed.get("launch_ms")}
    said = []
    for name in (*ROOFS, *LAUNCHES):
        if "value" in found.get(name, {}):
            beside = f" (assumed {number(assumed[name])})" if assumed.get(name) else ""
            said.append(f"{name} {number(found[name]['value'], 4)}{beside}")
    yield "roofs measured: " + (", ".join(said) or "none")
    for line in results(lines, "ahead"):
        if line.get("case") == "extension":
            yield f"extension: {'built' if line.get('built') else line.get('error') or line.get('missing')}"[:400]
        if line.get("case") == "kernels":
            yield f"compiled ahead: {line.get('done')} of {line.get('asked')} kernels, {line.get('failed')} failed"
    for line in lines:
        if line.get("stage") == "ahead" and line.get("event") == "stopped" and line.get("reason") != "finished":
            yield f"compiling ahead: {line['reason'][:400]}"


# ---- what is right --------------------------------------------------------------------------------------------------


def checks(lines: list[Line], most: int) -> Iterator[str]:
    """How many of each kind are right, then each distinct failure once, the marked ones first."""
    found = [line for line in results(lines, *CHECKED) if line.get("part") != "stage"]
    yield ""
    yield "CHECKS right/wrong/failed/missing"
    kinds: dict[str, Counter] = {}
    for line in found:
        for kind in (line.get("part", ""), *(f"with {mark}" for mark in line.get("marks", ()))):
            kinds.setdefault(kind, Counter())[outcome(line)] += 1
    names = ("right", "wrong", "failed", "missing")
    yield "; ".join(f"{kind} {'/'.join(str(c[name]) for name in names)}" for kind, c in kinds.items()) or "none ran"
    bad = sorted((line for line in found if outcome(line) in ("wrong", "failed")), key=lambda line: not marked(line))
    yield from distinct(bad, most)


def outcome(line: Line) -> str:
    if "missing" in line:
        return "missing"
    return "wrong" if "fault" in line else "failed" if "error" in line else "right"


def marked(line: Line) -> bool:
    return bool(line.get("marks")) or any(mark in str(line.get("case")) for mark in MARKS)


def distinct(bad: list[Line], most: int) -> list[str]:
    """One line for each kind of failure, whatever its figures: how often, the first of it, and what was said."""
    alike: dict[str, list[Line]] = {}
    for line in bad:
        said = str(line.get("fault") or line.get("error"))
        alike.setdefault(line.get("part", "") + re.sub(r"[\d.]+(e-?\d+)?", "#", said)[:50], []).append(line)
    rows = []
    for same in alike.values():
        first = same[0]
        where = " ".join(str(first[name]) for name in ("part", "net", "case", "pass", "impl") if first.get(name))
        rows.append(f"- {len(same)}× {where[:110]}: {str(first.get('fault') or first.get('error'))[:170]}")
    return cut(rows, most)


def sanitizer(lines: list[Line], most: int) -> Iterator[str]:
    for line in results(lines, "sanitize"):
        said = line.get("missing") or line.get("fault") or line.get("error") or line.get("said") or ""
        how = f"{line.get('outcome', 'not run')}, {line.get('checks', 'none')} checks"
        yield f"SANITIZER {line.get('case')}: {how}; {said[:160]}"
        if line.get("outcome") == "found errors":
            yield from cut(str(line.get("trace", "")).splitlines(), 4)


# ---- what is fast ---------------------------------------------------------------------------------------------------


def steps(lines: list[Line], most: int) -> Iterator[str]:
    """A table a network, with how much faster the best of ours is than the best peer of the same mode."""
    found = [line for line in results(lines) if line.get("part") == "steps"]
    launched = {(r["net"], r["impl"]): r for r in found if r.get("pass") == "launches" and "launches" in r}
    for net in dict.fromkeys(line["net"] for line in found):
        timed = [r for r in found if r["net"] == net and "ms" in r]
        yield ""
        yield f"STEPS {net}{verdict(timed)}"
        rows = []
        best = min((r["ms"] for r in timed if peer(r)), default=None)
        for r in timed:
            count = launched.get((net, r["impl"]), {})
            figures = (number(r["ms"], 4), number(best / r["ms"]) if best else "–", count.get("launches", "–"))
            figures += (number(count.get("busy_ms")), number(r.get("host_ms")), number(r.get("first_step_s")))
            rows.append((r["impl"], *figures, number(r.get("peak_mb"), 5)))
        if rows:
            yield from table(
                ("contestant", "ms", "×best peer", "launches", "busy ms", "host ms", "first s", "MB"), rows
            )
        yield from distinct([r for r in found if r["net"] == net and ("error" in r or "fault" in r)], most)


def peer(line: Line) -> bool:
    return not line["impl"].startswith(("ours", "global"))


def verdict(timed: list[Line]) -> str:
    ours = min((r for r in timed if r["impl"].startswith("ours")), key=lambda r: r["ms"], default=None)
    best = min(filter(peer, timed), key=lambda r: r["ms"], default=None)
    whole = min((r for r in timed if r["impl"].startswith("global")), key=lambda r: r["ms"], default=None)
    if not ours or not best:
        return ""
    over = f", {whole['ms'] / ours['ms']:.2f}× faster than {whole['impl']}" if whole else ""
    return f": {ours['impl']} is {best['ms'] / ours['ms']:.2f}× as fast as the best peer, {best['impl']}{over}"


def by_item(lines: list[Line], part: str) -> dict[tuple[str, str, str], dict[str, Line]]:
    """(net, case, pass) → impl → its record with a time."""
    found: dict[tuple[str, str, str], dict[str, Line]] = {}
    for line in results(lines):
        if line.get("part") == part and "ms" in line:
            found.setdefault((line["net"], line["case"], line["pass"]), {})[line["impl"]] = line
    return found


def layers(lines: list[Line], most: int) -> Iterator[str]:
    """Geometric means over layers and passes, the layers where ours is slowest, and what the moments cost."""
    items = by_item(lines, "layers")
    yield from ("", f"LAYERS: {len(items)} passes of layers timed; peer's time ÷ ours, geometric means")
    rows = []
    for kind in ("fprop", "dgrad", "wgrad"):
        own = [impls for (_, _, k), impls in items.items() if k == kind and "ours" in impls]
        peers = ("cudnn_grouped", "cudnn_grouped_copied", "cudnn_loop", "cudnn_dense")
        ratios = [geometric_mean(i[p]["ms"] / i["ours"]["ms"] for i in own if p in i) for p in peers]
        roof = [i["ours"]["roof_percent"] for i in own if "roof_percent" in i["ours"]]
        rows.append((kind, len(own), *map(number, ratios), number(sum(roof) / len(roof) if roof else math.nan)))
    if items:
        yield from table(("pass", "timed", "grouped", "with copies", "loop", "dense", "ours % of roof"), rows)
    slow = []
    for (_, case, kind), impls in items.items():
        others = [impls[p] for p in ("cudnn_grouped", "cudnn_loop") if p in impls]
        if "ours" in impls and others:
            best, own = min(others, key=lambda r: r["ms"]), impls["ours"]
            forms = [r for name, r in impls.items() if name.startswith("kernel")]
            better = min(forms, key=lambda r: r["ms"], default=None)
            hint = f"; {better['impl']} takes {number(better['ms'])}" if better and better["ms"] < own["ms"] else ""
            text = f"{case} {kind}: {number(own['ms'])} ms by {own.get('config')}, "
            text += f"{best['impl']} {number(best['ms'])}{hint}"
            slow.append((best["ms"] / own["ms"], text))
    slow.sort()
    yield from cut([f"- {ratio:.2f}× {text}" for ratio, text in slow[:8]], min(8, most)) if slow else ()
    yield from moments(items)
    yield from distinct([r for r in results(lines, "layers") if "error" in r or "fault" in r], most)


def moments(items: dict[tuple[str, str, str], dict[str, Line]]) -> Iterator[str]:
    pairs = []
    for impls in items.values():
        names = ("ours, moments in the epilogue", "ours, moments behind", "ours", "cudnn_grouped, moments behind")
        if all(name in impls for name in names):
            pairs.append(tuple(impls[name]["ms"] for name in names))
    if pairs:
        wins = sum(inside < behind for inside, behind, *_ in pairs)
        ratio = geometric_mean(behind / inside for inside, behind, *_ in pairs)
        extra = geometric_mean(inside / plain for inside, _, plain, _ in pairs)
        native = geometric_mean(theirs / inside for inside, _, _, theirs in pairs)
        yield (
            f"moments: the epilogue wins {wins} of {len(pairs)}; behind ÷ epilogue {ratio:.2f}, epilogue ÷ none "
            f"{extra:.2f}, cuDNN grouped with torch's moments ÷ epilogue {native:.2f}"
        )


def predictions(lines: list[Line], most: int) -> Iterator[str]:
    """By form, how far predictions are off, and the single worst ones."""
    timed = [r for r in results(lines, "layers") if "ms" in r and isinstance(r.get("predicted_ms"), float)]
    forms: dict[str, list[float]] = {}
    for r in timed:
        form = str(r.get("config") or r["impl"]).split()[0] if r["impl"] != "ours" else ""
        if form:
            forms.setdefault(form, []).append(r["ms"] / r["predicted_ms"])
    if forms:
        said = (f"{form} {geometric_mean(v):.2f} (of {len(v)})" for form, v in sorted(forms.items()))
        yield "PREDICTIONS measured ÷ predicted: " + ", ".join(said)
    worst = sorted(timed, key=lambda r: -abs(math.log(r["ms"] / r["predicted_ms"])))
    for r in worst[: min(5, most)]:
        yield f"- {r['case']} {r['pass']} {r['impl']}: {number(r['ms'])} ms, predicted {number(r['predicted_ms'])}"


def others(lines: list[Line], most: int) -> Iterator[str]:
    """Batch norms, and what was tuned."""
    norms = by_item(lines, "norms")
    if norms:
        ratio = geometric_mean(
            i["native_grouped"]["ms"] / i["ours"]["ms"]
            for i in norms.values()
            if {"ours", "native_grouped"} <= i.keys()
        )
        yield f"NORMS {len(norms)} passes timed: torch's batch norm over all channels ÷ ours {ratio:.2f}"
    tuned = results(lines, "tune")
    if tuned:
        wrong = [r for r in tuned if "fault" in r or "error" in r]
        keys = {r["key"] for r in tuned if "ms" in r}
        yield f"TUNED {len(keys)} problems of {len(tuned)} candidates, {len(wrong)} wrong or failed"
        yield from cut(
            [f"- {r.get('choice')} {r.get('key')}: {str(r.get('fault') or r.get('error'))[:120]}" for r in wrong], 3
        )


# ---- what is missing ------------------------------------------------------------------------------------------------


def boxes(lines: list[Line], most: int) -> Iterator[str]:
    """How each stage ended, what could not be done here, and what a next call would go on with."""
    yield from ("", "STAGES")
    ends = {line["stage"]: line for line in lines if line.get("event") == "stopped" and "took" in line}
    late = {line["stage"]: line.get("late") or 0 for line in lines if line.get("event") == "done"}
    for stage, line in ends.items():
        count = len(results(lines, stage))
        missed = f", no time for {late[stage]} items" if late.get(stage) else ""
        yield f"{stage}: {line['reason']} in {line['took']} of {line['box']} s, {count} records{missed}"
    broken = [r for r in results(lines) if r.get("lost") or r.get("part") == "stage"]
    yield from cut(
        [
            f"- {r['stage']} {' '.join(str(r[k]) for k in ('part', 'case', 'impl') if k in r)}: {r['error'][:160]}"
            for r in broken
        ],
        min(most, 6),
    )
    again = [s for s, line in ends.items() if line["reason"] != "finished" or late.get(s)]
    again += [
        line["stage"] for line in lines if line.get("reason") == "no time was left" and line["stage"] not in again
    ]
    yield f"--resume would go on with: {', '.join(dict.fromkeys(again)) or 'nothing'}"
    missing: dict[str, list[str]] = {}
    for r in results(lines):
        if "missing" in r:
            missing.setdefault(r["missing"], []).append(str(r.get("impl") or r.get("case") or r.get("part")))
    for why, items in missing.items():
        yield f"not done here, {why}: {', '.join(cut(list(dict.fromkeys(items)), 5))[:250]}"
    count = len(failures(lines))
    yield f"VERDICT: {f'{count} failures' if count else 'nothing failed'}"


SECTIONS = (machine, checks, sanitizer, steps, layers, predictions, others, boxes)
