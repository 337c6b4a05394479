"""SplitNet: the simplex, the regulariser, planted groups found again, and the split network on the block engine."""

import copy
import functools
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decompk import block_diagonal, models, splitnet
from decompk.cli import main
from decompk.errors import DecompkError, UnsupportedOperation
from decompk.splitnet import Assignment, Gammas, Nodes, ReducedGradient, learn, reduced_gradient, run
from decompk.splitnet.simplex import largest_step
from decompk.splitnet.split import grouped_order, permuted, split

# ---- the simplex ----------------------------------------------------------------------------------------------------


def test_the_reduced_gradient_is_that_of_equation_2():
    d = torch.tensor([[0.5, 0.0, 0.0], [0.3, 0.4, 1.0], [0.2, 0.6, 0.0]])
    g = torch.tensor([[1.0, 5.0, -1.0], [3.0, 1.0, 2.0], [-1.0, 2.0, 2.5]])
    expected = torch.tensor(
        [
            [0.0, 0.0, -3.0],  # column 0: μ is 0 and takes −(2 − 2); column 1: at 0 with 3 > 0 it stays
            [2.0, -1.0, 3.0],  # column 1: 1 − 2; column 2: μ, −(−3)
            [-2.0, 1.0, 0.0],  # column 1: μ, −(−1); column 2: at 0 with 0.5 > 0 it stays
        ]
    )
    assert torch.equal(reduced_gradient(d, g), expected)
    assert largest_step(d, expected)[0] == pytest.approx(0.15)  # 0.3 / 2
    assert largest_step(d, expected)[1] == pytest.approx(0.6)


def test_a_thousand_random_steps_stay_on_the_simplex():
    torch.manual_seed(0)
    p = nn.Parameter(torch.rand(5, 40).softmax(0))
    optimizer = ReducedGradient([p], lr=0.3)
    at_zero = 0
    for _ in range(1000):
        p.grad = torch.randn_like(p)
        optimizer.step()
        assert (p >= 0).all() and (p.sum(0) - 1).abs().max() < 1e-6
        at_zero += int((p == 0).any())
    assert at_zero > 900


def test_the_reduced_gradient_finds_the_minimum_of_a_quadratic_on_the_simplex():
    target = torch.tensor([[0.7, 0.2], [0.6, 0.3], [-0.5, 0.5]])
    p = nn.Parameter(torch.full((3, 2), 1 / 3))
    optimizer = ReducedGradient([p], lr=0.1)
    for _ in range(500):
        optimizer.zero_grad()
        (p - target).square().sum().backward()
        optimizer.step()
    assert torch.allclose(p, torch.tensor([[0.55, 0.2], [0.45, 0.3], [0.0, 0.5]]), atol=1e-3)


def test_wrong_parameters_of_the_reduced_gradient_are_refused():
    with pytest.raises(DecompkError, match="sum to 1"):
        ReducedGradient([nn.Parameter(torch.rand(3, 2))])
    with pytest.raises(DecompkError, match="positive lr"):
        ReducedGradient([nn.Parameter(torch.rand(3, 2).softmax(0))], lr=0)


# ---- the regulariser ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taps", [(), (3, 2)])
def test_the_regulariser_is_the_papers_sum_of_norms(taps):
    torch.manual_seed(0)
    weight = torch.randn(6, 4, *taps, dtype=torch.float64)
    p, q = torch.rand(3, 4, dtype=torch.float64).softmax(0), torch.rand(3, 6, dtype=torch.float64).softmax(0)
    W = weight.flatten(2).transpose(0, 1) if taps else weight.T[..., None]  # the paper's: inputs, outputs, taps
    expected = 0.0
    for g in range(3):
        rows = (1 - p[g])[:, None, None] * W * q[g][None, :, None]
        columns = p[g][:, None, None] * W * (1 - q[g])[None, :, None]
        expected += rows.flatten(1).norm(dim=1).sum() + columns.transpose(0, 1).flatten(1).norm(dim=1).sum()
    assert splitnet.group_weights(weight, p, q).item() == pytest.approx(expected.item(), rel=1e-12)
    assert splitnet.overlap(p).item() == pytest.approx((p[0] @ p[1] + p[0] @ p[2] + p[1] @ p[2]).item())
    assert splitnet.imbalance(p).item() == pytest.approx(p.sum(1).square().sum().item())


