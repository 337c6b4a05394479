"""All the work for a GPU in one command: what the machine reaches, tests, benches, tuning.

    python tools/gpu_suite.py --out DIR [--stage build|test|bench|train|race|tune] [--minutes M] [--only TEXT]

Needs torch, triton and pytest; decompk is taken from the repository. In DIR, whole at any time: environment.json,
tests.json and tests.log, bench.json and bench.md, train.json and train.md, race/*.json (`pytest bench`, which needs
pytest-benchmark; for `decompk bench-report`), tune.json and the tuned table. Exit code 1
if a test failed, a result was wrong or a stage broke, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from layers import (
    BATCH,
    CASES,
    Captured,
    Case,
    Layer,
    Norm,
    fitting_batch,
    layers,
    networks,
    norms,
    training_step,
)
from timing import (
    Compiler,
    Contestant,
    Gate,
    Journal,
    Timer,
    Timing,
    Trial,
    channel_groups,
    describe,
    end_if_lost,
    free_memory,
    precision,
    rivals,
    same,
    sentence,
    write,
)

import decompk
from decompk import cost, dispatch, ops
from decompk import device as devices
from decompk.config import Problem

# Each one's share of the time that is left.
STAGES = {"build": 0.2, "test": 0.45, "bench": 0.5, "train": 0.4, "race": 0.6, "tune": 1.0}
RACES = ("training", "recurrent", "layers", "sweeps", "blockdiag", "split")  # of bench/, the most wanted first
KEYS = ("part", "net", "case", "pass", "impl")
NOTHING_CHOSEN = 5  # pytest's exit code where -k leaves no test
QUIET = 180  # seconds without a record after which a stage hangs

# ---- build: what this machine is and reaches ------------------------------------------------------------------------


def build(out: Path, device: torch.device, timer: Callable, **sizes: int) -> None:
    """The C++ extension, and environment.json: versions, and measured roofs that everything else is held against."""
    environment = versions(device)
    if environment["capability"]:
        arch = environment["capability"].replace(".", "")
        environment["extension"] = _said(sys.executable, str(ROOT / "tools" / "build_ext.py"), "--arch", arch, wait=300)
    print(" ".join(f"{key}={value}" for key, value in environment.items()), flush=True)
    environment["roofs"] = {}
    for name, value in roofs(device, timer, **sizes):
        environment["roofs"][name] = value
        print(f"{name}={value:.4g}", flush=True)
    write(out / "environment.json", json.dumps(environment, indent=1) + "\n")


def versions(device: torch.device) -> dict[str, Any]:
    """What a result has to say of where it was made."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "commit": _said("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _said(*command: str, wait: float = 30) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=wait).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def roofs(device: torch.device, timer: Callable, copied: int = 2**30, side: int = 8192) -> Iterator[tuple[str, float]]:
    """GB/s of a copy of `copied` bytes, read and written counted, and TFLOP/s of products of `side`³."""
    a = torch.randn(copied // 4, device=device)
    b = torch.empty_like(a)
    yield "copy_gbps", 2 * copied / timer({"copy": lambda: b.copy_(a)}, seconds=0.5)["copy"].ms / 1e6
    del a, b
    for dtype in ("bfloat16", "float16", "tf32", "float32"):
        kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        with precision(dtype):
            timing = timer({"product": partial(torch.mm, a, b)}, seconds=0.5)["product"]
        yield f"{dtype}_tflops", 2 * side**3 / timing.ms / 1e9


# ---- bench ----------------------------------------------------------------------------------------------------------


def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True).relu()


def normalise_packed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.batch_norm(x, weight, bias, relu=True)


def runner(how: Callable[..., Tensor], jobs: list[tuple[Tensor, ...]], kind: str) -> Callable[[], list[Tensor]]:
    """One pass of `how` over jobs of (x, weight, bias, dy): y, or dx on the graph that a forward pass left."""
    if kind == "forward":
        return torch.no_grad()(lambda: [how(*job[:3]) for job in jobs])
    leaves = [[t.detach().requires_grad_() for t in job[:3]] for job in jobs]
    outputs, flat = [how(*leaf) for leaf in leaves], [t for leaf in leaves for t in leaf]
    return lambda: list(torch.autograd.grad(outputs, flat, [job[3] for job in jobs], retain_graph=True)[::3])


