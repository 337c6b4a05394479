"""tools/sanitize.py: the C++ kernels pass under the sanitizers, and kernels with a fault put in do not."""
# ruff: noqa: E402 (the tools stand beside the package)

import os
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "tools")]

import build_ext
import sanitize

from decompk.kernels import cpu
from decompk.kernels.problem import PASSES

THREADS = [1, 2, 4]
STRETCHES = [seed for seed in range(48, 300) if " stretch " in sanitize.line_of(seed, "address")][:12]  # they are rare
SEEDS = {"address": [*range(48), *STRETCHES], "thread": [*range(48), *STRETCHES], "halo": range(8)}  # fibers: slow


def built(sanitizer, into, sources=()):
    try:
        return sanitize.build(sanitizer, into, sources, "-O0")  # what compiles longest runs for seconds here
    except sanitize.Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("sanitizer", sanitize.SANITIZERS)
def test_random_problems_overrun_nothing_race_nowhere_and_are_right(sanitizer, tmp_path):
    found = sanitize.search(sanitizer, built(sanitizer, tmp_path), THREADS, SEEDS[sanitizer], seconds=60)
    assert found.problems == len(SEEDS[sanitizer]) and not found.reports and not found.faults


def test_the_seeds_draw_every_pass_in_every_form_and_norms():
    drawn = {tuple(sanitize.line_of(seed, "address").split()[1:4]) for seed in SEEDS["address"]}
    assert {("conv", kind, form) for kind in PASSES for form in ("direct", "winograd")} <= drawn
    assert {("layer", str(way)) for way in cpu.BY.values()} <= {(op, way) for op, way, _ in drawn}
    assert {"norm", "layer_norm", "pool", "stretch"} <= {op for op, *_ in drawn}


def test_stretches_pool_run_by_winograd_add_and_have_members_for_every_thread():
    members, seen = set(), set()
    for seed in STRETCHES:
        K, wants, count, *numbers = map(int, sanitize.line_of(seed, "address").split()[2:])
        steps = [numbers[i : i + 24] for i in range(0, len(numbers), 24)]
        assert len(steps) == count
        read = [value for step in steps for value in step[8:10] if value > 0 or (wants and value == 0)]
        members.add(K)
        seen |= {("kind", step[0]) for step in steps} | {("relu", step[1]) for step in steps}
        seen |= {(name, step[i]) for i, name in ((2, "forward"), (3, "back")) for step in steps}
        seen |= {"twice"} if len(set(read)) < len(read) else set()
    ways = {(name, way) for name in ("forward", "back") for way in cpu.BY.values()}
    assert seen == {
        *(("kind", kind) for kind in range(3)),
        *(("relu", code) for code in sanitize.RELUS),
        *ways,
        "twice",
    }
    assert {2, 4} <= members


FAULTS = {  # sanitizer: {file: (code, what is put in its place)}
    "address": {
        "conv.h": ("tall * wide * C + 3 * LANES)", "tall * wide * C)"),
        "norm.h": ("dbias[at] = float(sum)", "dbias[at] = float(2 * sum)"),
    },
    "thread": {"vectors.h": ("static thread_local", "static")},
}


@pytest.mark.parametrize("sanitizer", FAULTS)
def test_faults_put_in_are_found(sanitizer, tmp_path, capsys):
    for source in (*cpu.SOURCES.glob("*.cpp"), *cpu.SOURCES.glob("*.h")):
        text, (code, broken) = source.read_text(), FAULTS[sanitizer].get(source.name, ("", ""))
        assert code in text
        (tmp_path / source.name).write_text(text.replace(code, broken) if code else text)
    program = built(sanitizer, tmp_path, tuple(sorted(tmp_path.glob("*.cpp"))))
    found = sanitize.search(sanitizer, program, THREADS, range(30), seconds=60)
    said = capsys.readouterr().out.splitlines()
    assert all(line.startswith("seed ") for line in said)
    if sanitizer == "thread":
        assert found.reports and "data race" in said[0]
    else:  # what runs no convolution is wrong by the other fault alone
        assert found.reports and any(": conv " in line and "AddressSanitizer" in line for line in said)
        assert found.faults and any(": norm " in line and "is wrong by" in line for line in said)


LEAKS = """#include <iostream>
int main() {
  for (std::string line; std::getline(std::cin, line);) {
    float* volatile lost = new float[100];
    std::cout << "answer: " << std::endl;
  }
}
"""


def test_memory_that_is_leaked_is_reported_at_the_end(tmp_path, capsys):
    source, program = tmp_path / "leaks.cpp", tmp_path / "leaks"
    source.write_text(LEAKS)
    try:
        build_ext.run([os.environ.get("CXX") or "g++", "-fsanitize=address", str(source), "-o", str(program)])
    except (OSError, build_ext.BuildError) as error:
        pytest.skip(str(error))
    found = sanitize.search("address", program, THREADS, range(3), seconds=20)
    assert (found.problems, found.reports, found.faults) == (3, 1, 0)
    said = capsys.readouterr().out
    assert said.startswith("at the end: ") and "leaked" in said


def test_code_that_does_not_compile_ends_with_what_the_compiler_says(tmp_path, monkeypatch, capsys):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/sanitize_halo.cpp").write_text("no code\n")
    monkeypatch.setattr(sanitize, "ROOT", tmp_path)
    assert sanitize.main(["--only", "halo", "--problems", "1"]) == 2
    said = capsys.readouterr().err
    if "does not work here" in said:
        pytest.skip(said)
    assert "sanitize_halo.cpp:1" in said and "error:" in said


@pytest.mark.parametrize(
    "argument", ["--threads=abc", "--threads=0", "--threads=", "--seed=4294967296", "--problems=0", "--seconds=0"]
)
def test_wrong_arguments_end_with_a_sentence_before_anything_is_built(argument, monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "build", None)
    with pytest.raises(SystemExit) as ended:
        sanitize.main([argument])
    assert ended.value.code == 2
    assert f"error: argument {argument.partition('=')[0]}: " in capsys.readouterr().err.splitlines()[-1]


def test_without_a_compiler_it_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert sanitize.main(["--problems", "1"]) == 2
    assert "no-such-compiler -fsanitize=address" in capsys.readouterr().err
