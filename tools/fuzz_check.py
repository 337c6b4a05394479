"""What tools/fuzz.py checks of one problem: `check`."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import torch
from fuzz_convs import OPS as CONVS
from fuzz_norms import OPS as NORMS
from fuzz_op import HALVES, Op, Problem, Tensors, laid
from torch import Tensor

import decompk
from decompk.errors import brief

OPS: dict[str, Op] = CONVS | NORMS
MEANS, SCALES = {"mean10": 10, "mean100": 100, "mean1000": 1000}, {"1e-30": 1e-30, "1e30": 1e30, "denormal": 1e-40}
SPECIAL = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}
HARD = (*MEANS, *SCALES, *SPECIAL, *SPECIAL, "zeros", "constant")  # twice: drawn as often again
DRAWS = 16
SLACK = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 1e-6, "float16": 1e-6}
STATISTICS = ("mean", "var", "running_mean", "running_var")  # NaN or infinite: there torch's own devices differ
# So near zero, as a share of the largest, a value may fall to either side of a ReLU.
EDGE = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


class Wrong(Exception):
    """One sentence: what is wrong with a problem's results."""


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


def refuse_where_torch_errs(p: Problem) -> None:
    """Raise DecompkError where torch's own operator is no judge."""
    if p["op"] == "packed_batch_norm" and p["backend"] == "torch" and p["hard"] in ("mean1000", "constant"):
        raise decompk.DecompkError("torch's float32 sums depend on how many channels lie side by side, channels_last")
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
    for name in names:
        _check_special(p, name, found[name], torchs[name], reference[name])
    return {n: _error(found[n], torchs[n], reference[n], floors.get(n, 0)) for n in names}


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


def _check_special(p: Problem, name: str, found: Tensor, torchs: Tensor, reference: Tensor) -> None:
    """That what is NaN or infinite is so in torch's result, too: in p's dtype or in float64.

    An infinite dy meets zeros of padding on its way to dweight: kernels that multiply them make NaN of a value that is
    finite or infinite in kernels that skip them. Both are right, and torch has kernels of both sorts.
    """
    if found.shape != torchs.shape or found.dtype != torchs.dtype:
        raise Wrong(f"{name} is {tuple(found.shape)} {found.dtype}, torch's {tuple(torchs.shape)} {torchs.dtype}")
    padding = name == "dweight" and p["where"] == "dy" and p.get("ph", 0) + p.get("pw", 0) > 0
    fewer = padding or name in OPS[p["op"]].fewer
    more = padding or p["backend"] == "triton"  # whose forms multiply zeros of padding in all three passes
    more |= name in ("dx", "dweight") and p["dtype"] in HALVES  # oneDNN's with what fills its registers, by layout
    kinds, *judges = (_kinds(name, t) for t in (found, torchs, reference.to(torchs.dtype)))
    for judge in judges:
        free = (kinds.abs() < judge.abs()) & fewer | (kinds.abs() > judge.abs()) & more
        if p["hard"] == "nan":
            free &= ~found.isinf()  # whatever a NaN is multiplied with
        if ((kinds == judge) | free).all():
            return
    told = (f"{int(t.isnan().sum())} NaN and {int(t.isinf().sum())} infinities" for t in (found, torchs))
    raise Wrong(f"{name} has {next(told)}, torch's {next(told)}, or not in the same places")


def _kinds(name: str, t: Tensor) -> Tensor:
    """0 for finite values, 1 and -1 for the infinities, 2 for NaN; of statistics 1 for all that is not finite."""
    kinds = t.isposinf().int() - t.isneginf().int() + 2 * t.isnan().int()
    return kinds.abs().clamp_max(1) if name in STATISTICS else kinds


def _error(found: Tensor, torchs: Tensor, reference: Tensor, floor: float) -> tuple[float, float]:
    """Our and torch's error, where all are finite."""
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


def check(p: Problem) -> str | None:
    """What is wrong with the results of a problem, None where nothing is.

    Raises DecompkError where our operator refuses the problem, and where torch's own does.
    """
    refuse_where_torch_errs(p)
    slack = SLACK[p["dtype"]]
    if p["dtype"] == "float64":
        slack *= MEANS.get(p["hard"], 1)  # torch's error counts as 0, but in a variance such a mean costs digits
    try:
        first = errors(p)
        over = [name for name, (own, theirs) in first.items() if own > 2 * theirs + slack]
        if not over:
            return None
        draws = [first, *(errors(p | dict(seed=p["seed"] + i * 1_000_003)) for i in range(1, DRAWS))]
        for name in over:
            pairs = [draw[name] for draw in draws if name in draw]
            own, theirs = ((sum(e**2 for e in es) / len(pairs)) ** 0.5 for es in zip(*pairs, strict=True))
            if own > 2 * theirs + slack:
                return f"{name}: error {own:.1e}, torch's own {theirs:.1e}"
    except decompk.DecompkError:
        raise
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:
        told = f"{type(error).__name__}: {brief(error)}"
        if not _torch_takes(p):
            raise decompk.DecompkError(f"torch's own operator does not take this problem, either: {told}") from None
        return f"raises {told}"
    return None


def _torch_takes(p: Problem) -> bool:
    try:
        outcome(OPS[p["op"]].torchs, p, inputs(p), Cotangents(p))
    except Exception:
        return False
    return True
