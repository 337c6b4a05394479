"""SplitNet: the simplex, the regulariser, planted groups found again, and the split network on the block engine."""

import copy
import functools
import json
import pickle

import numpy as np
import pytest
import torch
from helpers import save_digits
from torch import nn
from torch.nn import functional as F

from decompk import block_diagonal, models, splitnet
from decompk.cli import main
from decompk.errors import DecompkError, UnsupportedOperation
from decompk.splitnet import (
    Assignment,
    Gammas,
    Learner,
    Nodes,
    ReducedGradient,
    Sparsifier,
    fitted,
    learn,
    reduced_gradient,
    run,
    split,
    split_points,
    without,
)
from decompk.splitnet.rearrange import grouped, must_agree, rearranged
from decompk.splitnet.simplex import largest_step
from decompk.splitnet.sparse import Filters
from decompk.splitnet.variants import DEFAULT
from decompk.train.checkpoint import Checkpoints
from decompk.train.data import open_data
from decompk.train.scores import evaluate

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


def test_a_gradient_without_a_direction_leaves_a_column_where_it_is():
    p = nn.Parameter(torch.tensor([[0.5, 0.3], [0.3, 0.3], [0.2, 0.4]]))
    before = p.detach().clone()
    for bad in (float("inf"), float("nan"), 3e38):
        p.grad = torch.tensor([[bad, 0.1], [1.0, 0.2], [-bad, 0.0]])
        ReducedGradient([p], lr=0.1).step()
        assert torch.equal(p[:, 0], before[:, 0]) and (p >= 0).all()
    assert not torch.equal(p[:, 1], before[:, 1])


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
        ({"fc": 11}, {}, "cannot have 11 groups: of one side there are 10"),
        ({"fc": 2}, {"whole_inputs": ["conv1"]}, "not to be split"),
        ({"fc": 2}, {"parametrisation": "sparsemax"}, "unknown"),
    ):
        with pytest.raises(DecompkError, match=words):
            Assignment(nodes, groups, **options)


class Wired(nn.Module):
    """Two layers, with whatever `between` does to the channels in the middle."""

    def __init__(self, between, width=8, into=None, **parts):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3), nn.Conv2d(into or width, 6, 3)
        self.between, self.fc = between, nn.Linear(6, 3)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.fc(self.second(self.between(self, F.relu(self.first(x)))).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.hidden, self.fc = nn.GRU(5, 8, batch_first=True), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(F.relu(self.hidden(self.gru(x)[0][:, -1])))


IMAGE = (3, 12, 12)
ORDERS = {  # a network, its input, and whether its nodes may also be there twice
    "depthwise": (lambda: Wired(lambda s, x: s.mid(x), mid=nn.Conv2d(8, 8, 3, groups=8)), IMAGE, True),
    "grouped": (lambda: Wired(lambda s, x: s.mid(x), mid=nn.Conv2d(8, 8, 3, groups=4)), IMAGE, True),
    "group norm": (lambda: Wired(lambda s, x: s.mid(x), mid=nn.GroupNorm(4, 8)), IMAGE, True),
    "response norm": (lambda: Wired(lambda s, x: F.local_response_norm(x, 3, alpha=3.0)), IMAGE, True),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)), (5,), False
    ),
    "twice": (lambda: Wired(lambda s, x: torch.cat([x, x], 1), into=16), IMAGE, True),
    "halves": (lambda: Wired(lambda s, x: s.a(x[:, :4]) + s.b(x[:, 4:]), a=nn.Conv2d(4, 8, 1), b=nn.Conv2d(4, 8, 1)),
               IMAGE, False),
    "scale": (lambda: Wired(lambda s, x: s.mid(s.g * x), g=nn.Parameter(torch.rand(1, 8, 1, 1)), mid=nn.PReLU(8)),
              IMAGE, True),
    "transposed": (lambda: Wired(lambda s, x: s.mid(x), into=4, mid=nn.ConvTranspose2d(8, 4, 3)), IMAGE, True),
    "recurrent": (Recurrent, (7, 5), True),
    "flatten": (lambda: nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(512, 9), nn.ReLU(),
                                      nn.Linear(9, 3)), IMAGE, True),
}  # fmt: skip


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", ORDERS)
def test_nodes_change_places_and_are_doubled_without_a_trace_or_the_network_is_refused(name, twice):
    make, size, may_double = ORDERS[name]
    torch.manual_seed(0)
    net = make().double().eval()
    nodes = Nodes(net, size)
    rng = np.random.default_rng(1)
    groups = np.eye(2, dtype=bool)[rng.integers(0, 2, nodes.count)]
    if twice:
        free = np.setdiff1d(np.arange(nodes.count), nodes.pinned)
        groups[free] |= rng.random((len(free), 2)) < 0.3
    other = rearranged(net, nodes, grouped(nodes, groups)).net
    if twice and not may_double:
        with pytest.raises(UnsupportedOperation, match="computes something else"):
            must_agree(net, other, nodes)
        return
    must_agree(net, other, nodes)
    x = torch.randn(2, *size, dtype=torch.double)
    assert (other(x) - net(x)).abs().max() < 1e-12
    moved = [
        a.shape != b.shape or not torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True)
    ]
    assert any(moved)


