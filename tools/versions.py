"""What decompk runs on: an environment at either end of what pyproject.toml allows, and the same checks in both.

    python tools/versions.py [oldest|newest|all] [--python PATH] [--envs DIR] [--only CHECK]

oldest: the lower bounds; newest: what pip finds today. An environment that is there is used again, and changed only
where this tool made it; --python: what makes them; --only, any number of times: not all checks. Writes
tools/versions.md, a column for each end; the rows of checks that were not run stay, unless the versions changed. A
check that fails leaves its first error there; exit code 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = Path(__file__).with_suffix(".md")
ENDS = ("oldest", "newest")
PACKAGES = ("torch", "triton", "torchvision", "numpy")
# By torch: every release of torchvision is built for one torch, and without a pin pip would take the newest.
TORCHVISION = {"2.11.0": "0.26.0"}
# Triton 3.6's interpreter, which the tests run kernels in, takes int() of arrays of one value; numpy 2.4 refuses it.
OLDEST_ALSO = ("numpy<2.4",)
CHECKS = {
    "import": ("-c", "import decompk"),
    "info": ("-m", "decompk", "info"),
    "nvcc": ("tools/build_ext.py", "--arch", "90a"),
    "emulation": ("tools/build_ext.py", "--emulation"),
    "kernels": ("tools/inspect_kernels.py", "--only", "resnet32 K=4@16"),
    "extension": ("tools/inspect_ext.py",),
    "tests": ("-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal"),
}
MARK = "made-by-decompk-versions"
HEAD = ("last run", "Python", *PACKAGES)
# Failures that are not the project's: a test's id → the cause and the issue upstream. Named, and not counted.
KNOWN: dict[str, str] = {}

Page = dict[str, dict[str, str]]  # end → row → cell


class VersionsError(Exception):
    """One sentence: why there is no environment."""


@dataclass(frozen=True)
class Verdict:
    """What a check came to, and whether that counts as a failure."""

    text: str
    failed: bool = False


def bounds(pyproject: str) -> dict[str, str]:
    """The versions of the oldest end, as in {"torch": "2.11.0"}: the lower bounds, and the torchvision beside them."""
    found = {name: _padded(version) for name, version in re.findall(r'"(torch|triton)>=([\d.]+)', pyproject)}
    return {**found, "torchvision": TORCHVISION[found["torch"]]}


def judge(check: str, code: int, output: str) -> Verdict:
    """What the exit code and the output of a check's command mean."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if check in ("nvcc", "extension") and "nvcc is not installed" in output:
        return Verdict("not run: nvcc is not installed")
    if check == "tests":
        return _judge_tests(code, lines)
    if code:
        return Verdict(f"failed: {first_error(lines)}", True)
    return Verdict(lines[-1] if check in ("kernels", "extension") else "ok")


def first_error(lines: list[str]) -> str:
    """The first line that names an error, or the last one."""
    named = (line for line in lines if re.match(r"[\w.]*(Error|Exception)\b|.*\berror: ", line))
    return next(named, lines[-1] if lines else "no output")


