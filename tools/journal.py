"""What happened, a JSON line each, on disk the moment it happens. Loads nothing heavy: a supervisor reads it, too."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import tarfile
import time
import zlib
from pathlib import Path
from typing import Any

PATIENCE = 30.0  # seconds that a piece of work may take before it counts as hung, where it does not say more
SHOWN = ("fault", "error", "missing", "ms", "roof_percent", "config")


class Journal:
    """Records that survive their writer, each found by the values of `keys`; whoever starts again skips what is there.

    The file is only ever appended to, and may be shared by many stages, even at the same time. What is begun is a line,
    too: where nothing came of it, the process broke or hung in it, and the next Journal of its stage makes it an error.
    """

    def __init__(self, path: Path, keys: tuple[str, ...], stage: str = "", **stamp: Any):
        self.path, self.keys, self.stamp = path, keys, {"stage": stage, **stamp}
        self.begun_at = time.monotonic()
        lines = [line for line in read(path) if line.get("stage") == stage]
        self.records = [line for line in lines if "begun" not in line and "event" not in line]
        self.seen = {self._key(record) for record in self.records}
        if (begun := unfinished(lines, stage)) is not None:
            self.add(**begun, error="the process broke or hung here")

    def begin(self, patience: float = PATIENCE, **key: Any) -> None:
        """Say what is done next, and after how many seconds it hangs."""
        self.begun_at = time.monotonic()
        append(self.path, {**self.stamp, "begun": key, "patience": patience})

    def add(self, **record: Any) -> None:
        record = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.records.append(record)
        self.seen.add(self._key(record))
        append(self.path, {**self.stamp, **record, "seconds": round(time.monotonic() - self.begun_at, 3)})
        shown = [str(record[name]) for name in self.keys if name in record]
        for name in (name for name in SHOWN if name in record):
            value = record[name]
            shown.append(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}")
        print(*shown, flush=True)

    def note(self, event: str, **facts: Any) -> None:
        """Something about the whole: "plan", "done", "stopped"."""
        append(self.path, {**self.stamp, "event": event, **facts})

    def has(self, **key: Any) -> bool:
        return self._key(key) in self.seen

    def _key(self, record: dict[str, Any]) -> tuple:
        return tuple(record.get(name) for name in self.keys)


def append(path: Path, line: dict[str, Any]) -> None:
    """One line in one write, on disk when this returns: others may append at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"at": round(time.time(), 2), **line}, ensure_ascii=False, default=str)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"  # whoever wrote it was killed
        os.write(file, ("\n" * torn + text + "\n").encode())
        os.fsync(file)
    finally:
        os.close(file)


def read(path: Path, start: int = 0) -> list[dict[str, Any]]:
    """The lines behind byte `start`; one that its writer did not finish is left out."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(start)
        return parse(file.read())


def parse(text: bytes) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def unpack(archive: Path) -> dict[str, bytes]:
    """records.jsonl and, where kernels were tuned, tuned.json. Raises ValueError where they are not whole."""
    try:
        text = gzip.decompress(archive.read_bytes())  # whole, or its checksum says so
        with tarfile.open(fileobj=io.BytesIO(text), mode="r:") as tar:
            members = [m for m in tar if m.isfile() and m.name in ("records.jsonl", "tuned.json")]
            found = {member.name: tar.extractfile(member).read() for member in members}
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{archive} is no whole archive of this tool: {sentence(error)}") from error
    if not parse(found.get("records.jsonl", b"")):
        raise ValueError(f"{archive} holds no records of gpu_suite")
    return found


def unfinished(lines: list[dict[str, Any]], stage: str) -> dict[str, Any] | None:
    """What `stage` has begun last, if nothing came of it and nobody stopped it."""
    begun = None
    for line in lines:
        if line.get("stage") == stage:
            begun = line.get("begun")
    return begun


def write(path: Path, text: str) -> None:
    """Write a file at once: whoever reads sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def sentence(error: BaseException) -> str:
    """An exception in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
