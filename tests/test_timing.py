"""What measures, without a GPU: the lists, the gate, the timers, the tuner, with a timer of paper."""
# ruff: noqa: E402 (the tools stand beside the package)

import contextlib
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import asked_by_operators
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools")]

import journal
import timing
import train_speed
import tune
from compiling import Compiler
from desk import Tiny
from layers import CASES, Layer, fitting_batch, layers, norms, problem
from steps import Captured, Training

import decompk
from decompk.kernels import conv, tables
from decompk.kernels import device as devices
from decompk.kernels.choose import candidates
from decompk.kernels.conv.form import Choice
from decompk.kernels.device import interpreted
from decompk.kernels.problem import PASSES, Config, key_of
from decompk.kernels.timer import in_turns

CPU = torch.device("cpu")
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="runs kernels on the CPU")


TINY = Tiny("resnet32", (1, 2), 4)


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
@pytest.mark.parametrize("layout", ["member", "channel-grouped", "strided", "crops"])
def test_a_trial_knows_what_the_operator_asks_dispatch_for(dtype, layout, monkeypatch):
    asked = asked_by_operators(monkeypatch)
    for kernel, padding in (((1, 1), (0, 0)), ((3, 3), (1, 1))):
        for kind in PASSES if layout != "crops" else ("fprop", "wgrad"):
            one = problem(kind, dtype, (2, 3, 4, 8, 5, 6), kernel, layout, padding=padding)
            trial = timing.Trial(one, CPU)
            trial.by_op()
            runs = replace(trial.asked, dtype="float32") if dtype == "tf32" else trial.asked  # on a CPU
            assert asked.pop()[0] == runs and trial.asked == timing.Trial(one, "meta").asked
            assert trial.asked == one or kernel == (1, 1)


def test_a_batch_is_halved_until_it_fits():
    assert fitting_batch(TINY, math.inf) == 128
    assert fitting_batch(TINY, 1e5) < 32


# ---- measuring ------------------------------------------------------------------------------------------------------


def test_the_gate_lets_pass_what_is_as_exact_as_torch_and_no_nan():
    reference = torch.tensor([1.0, -2.0], dtype=torch.float64)
    gate = timing.Gate(reference, reference + 1e-3)
    assert gate(reference - 1.9e-3)[1] is None
    assert "norm" in gate(reference + 3e-3)[1]
    assert gate(torch.tensor([1.0, math.nan]))[0] == math.inf
    assert "instead of" in gate(reference[:1])[1]


def test_turns_end_with_their_rounds_or_seconds_or_with_one_who_is_left():
    calls = []

    def sample(name, value):
        calls.append(name)
        return value

    contestants = {name: partial(sample, name, value) for name, value in dict(a=1.0, b=1.4, c=2.0).items()}
    assert in_turns(contestants, {"a": 1, "b": 2, "c": 3}) == {"a": [1.0], "b": [1.4, 1.4], "c": [2.0, 2.0, 2.0]}
    assert "".join(calls) == "abc" + "bc" + "c"
    calls.clear()
    assert list(map(len, in_turns(contestants, least=2, seconds=0.0, warm=True).values())) == [2, 2, 2]
    assert "".join(calls) == "abc" + "abc" + "bca"
    assert in_turns(contestants, 3, hopeless=1.5) == {"a": [1.0] * 3, "b": [1.4] * 3, "c": [2.0]}
    assert in_turns(contestants, 3, hopeless=1.2) == {"a": [1.0], "b": [1.4], "c": [2.0]}
    assert in_turns({}, 3) == {}


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
    assert timing.Timing.of([3e-3, 1e-3, 2e-3]).ms == 2.0


@pytest.mark.parametrize("layout", ["member", "crops"])
@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
def test_the_rivals_compute_what_ours_computes(kind, layout):
    if (kind, layout) == ("dgrad", "crops"):
        return
    one = problem(kind, "float32", (2, 3, 4, 6, 7, 5), (3, 3), layout, stride=(2, 2), padding=(1, 1))
    trial = timing.Trial(one, CPU)
    gate = trial.gate()
    results = {name: view(call()) for name, (call, view) in timing.rivals(trial).items()}
    by_torch = [form for form in conv.FORMS if form.backend == "torch" and not form.why_not(one, None, devices.of(CPU))]
    results |= {form.name: trial.by_choice(Choice(form, None, 0.0, "")) for form in by_torch}
    for name, result in {**results, "op": trial.by_op()}.items():
        assert gate(result)[1] is None, name


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
    step = Captured(Training([(net, lambda: torch.ones(2, 1, 2, 2))], torch.zeros(2, dtype=torch.long), 1))
    losses = [float(step()), float(step())]
    assert (len(replayed), losses[0]) == (2, losses[1])