def read(page: str) -> Page:
    """The cells of a page that `render` made; of an empty or damaged one, none."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    if not rows or len({len(row) for row in rows}) > 1:
        return {}
    return {end: {row[0].split(":")[0]: row[i] for row in rows[2:]} for i, end in enumerate(rows[0]) if end}


def merged(page: Page, end: str, cells: dict[str, str]) -> Page:
    """`page` with these cells of one end; its other ones stay while they are of the same versions."""
    before = page.get(end, {})
    same = all(before.get(name) == cells[name] for name in HEAD[1:])
    return {**page, end: {**before, **cells} if same else cells}


def render(page: Page) -> str:
    """The page as Markdown."""
    ends = [end for end in ENDS if end in page]
    lines = [
        "# What decompk runs on",
        "",
        "Made by `python tools/versions.py`: the same checks at either end of what pyproject.toml allows.",
        "",
        f"| | {' | '.join(ends)} |",
        "| --- " * (len(ends) + 1) + "|",
    ]
    for row in (*HEAD, *CHECKS):
        title = f"{row}: `python {shlex.join(CHECKS[row])}`" if row in CHECKS else row
        lines.append(f"| {title} | {' | '.join(page[end].get(row) or 'not run' for end in ends)} |")
    return "\n".join(lines) + "\n"


def environment(end: str, python: str | None, envs: Path) -> Path:
    """The Python of an environment that holds the versions of `end`.

    Only an environment that this tool made, which a file in it says, is ever installed into; one of someone else's is
    used as it is, or refused with VersionsError.
    """
    folder = envs / end
    binary, ours = folder / "bin" / "python", folder / MARK
    if not folder.exists():
        print(f"{end}: a new environment", flush=True)
        _asked([python or sys.executable, "-m", "venv", str(folder)])
        ours.touch()
    elif python and _versions(Path(python))["Python"] != _versions(binary)["Python"]:
        raise VersionsError(f"the environment {end} is of another Python than --python: remove it, or leave that out.")
    pins = bounds((ROOT / "pyproject.toml").read_text()) if end == "oldest" else {}
    found = _versions(binary)
    wrong = [f"{name} {found[name]}" for name, pin in pins.items() if found[name].partition("+")[0] != pin]
    wrong += [f"{name} none" for name in ("torch", "torchvision", "pytest-xdist") if found[name] == "none"]
    if not ours.exists():
        if wrong:
            raise VersionsError(f"the environment {end} has {', '.join(wrong)}, and is not this tool's to change.")
        return binary
    pip = [str(binary), "-m", "pip", "install", "--disable-pip-version-check"]
    if end == "newest" and not wrong:
        report = _asked([*pip, "--dry-run", "--quiet", "--report", "-", "--upgrade", "torch", "torchvision"])
        wrong = json.loads(report)["install"]
    if wrong:
        print(f"{end}: installing", flush=True)
        upgrade = [] if pins else ["--upgrade", "--upgrade-strategy", "eager"]
        exact = [*(f"{name}=={pin}" for name, pin in pins.items()), *OLDEST_ALSO] if pins else []
        _asked([*pip, "--quiet", *upgrade, "--editable", ".[dev]", *exact])
    return binary


def run(command: list[str]) -> tuple[int, str]:
    """Exit code and output of a command, run in the repository for this tree's decompk."""
    around = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    around["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=ROOT, env=around, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def check_end(end: str, binary: Path, checks: list[str]) -> int:
    """Runs the checks, each of which goes to the page at once; returns how many failed."""
    versions = _versions(binary)
    print(f"{end}: {', '.join(f'{name} {versions[name]}' for name in HEAD[1:])}", flush=True)
    failed, today = 0, datetime.date.today().isoformat()
    only = "" if checks == list(CHECKS) else "".join(f" --only {check}" for check in checks)
    cells = {"last run": f"`python tools/versions.py {end}{only}`, {today}", **{n: versions[n] for n in HEAD[1:]}}
    for check in checks:
        print(f"{end}: {check} …", end=" ", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            aside = ["--into", scratch] if "tools/build_ext.py" in CHECKS[check] else []  # not to find it built before
            began = time.monotonic()
            code, output = run([str(binary), *CHECKS[check], *aside])
        verdict = judge(check, code, output)
        failed += verdict.failed
        text = verdict.text.replace(f"{ROOT}/", "").replace(f"{binary.parents[1]}/", "").replace("|", "/")
        cells[check] = f"{text}; {time.monotonic() - began:.0f} s, {today}"
        print(cells[check], flush=True)
        page = read(PAGE.read_text(errors="replace")) if PAGE.exists() else {}
        PAGE.write_text(render(merged(page, end, cells)))
    return failed


def _judge_tests(code: int, lines: list[str]) -> Verdict:
    summary = next((line for line in reversed(lines) if re.search(r"\d+ \w+.* in [\d.]+s", line)), "")
    counts = ", ".join(f"{n} {what}" for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", summary))
    if not counts:
        return Verdict(f"failed: {first_error(lines)}", True)
    broken = [match.groups() for line in lines if (match := re.match(r"(?:FAILED|ERROR) (.+?)(?: - (.*))?$", line))]
    ours = [f"{name} - {said}" if said else name for name, said in broken if name not in KNOWN]
    notes = [f"known: {name} ({KNOWN[name]})" for name, _ in broken if name in KNOWN]
    failed = bool(ours) or code not in (0, 1) or (code == 1 and not broken)
    notes = ([f"failed: {ours[0] if ours else f'pytest ended with {code}'}"] if failed else []) + notes
    return Verdict("; ".join([*notes, counts]), failed)


def _versions(binary: Path) -> dict[str, str]:
    """Python and packages of an environment, "none" for what it lacks."""
    code = (
        "import importlib.metadata as m, json, platform, sys; d = {'Python': platform.python_version()}\n"
        "for n in sys.argv[1:]:\n    try: d[n] = m.version(n)\n    except m.PackageNotFoundError: d[n] = 'none'\n"
        "print(json.dumps(d))"
    )
    return json.loads(_asked([str(binary), "-c", code, *PACKAGES, "pytest-xdist"]))


def _asked(command: list[str]) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise VersionsError(f"{command[0]} cannot be run: {error.strerror}.") from error
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise VersionsError(f"{shlex.join(command)} failed: {first_error(said)}")
    return done.stdout


def _padded(version: str) -> str:
    return ".".join([*version.split("."), "0", "0"][:3])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("end", nargs="?", default="all", choices=(*ENDS, "all"))
    parser.add_argument("--python", metavar="PATH", help="makes new environments; otherwise this one")
    parser.add_argument(
        "--envs", type=Path, default=ROOT / "build" / "versions", metavar="DIR", help="where they stand"
    )
    parser.add_argument("--only", action="append", choices=CHECKS, help="this check, and those of further --only")
    args = parser.parse_args()
    failed = 0
    for end in ENDS if args.end == "all" else (args.end,):
        try:
            binary = environment(end, args.python, args.envs.absolute())
        except VersionsError as error:
            print(f"{end}: {error}", file=sys.stderr)
            failed += 1
            continue
        failed += check_end(end, binary, [check for check in CHECKS if check in (args.only or CHECKS)])
    print(f"{PAGE.relative_to(ROOT)}: {failed or 'none'} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
