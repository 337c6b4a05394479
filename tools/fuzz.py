"""Random problems for every operator on every backend that runs here, held against float64 and torch's own operators.

    python tools/fuzz.py [--problems N | --seconds S] [--seed N] [--op NAME ...] [--hard] [--repeat JSON]

The rule: an error against float64 of at most twice that of torch's own operator in the same dtype, plus 1e-6, both
relative to the reference; where luck may decide, over 16 draws of the data. What is NaN or infinite is what torch makes
so, and of no other member any bit changes; inputs keep their bits; and so do the C++ kernels' results on 1, 2 and 4
threads. A failing problem is shrunk to one that still fails and printed as a command that repeats it. Each problem has
a seed of its own, counted up from --seed. Exit codes: 0 nothing fails, 1 something does, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is first used
os.environ.setdefault("DECOMPK_MEASURE", "0")  # which kernel runs does not depend on what else the machine does

import torch
from fuzz_ops import HALVES, OPS, Op, Problem, Tensors, laid
from torch import Tensor

import decompk
from decompk import dispatch

# What shrinking leads to, beside an operator's own `plain`.
PLAIN = dict(layout="member", hard=None, where="x", dy="random", wanted="none", threads=False, poison=False)
KEPT = ("op", "backend", "dtype", "seed")
MEANS, SCALES = {"mean10": 10, "mean100": 100, "mean1000": 1000}, {"1e-30": 1e-30, "1e30": 1e30, "denormal": 1e-40}
SPECIAL = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}
HARD = (*MEANS, *SCALES, *SPECIAL, *SPECIAL, "zeros", "constant")
DRAWS = 16
EDGE = {
    "float64": 1e-3,
    "float32": 1e-3,
    "bfloat16": 0.1,
    "float16": 0.02,
}  # of the largest: a ReLU may fall either way


class Wrong(Exception):
    """One sentence: what is wrong with a problem's results."""


# ---- problems -------------------------------------------------------------------------------------------------------


def draw(seed: int, names: list[str], backends: list[str], hard: bool = False) -> Problem:
    """The problem of this seed."""
    rng = random.Random(seed)
    name = rng.choice(names)
    op = OPS[name]
    shares = {b: share for b, share in op.backends.items() if b in backends} or {"default": 1}
    backend = rng.choices([*shares], [*shares.values()])[0]
    # Triton's interpreter truncates to bfloat16.
    dtypes = {"cpu": ("float32",), "emulation": HALVES, "triton": ("float32", "float16")}.get(backend, op.dtypes)
    p = PLAIN | op.draw(rng) | dict(op=name, seed=seed, backend=backend, dtype=rng.choice(dtypes))
    p |= dict(wanted=rng.choice(("all", "all", "all", "x", "none")), dy=rng.choice(("random", "random", "expanded")))
    p |= dict(layout=rng.choice(("member", "member", "first", "grouped", "gaps")), where=rng.choice(op.hot))
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


def inputs(p: Problem, special: bool = True) -> Tensors:
    """The operands; `special`: with the NaN or infinity of the problem, if it has one, among them."""
    generator, dtype = torch.Generator().manual_seed(p["seed"]), getattr(torch, p["dtype"])

    def normal(*shape: int, scale: float = 1, statistics: bool = False) -> Tensor:
        to = torch.promote_types(dtype, torch.float32) if statistics else dtype
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(to)

    t = OPS[p["op"]].inputs(p, normal)
    x = _hardened(t["x"].double(), p["hard"], generator).to(dtype)
    t["x"] = laid(x, p["layout"]) if x.dim() == 5 else x
    if special and p["hard"] in SPECIAL and p["where"] in t:
        _put(p, t[p["where"]])
    return t


def _hardened(x: Tensor, hard: str | None, generator: torch.Generator) -> Tensor:
    if hard in MEANS:
        return x + MEANS[hard]
    if hard in SCALES:
        return x * SCALES[hard]
    if hard == "zeros":
        return x * (torch.rand(x.shape, generator=generator) < 0.5)  # x · 0 is as often −0 as 0
    if hard == "constant" and x.dim() == 5:
        x[:, :, 0] = 0.3
    return x