def test_a_weight_that_a_function_uses_and_a_transposed_convolution_are_refused():
    net = Wired(lambda s, x: F.conv2d(x, s.w), w=nn.Parameter(torch.rand(8, 8, 1, 1)))
    with pytest.raises(UnsupportedOperation, match="'w' is used by a function"):
        Nodes(net, IMAGE)
    nodes = Nodes(ORDERS["transposed"][0](), IMAGE)
    with pytest.raises(DecompkError, match="transposed convolution"):
        Assignment(nodes, {"mid": 2})


# ---- a planted problem ----------------------------------------------------------------------------------------------

GROUPS, SEEDS = 3, range(10)


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
    assert sum(recovered(seed, parametrisation)[1] for seed in SEEDS) >= 9


def test_the_reduced_gradient_settles_in_fewer_steps_as_the_supplement_claims():
    simplex, softmax = (sorted(recovered(seed, kind)[0] for seed in SEEDS)[5] for kind in ("simplex", "softmax"))
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
    moved = rearranged(net, nodes, grouped(nodes, assignment.members())).net
    assert (moved(x) - net(x)).abs().max() < 1e-10
    assert any(not torch.equal(a, b) for a, b in zip(moved.parameters(), net.parameters(), strict=True))

    before = copy.deepcopy(net.state_dict())
    result = split(net, assignment)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    for path, count in groups.items():
        mask = result.masks[f"{path}.weight"]
        assert mask.double().mean().item() == pytest.approx(1.0 if path in whole else 1 / count)
        assert not result.dense.get_submodule(path).weight[~mask].any()
    fast = result.fast()
    assert any(decision.form != "dense" for decision in fast.decisions)
    assert (fast(x) - result.dense(x)).abs().max() < 1e-10

    masked = copy.deepcopy(result.dense)
    fast(x).square().sum().backward()
    masked(x).square().sum().backward()
    mine = dict(fast.named_parameters())
    for name, parameter in masked.named_parameters():
        expected = parameter.grad * result.masks.get(name, 1)
        assert (mine[name].grad - expected).abs().max() < 1e-10 * (1 + expected.abs().max())


