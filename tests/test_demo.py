"""The demo runs as a user runs it, only shorter."""

import json

from decompk.cli import main


def test_the_demo_trains_composes_and_draws(tmp_path, capsys):
    assert main(["demo", "--epochs", "2,1", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "from random weights" in shown and "member 3" in shown
    result = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert len(result["members"]["accuracy"][-1]) == 4 and len(result["random"]["accuracy"]) == 3
    assert result["theorem_2_2"]["violation"] < 1e-9 and result["theorem_2_2"]["lost"] == 0
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    flops = result["training_flops"]
    assert flops["members"] / 2 < flops["composed"] / 3  # an epoch of all four members costs far less than a global one


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--epochs", "1,1", "--out", str(tmp_path / "file")]) == 2
    assert "Traceback" not in capsys.readouterr().err