def _member(p: Problem) -> int:
    """Who has what is special."""
    return p["seed"] % max(p["K"], 1)


def _put(p: Problem, t: Tensor) -> None:
    """Make one value of t special: the first, the last or any of a member's."""
    own = t[_member(p) % len(t)] if t.dim() > 1 and len(t) else t
    if own.numel():
        at = random.Random(p["seed"]).choice((0, own.numel() - 1, p["seed"] * 7919 % own.numel()))
        places = [int(i) for i in torch.unravel_index(torch.tensor(at), own.shape)]
        own[tuple(places)] = SPECIAL[p["hard"]]


class Cotangents:
    """The gradients of outputs, drawn when the first outputs, the reference's, are there; zero near a ReLU's edge."""

    def __init__(self, p: Problem):
        self._p, self._drawn = p, {}
        self._hot = p["hard"] in SPECIAL and p["where"] == "dy"
        self.special = True  # else the same without it

    def of(self, outputs: Tensors, hints: dict) -> list[Tensor]:
        p, dtype, before = self._p, getattr(torch, self._p["dtype"]), hints.get("_before")
        for i, (name, y) in enumerate(outputs.items()):
            if name not in self._drawn:
                d = torch.randn(y.shape, generator=torch.Generator().manual_seed(p["seed"] + i)).to(dtype)
                if p["dy"] == "expanded" and y.numel():
                    d = d.flatten()[0].expand(y.shape)
                if before is not None and before.numel():
                    finite = before[before.isfinite()].abs()
                    largest = finite.max() if finite.numel() else 0
                    d = d.masked_fill(before.abs() <= EDGE[p["dtype"]] * largest, 0)
                self._drawn[name] = d
        return [self._with_special(self._drawn[name], name).to(y.dtype) for name, y in outputs.items()]

    def largest(self) -> float:
        return max((d.abs().nan_to_num(0, 0, 0).max().item() for d in self._drawn.values() if d.numel()), default=0.0)

    def _with_special(self, d: Tensor, name: str) -> Tensor:
        if self._hot and name == "y":
            d = d.clone(memory_format=torch.contiguous_format)
            if self.special:
                _put(self._p, d)
        return d


# ---- results and what is checked of them ----------------------------------------------------------------------------


def outcome(function: Callable[[Problem, Tensors], Tensors], p: Problem, operands: Tensors, dys: Cotangents) -> Tensors:
    """Outputs, moved statistics and, under "d" and the operand's name, the gradients that are wanted."""
    wanted = {"all": operands.keys(), "x": {"x"}, "none": set()}[p["wanted"]]
    own = {name: t.clone() if name.startswith("running") else t.detach() for name, t in operands.items()}
    for name in wanted:
        own[name].requires_grad_(not name.startswith("running"))
    found = function(p, own)
    hints = {name: found.pop(name) for name in [*found] if name.startswith("_")}
    ends = {name: y for name, y in found.items() if y.requires_grad}
    leaves = {name: t for name, t in own.items() if t.requires_grad and name in wanted}
    results = {name: y.detach() for name, y in found.items()}
    results |= {name: t for name, t in own.items() if name.startswith("running")}
    if ends and leaves:
        grads = torch.autograd.grad([*ends.values()], [*leaves.values()], dys.of(ends, hints), allow_unused=True)
        for (name, t), g in zip(leaves.items(), grads, strict=True):
            results[f"d{name}"] = torch.zeros_like(t) if g is None else g
    return results | hints


def ours(p: Problem, operands: Tensors, dys: Cotangents) -> Tensors:
    """The results of the problem's backend; uninitialised memory is NaN where the problem says so."""
    with contextlib.ExitStack() as stack:
        if p["backend"] != "default":
            stack.enter_context(decompk.backend(p["backend"]))
        torch.use_deterministic_algorithms(p["poison"])
        stack.callback(torch.use_deterministic_algorithms, False)
        return outcome(OPS[p["op"]].ours, p, operands, dys)


