"""What the README shows is what happens."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from decompk.report import bench
from decompk.report.paper import paper_cells
from decompk.splitnet.summary import summary as splits
from decompk.train.summary import tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "bench/results/cpu-amd-epyc-2-cores"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
PYTHON = [text for language, text in BLOCKS if language == "python"]


def test_the_example_runs_as_written():
    example = PYTHON[0]
    assert len(example.strip().splitlines()) <= 12
    subprocess.run([sys.executable, "-c", example], check=True)


def test_the_loop_of_one_network_trains_several_as_it_would_each_with_the_two_lines_changed():
    setup, _, loop = PYTHON[1].partition("\nnet = ")
    loop, changed = f"net = {loop}".splitlines(), PYTHON[2].splitlines()
    assert len(changed) == 2
    new = {line.partition(" = ")[0]: line for line in changed}
    assert sum(line.partition(" = ")[0] in new for line in loop) == 2
    several = [new.get(line.partition(" = ")[0], line) for line in loop]
    written = {}
    exec(setup, written)
    batches = [(x.double(), y) for x, y in written["batches"]]

    def run(lines, first):
        seeds = iter(range(first, 4))

        def make_net():
            torch.manual_seed(next(seeds))
            return written["make_net"]().double()

        scope = {**written, "make_net": make_net, "batches": batches}
        exec("\n".join(lines), scope)
        return dict(scope["net"].named_parameters())

    packed = run(several, 0)
    for k in range(4):
        for name, p in run(loop, k).items():
            assert torch.allclose(packed[name][k], p, rtol=0, atol=1e-12), f"{name} of member {k}"


def test_the_further_blocks_run_as_they_stand_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope, starts = {}, ["import", "net", "step", "with torch.no_grad():\n    accuracy", "packed", "import"]
    for block, start in zip(PYTHON[1:], starts, strict=True):
        assert block.startswith(start)
        exec(block, scope)
        if start == "net":
            other = re.search(r"# or (decompk.*)", block).group(1)
            assert eval(other, scope)(scope["x"]).shape == (4, 16, 5)
        elif start == "step":
            assert scope["loss"].shape == () and scope["step"].read().images == 160
        elif "accuracy" in start:
            assert scope["accuracy"].shape == (4,)
            state = torch.load("member2.pt")
            alone = scope["make_net"]()
            alone.load_state_dict(state)
            assert torch.allclose(alone(scope["x"]), scope["net"](scope["x"])[2], atol=1e-5)
    assert scope["optimizer"].stopped == (2,) and len(eval(capsys.readouterr().out)) == 4
    assert scope["fast"](scope["batches"][0][0]).shape == (8, 100)


def test_the_report_is_the_commands_output():
    shown = next(text for _, text in BLOCKS if text.startswith("VGG16"))
    command = [sys.executable, "-m", "decompk", "report", "--model", "vgg16"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line for line in shown.splitlines() if line.strip()]
    assert len(lines) > 20
    assert not [line for line in lines if line not in output.splitlines()]


def test_the_trainings_table_is_that_of_the_committed_run():
    folder = ROOT / "bench/results/cpu-intel-xeon-family-6-model-207-avx-512-amx-2-cores/quick"
    result = json.loads((folder / "result.json").read_text())
    assert f"{folder.relative_to(ROOT)}/summary.md" in README
    shown = [text for _, text in BLOCKS if text.startswith(result["title"])]
    expected = [table.to_text().split("\n\n- ")[0].strip() for table in (tables(result)[0], tables(result)[-1])]
    assert "\n\n".join(expected) == shown[0].strip() and len(expected[0].splitlines()) > 10
    made = result["made_with"]
    assert f"torch {made['torch'].partition('+')[0]} on {made['device']}" in README
    epoch = {phase: result["flops"][phase] / result["epochs"][phase] for phase in ("members", "global")}
    words = " ".join(README.split())
    assert f"a {epoch['global'] / epoch['members']:.0f}th of a global epoch's FLOPs" in words
    table = {str(row[0]): row[-1] for row in tables(result)[0].rows}
    more = sorted(table["SNets, all 4"] / table[name] for name in ("GNet-T-trained", "GNet-R-trained"))
    assert "the members saw {:.1f} to {:.1f} times as many images a second".format(*more) in words


def test_the_splits_table_is_that_of_the_committed_run():
    folder = RESULTS / "splitnet"
    known = json.loads((folder / "result.json").read_text())
    table = splits(known)
    assert (folder / "summary.md").read_text() == table.to_markdown()
    shown = next(text for _, text in BLOCKS if text.startswith("SplitNet\n"))
    assert shown.strip() == table.to_text().split("\n\n- ")[0].strip() and len(shown.splitlines()) > 10
    row = {line[0]: line for line in table.rows}
    deep, dealt = (f"{row[name][1]:.2f} %" for name in ("Deep", "Deep random"))
    assert f"{deep} error against {dealt} of random groups" in " ".join(README.split())
    cut, dealt = (f"{row[name][3]:.1f} %" for name in ("Deep", "Deep random"))
    assert f"leave it {cut} error and random groups of the same layers {dealt};" in " ".join(README.split())
    made = known["made_with"]
    assert f"torch {made['torch'].partition('+')[0]} on {made['threads']} threads of {made['device']}" in README


def test_its_timings_are_those_of_the_committed_bench(tmp_path):
    again = tmp_path / "README.md"
    again.write_text(README)
    bench.fill_readme(bench.read([ROOT / "bench/results"]), again, tmp_path / "bench/results/README.md")
    assert again.read_text() == README
    assert len(README.partition(bench.BEGIN)[2].partition(bench.END)[0].splitlines()) > 10


INTEL = ROOT / "bench/results/cpu-intel-xeon-family-6-model-207-avx-512-amx-2-cores"
COMPOSED = {
    "AMD EPYC": (RESULTS, ("ResNet32, K=4", "VGG16, K=4")),
    "Intel Xeon": (INTEL, ("ResNet32, K=4", "ResNet32, K=16", "VGG16, K=4")),
}


@pytest.mark.parametrize("processor", COMPOSED)
def test_the_speed_without_zero_blocks_is_that_of_the_committed_bench(processor):
    folder, cases = COMPOSED[processor]
    result = json.loads((folder / "composed.json").read_text())
    medians = {b["name"].removeprefix("test_composed_inference"): b["stats"]["median"] for b in result["benchmarks"]}
    for case in cases:
        hows = ("dense", "dense, channels_last", "members", "layer by layer")
        one, other, members, layers = (medians[f"[{case}-{how}]"] * 1e3 for how in hows)
        dense = min(one, other)
        cells = f"{dense:.0f} ms | {members:.0f} ms | {dense / members:.1f}× | {layers:.0f} ms |"
        assert re.search(rf"composed {case}, [^|]*\| {processor} \| {re.escape(cells)}", README), cells


def test_the_counts_it_gives_are_those_of_the_tables_and_the_survey():
    verdicts = Counter(cell["verdict"] for cell in paper_cells())
    counts = [verdicts[v] for v in ("exact", "exact (truncated)", "close", "unexplained")]
    assert counts == [48, 3, 9, 2]
    text = " ".join(README.split())
    assert "48 come out exactly, 3 as the paper truncated them, 9 within 5 %, and 2 fit no convention" in text
    survey = (ROOT / "tools" / "survey.md").read_text()
    networks, members = re.search(r"(\d+) of torchvision \S+ (\d+) CNNs decompose", survey).group(2, 1)
    assert f"Of torchvision's {networks} CNNs, {members} decompose into 4 members" in text


def test_every_picture_and_folder_it_names_exists():
    for path in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:decompk|tools|bench|tests)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path


def test_its_layout_names_every_folder_of_the_package_and_nothing_that_is_not_there():
    layout = README.partition("\n## Layout\n")[2]
    named = re.findall(r"`([\w./]+)`", layout)
    paths = [name for name in named if "/" in name]
    assert not [path for path in paths if not any((folder / path).exists() for folder in (ROOT, ROOT / "decompk"))]
    rows = re.findall(r"^\| `(\w+)/` \| .* \| `(\w+)/[\w/]+\.py` \|$", layout, re.M)
    assert sorted(wing for wing, _ in rows) == sorted(
        file.parent.name for file in (ROOT / "decompk").glob("*/__init__.py")
    )
    assert all(wing == first for wing, first in rows)


def test_its_words_are_words_of_the_code_or_of_what_it_prints():
    table = README.partition("\n## Words\n")[2].partition("\n## ")[0]
    words = re.findall(r"[\w -]+", ",".join(re.findall(r"^\| (.*?) \|", table, re.M)[2:]))
    code = " ".join(file.read_text() for file in (ROOT / "decompk").rglob("*.py")).replace("_", " ")
    said = [re.search(rf"\b{word.strip()}\b", code, re.I) for word in words]
    assert len(words) > 25 and all(said)
