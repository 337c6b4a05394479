"""The GPU suite without a GPU: what is left when stages break, hang or are killed, and each stage in miniature."""
# ruff: noqa: E402 (the tools stand beside the package)

import io
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools")]

import gpu_results
import gpu_stages
import gpu_suite
import gpu_summary
import journal
import tune
from journal import Journal, append, read
from layers import problem

from decompk.kernels import conv, tables
from decompk.kernels import device as devices
from decompk.kernels.conv.form import Choice
from decompk.kernels.device import interpreted
from decompk.kernels.problem import Config, key_of

CPU = torch.device("cpu")
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="runs kernels on the CPU")

# ---- records --------------------------------------------------------------------------------------------------------


def test_the_journal_remembers_what_broke(tmp_path):
    path = tmp_path / "records.jsonl"
    first = Journal(path, ("case", "impl"), "bench", run=1)
    first.add(case="a", impl="x", ms=1.0, rel_error=float("inf"))
    first.begin(case="a", impl="y")
    append(path, {"stage": "another", "begun": {"case": "z"}})
    again = Journal(path, ("case", "impl"), "bench", run=2)
    assert again.has(case="a", impl="x") and again.has(case="a", impl="y") and not again.has(case="b", impl="x")
    assert "broke" in again.records[1]["error"] and len(again.records) == 2
    again.note("stopped")
    assert len(Journal(path, ("case", "impl"), "bench").records) == 2
    kept = [line for line in read(path) if line.get("impl") == "x"][0]
    assert kept["rel_error"] == "inf" and kept["run"] == 1 and {"at", "seconds"} <= kept.keys()


def test_a_line_that_was_torn_harms_no_other(tmp_path):
    path = tmp_path / "records.jsonl"
    append(path, {"case": "a"})
    with open(path, "ab") as file:
        file.write(b'{"case": "b", "ms": 1.')
    append(path, {"case": "c"})
    assert [line["case"] for line in read(path)] == ["a", "c"]


# ---- stages that break ----------------------------------------------------------------------------------------------

FAKE = """
import os, sys, time
sys.path.insert(0, {tools!r})
from pathlib import Path
from journal import Journal
stage, out = sys.argv[1], Path(sys.argv[2])
{before}
journal = Journal(out / "records.jsonl", ("part", "case"), stage, run=1)
for i in range({count}):
    key = dict(part="item", case=str(i))
    if journal.has(**key):
        continue
    journal.begin({patience}, **key)
    {body}
    journal.add(**key, outcome="right")
journal.note("done", late=0)
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Stages of these names and boxes, whose processes run `bodies`; ahead does nothing."""

    def make(bodies, boxes=None, minutes=0.3, **fills):
        def command(self, name, until):
            known = {
                "before": "",
                "count": 5,
                "patience": 20,
                "body": "pass",
                **fills,
                **bodies.get(name, {"count": 0}),
            }
            code = FAKE.format(tools=str(ROOT / "tools"), **known)
            return [sys.executable, "-c", code, name, str(tmp_path / "out")]

        monkeypatch.setattr(gpu_suite.Suite, "command", command)
        monkeypatch.setattr(gpu_suite, "ENDING", 1.0)
        boxes = boxes or dict.fromkeys(bodies, 12)
        monkeypatch.setattr(gpu_suite, "STAGES", tuple(gpu_suite.Stage(*pair) for pair in boxes.items()))
        return gpu_suite.Suite(tmp_path / "out", minutes)

    return make


def outcomes(lines, stage):
    return [r.get("outcome") or r.get("error") for r in gpu_summary.results(lines, stage)]