@functools.cache
def kernels(problem: Problem, device: torch.device) -> dict[str, dispatch.Choice]:
    """Of every Triton form the candidate that is predicted fastest, and dispatch's choice if it is one."""
    found = {}
    for choice in dispatch.candidates(problem, devices.of(device)):
        if choice.config:
            found.setdefault(f"triton_{choice.form}", choice)
    ours = dispatch.choose(problem, device)
    return {"ours": ours, **found} if ours.config else found


@dataclass
class Bench:
    """Times cases into the journal; what the journal has is not run again."""

    device: torch.device
    timer: Callable
    journal: Journal
    roofs: dict[str, float]
    compiler: Compiler
    left: Callable[[], float]  # seconds
    dtype: str = "bfloat16"
    batch: int = BATCH
    only: str = ""
    late: bool = False

    def run(self, cases: tuple[Case, ...]) -> bool:
        """Layers of every case, then norms, then whole training steps of the first three; False if time ran out."""
        work = [(self.layers, case) for case in cases] + [(self.norms, case) for case in cases]
        work += [(self.steps, case) for case in cases[:3]]
        work = [(part, case) for part, case in work if self.only in f"{part.__name__} {case.title}"]
        asked = [case for part, case in work if part == self.layers]
        for layer, problem in (one for case in asked for one in self._passes(case)):
            for choice in kernels(problem, self.device).values():
                self.compiler.ask(layer.problem.of(problem.kind), choice.config, layer.image)
        for part, case in work:
            part(case)
        return not self.late

    def layers(self, case: Case) -> None:
        for layer, problem in self._passes(case):
            self.guarded(self.layer, "layers", case, layer.name, problem.kind, layer, problem)

    def norms(self, case: Case) -> None:
        for norm in norms(case, self._batch(case)):
            for kind in ("forward", "backward"):
                self.guarded(self.norm, "norms", case, norm.name, kind, norm, kind)

    def steps(self, case: Case) -> None:
        self.guarded(self.step, "steps", case, "train", "step", case, seconds=60)

    def _passes(self, case: Case) -> list[tuple[Layer, Problem]]:
        found = layers(case, self.dtype, self._batch(case))
        return [(layer, problem) for layer in found for problem in layer.passes()]

    def _batch(self, case: Case) -> int:
        return fitting_batch(case, free_memory(self.device), self.batch)

    def guarded(self, work: Callable, part: str, case: Case, name: str, kind: str, *rest: Any, seconds: float = 10):
        """Run one piece of work, if there is time and it is not done; its failure is a record."""
        key = {"part": part, "net": case.title, "case": name, "pass": kind}
        timed = (r for r in self.journal.records if "ms" in r or r["impl"] == "timing")
        if any(key.items() <= record.items() for record in timed):
            return
        if self.left() < seconds:
            self.late = True
            return
        self.journal.begin(**key, impl="timing")
        try:
            work(key, *rest)
        except Exception as error:
            self.journal.add(**key, impl="timing", error=sentence(error))
            end_if_lost(self.device)

    def layer(self, key: dict[str, str], layer: Layer, problem: Problem) -> None:
        trial = Trial(layer.problem.of(problem.kind), self.device, layer.image)
        found = kernels(problem, self.device)
        for choice in found.values():
            self.compiler.wait(trial.problem, choice.config)
        contestants = {name: (partial(trial.by_kernel, choice.config), same) for name, choice in found.items()}
        contestants |= {"ours": (trial.by_op, same), **rivals(trial)}
        choices = {"ours": dispatch.choose(problem, self.device), **found}
        facts = {name: {"config": describe(one), "predicted_ms": one.ms} for name, one in choices.items()}
        common = {"count": layer.count, "batch": trial.problem.N, "dtype": problem.dtype}
        common |= {"bytes": cost.conv_bytes(problem), "flops": cost.conv_flops(problem)}
        with precision(problem.dtype):
            self.compete(key, contestants, trial.gate(), trial.poison, common, facts)

    def norm(self, key: dict[str, str], norm: Norm, kind: str) -> None:
        K, N, C, H, W = norm.shape
        dtype = getattr(torch, self.dtype)
        x, dy = (torch.randn(K, N, H, W, C, device=self.device).to(dtype).movedim(-1, 2) for _ in range(2))
        weight, bias = 1 + 0.1 * torch.randn(K, C, device=self.device), torch.randn(K, C, device=self.device)
        vectors = list(zip(x.double(), weight.double(), bias.double(), strict=True))
        z = torch.stack([F.batch_norm(a, None, None, b, c, training=True) for a, b, c in vectors])
        dy = dy.where(z.abs() > 1e-3, 0)  # where rounding decides what ReLU lets pass there is nothing to compare
        jobs = list(zip(x, weight, bias, dy, strict=True))
        exact = [tuple(t.double() for t in job) for job in jobs]
        wide = (channel_groups(x), weight.flatten(), bias.flatten(), channel_groups(dy))
        gate = Gate(torch.stack(runner(normalise, exact, kind)()), torch.stack(runner(normalise, jobs, kind)()))
        contestants = {
            "ours": (runner(normalise_packed, [(x, weight, bias, dy)], kind), lambda found: found[0]),
            "native_grouped": (
                runner(normalise, [wide], kind),
                lambda found: found[0].unflatten(1, (K, C)).movedim(1, 0),
            ),
            "native_loop": (runner(normalise, jobs, kind), torch.stack),
        }
        common = {"count": norm.count, "batch": N, "dtype": self.dtype, "flops": 0}
        reads = x.numel() if kind == "forward" else 2 * x.numel()
        common |= {"bytes": cost.pass_bytes(reads, 0, x.numel(), x.element_size())}
        self.compete(key, contestants, gate, lambda: torch.full_like(x, math.nan), common)

    def step(self, key: dict[str, str], case: Case) -> None:
        size = decompk.models.spec(case.model).input_size
        image = torch.randn(self.batch, *size, device=self.device).contiguous(memory_format=torch.channels_last)
        target = torch.randint(10, (self.batch,), device=self.device)
        d = case.decomposition()
        members = d.subnets(seed=0)

        def steps() -> dict[str, Callable[[], Tensor]]:
            found = networks(members, d.crops, image)
            return {name: training_step(jobs, target, case.K) for name, jobs in found.items()}

        reference = steps()["members_in_turn"]
        losses = [float(reference()) for _ in range(Captured.warm + 1)]
        contestants = {f"{name}, eager": (step, lambda loss: loss / losses[0]) for name, step in steps().items()}
        if self.device.type == "cuda":
            captured = {f"{name}, graph": Captured(step) for name, step in steps().items()}
            contestants |= {name: (step, lambda loss: loss / losses[-1]) for name, step in captured.items()}

        def gate(ratio: Tensor) -> tuple[float, str | None]:
            away = abs(float(ratio) - 1)
            return away, None if away < 0.02 else f"wrong: the loss is {float(ratio):.3f} of the members' own"

        self.compete(key, contestants, gate, lambda: None, {"batch": self.batch}, cold=False, seconds=2.0)

    def compete(
        self,
        key: dict[str, str],
        contestants: dict[str, Contestant],
        gate: Callable[[Tensor], tuple[float, str | None]],
        poison: Callable[[], Any],
        common: dict[str, Any],
        facts: dict[str, dict[str, Any]] | None = None,
        **how: Any,
    ) -> None:
        """Check each contestant, time those that run, a record each; of ours only what passed the gate."""
        sound, errors = {}, {}
        for name, (call, view) in contestants.items():
            if self.journal.has(**key, impl=name):
                continue
            self.journal.begin(**key, impl=name)
            try:
                poison()
                errors[name], fault = gate(view(call()))
            except Exception as error:
                self.journal.add(**key, impl=name, error=sentence(error))
                end_if_lost(self.device)
                continue
            ours = not name.startswith(RIVALS)
            if fault and (ours or not math.isfinite(errors[name])):
                self.journal.add(**key, impl=name, error=fault, rel_error=errors[name], wrong=ours)
            else:
                sound[name] = call
        self.journal.begin(**key, impl="timing")
        for name, timing in self.timer(sound, **how).items() if sound else ():
            figures = {**vars(timing), **reached(timing, common, self.roofs), "rel_error": errors[name]}
            self.journal.add(**key, impl=name, **figures, **common, **(facts or {}).get(name, {}))


