"""The line of advice where other work keeps the cores busy."""

import os
import time

import pytest
import torch

from decompk import cli
from decompk.report import crowd

CORES = 4


@pytest.fixture
def others(tmp_path, monkeypatch):
    """Makes others keep the cores busy in these shares while the process looks, and torch have so many threads."""

    def stat(ticks):
        lines = [f"cpu{i} {busy} 0 0 {idle} 0 0 0 0 0 0" for i, (busy, idle) in enumerate(ticks)]
        crowd.STAT.write_text("\n".join(["cpu 9 9 9 9", *lines, "intr 5 6", "procs_running 3"]) + "\n")

    def set_to(shares, threads=CORES):
        stat([(100, 50)] * len(shares))
        after = [(100 + round(100 * share), 50 + round(100 * (1 - share))) for share in shares]
        monkeypatch.setattr(time, "sleep", lambda seconds: stat(after) if seconds <= 0.05 else pytest.fail("too long"))
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    monkeypatch.setattr(crowd, "STAT", tmp_path / "stat")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(CORES)), raising=False)
    return set_to


@pytest.mark.parametrize(
    "shares, threads, left",
    [
        ([0, 0, 0, 0], 4, None),
        ([0.1, 0.1, 0.1, 0.1], 4, None),
        ([0.9, 0, 0, 0], 4, 3),
        ([0.5, 0.5, 0.6, 0], 4, 2),
        ([1, 1, 1, 1], 4, 1),
        ([1, 1, 1, 1], 2, 1),
        ([1, 1, 0, 0], 2, None),
        ([1, 1, 1, 1], 1, None),
        ([0, 0, 0, 0], 9, None),
    ],
)
def test_advice_is_given_where_threads_and_others_want_more_cores_than_there_are(others, shares, threads, left):
    others(shares, threads)
    said = crowd.crowded()
    assert (said is None) == (left is None)
    if said:
        assert f"keeps {sum(shares):.1f} of 4 cores busy" in said and f"OMP_NUM_THREADS={left}," in said
        assert said.count("\n") == 0


def test_who_has_taken_the_advice_is_not_given_it_again(others, monkeypatch):
    others([1] * CORES)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert crowd.crowded() is None


def test_cores_that_the_process_may_not_use_do_not_count(others):
    others([0, 0, 0, 0, 1, 1, 1, 1])
    assert crowd.crowded() is None


@pytest.mark.parametrize("load, said", [(0.9, False), (2.6, True)])
@pytest.mark.parametrize("content", [None, "cpu 1 2 3 4\n", "cpu0 0 0 0 0 0 0 0\n" * CORES, "cpu0 a b\n"])
def test_where_cores_are_not_counted_the_load_speaks(others, monkeypatch, content, load, said):
    others([0] * CORES)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    crowd.STAT.unlink()
    if content is not None:
        crowd.STAT.write_text(content)
    assert (crowd.crowded() is not None) == said


@pytest.mark.parametrize("command", ["train", "demo"])
def test_training_begins_with_the_advice_where_it_runs_on_a_cpu(others, monkeypatch, capsys, tmp_path, command):
    others([1] * CORES)
    monkeypatch.setattr(cli, "run_training", lambda *args, **more: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([command, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert said.startswith("decompk: Other work keeps 4.0 of 4 cores busy, and 4 threads") and said.count("\n") == 1
    others([0] * CORES)
    assert cli.main([command, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    others([1] * CORES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.main([command, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


def test_this_machine_is_looked_at_for_a_moment():
    begin = time.monotonic()
    crowd.crowded()
    assert time.monotonic() - begin < 5
