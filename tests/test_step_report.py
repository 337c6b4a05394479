"""What a training step launches and moves: how it is counted, and that it stays under what it was."""
# ruff: noqa: E402 (the tools stand beside the package)

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools")]

import launched
import step_report
from launched import Onlooker, Row, rows_of
from layers import Case
from timing import HostTimer

import decompk
from decompk.kernels.conv import model
from decompk.kernels.device import interpreted
from decompk.kernels.launch import recording

needs_interpreter = pytest.mark.skipif(not interpreted(), reason="takes Triton's way on CPU tensors")

# (launches, GB) that a fused step of 128 images may come to, bf16 with SGD: no more than it was. bench/results/steps.md
# is made by `python tools/step_report.py --table --before bench/results/steps-before.json`.
BOUNDS = {
    Case("resnet50", 4, 140): (420, 13.95),
    Case("resnet50", (2, 4), 96): (420, 6.5),
    Case("resnet50", 16, 70): (420, 4.18),
    Case("vgg16", 4, 112): (163, 11.3),
    Case("resnet32", 4, 16): (262, 1.152),
}
IN_TESTS = Case("resnet32", 4, 16)  # the others take too long to build


# ---- the report -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told():
    """The JSON of a fused ResNet32's step; with one run for the host's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_report, "HOST_RUNS", 1)
        return json.loads(json.dumps(step_report.report(step_report.Setting(IN_TESTS, fused=True), every=True)))


@needs_interpreter
def test_a_fused_step_stays_under_its_bounds(told):
    launches, gigabytes = BOUNDS[IN_TESTS]
    assert told["launches"] <= launches
    assert told["ideal_bytes"] <= told["bytes"] <= gigabytes * 1e9


@pytest.mark.parametrize("case", BOUNDS, ids=lambda case: case.title)
def test_the_page_says_no_more_of_fused_steps_than_their_bounds(case):
    page = (ROOT / "bench" / "results" / "steps.md").read_text()
    title = step_report.Setting(case, fused=True).title
    row = next(line for line in page.splitlines() if line.startswith(f"| {title} |"))
    launches, gigabytes = (float(cell.split("→")[-1]) for cell in row.split("|")[2:4])
    assert launches <= BOUNDS[case][0] and gigabytes <= BOUNDS[case][1]


@needs_interpreter
def test_what_is_listed_sums_to_what_is_told(told):
    for rows in (told["rows"], told["every"]):
        for total in ("launches", "bytes"):
            assert sum(r[total] for r in rows) == told[total]
        assert sum(r["model_ms"] for r in rows) == pytest.approx(told["model_ms"])
    assert len(told["largest"]) == 10 and told["measured"] is None and told["host_ms"] > 0
    assert told["launches"] * launched.LAUNCH_MS < told["model_ms"]


@needs_interpreter
def test_a_report_is_read_as_a_table(told):
    text = step_report.text(told)
    assert "resnet32 K=4@16, fused, 128 images, bf16, sgd" in text and "not measured" in text
    assert f"launches  {told['launches']}" in text and "_fused_sgd_" in text and "every launch" in text


@pytest.mark.parametrize(
    ("case", "gigabytes"),
    [(Case("resnet50", 16, 70), 2.62), (Case("resnet32", 4, 16), 0.722)],
)
def test_the_compulsory_bytes_are_those_of_the_networks(case, gigabytes):
    found = step_report.ideal_bytes(step_report.Setting(case))
    assert found / 1e9 == pytest.approx(gigabytes, rel=2e-3)
    assert step_report.ideal_bytes(step_report.Setting(case, dtype="float32")) == 2 * found


@needs_interpreter
def test_the_command_prints_json(capsys, monkeypatch):
    monkeypatch.setattr(step_report, "HOST_RUNS", 1)
    which = "--model resnet8 --partitions 1,2 --crop 16 --batch 2 --optimizer adam --dtype float32 --format json"
    assert step_report.main(which.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= {"launches", "bytes", "ideal_bytes", "optimizer_bytes", "host_ms", "model_ms", "rows"}
    assert any(r["name"] == "_fused_adam_" for r in found["rows"])


def test_a_network_of_ones_own_is_reported_by_its_callable(capsys):
    own = "--model decompk.models:cifar_resnet8 --partitions 4 --crop 16 --image 32 --batch 4 --fused --format json"
    assert step_report.main(own.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["launches"] < 120 and found["case"]["model"] == "decompk.models:cifar_resnet8"


def test_what_a_gpu_measures_stands_beside_what_is_counted(monkeypatch):
    events = [("conv", 500.0), ("Memcpy DtoD", 20.0), ("conv", 400.0)]
    monkeypatch.setattr(step_report.steps, "launches", lambda step: (step(), step_report.steps.tally(events))[1])
    monkeypatch.setattr(step_report, "Timer", lambda device: HostTimer())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    setting = step_report.Setting(Case("resnet8", (1, 2), 16), batch=2, dtype="float32")
    subject = step_report.Subject(setting, torch.device("cpu"))
    measured = subject.measured()
    assert measured["launches"] == 3 and measured["host_ms"] > 0 and measured["eager_ms"] > 0
    assert "graph_ms" not in measured and "not on a GPU" in measured["not_done"]["graph"]
    sizes = {"bytes": 4e9, "ideal_bytes": 2e9, "optimizer_bytes": 1e6, "model_ms": 2.0, "ideal_ms": 1.0}
    about = {"title": "a", "optimizer": "sgd", "commit": "c", "torch": "2", "rows": [], "largest": [], "launches": 9}
    text = step_report.text({**about, **sizes, "host_ms": 1.0, "measured": {**measured, "graph_ms": 1.5}})
    for line in ("measured on a GPU", "3: 2 kernels, 1 copies, 0 fills", "graph     1.500 ms", "no CUDA graph: the"):
        assert line in text


def test_an_optimizer_moves_each_state_twice_and_a_gradient_once():
    net = torch.nn.Linear(3, 5)
    assert [step_report.optimizer_bytes(net, name) for name in ("sgd", "adam")] == [5 * 20 * 4, 7 * 20 * 4]


def test_a_page_shows_what_was_before_an_arrow(tmp_path):
    step = {"title": "a", "launches": 9, "bytes": 4e9, "ideal_bytes": 2e9, "optimizer_bytes": 1, "measured": None}
    step |= {"host_ms": 3.0, "model_ms": 2.0, "ideal_ms": 1.0}
    before, now = ({"commit": name, "torch": "2", "steps": [step]} for name in ("old", "new"))
    (tmp_path / "before.json").write_text(json.dumps(before))
    page = step_report.markdown(now, step_report.earlier(tmp_path / "before.json"))
    assert "| a | 9 → 9 | 4.00 → 4.00 | 2.00 → 2.00 | 2.00 → 2.00 | 3.0 → 3.0 | 2.00 | 1.00 |" in page
    assert "commit old → new" in page and "→" not in step_report.markdown(now, None)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--model resnet3 --partitions 4 --crop 16", "no model is called 'resnet3'"),
        ("--model resnet32 --partitions 4 --crop 160", "a crop height of 160 does not fit 32 pixels"),
        ("--model resnet32 --partitions 4x --crop 16", "'4x' is neither a number of partitions nor rows,columns"),
        ("--model resnet32 --partitions 4 --crop 0", "'0' is not a whole number of at least 1"),
        ("--model resnet32 --crop 16", "--model, --partitions and --crop say which step"),
        ("--table --before nowhere.json", "nowhere.json cannot be read: No such file or directory"),
        ("--model resnet32 --partitions 4 --crop 16 --before nowhere.json", "--before is of a --table"),
        ("--table --model resnet32", "--table has its own steps"),
        (f"--table --before {ROOT / 'pyproject.toml'}", "is no table of steps"),
    ],
)
def test_what_cannot_be_reported_is_a_sentence_and_exit_code_2(arguments, sentence, capsys):
    try:
        code = step_report.main(arguments.split())
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and sentence in capsys.readouterr().err


# ---- the count ------------------------------------------------------------------------------------------------------


def noted(run):
    """The Rows of torch's operators in `run`, and its result."""
    result = []
    rows = rows_of(lambda: result.append(run()))
    return rows, result[0]