RIVALS = ("cudnn", "native", "members")


def reached(timing: Timing, common: dict[str, Any], roofs: dict[str, float]) -> dict[str, Any]:
    """GB/s of compulsory bytes, TFLOP/s, and the percentage of the roof that binds."""
    if "bytes" not in common:
        return {}
    rates = {"gbps": common["bytes"] / timing.ms / 1e6, "tflops": common["flops"] / timing.ms / 1e9}
    percents = {
        "memory": 100 * rates["gbps"] / roofs["copy_gbps"],
        "arithmetic": 100 * rates["tflops"] / roofs[f"{common['dtype']}_tflops"],
    }
    bound = max(percents, key=percents.__getitem__)
    return {**rates, "bound": bound, "roof_percent": percents[bound]}


# ---- the table ------------------------------------------------------------------------------------------------------

LARGE = 64e6  # bytes


@dataclass(frozen=True)
class Target:
    """What is wanted, what was measured, and whether that is enough; None where nothing was measured."""

    wanted: str
    measured: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return "not measured" if self.met is None else "met" if self.met else "NOT MET"


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def passes_of(records: list[dict], part: str) -> dict[tuple[str, str], dict[str, dict[str, dict]]]:
    """(net, case) → pass → impl → the record with its time, for everything that was tried."""
    found: dict = {}
    for record in records:
        if record["part"] == part:
            impls = found.setdefault((record["net"], record["case"]), {}).setdefault(record["pass"], {})
            if "ms" in record:
                impls[record["impl"]] = record
    return found


