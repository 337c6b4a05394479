"""What a training shows while it runs: a progress line, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from ..errors import DecompkError
from ..report.progress import tqdm_on

PLAIN_SECONDS = 10.0  # between two lines where nobody watches a terminal


class Log:
    """Progress of one run on stderr, its metrics in `folder` (None: nowhere).

    The file, metrics.jsonl for rank 0 and metrics-rank1.jsonl and so on, gets one JSON object a line. `position` and
    `rewind` let a resumed run go on behind the last line its checkpoint knows, so that the file reads like that of a
    run never interrupted.
    """

    def __init__(self, folder: Path | None, rank: int = 0, tensorboard: bool = False):
        self.stream: TextIO | None = None if rank else sys.stderr
        self._file = None
        self._board = None
        self._bar: Any = None
        self._shown = -math.inf
        if folder is None:
            return
        path = folder / (f"metrics-rank{rank}.jsonl" if rank else "metrics.jsonl")
        try:
            self._file = open(path, "ab")  # noqa: SIM115
        except OSError as error:
            raise DecompkError(f"{path} cannot be written: {error.strerror}.") from error
        if tensorboard and not rank:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise DecompkError("--tensorboard needs the package tensorboard: pip install tensorboard.") from error
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def position(self) -> int:
        """Bytes of metrics.jsonl that are safely on disk."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def rewind(self, position: int) -> None:
        """Drop what was written behind `position`."""
        if self._file is not None and position <= self._file.seek(0, os.SEEK_END):
            self._file.truncate(position)
            self._file.seek(position)

    def write(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl; numbers also go to TensorBoard, under seed and phase."""
        if self._file is not None:
            self._file.write(json.dumps(_finite(record)).encode() + b"\n")
            self._file.flush()
        if self._board is not None:
            for key, value in record.items():
                if key in ("step", "epoch", "seed", "phase"):
                    continue
                values = value if isinstance(value, list) else [value]
                for k, number in enumerate(values):
                    if isinstance(number, (int, float)):
                        name = f"{record['phase']}/seed{record['seed']}/{key}" + (f"/{k}" if len(values) > 1 else "")
                        self._board.add_scalar(name, number, record["step"])

    def begin(self, title: str, images: int, done: int = 0) -> None:
        """Start the progress of a phase of `images` training images, `done` of them before."""
        self.end()
        self._title, self._images, self._done, self._first = title, images, done, done
        self._started, self._shown = time.monotonic(), -math.inf
        tqdm = tqdm_on(self.stream) if self.stream is not None else None
        if tqdm is not None:
            self._bar = tqdm(
                total=images, initial=done, desc=title, unit="img", unit_scale=True, file=self.stream, mininterval=0.2,
                dynamic_ncols=True,
            )  # fmt: skip

    def advance(self, images: int) -> None:
        """So many more images were trained on."""
        self._done += images
        if self._bar is not None:
            self._bar.update(images)

    def tell(self, epoch: int, epochs: int, loss: Sequence[float], accuracy: Sequence[float], final: bool) -> None:
        """Show how it goes: loss, and the accuracy of the best and the worst member; a line now and then if plain."""
        text = f"epoch {epoch}/{epochs}, loss {_span(loss, 3)}, accuracy {_span(accuracy, 1)} %"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self.stream is not None and (final or time.monotonic() - self._shown >= PLAIN_SECONDS):
            self._shown = time.monotonic()
            rate = (self._done - self._first) / max(time.monotonic() - self._started, 1e-9)
            left = (self._images - self._done) / rate if rate else math.nan
            self.say(f"{self._title}: {text}, {rate:,.0f} images/s, {_duration(left)} left")

    def say(self, sentence: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(sentence, file=self.stream)
        elif self.stream is not None:
            self.stream.write(sentence + "\n")
            self.stream.flush()

    def end(self) -> None:
        """The phase is over."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Nothing more will be written."""
        self.end()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _span(values: Sequence[float], digits: int) -> str:
    """Smallest and largest: 0.312–0.455; one number alone."""
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:.{digits}f}" if len(values) == 1 else f"{low:.{digits}f}–{high:.{digits}f}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
