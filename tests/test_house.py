"""How the package is built: its files, which module imports which, and its public names."""

import ast
import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import decompk

PACKAGE = Path(decompk.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
HEAVY = (
    *("triton", "fvcore", "matplotlib", "sklearn", "tqdm", "torchvision", "scipy"),
    *("torch._dynamo", "torch._inductor", "torch.utils.flop_counter"),
)
PUBLIC = ("decompk", *(f"decompk.{name}" for name in ("losses", "models", "ops", "optim", "theory", "train")))


# ---- imports, as the source has them --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """One statement of `module` that imports modules of the package; `when` is "top", "lazy" or "typing"."""

    module: str
    targets: tuple[str, ...]
    when: str
    line: int
    reason: str  # the comment on its lines

    def __str__(self):
        return f"{self.module}:{self.line} imports {', '.join(self.targets)}"


def imports_of(module, path):
    """Every Import of a module, wherever it stands: statements, and calls of import_module on the package's own."""
    lines = path.read_text().splitlines()

    def visit(node, when):
        for child in ast.iter_child_nodes(node):
            targets = targets_of(module, path.stem == "__init__", child)
            if targets:
                text = "\n".join(lines[child.lineno - 1 : child.end_lineno])
                yield Import(module, targets, when, child.lineno, text.partition("#")[2].strip())
            inside = when
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inside = "lazy"
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inside = "typing"
            yield from visit(child, inside)

    return list(visit(ast.parse("\n".join(lines)), "top"))


def targets_of(module, is_package, node):
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
        base = ".".join([*parents, *([node.module] if node.module else [])])
        names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        given = [str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant)][:1]
        ours = [name for name in given if name.startswith((".", "decompk"))]
        names = [name if name in MODULES else "decompk" for name in ours]
    else:
        names = []
    return tuple(sorted({name for name in names if name.partition(".")[0] == "decompk"}))


IMPORTS = [one for module, path in MODULES.items() for one in imports_of(module, path)]


def loaded_by(one):
    """What an import runs: its targets, and the packages around them that are not the importing module's own."""
    for target in one.targets:
        parts = target.split(".")
        around = {".".join(parts[: i + 1]) for i in range(len(parts))}
        yield from (name for name in around if name == target or not f"{one.module}.".startswith(f"{name}."))


def circles(imports):
    """Groups of modules each of which reaches all the others of its group."""
    arrows = {module: set() for module in MODULES}
    for one in imports:
        arrows[one.module].update(loaded_by(one))
    reached = {}
    for module in MODULES:
        seen, todo = set(), [*arrows[module]]
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += arrows[name]
        reached[module] = seen
    found = {tuple(m for m in MODULES if m in reached[n] and n in reached[m]) for n in MODULES}
    return sorted(group for group in found if group)


def test_the_walk_over_the_source_resolves_what_python_would(tmp_path):
    code = """
        from __future__ import annotations
        from typing import TYPE_CHECKING
        import numpy
        from . import conv, measure as measured
        from .. import __version__
        if TYPE_CHECKING:
            from ..errors import PackError
        def late():
            from .conv.tile import fprop  # loads triton
            return importlib.import_module("decompk.theory")
    """
    path = tmp_path / "choose.py"
    path.write_text("\n".join(line.removeprefix("        ") for line in code.splitlines()))
    found = [(one.targets, one.when, one.reason) for one in imports_of("decompk.kernels.choose", path)]
    assert found == [
        (("decompk.kernels.conv", "decompk.kernels.measure"), "top", ""),
        (("decompk",), "top", ""),
        (("decompk.errors",), "typing", ""),
        (("decompk.kernels.conv.tile",), "lazy", "loads triton"),
        (("decompk.theory",), "lazy", ""),
    ]


def test_a_circle_is_found_through_the_package_that_an_import_runs():
    def arrow(module, target):
        return Import(module, (target,), "top", 1, "")

    chain = [arrow("decompk.losses", "decompk.train.data"), arrow("decompk.train", "decompk.train.loop")]
    assert circles(chain) == []
    assert circles([*chain, arrow("decompk.train.loop", "decompk.losses")]) == [
        ("decompk.losses", "decompk.train", "decompk.train.loop")
    ]


@pytest.mark.parametrize("when", [("top",), ("top", "lazy")], ids=["at import", "with late imports"])
def test_no_modules_import_each_other(when):
    assert circles([one for one in IMPORTS if one.when in when]) == []


def test_few_imports_of_our_own_are_late_and_each_says_why():
    late = [one for one in IMPORTS if one.when == "lazy"]
    assert len(late) < 15, "\n".join(map(str, late))
    assert [str(one) for one in late if not one.reason] == []


# ---- files and names ------------------------------------------------------------------------------------------------


def test_few_files_lie_at_the_top():
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 10


def test_no_module_is_hidden_by_an_attribute_of_its_package():
    pytest.importorskip("triton")
    below = MODULES.keys() - {"decompk", "decompk.__main__"}
    modules = {name: importlib.import_module(name) for name in sorted(below)}
    places = {name: name.rpartition(".") for name in modules}
    assert [n for n, (package, _, own) in places.items() if getattr(sys.modules[package], own) is not modules[n]] == []


@pytest.mark.parametrize("module", ["decompk", "decompk.cli"])
def test_importing_takes_no_gpu_and_no_heavy_module(module):
    code = (
        f"import sys, torch; before = {{*sys.modules}}; import {module}; assert not torch.cuda.is_initialized(); "
        f"print(*({{*sys.modules}} - before).intersection({HEAVY}))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.split() == []


def test_the_public_names_are_those_that_are_listed():
    """A name is public where `__all__` holds it or, in a module without one, where the module defines it."""
    found = []
    for name in PUBLIC:
        module = importlib.import_module(name)
        defined = [n for n, v in vars(module).items() if n[0] != "_" and getattr(v, "__module__", None) == name]
        found += [f"{name}.{public}" for public in getattr(module, "__all__", defined)]
    assert sorted(found) == (Path(__file__).parent / "public_names.txt").read_text().split()
