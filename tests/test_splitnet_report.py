"""`decompk report --splitnet`, and the split points it counts."""

import csv
import io
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from decompk import models
from decompk.cli import main
from decompk.cost import walk
from decompk.errors import DecompkError
from decompk.report.paper import balanced_split
from decompk.report.splitnet import FIGURES, balanced_table, groups_table, networks_table, splitnet_report
from decompk.report.table import Column, Table
from decompk.splitnet import Assignment, Nodes
from decompk.splitnet.points import split_points

STUDY = Path(__file__).parents[2] / "shared" / "paper_tables.json"
NETWORKS = {  # the printed names of the recount's
    "WRN-16-8": "WRN-16-8",
    "FC split": "FC split",
    "Shallow G=2": "Shallow split",
    "Deep G=2": "Deep split (dropout)",
    "Hier 2->4": "Hier. split (dropout)",
}
ERRORS = {  # the same of its test errors
    "WRN-16-8": "WRN-16-8",
    "FC split": "FC split",
    "Shallow": "Shallow split",
    "Deep (dropout)": "Deep split (dropout)",
    "Hier (dropout)": "Hier. split (dropout)",
    "FC (overlap)": "FC split (overlap)",
    "Shallow (overlap)": "Shallow split (overlap)",
    "Deep (overlap)": "Deep split (overlap)",
}
beside = pytest.mark.skipif(not STUDY.exists(), reason="the independent recount is not beside this checkout")


@cache
def report():
    return json.loads(splitnet_report("json"))


@cache
def network(name):
    with torch.device("meta"):
        return models.build(name)


def rows(table):
    return {(row.get("network") or row["model"], row.get("groups") or row.get("split")): row for row in table["rows"]}


# ---- the tables -----------------------------------------------------------------------------------------------------


@beside
def test_every_exact_cell_of_the_recount_is_met_to_the_printed_digits_and_the_others_are_named():
    tables = {"SN1": rows(report()["table 1"]), "SN2": rows(report()["table 2"])}
    cells = [cell for cell in json.loads(STUDY.read_text())["analytic"] if cell["table"] in tables]
    assert len(cells) == 19
    for cell in cells:
        figure = next(figure for figure in FIGURES if cell["item"].endswith(figure))
        name = cell["item"].removesuffix(figure).strip()
        key = (NETWORKS[name], None) if cell["table"] == "SN1" else ("Shallow split", int(name[-1]))
        row = tables[cell["table"]][key]
        printed, ours, verdict = row[f"{figure} printed"], row[f"{figure} ours"], row["verdict"]
        assert printed == cell["printed"] and ours == pytest.approx(cell["recount"], rel=1e-6)
        exact = cell["verdict"] == "EXACT"
        assert exact == (f"{ours:.{len(printed.partition('.')[2])}f}" == printed)
        misses = verdict.partition("close: ")[2] if cell["table"] == "SN1" else figure if verdict == "close" else ""
        assert exact == (figure not in misses), row


@beside
def test_the_printed_test_errors_are_those_of_the_supplement():
    theirs = json.loads(STUDY.read_text())["measured_as_printed"]["splitnet_table_1_test_error_percent_cifar100"]
    ours = rows(report()["table 1"])
    assert {name: float(ours[ERRORS[name], None]["test error % printed"]) for name in theirs} == theirs


def test_table_1_has_the_eleven_rows_of_the_print_and_counts_what_needs_no_training():
    table = networks_table()
    assert [row[0] for row in table.rows] == [
        *("WRN-16-8", "FC split", "Shallow split", "Deep split (dropout)", "Hier. split (dropout)"),
        *("FC split (overlap)", "Shallow split (overlap)", "Deep split (overlap)"),
        *("SSL (1e-3)", "SSL (3e-3)", "SSL (5e-3)"),
    ]
    assert [row[-1] for row in table.rows] == [
        *("4 of 4 exact", "4 of 4 exact", "2 of 4 exact, close: params M, params red. %"),
        *["3 of 4 exact, close: params red. %"] * 2,
        *[None] * 6,
    ]
    for row in table.rows:
        assert all(row[column] for column in (1, 3, 5, 7, 9))  # printed
        assert all((row[column] is None) == (row[-1] is None) for column in (2, 4, 6, 8))  # ours
    assert [row[7] for row in table.rows] == [
        *("0.0", "0.0", "14.63", "31.97", "39.29", "0.0", "9.77", "19.52", "12.64", "33.14", "48.71")
    ]


def test_table_2_has_the_baseline_and_three_numbers_of_groups():
    table = groups_table()
    assert [(row[1], row[2], f"{row[3]:.2f}", *row[4:]) for row in table.rows] == [
        (None, "0.0", "0.00", "24.28", "exact"),
        (2, "32.44", "32.38", "23.94", "close"),
        (3, "43.09", "43.18", "25.14", "close"),
        (4, "48.66", "48.57", "24.10", "close"),
    ]


