"""The GPU suite without a GPU: its lists, its arithmetic, and every stage once on CPU tensors with a timer of paper."""
# ruff: noqa: E402 (the tools stand beside the package)

import contextlib
import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools")]

import gpu_suite
import timing
import train_speed
import tune
from layers import CASES, Captured, Case, Layer, fitting_batch, layers, norms, problem, training_step

import decompk
from decompk import device as devices
from decompk import dispatch
from decompk.config import PASSES, Config
from decompk.device import interpreted

CPU = torch.device("cpu")
DIRECTIONS = ("forward", "backward")
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="runs kernels on the CPU")


@dataclass(frozen=True)
class Tiny(Case):
    """A network of one convolution."""

    def decomposition(self):
        parts = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return decompk.decompose(nn.Sequential(*parts, nn.Linear(8, 10)), (3, 32, 32), (1, 2), crop_size=self.crop)


TINY = Tiny("resnet32", (1, 2), 8)


def paper_timer(contestants, cold=True, seconds=0.05, runs=50):
    """Runs everyone and finds that it takes a millisecond."""
    for call in contestants.values():
        call()
    return {name: timing.Timing(1.0, 0.9, 1.1, 2) for name in contestants}


# ---- lists ----------------------------------------------------------------------------------------------------------


def test_the_layers_are_those_of_the_members():
    found = {layer.name: layer for layer in layers(CASES[1])}
    assert CASES[1].title == "resnet50 K=16@70"
    assert found["4→4 3×3/1 @18×18"].count == 2
    assert found["3→4 7×7/2 @70×70"].first
    assert found["128→32 1×1/1 @3×3"].problem.aligned
    assert not found["4→4 1×1/1 @18×18"].problem.aligned
    assert sum(layer.count for layer in found.values() if layer.problem.layout == "member") == 53
    assert found["3→4 7×7/2 @70×70 of crops"].image == (224, 224)
    assert sum(norm.count for norm in norms(CASES[1])) == 53
    kinds = [one.kind for one in found["3→4 7×7/2 @70×70"].passes()]
    assert kinds == ["fprop", "wgrad"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "tf32"])
@pytest.mark.parametrize("layout", ["member", "grouped", "strided", "crops"])
def test_a_trial_knows_what_the_operator_asks_dispatch_for(dtype, layout, monkeypatch):
    asked, choose = [], dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda one, device: asked.append(one) or choose(one, device))
    for kernel, padding in (((1, 1), (0, 0)), ((3, 3), (1, 1))):
        for kind in PASSES if layout != "crops" else ("fprop", "wgrad"):
            one = problem(kind, dtype, (2, 3, 4, 8, 5, 6), kernel, layout, padding=padding)
            trial = timing.Trial(one, CPU)
            trial.by_op()
            assert asked.pop() == trial.asked == timing.Trial(one, "meta").asked
            assert trial.asked == one or kernel == (1, 1)


def test_a_batch_is_halved_until_it_fits():
    assert fitting_batch(TINY, math.inf) == 128
    assert fitting_batch(TINY, 1e6) < 32


# ---- measuring ------------------------------------------------------------------------------------------------------


def test_the_gate_lets_pass_what_is_as_exact_as_torch_and_no_nan():
    reference = torch.tensor([1.0, -2.0], dtype=torch.float64)
    gate = timing.Gate(reference, reference + 1e-3)
    assert gate(reference - 1.9e-3)[1] is None
    assert "norm" in gate(reference + 3e-3)[1]
    assert gate(torch.tensor([1.0, math.nan]))[0] == math.inf
    assert "instead of" in gate(reference[:1])[1]