@needs_interpreter
def test_the_tuner_keeps_the_fastest_that_is_right_and_does_not_try_twice(tmp_path, monkeypatch):
    one = problem("dgrad", "float32", (2, 2, 4, 4, 5, 5), (3, 3), padding=(1, 1))
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    variations = tune.variations
    forms = ("loop", "pointer", "tile")
    monkeypatch.setattr(tune, "candidates", lambda *a: [c for c in candidates(*a) if c.form.name in forms])
    monkeypatch.setattr(tune, "variations", lambda config: variations(config)[:2])
    here, wanted = devices.of(CPU), {one: Layer(one.of("fprop"), 1, False, (5, 5))}
    log = journal.Journal(tmp_path / "log" / "tune.jsonl", tune.KEYS)

    def timer(contestants):
        return {
            name: timing.Timing(1.0 if "pointer" in name else 2.0, 0.9, 3.0, 5) for name in paper_timer(contestants)
        }

    def tuner():
        table = tune.Table(tables.table_path(here), here)
        return tune.Tuner(CPU, timer, log, table, Compiler(0), lambda: 99.0)

    tuner().run(wanted)
    known = json.loads(tables.table_path(here).read_text())
    assert {"device", "versions", "command", "date", "entries"} == known.keys()
    entry = known["entries"][key_of(one)]
    assert (entry["form"], entry["refined"], entry["ms"]) == ("pointer", True, 1.0)
    assert not [r for r in log.records if "error" in r]
    count = len(log.records)
    tuner().run(wanted)
    assert len(log.records) == count
    tables.table.cache_clear()
    choice = tables.lookup(one, here)
    assert choice.config.form == "pointer" and choice.ms == 1.0
    tables.table.cache_clear()


def test_a_tuned_entry_is_found_again_and_an_illegal_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    here = devices.KNOWN[100]
    one = problem("fprop", "bfloat16", (4, 128, 16, 16, 9, 9), (3, 3), padding=(1, 1))
    good = Config("tile", (2, 8, 8), 16, 16, warps=8, stages=2)
    table = tune.Table(tables.table_path(here), here)
    table.keep(key_of(one), Choice(conv.named("tile"), good, 0.5, "timed"), refined=True)
    table.keep(key_of(one.of("dgrad")), Choice(conv.named("loop"), None, 0.5, "timed"), refined=False)
    bad = replace(good, tile=(3, 8, 8))
    table.keep(key_of(one.of("wgrad")), Choice(conv.named("tile"), bad, 0.5, "timed"), refined=False)
    tables.table.cache_clear()
    assert tables.lookup(one, here).config == good
    assert tables.lookup(one.of("dgrad"), here).form.name == "loop"
    assert tables.lookup(one.of("wgrad"), here) is None
    assert tables.lookup(replace(one, N=64), here) is None
    tables.table.cache_clear()


def test_variations_differ_in_warps_stages_and_splits_alone():
    config = Config("tile", (2, 8, 8), 16, 16, warps=4, stages=3, splits=8)
    found = tune.variations(config)
    assert config not in found and len(set(found)) == len(found) == 11
    assert all(replace(one, warps=4, stages=3, splits=8, atomic=False) == config for one in found)


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
            "wrong": {"loss": lambda logits, y: -decompk.losses.cross_entropy(logits.view(-1, *logits.shape[-2:]), y)},
            "graph": {"graph": True},
        },
    )
    monkeypatch.setattr(train_speed, "ROUNDS", 1)
    whole = train_speed.measure
    monkeypatch.setattr(train_speed, "measure", lambda *given: whole(*given[:4], 0.0, train_speed.HOWS))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_speed.main(["--out", str(tmp_path / "train.jsonl")]) == 1
    lines = journal.read(tmp_path / "train.jsonl")
    records = {(r["network"], r["how"]): r for r in lines if "how" in r}
    for network in ("members", "global"):
        assert records[network, "eager"]["images_per_s"] > 0
        assert "loss is off" in records[network, "wrong"]["wrong"]
        assert "not on a GPU" in records[network, "graph"]["error"]
    assert "×" in (tmp_path / "train.md").read_text()
