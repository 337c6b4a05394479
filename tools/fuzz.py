"""Random problems for every operator on every backend that runs here, held against float64 and torch's own operators.

    python tools/fuzz.py [--problems N | --seconds S] [--seed N] [--op NAME ...] [--hard] [--repeat JSON]

The rule: an error against float64 of at most twice that of torch's own operator in the same dtype, plus 1e-6, in
float64 1e-12, relative to the reference; where luck may decide, over 16 draws of the data. What is NaN or infinite is
what torch makes so, and of no other member any bit changes; inputs keep their bits; and so do the C++ kernels' results
on 1, 2 and 4 threads. A failing problem is shrunk to one that still fails and printed as a command that repeats it.
Each problem has a seed of its own, counted up from --seed; every 16th is one of the next pair of operator and backend.
Exit codes: 0 nothing fails, 1 something does, 2 wrong arguments, or what is asked for does not run here.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is first used
os.environ.setdefault("DECOMPK_MEASURE", "0")  # which kernel runs does not depend on what else the machine does

import torch
from arguments import between
from fuzz_check import HARD, OPS, SCALES, check
from fuzz_op import HALVES, Problem

import decompk
from decompk.kernels.backend import BACKENDS

IN_TURN = 16  # every so many problems one pair of operator and backend has its turn, however seldom it is drawn
# What shrinking leads to, beside an operator's own `plain`.
PLAIN = dict(layout="member", hard=None, where="x", dy="random", wanted="none", threads=False, poison=False)
KEPT = ("op", "backend", "dtype", "seed")
CHOICES = dict(backend=("default", *BACKENDS), dtype=("float32", "float64", *HALVES))
CHOICES |= dict(hard=(None, *dict.fromkeys(HARD)))
CHOICES |= dict(
    layout=("member", "first", "channel-grouped", "gaps"), dy=("random", "expanded"), wanted=("all", "x", "none")
)
TYPES = {float: (float, int, type(None))}  # of a momentum


# ---- problems -------------------------------------------------------------------------------------------------------


def pairs(names: list[str], backends: list[str]) -> list[tuple[str, str]]:
    """Each operator with each of its backends."""
    return [(name, backend) for name in names for backend in _shares(name, backends)]


def _shares(name: str, backends: list[str]) -> dict[str, float]:
    return {b: share for b, share in OPS[name].backends.items() if b in backends}


def _pair(seed: int, rng: random.Random, names: list[str], backends: list[str]) -> tuple[str, str]:
    if seed % IN_TURN == 0:
        each = pairs(names, backends)
        return each[seed // IN_TURN % len(each)]
    name = rng.choice(names)
    shares = _shares(name, backends)
    return name, rng.choices([*shares], [*shares.values()])[0]


def draw(seed: int, names: list[str], backends: list[str], hard: bool = False) -> Problem:
    """The problem of this seed."""
    rng = random.Random(seed)
    name, backend = _pair(seed, rng, names, backends)
    op = OPS[name]
    # Triton's interpreter truncates to bfloat16.
    dtypes = {"cpu": ("float32",), "emulation": HALVES, "triton": ("float32", "float16")}.get(backend, op.dtypes)
    p = PLAIN | op.draw(rng) | dict(op=name, seed=seed, backend=backend, dtype=rng.choice(dtypes))
    p |= dict(wanted=rng.choice(("all", "all", "all", "x", "none")), dy=rng.choice(("random", "random", "expanded")))
    p |= dict(layout=rng.choice(("member", "member", "first", "channel-grouped", "gaps")), where=rng.choice(op.hot))
    p |= dict(poison=rng.random() < 0.5)
    if hard or rng.random() < 0.4:
        fit = HARD if p["dtype"] not in HALVES else [h for h in HARD if h not in (*SCALES, "mean1000")]
        p["hard"] = rng.choice([h for h in fit if h not in op.exempt])
    return _suited(p, rng)


def _suited(p: Problem, rng: random.Random) -> Problem:
    """p as its backend takes it, mostly, and in sizes that take no longer there than elsewhere."""
    convolves = "kh" in p
    if p["op"] == "fused_conv2d":
        p["wanted"] = "none"  # it is for inference
    if p["backend"] == "cpu":
        p |= dict(threads=rng.random() < 0.2, layout="first" if p["layout"] == "first" else "member")
    if p["backend"] == "cpu" and convolves:
        p |= dict(C=-(-p["C"] // 4) * 4, O=-(-p["O"] // 4) * 4, dh=1, dw=1)
    if p["backend"] == "emulation":
        stride = rng.choice((1, 1, 2))
        p |= dict(kh=3, kw=3, sh=stride, sw=stride, ph=rng.randint(1, 2), pw=rng.randint(1, 2), dh=1, dw=1)
        p["wanted"] = "x" if stride == 1 and p["wanted"] != "none" else "none"  # all that it has
    if p["backend"] == "triton":  # interpreted, it takes seconds
        p |= {name: min(p[name], most) for name, most in dict(K=2, N=2, C=8, O=8, H=5, W=5).items() if name in p}
    return p


# ---- shrinking ------------------------------------------------------------------------------------------------------


def filled(p: Problem) -> Problem:
    """A problem with all that it does not name as plain as can be."""
    return PLAIN | OPS[p["op"]].plain | p


def shrunk(p: Problem, seconds: float = 30) -> Problem:
    """The smallest problem found that still fails, by one step after the other."""
    plain, end = filled({"op": p["op"]}), time.monotonic() + seconds

    def fails(candidate: Problem) -> bool:
        with contextlib.suppress(decompk.DecompkError):
            return time.monotonic() < end and check(candidate) is not None
        return False

    smaller: Problem | None = p
    while smaller is not None:
        p = smaller
        smaller = next((candidate for candidate in _steps(p, plain) if fails(candidate)), None)
    return p


def _steps(p: Problem, plain: Problem) -> Iterator[Problem]:
    for name, value in p.items():
        least = plain.get(name, value)
        if name in KEPT or value == least:
            continue
        yield p | {name: least}
        if isinstance(value, int) and not isinstance(value, bool):
            for less in dict.fromkeys(((value + least) // 2, value - 4, value - 1)):
                if least < less < value:
                    yield p | {name: less}


def command(p: Problem) -> str:
    """The command that repeats a problem."""
    plain = filled({"op": p["op"]})
    told = {name: value for name, value in p.items() if name in KEPT or value != plain.get(name)}
    return f"python tools/fuzz.py --repeat '{json.dumps(told)}'"


# ---- the search -----------------------------------------------------------------------------------------------------


def available() -> list[str]:
    """The backends that run here; says of the others why they do not."""
    found = ["default"]
    for name in BACKENDS:
        try:
            with decompk.backend(name):
                found.append(name)
        except decompk.DecompkError as error:
            print(error)
    return found


def search(seeds: Iterable[int], seconds: float, names: list[str], hard: bool = False) -> tuple[Counter, list[Problem]]:
    """How many problems ended how, and ran of each pair, and the shrunk failing ones: one of each kind."""
    counts, failing, kinds, end = Counter(), [], Counter(), time.monotonic() + seconds
    backends = available()
    names = [name for name in names if _shares(name, backends)]
    for seed in seeds:
        if not names or time.monotonic() > end:
            break
        p = draw(seed, names, backends, hard)
        counts["problems"] += 1
        try:
            fault = check(p)
        except decompk.DecompkError:
            counts["refused"] += 1
            continue
        counts[p["op"], p["backend"]] += 1
        if fault is None:
            continue
        counts["failing"] += 1
        kind = (p["op"], p["backend"], p["hard"], fault.split()[0])
        kinds[kind] += 1
        if kinds[kind] == 1:
            small = shrunk(p)
            failing.append(small)
            print(f"seed {seed}: {p['op']} on {p['backend']}: {fault}")
            print(f"  {check(small)}\n  {command(small)}", flush=True)
    for kind, count in kinds.most_common():
        print(f"{count} × {kind}")
    ran = Counter()
    for pair in pairs(names, backends):
        ran[pair[1]] += counts[pair]
    print("ran on " + ", ".join(f"{backend} {count}" for backend, count in ran.most_common()))
    return counts, failing


def read(text: str) -> Problem:
    """The problem that --repeat is given. Raises ArgumentTypeError with one sentence where it is none."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"this is no JSON: {error}") from None
    if not isinstance(told, dict) or told.get("op") not in list(OPS):
        raise argparse.ArgumentTypeError(f'a problem is an object with an "op" of {", ".join(OPS)}')
    if missing := [name for name in KEPT if name not in told]:
        raise argparse.ArgumentTypeError(f"this problem has no {', no '.join(missing)}: name all of {', '.join(KEPT)}")
    p, op = filled(told), OPS[told["op"]]
    examples, choices = PLAIN | op.plain | dict(seed=0), CHOICES | dict(op=list(OPS), where=op.hot)
    for name, value in p.items():
        said = json.dumps(value)
        if name in choices:
            if value not in choices[name]:
                raise argparse.ArgumentTypeError(f"{name} is one of {json.dumps(choices[name])}, not {said}")
        elif name not in examples:
            raise argparse.ArgumentTypeError(f"{p['op']} has no '{name}': it has {', '.join(examples)}")
        elif type(value) not in TYPES.get(type(examples[name]), [type(examples[name])]):
            raise argparse.ArgumentTypeError(f"{name} is a value like {json.dumps(examples[name])}, not {said}")
    return p


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=between(int, 1), metavar="N", help="at most so many")
    parser.add_argument("--seconds", type=between(float, 1), metavar="S", help="default: 60, no limit with --problems")
    parser.add_argument("--seed", type=between(int, 0, 2**62), default=0, metavar="N", help="of the first problem")
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), metavar="NAME", help=", ".join(OPS))
    parser.add_argument("--hard", action="store_true", help="hard inputs alone")
    parser.add_argument("--repeat", type=read, metavar="JSON", help="one problem, as a failing one is printed")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.repeat is not None:
        return _repeat(args.repeat)
    seeds = itertools.count(args.seed) if args.problems is None else range(args.seed, args.seed + args.problems)
    counts, _ = search(seeds, args.seconds or (60 if args.problems is None else float("inf")), args.op, args.hard)
    print(", ".join(f"{counts[name]} {name}" for name in ("problems", "refused", "failing")))
    if not counts["problems"]:
        print(f"none of the backends of {', '.join(args.op)} runs here", file=sys.stderr)
        return 2
    return int(counts["failing"] > 0)


def _repeat(p: Problem) -> int:
    try:
        fault = check(p)
    except decompk.DecompkError as error:
        print(f"the problem is refused: {error}", file=sys.stderr)
        return 2
    print(fault or "nothing is wrong")
    return int(fault is not None)


if __name__ == "__main__":
    sys.exit(main())