def speedups(records: list[dict], rival: str, direction: str, net: str | None = None) -> list[float]:
    """rival's time over ours, a layer each: forward is fprop, backward dgrad and wgrad together."""
    ratios = []
    for (where, _), passes in passes_of(records, "layers").items():
        kinds = [kind for kind in passes if (kind == "fprop") == (direction == "forward")]
        whole = kinds and all({"ours", rival} <= passes[kind].keys() for kind in kinds)
        if whole and net in (None, where):
            ours, theirs = (sum(passes[kind][impl]["ms"] for kind in kinds) for impl in ("ours", rival))
            ratios.append(theirs / ours)
    return ratios


def slower(records: list[dict]) -> list[tuple[dict, dict]]:
    """(ours, the best of cuDNN grouped and the loop) where ours is slower by more than both vary."""
    found = []
    for passes in passes_of(records, "layers").values():
        for impls in passes.values():
            others = [impls[name] for name in ("cudnn_grouped", "cudnn_loop") if name in impls]
            if "ours" in impls and others:
                best = min(others, key=lambda record: record["ms"])
                if impls["ours"]["ms_p20"] > best["ms_p80"]:
                    found.append((impls["ours"], best))
    return found


def large(records: list[dict]) -> list[dict]:
    """Ours on layers that move more than 64 MB and are bound by memory, the farthest from the roof first."""
    ours = [r for r in records if r["part"] == "layers" and r["impl"] == "ours" and "ms" in r]
    return sorted((r for r in ours if r["bytes"] > LARGE and r["bound"] == "memory"), key=lambda r: r["roof_percent"])


