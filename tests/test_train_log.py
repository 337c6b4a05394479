"""What a training shows while it runs."""

import io
import json
import sys

import pytest

from decompk.errors import DecompkError
from decompk.train.log import Log


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_there_is_one_line_with_epoch_loss_accuracy_speed_and_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    log = Log(tmp_path)
    log.begin("seed 0 members", 1000, done=200)
    log.advance(300)
    log.tell(3, 10, [0.5, 0.25], [91.0, 93.5], False)
    log.say("a sentence of its own")
    log.end()
    shown = sys.stderr.getvalue()
    last = shown.split("\r")[-1]
    assert "seed 0 members" in last and "500/1.00k" in last and "img/s" in last
    assert "epoch 3/10, loss 0.250–0.500, accuracy 91.0–93.5 %" in last
    assert "a sentence of its own\n" in shown


def test_elsewhere_plain_lines_come_now_and_then_and_always_at_the_end(tmp_path, capsys):
    log = Log(tmp_path)
    log.begin("seed 0 global", 1000)
    for i in range(20):
        log.advance(50)
        log.tell(1, 2, [0.5], [91.0], i == 19)
    log.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "\r" not in "".join(lines)
    assert lines[1].startswith("seed 0 global: epoch 1/2, loss 0.500, accuracy 91.0 %, ") and "0:00 left" in lines[1]
    assert "images/s" in lines[0]


def test_metrics_are_json_lines_that_go_on_behind_a_checkpoints_position(tmp_path, capsys):
    log = Log(tmp_path)
    where = {"seed": 0, "phase": "members", "step": 1}
    log.write({**where, "loss": [0.5, float("nan")]})
    position = log.position()
    log.write({**where, "step": 2, "loss": [0.4, 0.3]})
    log.close()
    log = Log(tmp_path)
    log.rewind(position)
    log.write({**where, "step": 2, "loss": [0.1, 0.2]})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [[0.5, None], [0.1, 0.2]]


def test_other_ranks_are_silent_and_write_a_file_of_their_own(tmp_path, capsys):
    log = Log(tmp_path, rank=2)
    log.begin("members", 10)
    log.say("nobody hears this")
    log.tell(1, 1, [0.5], [91.0], True)
    log.write({"seed": 0, "phase": "members", "step": 1})
    log.close()
    assert capsys.readouterr().err == "" and (tmp_path / "metrics-rank2.jsonl").read_text().count("\n") == 1


def test_tensorboard_gets_each_number_under_its_seed_phase_and_member(tmp_path, monkeypatch):
    written = {}

    class Writer:
        def __init__(self, folder):
            written["folder"] = folder

        def add_scalar(self, name, value, step):
            written[name] = (value, step)

        def close(self):
            written["closed"] = True

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = Log(tmp_path, tensorboard=True)
    log.write({"seed": 3, "phase": "members", "step": 7, "epoch": 1, "loss": [0.5, 0.25], "seconds": 2.0, "top5": None})
    log.close()
    assert written.pop("folder").endswith("tensorboard") and written.pop("closed")
    assert written == {
        "members/seed3/loss/0": (0.5, 7),
        "members/seed3/loss/1": (0.25, 7),
        "members/seed3/seconds": (2.0, 7),
    }


def test_without_the_package_tensorboard_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(DecompkError, match=r"--tensorboard needs the package tensorboard: pip install tensorboard\."):
        Log(tmp_path, tensorboard=True)
