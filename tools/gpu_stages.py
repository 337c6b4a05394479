"""The stages of `tools/gpu_suite.py`, each a process of its own: `gpu_stages.py STAGE --out DIR --until SECONDS`.

A stage works through its items in the order in which they are wanted, stops before `--until`, and skips what the
records hold already. With --rehearse everything is small and runs on the CPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import machine
import step_bench
import steps
from checks import Check
from compiling import Compiler, launches_of
from desk import KEYS, Desk, in_earnest, in_miniature
from journal import Journal, read
from layer_bench import Bench
from layers import Case
from steps import Training
from timing import free_memory
from tune import Table, Tuner, problems

from decompk.kernels import device as devices
from decompk.kernels import extension

# ---- checks ---------------------------------------------------------------------------------------------------------


def checks(desk: Desk) -> None:
    """Correctness: one of each kind first, then what is marked, then the rest of the first dtype."""
    found, few = desk.plan.checks(), desk.plan.few
    run_checks(
        desk, found.firsts, lambda: found.steps()[:few], lambda: found.marked()[:few], lambda: found.rest()[:few]
    )


def odd(desk: Desk) -> None:
    """The other dtypes and odd shapes, and what `checks` found no time for."""
    found, few = desk.plan.checks(), desk.plan.few
    done = {(r.get("part"), r.get("case")) for r in read(desk.journal.path) if r.get("stage") == "checks"}

    def missed() -> list[Check]:
        return [check for check in found.marked() + found.rest() if (check.kind, check.name) not in done][:few]

    run_checks(desk, missed, lambda: found.more()[: 2 * few])


def run_checks(desk: Desk, *lists: Callable[[], list[Check]]) -> None:
    """What is listed, each once. While the kernels of one list compile, the next list is made."""
    work: dict[tuple[str, str], Check] = {}
    asked: dict[tuple[str, str], list] = {}
    for checks in lists:
        for check in checks():
            name = check.kind, check.name
            if name in work or desk.journal.has(part=check.kind, case=check.name):
                continue
            work[name] = check
            if desk.compiler.pool and not check.needs and desk.left() > 5:
                asked[name] = launches_of(check.dry or check.run)
                desk.compiler.ask(asked[name])
        desk.journal.note("plan", items=len(work))
    built = not desk.plan.lacks and extension.why_not("cuda") is None
    for name, check in sorted(work.items(), key=lambda item: item[1].needs == "extension" and not built):
        key = {"part": check.kind, "case": check.name}
        if check.needs and desk.lacks(check.needs, **key):
            continue
        if check.needs == "extension" and not_built():
            desk.journal.add(**key, missing="the extension is not built")
            continue
        need = 20 if check.needs == "compile" else 0.5
        desk.guarded(partial(check_one, desk, check, asked.get(name, [])), need, 60, **key)


def not_built() -> bool:
    return extension.why_not("cuda") is not None


def check_one(desk: Desk, check: Check, launches: list) -> None:
    desk.compiler.wait(launches, max(desk.left(), 0))
    began = time.perf_counter()
    fault = check.run()
    outcome = {"fault": fault, "outcome": "wrong"} if fault else {"outcome": "right"}
    facts = {"marks": list(check.marks)} if check.marks else {}
    desk.journal.add(part=check.kind, case=check.name, **outcome, **facts, ran=round(time.perf_counter() - began, 3))


# ---- sanitize -------------------------------------------------------------------------------------------------------

FOUND = 86  # compute-sanitizer's exit code where it found something
ENOUGH = 12  # lines of its complaints that a record keeps


def sanitize(desk: Desk) -> None:
    """memcheck, then racecheck, on the first checks of each kind."""
    for tool, share in (("memcheck", 0.55), ("racecheck", 1.0)):
        key = {"part": "sanitizer", "case": tool}
        if not desk.lacks("sanitizer", **key):
            seconds = desk.left() * share
            desk.guarded(partial(under, desk, tool, seconds), 8, seconds + 20, **key)
    if desk.plan.lacks:  # the part of it that needs no GPU
        key = {"part": "sanitizer", "case": "its checks alone"}
        desk.guarded(partial(under, desk, "", desk.left() * 0.8, key=key), 2, 60, **key)


def under(desk: Desk, tool: str, seconds: float, key: dict[str, str] | None = None) -> None:
    """Run the first checks under `tool`; they end themselves in time, since only then does it sum up."""
    binary = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    until = str(time.time() + seconds - 4)
    command = [sys.executable, __file__, "sanitized", "--out", str(desk.out), "--until", until]
    if tool:
        command = [binary, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", *command]
    else:
        command.append("--rehearse")
    text, code = told(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # cached, all tensors are one allocation
    print(text, flush=True)
    key = key or {"part": "sanitizer", "case": tool}
    desk.journal.add(**key, **verdict(text, code))


def told(command: list[str], seconds: float, **variables: str) -> tuple[str, int]:
    """What a command says and its exit code; interrupted after `seconds`, and killed 3 later."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **variables}
    )
    try:
        return process.communicate(timeout=seconds)[0], process.returncode
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=3)[0], process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            return process.communicate()[0], process.returncode


