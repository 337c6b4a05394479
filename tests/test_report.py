import csv
import io
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from decompk import models
from decompk.cost import walk
from decompk.cost.figures import total
from decompk.crops import make_crops
from decompk.errors import DecompkError
from decompk.report.decomposition import report
from decompk.report.paper import paper_cells, paper_report, vgg_table
from decompk.report.table import FORMATS, Column, Table, decimals

# (table, item): printed digits and verdict; the 43 other cells are exact.
NOT_EXACT = {
    ("2.2", "VGG16 params M"): ("138.35", "exact (truncated)"),
    ("2.2", "VGG16-sub params M"): ("4.17", "exact (truncated)"),
    ("2.2", "ResNet50-sub GFLOPs"): ("0.13", "unexplained"),
    ("2.2", "ResNet101-sub GFLOPs"): ("0.25", "unexplained"),
    ("3.1", "ResNet110 params M"): ("27.62", "exact (truncated)"),
    ("3.4", "ResNet50 SNet-16 GFLOPs"): ("0.0056", "close"),
    ("3.4", "ResNet101 SNet-16 GFLOPs"): ("0.0096", "close"),
    ("SN1", "Shallow G=2 params red. %"): ("32.54", "close"),
    ("SN1", "Shallow G=2 params M"): ("7.42", "close"),
    ("SN1", "Deep G=2 params red. %"): ("46.39", "close"),
    ("SN1", "Hier 2->4 params red. %"): ("62.58", "close"),
    ("SN2", "Shallow G=2 params red. %"): ("32.44", "close"),
    ("SN2", "Shallow G=3 params red. %"): ("43.09", "close"),
    ("SN2", "Shallow G=4 params red. %"): ("48.66", "close"),
}
# How an independent recount names the verdicts.
RECOUNT = {"EXACT": "exact", "EXACT(trunc)": "exact (truncated)", "CLOSE": "close", "UNEXPLAINED": "unexplained"}
STUDY = Path(__file__).parents[2] / "shared" / "paper_tables.json"


cells = cache(paper_cells)


def decomposition(name, K=4, pixels=64, crop=None, member=None, notes=(), **options):
    """A stand-in for decompk.decompose's result: the global network and one member, by hand."""
    size = (3, pixels, pixels)
    crops = make_crops(size[1:], K, crop)
    with torch.device("meta"):
        model = models.build(name, input_size=size, **options)
        member = models.build(name, **({"input_size": (3, *crops[0].size)} | member))
    return SimpleNamespace(
        model=model,
        input_size=size,
        member_size=(3, *crops[0].size),
        crops=crops,
        K=K,
        notes=list(notes),
        member_skeleton=lambda: member,
    )


@cache
def vgg_report():
    member = {"width": 4, "fc": 16}
    return report(decomposition("vgg16", width=16, fc=64, member=member, notes=["one remark."]))


def test_every_analytic_cell_of_the_papers_is_computed_once():
    tables = [cell["table"] for cell in cells()]
    assert {table: tables.count(table) for table in tables} == {"2.2": 12, "3.1": 15, "3.4": 16, "SN1": 16, "SN2": 3}
    assert len({(cell["table"], cell["item"]) for cell in cells()}) == 62
    assert all(list(c) == ["table", "item", "printed", "ours", "convention", "verdict"] for c in cells())


def test_every_cell_has_its_verdict_and_exact_cells_round_to_their_print():
    for cell in cells():
        printed, verdict = NOT_EXACT.get((cell["table"], cell["item"]), (cell["printed"], "exact"))
        assert (cell["printed"], cell["verdict"]) == (printed, verdict), cell
        digits = len(printed.partition(".")[2])
        assert (f"{cell['ours']:.{digits}f}" == printed) == (verdict == "exact"), cell
        assert (
            abs(cell["ours"] - float(printed)) <= 0.05 * float(printed) or verdict == "unexplained" or printed == "0.0"
        )


def test_each_table_is_counted_under_one_convention():
    flops = {(c["table"], c["convention"].partition(" at ")[0]) for c in cells() if "FLOPs" in c["item"]}
    assert flops == {
        ("2.2", "paper-profiler w=5"),
        ("3.1", "paper-profiler w=5 without adds and pooling"),
        ("3.4", "paper-profiler w=2"),
        ("SN1", "2mac"),
    }
    four = {cell["table"] for cell in cells() if "4 numbers a BN channel" in cell["convention"]}
    assert four == {"3.1", "3.4"}