@pytest.mark.parametrize("setting", ["Deep", "Hierarchical"])
@pytest.mark.parametrize("overlap", [None, 0.1])
def test_groups_of_any_size_train_as_the_masked_network_does_and_their_zeros_stay(setting, overlap):
    net, size = models.wrn_16_8(10, (1, 16, 16), 2).double(), (1, 16, 16)
    assignment = Assignment(Nodes(net, size), *split_points("wrn_16_8", setting), spread=2.0)
    result, masked = split(net, assignment, overlap), split(net, assignment, overlap)
    assert 0.2 < result.kept < 0.9
    fast = result.fast()
    for part, holds in ((fast, {}), (masked.dense, masked.masks)):
        optimizer = torch.optim.Adam(part.parameters(), 1e-2)
        for seed in range(2):
            x = torch.randn(4, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
            optimizer.zero_grad()
            part(x).square().sum().backward()
            for name, mask in holds.items():
                part.get_parameter(name).grad.mul_(mask)
            optimizer.step()
    theirs = masked.dense.state_dict()
    for name, value in result.dense.state_dict().items():
        assert (value - theirs[name]).abs().max() < 1e-9
    for name, mask in result.masks.items():
        weight = result.dense.get_parameter(name)
        assert not weight[~mask].any() and weight[mask].all()


def test_a_fuzzy_node_has_a_copy_in_each_of_its_groups_and_a_class_hears_all_of_its_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 4)).double()
    nodes = Nodes(net, (5,))
    assignment = Assignment(nodes, {"0": 3, "2": 3})
    with torch.no_grad():  # about a third of the nodes in one group, in two, and in all
        assignment.of_3.copy_(torch.where(torch.rand(3, nodes.count) < 0.5, 0.0, -9.0))
    members = assignment.members(0.1)
    assert {1, 2, 3} == set(members.sum(1))
    result = split(net, assignment, 0.1)
    x = torch.randn(7, 5, dtype=torch.double)
    sides = nodes.layers["0"].inputs.nodes, nodes.layers["0"].outputs.nodes, nodes.layers["2"].outputs.nodes
    reads, hidden, classes = (torch.from_numpy(members[side]) for side in sides)
    expected = net[2].bias.expand(7, 4).clone()
    for h in range(9):
        for c in range(4):
            common = (hidden[h] & classes[c]).nonzero().flatten()
            for g in common:
                own = torch.relu(x[:, reads[:, g]] @ net[0].weight[h, reads[:, g]] + net[0].bias[h])
                expected[:, c] += net[2].weight[c, h] / len(common) * own
    assert result.dense[0].out_features == members[sides[1]].sum() > 9
    assert torch.allclose(result.dense(x), expected, atol=1e-12)
    for path, owners in (("0", (hidden, reads)), ("2", (classes, hidden))):
        inside, other = (torch.from_numpy(result.copies.groups[side]).double() for side in result.along[path])
        assert torch.equal(result.masks[f"{path}.weight"], inside @ other.T > 0), owners
    for wrong in (0.0, 0.5, -1.0):
        with pytest.raises(DecompkError, match="no share of a node"):
            split(net, assignment, wrong)


@pytest.mark.parametrize("setting", ["Deep", "Hierarchical"])
def test_even_groups_are_of_one_size_take_the_surest_nodes_and_run_as_one(setting):
    torch.manual_seed(0)
    net, size = models.wrn_16_8(8, (1, 16, 16), 4).double().eval(), (1, 16, 16)
    assignment = Assignment(Nodes(net, size), *split_points("wrn_16_8", setting), spread=2.0)
    hard, even = assignment.members(), assignment.members(even=True)
    assert (even.sum(1) == hard.sum(1)).all() and (even != hard).any()
    result = split(net, assignment, even=True)
    for path, sides in assignment.nodes.layers.items():
        for side in (sides.outputs.nodes, sides.inputs.nodes if sides.inputs else []):
            for level in np.unique(assignment.level[side]) if len(side) else ():
                sizes = even[side][assignment.level[side] == level].sum(0)[:level]
                assert level == 0 or len(set(sizes.tolist())) == 1, (path, sizes)
    for level in assignment.levels:  # who had to leave was less sure than those of the same places that stayed
        values = assignment.soft(level).detach().numpy()
        for kind in np.unique(assignment.nodes.kinds[assignment.level == level]):
            mine = np.nonzero((assignment.nodes.kinds == kind) & (assignment.level == level))[0]
            best = values.max(0)[assignment._column[mine]]
            first = hard[mine].argmax(1)
            left = first != even[mine].argmax(1)
            for group in np.unique(first[left]):
                assert best[left & (first == group)].max() <= best[~left & (first == group)].min()
    forms = {decision.path: decision for decision in result.fast().decisions}
    for path, count in assignment.groups.items():
        if path != "fc":
            assert forms[path].reason == f"{count} blocks on the diagonal" and forms[path].kept == 1 / count
    with pytest.raises(DecompkError, match="leave out overlap or even"):
        split(net, assignment, 0.1, even=True)


