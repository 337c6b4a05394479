"""Which convolution runs fastest on this CPU: measured once for each problem, then kept in a file.

What packed networks measure of their schedules lies beside that.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..threads import one_at_a_time
from . import cache
from .conv.form import Choice, Form
from .problem import Problem, key_of
from .timer import in_turns, is_a_time, wall_seconds

ROUNDS, SECONDS = 7, 0.15  # how often each contestant runs at most, and how long a measurement may take
HOPELESS = 1.5  # who is that much slower than the fastest after a round does not run again
MARGIN = 0.95  # torch's operators are chosen where they take less than that share of our own kernel's time


def path() -> Path:
    """The file of choices made under what decides how fast they are; it may be removed at any time.

    That is the processor's generation and vector units, the cores that this process may use, torch's threads, torch and
    the code that was measured.
    """
    torch_version = torch.__version__.partition("+")[0]
    processor, cores, threads = cache.processor(), cache.cores(), torch.get_num_threads()
    digest = hashlib.sha256(repr((processor.model, cores, threads, torch_version, _code())).encode()).hexdigest()[:8]
    where = f"{cache.slug(processor.name)}-{threads}-threads-{cores}-cores"
    return cache.folder() / f"choices-{where}-torch-{torch_version}-{digest}.json"


@functools.cache
def _code() -> str:
    """A digest of the sources that decide how fast a network runs."""
    package, contents = Path(__file__).parent.parent, hashlib.sha256()
    for part in ("kernels", "ops", "packed"):
        for source in sorted((package / part).rglob("*")):
            if source.suffix in (".py", ".cpp", ".h"):
                contents.update(source.read_bytes())
    return contents.hexdigest()


def allowed() -> bool:
    """Whether unknown problems are measured: unless DECOMPK_MEASURE=0, which leaves them to our own kernels."""
    return os.environ.get("DECOMPK_MEASURE", "1") != "0"


def fastest(problem: Problem, choices: Sequence[Choice], measure: bool = True) -> Choice:
    """The choice that was fastest for `problem`; the first one, our own, where nothing is known or may be measured."""
    key = key_of(replace(problem, aligned=True, deterministic=False))
    names = {choice.form.name for choice in choices}
    known = times(key, names, lambda: time_each(problem, [choice.form for choice in choices]), measure)
    judged = [choice for choice in choices if choice.form.name in known]
    if not judged:
        return replace(choices[0], reason="not measured" if allowed() else "not measured: DECOMPK_MEASURE=0")
    judged.sort(key=lambda choice: known[choice.form.name])
    best = min(judged, key=lambda one: known[one.form.name] / (MARGIN if one.backend == "torch" else 1))
    shown = ", ".join(f"{one.form.name} {known[one.form.name]:.3g}" for one in judged)
    return replace(best, ms=known[best.form.name], reason=f"measured here, ms: {shown}")


def times(
    key: str, names: Set[str], measured: Callable[[], dict[str, float]], measure: bool = True
) -> dict[str, float]:
    """Milliseconds by name of what is measured for `key`, once, and kept; what is known where nothing may be measured.

    names: of whom times are wanted. measured: those of these, and perhaps of others.
    """
    file = path()
    known = times_of(file, key)
    if measure and allowed() and not known.keys() >= names:
        with one_at_a_time():  # two that measure at once would measure each other
            known = times_of(file, key)
            if not known.keys() >= names:
                known = {**known, **measured()}
                keep(file, key, known)
    return known


def times_of(file: Path, key: str) -> dict[str, float]:
    """Contestant → median milliseconds, as far as known: of forms for a problem, of schedules for a network."""
    return entries(file).get(key) or _not_kept.get((file, key), {})


_not_kept: dict[tuple[Path, str], dict[str, float]] = {}  # what this process measured and could not write


def entries(file: Path) -> dict[str, dict[str, float]]:
    """Problem → form, or network → schedule, → milliseconds, as far as the file holds such; else empty."""
    try:
        found = file.stat()
    except OSError:
        return {}
    return _read(file, (found.st_ino, found.st_size, found.st_mtime_ns))


@functools.lru_cache(maxsize=8)
def _read(file: Path, changed: object) -> dict[str, dict[str, float]]:
    return _table(file)


def _table(file: Path) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(cache.read(file))
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: times for key, times in found.items() if _are_times(times)} if isinstance(found, dict) else {}


def _are_times(times: object) -> bool:
    return isinstance(times, dict) and all(map(is_a_time, times.values()))


def keep(file: Path, key: str, times: dict[str, float]) -> None:
    """Add an entry; where the file cannot be written, this process keeps it, and the next one measures again."""
    times = {form: round(ms, 5) for form, ms in times.items()}
    try:
        cache.prepare(file.parent)
        with cache.lock(file):
            cache.write(file, json.dumps({**_table(file), key: times}, indent=0, sort_keys=True).encode())
    except OSError:
        _not_kept[file, key] = times


def time_each(problem: Problem, forms: Sequence[Form[Any]]) -> dict[str, float]:
    """Milliseconds of each form on random values, by its name."""
    return least(contestants(problem, forms))


def least(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each call by its name, in turns, the least of some: what else the machine does only adds."""
    cpu = torch.device("cpu")
    timed = {name: partial(wall_seconds, call, cpu) for name, call in calls.items()}
    found = in_turns(timed, ROUNDS, seconds=SECONDS, warm=True, hopeless=HOPELESS)
    return {name: 1e3 * min(seconds) for name, seconds in found.items()}


def contestants(problem: Problem, forms: Sequence[Form[Any]]) -> dict[str, Callable[[], object]]:
    """By name, one call of each form on random values, results laid member-major as a network wants them."""
    p = problem
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, p.dtype)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, dy = random(p.K, p.N, p.H, p.W, p.C), random(p.K, p.N, *p.out_size, p.O)
    weight = random(p.K, p.O, *p.kernel, p.C)
    inputs, like = {"fprop": ((x, weight), dy), "dgrad": ((dy, weight), x), "wgrad": ((dy, x), weight)}[p.kind]

    def run(form: Form[Any]) -> object:
        return getattr(form, p.kind)(p, None, *inputs, torch.empty_like(like)).contiguous()

    return {form.name: torch.no_grad()(partial(run, form)) for form in forms}