def test_the_timer_takes_contestants_in_turn(monkeypatch):
    clock = iter(range(10_000))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, other):
            return float(other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=2**10))
    timer = timing.Timer(CPU)
    timer.other = timer.other[:8]
    calls = []
    found = timer({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=5)
    assert found["a"] == timing.Timing(1.0, 1.0, 1.0, 5)
    assert "".join(calls) == "aabb" + "abbaabbaab"
    assert timing.Timing.of([3.0, 1.0, 2.0]).ms == 2.0


def test_the_journal_remembers_what_broke(tmp_path):
    path = tmp_path / "journal.json"
    journal = timing.Journal(path, ("case", "impl"), {"device": "paper"})
    journal.add(case="a", impl="x", ms=1.0)
    journal.begin(case="a", impl="y")
    again = timing.Journal(path, ("case", "impl"))
    assert again.has(case="a", impl="x") and again.has(case="a", impl="y") and not again.has(case="b", impl="x")
    assert "broke" in again.records[1]["error"]
    again.add(case="b", impl="x", rel_error=math.inf)
    again.end(complete=True)
    known = json.loads(path.read_text())
    assert (len(known["records"]), known["begun"]) == (3, None)
    assert known["head"] == {"device": "paper", "complete": True}


@pytest.mark.parametrize("layout", ["member", "crops"])
@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
def test_the_rivals_compute_what_ours_computes(kind, layout):
    if (kind, layout) == ("dgrad", "crops"):
        return
    one = problem(kind, "float32", (2, 3, 4, 6, 7, 5), (3, 3), layout, stride=(2, 2), padding=(1, 1))
    trial = timing.Trial(one, CPU)
    gate = trial.gate()
    results = {name: view(call()) for name, (call, view) in timing.rivals(trial).items()}
    results |= {form: trial.by_library(form) for form in dispatch.library_forms(one)}
    for name, result in {**results, "op": trial.by_op()}.items():
        assert gate(result)[1] is None, name


# ---- stages on paper ------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_in_a_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "gpu_suite needs an NVIDIA GPU, and torch sees none.\n"
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "tune needs an NVIDIA GPU, and torch sees none.\n"


@pytest.fixture
def benched(tmp_path):
    gpu_suite.build(tmp_path, CPU, paper_timer, copied=2**12, side=16)
    environment = json.loads((tmp_path / "environment.json").read_text())
    journal = timing.Journal(tmp_path / "bench.json", gpu_suite.KEYS, environment)
    return gpu_suite.Bench(
        CPU, paper_timer, journal, environment["roofs"], timing.Compiler(CPU), lambda: 99.0, dtype="float32", batch=2
    )


@needs_interpreter
def test_a_bench_has_a_record_of_every_contestant_and_none_twice(benched, tmp_path):
    assert benched.run((TINY,))
    records = benched.journal.records
    assert not [r for r in records if "error" in r]
    names = {(r["part"], r["pass"]): set() for r in records}
    for r in records:
        names[r["part"], r["pass"]].add(r["impl"])
    rivals = {"cudnn_grouped", "cudnn_grouped_copied", "cudnn_loop", "cudnn_dense"}
    assert names["layers", "fprop"] >= rivals | {"ours", "triton_pointer"}
    assert names["layers", "wgrad"] >= rivals | {"ours", "triton_pointer"}
    assert names["norms", "backward"] == {"ours", "native_grouped", "native_loop"}
    eager = {"packed", "packed_fused", "cudnn_groups", "members_in_turn"}
    assert names["steps", "step"] == {f"{name}, eager" for name in eager}
    assert all(r["roof_percent"] > 0 and r["rel_error"] < 1e-3 for r in records if r["part"] != "steps")
    count = len(records)
    assert replace(benched, only="layers").run((TINY,))
    assert len(records) == count
    assert not replace(benched, journal=timing.Journal(tmp_path / "new.json", gpu_suite.KEYS), left=lambda: 1.0).run(
        (TINY,)
    )
    text = gpu_suite.summary(json.loads((tmp_path / "bench.json").read_text()))
    assert "| not measured |" in text and "resnet32 K=2@8" in text


@needs_interpreter
def test_a_failure_is_a_record_and_a_wrong_result_is_not_timed(benched, monkeypatch):
    monkeypatch.setattr(timing.Trial, "by_kernel", lambda self, config: self.out.fill_(1))
    monkeypatch.setattr(gpu_suite, "rivals", lambda trial: {"cudnn_loop": (lambda: 1 / 0, torch.stack)})
    replace(benched, only="layers").run((TINY,))
    wrong = {r["impl"] for r in benched.journal.records if r.get("wrong")}
    assert wrong == {"triton_pointer"} | {r["impl"] for r in benched.journal.records if "triton" in r["impl"]}
    failed = next(r for r in benched.journal.records if r["impl"] == "cudnn_loop")
    assert failed["error"] == "ZeroDivisionError: division by zero"
    assert {r["impl"] for r in benched.journal.records if "ms" in r} == {"ours"}


@needs_interpreter
def test_stages_run_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "CASES", ())
    monkeypatch.setattr(gpu_suite, "roofs", lambda device, timer: [("copy_gbps", 1.0)])
    for stage in ("build", "bench"):
        gpu_suite.alone(stage, tmp_path, lambda: 99.0, "", CPU, paper_timer)
    assert json.loads((tmp_path / "bench.json").read_text())["head"]["complete"]
    monkeypatch.setattr(tune, "CASES", (TINY,))
    files = ["--out", str(tmp_path / "table.json"), "--log", str(tmp_path / "tune.json")]
    tune.run(tune.parsed([*files, "--again", "--minutes", "0"]), CPU, paper_timer)
    assert not (tmp_path / "table.json").exists()


