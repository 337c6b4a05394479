"""A torchvision that misfits this torch, and a user's module with an error of its own: each in one sentence."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from decompk import DecompkError, models
from decompk.cli import main
from decompk.fx import imports
from decompk.fx import wrapper as shell
from decompk.train.data import open_data

NMS = "raise RuntimeError('operator torchvision::nms does not exist\\nand more')\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current directory, and a way to write modules into it; what is imported meanwhile is forgotten."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)

    def write(**code):
        for name, text in code.items():
            (tmp_path / f"{name}.py").write_text(text)

    yield SimpleNamespace(path=tmp_path, write=write)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def no_torchvision(here, monkeypatch):
    """Forgets the torchvision of this process; gives the folder whose torchvision is found before the real one."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    site = here.path / "site"
    (site / "torchvision").mkdir(parents=True)
    monkeypatch.syspath_prepend(site)
    yield site
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


@pytest.fixture
def broken(no_torchvision):
    """A torchvision 9.8.7 built for CUDA 12.0 whose operators do not load, laid out as the real one."""
    package, about = no_torchvision / "torchvision", no_torchvision / "torchvision-9.8.7.dist-info"
    (package / "__init__.py").write_text("from . import extension\nfrom .version import __version__\n")
    (package / "extension.py").write_text(NMS)
    (package / "models.py").write_text("resnet18 = None\n")
    (package / "version.py").write_text("__version__ = '9.8.7+cu120'\n")
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 9.8.7\n")
    return package