def test_a_split_weight_costs_nothing_and_has_a_finite_gradient():
    p = q = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])
    weight = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).requires_grad_()
    cost = splitnet.group_weights(weight, p, q)
    cost.backward()
    assert cost.item() == 0 and torch.equal(weight.grad, torch.zeros(4, 4))
    assert splitnet.group_weights(torch.ones(4, 4), p, q) > 0


# ---- nodes ----------------------------------------------------------------------------------------------------------


def test_nodes_are_tied_through_norms_flattens_and_shortcuts():
    net = models.cifar_resnet8(width=8)
    nodes = Nodes(net, (3, 32, 32))
    entry = nodes.layers["conv1"].outputs.nodes
    block = nodes.layers["layers.0.0.conv2"]
    assert nodes.layers["conv1"].inputs is None
    assert np.array_equal(block.outputs.nodes, entry)  # the shortcut
    assert np.array_equal(nodes.vectors["bn1.weight"], entry)
    assert not set(block.inputs.nodes) & set(entry)
    assert np.array_equal(nodes.layers["fc"].inputs.nodes, nodes.layers["layers.2.0.conv2"].outputs.nodes)
    vgg = Nodes(models.vgg8(width=8), (3, 32, 32))
    first = next(path for path, sides in vgg.layers.items() if sides.inputs is not None and sides.inputs.repeat > 1)
    assert len(vgg.layers[first].inputs.of_each) == models.vgg8(width=8).get_submodule(first).in_features


def test_what_cannot_be_followed_or_split_is_refused():
    shuffling = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ChannelShuffle(2), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(16, 2)
    )
    with pytest.raises(UnsupportedOperation, match="shuffles channels"):
        Nodes(shuffling, (3, 2, 2))
    nodes = Nodes(models.cifar_resnet8(width=8), (3, 32, 32))
    for groups, options, words in (
        ({"conv9": 2}, {}, "no convolution or linear layer"),
        ({"conv1": 2}, {}, "reads the image"),
        ({"fc": 1}, {}, "two groups or more"),
        ({"layers.0.0.conv2": 2, "conv1": 3}, {"whole_inputs": ["conv1"]}, "through a shortcut"),
        ({"layers.2.0.conv1": 2, "layers.2.0.conv2": 3}, {}, "a multiple or a divisor"),
        ({"fc": 2}, {"whole_inputs": ["conv1"]}, "not to be split"),
        ({"fc": 2}, {"parametrisation": "sparsemax"}, "unknown"),
    ):
        with pytest.raises(DecompkError, match=words):
            Assignment(nodes, groups, **options)


# ---- a planted problem ----------------------------------------------------------------------------------------------

GROUPS = 3


def planted(seed):
    """A network whose weights fall into three groups, its channels shuffled, with noise between groups; and its data.

    Returns the network, x, y, and the planted group of every node, by layer path and side.
    """
    g = torch.Generator().manual_seed(seed)
    sizes = (12, 18, 18, 6)
    owner = [torch.arange(n) % GROUPS for n in sizes]
    owner = [o[torch.randperm(len(o), generator=g)] for o in owner]
    net = nn.Sequential(nn.Linear(12, 18), nn.Tanh(), nn.Linear(18, 18), nn.Tanh(), nn.Linear(18, 6))
    for layer, (a, b) in zip(net[::2], zip(owner, owner[1:], strict=False), strict=True):
        inside = b[:, None] == a[None]
        drawn = torch.randn(layer.weight.shape, generator=g) * (GROUPS / layer.in_features) ** 0.5
        with torch.no_grad():
            layer.weight.copy_(drawn * inside)
            layer.bias.zero_()
    x = torch.randn(256, 12, generator=g)
    y = net(x).detach()
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight += 0.1 * torch.randn(layer.weight.shape, generator=g) * layer.weight.std()
    return net, x, y, owner


