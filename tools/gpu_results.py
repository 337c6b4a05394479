"""Lay what `tools/gpu_suite.py` brought home into the repository.

    python tools/gpu_results.py ARCHIVE

Writes bench/results/<device>/gpu_suite.jsonl and gpu_suite.md, and adds the tuned entries to that
device's table in decompk/kernels/configs. What was said by failing processes stays in the archive.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from gpu_summary import results, summary
from journal import parse, unpack, write
from tune import table_text

from decompk.kernels.cache import slug

LIMIT = 30_000  # characters of the page
LEFT_OUT = ("trace", "text")


def install(archive: Path, root: Path) -> list[Path]:
    """Write the files; returns their paths. Raises ValueError where the archive is not whole or of no GPU."""
    files = unpack(archive)
    lines = [line for line in parse(files["records.jsonl"]) if "begun" not in line]
    versions = [
        line for line in results(lines) if line.get("case") == "versions" and line.get("device") not in (None, "cpu")
    ]
    if not versions:
        raise ValueError(f"{archive} says of no GPU that it was measured on: a rehearsal's figures are nobody's")
    tuned = _tuned(archive, files.get("tuned.json"))
    device, table = (str(versions[-1].get(name, "")) for name in ("device", "table"))
    if tuned and (Path(table).name != table or not table.endswith(".json")):
        raise ValueError(f"{archive} names no file of its table: {table!r}")
    kept = [{name: value for name, value in line.items() if name not in LEFT_OUT} for line in lines]
    folder = root / "bench" / "results" / slug(device)
    written = [folder / "gpu_suite.jsonl", folder / "gpu_suite.md"]
    write(written[0], "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
    write(written[1], f"```\n{summary(kept, LIMIT)}\n```\n")
    if tuned:
        written.append(root / "decompk" / "kernels" / "configs" / table)
        known = json.loads(written[-1].read_text())["entries"] if written[-1].exists() else {}
        entries = tuned.pop("entries")
        write(written[-1], table_text(tuned, {**known, **entries}))
    return written


def _tuned(archive: Path, text: bytes | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        tuned = json.loads(text)
        if all(isinstance(entry, dict) for entry in tuned["entries"].values()):
            return tuned
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise ValueError(f"the tuned.json of {archive} is no table")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("archive", type=Path, metavar="ARCHIVE")
    args = parser.parse_args(argv)
    try:
        print(*install(args.archive, ROOT), sep="\n")
    except (OSError, ValueError) as error:
        print(f"gpu_results: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