# Parameters and multiply-accumulates that a split leaves out, by hand: c_in · c_out · taps · (1 − 1/G), and the latter
# at every pixel of 13² (AlexNet), 14² and 7² (ResNet-18x2).
CONV4, CONV5 = 3 * 512 * 512 * 9, 3 * 1024 * 1024 * 9  # what in a stage of ResNet-18x2 is neither entry
ENTRIES5 = 512 * 1024 * 10
DROPPED = {
    ("alexnet", "2-4-8"): (
        9216 * 4096 // 2 + 4096 * 4096 * 3 // 4 + 4096 * 1000 * 7 // 8,
        9216 * 4096 // 2 + 4096 * 4096 * 3 // 4 + 4096 * 1000 * 7 // 8,
    ),
    ("alexnet", "2x5"): (
        (384 * 384 * 9 + 384 * 256 * 9 + 9216 * 4096 + 4096 * 4096 + 4096 * 1000) // 2,
        ((384 * 384 * 9 + 384 * 256 * 9) * 169 + 9216 * 4096 + 4096 * 4096 + 4096 * 1000) // 2,
    ),
    ("resnet18x2", "1-1-2"): (512_000, 512_000),
    ("resnet18x2", "1-2-2"): (CONV5 // 2 + 512_000, CONV5 // 2 * 49 + 512_000),
    ("resnet18x2", "2-2-2"): (
        (CONV4 + ENTRIES5 + CONV5) // 2 + 512_000,
        (CONV4 * 196 + (ENTRIES5 + CONV5) * 49) // 2 + 512_000,
    ),
    ("resnet18x2", "2-2-4"): (
        (CONV4 + ENTRIES5 + CONV5) // 2 + 768_000,
        (CONV4 * 196 + (ENTRIES5 + CONV5) * 49) // 2 + 768_000,
    ),
    ("resnet18x2", "2-4-8"): (
        CONV4 // 2 + (ENTRIES5 + CONV5) * 3 // 4 + 896_000,
        CONV4 // 2 * 196 + (ENTRIES5 + CONV5) * 3 // 4 * 49 + 896_000,
    ),
}
WHOLE = {"alexnet": (62_378_344, 1_135_256_096), "resnet18x2": (45_693_032, 7_019_241_472)}


@pytest.mark.parametrize(("name", "setting"), DROPPED)
def test_a_balanced_split_leaves_out_what_it_does_by_hand(name, setting):
    whole, kept = balanced_split(name, setting)
    assert (whole.params, whole.macs) == WHOLE[name]
    assert (whole.params - kept.params, whole.macs - kept.macs) == DROPPED[name, setting]
    row = rows(report()["balanced"])[name, setting]
    assert row["params M"] == kept.params / 1e6 and row["GFLOPs"] == 2 * kept.macs / 1e9
    assert row["params red. %"] == pytest.approx(100 * DROPPED[name, setting][0] / whole.params)
    assert row["FLOPs red. %"] == pytest.approx(100 * DROPPED[name, setting][1] / whole.macs)


def test_the_balanced_table_starts_each_network_with_the_whole_one():
    found = [(row[0], row[1]) for row in balanced_table().rows]
    assert set(found) == {*DROPPED, ("alexnet", "whole"), ("resnet18x2", "whole")}
    assert [name for name, setting in found if setting == "whole"] == ["alexnet", "resnet18x2"]


# ---- the formats ----------------------------------------------------------------------------------------------------


@pytest.fixture
def learned(monkeypatch):
    """`summary_of` of a folder, without a training."""
    table = Table("Learned", [Column("network"), Column("error")], [["Deep", 1.5]])
    seen = []
    monkeypatch.setattr("decompk.report.splitnet.summary_of", lambda folder: seen.append(folder) or table)
    return seen


def test_the_command_prints_the_tables_in_four_formats_and_a_folders_behind_them(capsys, learned, tmp_path):
    texts = {}
    for format in ("table", "md", "csv", "json"):
        for folder in ([], [str(tmp_path)]):
            assert main(["report", "--splitnet", *folder, "--format", format]) == 0
            texts[format, bool(folder)] = capsys.readouterr().out
            if not folder:
                assert texts[format, False].rstrip("\n") == splitnet_report(format).rstrip("\n")
    assert learned == [tmp_path] * 4
    assert max(map(len, texts["table", True].splitlines())) <= 120
    for format in ("table", "md"):
        places = [texts[format, True].find(words) for words in ("Table 1 of", "Table 2 of", "Balanced", "Learned\n")]
        assert places == sorted(places) and places[0] >= 0
        assert "Learned\n" not in texts[format, False]
    assert list(json.loads(texts["json", False])) == ["table 1", "table 2", "balanced"]
    found = json.loads(texts["json", True])
    assert found["learned"]["rows"] == [{"network": "Deep", "error": 1.5}]
    parts = [list(csv.DictReader(io.StringIO(part))) for part in texts["csv", True].split("\n\n")]
    assert [len(part) for part in parts] == [11, 4, 9, 1]
    assert parts[0][2]["params M printed"] == "7.42" and parts[0][5]["params M ours"] == ""


def test_another_format_or_two_reports_at_once_are_refused(capsys):
    with pytest.raises(DecompkError, match="'xml' is no format of a report"):
        splitnet_report("xml")
    with pytest.raises(SystemExit):
        main(["report", "--splitnet", "--paper"])
    assert "not allowed with" in capsys.readouterr().err


# ---- the split points -----------------------------------------------------------------------------------------------


def test_the_splits_of_wrn_16_8_have_the_depths_of_the_supplement():
    unnamed = 2  # the first convolution and the projection of the first stage that is split keep all their weights
    depth = {"Shallow": 6, "Shallow 3": 6, "Shallow 4": 6, "Deep": 11, "Hierarchical": 11}
    for setting, expected in depth.items():
        groups, whole = split_points("wrn_16_8", setting)
        assert whole == () and len(groups) + unnamed == expected
    assert split_points("wrn_16_8", "FC") == ({"fc": 4}, ())
    assert sorted(split_points("wrn_16_8", "Hierarchical")[0].values()) == [2] * 5 + [4] * 4
    assert split_points("wrn_16_8", "Shallow 3")[0] == dict.fromkeys(split_points("wrn_16_8", "Shallow")[0], 3)


def test_the_numbers_of_a_setting_are_the_groups_of_the_supplements_layers():
    assert split_points("alexnet", "2-4-8") == ({"fc6": 2, "fc7": 4, "fc8": 8}, ())
    assert split_points("alexnet", "1-2-5") == ({"fc7": 2, "fc8": 5}, ())
    assert split_points("alexnet", "2x5") == (dict.fromkeys(("conv4", "conv5", "fc6", "fc7", "fc8"), 2), ())
    assert split_points("resnet18x2", "1-1-3") == ({"fc": 3}, ())
    groups, whole = split_points("resnet18x2", "2-4-8")
    assert sorted(groups.values()) == [2] * 5 + [4] * 5 + [8]
    assert whole == ("layers.2.0.conv1", "layers.2.0.downsample.0")
    assert split_points("resnet18x2", "1-2-2")[1] == ("layers.3.0.conv1", "layers.3.0.downsample.0")


@pytest.mark.parametrize(
    ("name", "setting", "layers"),
    [
        ("wrn_16_8", "Deep", 9),
        ("wrn_16_8", "Hierarchical", 9),
        *(("alexnet", setting, layers) for setting, layers in (("1-1-8", 1), ("2-4-8", 3), ("2x5", 5))),
        *(("resnet18x2", setting, layers) for setting, layers in (("1-1-2", 1), ("1-2-4", 6), ("2-4-8", 11))),
    ],
)
def test_split_points_name_layers_that_can_be_assigned(name, setting, layers):
    groups, whole = split_points(name, setting)
    assert len(groups) == layers and all(
        isinstance(network(name).get_submodule(path), (nn.Conv2d, nn.Linear)) for path in groups
    )
    assignment = Assignment(Nodes(network(name), models.spec(name).input_size), groups, whole)
    for path, count in groups.items():
        p, q = assignment.sides(path)
        assert (p is None) == (path in whole) and len(q) == count


def test_what_the_supplement_does_not_split_is_refused_in_one_sentence():
    with pytest.raises(
        DecompkError, match=r"^'vgg16' is no network .*; choose one of wrn_16_8, alexnet, resnet18x2\.$"
    ):
        split_points("vgg16", "FC")
    with pytest.raises(DecompkError, match=r"^'2-2-2' is no split of wrn_16_8; choose one of FC, .*, Hierarchical\.$"):
        split_points("wrn_16_8", "2-2-2")
    for wrong in ("4-2-8", "1-1-1", "0-1-2", "2-4", "2x4"):
        with pytest.raises(DecompkError, match=rf"^'{wrong}' is no split of alexnet; choose 2x5, or the groups of fc6"):
            split_points("alexnet", wrong)
    with pytest.raises(DecompkError, match=r"resnet18x2; choose the groups of conv4-1&2, conv5-1&2, fc, such as"):
        split_points("resnet18x2", "2x5")


def test_alexnets_response_norms_count_as_norms():
    layers = {layer.name: layer for layer in walk.layers(network("alexnet"), (3, 224, 224))}
    assert {name for name, layer in layers.items() if layer.kind == "norm"} == {"norm1", "norm2"}
    # a square, five terms of a mean, α, k, the power and the quotient
    assert layers["norm1"].elementwise_flops == 10 * 96 * 55 * 55
    assert layers["norm1"].macs == layers["norm1"].params == 0