# Of stage one: how far assignments start from equal, their step, how many, and the terms beside the loss.
SETTINGS = {
    "softmax": (0.01, 0.02, 250, Gammas(weights=1e-2, disjoint=2e-3, balance=1e-2)),
    "simplex": (0.001, 2.0, 150, Gammas(weights=1e-2, disjoint=2e-3, balance=5e-3)),
}


@functools.cache
def recovered(seed, parametrisation):
    """(steps until assignments had settled, whether the planted groups were found exactly)."""
    net, x, y, owner = planted(seed)
    nodes = Nodes(net, (12,))
    spread, lr, steps, gammas = SETTINGS[parametrisation]
    assignment = Assignment(nodes, dict.fromkeys(("0", "2", "4"), GROUPS), (), parametrisation, seed, spread)
    settled = learn(net, assignment, [(x, y)] * steps, F.mse_loss, gammas, lr=1e-3, assignment_lr=lr)
    found = assignment.hard()
    pairs = [(nodes.layers[path].outputs.nodes, owner[i + 1]) for i, path in enumerate(("0", "2", "4"))]
    pairs.append((nodes.layers["0"].inputs.nodes, owner[0]))
    names = {(int(a), int(b)) for ids, true in pairs for a, b in zip(found[ids], true, strict=True)}
    return settled, len(names) == GROUPS == len({a for a, _ in names}) == len({b for _, b in names})


@pytest.mark.parametrize("parametrisation", SETTINGS)
def test_planted_groups_are_found_exactly(parametrisation):
    assert sum(recovered(seed, parametrisation)[1] for seed in range(10)) >= 9


def test_the_reduced_gradient_settles_in_fewer_steps_as_the_supplement_claims():
    simplex, softmax = (sorted(recovered(seed, kind)[0] for seed in range(10))[5] for kind in ("simplex", "softmax"))
    assert simplex < softmax


def test_nothing_is_found_where_nothing_pulls():
    net, x, y, _ = planted(0)
    assignment = Assignment(Nodes(net, (12,)), {"2": GROUPS}, spread=0.01)
    assert learn(net, assignment, [(x, y)] * 20, F.mse_loss, Gammas(0.0, 0.0, 0.0)) == 21
    assert assignment.fuzzy() == 1.0


# ---- the split network ----------------------------------------------------------------------------------------------


def hardened(nodes, groups, whole, seed=0):
    """An assignment of equal groups, shuffled."""
    assignment = Assignment(nodes, groups, whole, "simplex", seed)
    run.deal(assignment, seed)
    return assignment


SHALLOW = {f"layers.2.0.{name}": 2 for name in ("conv1", "conv2", "downsample")} | {"fc": 2}
TREE = {f"layers.1.0.{name}": 2 for name in ("conv1", "conv2", "downsample")} | {
    f"layers.2.0.{name}": 4 for name in ("conv1", "conv2", "downsample")
} | {"fc": 4}  # fmt: skip
CASES = {
    "shallow": (SHALLOW, ("layers.2.0.conv1", "layers.2.0.downsample")),
    "tree": (TREE, ("layers.1.0.conv1", "layers.1.0.downsample")),
    "fc": ({"fc": 5}, ()),
}


