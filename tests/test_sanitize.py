"""tools/sanitize.py: the C++ kernels pass under the sanitizers, and kernels with a fault put in do not."""
# ruff: noqa: E402 (the tools stand beside the package)

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "tools")]

import sanitize

from decompk.kernels import cpu

THREADS = [1, 2, 4]


def built(sanitizer, into, sources=()):
    try:
        return sanitize.build(sanitizer, into, sources)
    except sanitize.Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("sanitizer", sanitize.SANITIZERS)
def test_random_problems_overrun_nothing_race_nowhere_and_are_right(sanitizer, tmp_path):
    seeds = range(15 if sanitizer == "halo" else 60)  # fibers take their time
    found = sanitize.search(sanitizer, built(sanitizer, tmp_path), THREADS, seeds, seconds=20)
    assert found.problems and not found.reports and not found.faults


@pytest.mark.parametrize(
    "sanitizer, file, code, broken, said",
    [
        ("address", "conv.h", "tall * wide * C + 32)", "tall * wide * C)", "AddressSanitizer"),
        ("thread", "vectors.h", "static thread_local", "static", "data race"),
        ("thread", "batch_norm.cpp", "t.dbias[at] = float(sum)", "t.dbias[at] = float(2 * sum)", "dbias is wrong"),
    ],
)
def test_a_fault_put_in_is_found(sanitizer, file, code, broken, said, tmp_path, capsys):
    for source in (*cpu.SOURCES.glob("*.cpp"), *cpu.SOURCES.glob("*.h")):
        text = source.read_text()
        assert code in text or source.name != file
        (tmp_path / source.name).write_text(text.replace(code, broken) if source.name == file else text)
    program = built(sanitizer, tmp_path, tuple(sorted(tmp_path.glob("*.cpp"))))
    found = sanitize.search(sanitizer, program, THREADS, range(30), seconds=20)
    assert found.reports + found.faults
    first = capsys.readouterr().out.splitlines()[0]
    assert said in first and first.startswith("seed ")


def test_without_a_compiler_it_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert sanitize.main(["--problems", "1"]) == 2
    assert "no-such-compiler -fsanitize=address" in capsys.readouterr().err
