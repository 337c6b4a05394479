"""Random problems for the C++ kernels under AddressSanitizer with UBSan, and under ThreadSanitizer.

    python tools/sanitize.py [--seconds S | --problems N] [--seed N] [--only address|thread|halo] [--threads 1,2,4]

tools/sanitize.cpp, linked with decompk/kernels/cpu/*.cpp, runs them under both; tools/sanitize_halo.cpp, the kernel of
csrc/ on the host, under the first ("halo"): see there what they check beside. Each problem has a seed of its own,
counted up from --seed, so `--seed N --problems 1` repeats one; memory that any of them leaks is found at the end.
Exit codes: 0 nothing was found, 1 something was, 2 wrong arguments, or the driver cannot be built: there is no g++, it
has no sanitizers, or it says what is wrong with the code.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import build_ext
from arguments import between

from decompk.kernels import conv, cpu
from decompk.kernels import device as devices
from decompk.kernels.problem import PASSES, Problem

SANITIZERS = {"address": "address,undefined", "thread": "thread", "halo": "address,undefined"}
FLAGS = ("-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
CPU_FLAGS = ("-DPOISON",)
HALO_FLAGS = ("-std=c++17", "-O0", *build_ext.EMULATION_FLAGS[1:])  # -O0 compiles twice as fast
# The emulation's fibers have stacks of their own, which AddressSanitizer takes for returned from.
OPTIONS = {"ASAN_OPTIONS": "detect_stack_use_after_return=0", "TSAN_OPTIONS": "halt_on_error=1"}
PATIENCE_S = 60  # for one problem
SEEDS = 2**32  # the driver's are unsigned int
ANSWER = "answer: "


class Unavailable(Exception):
    """One sentence: what is missing here."""


@dataclass
class Found:
    """What a run has found: `reports` are a sanitizer's, `faults` wrong results."""

    problems: int = 0
    reports: int = 0
    faults: int = 0


# ---- problems -------------------------------------------------------------------------------------------------------


def line_of(seed: int, sanitizer: str) -> str:
    """The problem of this seed, as the driver reads it."""
    rng = random.Random(seed)
    draw = _halo if sanitizer == "halo" else rng.choices(DRAWS, (8, 2, 2, 9, 1, 1))[0]
    return f"{seed} {draw(rng)}"


FORMS = [form.name for form in conv.FORMS if form.backend == "cpu"]
RELUS = (0, 1, 6)
LAYER, POOL, FLATTEN = range(3)  # kinds of steps


def _conv(rng: random.Random) -> str:
    kind, form = rng.choice(PASSES), rng.choice(FORMS)
    sizes = _sizes(rng, form, (kind,))
    hot = f"{rng.choice(('x', 'w', 'dy'))} {rng.choice(('nan', 'inf'))} {rng.choice((0, 0, 0, 0.01, 0.3, 1))}"
    return f"conv {kind} {form} {rng.randint(0, 1)} {hot} {sizes}"


def _layer(rng: random.Random) -> str:
    by, normed = rng.choice(list(cpu.BY)), rng.randint(0, 1)
    flags = rng.randint(0, 1), rng.choice(RELUS), normed and rng.randint(0, 1), rng.randint(0, 1)
    sizes = _sizes(rng, by if by in FORMS else cpu.DIRECT, PASSES, by == cpu.WINOGRAD, 8 if normed else 1)
    if by == cpu.BY_CHANNEL:
        K, N, C, _, *others = sizes.split()
        sizes = " ".join((K, N, C, C, *others))
    return f"layer {cpu.BY[by]} {normed} {' '.join(map(str, flags))} {sizes}"