def small():
    """A network that is block-diagonal from end to end once its groups are equal."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(16, 6),
    )


@pytest.mark.parametrize("dead", [False, True])
def test_a_network_split_from_end_to_end_keeps_its_zeros_and_trains_what_is_inside(dead):
    torch.manual_seed(0)
    net = small().double()
    nodes = Nodes(net, (3, 8, 8))
    result = split(net, hardened(nodes, {"0": 2, "2": 2, "6": 2}, ("0",)))
    if dead:  # weights inside a group that happen to be zero may become others
        with torch.no_grad():
            result.dense[2].weight[:8] = 0
    masked, fast = copy.deepcopy(result.dense), result.fast()
    assert result.fast() is not fast
    assert fast.decisions[1].reason == "2 blocks on the diagonal"
    x = torch.randn(4, 3, 8, 8, dtype=torch.double)
    for part, holds in ((fast, {}), (masked, result.masks)):
        optimizer = torch.optim.SGD(part.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            part(x).square().sum().backward()
            for name, mask in holds.items():
                part.get_parameter(name).grad.mul_(mask)
            optimizer.step()
    theirs = masked.state_dict()
    for name, value in result.dense.state_dict().items():
        assert (value - theirs[name]).abs().max() < 1e-12
    assert not result.dense[6].weight[~result.masks["6.weight"]].any()
    again = copy.deepcopy(result)  # hooks do not go with it; a new fast network hangs up its own
    again.fast()(x).square().sum().backward()
    assert not again.dense[6].weight.grad[~result.masks["6.weight"]].any()
    assert len(result.dense[6].weight._backward_hooks) == 1
    frozen = split(net.requires_grad_(False), hardened(nodes, {"2": 2, "6": 2}, ()))
    assert torch.allclose(frozen.fast()(x), frozen.dense(x))
    pickle.loads(pickle.dumps(frozen))


def test_learning_takes_networks_of_other_dtypes():
    net, x, y, _ = planted(0)
    net.double()
    assignment = Assignment(Nodes(net, (12,)), {"2": 3})
    assert learn(net, assignment, [(x.double(), y.double())] * 2, F.mse_loss, Gammas()) == 3
    assert next(net.parameters()).dtype == torch.double


def test_networks_of_several_outputs_are_compared_output_by_output():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 4)

        def forward(self, x):
            y = F.relu(self.trunk(x))
            return self.a(y), {"b": self.b(y)}

    net = Two()
    result = split(net, hardened(Nodes(net, (5,)), {"a": 2, "b": 2}, ()))
    assert result.masks["b.weight"].double().mean() == 0.5 and result.dense(torch.rand(1, 5))[1]["b"].shape == (1, 4)


def test_random_groups_are_even_on_each_part_of_a_concatenation():
    class Cat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 9), nn.Linear(5, 9), nn.Linear(18, 4)

        def forward(self, x):
            return self.c(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1))

    nodes = Nodes(Cat(), (5,))
    for seed in range(4):
        assignment = hardened(nodes, {"a": 2, "b": 2, "c": 2}, ("a", "b"), seed)
        owner = assignment.hard()
        assert all(np.bincount(owner[nodes.layers[path].outputs.nodes]).tolist() == [5, 4] for path in "ab")
        even = assignment.members(even=True)[nodes.layers["c"].inputs.nodes]
        assert even.sum(0).tolist() == [9, 9]


def test_a_layer_of_which_nothing_would_be_left_is_named():
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    assignment = Assignment(Nodes(net, (5,)), {"2": 2})
    for side, group in ((assignment.nodes.layers["2"].inputs, 0), (assignment.nodes.layers["2"].outputs, 1)):
        assignment.put(2, side.nodes, np.full(len(side.nodes), group))
    with pytest.raises(DecompkError, match="all inputs of '2' are in other groups"):
        split(net, assignment)


def test_subgroups_lie_in_their_groups_as_evenly_as_numbers_allow():
    with torch.device("meta"):
        net = models.alexnet(20, (3, 64, 64), 6, 30)
    groups, whole = split_points("alexnet", "1-2-5")
    assignment = Assignment(Nodes(net, (3, 64, 64)), groups, whole)
    assert assignment.parents(5, 2).tolist() == [0, 0, 0, 1, 1] and assignment.parents(4, 4).tolist() == [0, 1, 2, 3]
    three = Assignment(Nodes(net, (3, 64, 64)), *split_points("alexnet", "2-5-10"))
    assert three.parents(10, 2).tolist() == three.parents(5, 2)[three.parents(10, 5)].tolist()
    for setting, leaves in (("2-3-4", [2, 2]), ("2-3-5", [3, 2]), ("2-3-7", [3, 4]), ("3-4-5", [1, 2, 2])):
        tree = Assignment(Nodes(net, (3, 64, 64)), *split_points("alexnet", setting))
        counts = np.bincount(tree.parents(int(setting[-1]), int(setting[0])))
        assert sorted(counts) == sorted(leaves), setting
    for p, q in map(assignment.sides, groups):
        assert torch.allclose(p.sum(0), torch.ones(p.shape[1])) and torch.allclose(q.sum(0), torch.ones(q.shape[1]))
    assert assignment.sides("fc7")[0].shape == (2, 30) and assignment.sides("fc8")[1].shape == (5, 20)


@pytest.mark.parametrize(
    ("name", "setting", "size"), [("alexnet", "2-4-8", 64), ("alexnet", "2x5", 64), ("resnet18x2", "2-4-8", 32)]
)
def test_the_supplements_networks_split_at_its_points(name, setting, size):
    torch.manual_seed(0)
    net = models.build(name, num_classes=16, width=12, input_size=(3, size, size), **({"fc": 32} if size > 32 else {}))
    net = net.double().eval()
    groups, whole = split_points(name, setting)
    assignment = hardened(Nodes(net, (3, size, size)), groups, whole)
    result = split(net, assignment)
    x = torch.randn(2, 3, size, size, dtype=torch.double)
    fast = result.fast()
    assert (fast(x) - result.dense(x)).abs().max() < 1e-10
    assert any(decision.form == "blocks" for decision in fast.decisions)
    for path, count in groups.items():
        share = result.masks[f"{path}.weight"].double().mean().item()
        assert share == 1 if path in whole else share == pytest.approx(1 / count, rel=0.05), path


# ---- SSL ------------------------------------------------------------------------------------------------------------


def test_filters_shrink_by_the_proximal_step_and_stay_at_zero():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nodes = Nodes(net, (3,))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3.0, 0, 4], [0, 0.5, 0], [0, 0, 2], [0.3, 0, 0.4]]))
    before = copy.deepcopy(net.state_dict())
    filters = Filters(net, nodes)
    assert sorted(filters.norms()[nodes.layers["0"].outputs.nodes].tolist()) == pytest.approx([0.5, 0.5, 2, 5])
    filters.shrink(1.0)
    assert torch.allclose(net[0].weight, torch.tensor([[2.4, 0, 3.2], [0, 0, 0], [0, 0, 1], [0, 0, 0]]))
    assert net[0].bias[[1, 3]].tolist() == [0, 0] and torch.equal(net[0].bias[[0, 2]], before["0.bias"][[0, 2]])
    assert torch.equal(net[2].weight, before["2.weight"])  # what the network returns stays
    with torch.no_grad():
        net[0].weight[1] = 9
    filters.shrink(1e-3)
    assert not net[0].weight[1].any()


@pytest.mark.parametrize("make", ["resnet8", "vgg8", "wrn_16_8"])
def test_zero_filters_leave_without_a_trace(make):
    torch.manual_seed(0)
    net = models.build(make, num_classes=5, width=4, input_size=(3, 16, 16)).double()
    net(torch.randn(4, 3, 16, 16, dtype=torch.double))  # batch norms that have seen something
    nodes = Nodes(net, (3, 16, 16))
    filters = Filters(net, nodes)
    filters.shrink(float(filters.norms().quantile(0.4)))
    assert 0 < int(filters.gone.sum()) < nodes.count
    net.eval()
    less = without(net, nodes, filters.gone)
    x = torch.randn(2, 3, 16, 16, dtype=torch.double)
    assert (less(x) - net(x)).abs().max() < 1e-10 * (1 + net(x).abs().max())
    assert sum(p.numel() for p in less.parameters()) < sum(p.numel() for p in net.parameters())
    with pytest.raises(UnsupportedOperation, match="something else"):
        without(net, nodes, ~filters.gone)


def test_ssl_takes_out_what_the_task_does_not_need():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    x = torch.randn(256, 6)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    nodes = Nodes(net, (6,))
    trainer = Sparsifier(net, nodes, F.cross_entropy, strength=0.2, steps=300)
    for _ in range(300):
        trainer.step(x, y)
    less = without(net.eval(), nodes, trainer.filters.gone)
    assert 2 <= less[0].out_features < 16
    assert (less(x).argmax(1) == y).float().mean() > 0.95
    with pytest.raises(DecompkError, match="drives no filter to zero"):
        Sparsifier(net, nodes, F.cross_entropy, 0.0, 1)
    with pytest.raises(DecompkError, match="0 steps"):
        Sparsifier(net, nodes, F.cross_entropy, 1.0, 0)


def test_a_state_of_other_kernels_does_not_fit():
    with pytest.raises(DecompkError, match="no weights of Sequential: '0.weight'"):
        fitted(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 4, 5)).state_dict())


# ---- trainings that go on ----------------------------------------------------------------------------------------


def test_a_learner_goes_on_to_the_same_bits_and_frozen_assignments_stand_still():
    def learner():
        net, x, y, _ = planted(0)
        assignment = Assignment(Nodes(net, (12,)), dict.fromkeys(("0", "2", "4"), GROUPS), seed=0)
        return Learner(net, assignment, F.mse_loss, SETTINGS["softmax"][3], 1e-3, 0.05, freeze=0.5), x, y

    whole, x, y = learner()
    still = []
    for _ in range(120):
        whole.step(x, y)
        still.append((whole.assignment.still_3.clone(), whole.assignment.soft(3).clone()))
    assert not still[0][0].any() and still[-1][0].any()
    first = next(i for i, (columns, _) in enumerate(still) if columns.any())
    columns, values = still[first]
    assert torch.equal(still[-1][1][:, columns], values[:, columns])
    free = ~still[-1][0]
    assert not free.any() or not torch.equal(still[-1][1][:, free], values[:, free])

    begun, _, _ = learner()
    for _ in range(70):
        begun.step(x, y)
    gone_on, _, _ = learner()
    gone_on.load_state_dict(copy.deepcopy(begun.state_dict()))
    for _ in range(50):
        gone_on.step(x, y)
    assert gone_on.steps == 120 and gone_on.settled == whole.settled
    for a, b in ((whole.net, gone_on.net), (whole.assignment, gone_on.assignment)):
        assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- the command ----------------------------------------------------------------------------------------------------


SHORT = ["--width", "1", "--epochs", "1,2,1", "--seeds", "0"]


def test_the_command_trains_every_variant_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    names = ("dense", "FC", "Deep", "Deep random", "Deep overlap", "SSL 1.1")
    assert set(names) < set(DEFAULT["wrn_16_8"])
    command = ["split", "--out", str(out), "--variants", ",".join(names), "--width", "1", "--epochs", "1,1,1"]
    assert main([*command, "--seeds", "0"]) == 0
    first = capsys.readouterr().out
    assert all(f"\n{name} " in first for name in names) and "(Deep) against random" in first
    known = json.loads((out / "result.json").read_text())["runs"]
    assert set(known) == {f"{name} 0" for name in names}
    dense = known["dense 0"]
    for name in ("FC", "Deep", "Deep random"):
        assert known[f"{name} 0"]["params"] < dense["params"] and known[f"{name} 0"]["flops"] < dense["flops"]
        assert known[f"{name} 0"]["flops"] <= known[f"{name} 0"]["done"] <= dense["done"] == dense["flops"]
    assert known["Deep random 0"]["done"] < dense["done"]
    assert known["Deep overlap 0"]["params"] > known["Deep 0"]["params"]
    assert known["Deep random 0"]["fuzzy"] == 0.0 and "settled" not in known["Deep random 0"]
    state = torch.load(out / "deep-random-seed0.pt", weights_only=True)
    assert (state["layer3.1.conv1.weight"] == 0).float().mean().item() == 0.5
    for name in names:  # what was saved can be loaded, wider and narrower layers too
        state = torch.load(out / f"{name.lower().replace(' ', '-')}-seed0.pt", weights_only=True)
        net = fitted(models.wrn_16_8(10, (1, 16, 16), 1), state)
        error = 100 - evaluate(net, open_data("digits", 16), torch.device("cpu")).accuracy[0]
        assert error == pytest.approx(known[f"{name} 0"]["error"], abs=0.6)  # two images, for sums in another order
        assert net.fc.in_features == net.bn.num_features == len(state["bn.weight"])
    with pytest.raises(DecompkError, match="no weights of VGG8"):
        fitted(models.vgg8(), state)
    made = {path.name for path in out.iterdir()}
    assert {"summary.md", "assignments.png", "weights.png", "ssl-1.1-seed0.pt"} <= made and not (
        out / "state/x"
    ).exists()
    assert not [*(out / "state").iterdir()]

    monkeypatch.setattr(run._Run, "_phase", lambda *_, **__: pytest.fail("it is there already"))
    assert main([*command, "--seeds", "0"]) == 0
    assert capsys.readouterr().out == first
    assert main(["report", "--splitnet", str(out), "--format", "csv"]) == 0
    assert capsys.readouterr().out.strip().endswith(run.summary_of(out).to_csv().strip())
    assert main([*command[:-1], "2,1,1", "--seeds", "0"]) == 2
    assert "other settings" in capsys.readouterr().err
    for text in ("{", "5", "{}", '{"runs": 5}', "[" * 10**5):
        (out / "result.json").write_text(text)
        assert main([*command, "--seeds", "0"]) == 2
        assert "damaged" in capsys.readouterr().err
        assert main(["report", "--splitnet", str(out)]) == 2
        assert "holds no result" in capsys.readouterr().err
    assert main(["report", "--splitnet", str(tmp_path)]) == 2
    assert "holds no result" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--epochs", "1,1"], "three positive numbers"),
        (["--epochs", "0,1,1"], "three positive numbers"),
        (["--width", "0"], "--width 0"),
        (["--pixels", "0"], "--pixels 0"),
        (["--variants", "dense,Deeper"], "'Deeper' is no split"),
        (["--variants", "SSL none"], "no strength"),
        (["--variants", "Deep overlap random"], "leave one out"),
        (["--variants", "Deep overlap even"], "not of equal size"),
        (["--model", "vgg16"], "no network of SplitNet's"),
        (["--data", "nowhere"], "names no data"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(tmp_path, capsys, wrong, words):
    assert main(["split", "--out", str(tmp_path / "new"), *wrong]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "new" / "result.json").exists()


def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(tmp_path, capsys, monkeypatch):
    names = ("Shallow overlap simplex", "SSL 1.1")
    digits = ["--model", "wrn_16_8", "--data", save_digits(tmp_path / "digits.npz", 300, 100), "--pixels", "16"]
    command = ["split", *SHORT, *digits, "--variants", ",".join(names), "--out"]
    monkeypatch.setattr(run, "draw_weights", lambda *_: None)  # another test's, and slow
    monkeypatch.setattr(run, "draw_assignments", lambda *_: None)
    assert main([*command, str(tmp_path / "whole")]) == 0
    save, left = Checkpoints.save, [0]

    def stopping(self, step, state):
        save(self, step, state)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", stopping)
    stops = 0
    for _ in range(8):  # seven epochs, over all phases of both
        left[0] = 1
        code = main([*command, str(tmp_path / "often")])
        stops += code == 130
        assert code in (0, 130)
    assert code == 0 and stops == 7
    assert "goes on behind the last epoch" in capsys.readouterr().err
    for name in names:
        file = f"{name.lower().replace(' ', '-')}-seed0.pt"
        a, b = (torch.load(tmp_path / folder / file, weights_only=True) for folder in ("whole", "often"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    one, other = (json.loads((tmp_path / folder / "result.json").read_text()) for folder in ("whole", "often"))
    assert one == other
    frames = [
        torch.load(tmp_path / f / "history/shallow-overlap-simplex.pt", weights_only=True) for f in ("whole", "often")
    ]
    assert frames[0][0] == frames[1][0] and torch.equal(frames[0][1], frames[1][1])
    (tmp_path / "whole/history/shallow-overlap-simplex.pt").write_bytes(b"cut short")
    assert main([*command, str(tmp_path / "whole")]) == 2
    assert "is damaged: remove it" in capsys.readouterr().err


def test_a_random_split_of_the_paper_keeps_what_its_table_says():
    """Table 1, at the paper's width; `decompk report --paper` has it to the digit."""
    with torch.device("meta"):
        net = models.wrn_16_8(100)
    nodes = Nodes(net, (3, 32, 32))
    for name, printed in (("FC", 0.35), ("Shallow", 32.54), ("Deep", 46.39), ("Hierarchical", 62.58)):
        assignment = Assignment(nodes, *split_points("wrn_16_8", name))
        run.deal(assignment, 0)
        whole = sum(p.numel() for p in net.parameters())
        kept = split(models.wrn_16_8(100), assignment).masks
        zeros = sum(int((~mask).sum()) for mask in kept.values())
        assert 100 * zeros / whole == pytest.approx(printed, abs=0.3)  # of all parameters; the norms' count here, too


def test_a_layer_of_zeros_alone_stays_as_it_is():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    nn.init.zeros_(net[2].weight)
    fast = block_diagonal(net)
    assert [d.form for d in fast.decisions] == ["dense", "dense"]
    assert "it holds nothing but zeros; training does not keep" in fast.decisions[1].reason
    assert torch.equal(fast(torch.ones(2, 8)), net(torch.ones(2, 8)))