def targets(bench: dict[str, Any]) -> list[Target]:
    """The three that were set, against what is in bench.json."""
    records = bench["records"]
    so_far = "" if bench["head"].get("complete") else " (unfinished)"
    every = [(layer, kind, impls) for layer, p in passes_of(records, "layers").items() for kind, impls in p.items()]
    missing = [entry for entry in every if "ours" not in entry[2]]
    behind, far = slower(records), large(records)
    lacking = f", {len(missing)} not timed" if missing else ""
    close = [r for r in far if r["roof_percent"] >= 70]
    least = f", least {far[0]['roof_percent']:.0f} %" if far else ""
    means = {way: geometric_mean(speedups(records, "cudnn_grouped", way)) for way in ("forward", "backward")}
    return [
        Target(
            "no pass of a layer slower than the best of cuDNN grouped and the loop",
            f"{len(behind)} of {len(every)} slower{lacking}{so_far}",
            not behind and not missing if every else None,
        ),
        Target(
            "70 % of the memory roof on layers that move over 64 MB",
            f"{len(close)} of {len(far)}{least}{so_far}",
            len(close) == len(far) if far else None,
        ),
        Target(
            "2× over cuDNN grouped in the geometric mean, forward and backward",
            ", ".join(f"{way} {mean:.2f}×" for way, mean in means.items()) + so_far,
            None if any(map(math.isnan, means.values())) else min(means.values()) >= 2,
        ),
    ]


def summary(bench: dict[str, Any]) -> str:
    """bench.md."""
    head, records = bench["head"], bench["records"]
    lines = ["# Bench", "", ", ".join(f"{k} {v}" for k, v in head.items() if k != "roofs" and v), ""]
    lines += [f"Measured roofs: {', '.join(f'{k} {v:.4g}' for k, v in head.get('roofs', {}).items())}", ""]
    rows = [(t.wanted, t.measured, t.verdict) for t in targets(bench)]
    lines += table("Targets", ("target", "measured", ""), rows)
    nets = list(dict.fromkeys(r["net"] for r in records if r["part"] == "layers"))
    columns = [(rival, way) for rival in ("cudnn_grouped", "cudnn_loop") for way in ("forward", "backward")]
    rows = [
        (net or "all", *(f"{geometric_mean(speedups(records, *column, net)):.2f}" for column in columns))
        for net in [*nets, None]
    ]
    title = "Speed-up of ours, geometric mean over layers"
    lines += table(title, ("network", *(" ".join(column) for column in columns)), rows)
    rows = [
        (o["net"], o["case"], o["pass"], f"{o['ms']:.4f}", f"{b['ms']:.4f}", b["impl"], o.get("config", ""))
        for o, b in sorted(slower(records), key=lambda pair: pair[1]["ms"] / pair[0]["ms"])
    ]
    lines += table("Where ours is slower", ("network", "layer", "pass", "ours ms", "best ms", "by", "ours"), rows)
    rows = [
        (r["net"], r["case"], r["pass"], f"{r['bytes'] / 1e6:.0f}", f"{r['roof_percent']:.0f}", r.get("config", ""))
        for r in large(records)
    ]
    lines += table("Over 64 MB, bound by memory", ("network", "layer", "pass", "MB", "% of roof", "ours"), rows)
    for part, title in (("norms", "Batch norm and ReLU"), ("steps", "Training steps")):
        rows = [
            (r["net"], r["case"], r["pass"], r["impl"], f"{r['ms']:.4f}", f"{r.get('roof_percent', math.nan):.0f}")
            for r in records
            if r["part"] == part and "ms" in r
        ]
        lines += table(title, ("network", "case", "pass", "by", "ms", "% of roof"), rows)
    rows = [(r["net"], r["case"], r["pass"], r["impl"], r["error"]) for r in records if "error" in r]
    lines += table("Errors", ("network", "case", "pass", "by", "error"), rows)
    return "\n".join(lines)


def table(title: str, columns: tuple[str, ...], rows: list[tuple]) -> list[str]:
    """A heading and a Markdown table; without rows nothing but a line."""
    if not rows:
        return [f"## {title}", "", "None.", ""]
    cells = [columns, tuple("---" for _ in columns), *rows]
    return [f"## {title}", "", *("| " + " | ".join(map(str, row)) + " |" for row in cells), ""]


# ---- tests ----------------------------------------------------------------------------------------------------------

OUTCOME = re.compile(r"(?:(tests/\S+) (PASSED|FAILED|ERROR)\b|\b(PASSED|FAILED|ERROR) (tests/\S+))")
SANITIZED = "the_first_config_of_every_form"
FOUND = 86  # compute-sanitizer's exit code where it found something