def test_an_unexplained_cell_names_the_conventions_that_hit_it_alone():
    unexplained = {c["item"]: c["convention"] for c in cells() if c["verdict"] == "unexplained"}
    assert unexplained["ResNet101-sub GFLOPs"].endswith("this cell is hit by paper-profiler w=2")
    assert unexplained["ResNet50-sub GFLOPs"].endswith("hit by 2mac, eq2.10, paper-profiler w=2")


@pytest.mark.skipif(not STUDY.exists(), reason="the independent recount is not beside this checkout")
def test_every_cell_agrees_with_the_independent_recount():
    study = json.loads(STUDY.read_text())["analytic"]
    for cell, theirs in zip(cells(), study, strict=True):
        assert (cell["table"], cell["item"], cell["printed"]) == (theirs["table"], theirs["item"], theirs["printed"])
        assert cell["ours"] == pytest.approx(theirs["recount"], rel=1e-6)
        assert cell["verdict"] == RECOUNT[theirs["verdict"]]


def test_table_2_1_agrees_in_all_sixteen_layers():
    rows = vgg_table().objects()
    assert len(rows) == 16
    assert {row["verdict"] for row in rows} == {"exact"}
    assert rows[13]["kernel sub-net"] == "3×3×128×1024"


def test_the_paper_report_is_a_list_of_cells_in_json_and_adds_table_2_1_for_readers():
    assert json.loads(paper_report("json")) == cells()
    assert len(list(csv.DictReader(io.StringIO(paper_report("csv"))))) == 62
    for format in ("table", "md"):
        text = paper_report(format)
        assert "62 cells: 48 exact, 3 exact (truncated), 2 unexplained, 9 close" in text
        assert text.index("Table 2.1") > text.index("SN2")
    assert max(map(len, paper_report().splitlines())) <= 120


def test_a_reports_totals_are_those_of_the_two_networks_and_k_members():
    r = vgg_report()
    whole = total(walk.layers(models.vgg16(width=16, fc=64, input_size=(3, 64, 64)), (3, 64, 64)))
    member = total(walk.layers(models.vgg16(width=4, fc=16, input_size=(3, 32, 32)), (3, 32, 32)))
    assert r.totals["global"] == whole.figures()
    assert r.totals["member"] == member.figures()
    assert r.totals["all"]["forward_bytes"] == 4 * member.forward_bytes()
    assert r.totals["ratio"]["params"] == member.params / whole.params
    assert r.totals["paper"]["flops_2mac"] == 1 / 64


def test_a_layers_ratio_stands_beside_the_papers():
    layers = vgg_report().layers
    assert layers["features.2"]["ratio"]["macs"] == layers["features.2"]["paper"]["macs"] == 1 / 64
    assert layers["features.0"]["paper"]["params"] == 1 / 4
    assert layers["features.1"]["paper"]["params"] is None
    assert layers["classifier.0"]["ratio"]["macs"] == layers["classifier.0"]["paper"]["macs"] == 1 / 64
    assert layers["classifier.6"]["ratio"]["activations"] == layers["classifier.6"]["paper"]["activations"] == 1


def test_useful_flops_of_the_composed_network_are_its_members_on_the_full_image():
    r = report(decomposition("resnet50", width=16, member={"width": 4}))
    on_full_image = total(walk.layers(models.resnet50(width=4), (3, 64, 64)))
    assert r.composed["useful_flops"] == 4 * on_full_image.flops()
    assert r.composed["dense_flops"] == r.totals["global"]["flops_2mac"]
    assert sum(r.composed.values()) == 2 * r.composed["dense_flops"]


def test_an_adapted_first_fc_keeps_its_crops_kernel_in_the_composed_network():
    r = vgg_report()
    member, whole = r.layers["classifier.0"]["member"], r.layers["classifier.0"]["global"]
    assert whole["macs"] == 64 * member["macs"]
    convs = walk.layers(models.vgg16(width=4, fc=16, input_size=(3, 64, 64)), (3, 64, 64))
    useful = sum(layer.macs for layer in convs if layer.kind == "conv")
    useful += sum(r.layers[f"classifier.{i}"]["member"]["macs"] for i in (0, 3, 6))
    assert r.composed["useful_flops"] == 2 * 4 * useful


