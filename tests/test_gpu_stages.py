"""The stages of the GPU suite in miniature, on a CPU."""
# ruff: noqa: E402 (the tools stand beside the package)

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools")]

import layer_bench
import machine
import step_bench
import steps
import timing
from checks import Checks
from compiling import Compiler, launches_of
from desk import KEYS, Desk, in_miniature
from journal import Journal
from layers import problem

from decompk.kernels.device import interpreted

CPU = torch.device("cpu")
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="runs kernels on the CPU")


@pytest.fixture
def desk(tmp_path):
    """A desk of a rehearsal."""
    plan = replace(in_miniature(), few=2)
    return Desk(plan, Journal(tmp_path / "records.jsonl", KEYS, "layers"), time.time() + 99, Compiler(0), tmp_path)


@needs_interpreter
def test_the_machine_is_described_before_it_is_measured(desk):
    machine.machine(desk)
    records = {r["case"]: r for r in desk.journal.records}
    assert list(records)[:2] == ["versions", "info"]
    assert records["versions"]["torch"] == torch.__version__ and "launch_ms" in records["versions"]["assumed"]
    assert records["copy_gbps"]["value"] > 0 and "missing" in records["graph_node_ms"]
    assert machine.known_roofs(desk)["copy_gbps"] == records["copy_gbps"]["value"]


@needs_interpreter
def test_every_contestant_of_a_layer_has_a_record_and_none_twice(desk):
    bench = layer_bench.Bench(desk, desk.plan.timer(), machine.known_roofs(desk))
    with desk.plan.backend():
        bench.run(desk.plan.layers)
        count = len(desk.journal.records)
        bench.run(desk.plan.layers)
    records = desk.journal.records
    assert len(records) == count and not [r for r in records if "error" in r or "fault" in r]
    impls = {r["impl"] for r in records if r["part"] == "layers" and r["pass"] == "fprop"}
    assert impls >= {"cudnn_grouped", "cudnn_grouped_copied", "cudnn_loop", "cudnn_dense", "ours", "timing"}
    assert impls >= {"ours, moments in the epilogue", "ours, moments behind", "cudnn_grouped, moments behind"}
    assert all(r["roof_percent"] > 0 and r["rel_error"] < 1e-3 for r in records if "ms" in r)
    assert {r["impl"] for r in records if r["part"] == "norms"} == {"ours", "native_grouped", "native_loop", "timing"}


@needs_interpreter
def test_what_is_wrong_is_not_timed_and_what_fails_is_a_record(desk, monkeypatch):
    monkeypatch.setattr(timing.Trial, "by_op", lambda self: self.call.empty().fill_(1))
    monkeypatch.setattr(layer_bench, "rivals", lambda trial: {"cudnn_grouped": (lambda: 1 / 0, torch.stack)})
    monkeypatch.setattr(layer_bench, "kernels", lambda problem, device: {})
    with desk.plan.backend():
        layer_bench.Bench(desk, desk.plan.timer(), machine.known_roofs(desk)).run(desk.plan.layers)
    found = [r for r in desk.journal.records if r["part"] == "layers"]
    assert "wrong" in next(r for r in found if r["impl"] == "ours")["fault"]
    failed = next(r for r in found if r["impl"] == "cudnn_grouped")
    assert failed["error"] == "ZeroDivisionError: division by zero" and "Traceback" in failed["trace"]
    assert not any("ms" in r for r in found if r["impl"] in ("ours", "cudnn_grouped"))


@needs_interpreter
def test_everybody_trains_and_who_has_another_loss_is_not_timed(desk, monkeypatch):
    order = [
        ("grouped", "eager"),
        ("members in turn", "eager"),
        ("global", "eager"),
        ("vmap", "eager"),
        ("wrong", "eager"),
    ]
    monkeypatch.setattr(step_bench, "ORDER", [("members on streams", "graph"), *order])

    def wrong(field):
        jobs = steps.grouped(field)
        for parameter in jobs[0][0].parameters():
            parameter.data.add_(0.5)
        return jobs

    monkeypatch.setitem(step_bench.WAYS, "wrong", wrong)
    step_bench.run(desk)
    found = {r["impl"]: r for r in desk.journal.records if r["pass"] == "step"}
    for way, mode in order[:-1]:
        assert found[f"{way}, {mode}"]["ms"] > 0 and found[f"{way}, {mode}"]["host_ms"] > 0, way
    assert "off the members' own" in found["wrong, eager"]["fault"] and "ms" not in found["wrong, eager"]
    assert "no CUDA graphs" in found["members on streams, graph"]["missing"]


def test_launches_are_told_apart_and_the_longest_come_first():
    found = steps.tally([("conv", 3.0), ("Memcpy DtoD", 1.0), ("conv", 5.0), ("Memset", 1.0), ("norm", 9.0)])
    assert (found["kernels"], found["copies"], found["fills"], found["launches"]) == (3, 1, 1, 5)
    assert found["top"][:2] == [("norm", 1, 0.009), ("conv", 2, 0.008)] and found["busy_ms"] == pytest.approx(0.019)


@needs_interpreter
def test_checks_find_what_is_wrong_and_each_has_a_name_of_its_own(monkeypatch):
    plan = in_miniature()
    found = plan.checks()
    firsts = found.firsts()
    kinds = {"fprop", "dgrad", "wgrad", "fused", "moments", "sums", "batch norm", "block", "operator"}
    assert {check.kind for check in firsts} == kinds
    names = [(check.kind, check.name) for check in found.every()]
    assert len(set(names)) == len(names) > 500
    with plan.backend():
        chosen = [check for check in firsts if check.kind in ("wgrad", "operator", "batch norm")][::3]
        assert [check.run() for check in chosen] == [None] * len(chosen)
        monkeypatch.setattr(timing.Trial, "by_config", lambda self, config: self.call.empty())
        assert "wrong: norm inf" in next(check for check in firsts if check.kind == "fprop").run()


def test_8_warps_and_tf32_are_marked():
    marked = Checks(CPU, cases=(in_miniature().layers,), later=(), first=(2, 2, 16, 16, 9, 8)).marked()
    assert marked and all("8 warps" in check.marks or "tf32" in check.marks for check in marked)


def test_kernels_are_compiled_for_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    one = problem("fprop", "bfloat16", (2, 3, 16, 16, 9, 8), (3, 3), padding=(1, 1))
    config = Checks(CPU).configs(one)[0][0]
    launches = launches_of(lambda: timing.Trial(one, "meta").by_config(config))
    compiler = Compiler(90, processes=1)
    compiler.ask(launches)
    compiler.wait(launches, 60)
    assert compiler.counts() == {"asked": 1, "done": 1, "failed": 0} and list(tmp_path.rglob("*.cubin"))
    compiler.close()
