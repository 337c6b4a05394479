"""The forms of a convolution: one list that everybody reads, and what it takes to add one."""

import json
import pickle
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from helpers import asked_by_operators
from toy_form import Toy

import decompk
from decompk import ops
from decompk.errors import BackendError
from decompk.kernels import choose, conv, cpu, measure, tables
from decompk.kernels import device as devices
from decompk.kernels.backend import BACKENDS
from decompk.kernels.problem import Problem, key_of

LAYER = Problem("fprop", "float32", 2, 8, 8, 8, 12, 12, (3, 3), (1, 1), (1, 1))
GPUS = replace(LAYER, dtype="bfloat16")


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The toy form, listed; what is chosen, measured and tuned meanwhile is forgotten."""
    toy = Toy()
    cpu.why_not()  # built before there is another cache
    monkeypatch.setattr(conv, "FORMS", (*conv.FORMS, toy))
    monkeypatch.setenv("DECOMPK_CACHE", str(tmp_path))
    monkeypatch.setenv("DECOMPK_MEASURE", "1")
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    tables.table.cache_clear()
    yield toy
    tables.table.cache_clear()


def test_every_form_is_what_its_protocol_says():
    names = [(form.backend, form.name) for form in conv.FORMS]
    assert len(set(names)) == len(names)
    asks = {"missing", "why_not", "configs", "predict", "moments_pieces", "sums", "fprop", "dgrad", "wgrad"}
    for form in conv.FORMS:
        assert form.backend in BACKENDS
        assert all(callable(getattr(form, ask)) for ask in asks)
        assert conv.named(form.name, form.backend) is form
        for kind in ("fprop", "dgrad", "wgrad"):
            for config in form.configs(GPUS.of(kind)):
                assert (config is not None) == form.configurable
                assert config is None or config.form == form.name


def test_a_new_form_is_measured_beside_the_others_chosen_and_run(toy, monkeypatch):
    times = {"toy": 0.1}
    measured = measure.time_each
    monkeypatch.setattr(
        measure, "time_each", lambda *of: {name: times.get(name, ms + 1) for name, ms in measured(*of).items()}
    )
    asked = asked_by_operators(monkeypatch)
    x, weight = torch.randn(2, 8, 12, 12, 8).movedim(-1, 2), torch.randn(2, 8, 8, 3, 3)
    found = ops.grouped_conv2d(x, weight, padding=1)
    ((problem, choice),) = asked
    assert choice.form is toy and "toy 0.1" in choice.reason
    kept = json.loads(measure.path().read_text())[key_of(problem)]
    assert {"toy", "loop", "grouped"} <= kept.keys()
    with decompk.backend("loop"):
        torch.testing.assert_close(found, ops.grouped_conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)


def test_a_new_form_is_measured_where_only_the_others_were(toy, monkeypatch):
    listed = conv.FORMS
    monkeypatch.setattr(conv, "FORMS", listed[:-1])
    assert "toy" not in choose.choose(LAYER, torch.device("cpu")).reason
    monkeypatch.setattr(conv, "FORMS", listed)
    assert "toy" in choose.choose(LAYER, torch.device("cpu")).reason


def test_a_new_form_is_a_candidate_on_a_gpu_and_explained(toy, capsys):
    assert choose.candidates(GPUS, devices.KNOWN[90])[0].form is toy
    decompk.explain(GPUS)
    assert "torch toy" in capsys.readouterr().out


def test_a_new_form_is_tuned_and_served_from_the_table(toy):
    here = devices.KNOWN[90]
    winner = choose.candidates(GPUS, here)[0]
    entries = {key_of(GPUS): tables.entry_of(replace(winner, ms=0.5))}
    tables.table_path(here).write_text(json.dumps({"entries": entries}))
    found = tables.lookup(GPUS, here)
    assert found.form is toy and found.ms == 0.5


def test_a_new_form_is_refused_where_it_says_so(toy):
    here, dilated = devices.KNOWN[90], replace(GPUS, dilation=(2, 2))
    assert toy not in {choice.form for choice in choose.candidates(dilated, here)}
    entry = tables.entry_of(choose.candidates(GPUS, here)[0])
    tables.table_path(here).write_text(json.dumps({"entries": {key_of(dilated): entry}}))
    assert tables.lookup(dilated, here) is None
    choice = choose.choose(replace(LAYER, dilation=(2, 2)), torch.device("cpu"), measure=False)
    assert choice.form is not toy


def test_a_form_that_nobody_lists_raises(toy, monkeypatch):
    entry = tables.entry_of(choose.candidates(GPUS, devices.KNOWN[90])[0])
    monkeypatch.setattr(conv, "FORMS", conv.FORMS[:-1])
    for wrong in (lambda: conv.named("toy"), lambda: tables.choice_of(entry)):
        with pytest.raises(BackendError, match="no form 'toy'"):
            wrong()


def test_a_choice_is_the_same_when_it_was_pickled_or_copied():
    found = choose.candidates(GPUS, devices.KNOWN[90])
    for again in (pickle.loads(pickle.dumps(found)), deepcopy(found)):
        assert again == found and [hash(one) for one in again] == [hash(one) for one in found]
    assert len(set(conv.FORMS)) == len(conv.FORMS)