def test_an_operator_is_a_launch_that_reads_its_operands_and_writes_its_result():
    a, b = torch.ones(4, 8), torch.ones(8, dtype=torch.bfloat16)
    rows, y = noted(lambda: a + b)
    assert rows == [Row("add", 1, 4 * 32 + 2 * 8 + 4 * 32, ("4×8 float32", "8 bfloat16", "4×8 float32"))]
    assert y.shape == (4, 8) and y.dtype == torch.float32


def test_nothing_is_computed_and_what_is_changed_in_place_is_read_and_written():
    x = torch.ones(100)
    rows, y = noted(lambda: x.add_(1).mul_(2))
    assert [(r.name, r.bytes) for r in rows] == [("add_", 800), ("mul_", 800)]
    assert y is x and torch.equal(x, torch.ones(100))
    rows, _ = noted(lambda: (x.zero_(), x.copy_(torch.ones(100)), x.fill_(3.0)))
    assert [(r.name, r.bytes) for r in rows] == [("zero_", 400), ("ones", 400), ("copy_", 800), ("fill_", 400)]
    assert torch.equal(x, torch.ones(100))
    rows, y = noted(lambda: torch.add(x, 1, out=torch.empty(100)))
    assert [(r.name, r.bytes) for r in rows] == [("add", 800)] and y.shape == (100,)


def test_views_empty_tensors_and_memory_cost_nothing():
    x = torch.ones(2, 3, 4)

    def run():
        x.view(6, 4).t()[1:].unflatten(0, (1, 3)).detach().expand(2, 1, 3, 6)
        x.new_empty(5), torch.empty(3), torch.empty_like(x), x.split(1), x.flatten()
        return x[:, :0] + 1

    rows, y = noted(run)
    assert rows == [] and y.shape == (2, 0, 4)