def verdict(text: str, code: int) -> dict[str, Any]:
    """What a sanitizer's run comes to."""
    ran = re.findall(r"^sanitized (\d+) of (\d+)", text, re.MULTILINE)
    facts: dict[str, Any] = {"checks": f"{ran[-1][0]} of {ran[-1][1]}"} if ran else {"checks": "none"}
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    complaints = [
        line for line in text.splitlines() if line.startswith("=========") and "COMPUTE-SANITIZER" not in line
    ]
    if code == FOUND:
        said = "; ".join(summary) or "errors"
        return {**facts, "outcome": "found errors", "fault": said, "trace": "\n".join(complaints[:ENOUGH])}
    if code or not ran:
        return {**facts, "outcome": "could not run", "error": f"exit code {code}", "trace": text[-3000:]}
    return {**facts, "outcome": "clean", "said": "; ".join(summary)}


def sanitized(desk: Desk) -> None:
    """The checks that a sanitizer watches; says after each how many are done."""
    built = "extension" not in desk.plan.lacks and not not_built()
    work = [check for check in desk.plan.checks().firsts() if not check.needs or (built and check.needs == "extension")]
    work.sort(key=lambda check: check.needs, reverse=True)  # pointers of our own first
    for done, check in enumerate(work[: 2 * desk.plan.few], 1):
        if desk.left() < 0.5:
            break
        try:
            fault = check.run()
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        print(f"sanitized {done} of {len(work)}: {check.kind} {check.name}: {fault or 'right'}", flush=True)


# ---- layers, and what is left ---------------------------------------------------------------------------------------


def layers(desk: Desk) -> None:
    """The layers of one network by bytes, beside cuDNN, with and without the moments epilogue."""
    torch.backends.cudnn.benchmark = True
    Bench(desk, desk.plan.timer(), machine.known_roofs(desk)).run(desk.plan.layers)


def rest(desk: Desk) -> None:
    """What is left: compiled steps, then tuning."""
    torch.backends.cudnn.benchmark = True
    for case in list(desk.plan.steps)[:1]:
        for way in ("grouped", "ours packed"):
            key = {"part": "steps", "net": case.title, "pass": "step", "impl": f"{way}, compiled"}
            if not desk.lacks("compile", **key):
                desk.guarded(partial(compiled, desk, case, way, key), 45, 150, **key)
    tune(desk)


def compiled(desk: Desk, case: Case, way: str, key: dict[str, str]) -> None:
    field = step_bench.field_of(case, desk.plan)
    step = Training(steps.compiled(step_bench.WAYS[way](field)), field.target, case.K, desk.plan.autocast)
    began = time.perf_counter()
    loss = float(step())
    first = time.perf_counter() - began
    timing = desk.plan.timer()({way: step}, cold=False, seconds=1.0, runs=200, least=20)[way]
    desk.journal.add(**key, **vars(timing), first_step_s=first, losses=[loss])


def tune(desk: Desk) -> None:
    """Winners go into tuned.json, which `tools/gpu_results.py` lays down as the tuned table."""
    plan, here = desk.plan, devices.of(desk.plan.device)
    journal = Journal(desk.journal.path, ("key", "choice"), "tune")
    timer = plan.timer()
    tuner = Tuner(plan.device, timer, journal, Table(desk.out / "tuned.json", here), desk.compiler, desk.left)
    wanted = problems(free_memory(plan.device), cases=plan.cases, dtype=plan.dtype, batch=plan.batch)
    tuner.run(dict(list(wanted.items())[: plan.few]))


# ---- a stage --------------------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[Desk], None]] = {
    "machine": machine.machine,
    "ahead": machine.ahead,
    "checks": checks,
    "sanitize": sanitize,
    "sanitized": sanitized,
    "steps": step_bench.run,
    "layers": layers,
    "odd": odd,
    "rest": rest,
}


def end_with(parent: int) -> None:
    """Nobody waits for a stage whose suite was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(4)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--run", type=int, default=1)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    if args.rehearse:
        torch.set_num_threads(1)  # the other cores compile, or belong to others
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    plan = in_miniature() if args.rehearse else in_earnest()
    journal = Journal(args.out / "records.jsonl", KEYS, args.stage, run=args.run)
    own = args.stage in ("checks", "odd", "steps", "layers", "rest")
    compiler = Compiler(plan.arch if own else 0)
    desk = Desk(plan, journal, args.until, compiler, args.out)
    try:
        with plan.backend():
            STAGES[args.stage](desk)
    except SystemExit as lost:  # of the GPU: whatever would be tidied up now may hang
        compiler.close()
        sys.stdout.flush()
        os._exit(lost.code)
    finally:
        compiler.close()
    journal.note("done", late=desk.late)
    return 0


if __name__ == "__main__":
    sys.exit(main())
