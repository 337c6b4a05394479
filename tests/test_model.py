"""The model of a GPU: occupancy, waves, what is fused, torch's forms, and its ranking where a device was tuned."""
# ruff: noqa: E402 (the tools stand beside the package)

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "tools")]

from layers import CASES, layers

import decompk
from decompk import ops
from decompk.kernels import call, conv, resources, tables
from decompk.kernels import device as devices
from decompk.kernels.choose import candidates
from decompk.kernels.conv.form import PIECES, merge_ms
from decompk.kernels.conv.model import LATENCY_MS, LAUNCH_MS, Work
from decompk.kernels.conv.torch_form import product_ms
from decompk.kernels.problem import Config, Problem, key_of
from decompk.kernels.resources import Resources
from decompk.ops import conv as conv_op

A100, H100 = devices.KNOWN[80], devices.KNOWN[90]
POINTWISE = Problem("fprop", "bfloat16", 4, 128, 16, 64, 35, 35, (1, 1)).one_image()
SPATIAL = Problem("fprop", "bfloat16", 4, 128, 64, 64, 18, 18, (3, 3), (1, 1), (1, 1))


# ---- occupancy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "device", "ctas"),
    [
        (64, 0, 4, H100, 8),
        (65, 0, 4, H100, 7),  # as 72
        (168, 0, 4, H100, 3),
        (255, 0, 4, H100, 2),
        (255, 0, 8, H100, 1),
        (32, 75 * 1024, 4, H100, 3),  # 228 KB, of which each CTA takes 1 KB more
        (32, 76 * 1024, 4, H100, 2),
        (32, 75 * 1024, 4, A100, 2),
        (16, 0, 8, H100, 8),  # 2048 threads
        (16, 0, 1, H100, 32),
        (255, 10**6, 32, H100, 1),
    ],
)
def test_a_multiprocessor_holds_as_many_ctas_as_its_scarcest_resource(registers, shared, warps, device, ctas):
    assert Resources(registers, shared).ctas(warps, device) == ctas


def test_moments_lower_the_occupancy_of_a_pointwise_layer_as_the_table_says():
    tile, config = conv.named("tile"), Config("tile", (1, 8, 8), 16, 64, 4, 4)
    fused = replace(POINTWISE, fused="moments")
    for problem in (POINTWISE, fused):
        found = resources.compiled(problem, config, 90)
        assert found and found == tile.resources(problem, config, H100)
    assert tile.ctas(fused, config, H100) < tile.ctas(POINTWISE, config, H100)


def test_a_kernel_that_no_table_has_takes_what_its_config_took_elsewhere_or_an_estimate(monkeypatch):
    tile = conv.named("tile")
    config = Config("tile", (1, 8, 8), 16, 64, 4, 4)
    key, layer = resources.keys_of(POINTWISE, config)
    taken = {layer: Resources(50, 9), "another": Resources(90, 8)}
    monkeypatch.setattr(resources, "table", lambda arch: {key: taken} if arch == 90 else {})
    resources.compiled.cache_clear()
    try:
        assert tile.resources(POINTWISE, config, H100) == Resources(50, 9)
        elsewhere = replace(POINTWISE, C=8)
        assert tile.resources(elsewhere, config, H100) == Resources(90, 9)
        assert tile.resources(POINTWISE, config, replace(H100, capability=89)).shared > 9
        fused = tile.resources(replace(elsewhere, fused="moments"), config, H100)
        assert fused.registers > 90 and fused.shared == 9
    finally:
        resources.compiled.cache_clear()


def test_the_tables_of_resources_are_whole():
    paths = sorted(resources.TABLES.glob("resources_sm*.json"))
    assert resources.table_path(90) in paths
    for path in paths:
        arch = int(path.stem.removeprefix("resources_sm"))
        found = resources.table(arch)
        assert arch in devices.KNOWN and found and all(found.values())
        for one in (r for layers_of in found.values() for r in layers_of.values()):
            assert 16 <= one.registers <= 255 and 0 <= one.shared <= devices.KNOWN[arch].shared_bytes


# ---- waves ----------------------------------------------------------------------------------------------------------