def test_what_is_expanded_is_read_once_and_a_shape_alone_not_at_all():
    x = torch.ones(1, 8).expand(1000, 8)
    rows, _ = noted(lambda: (x.sum(0), torch.zeros_like(x), x.new_ones(4)))
    assert [(r.name, r.bytes) for r in rows] == [("sum", 64), ("zeros_like", 32000), ("new_ones", 16)]


def test_results_lie_as_the_operator_would_lay_them():
    x = torch.ones(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(4, 3, 3, 3)

    def run():
        return x.relu(), x.to(torch.bfloat16), torch.nn.functional.max_pool2d(x, 2), x.mean((2, 3)), x.argmax(1)

    rows, found = noted(run)
    assert len(rows) == 5
    for y, real in zip(found, run(), strict=True):
        assert (y.shape, y.stride(), y.dtype) == (real.shape, real.stride(), real.dtype)
    with recording(Onlooker()):
        assert torch.nn.functional.conv2d(x, weight).shape == (2, 4, 3, 3)


def test_a_convolutions_backward_is_a_kernel_for_each_gradient():
    x, weight = torch.ones(2, 4, 6, 6, requires_grad=True), torch.ones(8, 4, 1, 1, requires_grad=True)
    y = torch.nn.functional.conv2d(x, weight)
    dy = torch.ones_like(y)
    rows, (dx, dw) = noted(lambda: torch.autograd.grad(y, (x, weight), dy))
    sides = 2 * (4 * dy.numel()) + 4 * weight.numel() + 4 * x.numel()
    assert [(r.name, r.launches, r.bytes) for r in rows] == [
        ("convolution_backward", 2, sides + 4 * x.numel() + 4 * weight.numel())
    ]
    assert dx.shape == x.shape and dw.shape == weight.shape


@pytest.mark.parametrize(
    ("sizes", "most", "kernels"),
    [
        ([1] * 110, 110, 1),
        ([1] * 111, 110, 2),
        ([65536 * 320], 110, 1),
        ([65536 * 320 + 1], 110, 2),
        ([1] * 47 + [65536 * 2, 1], 48, 2),
        ([0] * 500, 48, 0),
        ([0] * 500 + [1], 48, 1),
    ],
)
def test_a_call_on_many_tensors_is_as_many_kernels_as_torch_cuts_it_into(sizes, most, kernels):
    assert launched._chunked(sizes, most) == kernels


def test_foreach_and_fused_calls_move_every_tensor_of_their_lists():
    lists = [[torch.ones(10) for _ in range(50)] for _ in range(4)]
    steps = [torch.ones(()) for _ in range(50)]

    def run():
        torch._foreach_add_(lists[0], 1)
        torch._fused_sgd_(*lists[:3], weight_decay=0, momentum=0.9, lr=0.1, dampening=0, nesterov=False,
                          maximize=False, is_first_step=False)  # fmt: skip
        torch._fused_adam_(*lists, [], steps, lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0, eps=1e-8,
                           amsgrad=False, maximize=False)  # fmt: skip

    rows, _ = noted(run)
    each = 50 * 40
    assert [(r.name, r.launches) for r in rows] == [("_foreach_add_", 1), ("_fused_sgd_", 2), ("_fused_adam_", 2)]
    assert [r.bytes for r in rows[:2]] == [2 * each, 5 * each]
    assert 7 * each <= rows[2].bytes <= 7 * each + 2 * 50 * 4
    assert all(torch.equal(t, torch.ones(10)) for t in lists[0]) and rows[1].tensors == ("250 tensors",)


@needs_interpreter
def test_operators_inside_our_own_are_counted_with_the_kernels_between_them():
    x = torch.ones(2, 3, 4, 6, 6, requires_grad=True)
    weight, bias = torch.ones(2, 4, 4, 3, 3, requires_grad=True), torch.ones(2, 4, requires_grad=True)

    def run():
        y = decompk.ops.grouped_conv2d(x, weight, bias, padding=1)
        return torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))

    with decompk.backend("triton"):
        rows, found = noted(run)
    names = [r.name for r in rows]
    assert "sum" in names  # the bias's gradient
    assert sum("conv" in name for name in names) == 2 and any("wgrad" in name for name in names)
    assert [g.shape for g in found] == [x.shape, weight.shape, bias.shape]


def test_a_launch_is_modelled_by_its_bytes_in_memory_or_in_l2():
    assert Row("a", 1, 0).ms == launched.LAUNCH_MS == model.LAUNCH_MS
    assert Row("a", 1, 28_000_000).ms == pytest.approx(0.0125)
    assert Row("a", 1, 9_000_000).ms == pytest.approx(0.0045)
    assert Row("a", 4, 36_000_000).ms == pytest.approx(4 * 0.0045)  # each of them in L2
    assert math.isclose(sum(r.ms for r in [Row("a", 1, 9_000_000)] * 4), Row("a", 4, 36_000_000).ms)
