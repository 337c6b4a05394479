"""Checkpoints that a killed run goes on from: whole or not there, checked when read, unable to run code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

MAGIC = b"decompk checkpoint 1\n"
KEEP = 2


def write_atomically(path: Path, *content: bytes) -> None:
    """Write, fsync, rename: after a crash at any moment `path` holds the old content or all of the new.

    Raises CheckpointError where the disk is full or cannot be written; the old content then stays.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}); what was saved before is whole: make room, then go on with "
            "--resume."
        ) from error


def dump(state: Any) -> bytes:
    """Tensors and plain values as torch.save writes them."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def load(content: bytes) -> Any:
    """What `dump` gave, on the CPU; with weights_only it cannot run code."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def write(path: Path, state: dict[str, Any], run: dict[str, Any]) -> None:
    """`state` (tensors and plain values) into one file that carries its own digest and what `run` it belongs to."""
    content = dump(state)
    head = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "run": run}
    write_atomically(path, MAGIC, json.dumps(head, sort_keys=True).encode(), b"\n", content)


def read(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    """What `write` wrote, on the CPU. Raises CheckpointError, naming the file, unless it is whole and of `run`."""
    name = path.name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read ({error.strerror}).") from error
    if not content.startswith(MAGIC):
        what = "is empty" if not content else "is no checkpoint of decompk"
        raise CheckpointError(f"{name} {what}.")
    line, _, payload = content[len(MAGIC) :].partition(b"\n")
    try:
        head = json.loads(line)
        expected, size, theirs = head["sha256"], int(head["bytes"]), dict(head["run"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{name} has a damaged head.") from error
    if len(payload) != size:
        raise CheckpointError(f"{name} is truncated: {len(payload):,} of {size:,} bytes are there.")
    if hashlib.sha256(payload).hexdigest() != expected:
        raise CheckpointError(f"{name} is damaged: its content does not have the digest it was written with.")
    ours = json.loads(json.dumps(run))
    other = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    if other:
        key = other[0]
        raise CheckpointError(f"{name} is of another run: its {key} is {theirs.get(key)}, here it is {ours.get(key)}.")
    try:
        return load(payload)
    except Exception as error:  # weights_only refuses in many classes
        raise CheckpointError(f"{name} holds more than tensors and plain values, and is not loaded.") from error


class Checkpoints:
    """The last checkpoints of one phase, in a folder of their own; `run` tells whose they are (plain values)."""

    def __init__(self, folder: Path, run: dict[str, Any], keep: int = KEEP):
        self.folder, self.run, self.keep = folder, run, keep

    def files(self) -> list[Path]:
        """The newest first."""
        found = {}
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if match := re.fullmatch(r"step-(\d+)\.ckpt", path.name):
                    found[int(match[1])] = path
        return [found[step] for step in sorted(found, reverse=True)]

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`, then drop all but the newest `keep`."""
        path = self.folder / f"step-{step:09d}.ckpt"
        write(path, state, self.run)
        for old in self.files()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def latest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest checkpoint that is whole and this run's (None: there is none yet), and why newer ones are not.

        Newer ones are set aside, as *.refused, so that they do not count among those kept. Raises CheckpointError
        where there are checkpoints, and none can be used.
        """
        refused: dict[Path, str] = {}
        for path in self.files():
            try:
                state = read(path, self.run)
            except CheckpointError as error:
                refused[path] = str(error)
                continue
            for bad in refused:
                bad.replace(bad.with_suffix(".refused"))
            return state, list(refused.values())
        if refused:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be used: {' '.join(refused.values())} Remove them to start this "
                "phase again."
            )
        return None, []
