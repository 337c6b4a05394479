"""Time every legal candidate for the layers of `layers.py` on this GPU, and keep the winners in its tuned table.

    python tools/tune.py [--out FILE] [--minutes M] [--problems TEXT ...] [--again] [--log FILE]

A candidate is timed only after it has passed the gate. First every layer's own candidates, then variations of the best
two. It can be stopped at any time: entries in the table are kept, and with the log a candidate is never tried twice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from compiling import Compiler, launches_of
from journal import Journal, sentence, write
from layers import BATCH, CASES, Case, Layer, fitting_batch, layers
from timing import Gate, Timer, Trial, describe, end_if_lost, free_memory

from decompk.kernels import conv, tables
from decompk.kernels import device as devices
from decompk.kernels.choose import candidates
from decompk.kernels.conv.form import Choice
from decompk.kernels.device import Device
from decompk.kernels.problem import Config, Problem, key_of

KEYS = ("key", "choice")


def variations(config: Config) -> list[Config]:
    """`config` with other warps and stages, and in a split wgrad with other splits."""
    found = [replace(config, warps=warps, stages=stages) for warps in (2, 4, 8) for stages in (2, 3, 4)]
    if config.splits > 1:
        found += [replace(config, splits=config.splits * 2), replace(config, splits=config.splits // 2)]
        found += [replace(config, atomic=not config.atomic)]
    return [one for one in found if one != config]


class Table:
    """The tuned table of a device, as `kernels.tables` reads it; written whole after every new entry."""

    def __init__(self, path: Path, device: Device):
        self.path = path
        self.entries: dict[str, dict] = json.loads(path.read_text())["entries"] if path.exists() else {}
        self.head = {
            "device": device.name,
            "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
            "command": "python tools/tune.py",
            "date": time.strftime("%Y-%m-%d"),
        }

    def keep(self, key: str, choice: Choice, refined: bool) -> None:
        self.entries[key] = {**tables.entry_of(choice), "refined": refined}
        write(self.path, table_text(self.head, self.entries))


def table_text(head: dict, entries: dict[str, dict]) -> str:
    """A table's file, an entry a line."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in sorted(entries.items()))
    above = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    return f'{{\n{above},\n "entries": {{\n{lines}\n }}\n}}\n'


