"""The groups of a split network on several processes compute and train as one process does: gloo on a CPU."""

import json

import pytest
import torch
from helpers import save_digits
from processes import run_ranks, torchrun
from torch import nn

from decompk import models
from decompk.cli import main
from decompk.errors import DecompkError, UnsupportedOperation
from decompk.splitnet import Assignment, Nodes, Parallel, split, split_points
from decompk.splitnet.run import deal
from decompk.train.ranks import Ranks, start, stop

SIZE = (1, 16, 16)
WRN = {"Deep": 2, "Hierarchical": 2, "FC": 4}


def made(case, overlap):
    """A split network in float64: groups dealt out, and with `overlap` a third of the nodes in all of them."""
    torch.manual_seed(0)
    if case in WRN:
        net, groups = models.wrn_16_8(10, SIZE, 2), split_points("wrn_16_8", case)[0]
    else:
        net = models.vgg8(10, SIZE, 8, 32)
        last = [*Nodes(net, SIZE).layers][-4:]
        groups = dict.fromkeys(last if case == "vgg8" else last[:-1], 4)
    net.double()
    assignment = Assignment(Nodes(net, SIZE), groups)
    deal(assignment, 0)
    if overlap:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for level in assignment.levels:
                values = getattr(assignment, f"of_{level}")
                values.copy_(torch.where(torch.rand(values.shape[1], generator=generator) < 0.3, 0.0, values))
    return split(net, assignment, 0.1)


CASES = {  # by processes: what is split, with overlap or without, and the optimizer
    2: [
        ("Deep", False, "SGD"),
        ("Deep", True, "Adam"),
        ("Hierarchical", True, "SGD"),
        ("FC", False, "Adam"),
        ("vgg8", True, "SGD"),
        ("vgg8, head whole", False, "Adam"),
    ],
    3: [("FC", True, "Adam"), ("vgg8", False, "SGD"), ("vgg8, head whole", True, "Adam")],
}


def trained(net, optimizer):
    """Three steps; the outputs before them and, in eval mode, after."""
    x = torch.randn(8, *SIZE, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    before = net(x).detach()
    optimizer = optimizer(net.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), torch.arange(8) % 10).backward()
        optimizer.step()
    after = net.eval()(x).detach()
    return before, after


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, 1e-3),
}


def compare(path):
    ranks, found = start("cpu"), []
    for case, overlap, name in CASES[ranks.size]:
        result, alone, optimizer = made(case, overlap), made(case, overlap), OPTIMIZERS[name]
        parallel = Parallel(result, ranks)
        mine = sum(p.numel() for p in parallel.parameters())
        ours, theirs = trained(parallel, optimizer), trained(alone.fast(), optimizer)
        net, whole = parallel.gathered().state_dict(), alone.dense.state_dict()
        apart = max(((net[key] - value).abs().max() / (1 + value.abs().max())).item() for key, value in whole.items())
        outputs = [(a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)]
        found.append([case, overlap, max(outputs), apart, ranks.from_all(mine)])
    if ranks.first:
        path.write_text(json.dumps(found))
    stop(ranks)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_train_what_one_would(tmp_path, processes):
    run_ranks(processes, tmp_path, compare, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == len(CASES[processes])
    for case, overlap, outputs, weights, parameters in found:
        assert outputs < 1e-9 and weights < 1e-9, (case, overlap)
        whole = sum(p.numel() for p in made(case, overlap).dense.parameters())
        assert case == "FC" or max(parameters) < 0.75 * whole, (case, overlap, parameters)


def test_one_process_is_the_network_itself():
    result = made("Hierarchical", True)
    one = Parallel(result, Ranks(torch.device("cpu"))).eval()
    x = torch.randn(3, *SIZE, dtype=torch.double)
    assert torch.equal(one(x).argmax(1), result.dense.eval()(x).argmax(1))
    assert (one(x) - result.dense(x)).abs().max() < 1e-12
    before = {name: value.clone() for name, value in result.dense.state_dict().items()}
    after = one.gathered().state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_cannot_run_apart_is_refused():
    with pytest.raises(DecompkError, match="2 groups cannot be dealt out to 3 processes"):
        Parallel(made("Deep", False), Ranks(torch.device("cpu"), 0, 3))

    def whole(groups, net):
        net.double()
        assignment = Assignment(Nodes(net, SIZE), groups)
        deal(assignment, 0)
        return split(net, assignment)

    wrn = models.wrn_16_8(10, SIZE, 2)
    for groups in ({"layer2.1.conv1": 2}, {"layer3.0.conv2": 2, "layer3.1.conv2": 2, "fc": 2}):
        with pytest.raises(UnsupportedOperation, match="reads all groups"):
            Parallel(whole(groups, wrn), Ranks(torch.device("cpu"), 0, 2))
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 14), nn.Flatten(), nn.Softmax(1))
    with pytest.raises(UnsupportedOperation, match="one last layer"):
        Parallel(whole({"2": 2}, net), Ranks(torch.device("cpu"), 0, 2))


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):  # what is handed over has a row for every step of every sample
        y = torch.relu(self.a(x)).flatten(0, 1)
        return self.c(torch.relu(self.b(y)))