def work(programs, ctas, **given):
    """Programs that load 8 KB each, 4 KB at a time."""
    values = dict(memory_bytes=0.0, l2_bytes=8192 * programs, step_bytes=4096, flops=0.0, tflops=800)
    return Work(programs, ctas, **{**values, **given})


def test_a_last_wave_of_one_program_takes_as_long_as_a_full_one_where_latency_binds():
    per_wave = 2 * H100.processors
    one, two = (work(n, 2).run(H100)[0] for n in (per_wave, per_wave + 1))
    assert two == pytest.approx(2 * one) and one == pytest.approx(3 * LATENCY_MS)


def test_fewer_ctas_at_once_hide_less_of_the_latency():
    programs = 4 * H100.processors
    assert work(programs, 1).run(H100)[0] == pytest.approx(4 * work(programs, 4).run(H100)[0])


def test_a_launch_is_never_faster_than_any_of_its_bounds():
    given = dict(memory_bytes=1e8, flops=1e10, sum_bytes=1e6, instructions=1000)
    for programs in (1, 100, 5000):
        ms, bounds = work(programs, 3, **given).run(H100)
        assert bounds["memory"] == pytest.approx(1e8 / H100.memory_gbps / 1e6)
        assert ms >= max(bounds.values()) * 0.999


def test_a_product_on_few_multiprocessors_takes_as_long_as_on_one():
    alone = work(1, 1, l2_bytes=1, flops=1e9).run(H100)[0]
    wide = work(H100.processors, 1, l2_bytes=1, flops=1e9 * H100.processors).run(H100)[0]
    assert wide == pytest.approx(alone)


# ---- forms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("problem", [POINTWISE, SPATIAL], ids=["pointwise", "spatial"])
def test_a_prediction_is_its_launches_and_at_least_each_of_its_other_terms(kind, problem):
    found = candidates(problem.of(kind), H100)
    assert len(found) > 3
    for choice in found:
        terms = dict(choice.terms)
        assert terms["launches"] >= LAUNCH_MS
        assert choice.ms >= terms["launches"] + max(ms for name, ms in terms.items() if name != "launches") * 0.999
        assert ("sums" in terms) == (kind == "wgrad" and choice.backend == "triton")


def test_launches_around_a_kernel_are_counted():
    wgrad = SPATIAL.of("wgrad")
    tile = conv.named("tile")
    config = tile.configs(wgrad)[0]
    given = {(1, False): 1, (4, False): 2, (4, True): 1}  # splits are summed up, or added to what is zero already
    for (splits, atomic), launches in given.items():
        assert tile.launches(wgrad, replace(config, splits=splits, atomic=atomic)) == launches
    assert tile.launches(SPATIAL, config) == 1
    band = conv.named("band")
    expands = [band.launches(p, c) for p in (SPATIAL, replace(SPATIAL, C=4, O=4)) for c in band.configs(p)]
    assert set(expands) == {1, 2}


def test_what_is_fused_costs_torch_passes_over_the_result_and_our_kernels_little():
    moments, sums = (replace(SPATIAL, kind=kind, fused=f) for kind, f in (("fprop", "moments"), ("dgrad", "sums")))
    for problem in (moments, sums):
        y = SPATIAL.K * SPATIAL.N * SPATIAL.O * SPATIAL.H * SPATIAL.W * 2 / H100.memory_gbps / 1e6
        plain = {(c.form, c.config): c.ms for c in candidates(replace(problem, fused=""), H100)}
        added = {c: c.ms - plain[c.form, c.config] for c in candidates(problem, H100)}
        reads = 1 if problem is moments else 2  # of y; of dx and x̂
        assert all(ms > reads * y for c, ms in added.items() if c.backend == "torch")
        assert min(added.values()) < y and all(ms >= 0 for c, ms in added.items())


def test_moments_of_many_pieces_cost_their_bytes_and_their_merge():
    few, many = (merge_ms(SPATIAL, pieces, H100) for pieces in (1, 4 * PIECES))
    assert few < 1e-4 and many > 3 * LATENCY_MS


def test_a_batched_product_with_a_small_result_does_not_fill_a_gpu():
    wgrad = POINTWISE.of("wgrad")
    assert product_ms(wgrad, H100, split=False) > 10 * product_ms(wgrad, H100, split=True)
    assert candidates(wgrad, H100)[0].backend == "triton"