def test_a_captured_step_is_replayed(monkeypatch):
    replayed = []
    graph = SimpleNamespace(replay=lambda: replayed.append(1))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda stream: contextlib.nullcontext(),
        CUDAGraph=lambda: graph,
        graph=lambda graph: contextlib.nullcontext(),
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    step = Captured(training_step([(net, lambda: torch.ones(2, 1, 2, 2))], torch.zeros(2, dtype=torch.long), 1))
    losses = [float(step()), float(step())]
    assert (len(replayed), losses[0]) == (2, losses[1])


@needs_interpreter
def test_the_tuner_keeps_the_fastest_that_is_right_and_does_not_try_twice(tmp_path, monkeypatch):
    one = problem("dgrad", "float32", (2, 2, 4, 4, 5, 5), (3, 3), padding=(1, 1))
    monkeypatch.setattr(dispatch, "TABLES", tmp_path)
    candidates, variations = dispatch.candidates, tune.variations
    forms = ("loop", "pointer", "tile")
    monkeypatch.setattr(dispatch, "candidates", lambda *a: [c for c in candidates(*a) if c.form in forms])
    monkeypatch.setattr(tune, "variations", lambda config: variations(config)[:2])
    here, wanted = devices.of(CPU), {one: Layer(one.of("fprop"), 1, False, (5, 5))}
    journal = timing.Journal(tmp_path / "log" / "tune.json", tune.KEYS)

    def timer(contestants):
        return {
            name: timing.Timing(1.0 if "pointer" in name else 2.0, 0.9, 3.0, 5) for name in paper_timer(contestants)
        }

    def tuner():
        table = tune.Table(dispatch.table_path(here), here)
        return tune.Tuner(CPU, timer, journal, table, timing.Compiler(CPU), lambda: 99.0)

    tuner().run(wanted)
    known = json.loads(dispatch.table_path(here).read_text())
    assert {"device", "versions", "command", "date", "entries"} == known.keys()
    entry = known["entries"][dispatch.key_of(one)]
    assert (entry["form"], entry["refined"], entry["ms"]) == ("pointer", True, 1.0)
    assert not [r for r in journal.records if "error" in r]
    count = len(journal.records)
    tuner().run(wanted)
    assert len(journal.records) == count
    dispatch.table.cache_clear()
    choice = dispatch.lookup(one, here)
    assert choice.config.form == "pointer" and choice.ms == 1.0
    dispatch.table.cache_clear()