def _sizes(rng: random.Random, form: str, passes: Sequence[str], same: bool = False, least: int = 1) -> str:
    """A convolution's, as Shape has them, that `form` computes in these passes; y has `least` pixels or more.

    same: whether y is as large as x.
    """
    large = rng.random() < 0.1  # enough pixels for sums in several parts
    while True:
        step = 8 if form == "winograd" else rng.choice((1, 4))
        most = 2 if large else 4 if rng.random() < 0.7 else 24
        C, O = (step * rng.randint(1, most if step > 1 else 20) for _ in "CO")
        sides = [rng.randint(*((20, 40) if large else (1, rng.choice((3, 9, 16))))) for _ in "HW"]
        kernel = (3, 3) if form == "winograd" else tuple(rng.choice((1, 1, 2, 3, 3, 5, 7)) for _ in "HW")
        stride = (1, 1) if form == "winograd" else tuple(rng.choice((1, 1, 2, 3, 4)) for _ in "HW")
        padding = tuple(k // 2 if same else rng.choice((0, 0, k // 2, rng.randint(0, k))) for k in kernel)
        K, N = rng.randint(1, 2 if large else 5), rng.randint(1, 6)
        p = Problem(passes[0], "float32", K, N, C, O, *sides, kernel, stride, padding)
        pixels = N * max(p.out_size[0], 0) * max(p.out_size[1], 0)
        if pixels < least or K * C * O * p.taps * pixels > (4e6 if large else 2e5):
            continue
        if all(_legal(p.of(kind), form) for kind in passes):
            return " ".join(map(str, (K, N, C, O, *sides, *kernel, *stride, *padding, *p.out_size)))


def _legal(problem: Problem, form: str) -> bool:
    return conv.named(form).why_not(problem, None, devices.KNOWN[90]) is None


def _norm(rng: random.Random) -> str:
    training, C = rng.random() < 0.7, rng.choice((1, 3, 4, 8, 12, 17, 32, 40, 96))
    rows = rng.choice((rng.randint(1 + training, 40), rng.randint(40, 3000 if C < 16 else 600)))
    flags = [rng.randint(0, 1) for _ in ("relu", "weight", "bias")]
    running = int(not training or rng.random() < 0.7)
    numbers = (rng.choice((0.1, 0.3, 0, 1)), rng.choice((1e-5, 1e-3)))
    values = (rng.randint(1, 4), rows, C, int(training), *flags, running, rng.randint(0, 1), *numbers)
    return f"norm {' '.join(map(str, values))}"


def _layer_norm(rng: random.Random) -> str:
    D = rng.choice((1, 3, 4, 8, 17, 20, 64, 100, 160, rng.randint(1, 40), rng.randint(1000, 5000)))
    rows = rng.randint(1, 40 if rng.random() < 0.7 else max(40, 100_000 // D))
    flags = [rng.randint(0, 1) for _ in ("weight", "bias", "dx", "dweight", "dbias")]
    values = (rng.randint(1, 4), rows, D, *flags, rng.choice((0, 1, 1000)), rng.choice((1e-5, 1e-3)))
    return f"layer_norm {' '.join(map(str, values))}"


def _pool(rng: random.Random) -> str:
    C, kernel = rng.choice((1, 3, 4, 8, 17, 32)), [rng.choice((1, 2, 2, 3, 3, 5)) for _ in "HW"]
    sides, padding = [rng.randint(k, 20) for k in kernel], [rng.randint(0, k // 2) for k in kernel]
    stride = kernel if rng.random() < 0.5 else [rng.randint(1, 3) for _ in kernel]
    out = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(sides, padding, kernel, stride, strict=True)]
    values = (1, rng.randint(1, 9), C, C, *sides, *kernel, *stride, *padding, *out)
    return f"pool {' '.join(map(str, values))}"


def _stretch(rng: random.Random) -> str:
    most = 24 if rng.random() < 0.1 else 9  # the former: enough pixels for sums in several parts
    K, N, wants, count = rng.choice((1, 2, 3, 4, 4, 5)), rng.randint(1, 3), rng.randint(0, 1), rng.randint(2, 4)
    while True:
        channels = rng.choice((4, 8, 8, 16) if wants else (3, 4, 8))
        values = [(channels, *(rng.randint(most // 3, most) for _ in "HW"))]  # what is given, and what steps give
        steps, used, cost = [], {count}, 0
        while len(steps) < count and (step := _step(rng, K, N, values, wants)):
            text, reads, out, paid = step
            steps.append(text)
            values.append(out)
            used |= reads
            cost += paid
        if len(steps) == count and used.issuperset(range(count)) and cost < (2e6 if most > 9 else 2e5):
            return f"stretch {K} {wants} {count} {' '.join(steps)}"


def _step(
    rng: random.Random, K: int, N: int, values: list, wants: int
) -> tuple[str, set[int], tuple[int, ...], int] | None:
    """A step that reads one of `values`, which of them it uses, the value it gives, and its products; or None."""
    last, kind = len(values) - 1, rng.choices((LAYER, POOL, FLATTEN), (7, 2, 1))[0]
    reads = last if rng.random() < 0.7 else rng.randint(0, last)
    C, *sides = values[reads]
    k, stride = rng.choice((2, 3) if kind == POOL else (1, 3, 3)), rng.choice((1, 2) if kind == POOL else (1, 1, 2))
    padding, O = rng.choice((0, k // 2, k // 2)), C if kind != LAYER else rng.choice((4, 6, 8, 8, 16, C))
    if kind == FLATTEN:
        k, stride, padding = 1, 1, 0
    p = Problem("fprop", "float32", K, N, C, O, *sides, (k, k), (stride, stride), (padding, padding))
    passes = [each for each in PASSES if each != "dgrad" or reads or wants]
    if min(p.out_size) < 1:
        return None
    out = (O, *p.out_size) if kind != FLATTEN else (C * prod(sides), 1, 1)
    sizes = (*((K, N) if kind == LAYER else (1, K * N)), C, O, *sides, *p.kernel, *p.stride, *p.padding, *p.out_size)
    if kind != LAYER:
        return " ".join(map(str, (kind, *(0,) * 7, reads, -1, *sizes))), {reads}, out, 0
    same, fast = p.out_size == (p.H, p.W), _legal(p, "winograd")
    by, back = fast and rng.randint(0, 1), fast and (same or "dgrad" not in passes) and rng.randint(0, 1)
    if O == C and rng.random() < 0.3:
        by = back = cpu.BY[cpu.BY_CHANNEL]
    normed = N * prod(p.out_size) > 1 and rng.random() < 0.7
    fitting = [i for i, value in enumerate(values) if value == out][-2 if reads == last else -1 :]
    adds = rng.choice(fitting) if normed and fitting and rng.random() < 0.8 else -1
    flags = rng.choice(RELUS), *(rng.randint(0, 1) for _ in ("bias", "affine", "running"))
    how = (0, flags[0], by, back, normed, flags[1], normed and flags[2], normed and flags[3], reads, adds)
    cost = K * N * C * O * p.taps * prod(p.out_size)
    return " ".join(map(str, map(int, (*how, *sizes)))), {reads, adds}, out, cost


DRAWS = (_conv, _norm, _layer_norm, _layer, _pool, _stretch)


def _halo(rng: random.Random) -> str:
    while True:
        C, O = (rng.choice((1, 3, 4, 5, 8, 12, 16, 24, 32, 48, 64)) for _ in "CO")
        sides, stride, padding = (
            [rng.randint(1, 12) for _ in "HW"],
            rng.choice((1, 2)),
            [rng.randint(0, 2) for _ in "HW"],
        )
        shape = (rng.randint(1, 3), rng.randint(1, 4), C, O, *sides, (3, 3), (stride, stride), tuple(padding))
        p = Problem("fprop", "bfloat16", *shape)
        if min(p.out_size) > 0 and p.K * p.N * C * O * p.out_size[0] * p.out_size[1] < 2e5:
            break
    halo = conv.named("halo")
    config = rng.choice([config for config in halo.configs(p) if halo.fits(p, config) is None])
    flags = [rng.randint(0, 1) for _ in range(7)]
    return " ".join(map(str, (rng.randint(0, 1), *shape[:6], stride, *padding, *config.tile, config.warps, *flags)))


# ---- the driver -----------------------------------------------------------------------------------------------------


def build(sanitizer: str, into: Path, sources: tuple[Path, ...] = (), level: str = "-O1") -> Path:
    """The driver with its kernels, or with `sources` in their place. Raises Unavailable and BuildError.

    At `level` -O0 the CPU's kernels compile in a third of the time and run half as fast.
    """
    gxx, sanitize = os.environ.get("CXX") or "g++", f"-fsanitize={SANITIZERS[sanitizer]}"
    try:
        build_ext.run([gxx, sanitize, "-shared", "-x", "c++", os.devnull, "-o", str(into / "trial")])
    except (OSError, build_ext.BuildError):
        raise Unavailable(f"'{gxx} {sanitize}' does not work here: install g++ and its libraries for it.") from None
    flags = [*(flag for flag in cpu.FLAGS if flag not in ("-O3", "-fPIC")), level, *CPU_FLAGS]
    sources = (*(sources or sorted(cpu.SOURCES.glob("*.cpp"))), ROOT / "tools/sanitize.cpp")
    if sanitizer == "halo":
        flags, sources = HALO_FLAGS, (ROOT / "tools/sanitize_halo.cpp",)
    objects = [str(into / f"{source.stem}-{sanitizer}.o") for source in sources]
    build_ext.run(
        *([gxx, *flags, *FLAGS, sanitize, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True))
    )
    program = into / f"driver-{sanitizer}"
    build_ext.run([gxx, sanitize, "-pthread", *objects, "-o", str(program)])
    return program


class Driver:
    """A running driver; one that a report has ended is started again for the next problem. `close` it."""

    def __init__(self, program: Path, threads: list[int]):
        self._command = [str(program), *map(str, threads)]
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_) -> None:
        self._kill()

    def ask(self, line: str) -> tuple[str, bool]:
        """What is wrong with this problem, "" for nothing, and whether a sanitizer says so."""
        if self._process is None:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            self._process = subprocess.Popen(self._command, env={**os.environ, **OPTIONS}, **pipes)
        print(line, file=self._process.stdin, flush=True)
        if not select.select([self._process.stdout], [], [], PATIENCE_S)[0]:
            self._kill()
            return f"no answer within {PATIENCE_S} s", False
        said = []
        for part in self._process.stdout:
            if part.startswith(ANSWER):
                return part.removeprefix(ANSWER).strip(), False
            said.append(part)
        self._kill()
        return _gist(said), True

    def close(self) -> str:
        """Let it end, for which a sanitizer looks for leaks: what it then says, "" for nothing."""
        if self._process is None:
            return ""
        try:
            said = self._process.communicate(timeout=PATIENCE_S)[0]
        except subprocess.TimeoutExpired:
            self._kill()
            return f"it did not end within {PATIENCE_S} s"
        code, self._process = self._process.returncode, None
        return _gist(said.splitlines()) if code or "SUMMARY:" in said else ""

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None


def _gist(said: list[str]) -> str:
    """The line that names what a sanitizer reports."""
    telling = [part for part in said if "SUMMARY:" in part or "runtime error:" in part]
    return (telling or said or ["it ended without a word"])[-1].strip()


def search(sanitizer: str, program: Path, threads: list[int], seeds: Sequence[int], seconds: float) -> Found:
    """Run the problems of `seeds` for at most so many seconds; says on stdout which fail."""
    found, end = Found(), time.monotonic() + seconds
    with Driver(program, threads) as driver:
        for seed in seeds:
            if time.monotonic() > end:
                break
            line = line_of(seed, sanitizer)
            wrong, reported = driver.ask(line)
            found.problems += 1
            found.reports += bool(wrong) and reported
            found.faults += bool(wrong) and not reported
            if wrong:
                print(f"seed {seed}: {line.partition(' ')[2]}: {wrong}", flush=True)
        if wrong := driver.close():
            found.reports += 1
            print(f"at the end: {wrong}", flush=True)
    return found


def _thread_counts(text: str) -> list[int]:
    return [between(int, 1, 64)(count) for count in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    seconds, problems, seeds = between(float, 1), between(int, 1), between(int, 0, SEEDS - 1)
    parser.add_argument(
        "--seconds", type=seconds, metavar="S", help="for each of the three; default: 60, no limit with --problems"
    )
    parser.add_argument("--problems", type=problems, metavar="N", help="at most so many for each")
    parser.add_argument("--seed", type=seeds, default=0, metavar="N", help="of the first problem")
    parser.add_argument("--only", choices=SANITIZERS, help="one of the three in place of all")
    parser.add_argument(
        "--threads",
        type=_thread_counts,
        default=[1, 2, 4],
        metavar="1,2,4",
        help="numbers that must not change results",
    )
    args = parser.parse_args(arguments)
    seeds = range(args.seed, SEEDS if args.problems is None else min(args.seed + args.problems, SEEDS))
    limit = args.seconds or (60 if args.problems is None else float("inf"))
    wrong = False
    with tempfile.TemporaryDirectory() as scratch:
        for sanitizer in [args.only] if args.only else SANITIZERS:
            try:
                program = build(sanitizer, Path(scratch))
            except (Unavailable, build_ext.BuildError) as error:
                print(error, file=sys.stderr)
                return 2
            found = search(sanitizer, program, args.threads, seeds, limit)
            print(f"{sanitizer}: {found.problems} problems, {found.reports} reports, {found.faults} faults")
            wrong |= bool(found.reports or found.faults)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
