"""The command line: what it prints, and how a wrong call ends."""

import argparse
import csv
import io
import json
import re
import subprocess
import sys

import pytest

from decompk.cli import _parser, main


def run(capsys, *arguments):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    (tmp_path / "mine_decompk.py").write_text(
        "from torch import nn\n"
        "import torch\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(8, 4))\n"
        "class Attention(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)\n"
        "        self.attention = nn.MultiheadAttention(8, 2)\n"
        "    def forward(self, x):\n"
        "        x = self.stem(x).flatten(2).permute(2, 0, 1)\n"
        "        return self.head(self.attention(x, x, x)[0].mean(0))\n"
        "def broken():\n"
        "    raise ValueError('no weights')\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "mine_decompk"
    sys.modules.pop("mine_decompk", None)


@pytest.mark.parametrize(
    ("network", "size", "parts", "said"),
    [
        ("mlp(64, 10)", "64", "4", "Sequential at 64 in 4 members at 16"),
        ("Recurrent(8, 3, 16)", "5x8", "2", "Recurrent at 8 in 2 members at 4"),
        ("signal_cnn()", "1x128", "4", "Sequential at 128 in 4 members at 32"),
        ("volume_cnn(size=(36, 36, 36))", "1x36x36x36", "8", "Sequential at 36×36×36 in 8 members at 18×18×18"),
    ],
)
def test_report_takes_vectors_sequences_signals_and_volumes(capsys, tmp_path, monkeypatch, network, size, parts, said):
    name = "mine_" + "".join(c for c in network if c.isalnum())
    (tmp_path / f"{name}.py").write_text(f"from decompk import models\n\ndef make():\n    return models.{network}\n")
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "report", "--model", f"{name}:make", "--size", size, "--partitions", parts)
    assert code == 0 and said in out
    code, _, err = run(capsys, "report", "--model", "vgg16", "--size", size)
    assert code == 2 and "--size is for a model of your own" in err


def test_report_compares_global_and_member_with_the_paper(capsys):
    code, out, _ = run(capsys, "report", "--model", "vgg16", "--partitions", "4")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("features.2 "))
    assert "1/64" in line and "1/K³" in line
    assert max(map(len, out.splitlines())) <= 120


def test_json_is_the_only_thing_on_stdout_and_holds_every_figure(capsys):
    code, out, err = run(capsys, "report", "--model", "resnet32", "--crop", "20", "--format", "json")
    assert code == 0 and err == ""
    assert json.loads(out)


def test_csv_and_markdown_parse(capsys):
    _, out, _ = run(capsys, "report", "--model", "resnet32", "--format", "csv")
    rows = list(csv.reader(io.StringIO(out)))
    assert len(rows) > 30 and len(set(map(len, rows[:30]))) == 1
    _, out, _ = run(capsys, "report", "--model", "resnet32", "--format", "md")
    assert "| ---" in out


def test_rectangular_inputs_and_grids(capsys):
    code, out, _ = run(
        capsys, "report", "--model", "resnet32", "--input", "32x48", "--partitions", "2x4", "--crop", "20x16"
    )
    assert code == 0 and "8 members at 20×16" in out


def test_a_users_own_model_is_reported(capsys, own_model):
    code, out, _ = run(capsys, "report", "--model", f"{own_model}:net", "--input", "32")
    assert code == 0 and "32×32" in out


def test_the_papers_cells_come_as_json_objects(capsys):
    code, out, _ = run(capsys, "report", "--paper", "--format", "json")
    cells = json.loads(out)
    assert code == 0 and len(cells) == 62
    assert {tuple(cell) for cell in cells} == {("table", "item", "printed", "ours", "convention", "verdict")}
    assert sum(cell["verdict"] == "unexplained" for cell in cells) == 2


def test_info_says_why_a_backend_is_absent(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("decompk.kernels.extension.LIBRARIES", tmp_path)
    monkeypatch.setattr("decompk.kernels.device.interpreted", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, _ = run(capsys, "info", "--format", "json")
    rows = {row["what"]: row for row in json.loads(out)["rows"]}
    assert code == 0 and rows["backend torch"]["state"] == "available"
    assert "build_ext" in rows["backend cuda"]["detail"] and "interpreted" in rows["backend triton"]["detail"]


WRONG = {
    "64 channels into 5": (("--partitions", "1x5", "--model", "resnet50"), "64 channels cannot be divided into 5"),
    "no partitions": (("--partitions", "0",), "a positive number"),
    "crop outside": (("--crop", "300",), "crop height of 300"),
    "not a number": (("--crop", "big",), "--crop 'big'"),
    "input of the wrong rank": (("--input", "1x2x3",), ""),
    "unknown model": (("--model", "resnet5"), "resnet5"),
    "broken module path": (("--model", "no_such_module:net"), "no_such_module"),
    "attribute that is not there": (("--model", "{own}:nothing"), "nothing"),
    "not callable": (("--model", "{own}:number"), "number"),
    "a callable that fails": (("--model", "{own}:broken"), "no weights"),
    "attention": (("--model", "{own}:Attention", "--input", "16"), "attention"),
    "too small": (("--model", "vgg16", "--input", "64", "--crop", "8"), "does not fit"),
    "a negative margin": (("--margin", "-1"), "margin"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_ends_in_one_sentence_and_exit_code_2(case, capsys, own_model):
    arguments, words = WRONG[case]
    code, out, err = run(capsys, "report", *(a.format(own=own_model) for a in arguments))
    assert code == 2 and out == ""
    assert words in err and err.startswith("decompk: ") and err.endswith(".\n")
    assert err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize("arguments", [(), ("trian",), ("report", "--format", "xml"), ("demo", "--epochs", "0,1")])
def test_unknown_words_end_in_usage_and_exit_code_2(arguments, capsys):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and "usage: decompk" in err


def test_help_says_every_default():
    parsers = [_parser()]
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif action.default not in (None, False, [], argparse.SUPPRESS):
                said = re.search(r"(\S+ )?\(?default( \S+)?\)", action.help % vars(action)).group()
                assert action.default is True or str(action.default) in said, action.option_strings
    assert len(parsers) > 7


def test_data_that_is_not_there_is_said_to_be_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spec in ("nosuch", "nosuch.npz"):
        code, out, err = run(capsys, "train", "--data", spec)
        assert code == 2 and out == "" and err.count("\n") == 1
        assert err.startswith(f"decompk: '{spec}' names no data, and no such file or folder exists: give 'digits',")
    (tmp_path / "photos").mkdir()
    code, _, err = run(capsys, "train", "--data", "photos")
    assert code == 2 and "there is no preset of its own for photos: give --preset" in err
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_the_module_runs_as_a_command():
    found = subprocess.run([sys.executable, "-m", "decompk", "info"], capture_output=True, text=True, check=True)
    assert "torch" in found.stdout
