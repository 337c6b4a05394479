"""tools/versions.py on runs that are made up, and the code held to what the oldest torch accepts."""

import ast
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import inspect_kernels  # noqa: E402
import versions  # noqa: E402

from decompk.fx import pytree as nest  # noqa: E402

INSTALLED = {"Python": "3.12.1", "torch": "2.11.0", "triton": "3.6.0", "torchvision": "0.26.0", "numpy": "2.3.5"}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """An environment of these versions, commands that end as `answers` says, and a page of its own."""
    answers, ran = {}, []

    def run(command):
        ran.append(command)
        return next((answer for words, answer in answers.items() if words in " ".join(command)), (0, "fine\n"))

    monkeypatch.setattr(versions, "PAGE", tmp_path / "versions.md")
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setattr(versions, "environment", lambda end, python, envs: envs / end / "bin" / "python")
    monkeypatch.setattr(versions, "_versions", lambda binary: dict(INSTALLED))
    monkeypatch.setattr(versions, "run", run)
    return answers, ran, lambda: versions.read((tmp_path / "versions.md").read_text())


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["versions.py", *arguments])
    return versions.main()


def test_both_ends_become_columns_of_one_page(machine, monkeypatch, capsys):
    answers, ran, page = machine
    answers["-m pytest"] = (0, "....\n2810 passed, 12 skipped, 3 warnings in 345.67s (0:05:45)\n")
    answers["tools/inspect_kernels"] = (0, "| a | b |\n52 kernels compiled with triton 3.6.0, 0 with faults\n")
    assert call(monkeypatch) == 0
    assert list(page()) == ["oldest", "newest"] and len(ran) == 2 * len(versions.CHECKS)
    for end in versions.ENDS:
        cells = page()[end]
        assert {name: cells[name] for name in INSTALLED} == INSTALLED
        assert cells["tests"].startswith("2810 passed, 12 skipped; ") and cells["import"].startswith("ok; ")
        assert cells["kernels"].startswith("52 kernels compiled with triton 3.6.0, 0 with faults; ")
        assert f"`python tools/versions.py {end}`, 20" in cells["last run"]
    assert "oldest: tests … 2810 passed" in capsys.readouterr().out
    assert all("--into" in command for command in ran if "tools/build_ext.py" in command)


def test_a_failed_check_is_named_in_its_row_and_in_the_exit_code(machine, monkeypatch):
    answers, _, page = machine
    answers["import decompk"] = (1, "Traceback:\n  File 'x|y'\nTypeError: a|b must be iterable\nmore\n")
    assert call(monkeypatch, "oldest") == 1
    assert page()["oldest"]["import"].startswith("failed: TypeError: a/b must be iterable; ")
    assert page()["oldest"]["tests"].startswith("failed: fine; "), "a run of no tests is no success"


def test_rows_that_were_not_run_stay_while_the_versions_do(machine, monkeypatch):
    answers, ran, page = machine
    answers["-m pytest"] = (0, "7 passed in 1.00s\n")
    call(monkeypatch)
    before = page()
    answers["-m pytest"] = (0, "8 passed in 1.00s\n")
    ran.clear()
    assert call(monkeypatch, "newest", "--only", "tests", "--envs", "/somewhere") == 0 and len(ran) == 1
    assert page()["oldest"] == before["oldest"] and page()["newest"]["info"] == before["newest"]["info"]
    assert page()["newest"]["tests"].startswith("8 passed; ")
    assert "`python tools/versions.py newest --only tests`" in page()["newest"]["last run"]
    monkeypatch.setattr(versions, "_versions", lambda binary: {**INSTALLED, "torch": "2.16.0"})
    call(monkeypatch, "newest", "--only", "info")
    assert page()["newest"]["tests"] == "not run" and page()["newest"]["torch"] == "2.16.0"
    assert page()["oldest"] == before["oldest"]


FAILED = (
    "FAILED tests/test_a.py::test_b[x, y] - AssertionError: 3 - 4\n"
    "ERROR tests/test_c.py\n"
    "1 failed, 1 error, 5 passed in 2.00s\n"
)


@pytest.mark.parametrize(
    ("known", "failed", "text"),
    [
        ((), True, "failed: tests/test_a.py::test_b[x, y] - AssertionError: 3 - 4; 1 failed, 1 error, 5 passed"),
        (
            ("tests/test_a.py::test_b[x, y]",),
            True,
            "failed: tests/test_c.py; known: tests/test_a.py::test_b[x, y] (why); 1 failed, 1 error, 5 passed",
        ),
        (
            ("tests/test_a.py::test_b[x, y]", "tests/test_c.py"),
            False,
            "known: tests/test_a.py::test_b[x, y] (why); known: tests/test_c.py (why); 1 failed, 1 error, 5 passed",
        ),
    ],
)
def test_a_known_failure_is_named_and_not_counted(known, failed, text, monkeypatch):
    monkeypatch.setattr(versions, "KNOWN", dict.fromkeys(known, "why"))
    assert versions.judge("tests", 1, FAILED) == versions.Verdict(text, failed)


@pytest.mark.parametrize("code", [1, 2, 3, 4])
def test_tests_that_ended_badly_without_a_name_are_failures(code):
    assert versions.judge("tests", code, "5 passed in 2.00s\n").failed


def test_a_damaged_page_is_made_again(machine, monkeypatch):
    _, _, page = machine
    versions.PAGE.write_bytes(b"| | oldest | newest |\n| --- | --- | --- |\n| import \xff|\n")
    assert call(monkeypatch, "oldest", "--only", "import") == 0
    assert page()["oldest"]["import"].startswith("ok") and "newest" not in page()


