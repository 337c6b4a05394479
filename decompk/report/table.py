"""A small table and its four formats: aligned text, Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DecompkError

FORMATS = ("table", "json", "csv", "md")


@dataclass(frozen=True)
class Column:
    """A header with its unit, and how text and Markdown show a value; JSON and CSV always hold the value itself.

    A line break in the header saves width in text and is a space elsewhere.
    """

    header: str
    show: Callable[[Any], str] = str

    @property
    def key(self) -> str:
        return self.header.replace("\n", " ")


def decimals(digits: int) -> Callable[[Any], str]:
    """Shows a number with so many digits after the point, thousands apart."""
    return lambda value: f"{value:,.{digits}f}"


@dataclass(frozen=True)
class Table:
    """Rows of plain values (str, int, float, None) under `columns`; `notes` follow in every format but CSV."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = field(default_factory=list)

    def objects(self) -> list[dict[str, Any]]:
        """The rows as dicts keyed by header."""
        return [dict(zip((c.key for c in self.columns), row, strict=True)) for row in self.rows]

    def to_json(self) -> str:
        """One JSON object: title, columns, rows (as objects), notes."""
        return json.dumps(self.as_object(), indent=1, ensure_ascii=False)

    def as_object(self) -> dict[str, Any]:
        """What to_json writes, not yet as text."""
        columns = [column.key for column in self.columns]
        return {"title": self.title, "columns": columns, "rows": self.objects(), "notes": list(self.notes)}

    def to_csv(self) -> str:
        """A header line and a line a row; None is an empty field. Title and notes are left out."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([column.key for column in self.columns])
        writer.writerows(self.rows)
        return out.getvalue()

    def to_markdown(self) -> str:
        """A heading, a pipe table with numbers to the right, and the notes as a list."""
        rule = ["---:" if right else "---" for right in self._numeric()]
        lines = [[column.key for column in self.columns], rule, *self._shown()]
        table = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
        notes = ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join([f"### {self.title}", "", *table, *notes]) + "\n"

    def to_text(self, width: int = 120) -> str:
        """Aligned columns, numbers to the right; the gaps, then the widest text column, shrink to fit `width`."""
        headers = [column.header.split("\n") for column in self.columns]
        shown, numeric = self._shown(), self._numeric()
        widths = [max(len(text) for text in (*header, *(row[i] for row in shown))) for i, header in enumerate(headers)]
        gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= width else " "
        spare = width - sum(widths) - len(gap) * (len(widths) - 1)
        if spare < 0 and not all(numeric):
            widest = max((i for i, right in enumerate(numeric) if not right), key=widths.__getitem__)
            widths[widest] = max(widths[widest] + spare, 12, *map(len, headers[widest]))
        depth = max(map(len, headers))
        lines = [self.title, ""]
        lines += _block([[""] * (depth - len(header)) + header for header in headers], widths, numeric, gap)
        lines.append(gap.join("-" * w for w in widths))
        for row in shown:
            lines += _block([_fit(text, w) for text, w in zip(row, widths, strict=True)], widths, numeric, gap)
        notes = [textwrap.fill(note, width, initial_indent="- ", subsequent_indent="  ") for note in self.notes]
        return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"

    def render(self, format: str = "table") -> str:
        """The table in one of FORMATS. Raises DecompkError on any other."""
        return {"table": self.to_text, "json": self.to_json, "csv": self.to_csv, "md": self.to_markdown}[
            known(format)
        ]()

    def _shown(self) -> list[list[str]]:
        return [
            ["-" if value is None else column.show(value) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]

    def _numeric(self) -> list[bool]:
        values = [[row[i] for row in self.rows if row[i] is not None] for i in range(len(self.columns))]
        return [bool(column) and all(isinstance(value, (int, float)) for value in column) for column in values]


def known(format: str) -> str:
    """`format` itself. Raises DecompkError unless it is one of FORMATS."""
    if format not in FORMATS:
        raise DecompkError(f"{format!r} is no format of a report; choose one of {', '.join(FORMATS)}.")
    return format


def _fit(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters: sentences wrap, a single long word loses its middle."""
    if len(text) <= width:
        return [text]
    if " " in text:
        return textwrap.wrap(text, width)
    head = (width - 1) // 2
    return [text[:head] + "…" + text[len(text) - (width - 1 - head) :]]


def _block(cells: Sequence[Sequence[str]], widths: Sequence[int], numeric: Sequence[bool], gap: str) -> list[str]:
    """One row of cells, each of one or more lines, side by side."""
    lines = []
    for i in range(max(map(len, cells))):
        texts = [cell[i] if i < len(cell) else "" for cell in cells]
        padded = [t.rjust(w) if right else t.ljust(w) for t, w, right in zip(texts, widths, numeric, strict=True)]
        lines.append(gap.join(padded).rstrip())
    return lines
