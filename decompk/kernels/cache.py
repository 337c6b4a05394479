"""What decompk keeps between runs on this machine: compiled kernels, and measured choices between them.

All of it may be cut short, changed, removed or forbidden at any time: it is then made again. Every file is written
whole or not at all; one that runs as code also carries its digest, and counts only where no other user can write it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

LARGEST = 2**26  # bytes; no file of ours comes near it
WAIT = 60.0  # seconds for a lock; a build takes ten
DIGEST = hashlib.sha256().digest_size
OTHERS = stat.S_IWGRP | stat.S_IWOTH


def folder() -> Path:
    """$DECOMPK_CACHE, else decompk in the user's cache folder; absolute. What is missing in it is made again."""
    chosen = os.environ.get("DECOMPK_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "decompk")
    return _absolute(chosen, os.environ.get("HOME"))


@functools.cache  # a relative path stays what it was when it was first seen, wherever the process goes
def _absolute(name: str, home: str | None) -> Path:
    expanded = os.path.expanduser(name)
    if not expanded.startswith("~"):
        with contextlib.suppress(OSError):  # the current folder is gone
            return Path(os.path.abspath(expanded))
    return Path("/tmp", f"decompk-{os.getuid()}")  # a container's user without a home


def prepare(place: Path) -> None:
    """Make the folder unless it is there. Raises OSError, also where everyone may exchange what lies in it."""
    place.mkdir(mode=0o755, parents=True, exist_ok=True)
    found = place.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise OSError("it belongs to another user")
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise OSError("every user can write it")


def alone(place: Path) -> bool:
    """Whether nobody else can rename what lies in the folder, or the folder. Where umask is 002, its group can."""
    for folder in (place, *place.parents):
        found = folder.lstat()
        shared = found.st_mode & OTHERS and not found.st_mode & stat.S_ISVTX
        if shared or not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
            return False
    return True


def shown(path: Path) -> str:
    """The path for people: quoted and escaped where it holds what a terminal takes for something else."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def read(path: Path) -> bytes:
    """The file's content. Raises OSError, also for what is no file, or too large to be ours."""
    content, _ = _read(path)
    return content


def _read(path: Path) -> tuple[bytes, os.stat_result]:
    # A pipe in the file's place is not waited for, and nothing is looked up a second time.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    with open(path, "rb", opener=lambda name, given: os.open(name, given | flags)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
            raise OSError("it is not a file that decompk wrote")
        return file.read(LARGEST), found


def write(path: Path, content: bytes) -> None:
    """`content` at `path`, for all to read and for its owner to write; whole or, with an OSError, not at all.

    Nothing is synced: what a power cut spoils is found when it is read.
    """
    descriptor, new = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(descriptor, 0o644)
        with contextlib.suppress(OSError):
            path.rmdir()  # of an empty folder in its place, which cannot be replaced
        os.replace(new, path)
    except BaseException:
        Path(new).unlink(missing_ok=True)
        raise


def read_code(path: Path) -> bytes:
    """What `write_code` wrote. Raises OSError unless it is whole, and nobody else can write it."""
    content, found = _read(path)
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & OTHERS:
        raise OSError("another user could have written it")
    if _digest(path.name, content[:-DIGEST]) != content[-DIGEST:]:
        raise OSError("it was damaged")
    return content


def write_code(path: Path, content: bytes) -> None:
    """Write a library with its digest behind it, where no loader looks: one file cannot be out of step with itself."""
    write(path, content + _digest(path.name, content))


def _digest(name: str, content: bytes) -> bytes:
    """Of the name, too: a file that is renamed is another one's."""
    return hashlib.sha256(name.encode() + b"\0" + content).digest()


_stuck: set[Path] = set()  # locks that were not let go: nobody waits for them a second time


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """`path` for one process and thread at a time; first, what others left beside it when they were killed goes.

    It saves doing work twice, and nothing more: where there are no locks, or one is not let go, all go on without.
    """
    import fcntl  # of Unix alone

    descriptor, file = None, path.with_suffix(".lock")
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        end = time.monotonic() + (0 if file in _stuck else WAIT)
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    _stuck.add(file)
                    raise
                time.sleep(0.02)
        for left in path.parent.glob(f".{path.name}.*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()
    except OSError:
        pass
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child forked meanwhile has the file open, too
            os.close(descriptor)


class Processor(NamedTuple):
    """name: for people; able: all that it can do, as the system lists it; model: what decides how fast kernels run."""

    name: str
    able: str
    model: tuple[str, ...]  # vendor, family, model and stepping, or what ARM calls them; then the vector units


CPUINFO = Path("/proc/cpuinfo")
IDENTITY = (  # the fields of CPUINFO that tell one generation from another
    *("vendor_id", "cpu family", "model", "stepping"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision"),
)
VECTORS = re.compile(r"avx|amx|fma|f16c|vnni|neon|asimd|fphp|sve|sme(?!p)|bf16|i8mm|vfp")  # of a flag, how it begins


@functools.cache
def processor() -> Processor:
    """This machine's: code made for one need not run on another, and what is fast on one may be slow on another."""
    try:
        return processor_of(CPUINFO.read_text())
    except OSError:
        return processor_of("")


def processor_of(text: str) -> Processor:
    """The one of which /proc/cpuinfo says `text`; where that names none, what Python knows of the machine."""
    found: dict[str, dict[str, None]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), {})[value.strip()] = None
    known = {key: " + ".join(values) for key, values in found.items()}  # cores may be of several kinds
    flags = sorted(set(" ".join([*found.get("flags", ()), *found.get("Features", ())]).split()))
    able = [known.get(key, "") for key in ("flags", "Features", "CPU implementer", "CPU part")]
    identity = [f"{key} {known[key]}" for key in IDENTITY if key in known]
    units = [flag for flag in flags if VECTORS.match(flag)]
    name = _name(known, set(flags))
    return Processor(name, " ".join(filter(None, able)), (*(identity or [name]), *units))


def _name(known: dict[str, str], flags: set[str]) -> str:
    """Such as "Intel Xeon, family 6 model 207 (AVX-512, AMX)": under one brand several generations are sold."""
    name = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*", "", known.get("model name", ""))
    name = " ".join(name.split()) or ("ARM" if "CPU part" in known else platform.processor() or platform.machine())
    if "cpu family" in known and "model" in known:
        name += f", family {known['cpu family']} model {known['model']}"
    elif "CPU part" in known:
        name += f", implementer {known.get('CPU implementer', 'unknown')} part {known['CPU part']}"
    x86 = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else ""
    arm = "SVE" if "sve" in flags else "NEON" if flags & {"asimd", "neon"} else ""
    units = ", ".join(filter(None, (x86, "AMX" if "amx_tile" in flags else "", arm)))
    return f"{name} ({units})" if units else name


def cores() -> int:
    """How many cores this process may use."""
    allowed: Any = getattr(os, "sched_getaffinity", None)  # of Linux alone
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def slug(name: str) -> str:
    """A name as a file may have it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