def said(capsys, *arguments):
    """The one sentence that a wrong call prints."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("decompk: ") and err.endswith(".\n") and err.count("\n") == 1, err
    return err


CALLS = {
    "cifar10": ("train", "--data", "cifar10:/nowhere", "--out", "runs"),
    "cifar100": ("train", "--data", "cifar100:/nowhere", "--out", "runs"),
    "food101": ("train", "--data", "food101:/nowhere", "--out", "runs"),
    "its network, reported": ("report", "--model", "torchvision.models:resnet18"),
    "its network, checked": ("check", "--model", "torchvision.models:resnet18", "--no-time"),
    "its network, trained": ("train", "--model", "torchvision.models:resnet18", "--data", "digits", "--out", "runs"),
    "data to split on": ("split", "--data", "cifar10:/nowhere", "--out", "runs"),
    "a module that imports it": ("report", "--model", "uses_it:net"),
    "a callable that imports it": ("report", "--model", "imports_it_late:net"),
    "a helper that imports it": ("report", "--model", "uses_helper:net"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_torchvision_that_does_not_load_is_named_with_both_versions_the_cause_and_the_remedy(
    call, capsys, here, broken
):
    here.write(
        uses_it="from torchvision.models import resnet18 as net\n",
        imports_it_late="def net():\n    import torchvision\n    return torchvision.models.resnet18()\n",
        uses_helper="from uses_it import net\n",
    )
    err = said(capsys, *CALLS[call])
    assert f"torchvision 9.8.7+cu120 is installed but cannot be imported beside torch {torch.__version__}" in err
    assert "built for another torch (operator torchvision::nms does not exist); install the one that belongs" in err
    plain = re.escape(torch.__version__.partition("+")[0])
    index = r"(, both from the index of \w+ builds)?"
    assert re.search(rf"pip uninstall torchvision, then pip install torchvision torch=={plain}{index}\.$", err)


@pytest.mark.parametrize("build", ["", "+cpu", "+cu130"])
def test_the_remedy_names_the_index_that_torch_came_from(build, here, broken, monkeypatch):
    real = imports.importlib.metadata.version
    found = lambda name: f"2.13.0{build}" if name == "torch" else real(name)  # noqa: E731
    monkeypatch.setattr(imports.importlib.metadata, "version", found)
    with pytest.raises(DecompkError) as caught:
        models.build("torchvision.models:resnet18")
    index = f", both from the index of {build[1:]} builds" if build else ""
    assert str(caught.value).endswith(f"torch=={torch.__version__.partition('+')[0]}{index}.")


def test_what_torchvision_itself_lacks_is_asked_for(here, broken):
    (broken / "extension.py").write_text("import no_such_dependency\n")
    with pytest.raises(DecompkError, match=r"^torchvision 9\.8\.7\+cu120 .*, as it needs no_such_dependency: install"):
        open_data("cifar10:/nowhere")


def test_an_error_inside_a_torchvision_that_loads_is_not_blamed_on_it(here, no_torchvision):
    (no_torchvision / "torchvision" / "__init__.py").write_text("def get(name):\n    raise ValueError(f'no {name}')\n")
    here.write(
        calls_it="import torchvision\nnet = torchvision.get('resnet19')\n", misnames="from torchvision import x\n"
    )
    with pytest.raises(DecompkError, match=r"^the module 'calls_it' cannot be imported: ValueError: no resnet19 \("):
        models.build("calls_it:net")
    with pytest.raises(DecompkError, match=r"'misnames' cannot be imported: ImportError: .*\(misnames\.py, line 1\)"):
        models.build("misnames:net")
    with pytest.raises(DecompkError, match=r"^no module 'torchvision\.models' is found; check its name"):
        models.build("torchvision.models:resnet18")


@pytest.mark.parametrize("name", ["torchvision.models:resnet18", "wants_it:net", "wants_it_late:net"])
def test_a_missing_torchvision_is_asked_for(name, capsys, here, no_torchvision, monkeypatch):

    class Nowhere:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                raise ModuleNotFoundError("No module named 'torchvision'", name=name)

    monkeypatch.setattr(sys, "meta_path", [Nowhere(), *sys.meta_path])
    here.write(
        wants_it="import torchvision.models\n",
        wants_it_late="def net():\n    from torchvision.models import resnet18\n",
    )
    assert said(capsys, "report", "--model", name).endswith("not installed: pip install torchvision.\n")


OWN = {
    "import no_such_package": "ModuleNotFoundError: No module named 'no_such_package' (own.py, line 2)",
    "import math.nothing": "named 'math.nothing'; 'math' is not a package (own.py, line 2)",
    "from math import nothing": "(own.py, line 2)",
    "raise KeyError('width')": "KeyError: 'width' (own.py, line 2)",
    "raise RuntimeError": "RuntimeError (own.py, line 2)",
    "import helper": "NameError: name 'undefined' is not defined (helper.py, line 3)",
    "import json; json.loads('{')": "(own.py, line 2)",
    "net = (": "SyntaxError: '(' was never closed (own.py, line 2)",
}


@pytest.mark.parametrize("code", OWN)
def test_a_users_module_that_fails_says_its_own_error_and_line(code, capsys, here):
    here.write(own=f"import torch\n{code}\n", helper="\n\nundefined\n")
    err = said(capsys, "report", "--model", "own:net")
    assert err.startswith("decompk: the module 'own' cannot be imported: ") and OWN[code] in err
    assert err.endswith("; repair it.\n") and "check" not in err and "pip install" not in err


def test_a_users_callable_that_fails_says_its_own_error_and_line(here):
    here.write(own="def net():\n    return {}['width']\n")
    with pytest.raises(DecompkError, match=r"called without arguments: KeyError: 'width' \(own\.py, line 2\); repair"):
        models.build("own:net")


@pytest.mark.parametrize("name", ["no_such_module", "torch.nn.no_such_module", "no_such.module", "", ".relative"])
def test_a_module_that_is_not_there_is_looked_for_in_the_current_directory(name, here):
    with pytest.raises(DecompkError) as caught:
        models.build(f"{name}:net")
    assert str(caught.value) == f"no module '{name}' is found; check its name, and its path from {here.path}."


def test_a_saved_network_names_the_module_that_is_gone():
    with pytest.raises(DecompkError, match=r"^the network calls the module 'gone', which is not found here\.$"):
        shell.compiled("def forward(self): pass", {"f": ("gone", "f")})
