"""Which convolution runs fastest on this CPU: measured once for each problem, then kept in a file."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .cache import folder, processor, slug

if TYPE_CHECKING:
    from .config import Problem
    from .dispatch import Choice

ROUNDS, SECONDS = 7, 0.3  # how often each contestant runs at most, and how long a measurement may take
HOPELESS = 1.5  # who is that much slower than the fastest after a round does not run again
MARGIN = 0.95  # torch's operators are chosen where they take less than that share of our own kernel's time


def path() -> Path:
    """The file of choices for this processor, this number of threads and this torch. It may be removed at any time."""
    torch_version = torch.__version__.partition("+")[0]
    return folder() / f"choices-{slug(processor()[0])}-{torch.get_num_threads()}-threads-torch-{torch_version}.json"


def allowed() -> bool:
    """Whether unknown problems are measured: unless DECOMPK_MEASURE=0, which leaves them to our own kernels."""
    return os.environ.get("DECOMPK_MEASURE", "1") != "0"


def choose(problem: Problem, choices: Sequence[Choice], measure: bool = True) -> Choice:
    """The choice that was fastest for `problem`; the first one, our own, where nothing is known or may be measured."""
    from .dispatch import key_of

    key = key_of(replace(problem, aligned=True, deterministic=False))
    known = entries(path()).get(key, {})
    forms = [choice.form for choice in choices if choice.form in known]
    if not forms:
        if not (measure and allowed()):
            return replace(choices[0], reason="not measured" if allowed() else "not measured: DECOMPK_MEASURE=0")
        known = time_each(problem, [choice.form for choice in choices])
        forms = list(known)
        _keep(path(), key, known)
    torchs = {choice.form for choice in choices if choice.backend == "torch"}
    fastest = min(forms, key=lambda form: known[form] / (MARGIN if form in torchs else 1))
    times = ", ".join(f"{form} {known[form]:.3g}" for form in sorted(forms, key=known.__getitem__))
    chosen = next(choice for choice in choices if choice.form == fastest)
    return replace(chosen, ms=known[fastest], reason=f"measured here, ms: {times}")


def entries(file: Path) -> dict[str, dict[str, float]]:
    """Problem → form → median milliseconds; empty where the file is missing or no such table."""
    try:
        changed = file.stat().st_mtime_ns
    except OSError:
        return {}
    return _read(file, changed)


@functools.lru_cache(maxsize=8)
def _read(file: Path, changed: int) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(file: Path, key: str, times: dict[str, float]) -> None:
    """Add an entry; a cache that cannot be written is measured again next time."""
    import fcntl  # of Unix alone, as our kernels are

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = {**entries(file), key: {form: round(ms, 5) for form, ms in times.items()}}
            new = file.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(found, indent=0, sort_keys=True))
            new.replace(file)
    except OSError:
        return


def time_each(problem: Problem, forms: Sequence[str]) -> dict[str, float]:
    """Median milliseconds of each form on random values, in turns: form → ms."""
    calls = contestants(problem, forms)
    times: dict[str, list[float]] = {form: [] for form in calls}
    for call in calls.values():  # not timed: threads, caches and torch's own kernels wake up
        call()
    end = time.perf_counter() + SECONDS
    for _ in range(ROUNDS):
        for form, call in list(calls.items()):
            begin = time.perf_counter()
            call()
            times[form].append(1e3 * (time.perf_counter() - begin))
        best = min(min(found) for found in times.values())
        calls = {form: call for form, call in calls.items() if min(times[form]) < HOPELESS * best}
        if len(calls) == 1 or time.perf_counter() > end:
            break
    return {form: sorted(found)[len(found) // 2] for form, found in times.items()}


def contestants(problem: Problem, forms: Sequence[str]) -> dict[str, Callable[[], object]]:
    """form → one call of `problem` on random float32 values, results laid member-major as a network wants them."""
    from .ops import library

    p = problem
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        """(K, n, …, c) → (K, n, c, …)"""
        return torch.randn(shape, generator=generator).movedim(-1, 2)

    x, dy = random(p.K, p.N, p.H, p.W, p.C), random(p.K, p.N, *p.out_size, p.O)
    weight = random(p.K, p.O, *p.kernel, p.C)
    geometry = (p.stride, p.padding, p.dilation)

    def run(form: str) -> object:
        if p.kind == "fprop":
            return library.forward(form, x, weight, None, *geometry).movedim(2, -1).contiguous()
        dx, dw = library.backward(form, dy, x, weight, *geometry, (p.kind == "dgrad", p.kind == "wgrad"))
        return dw if dx is None else dx.movedim(2, -1).contiguous()

    return {form: torch.no_grad()(functools.partial(run, form)) for form in forms}