def look_across():
    torch.manual_seed(0)
    ranks = start("cpu")
    for norm in (nn.LayerNorm(16), nn.GroupNorm(1, 16)):
        net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), norm, nn.ReLU(), nn.Linear(16, 4)).double()
        assignment = Assignment(Nodes(net, (5,)), {"2": 2, "5": 2})
        deal(assignment, 0)
        with pytest.raises(UnsupportedOperation, match="looks across channels"):
            Parallel(split(net, assignment), ranks)
    result = made("Deep", False)
    result.dense.float()
    parallel, x = Parallel(result, ranks).eval(), torch.randn(4, *SIZE)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        away = (parallel(x) - result.dense.eval()(x)).abs().max() / result.dense(x).abs().max()
    net = Steps().double()
    assignment = Assignment(Nodes(net, (7, 5)), {"b": 2, "c": 2}, ("b",))
    deal(assignment, 0)
    steps = Parallel(split(net, assignment), ranks)(torch.randn(3, 7, 5, dtype=torch.double))
    if ranks.first:  # only there is the output
        assert away.item() < 0.05
        assert steps.shape == (21, 4)
    torch.distributed.barrier()  # who has its sum may not close the connection while the other still reads
    stop(ranks)


def test_what_looks_across_groups_is_refused_and_what_is_handed_over_has_any_dtype_and_length(tmp_path):
    run_ranks(2, tmp_path, look_across)


def test_the_command_runs_groups_on_two_processes_as_on_one(tmp_path, capsys):
    digits = save_digits(tmp_path / "digits.npz", 300, 100)
    command = ["split", "--width", "1", "--epochs", "1,1,1", "--seeds", "0", "--device", "cpu"]
    command += ["--model", "wrn_16_8", "--data", digits, "--pixels", "16"]
    command += ["--variants", "dense,Deep random,Shallow overlap", "--out"]
    runs = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        if processes == 1:
            assert main([*command, str(out)]) == 0
            printed = capsys.readouterr().out
        else:
            done = torchrun(processes, *command, str(out))  # by which sets have another order in each process
            assert done.returncode == 0, done.stderr
            printed = done.stdout
        assert printed.count("Shallow overlap") == 1 and "Weights, figures" in printed
        runs.append((json.loads((out / "result.json").read_text()), out))
    (one, _), (two, _) = runs
    assert two["made_with"]["processes"] == 2 and set(one["runs"]) == set(two["runs"])
    for key, run in one["runs"].items():
        for what in ("params", "flops", "split"):
            assert run.get(what) == two["runs"][key].get(what), (key, what)
    for name in ("dense", "deep-random", "shallow-overlap"):
        a, b = (torch.load(out / f"{name}-seed0.pt", weights_only=True) for _, out in runs)
        one, two = (torch.cat([value.double().flatten() for value in part.values()]) for part in (a, b))
        apart = (one - two).norm() / one.norm()
        assert apart < 5e-4, (name, apart)  # an epoch of Adam in float32; in float64 it is 1e-9, above