def test_a_tuned_entry_is_found_again_and_an_illegal_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "TABLES", tmp_path)
    here = devices.KNOWN[100]
    one = problem("fprop", "bfloat16", (4, 128, 16, 16, 9, 9), (3, 3), padding=(1, 1))
    good = Config("tile", (2, 8, 8), 16, 16, warps=8, stages=2)
    table = tune.Table(dispatch.table_path(here), here)
    table.keep(dispatch.key_of(one), dispatch.Choice("triton", "tile", good, 0.5, "timed"), refined=True)
    table.keep(dispatch.key_of(one.of("dgrad")), dispatch.Choice("torch", "loop", None, 0.5, "timed"), refined=False)
    bad = replace(good, tile=(3, 8, 8))
    table.keep(dispatch.key_of(one.of("wgrad")), dispatch.Choice("triton", "tile", bad, 0.5, "timed"), refined=False)
    dispatch.table.cache_clear()
    assert dispatch.lookup(one, here).config == good
    assert dispatch.lookup(one.of("dgrad"), here).form == "loop"
    assert dispatch.lookup(one.of("wgrad"), here) is None
    assert dispatch.lookup(replace(one, N=64), here) is None
    dispatch.table.cache_clear()


def test_variations_differ_in_warps_stages_and_splits_alone():
    config = Config("tile", (2, 8, 8), 16, 16, warps=4, stages=3, splits=8)
    found = tune.variations(config)
    assert config not in found and len(set(found)) == len(found) == 11
    assert all(replace(one, warps=4, stages=3, splits=8, atomic=False) == config for one in found)


# ---- the table ------------------------------------------------------------------------------------------------------


def record(case, kind, impl, ms, moved=1e6, percent=50.0, bound="memory"):
    quantiles = dict(ms_p20=0.95 * ms, ms_p80=1.05 * ms, bytes=moved, roof_percent=percent, bound=bound)
    return {"part": "layers", "net": "n", "case": case, "pass": kind, "impl": impl, "ms": ms, **quantiles}


def made_up(**head):
    times = {  # ours, grouped, loop
        ("a", "fprop"): (1.0, 4.0, 8.0),
        ("a", "dgrad"): (1.0, 3.0, 2.0),
        ("a", "wgrad"): (2.0, 9.0, 1.0),
        ("b", "fprop"): (2.0, 2.0, 4.0),
        ("b", "wgrad"): (1.0, 1.02, 4.0),
    }
    records = [
        record(*where, impl, ms, moved=1e8 if where[0] == "a" else 1e6, percent=80.0 if impl == "ours" else 10.0)
        for where, each in times.items()
        for impl, ms in zip(("ours", "cudnn_grouped", "cudnn_loop"), each, strict=True)
    ]
    return {"head": {"device": "paper", "roofs": {"copy_gbps": 1.0}, **head}, "records": records}


def test_speedups_are_geometric_means_over_layers():
    records = made_up()["records"]
    assert gpu_suite.speedups(records, "cudnn_grouped", "forward") == [4.0, 1.0]
    assert gpu_suite.speedups(records, "cudnn_grouped", "backward") == [4.0, 1.02]
    assert gpu_suite.speedups(records, "cudnn_loop", "backward", "n") == [1.0, 4.0]
    assert gpu_suite.speedups(records, "cudnn_loop", "forward", "another") == []
    assert gpu_suite.geometric_mean([4.0, 1.0]) == pytest.approx(2.0)
    assert math.isnan(gpu_suite.geometric_mean([]))