def refuse(p: Problem) -> None:
    """Raise DecompkError where torch's own operator is no judge."""
    if p["dtype"] == "bfloat16" and p.get("W") == 1 and p.get("sw", 1) > 1:
        raise decompk.DecompkError("oneDNN's wgrad of torch 2.13 reads memory that nobody wrote: it differs each time")


def errors(p: Problem) -> dict[str, tuple[float, float]]:
    """For every result ours and torch's error, relative to the reference. Raises Wrong for what is wrong beside."""
    op, operands, dys = OPS[p["op"]], inputs(p), Cotangents(p)
    reference = outcome(op.torchs, p, {name: t.double() for name, t in operands.items()}, dys)
    torchs = outcome(op.torchs, p, operands, dys)
    before = {name: t.clone() for name, t in operands.items()}
    found = ours(p, operands, dys)
    for name, t in operands.items():
        if not same(t, before[name]):
            raise Wrong(f"{name}, an input, was written")
    if p["threads"]:
        _check_threads(p, operands, dys, found)
    if p["hard"] in SPECIAL and op.apart:
        _check_others(p, dys, found)
    hints = [
        {name: results.pop(name) for name in [*results] if name.startswith("_")} for results in (reference, torchs)
    ]
    if found.keys() != torchs.keys():
        raise Wrong(f"results are {sorted(found)}, torch's are {sorted(torchs)}")
    floors, sharp = hints[0].get("_floors", {}), hints[0].get("_sharp", False)
    floors = {n: floor * dys.largest() if n.startswith("d") else floor for n, floor in floors.items()}
    names = [name for name in found if not (sharp and name.startswith("d"))]
    return {n: _error(n, op, found[n], torchs[n], reference[n], floors.get(n, 0)) for n in names}


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.view(bits), b.view(bits))


def _check_threads(p: Problem, operands: Tensors, dys: Cotangents, found: Tensors) -> None:
    for threads in (2, 4):
        torch.set_num_threads(threads)
        try:
            again = ours(p, operands, dys)
        finally:
            torch.set_num_threads(1)
        for name, value in found.items():
            if not same(value, again[name]):
                raise Wrong(f"{name} has other bits on {threads} threads")


def _check_others(p: Problem, dys: Cotangents, found: Tensors) -> None:
    """That members without anything special have the bits that they have where none has."""
    shared = {"dx", *(found if p["where"] == "x" else ())} if p.get("crops") else set()
    dys.special = False
    plain = ours(p, inputs(p, special=False), dys)
    dys.special = True
    for name, value in found.items():
        for k in () if name in shared else range(len(value)):
            if k != _member(p) and not same(value[k], plain[name][k]):
                raise Wrong(f"{name} of member {k} is touched by what is special in member {_member(p)}")


def _error(name: str, op: Op, found: Tensor, torchs: Tensor, reference: Tensor, floor: float) -> tuple[float, float]:
    if found.shape != torchs.shape or found.dtype != torchs.dtype:
        raise Wrong(f"{name} is {tuple(found.shape)} {found.dtype}, torch's {tuple(torchs.shape)} {torchs.dtype}")
    a, b = (_special(t) for t in (found, torchs))
    missing, added = (~torch.isfinite(t) & torch.isfinite(u) for t, u in ((torchs, found), (found, torchs)))
    alike = torch.equal(a, b) if name not in op.fewer + op.more else True
    if not alike or (missing.any() and name not in op.fewer) or (added.any() and name not in op.more):
        told = (f"{int(t.isnan().sum())} NaN and {int(t.isinf().sum())} infinities" for t in (found, torchs))
        raise Wrong(f"{name} has {next(told)}, torch's {next(told)}, or not in the same places")
    kept = torchs.isfinite() & found.isfinite() & reference.isfinite()
    r, f, t = (value[kept].double() for value in (reference, found, torchs))
    if not r.numel():
        return 0.0, 0.0
    once = r.to(torchs.dtype).double()  # torch's may by chance be better than rounding once
    floor = max(floor, 1e-300)
    norm, largest = r.norm().clamp_min(floor * r.numel() ** 0.5), r.abs().max().clamp_min(floor)
    ways = (max((v - r).norm() / norm, (v - r).abs().max() / largest) for v in (f, t, once))
    own, *others = (float(way.clamp_max(1e9)) for way in ways)
    return own, max(others)