def test_the_divided_last_layer_of_an_auto_encoder_is_held_to_the_ratio_of_any_other():
    net, member = (nn.Sequential(nn.Linear(n, n // 2), nn.ReLU(), nn.Linear(n // 2, n)) for n in (16, 4))
    sizes = {"input_size": (1, 16), "member_size": (1, 4), "crops": make_crops((16,), 4)}
    sides = report(SimpleNamespace(model=net, K=4, notes=[], member_skeleton=lambda: member, **sizes)).layers["2"]
    assert sides["ratio"]["macs"] == sides["paper"]["macs"] == 1 / 16


def test_bytes_scale_with_the_batch_but_weights_do_not():
    one = decomposition("resnet32", pixels=32, width=8, member={"width": 2})
    small, large = report(one, element_size=2), report(one, element_size=2, batch=10)
    weights = 2 * small.totals["global"]["params"]
    assert large.totals["global"]["forward_bytes"] - weights == 10 * (small.totals["global"]["forward_bytes"] - weights)


def test_the_json_report_is_one_object_of_three_tables_with_every_layer():
    r = vgg_report()
    tables = json.loads(r.render("json"))
    assert list(tables) == ["layers", "totals", "composed"]
    rows = {row["layer"]: row for row in tables["layers"]["rows"]}
    assert list(rows) == list(r.layers)
    assert rows["features.2"]["ratio macs"] == 1 / 64
    assert tables["layers"]["notes"] == ["one remark."]
    assert {row["figure"]: row["global"] for row in tables["totals"]["rows"]} == r.totals["global"]


def test_the_csv_report_has_a_line_a_layer_and_a_last_one_of_totals():
    r = vgg_report()
    rows = list(csv.DictReader(io.StringIO(r.render("csv"))))
    assert [row["layer"] for row in rows] == [*r.layers, "total"]
    assert int(rows[-1]["global macs"]) == r.totals["global"]["macs"]
    assert rows[-1]["paper statistics"] == ""


def test_the_text_report_fits_120_columns_and_shows_ratio_power_and_notes():
    text = str(vgg_report())
    assert max(map(len, text.splitlines())) <= 120
    line = next(line for line in text.splitlines() if line.startswith("features.2 "))
    assert "1/64" in line
    assert "1/K³=1/64" in line
    assert "one remark." in text
    assert "zero_block_flops" in text


def test_a_long_network_in_many_parts_still_fits_120_columns():
    r = report(decomposition("resnet50", K=16, pixels=224, member={"width": 4}))
    lines = str(r).splitlines()
    assert max(map(len, lines)) <= 120
    assert any(line.startswith("layer3.0.downsample.0 ") for line in lines)


EXAMPLE = Table(
    "A title",
    [Column("name"), Column("size\nMB", decimals(1)), Column("share")],
    [["a|b", 1234.5, 0.5], ["long name", None, None]],
    ["a note"],
)


def test_text_is_aligned_with_numbers_to_the_right():
    assert EXAMPLE.to_text().splitlines() == [
        "A title",
        "",
        "              size",
        "name            MB  share",
        "---------  -------  -----",
        "a|b        1,234.5    0.5",
        "long name        -      -",
        "",
        "- a note",
    ]


def test_markdown_has_a_header_a_rule_and_escaped_pipes():
    assert EXAMPLE.to_markdown().splitlines() == [
        "### A title",
        "",
        "| name | size MB | share |",
        "| --- | ---: | ---: |",
        r"| a\|b | 1,234.5 | 0.5 |",
        "| long name | - | - |",
        "",
        "- a note",
    ]


def test_json_and_csv_hold_the_values_themselves():
    assert json.loads(EXAMPLE.to_json()) == {
        "title": "A title",
        "columns": ["name", "size MB", "share"],
        "rows": [
            {"name": "a|b", "size MB": 1234.5, "share": 0.5},
            {"name": "long name", "size MB": None, "share": None},
        ],
        "notes": ["a note"],
    }
    assert EXAMPLE.to_csv() == "name,size MB,share\na|b,1234.5,0.5\nlong name,,\n"


def test_text_that_does_not_fit_wraps_between_words_and_elides_within_one():
    table = Table("", [Column("text"), Column("n")], [["several words that wrap", 1], ["averyverylongname", 22]])
    lines = table.to_text(width=18).splitlines()[4:]
    assert lines == ["several words    1", "that wrap", "averyve…ongname 22"]


def test_render_knows_its_formats_and_refuses_others():
    assert [EXAMPLE.render(format) for format in FORMATS] == [
        EXAMPLE.to_text(),
        EXAMPLE.to_json(),
        EXAMPLE.to_csv(),
        EXAMPLE.to_markdown(),
    ]
    for render in (EXAMPLE.render, vgg_report().render, paper_report):
        with pytest.raises(
            DecompkError, match=r"^'xml' is no format of a report; choose one of table, json, csv, md\.$"
        ):
            render("xml")
