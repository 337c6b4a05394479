"""Compile, without a GPU, the kernels that dispatch may choose, and keep what they take of a multiprocessor.

    python tools/resources.py --arch 90 [--only TEXT] [--top 3] [--minutes 10] [--processes 1]

For every layer and pass of the networks of tools/layers.py the `top` configs by prediction are compiled, with and
without what may be fused; then, with what was found, the predictions are made again, until nothing new is on top. The
table (decompk/kernels/configs/resources_sm90.json) is written anew, or with --add extended; after `minutes` it is
written with what is there. To be run again whenever device code has changed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import triton

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import layers
from arguments import between
from inspect_kernels import Kernel, Report, inspect, launches

from decompk.kernels import device as devices
from decompk.kernels import resources
from decompk.kernels.choose import candidates
from decompk.kernels.problem import Config, Problem

FUSED = {"fprop": ("", "moments"), "dgrad": ("", "sums"), "wgrad": ("",)}  # what device code there is of
ORDER = ("resnet32 K=4@16", "resnet50 K=16@70")  # the networks to begin with


def problems(only: str) -> list[Problem]:
    """Of every layer and pass, in bfloat16, with what may be fused."""
    cases = sorted((c for c in layers.CASES if only in c.title), key=lambda c: c.title not in ORDER)
    found = [p for case in cases for layer in layers.layers(case) for p in layer.passes()]
    return list(dict.fromkeys(replace(p, fused=fused) for p in found for fused in FUSED[p.kind]))


def wanted(asked: list[Problem], device: devices.Device, top: int) -> Iterator[tuple[Problem, Config]]:
    """The `top` Triton configs of each, the best of all first."""
    ranked = [[(p, c.config) for c in candidates(p, device, "triton")[:top]] for p in asked]
    for rank in range(top):
        yield from (found[rank] for found in ranked if len(found) > rank)


def table_text(entries: dict[str, dict[str, list[int]]]) -> str:
    """A table's file, a config a line."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(entries[key], sort_keys=True)}" for key in sorted(entries))
    return f'{{\n"triton": {json.dumps(triton.__version__)},\n"entries": {{\n{lines}\n}}\n}}\n'


JOBS: list[tuple[Problem, Config, int]] = []  # inherited by forked processes: kernels cannot be pickled


def _compile(i: int) -> Report:
    problem, config, arch = JOBS[i]
    main = next(one for one in launches(problem, config, problem.fused) if "PRECISION" in one.arguments)
    return inspect(Kernel(" in ".join(resources.keys_of(problem, config)), main), arch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, choices=devices.KNOWN, help="compute capability, as in sm_90")
    parser.add_argument("--only", default="", metavar="TEXT", help="the networks whose title holds this")
    parser.add_argument("--top", type=between(int, 1), default=3, help="configs a problem")
    parser.add_argument("--minutes", type=between(float, 0), default=60.0, help="when to stop compiling")
    parser.add_argument("--processes", type=between(int, 1), default=len(os.sched_getaffinity(0)))
    parser.add_argument("--add", action="store_true", help="to what the table holds; else it is written anew")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, which replaces the compiler")
    end = time.monotonic() + 60 * args.minutes
    path, device = resources.table_path(args.arch), devices.KNOWN[args.arch]
    entries: dict[str, dict[str, list[int]]] = {}
    if args.add and path.exists():
        entries = json.loads(path.read_text())["entries"]
    asked, tried, late = problems(args.only), {}, False
    while not late:
        fresh = {}
        for problem, config in wanted(asked, device, args.top):
            key = resources.keys_of(problem, config)
            if key not in tried and key[1] not in entries.get(key[0], {}):
                fresh.setdefault(key, (problem, config, args.arch))
        if not fresh:
            break
        JOBS[:] = fresh.values()
        print(f"{len(fresh)} kernels to compile", flush=True)
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("fork")) as pool:
            for start in range(0, len(JOBS), 8 * args.processes):
                if late := time.monotonic() > end:
                    break
                some = range(start, min(len(JOBS), start + 8 * args.processes))
                for i, report in zip(some, pool.map(_compile, some), strict=True):
                    key = list(fresh)[i]
                    tried[key] = report
                    if report.registers:  # else it does not compile, which tools/inspect_kernels.py says of
                        entries.setdefault(key[0], {})[key[1]] = [report.registers, report.shared]
        path.parent.mkdir(exist_ok=True)
        path.write_text(table_text(entries))
        resources.table.cache_clear()
        resources.compiled.cache_clear()
    print(f"{sum(map(len, entries.values()))} kernels of {len(entries)} configs in {path}")
    print("stopped early: run again with --add" if late else "every config on top of a prediction is compiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
