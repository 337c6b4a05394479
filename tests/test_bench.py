"""The bench: who may be timed, how, and the page that is made of the results."""
# ruff: noqa: E402 (the bench stands beside the package)

import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools")]

import convolutions
import networks
import race
from contestants import TRAINING, Case, Setting, ensemble, job, members_alone, side, who_trains
from layers import Layer, problem

import decompk
from decompk import models
from decompk.cli import main
from decompk.report import bench as page

CPU = Setting(torch.device("cpu"), torch.float32)


# ---- the race -------------------------------------------------------------------------------------------------------


def runner(output, calls=None, name=None, **gradients):
    """What builds a contestant that returns `output` and `gradients` and writes its name into `calls`."""

    def run():
        if calls is not None:
            calls.append(name)
        return output

    result = {f"gradient of {name}": value for name, value in gradients.items()}
    return lambda: race.Contestant(run, lambda out: {"output": out, **result}, race.Work(1, 1))


def test_a_wrong_output_or_gradient_is_not_timed():
    right, weight = torch.randn(2, 3), torch.randn(2, 5)
    calls = []
    others = {
        "output": (1.001 * right, weight),
        "nan": (right * math.nan, weight),
        "gradient": (right, 1.2 * weight),
        "one member": (right, weight * torch.tensor([[1.0], [0.0]])),
        "shape": (right[:, :2], weight),
    }
    builds = {"own": runner(right, calls, "own", w=weight), "good": runner(right * 1.00001, calls, "good", w=weight)}
    builds |= {name: runner(y, calls, name, w=w) for name, (y, w) in others.items()}
    builds["missing"] = runner(right, calls, "missing")
    reference = {"output": right.double(), "gradient of w": weight.double()}
    found = race.race(builds, reference, ["own"], rounds=4)
    assert set(found.wrong) == {*others, "missing"}
    assert {name: len(times) for name, times in found.seconds.items()} == {"own": 4, "good": 4}
    assert all(calls.count(name) == 1 for name in found.wrong)


def test_one_member_may_lose_a_relu_to_rounding_but_not_most_of_them():
    reference = {"output": torch.ones(3, 4), "gradient of w": torch.ones(3, 4)}
    for wrong, error in ((1, 0.0), (2, 0.5)):
        gradient = torch.ones(3, 4)
        gradient[:wrong] = 1.5
        found = {"output": torch.ones(3, 4), "gradient of w": gradient}
        assert race.errors(found, reference, typical=True)["gradient"] == pytest.approx(error)
        assert race.errors(found, reference)["gradient"] == pytest.approx(0.5)
    nan = {**reference, "gradient of w": torch.full((3, 4), math.nan)}
    assert race.errors(nan, reference, typical=True)["gradient"] == math.inf


def test_a_reference_that_torch_itself_misses_is_no_reference():
    right = torch.ones(1, 4)
    with pytest.raises(RuntimeError, match="random"):
        race.race({"own": runner(right)}, {"output": -right.double()}, ["own"])


def test_contestants_take_turns_and_another_one_starts_each_round():
    calls, one = [], torch.ones(1, 1)
    builds = {name: runner(one, calls, name) for name in "abc"}
    race.race(builds, {"output": one.double()}, ["a"], rounds=3)
    assert "".join(calls[-9:]) == "abcbcacab"


def test_who_cannot_run_is_named_with_the_reason_and_the_others_race_on():
    def broken():
        raise NotImplementedError("no such kernel")

    one = torch.ones(1, 1)
    found = race.race({"own": runner(one), "broken": broken}, {"output": one.double()}, ["own"], rounds=2)
    assert found.failed == {"broken": "NotImplementedError: no such kernel"}
    assert list(found.seconds) == ["own"]


def test_a_slow_contestant_takes_part_in_three_rounds():
    one = torch.ones(1, 1)
    found = race.race({"own": runner(one)}, {"output": one.double()}, ["own"], rounds=9, most=0.0)
    assert len(found.seconds["own"]) == 3


def test_who_takes_many_times_as_long_as_the_fastest_takes_part_in_two_rounds():
    one = torch.ones(1, 1)
    contestant = race.Contestant(lambda: time.sleep(0.05) or one, lambda out: {"output": out}, race.Work(1, 1))
    builds = {"own": runner(one), "slow": lambda: contestant}
    found = race.race(builds, {"output": one.double()}, ["own"], rounds=5, hopeless=4)
    assert {name: len(times) for name, times in found.seconds.items()} == {"own": 5, "slow": 2}