def test_the_targets_are_held_against_the_records():
    bench = made_up(complete=True)
    behind = gpu_suite.slower(bench["records"])
    assert [(o["case"], o["pass"], b["impl"]) for o, b in behind] == [("a", "wgrad", "cudnn_loop")]
    slowest, roof, speed = gpu_suite.targets(bench)
    assert (slowest.measured, slowest.verdict) == ("1 of 5 slower", "NOT MET")
    assert (roof.measured, roof.verdict) == ("3 of 3, least 80 %", "met")
    assert (speed.measured, speed.verdict) == ("forward 2.00×, backward 2.02×", "met")
    broken = record("c", "fprop", "ours", 1.0)
    del broken["ms"]
    bench["records"] += [{**broken, "error": "wrong"}, record("a", "fprop", "ours", 1.0, 1e9, 69.0)]
    bench["head"]["complete"] = False
    slowest, roof, _ = gpu_suite.targets(bench)
    assert slowest.measured == "1 of 6 slower, 1 not timed (unfinished)"
    assert (roof.measured, roof.met) == ("3 of 4, least 69 % (unfinished)", False)
    assert {target.met for target in gpu_suite.targets({"head": {}, "records": []})} == {None}
    text = gpu_suite.summary(bench)
    assert "| n | 2.00 | 2.02 |" in text and "| n | a | wgrad | 2.0000 | 1.0000 | cudnn_loop |  |" in text
    assert "| n | c | fprop | ours | wrong |" in text


# ---- processes ------------------------------------------------------------------------------------------------------


def test_a_stage_that_breaks_is_started_again_behind_that_place(tmp_path, monkeypatch):
    journal = tmp_path / "journal.json"
    body = "import sys, os, pathlib; p = pathlib.Path(sys.argv[1]); n = len(p.read_text()) if p.exists() else 0; "
    crash = body + "p.write_text('x' * (n + 1)); os._exit(3 if n < 2 else 0)"

    def supervise(code, seconds=60.0):
        journal.unlink(missing_ok=True)
        return gpu_suite.supervise(lambda: [sys.executable, "-c", code, str(journal)], journal, lambda: seconds)

    assert supervise(crash)
    assert journal.read_text() == "xxx"
    assert not supervise("raise SystemExit(3)")
    monkeypatch.setattr(gpu_suite, "QUIET", 0.3)
    assert not supervise("import time; time.sleep(60)")


