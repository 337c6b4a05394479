"""Lay what `tools/gpu_suite.py` brought home into the repository.

    python tools/gpu_results.py ARCHIVE

Writes bench/results/<device>/gpu_suite.jsonl and gpu_suite.md, and adds the tuned entries to the table in
decompk/configs where dispatch looks for that device's. What was said by failing processes stays in the archive.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from gpu_summary import results, summary
from journal import TORN, parse, write
from tune import table_text

from decompk.cache import slug

LIMIT = 30_000  # characters of the page
LEFT_OUT = ("trace", "text")


def install(archive: Path, root: Path) -> list[Path]:
    """Write the files; returns their paths. Raises ValueError where the archive is of no GPU."""
    with tarfile.open(archive) as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames() if not name.startswith("logs/")}
    lines = [line for line in parse(files.get("records.jsonl", b"")) if "begun" not in line]
    versions = [line for line in results(lines) if line.get("case") == "versions" and line.get("device") != "cpu"]
    if not versions:
        raise ValueError(f"{archive} says of no GPU that it was measured on: a rehearsal's figures are nobody's")
    kept = [{name: value for name, value in line.items() if name not in LEFT_OUT} for line in lines]
    folder = root / "bench" / "results" / slug(versions[-1]["device"])
    written = [folder / "gpu_suite.jsonl", folder / "gpu_suite.md"]
    write(written[0], "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
    write(written[1], f"```\n{summary(kept, LIMIT)}\n```\n")
    if "tuned.json" in files:
        written.append(root / "decompk" / "configs" / versions[-1]["table"])
        known = json.loads(written[-1].read_text())["entries"] if written[-1].exists() else {}
        tuned = json.loads(files["tuned.json"])
        entries = tuned.pop("entries")
        write(written[-1], table_text(tuned, {**known, **entries}))
    return written


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("archive", type=Path, metavar="ARCHIVE")
    args = parser.parse_args(argv)
    try:
        print(*install(args.archive, ROOT), sep="\n")
    except TORN as error:
        print(f"gpu_results: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
