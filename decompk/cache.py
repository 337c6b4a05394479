"""What decompk keeps between runs on this machine: compiled kernels, and measured choices between them."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path


def folder() -> Path:
    """$DECOMPK_CACHE, else decompk in the user's cache folder. All in it is made again where it is missing."""
    chosen = os.environ.get("DECOMPK_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decompk"


@functools.cache
def processor() -> tuple[str, str]:
    """The processor's name and what it can do: machine code made for one need not run on another."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        known = {key.strip(): value.strip() for key, _, value in lines}
    except OSError:
        known = {}
    return known.get("model name") or platform.processor() or platform.machine(), known.get("flags", "")


def slug(name: str) -> str:
    """A name as a file may have it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