def test_a_stage_that_is_killed_goes_on_behind_that_place(suite, tmp_path):
    one = suite({"checks": {"body": "os.kill(os.getpid(), 9) if i == 2 else None"}, "odd": {}})
    assert one.run(["checks", "odd"]) == 1
    found = outcomes(read(one.records), "checks")
    assert found[:2] == found[3:] == ["right", "right"] and "SIGKILL" in found[2]
    assert outcomes(read(one.records), "odd") == 5 * ["right"]
    text = (one.out / "summary.md").read_text()
    assert "checks: finished" in text and "SIGKILL" in text and "VERDICT: 1 failures" in text


def test_a_stage_that_hangs_says_where_and_goes_on(suite):
    one = suite({"checks": {"body": "time.sleep(60) if i == 1 else None", "patience": 1}, "odd": {}})
    one.run(["checks", "odd"])
    found = gpu_summary.results(read(one.records), "checks")
    assert [r["case"] for r in found] == list("01234") and "hung for 1 s" in found[1]["error"]
    assert "most recent call first" in found[1]["trace"]
    assert len(outcomes(read(one.records), "odd")) == 5


def test_a_stage_has_no_more_than_its_box_and_the_last_gets_what_is_left(suite):
    boxes = {"checks": 2, "odd": 0.5}
    one = suite({"checks": {"body": "time.sleep(0.4)", "count": 99}, "odd": {"body": "time.sleep(0.3)"}}, boxes)
    began = time.time()
    assert one.run(["checks", "odd"]) == 0
    lines = read(one.records)
    assert time.time() - began < 15 and 1 < len(outcomes(lines, "checks")) < 99
    assert len(outcomes(lines, "odd")) == 5
    assert "--resume would go on with: checks" in gpu_summary.summary(lines, 9999)


def test_a_stage_that_cannot_begin_is_given_up_with_what_it_said(suite):
    one = suite({"checks": {"before": "import no_such_module"}, "odd": {}})
    assert one.run(["checks", "odd"]) == 1
    assert "ModuleNotFoundError: No module named 'no_such_module'" in outcomes(read(one.records), "checks")[0]
    assert len(outcomes(read(one.records), "odd")) == 5


def test_what_comes_back_has_room_however_much_a_stage_says(suite, monkeypatch):
    monkeypatch.setattr(gpu_suite, "LOG", 20_000)
    one = suite({"checks": {"body": "print('x' * 99 + chr(10) * (i == 0), *range(9999), sep=chr(10))"}, "odd": {}})
    one.run(["checks", "odd"])
    names = {path.name: path.stat().st_size for path in one.out.iterdir()}
    assert names.keys() == {"records.jsonl", "summary.md", gpu_suite.ARCHIVE} and max(names.values()) < 2**24
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    with tarfile.open(one.out / gpu_suite.ARCHIVE) as tar:
        log = tar.extractfile("logs/checks.log").read()
        assert {"records.jsonl", "summary.md", "logs/odd.log"} <= set(tar.getnames())
    assert log.startswith(b"item 0" if log.startswith(b"item") else b"x" * 99) and log.rstrip().endswith(b"item 4")
    assert len(log) < 42_000