def test_what_is_fused_is_no_part_of_a_tables_key(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    tables.table.cache_clear()
    winner = candidates(SPATIAL, H100)[0]
    entries = {key_of(SPATIAL): tables.entry_of(replace(winner, ms=0.5))}
    tables.table_path(H100).write_text(json.dumps({"entries": entries}))
    try:
        for problem in (SPATIAL, replace(SPATIAL, fused="moments")):
            assert tables.lookup(problem, H100).ms == 0.5
    finally:
        tables.table.cache_clear()
    assert replace(SPATIAL, fused="moments").of("dgrad") == SPATIAL.of("dgrad")


def test_the_choice_knows_which_moments_are_asked_for(monkeypatch):
    fused, choose = [], conv_op.choose
    monkeypatch.setattr(conv_op, "choose", lambda problem, *a: fused.append(problem.fused) or choose(problem, *a))
    call._fprop_call.cache_clear()  # a Call keeps its choices, whoever made it
    x, weight = torch.randn(2, 3, 6, 6, 8).movedim(-1, 2), torch.randn(2, 8, 8, 3, 3)
    ops.conv2d_moments(x, weight)
    ops.fused_conv2d(x, weight)
    assert fused == ["moments", ""]


def test_explain_prints_the_terms_of_every_prediction(capsys):
    decompk.explain(replace(POINTWISE, fused="moments"))
    text = capsys.readouterr().out
    assert "with moments" in text and "CTAs" in text
    for term in ("launches", "memory", "L2", "arithmetic", "moments", "latency", "library"):
        assert term in text


# ---- the ranking, against what was measured -------------------------------------------------------------------------

REGRET, RANK = 1.5, 0.8


def agreement(entries, problems, device):
    """(median of how much longer than its favourite the model thinks that the measured winner takes, Spearman's rank
    correlation of predicted and measured times of the winners) over those `entries` whose problem is given."""
    regrets, predicted, measured = [], [], []
    for problem in problems:
        if entry := entries.get(key_of(problem)):
            winner = tables.choice_of(entry)
            ms = winner.form.predict(problem, winner.config, device).ms
            regrets.append(ms / candidates(problem, device)[0].ms)
            predicted.append(ms)
            measured.append(winner.ms)
    return median(regrets), spearman(predicted, measured)


def spearman(a, b):
    """Of values without ties."""
    ranks = [sorted(range(len(values)), key=values.__getitem__) for values in (a, b)]
    places = [{i: place for place, i in enumerate(order)} for order in ranks]
    squares = sum((places[0][i] - places[1][i]) ** 2 for i in range(len(a)))
    return 1 - 6 * squares / (len(a) * (len(a) ** 2 - 1))


def of_networks(cases=CASES):
    return list(dict.fromkeys(p for case in cases for layer in layers(case) for p in layer.passes()))


def tuned():
    """(Device, entries) of each tuned table that ships; the model's rates are those of the nearest known device."""
    for path in sorted(tables.TABLES.glob("*.json")):
        found = json.loads(path.read_text())
        if "device" in found:
            name = found["device"].replace("H200", "H100")
            yield next(d for d in devices.KNOWN.values() if d.name in name), found["entries"]


def test_the_model_ranks_as_measured_where_a_device_was_tuned():
    found = list(tuned())
    if not found:
        pytest.skip("no tuned table ships: nothing was measured on a GPU yet")
    for device, entries in found:
        regret, rank = agreement(entries, of_networks(), device)
        assert regret <= REGRET and rank >= RANK, f"{device.name}: regret {regret:.2f}, rank {rank:.2f}"


def test_the_bar_of_ranking_tells_a_model_that_agrees_from_one_that_does_not():
    problems = of_networks(CASES[-1:])
    agrees, opposes = {}, {}
    for problem in problems:
        found = candidates(problem, H100)
        agrees[key_of(problem)] = tables.entry_of(replace(found[0], ms=found[0].ms * 1.3))
        opposes[key_of(problem)] = tables.entry_of(replace(found[-1], ms=1 / found[-1].ms))
    regret, rank = agreement(agrees, problems, H100)
    assert regret == 1 and rank > 0.99
    regret, rank = agreement(opposes, problems, H100)
    assert regret > REGRET and rank < RANK