@dataclass
class Tuner:
    device: torch.device
    timer: Callable
    journal: Journal
    table: Table
    compiler: Compiler
    left: Callable[[], float]  # seconds

    def run(self, problems: dict[Problem, Layer], again: bool = False) -> None:
        """Both sweeps over `problems`, each with the layer that asks for it."""
        self.problems = problems
        done = set() if again else set(self.table.entries)
        refined = {key for key in done if self.table.entries[key].get("refined")}
        plain = [p for p in problems if key_of(p) not in done]
        self._sweep([(p, candidates(p, devices.of(self.device))) for p in plain], refined=False)
        rest = [p for p in problems if key_of(p) in self.table.entries.keys() - refined]
        self._sweep([(p, self._variations(p)) for p in rest], refined=True)

    def _variations(self, problem: Problem) -> list[Choice]:
        """The winner so far and variations of the best two kernels."""
        key, here = key_of(problem), devices.of(self.device)
        winner = tables.choice_of(self.table.entries[key])
        timed = [record["entry"] for record in self.journal.records if record["key"] == key and "ms" in record]
        ranked = [winner, *(tables.choice_of(entry) for entry in sorted(timed, key=lambda entry: entry["ms"]))]
        best = list(dict.fromkeys(choice.config for choice in ranked if choice.config))[:2]
        configs = dict.fromkeys(one for config in best for one in variations(config))
        found = [Choice(conv.named(config.form), config, 0.0, "a variation") for config in configs]
        return [winner, *(one for one in found if one.form.why_not(problem, one.config, here) is None)]

    def _sweep(self, work: list[tuple[Problem, list[Choice]]], refined: bool) -> None:
        for problem, choices in work:
            for choice in choices:
                self.compiler.ask(self._launches(problem, choice))
        for problem, choices in work:
            if self.left() < 10:
                print("stopped for time", flush=True)
                return
            self.tune(problem, choices, refined)

    def tune(self, problem: Problem, choices: list[Choice], refined: bool = False) -> None:
        """Check and time `choices`; the fastest goes into the table."""
        key = key_of(problem)
        names = ["timing"] if self.journal.has(key=key, choice="timing") else map(describe, choices)
        if all(self.journal.has(key=key, choice=name) for name in names):
            return
        try:
            layer = self.problems[problem]
            trial = Trial(layer.problem.of(problem.kind), self.device, layer.image)
            gate = trial.gate()
            sound = {describe(choice): choice for choice in choices if self._sound(problem, trial, gate, choice)}
            self.journal.begin(key=key, choice="timing")
            timings = self.timer({name: partial(trial.by_choice, choice) for name, choice in sound.items()})
        except Exception as error:
            self.journal.add(key=key, choice="timing", error=sentence(error))
            end_if_lost(self.device)
            return
        for name, timing in timings.items():
            entry = tables.entry_of(replace(sound[name], ms=timing.ms))
            if not self.journal.has(key=key, choice=name):
                self.journal.add(key=key, choice=name, **vars(timing), predicted_ms=sound[name].ms, entry=entry)
        winner = min(timings, key=lambda name: timings[name].ms)
        self.table.keep(key, replace(sound[winner], ms=timings[winner].ms), refined)

    def _launches(self, problem: Problem, choice: Choice) -> list:
        if choice.backend != "triton" or not self.compiler.pool:
            return []
        layer = self.problems[problem]
        return launches_of(lambda: Trial(layer.problem.of(problem.kind), "meta", layer.image).by_choice(choice))

    def _sound(self, problem: Problem, trial: Trial, gate: Gate, choice: Choice) -> bool:
        """Whether `choice` runs and is right; what was found wrong once is not run again."""
        key, name = key_of(problem), describe(choice)
        if self.journal.has(key=key, choice=name):
            return any(r["choice"] == name and r["key"] == key and "ms" in r for r in self.journal.records)
        self.compiler.wait(self._launches(problem, choice), max(self.left(), 0.0))
        self.journal.begin(key=key, choice=name)
        try:
            trial.poison()
            error, fault = gate(trial.by_choice(choice))
        except Exception as broken:
            self.journal.add(key=key, choice=name, error=sentence(broken))
            end_if_lost(trial.device)
            return False
        if fault:
            self.journal.add(key=key, choice=name, fault=fault, rel_error=error)
        return fault is None


def problems(
    memory: float,
    only: Sequence[str] = (),
    cases: Sequence[Case] = CASES,
    dtype: str = "bfloat16",
    batch: int = BATCH,
) -> dict[Problem, Layer]:
    """Every pass of every layer once; `only`: those whose network or key holds one of these texts."""
    found = {}
    for case in cases:
        for layer in layers(case, dtype, fitting_batch(case, memory, batch)):
            for problem in layer.passes():
                texts = (case.title, key_of(problem))
                if not only or any(text in where for text in only for where in texts):
                    found.setdefault(problem, layer)
    return found


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="the table; by default that of this device")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--problems", nargs="*", default=[], metavar="TEXT", help="only these networks or keys")
    parser.add_argument("--again", action="store_true", help="tune what the table already holds, too")
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "tune.jsonl", help="a record of each candidate")
    return parser.parse_args(argv)


def run(args: argparse.Namespace, device: torch.device, timer: Callable) -> None:
    deadline = time.monotonic() + 60 * args.minutes
    torch.backends.cudnn.benchmark = True
    if args.again:
        args.log.unlink(missing_ok=True)
    table = Table(args.out or tables.table_path(devices.of(device)), devices.of(device))
    journal = Journal(args.log, KEYS, "tune")
    compiler = Compiler(devices.of(device).capability if device.type == "cuda" else 0)
    wanted = problems(free_memory(device), args.problems)
    Tuner(device, timer, journal, table, compiler, lambda: deadline - time.monotonic()).run(wanted, args.again)
    compiler.close()
    wrong = sum("fault" in record for record in journal.records)
    print(f"{len(table.entries)} entries in {table.path}; {wrong} candidates were wrong")


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    if not torch.cuda.is_available():
        print("tune needs an NVIDIA GPU, and torch sees none.", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    run(args, device, Timer(device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