@pytest.mark.parametrize("case", CASES)
def test_a_split_network_is_the_masked_one_on_the_block_engine(case):
    groups, whole = CASES[case]
    torch.manual_seed(0)
    net = models.cifar_resnet8(width=10 if case == "fc" else 8, num_classes=20).double().eval()
    nodes = Nodes(net, (3, 32, 32))
    assignment = hardened(nodes, groups, whole)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    moved = permuted(net, nodes, grouped_order(nodes, assignment.hard()))
    assert (moved(x) - net(x)).abs().max() < 1e-10
    assert any(not torch.equal(a, b) for a, b in zip(moved.parameters(), net.parameters(), strict=True))

    before = copy.deepcopy(net.state_dict())
    result = split(net, assignment)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    for path, count in groups.items():
        mask = result.masks[f"{path}.weight"]
        assert mask.double().mean().item() == pytest.approx(1.0 if path in whole else 1 / count)
        assert not result.dense.get_submodule(path).weight[~mask].any()
    fast = result.fast((3, 32, 32))
    assert any(decision.form != "dense" for decision in fast.decisions)
    assert (fast(x) - result.dense(x)).abs().max() < 1e-10

    masked = copy.deepcopy(result.dense)
    fast(x).square().sum().backward()
    masked(x).square().sum().backward()
    mine = dict(fast.named_parameters())
    for name, parameter in masked.named_parameters():
        expected = parameter.grad * result.masks.get(name, 1)
        assert (mine[name].grad * result.masks.get(name, 1) - expected).abs().max() < 1e-10 * (1 + expected.abs().max())


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_trains_every_variant_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["split", "--out", str(out), "--width", "1", "--epochs", "1,1,1"]
    assert main([*command, "--seeds", "0"]) == 0
    first = capsys.readouterr().out
    assert all(name in first for name in ("dense", *run.SPLITS)) and "better with" in first
    known = json.loads((out / "result.json").read_text())["runs"]
    assert set(known) == {f"{name} 0" for name in ("dense", *run.SPLITS)}
    assert known["FC 0"]["params"] < known["dense 0"]["params"] and known["FC 0"]["flops"] < known["dense 0"]["flops"]
    assert known["Random 0"]["fuzzy"] == 0.0 and known["Random 0"]["settled"] is None
    state = torch.load(out / "random-seed0.pt", weights_only=True)
    assert (state["layer3.1.conv1.weight"] == 0).float().mean().item() == 0.5

    monkeypatch.setattr(run, "_pretrained", lambda *_: pytest.fail("it is there already"))
    assert main([*command, "--seeds", "0"]) == 0
    assert capsys.readouterr().out == first
    assert main([*command[:-1], "2,1,1", "--seeds", "0"]) == 2
    assert "other settings" in capsys.readouterr().err
    for wrong in (["--epochs", "1,1"], ["--epochs", "0,1,1"], ["--width", "0"]):
        assert main(["split", "--out", str(tmp_path / "new"), *wrong]) == 2


def test_a_random_split_of_the_paper_keeps_what_its_table_says():
    """Table 1, at the paper's width; `decompk report --paper` has it to the digit."""
    with torch.device("meta"):
        net = models.wrn_16_8(100)
    nodes = Nodes(net, (3, 32, 32))
    for name, printed in (("FC", 0.35), ("Shallow", 32.54), ("Deep", 46.39), ("Hierarchical", 62.58)):
        assignment = Assignment(nodes, run.SPLITS[name])
        run.deal(assignment, 0)
        whole = sum(p.numel() for p in net.parameters())
        kept = split(models.wrn_16_8(100), assignment).masks
        zeros = sum(int((~mask).sum()) for mask in kept.values())
        assert 100 * zeros / whole == pytest.approx(printed, abs=0.3)  # of all parameters; the norms' count here, too


def test_a_layer_of_zeros_alone_stays_as_it_is():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    nn.init.zeros_(net[2].weight)
    fast = block_diagonal(net)
    assert [d.reason for d in fast.decisions if d.path == "2"] == ["it holds nothing but zeros"]
    assert torch.equal(fast(torch.ones(2, 8)), net(torch.ones(2, 8)))