def _special(t: Tensor) -> Tensor:
    """0 for finite values, 1, 2, 3 for NaN and the infinities."""
    return t.isnan() + 2 * t.isposinf() + 3 * t.isneginf()


def check(p: Problem) -> str | None:
    """What is wrong with the results of a problem, None where nothing is; raises DecompkError where it is refused."""
    refuse(p)
    try:
        first = errors(p)
        over = [name for name, (own, theirs) in first.items() if own > 2 * theirs + 1e-6]
        if not over:
            return None
        draws = [first, *(errors(p | dict(seed=p["seed"] + i * 1_000_003)) for i in range(1, DRAWS))]
        for name in over:
            pairs = [draw[name] for draw in draws if name in draw]
            own, theirs = ((sum(e**2 for e in es) / len(pairs)) ** 0.5 for es in zip(*pairs, strict=True))
            if own > 2 * theirs + 1e-6:
                return f"{name}: error {own:.1e}, torch's own {theirs:.1e}"
    except decompk.DecompkError:
        raise
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


# ---- shrinking ------------------------------------------------------------------------------------------------------


def filled(p: Problem) -> Problem:
    """A problem with all that it does not name as plain as can be."""
    return PLAIN | OPS[p["op"]].plain | p


def shrunk(p: Problem, seconds: float = 30) -> Problem:
    """The smallest problem found that still fails, by one step after the other."""
    plain, end = filled({"op": p["op"]}), time.monotonic() + seconds

    def fails(candidate: Problem) -> bool:
        with contextlib.suppress(decompk.DecompkError):
            return time.monotonic() < end and _fault(candidate) is not None
        return False

    smaller: Problem | None = p
    while smaller is not None:
        p = smaller
        smaller = next((candidate for candidate in _steps(p, plain) if fails(candidate)), None)
    return p


def _fault(p: Problem) -> str | None:
    """`check`, but None where torch's own operator does not take the problem."""
    fault = check(p)
    if fault and fault.startswith("raises"):
        try:
            outcome(OPS[p["op"]].torchs, p, inputs(p), Cotangents(p))
        except Exception:
            return None
    return fault


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
    for name in dispatch.BACKENDS:
        try:
            with decompk.backend(name):
                found.append(name)
        except decompk.DecompkError as error:
            print(error)
    return found


def search(seeds: Iterable[int], seconds: float, names: list[str], hard: bool = False) -> tuple[Counter, list[Problem]]:
    """How many problems ended how, and the shrunk failing ones: one of each kind."""
    counts, failing, kinds, end = Counter(), [], Counter(), time.monotonic() + seconds
    backends = available()
    for seed in seeds:
        if time.monotonic() > end:
            break
        p = draw(seed, names, backends, hard)
        counts["problems"] += 1
        try:
            fault = _fault(p)
        except decompk.DecompkError:
            counts["refused"] += 1
            continue
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
    return counts, failing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=None, help="default: 60, or no limit with --problems")
    parser.add_argument("--seed", type=int, default=0, help="of the first problem")
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), metavar="NAME", help=", ".join(OPS))
    parser.add_argument("--hard", action="store_true", help="hard inputs alone")
    parser.add_argument("--repeat", type=json.loads, metavar="JSON", help="one problem, as a failing one is printed")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.repeat:
        fault = check(filled(args.repeat))
        print(fault or "nothing is wrong")
        return int(fault is not None)
    seconds = args.seconds or (60 if args.problems == 10**9 else float("inf"))
    counts, _ = search(range(args.seed, args.seed + args.problems), seconds, args.op, args.hard)
    print(", ".join(f"{counts[name]} {name}" for name in ("problems", "refused", "failing")))
    return int(counts["failing"] > 0)


if __name__ == "__main__":
    sys.exit(main())