def test(out: Path, left: Callable[[], float]) -> bool:
    """pytest -m gpu, then compute-sanitizer on a few launches, into tests.json and tests.log."""
    journal = Journal(out / "tests.json", ("case",))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider", "tests"]
    command += ["--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling
        command += ["-n", str(max(1, len(os.sched_getaffinity(0)) - 2)), "--maxschedchunk", "1"]
    with open(out / "tests.log", "w") as log:
        code = pytest(command, journal, log, left)
        failed = [r["case"] for r in journal.records if r["outcome"] != "PASSED"]
        print(f"{len(journal.records) - len(failed)} tests passed, {len(failed)} failed; pytest ended with {code}")
        clean = [sanitize(tool, journal, log, left) for tool in ("memcheck", "racecheck")]
    print(*(out / "tests.log").read_text().partition("short test summary info")[2].splitlines()[:40], sep="\n")
    return bool(journal.records) and not failed and code in (0, STOPPED) and all(clean)


STOPPED = 2  # what pytest ends with when it is interrupted


def pytest(command: list[str], journal: Journal, log: IO[str], left: Callable[[], float], **variables: str) -> int:
    """Run pytest until it is done or time is up; what it says goes into the log, each outcome into the journal."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**environment(), **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    stops = [  # first the way that still prints what failed
        threading.Timer(max(0.0, left() - 30), process.send_signal, [signal.SIGINT]),
        threading.Timer(max(5.0, left()), os.killpg, [process.pid, signal.SIGKILL]),
    ]
    for stop in stops:
        stop.start()
    for line in process.stdout:
        log.write(line)
        log.flush()
        if match := OUTCOME.search(line):
            case, outcome = match[1] or match[4], match[2] or match[3]
            if not journal.has(case=case):
                journal.add(case=case, outcome=outcome)
    code = process.wait()
    for stop in stops:
        stop.cancel()
    return code


def sanitize(tool: str, journal: Journal, log: IO[str], left: Callable[[], float]) -> bool:
    """Whether compute-sanitizer has nothing to say of one launch of every form; true where it cannot run."""
    binary = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(binary).exists() or left() < 60:
        print(f"no {tool}: {'no time left' if Path(binary).exists() else 'there is no compute-sanitizer'}", flush=True)
        return True
    command = [binary, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, "-m", "pytest", "-q", "-x"]
    command += ["-p", "no:cacheprovider", "tests/test_gpu.py", "-k", SANITIZED]
    log.write(f"\n# {tool}\n")
    end = time.monotonic() + min(left(), 240)
    # Cached, all tensors would be one allocation to it.
    code = pytest(command, journal, log, lambda: end - time.monotonic(), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    said = re.findall(r"ERROR SUMMARY: .*", Path(log.name).read_text().rpartition(f"# {tool}\n")[2])
    journal.add(case=tool, outcome={0: "PASSED", FOUND: "FAILED"}.get(code, "could not run"), said=said[:1])
    return code != FOUND


# ---- race: the bench that everybody runs ----------------------------------------------------------------------------


def race(out: Path, left: Callable[[], float], only: str) -> bool:
    """`pytest bench --benchmark-only`, file by file, so that what is done stays when the time is up."""
    if importlib.util.find_spec("pytest_benchmark") is None:
        print("pytest-benchmark is missing: pip install 'decompk[bench]'", flush=True)
        return False
    folder, good = out / "race", True
    folder.mkdir(exist_ok=True)
    for name in RACES:
        command = [sys.executable, "-m", "pytest", str(ROOT / "bench" / f"test_{name}.py"), "--benchmark-only", "-q"]
        command += [f"--benchmark-json={folder / f'{name}.json'}", *(["-k", only] if only else [])]
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment(), timeout=max(left(), 1)).returncode
        except subprocess.TimeoutExpired:
            print(f"stopped for time in {name}", flush=True)
            return good
        good &= code in (0, NOTHING_CHOSEN)
    return good


# ---- running stages -------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """What a child process gets: decompk importable, kernels compiled and not interpreted."""
    paths = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**inherited, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def supervise(command: Callable[[], list[str]], journal: Path, left: Callable[[], float]) -> bool:
    """Run a stage as a process: end it where it hangs, start it again where it broke; False if that leads nowhere."""

    def written() -> float:
        return journal.stat().st_mtime if journal.exists() else 0.0

    while True:
        before, process = written(), subprocess.Popen(command(), cwd=ROOT, env=environment(), start_new_session=True)
        last, alive = before, time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            if written() != last:
                last, alive = written(), time.monotonic()
            if left() < -15 or time.monotonic() - alive > QUIET:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode == 0:
            return True
        if left() < 30:
            print("stopped for time", flush=True)
            return left() < 0
        if written() == before:
            return False
        print("a process of this stage broke or hung; starting it again behind that place", flush=True)


def run(stage: str, out: Path, left: Callable[[], float], only: str) -> bool:
    """One stage, in processes of its own; False if something failed."""
    if stage == "test":
        return test(out, left)
    if stage == "race":
        return race(out, left, only)
    if stage == "bench" and not (out / "environment.json").exists():
        run("build", out, left, only)

    def command() -> list[str]:
        minutes = ["--minutes", f"{left() / 60 - 0.2:.3f}"]  # it takes a while until the process counts
        if stage == "tune":
            tune = [sys.executable, str(ROOT / "tools" / "tune.py"), "--log", str(out / "tune.json"), *minutes]
            return [*tune, "--problems", only] if only else tune
        if stage == "train":
            speed = [sys.executable, str(ROOT / "tools" / "train_speed.py"), "--out", str(out / "train.json"), *minutes]
            return [*speed, "--only", only]
        alone = [sys.executable, str(Path(__file__).resolve()), "--alone", "--out", str(out), "--stage", stage]
        return [*alone, *minutes, "--only", only]

    journal = out / {"build": "environment.json"}.get(stage, f"{stage}.json")
    good = supervise(command, journal, left)
    known = json.loads(journal.read_text()) if journal.exists() else {}
    if stage == "bench" and known:
        write(out / "bench.md", summary(known))
        for target in targets(known):
            print(f"{target.verdict}: {target.wanted}: {target.measured}")
    if stage == "tune":
        tuned = dispatch.table_path(devices.of(torch.device("cuda")))
        if tuned.exists():
            shutil.copy(tuned, out)
    return good and not any(record.get("wrong") for record in known.get("records", []))


def alone(stage: str, out: Path, left: Callable[[], float], only: str, device: torch.device, timer: Callable) -> None:
    """build or bench in this process."""
    torch.backends.cudnn.benchmark = True
    if stage == "build":
        build(out, device, timer)
        return
    known = json.loads((out / "environment.json").read_text())
    compiler = Compiler(device)
    journal = Journal(out / "bench.json", KEYS, known)
    bench = Bench(device, timer, journal, known["roofs"], compiler, left, only=only)
    journal.end(complete=bench.run(CASES) and not only)
    compiler.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--stage", choices=list(STAGES), help="only this one; by default all in this order")
    parser.add_argument("--minutes", type=float, default=60.0, help="time for all of it")
    parser.add_argument("--only", default="", metavar="TEXT", help="bench, tune: only what has this in its name")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_suite needs an NVIDIA GPU, and torch sees none.", file=sys.stderr)
        return 2
    out, end = args.out.resolve(), time.monotonic() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    if args.alone:
        device = torch.device("cuda", torch.cuda.current_device())
        alone(args.stage, out, lambda: end - time.monotonic(), args.only, device, Timer(device))
        return 0
    good = True
    for stage in [args.stage] if args.stage else STAGES:
        left = end - time.monotonic()
        if left < 30:
            print(f"no time left for {stage}", flush=True)
            continue
        until = time.monotonic() + left * (1.0 if args.stage else STAGES[stage])
        print(f"== {stage}, at most {(until - time.monotonic()) / 60:.1f} minutes", flush=True)
        good &= run(stage, out, lambda until=until: until - time.monotonic(), args.only)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
