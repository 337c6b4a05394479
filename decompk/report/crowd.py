"""Whether other work keeps the cores busy on which torch's threads are about to wait for each other."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch

from ..kernels.cache import cores

STAT = Path("/proc/stat")
LOOKS = 0.05  # seconds
SPARE = 0.5  # of a core, that others may want before it is said


def crowded() -> str | None:
    """One line of advice where torch's threads and other work together want more cores than this process has.

    Looks for LOOKS seconds at what runs on those cores while this process sleeps; a load of the last minute, where the
    system says no more, must want a whole core too many.
    """
    threads, available = torch.get_num_threads(), cores()
    if threads == 1 or os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        return None
    try:
        busy, spare = _busy_now(), SPARE
    except (OSError, ValueError, ZeroDivisionError):
        busy, spare = (os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0), 1.0
    if busy <= spare or threads + busy <= available + spare:
        return None
    left = max(1, min(threads - 1, available - math.ceil(busy)))
    return (
        f"Other work keeps {busy:.1f} of {available} cores busy, and {threads} threads of torch that spin while "
        f"they wait may run many times slower than fewer: set OMP_NUM_THREADS={left}, or OMP_WAIT_POLICY=passive."
    )


def _busy_now() -> float:
    """How many of this process's cores others keep busy. Raises where the system does not count that."""
    before = _ticks()
    time.sleep(LOOKS)
    pairs = zip(before, _ticks(), strict=True)
    return sum((now[0] - then[0]) / (now[1] - then[1]) for then, now in pairs)


def _ticks() -> list[tuple[int, int]]:
    """(busy, all) since the machine started, of each core that this process may use."""
    lines = [line.split() for line in STAT.read_text().splitlines() if line.startswith("cpu")]
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    found = []
    for name, *numbers in lines:
        if name in mine:
            user, nice, system, idle, wait, *more = map(int, numbers[:8])  # guests count as their hosts' users
            everything = user + nice + system + idle + wait + sum(more)
            found.append((everything - idle - wait, everything))
    if len(found) < len(mine):
        raise ValueError(f"{STAT} counts {len(found)} of {len(mine)} cores")
    return found