def test_a_signal_ends_it_with_archive_and_summary(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "tools")!r})
import gpu_suite
gpu_suite.Suite.command = lambda self, name, until: [sys.executable, "-c", "import time; time.sleep(60)"]
sys.exit(gpu_suite.main(["--rehearse", "--out", {str(tmp_path / "out")!r}, "--only", "checks"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "running.log").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=20)[0]
    assert "VERDICT" in said and (tmp_path / "out" / gpu_suite.ARCHIVE).exists()


def test_without_torch_every_stage_is_a_recorded_failure_and_the_suite_ends_well(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('this torch is broken')\n")
    command = [sys.executable, str(ROOT / "tools" / "gpu_suite.py"), "--rehearse", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--only", "machine,odd"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("ImportError: this torch is broken") >= 2
    assert (tmp_path / "out" / gpu_suite.ARCHIVE).exists()


def test_without_a_gpu_it_says_so_in_a_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_suite, "gpu", lambda: False)
    assert gpu_suite.main(["--out", str(tmp_path)]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "tune needs an NVIDIA GPU, and torch sees none.\n"


def test_a_second_call_goes_on_where_the_first_stopped(suite, tmp_path, monkeypatch):
    bodies = {"machine": {}, "checks": {"body": "1 / (i - 2)" if False else "i == 2 and os._exit(7)"}, "odd": {}}
    first = suite(bodies)
    first.run(["machine", "checks"])
    archive = tmp_path / "first.tar.gz"
    os.rename(first.out / gpu_suite.ARCHIVE, archive)
    for retry, again in ((False, 0), (True, 1)):
        for file in first.out.iterdir():
            file.unlink()
        gpu_suite.resume(archive, first.out, retry)
        before = len(outcomes(read(first.records), "checks"))
        second = suite({**bodies, "checks": {}})
        assert second.number == 2
        second.run(["machine", "checks", "odd"])
        lines = read(second.records)
        assert len(outcomes(lines, "checks")) - before == again
        assert len(outcomes(lines, "odd")) == len(outcomes(lines, "machine")) == 5
        assert len(outcomes(lines, "machine, run 1")) == 5


# ---- the summary, and the way home ----------------------------------------------------------------------------------


def layer(case, kind, impl, ms, **more):
    key = {"stage": "layers", "part": "layers", "net": "n", "case": case, "pass": kind, "impl": impl}
    return {**key, "ms": ms, "roof_percent": 50.0, "predicted_ms": 2 * ms, "config": f"{impl} 1×8×8", **more}


def step(impl, ms, **more):
    return {
        "stage": "steps",
        "part": "steps",
        "net": "resnet50 K=4@140",
        "pass": "step",
        "impl": impl,
        "ms": ms,
        **more,
    }


def made_up(many=1):
    versions = {"stage": "machine", "run": 1, "part": "machine", "case": "versions", "device": "NVIDIA H100 80GB HBM3"}
    lines = [{**versions, "table": "nvidia-h100-80gb-hbm3.json", "assumed": {"copy_gbps": 3000.0, "launch_ms": 0.003}}]
    lines += [{"stage": "machine", "part": "roof", "case": "copy_gbps", "value": 2950.0}]
    for i in range(many):
        lines += [layer(f"{i}→{i}", "fprop", "ours", 2.0 + i), layer(f"{i}→{i}", "fprop", "cudnn_grouped", 1.0)]
        lines += [{"stage": "checks", "part": "fprop", "case": f"tile {i}", "outcome": "right"}]
        wrong = {"fault": f"wrong: norm {i}.5e-3, torch 1e-3", "marks": ["8 warps"], "outcome": "wrong"}
        lines += [{"stage": "checks", "part": "dgrad", "case": f"band {i} 8 warps " + 99 * "x", **wrong}]
        error = {"error": f"RuntimeError: {chr(97 + i % 26) * 80}", "trace": 5000 * "y"}
        lines += [{"stage": "odd", "part": f"kind {i % 40}", "case": str(i), **error}]
    lines += [step("ours fused, graph", 5.0), step("grouped, graph", 10.0), step("global, graph", 20.0)]
    return lines


def test_the_summary_fits_whatever_happened():
    for many in (1, 50, 3000):
        assert len(gpu_summary.summary(made_up(many), 10_000)) <= 10_000
    assert "VERDICT: nothing failed" in gpu_summary.summary([], 10_000)


def test_the_summary_holds_ours_beside_the_best_peer():
    text = gpu_summary.summary(made_up(2), 10_000)
    assert "ours fused, graph is 2.00× as fast as the best peer, grouped, graph, 4.00× faster than global" in text
    assert "copy_gbps 2950 (assumed 3e+03)" in text
    assert "- 0.33× 1→1 fprop: 3 ms" in text and "measured ÷ predicted: cudnn_grouped 0.50" in text
    assert "2× dgrad band 0 8 warps" in text and "with 8 warps 0/2/0/0" in text
    assert len(gpu_summary.failures(made_up(2))) == 4


@pytest.mark.parametrize(
    ("text", "code", "outcome"),
    [
        ("sanitized 2 of 9: x\n========= ERROR SUMMARY: 0 errors", 0, "clean"),
        (
            "sanitized 2 of 9: x\n========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error",
            86,
            "found errors",
        ),
        ("========= Error: Device not supported", 1, "could not run"),
        ("sanitized 2 of 9: x", -9, "could not run"),
    ],
)
def test_the_sanitizers_verdict_is_its_exit_code(text, code, outcome):
    found = gpu_stages.verdict(text, code)
    assert found["outcome"] == outcome
    assert found["checks"] == ("2 of 9" if "2 of 9" in text else "none")
    assert ("fault" in found) == (code == 86) and ("error" in found) == (outcome == "could not run")


def archive_of(tmp_path, lines):
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for path in (tmp_path / "records.jsonl", tmp_path / "tuned.json"):
            if path.exists():
                tar.add(path, path.name)
    return tmp_path / "a.tar.gz"


def test_an_archive_is_laid_where_dispatch_and_readers_look(tmp_path, monkeypatch):
    here = replace(devices.KNOWN[90], name="NVIDIA H100 80GB HBM3")
    one = problem("fprop", "bfloat16", (4, 128, 16, 16, 9, 9), (3, 3), padding=(1, 1))
    config = Config("tile", (2, 8, 8), 16, 16, warps=8, stages=2)
    table = tune.Table(tmp_path / "tuned.json", here)
    table.keep(key_of(one), Choice(conv.named("tile"), config, 0.5, "timed"), refined=True)
    monkeypatch.setattr(tables, "TABLES", tmp_path / "decompk" / "kernels" / "configs")
    known = tables.table_path(here)
    old = {"form": "loop", "backend": "torch", "config": None, "ms": 1.0}
    journal.write(known, tune.table_text({"device": "old"}, {"another": old}))
    written = gpu_results.install(archive_of(tmp_path, made_up()), tmp_path)
    assert written[-1] == known and json.loads(known.read_text())["entries"].keys() == {"another", key_of(one)}
    tables.table.cache_clear()
    assert tables.lookup(one, here).config == config
    tables.table.cache_clear()
    folder = tmp_path / "bench" / "results" / "nvidia-h100-80gb-hbm3"
    assert not any("trace" in line for line in read(folder / "gpu_suite.jsonl"))
    assert "NVIDIA H100" in (folder / "gpu_suite.md").read_text()
    with pytest.raises(ValueError, match="no GPU"):
        gpu_results.install(archive_of(tmp_path, [{**made_up()[0], "device": "cpu"}]), tmp_path)
    assert gpu_results.main([str(tmp_path / "none.tar.gz")]) == 2


@needs_interpreter
def test_a_real_stage_killed_half_way_leaves_its_records_and_goes_on(tmp_path):
    suite = gpu_suite.Suite(tmp_path, 5, rehearse=True)

    def kill():
        while len(gpu_summary.results(read(suite.records))) < 3:
            time.sleep(0.02)
        os.kill(suite.processes[0].pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    assert suite.supervise("machine", time.time() + 60) == "finished"
    found = gpu_summary.results(read(suite.records), "machine")
    names = [(r["part"], r["case"]) for r in found if r["part"] != "stage"]  # it may be killed between two
    assert len(set(names)) == len(names) == 10
    assert [r for r in found if "SIGKILL" in r.get("error", "")]
    assert sum("value" in r for r in found) >= 6


def test_what_still_compiles_when_timing_begins_is_ended(suite):
    one = suite({"ahead": {"body": "time.sleep(60)", "patience": 90}, "checks": {}, "layers": {}})
    assert one.run(["checks", "layers"]) == 0 and not one.processes
    ends = [line["reason"] for line in read(one.records) if (line["stage"], line.get("event")) == ("ahead", "stopped")]
    assert ends == ["out of time"] and len(outcomes(read(one.records), "layers")) == 5


def test_a_full_disk_ends_no_stage_but_its_own_and_no_summary(suite, monkeypatch, capsys):
    one = suite({"checks": {}, "odd": {}})
    keep_log = one.keep_log

    def full(name):
        if name == "checks":
            raise OSError(28, "No space left on device")
        keep_log(name)

    monkeypatch.setattr(one, "keep_log", full)
    assert one.run(["checks", "odd"]) == 1 and len(outcomes(read(one.records), "odd")) == 5
    said = capsys.readouterr()
    assert "No space left" in said.err and "VERDICT" in said.out


def test_what_cannot_be_gone_on_with_is_said_and_nothing_is_overwritten(tmp_path, capsys):
    out, torn = tmp_path / "out", tmp_path / "torn.tar.gz"
    newer = json.dumps({"stage": "checks", "case": "a"}) + "\n"
    archive = archive_of(tmp_path, made_up())
    torn.write_bytes(archive.read_bytes()[:200])
    (tmp_path / "file").touch()
    for arguments, sentence in {
        ("--out", str(out), "--resume", str(torn)): "is no whole archive",
        ("--out", str(out), "--resume", str(tmp_path / "none")): "there is no archive",
        ("--out", str(tmp_path / "file")): "cannot be a folder of results",
        ("--out", str(out), "--minutes", "0"): "more than 0",
    }.items():
        with pytest.raises(SystemExit):
            gpu_suite.main(["--rehearse", *arguments])
        assert sentence in capsys.readouterr().err
    (out / "records.jsonl").write_text(newer)
    gpu_suite.resume(archive, out, retry=False)
    assert [line["case"] for line in read(out / "records.jsonl") if "case" in line] == ["a"]


def test_an_archive_that_is_not_whole_or_not_ours_is_one_sentence_and_installs_nothing(tmp_path, capsys, monkeypatch):
    whole = archive_of(tmp_path, made_up()).read_bytes()
    monkeypatch.setattr(gpu_results, "ROOT", tmp_path / "root")
    lines = (json.dumps(made_up()[0]) + "\n").encode()

    def tar(**files):
        text = io.BytesIO()
        with tarfile.open(fileobj=text, mode="w:gz") as archive:
            archive.addfile(tarfile.TarInfo("."))  # any foreign archive has one
            for name, content in files.items():
                entry = tarfile.TarInfo(name.replace("_", "."))
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return text.getvalue()

    flipped = bytearray(whole)
    flipped[-6] ^= 1
    cases = {
        "empty": b"",
        "no archive": b"no archive",
        "xz": lzma.compress(whole),
        "cut": whole[:-20],
        "flipped": bytes(flipped),
        "foreign": tar(README_md=b"hello"),
        "no line": tar(records_jsonl=b"[" * 100_000),
    }
    table = "nowhere/else.json"
    other = {
        "no table": tar(records_jsonl=lines, tuned_json=b'{"entries": [1]}'),
        "elsewhere": tar(
            records_jsonl=json.dumps({**made_up()[0], "table": table}).encode(), tuned_json=b'{"entries": {}}'
        ),
    }
    for name, content in {**cases, **other}.items():
        archive = tmp_path / "given.tar.gz"
        archive.write_bytes(content)
        assert gpu_results.main([str(archive)]) == 2, name
        assert capsys.readouterr().err.count("\n") == 1, name
        assert not (tmp_path / "root").exists(), name
        if name in cases:
            with pytest.raises(SystemExit):
                gpu_suite.main(["--rehearse", "--out", str(tmp_path / "new"), "--resume", str(archive)])
            assert str(archive) in capsys.readouterr().err and not [*(tmp_path / "new").iterdir()], name