def test_replayed_times_are_the_recorded_ones():
    clock, seconds = race.Replay(), [0.25, 3.0, 1e-4]
    clock.load(seconds)
    shown = []
    for _ in seconds:
        begin = clock()
        clock.run()
        shown.append(clock() - begin)
    assert shown == pytest.approx(seconds, rel=1e-12)


# ---- contestants ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny(Case):
    def decomposition(self):
        first = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        last = nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 10)
        return decompk.decompose(nn.Sequential(*first, *last), (3, 16, 16), (1, 2), crop_size=10)


@pytest.fixture
def doubles():
    """New tensors are in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def exactly(doubles):
    """A tiny training step in float64."""
    return job(Tiny("tiny", (1, 2), 10), 4, CPU)


TRAINERS = [name for name in who_trains(CPU, compiled=False) if side(name) != "global"]


@pytest.mark.parametrize("name", TRAINERS)
def test_every_contestant_trains_the_members_as_if_each_were_alone(exactly, name, monkeypatch):
    threads, reference = torch.get_num_threads(), members_alone(exactly)
    contestant = TRAINING[name](exactly)
    monkeypatch.setattr(decompk.Crop, "cut", None)  # crops were cut before the race
    for _ in range(2):  # gradients do not pile up
        found = race.errors(contestant.result(contestant.run()), reference)
    assert max(found.values()) < 1e-10
    assert all(value.abs().max() > 0 for value in reference.values())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("make, size", [(lambda: networks.mobilenet(2), (3, 8, 8)), (lambda: models.mlp(6, 10), (6,))])
def test_every_contestant_trains_an_ensemble_on_the_batch_that_all_share(name, make, size, doubles):
    step = ensemble(make, 3, size, 4, CPU)
    if name == "ours, fused" and len(size) == 1:
        pytest.skip("there is nothing to fuse")
    contestant, reference = TRAINING[name](step), members_alone(step)
    assert max(race.errors(contestant.result(contestant.run()), reference).values()) < 1e-10


@pytest.mark.parametrize("make, size", [(networks.ViT, (3, 32, 32)), (lambda: models.Recurrent(4, 10, 8), (5, 4))])
def test_what_torch_cannot_group_is_left_out_with_the_reason(make, size):
    step = ensemble(make, 2, size, 4, CPU)
    found = race.race(
        {name: lambda name=name: TRAINING[name](step) for name in ("members in turn", "grouped")},
        *(members_alone(step), ["members in turn"]),
        rounds=1,
    )
    assert list(found.seconds) == ["members in turn"]
    assert found.failed["grouped"].startswith("NotImplementedError: torch groups no ")


def test_everybody_has_the_same_work_but_the_global_network():
    step = job(Tiny("tiny", (1, 2), 10), 4, CPU)
    ours, whole = (TRAINING[name](step).work for name in ("ours", "global"))
    first, second = 5 * 5 * 4 * 27, 5 * 5 * 4 * 36  # multiply-accumulates of a member's convolutions
    assert ours.flops == 2 * 4 * (2 * (2 * first + 3 * second) + 2 * 3 * 40)
    assert whole.flops > ours.flops and whole.bytes > ours.bytes


@pytest.mark.parametrize("first", [True, False])
def test_every_layer_contestant_computes_the_members_convolutions(first):
    p = problem("fprop", "float32", (3, 2, 4, 8, 9, 7), (3, 3), stride=(2, 2), padding=(1, 1))
    operands = convolutions.Operands.random(Layer(p, 1, first, (9, 7)), CPU)
    reference = convolutions.reference(operands)
    assert len(reference) == (2 if first else 3)
    for name, build in convolutions.CONVOLUTIONS.items():
        contestant = build(operands)
        assert max(race.errors(contestant.result(contestant.run()), reference).values()) < 1e-5, name


# ---- the page -------------------------------------------------------------------------------------------------------


def entry(part, case, contestant, seconds, **more):
    side = contestant.partition(",")[0]
    known = {"side": side if side in ("ours", "global") else "peer", "network": "resnet50", "K": 4, "batch": 16}
    known |= {"bytes": 1e9, "flops": 4e9, "roof_percent": 50.0}
    return {"extra_info": {"part": part, "case": case, "contestant": contestant, "seconds": seconds, **known, **more}}


def result(path, device="CPU Abacus, 2 cores", date="2026-01-02", without=""):
    """Two training cases that ours wins 2.00 and loses 0.50, a layer, and a global network of four times our time."""
    machine = {"device": device, "torch": "2.13.0", "python_version": "3.11.7", "threads": 2}
    machine |= {"precision": "float32", "copy_gbps": 10.0, "matmul_gflops": 100.0}
    entries = [
        entry("training", "won", "ours", [1.0, 2.0, 1.0]),
        entry("training", "won", "ours, fused", [3.0, 3.0, 3.0]),
        entry("training", "won", "grouped", [2.0, 5.0, 1.5]),
        entry("training", "won", "vmap", [9.0, 9.0, 9.0]),
        entry("training", "won", "global", [4.0, 8.0, 4.0], bytes=3e9, flops=32e9),
        entry("training", "lost", "ours", [2.0, 2.0, 2.0]),
        entry("training", "lost", "grouped", [1.0, 1.0, 1.0]),
        entry("layers", "a layer", "ours", [0.001] * 3, layer="16→16", count=2),
        entry("layers", "a layer", "grouped", [0.003] * 3, layer="16→16", count=2),
    ]
    entries = [one for one in entries if one["extra_info"]["case"] != without]
    known = {"machine_info": machine, "commit_info": {"id": "0123456789abcdef"}, "datetime": f"{date}T03:04:05"}
    known |= {"command": "pytest bench --benchmark-only", "benchmarks": entries}
    known["left_out"] = [{"part": "training", "case": "lost", "contestant": "vmap", "why": "RuntimeError: no"}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known))
    return path


def test_ratios_are_taken_round_by_round(tmp_path):
    (run,) = page.read([result(tmp_path / "bench.json")])
    rows = {row["case"]: row for row in page.summary(run.entries).objects()}
    assert rows["won"]["ours"] == "ours" and rows["won"]["best peer"] == "grouped"
    assert rows["won"]["peer ÷ ours"] == 2.0 and rows["won"]["quartiles"] == "1.75–2.25"  # of 2, 2.5 and 1.5
    assert rows["lost"]["peer ÷ ours"] == 0.5
    assert rows["training steps: geometric mean of 2"]["peer ÷ ours"] == pytest.approx(1.0)
    layers = rows["resnet50, 1 distinct convolutions"]
    assert (layers["ms"], layers["its ms"]) == pytest.approx((2.0, 6.0)) and layers["peer ÷ ours"] == pytest.approx(3)


def test_the_global_network_stands_beside_the_papers_table_and_is_no_peer(tmp_path):
    (run,) = page.read([result(tmp_path / "bench.json")])
    (gain,) = page.gains_table(run.entries).objects()
    assert gain["global ÷ members"] == 4.0 and gain["bytes ratio"] == 3.0 and gain["FLOPs ratio"] == 8.0
    assert round(gain["paper's Table 3.4"], 2) == 2.02
    assert [c.key for c in page.peers(run.entries, "training").columns] == ["case", "grouped", "vmap"]


def test_bench_report_writes_a_page_with_pictures(tmp_path, capsys):
    result(tmp_path / "results" / "abacus" / "bench.json")
    out = tmp_path / "pages" / "README.md"
    assert main(["bench-report", str(tmp_path / "results"), "--out", str(out)]) == 0
    text = out.read_text()
    said = "`pytest bench --benchmark-only` on CPU Abacus, 2 cores, 2026-01-02, commit 0123456789ab: torch 2.13.0"
    assert said in text and "- lost, vmap: RuntimeError: no" in text
    assert "| won | 2.00 (1.75–2.25) | 9.00 (6.75–9.00) |" in text
    pictures = [f"cpu-abacus-2-cores-{what}.png" for what in ("peers", "gains", "layers")]
    assert sorted(p.name for p in out.parent.iterdir()) == sorted(["README.md", *pictures])
    for name in pictures:
        assert f"]({name})" in text and (out.parent / name).read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[0] == str(out)


def test_readme_is_rewritten_between_its_marks_alone_and_to_the_same_text_again(tmp_path):
    result(tmp_path / "bench.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n\n{page.BEGIN}\nold\n{page.END}\n\nafter\n")
    call = ["bench-report", str(tmp_path), "--out", str(tmp_path / "page" / "README.md"), "--readme", str(readme)]
    assert main(call) == 0
    text = readme.read_text()
    assert text.startswith(f"# before\n\n{page.BEGIN}\n") and text.endswith(f"{page.END}\n\nafter\n")
    assert "| won |" in text and "old" not in text and "[page/README.md](page/README.md)" in text
    assert main(call) == 0 and readme.read_text() == text


def test_two_processors_stand_side_by_side_each_with_its_newest_result(tmp_path):
    new = result(tmp_path / "abacus" / "new" / "bench.json", date="2026-03-01", without="won")
    text = new.read_text()
    new.write_text(text.replace("[2.0, 2.0, 2.0]", "[4.0, 4.0, 4.0]"))
    result(tmp_path / "abacus" / "bench.json")
    result(tmp_path / "rule" / "bench.json", device="CPU Slide rule, 1 core", without="lost")
    runs = page.read([tmp_path])
    rows = {row["case"]: row for row in page.side_by_side(runs).objects()}
    assert list(rows) == ["won", "lost", "training steps: geometric mean", "convolutions: geometric mean"]
    assert (
        rows["won"]["Abacus, 2 cores: peer ÷ ours"]
        == rows["won"]["Slide rule, 1 core: peer ÷ ours"]
        == ("2.00 (1.75–2.25)")
    )
    assert rows["lost"]["Abacus, 2 cores: ours ms"] == 4000 and rows["lost"]["Slide rule, 1 core: ours ms"] is None
    assert rows["lost"]["Abacus, 2 cores: best peer"] == "grouped"
    mean = rows["training steps: geometric mean"]
    assert mean["Abacus, 2 cores: peer ÷ ours"] == "0.71 of 2"  # of 2 and 1/4
    assert mean["Slide rule, 1 core: peer ÷ ours"] == "2.00 of 1"
    page.write_page(runs, tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text().count("| won | 2.00 (1.75–2.25) | 1,000.00 | grouped | 2.00") == 1
    page.write_page(runs[:1], tmp_path / "README.md")
    assert "All devices" not in (tmp_path / "README.md").read_text()


def test_wrong_files_end_in_one_sentence(tmp_path, capsys):
    result(tmp_path / "good.json")
    other = json.loads((tmp_path / "good.json").read_text())
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "deep.json").write_text("[" * 10**5)
    (tmp_path / "other.json").write_text(json.dumps({**other, "benchmarks": [{"extra_info": {}}]}))
    (tmp_path / "half.json").write_text(json.dumps({**other, "benchmarks": [{"extra_info": {"part": "training"}}]}))
    (tmp_path / "machine.json").write_text(json.dumps({**other, "machine_info": {}}))
    for name in ("absent.json", "text.json", "list.json", "deep.json", "other.json", "half.json", "machine.json", "."):
        out = tmp_path / "page" / "README.md"
        assert main(["bench-report", str(tmp_path / name), "--out", str(out)]) == 2, name
        said = capsys.readouterr().err
        assert said.startswith("decompk: ") and said.count("\n") == 1 and not out.exists()
    readme = tmp_path / "README.md"
    readme.write_text("no marks\n")
    assert (
        main(["bench-report", str(tmp_path / "good.json"), "--out", str(tmp_path / "p.md"), "--readme", str(readme)])
        == 2
    )
    assert "bench:begin" in capsys.readouterr().err and readme.read_text() == "no marks\n"


# ---- the whole of it ------------------------------------------------------------------------------------------------


def test_a_case_of_the_bench_runs_through_pytest_and_says_what_it_measured(tmp_path):
    file = tmp_path / "result.json"
    sides = ("ours", "ours, fused", "members in turn, channels_last", "grouped, channels_last", "global")
    cases = [f"bench/test_sweeps.py::test_sweep[resnet8 K=4@16, 16 images-{side}]" for side in sides]
    command = [sys.executable, "-m", "pytest", *cases, "--benchmark-only", "-q"]
    command += [f"--benchmark-json={file}", "-p", "no:cacheprovider"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "decompk beside its peers" in done.stdout and "geometric mean of 1" in done.stdout
    known = json.loads(file.read_text())
    assert "node" not in known["machine_info"] and known["machine_info"]["torch"] == torch.__version__
    assert {b["extra_info"]["side"] for b in known["benchmarks"]} == {"ours", "peer", "global"}
    for benchmark in known["benchmarks"]:
        info = benchmark["extra_info"]
        assert info["bytes"] > 0 and info["flops"] > 0 and info["roof_percent"] > 0 and info["K"] == 4
        assert benchmark["stats"]["median"] == pytest.approx(statistics.median(info["seconds"]), rel=1e-5)
        assert benchmark["stats"]["rounds"] == len(info["seconds"]) >= 2
    (run,) = page.read([file])
    assert page.gains(run.entries)