def test_a_python_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(versions.VersionsError, match="none/python cannot be run: No such file"):
        versions.environment("oldest", "none/python", tmp_path)
    (tmp_path / "newest").mkdir()
    with pytest.raises(versions.VersionsError, match="cannot be run"):
        versions.environment("newest", None, tmp_path)


def test_a_missing_nvcc_is_said_and_is_no_failure():
    for check, code in (("nvcc", 1), ("extension", 0)):
        verdict = versions.judge(check, code, "nvcc is not installed: there is none in PATH.\n")
        assert verdict == versions.Verdict("not run: nvcc is not installed")
    assert versions.judge("emulation", 1, "g++ is not installed: there is none.\n").failed


@pytest.fixture
def installing(tmp_path, monkeypatch):
    """An environment `oldest` of another torch, and what is asked of pip."""
    asked = []
    (tmp_path / "oldest").mkdir()
    found = {**INSTALLED, "torch": "2.13.0+cpu", "pytest-xdist": "3.8.0"}
    monkeypatch.setattr(versions, "_versions", lambda binary: dict(found))
    monkeypatch.setattr(versions, "_asked", lambda command: asked.append(command) or '{"install": []}')
    return found, asked


def test_an_environment_of_someone_elses_is_never_installed_into(installing, tmp_path):
    found, asked = installing
    with pytest.raises(versions.VersionsError, match=r"has torch 2\.13\.0\+cpu, and is not this tool's to change"):
        versions.environment("oldest", None, tmp_path)
    (tmp_path / "newest").mkdir()
    assert versions.environment("newest", None, tmp_path) == tmp_path / "newest" / "bin" / "python"
    assert asked == []


def test_an_environment_of_its_own_gets_the_lower_bounds_once(installing, tmp_path):
    found, asked = installing
    (tmp_path / "oldest" / versions.MARK).touch()
    versions.environment("oldest", None, tmp_path)
    assert len(asked) == 1 and asked[0][-4:] == ["torch==2.11.0", "triton==3.6.0", "torchvision==0.26.0", "numpy<2.4"]
    found["torch"] = "2.11.0+cpu"
    versions.environment("oldest", None, tmp_path)
    assert len(asked) == 1


def test_the_oldest_column_of_the_page_is_the_lower_bounds_of_pyproject():
    page = versions.read((ROOT / "tools" / "versions.md").read_text())
    bounds = versions.bounds((ROOT / "pyproject.toml").read_text())
    assert bounds and {name: page["oldest"][name].partition("+")[0] for name in bounds} == bounds


# ---- what torch 2.11 accepts ----------------------------------------------------------------------------------------


def calls(source, name):
    """The calls of `name`, or of an attribute of that name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and name in (getattr(node.func, "id", None), getattr(node.func, "attr", None)):
            yield node


def tags_that_are_no_sequence(source):
    tags = [k.value for node in calls(source, "custom_op") for k in node.keywords if k.arg == "tags"]
    return [ast.unparse(tag) for tag in tags if not isinstance(tag, ast.Tuple | ast.List)]


def bools(source):
    """Calls of bool() on anything but a comparison or a tensor's method such as any()."""
    plain = [node for node in calls(source, "bool") if isinstance(node.func, ast.Name)]
    return [ast.unparse(node) for node in plain if not isinstance(node.args[0], ast.Compare | ast.Call)]


def test_tags_of_operators_are_sequences():
    files = [file for file in (ROOT / "decompk").rglob("*.py") if "custom_op(" in file.read_text()]
    assert len(files) >= 4
    assert {file.name: found for file in files if (found := tags_that_are_no_sequence(file.read_text()))} == {}
    assert tags_that_are_no_sequence("@library.custom_op('a::b', tags=Tag.x)\ndef f(): pass") == ["Tag.x"]


def test_what_dynamo_traces_calls_no_bool_of_a_tuple():
    files = (ROOT / "decompk" / "packed").glob("*.py")
    assert {file.name: found for file in files if (found := bools(file.read_text()))} == {}
    assert bools("bool(self.crops); bool(m.any()); bool(a == b)") == ["bool(self.crops)"]


class NoDataclass(type):
    """Its classes are not to be asked whether they are dataclasses, which dynamo cannot trace."""

    def __getattr__(cls, name):
        assert name != "__dataclass_fields__"
        raise AttributeError(name)


def test_the_class_of_a_tuple_is_not_asked_for_the_fields_of_a_dataclass():
    class Pair(tuple, metaclass=NoDataclass):
        pass

    found = nest.tree_map(lambda leaf: leaf + 1, Pair((1, Pair((2,)))))
    assert found == (2, (3,)) and type(found) is type(found[1]) is Pair


def test_the_extension_is_built_for_the_oldest_torch():
    flags = re.search(r"TORCH_TARGET_VERSION=0x(\w{2})(\w{2})", (ROOT / "tools" / "build_ext.py").read_text())
    oldest = versions.bounds((ROOT / "pyproject.toml").read_text())["torch"]
    assert [int(part, 16) for part in flags.groups()] == [int(part) for part in oldest.split(".")[:2]]


def test_a_kernel_that_does_not_compile_is_a_fault_and_the_gate_goes_on(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("PassManager::run failed\nand more of it")

    monkeypatch.setattr(inspect_kernels, "ASTSource", lambda *_: None)
    monkeypatch.setattr(inspect_kernels.triton, "compile", fails)
    launch = SimpleNamespace(kernel=None, specialisation=lambda: (), warps=4, stages=2)
    report = inspect_kernels.inspect(inspect_kernels.Kernel("wgrad", launch), 100)
    assert report.faults == ("does not compile: PassManager::run failed",)
