"""All the work for a GPU in one call of nine minutes: what the machine reaches, correctness, peers, layers, tuning.

    python tools/gpu_suite.py --out DIR [--minutes M] [--only STAGE,...] [--resume [ARCHIVE]] [--retry] [--rehearse]

Each stage has a box of seconds of its own and runs as a process of its own: what breaks or hangs in it is recorded, and
it goes on behind that place while its box lasts. Every result is in DIR/records.jsonl the moment it exists; after each
stage DIR/gpu_suite.tar.gz is made again of records, logs, summary.md and the tuned table (tuned.json). A second call
goes on where the records of the first one end; --retry runs again what failed there. --rehearse does all of it in
miniature on a CPU. Exit code 1 if something failed or was wrong, 2 without a GPU. `tools/gpu_results.py` lays an
archive into the repository.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_summary import failures, summary
from journal import PATIENCE, append, parse, read, sentence, unpack, write

ROOT = Path(__file__).parents[1]
ARCHIVE = "gpu_suite.tar.gz"
SHOWN = 10_000  # characters of the summary
MINUTES, REHEARSAL = 8.6, 5.8
STARTING = 75.0  # seconds until a process must have written its first line: torch loads slowly from a cold disk
GRACE = 2.0  # seconds behind a box until its processes are killed
ENDING = 5.0  # seconds for archive and summary
RESTARTS = 25
LOG = 400_000  # bytes of a stage's log, and as much of its end
ROOM = 15 * 2**20  # bytes of the archive


@dataclass(frozen=True)
class Stage:
    """A name and a box in seconds; the last one that runs gets what is left."""

    name: str
    seconds: float


# What each is estimated to need is counted, not measured; a kernel takes 1.5 s to compile, and 14 are compiled at once.
STAGES = (
    Stage("machine", 30),  # 20 of them for it, 10 for torch from a cold disk
    Stage("checks", 100),  # 430 checks of 50 ms, 350 kernels: 38 s of compiling beside 22 of running, then the steps
    Stage("sanitize", 40),  # twice 8 s to import under the tool, then some 30 checks of 0.3 s
    Stage("steps", 150),  # three networks, 13 contestants each of 2 to 5 s
    Stage("layers", 120),  # 79 passes beside 7 to 12 contestants, 1 to 1.5 s each, the most of it cuDNN's search
    Stage("odd", 40),  # 1800 checks with 1500 kernels: a fifth
    Stage("rest", 30),  # never done
)
BESIDE = "ahead"  # compiles while these run, of which nothing is timed
UNTIMED = ("checks", "sanitize")


class Stopped(BaseException):
    """Somebody wants this to end now."""


class Suite:
    """One call: stages in their boxes, and what is left of them in `out`."""

    def __init__(self, out: Path, minutes: float, rehearse: bool = False):
        self.out, self.rehearse, self.end = out, rehearse, time.time() + 60 * minutes - ENDING
        self.records, self.live = out / "records.jsonl", out / "running.log"
        self.logs = Path(tempfile.mkdtemp(prefix="gpu-suite-"))
        self.processes: list[subprocess.Popen] = []
        self.broken = False
        out.mkdir(parents=True, exist_ok=True)
        self.number = 1 + max((line.get("run", 0) for line in read(self.records)), default=0)

    def run(self, names: list[str]) -> int:
        """Every stage of `names` that is not done; returns the exit code."""
        todo = [stage for stage in STAGES if stage.name in names and not self.done(stage.name)]
        beside = None
        with stopping() as signals:
            try:
                for stage in todo:
                    with self.whole():
                        if beside is None and stage.name in UNTIMED:
                            beside = self.start(BESIDE, self.end, self.logs / f"{BESIDE}.log")
                        if beside is not None and stage.name not in UNTIMED:
                            self.end_beside(beside)
                        until = self.end if stage is todo[-1] else min(time.time() + stage.seconds, self.end)
                        self.stage(stage.name, until)
            except Stopped:
                with self.whole():
                    self.note("suite", "stopped", reason="a signal")
            signals.clear()
            for process in list(self.processes):
                self.stop(process)
            text = summary(read(self.records), SHOWN)
            with self.whole():
                self.keep_log("stopped")
                text = self.pack()
        print(f"\n{text}", flush=True)
        return 1 if self.broken or failures(read(self.records)) else 0

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """What breaks inside, as where the disk is full, is said and does not end the rest."""
        try:
            yield
        except Exception as error:
            self.broken = True
            print(f"the suite itself broke here: {sentence(error)}", file=sys.stderr, flush=True)

    def end_beside(self, process: subprocess.Popen) -> None:
        """Nothing compiles while something is timed."""
        if process in self.processes:
            code = process.poll()
            self.stop(process)
            if code is None:
                reason = "out of time"
            else:
                reason = "finished" if code == 0 else f"ended with {ending(code)}: {''.join(process.tail)[-300:]}"
            self.note(BESIDE, "stopped", reason=reason)

    def done(self, name: str) -> bool:
        """Whether a call before this one has finished the stage; a new machine is always measured."""
        ends = [line for line in read(self.records) if line.get("stage") == name and line.get("event") == "done"]
        return bool(ends) and not ends[-1].get("late") and name not in ("machine", "rest")

    def stage(self, name: str, until: float) -> None:
        if self.end - time.time() < 4:
            self.note(name, "stopped", reason="no time was left")
            return
        began = time.time()
        outcome = self.supervise(name, until)
        self.note(name, "stopped", reason=outcome, box=round(until - began), took=round(time.time() - began, 1))
        self.keep_log(name)
        self.pack()
        count = sum(line.get("stage") == name and "begun" not in line for line in read(self.records))
        print(f"{name}: {outcome} in {time.time() - began:.0f} of {until - began:.0f} s, {count} records", flush=True)

    def supervise(self, name: str, until: float) -> str:
        """Run a stage, again behind each place where it breaks or hangs; returns how it ended."""
        for _ in range(RESTARTS):
            watch = Watch(self.records, name)
            process = self.start(name, until, self.live)
            while process.poll() is None:
                time.sleep(0.05)
                watch.look()
                if time.time() > until + GRACE:
                    self.stop(process)
                    return "out of time"
                if watch.quiet():
                    process.send_signal(signal.SIGABRT)  # it says where it hangs, if it still can
                    time.sleep(1)
                    break
            self.stop(process)  # children that outlive it
            code, hung = process.returncode, watch.quiet()
            watch.look()
            if code == 0 and not hung:
                return "finished"
            why = f"hung for {watch.patience:.0f} s" if hung else f"ended with {ending(code)}"
            self.blame(name, watch, why, process.tail)
            if not watch.moved:
                return f"broke: it {why} before its first item"
            if until - time.time() < 8:
                return f"out of time after it {why}"
        return f"given up after {RESTARTS} restarts"

    def blame(self, name: str, watch: Watch, why: str, tail: collections.deque) -> None:
        """Make what was begun last an error, so that nobody runs it again."""
        text = "".join(tail)
        said = [line.strip() for line in text.splitlines() if re.search("Error|error|assert|lost", line)]
        stage, begun = watch.begun or (name, {"part": "stage"})
        error = f"the process {why} here{': ' if said else ''}{said[-1][:200] if said else ''}"
        facts = {"error": error, "trace": text[-4000:], "lost": True}
        append(self.records, {"stage": stage, "run": self.number, **begun, **facts})

    def command(self, name: str, until: float) -> list[str]:
        command = [sys.executable, str(ROOT / "tools" / "gpu_stages.py"), name, "--out", str(self.out)]
        return [*command, "--until", f"{until:.2f}", "--run", str(self.number), *["--rehearse"] * self.rehearse]

    # ---- processes --------------------------------------------------------------------------------------------------

    def start(self, name: str, until: float, log: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            self.command(name, until),
            cwd=ROOT,
            env=environment(self.rehearse),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        process.tail = collections.deque(maxlen=60)
        process.pouring = threading.Thread(target=pour, args=(process, log), daemon=True)
        process.pouring.start()
        self.processes.append(process)
        return process

    def stop(self, process: subprocess.Popen | None) -> None:
        """End a process and all that it has started."""
        if process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.pouring.join(2)
            self.processes.remove(process)

    def note(self, stage: str, event: str, **facts: Any) -> None:
        append(self.records, {"stage": stage, "run": self.number, "event": event, **facts})

    # ---- what is left of it -----------------------------------------------------------------------------------------

    def keep_log(self, name: str) -> None:
        if self.live.exists():
            shutil.move(self.live, self.logs / f"{name}.log")

    def pack(self) -> str:
        """Write summary.md and the archive; returns the summary."""
        text = summary(read(self.records), SHOWN)
        write(self.out / "summary.md", text + "\n")
        files = [self.records, self.out / "summary.md", self.out / "tuned.json"]
        logs = sorted(self.logs.glob("*.log"))
        if not self.archive(files + logs):
            self.archive(files)
        return text

    def archive(self, files: list[Path]) -> bool:
        """Whether the archive of `files` has room."""
        draft = self.out / f"{ARCHIVE}.draft"
        with tarfile.open(draft, "w:gz", compresslevel=6) as tar:
            for file in files:
                if file.exists():
                    tar.add(file, f"logs/{file.name}" if file.suffix == ".log" else file.name, recursive=False)
        fits = draft.stat().st_size <= ROOM
        if fits:
            os.replace(draft, self.out / ARCHIVE)
        draft.unlink(missing_ok=True)
        return fits


class Watch:
    """What a stage writes: `begun` is (stage, key) of the item under way, `moved` whether there was one at all."""

    def __init__(self, records: Path, name: str):
        self.records, self.name = records, name
        self.place = records.stat().st_size if records.exists() else 0
        self.alive, self.patience = time.time(), STARTING
        self.begun: tuple[str, dict[str, Any]] | None = None
        self.moved = False

    def look(self) -> None:
        """Take in the lines that are new and whole."""
        if not self.records.exists() or self.records.stat().st_size == self.place:
            return
        with open(self.records, "rb") as file:
            file.seek(self.place)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self.place += len(text)
        for line in parse(text):
            if line.get("stage") != BESIDE or self.name == BESIDE:
                self.alive, self.patience = time.time(), line.get("patience", PATIENCE)
                self.begun = (line["stage"], line["begun"]) if "begun" in line else None
                self.moved = self.moved or "event" not in line

    def quiet(self) -> bool:
        return time.time() - self.alive > self.patience


def pour(process: subprocess.Popen, log: Path) -> None:
    """What a process says into its log: the first and the last LOG bytes of it."""
    size, end = 0, collections.deque()
    with open(log, "ab") as file:
        for line in process.stdout:
            process.tail.append(line.decode(errors="replace"))
            size += len(line)
            if size <= LOG:
                file.write(line)
                file.flush()
                continue
            end.append(line)
            while size - LOG > LOG and end:
                size -= len(end.popleft())
        file.write(b"".join(end))


def ending(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


def environment(rehearse: bool) -> dict[str, str]:
    """What a child process gets: the tools importable, kernels compiled, or interpreted in a rehearsal."""
    paths = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    own |= {"TRITON_INTERPRET": "1", "DECOMPK_MEASURE": "0"} if rehearse else {}
    return {**{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}, **own}


@contextlib.contextmanager
def stopping() -> Iterator[list[int]]:
    """SIGTERM and SIGINT raise Stopped inside, once, while they are in the list that this gives."""
    heard = [signal.SIGTERM, signal.SIGINT]

    def stop(number: int, _: Any) -> None:
        if number in heard:
            heard.clear()
            raise Stopped

    before = {one: signal.signal(one, stop) for one in heard}
    try:
        yield heard
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def gpu() -> bool:
    """Whether there is one, without asking torch, which may be what is broken."""
    if list(Path("/dev").glob("nvidia[0-9]*")):
        return True
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20).stdout.startswith(b"GPU")
    return False


def resume(archive: Path, out: Path, retry: bool) -> None:
    """Begin `out` with what an earlier call left: what lies in `out`, which is never older, or else an archive."""
    records = out / "records.jsonl"
    if archive.is_file() and not records.exists():
        for name, content in unpack(archive).items():
            (out / name).write_bytes(content)
    lines = read(records)
    stages = {line.get("stage", "") for line in lines}
    again = {stage for stage in stages if any(failed(line) for line in lines if line.get("stage") == stage)}
    kept = []
    for line in lines:
        stage = line.get("stage", "")
        if retry and (failed(line) or (line.get("event") == "done" and stage in again)):
            continue
        if stage in ("machine", BESIDE):  # this is another machine, perhaps
            line = {**line, "stage": f"{stage}, run {line.get('run')}"}
        kept.append(line)
    # What was under way was killed with all of the call, and not by what it did.
    left = [stage.name for stage in STAGES if stage.name in stages and stage.name != "machine"]
    kept += [{"stage": stage, "event": "stopped", "reason": "the call ended"} for stage in left]
    write(records, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def failed(line: dict[str, Any]) -> bool:
    return "error" in line or "fault" in line


def main(argv: list[str] | None = None) -> int:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, help=f"for all of it; default {MINUTES}, of a rehearsal {REHEARSAL}")
    parser.add_argument("--only", default=",".join(names), metavar="STAGE,...", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--resume", type=Path, nargs="?", const=Path(), metavar="ARCHIVE", help="go on; default: in DIR"
    )
    parser.add_argument("--retry", action="store_true", help="with --resume: run again what failed")
    parser.add_argument("--rehearse", action="store_true", help="in miniature, on the CPU")
    args = parser.parse_args(argv)
    wanted = [name.strip() for name in args.only.split(",")]
    if unknown := set(wanted) - set(names):
        parser.error(f"there is no stage {', '.join(sorted(unknown))}; choose of {', '.join(names)}")
    if not args.rehearse and not gpu():
        print("gpu_suite needs an NVIDIA GPU, and finds none; --rehearse runs it in miniature.", file=sys.stderr)
        return 2
    if args.minutes is not None and not args.minutes > 0:
        parser.error("--minutes is more than 0")
    out = args.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{out} cannot be a folder of results: {sentence(error)}")
    if args.resume is not None:
        if args.resume != Path() and not args.resume.is_file():
            parser.error(f"there is no archive {args.resume}")
        try:
            resume(args.resume.resolve(), out, args.retry)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    elif (out / "records.jsonl").exists():
        parser.error(f"{out} holds records: --resume goes on with them, or choose another --out")
    minutes = args.minutes if args.minutes is not None else (REHEARSAL if args.rehearse else MINUTES)
    return Suite(out, minutes, args.rehearse).run(wanted)


if __name__ == "__main__":
    sys.exit(main())