def test_outcomes_are_read_from_pytest_and_its_workers(tmp_path):
    lines = [
        "tests/test_gpu.py::test_a[x-1] PASSED   [ 10%]",
        "[gw3] [ 20%] FAILED tests/test_gpu.py::test_b[y] ",
        "FAILED tests/test_gpu.py::test_b[y] - AssertionError: PASSED",
        "ERROR tests/test_c.py - ImportError",
        "tests/test_gpu.py::test_d SKIPPED",
    ]
    journal = timing.Journal(tmp_path / "tests.json", ("case",))
    command = [sys.executable, "-c", f"print({chr(10).join(lines)!r}); raise SystemExit(1)"]
    with open(tmp_path / "log", "w") as log:
        assert gpu_suite.pytest(command, journal, log, lambda: 60.0) == 1
    outcomes = {r["case"].rpartition("/")[2]: r["outcome"] for r in journal.records}
    assert outcomes == {
        "test_gpu.py::test_a[x-1]": "PASSED",
        "test_gpu.py::test_b[y]": "FAILED",
        "test_c.py": "ERROR",
    }
    assert "SKIPPED" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("code", "clean", "outcome"), [(0, True, "PASSED"), (86, False, "FAILED"), (1, True, "could not run")]
)
def test_the_sanitizers_verdict_is_its_exit_code(tmp_path, monkeypatch, code, clean, outcome):
    binary = tmp_path / "compute-sanitizer"
    binary.write_text(f"#!/bin/sh\necho '========= ERROR SUMMARY: 1 error'\nexit {code}\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    journal = timing.Journal(tmp_path / "tests.json", ("case",))
    with open(tmp_path / "log", "w") as log:
        assert gpu_suite.sanitize("memcheck", journal, log, lambda: 100.0) is clean
    assert journal.records == [{"case": "memcheck", "outcome": outcome, "said": ["ERROR SUMMARY: 1 error"]}]


def test_a_child_process_finds_the_package_and_compiles_its_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = gpu_suite.environment()
    assert "TRITON_INTERPRET" not in found
    assert found["PYTHONPATH"].startswith(f"{ROOT}:{ROOT / 'tools'}")


def test_stages_end_in_files_and_an_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ran = []

    def supervise(command, journal, left):
        ran.append(command())
        if journal.name == "bench.json":
            journal.write_text(json.dumps(made_up()))
        return True

    monkeypatch.setattr(gpu_suite, "supervise", supervise)
    monkeypatch.setattr(gpu_suite, "test", lambda out, left: True)
    monkeypatch.setattr(gpu_suite, "race", lambda out, left, only: True)
    monkeypatch.setattr(dispatch, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(devices, "of", lambda device: devices.KNOWN[90])
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "h100.json").write_text("{}")
    out = tmp_path / "out"
    assert gpu_suite.main(["--out", str(out), "--minutes", "10"]) == 0
    names = [Path(command[1]).name for command in ran]
    assert names == ["gpu_suite.py", "gpu_suite.py", "gpu_suite.py", "train_speed.py", "tune.py"]
    assert {path.name for path in out.iterdir()} == {"bench.json", "bench.md", "h100.json"}
    monkeypatch.setattr(gpu_suite, "test", lambda out, left: False)
    assert gpu_suite.main(["--out", str(out), "--stage", "test", "--minutes", "10"]) == 1
    assert gpu_suite.main(["--out", str(out), "--minutes", "0.1"]) == 0


def test_the_races_are_those_of_the_bench_and_what_is_done_stays_when_time_is_up(tmp_path, monkeypatch, capsys):
    files = {path.name for path in (gpu_suite.ROOT / "bench").glob("test_*")}
    assert {f"test_{name}.py" for name in gpu_suite.RACES} == files
    ran = []

    def run(command, timeout, **_):
        ran.append(Path(command[3]).stem)
        if len(ran) == 3:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, {1: 0, 2: gpu_suite.NOTHING_CHOSEN}.get(len(ran), 1))

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_suite.race(tmp_path, lambda: 9.0, "")
    assert ran == ["test_training", "test_recurrent", "test_layers"] and "stopped for time" in capsys.readouterr().out
    assert not gpu_suite.race(tmp_path, lambda: 9.0, "")  # a wrong result: pytest's exit code is 1
    monkeypatch.setattr(gpu_suite.importlib.util, "find_spec", lambda name: None)
    assert not gpu_suite.race(tmp_path, lambda: 9.0, "") and "decompk[bench]" in capsys.readouterr().out


def test_a_layer_knows_its_passes():
    one = problem("fprop", "bfloat16", (4, 2, 4, 4, 6, 6), (3, 3))
    assert Layer(one, 1, False, (6, 6)).passes() == [one.of(kind) for kind in PASSES]


def test_the_speed_of_training_is_measured_of_right_results_only(tmp_path, monkeypatch):
    case = train_speed.Case("tiny", "vgg8", (1, 16, 16), 4, None, batch=4)
    monkeypatch.setattr(train_speed, "CPU", (case,))
    monkeypatch.setattr(
        train_speed,
        "HOWS",
        {
            "eager": {},
            "wrong": {"loss": lambda *given: -decompk.losses.cross_entropy(*given)},
            "graph": {"graph": True},
        },
    )
    monkeypatch.setattr(train_speed, "ROUNDS", 1)
    whole = train_speed.measure
    monkeypatch.setattr(train_speed, "measure", lambda *given: whole(*given[:4], 0.0, train_speed.HOWS))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_speed.main(["--out", str(tmp_path / "train.json")]) == 1
    records = {(r["network"], r["how"]): r for r in json.loads((tmp_path / "train.json").read_text())["records"]}
    for network in ("members", "global"):
        assert records[network, "eager"]["images_per_s"] > 0
        assert "loss is off" in records[network, "wrong"]["wrong"]
        assert "not on a GPU" in records[network, "graph"]["error"]
    assert "×" in (tmp_path / "train.md").read_text()
