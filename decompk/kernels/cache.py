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


@functools.cache
def processor() -> tuple[str, str]:
    """The processor's name and what it can do: machine code made for one need not run on another."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        known = {key.strip(): value.strip() for key, _, value in lines}
    except OSError:
        known = {}
    able = [known.get(key, "") for key in ("flags", "Features", "CPU implementer", "CPU part")]  # the latter: of ARM
    return known.get("model name") or platform.processor() or platform.machine(), " ".join(filter(None, able))


def slug(name: str) -> str:
    """A name as a file may have it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
