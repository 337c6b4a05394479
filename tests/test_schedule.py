"""Schedules of a packed network: whichever runs, outputs, gradients and statistics are those of the first."""

import contextlib
import copy
import gc
import os
import pickle
import threading
import timeit
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_packed_equals_separate, members_of
from nets import conv
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import decompk
from decompk import BackendError, DecompkError
from decompk.kernels import measure
from decompk.packed import choice, on_threads
from decompk.packed import schedule as schedules
from decompk.packed.per_member import PerMember
from decompk.packed.schedule import SCHEDULES

OTHERS = [name for name in SCHEDULES if name != "together"]
APART = ["in turn", "on threads"]
TOLERANCE = 1e-10  # float64


@pytest.fixture(autouse=True)
def _two_workers(monkeypatch):
    """As where torch has two threads, which on a busy machine wait for each other in every operator."""
    there = threading.current_thread
    monkeypatch.setattr(on_threads, "_workers", lambda K: 1 if there().name.startswith("decompk member") else min(K, 2))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (
            conv(3, 8),
            conv(8, 8),
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.b(self.a(x)))
        return self.fc(x.mean((2, 3)))


class Inverted(nn.Module):
    """A block of MobileNet: pointwise, depthwise, pointwise."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8, stride=2)
        self.block = nn.Sequential(conv(8, 16, 1), conv(16, 16, groups=16), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


class Transformer(nn.Module):
    """A tiny ViT: patches, a layer norm, attention, an MLP."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp, self.head = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x)).mean(1))


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.a(x)), 1)
        x = torch.relu(self.b(x))[:, :, ::2, ::2]
        return self.fc(x.reshape(x.size(0), -1))


class Viewing(nn.Module):
    """A view that only images laid channels first allow."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

    def forward(self, x):
        return self.fc(self.conv(x).view(x.shape[0], -1))


class Pair(nn.Module):
    """Returns a dict; one of its layers is used by nobody."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(6, 4), nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x):
        h = torch.tanh(self.a(x.flatten(1)[:, :6]))
        return {"features": h, "logits": self.b(h), "labels": h.argmax(1)}


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5))


NETWORKS = {
    "residual": Residual,
    "depthwise": Inverted,
    "transformer": Transformer,
    "lenet": LeNet,
    "view": Viewing,
    "mlp": mlp,
    "dict": Pair,
}


def image(*shape):
    return torch.randn(*shape, 3, 8, 8, dtype=torch.float64)


def tensors(out):
    return list(out.values()) if isinstance(out, dict) else [out]


def step(packed, x, name):
    """(outputs, gradients by name, buffers) of one training step by a schedule on a copy of the network."""
    net = copy.deepcopy(packed)
    with decompk.schedule(name):
        out = tensors(net(x))
    sum((t**2).sum() for t in out if t.is_floating_point()).backward()
    return out, {name: p.grad for name, p in net.named_parameters()}, dict(net.named_buffers())


def assert_same_step(found, wanted):
    for one, other in zip(found[0], wanted[0], strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert torch.allclose(one, other, atol=TOLERANCE)
    for ours, theirs in zip(found[1:], wanted[1:], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert (ours[key] is None) == (value is None), key
            assert value is None or torch.allclose(ours[key], value, atol=TOLERANCE), key


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_schedule_computes_what_all_members_together_compute(name, shared):
    packed = decompk.pack(members_of(NETWORKS[name]), input_dims=4)
    x = image(4) if shared else image(3, 4)
    packed(x)
    wanted = step(packed, x, "together")
    assert any(g is not None and g.any() for g in wanted[1].values())
    without_images = name in ("mlp", "dict")
    for other in OTHERS:
        if not (without_images and other == "side by side"):
            assert_same_step(step(packed, x, other), wanted)


@pytest.mark.parametrize("schedule", APART)
def test_members_train_as_each_would_alone(schedule):
    with decompk.schedule(schedule):
        assert_packed_equals_separate(members_of(Residual), image(4), packed=None, steps=2)


@pytest.mark.parametrize("schedule", OTHERS)
def test_members_on_crops(schedule):
    packed = decompk.grouped_subnets(decompk.models.build("resnet8", num_classes=5, width=4).double(), (3, 32, 32))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    packed(x)
    assert_same_step(step(packed, x, schedule), step(packed, x, "together"))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("schedule", OTHERS)
def test_the_input_gets_its_gradient_and_its_hooks_see_the_whole_of_it(schedule, shared):
    packed = decompk.pack(members_of(LeNet), input_dims=4)
    x = (image(4) if shared else image(3, 4)).requires_grad_()
    seen, counts = {}, []
    x.register_hook(lambda g: counts.append("x") or seen.update(x=g))
    weight = packed.fc.weight
    weight.register_hook(lambda g: 2 * g)
    weight.register_post_accumulate_grad_hook(lambda p: counts.append("p") or seen.update(p=p.grad.clone()))
    packed(x)
    found = []
    for name in ("together", schedule):
        packed.zero_grad()
        x.grad = None
        with decompk.schedule(name):
            packed(x).square().sum().backward()
        found.append([x.grad, weight.grad, seen["x"], seen["p"]])
        assert sorted(counts) == ["p", "x"]
        counts.clear()
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=TOLERANCE)


@pytest.mark.parametrize("schedule", APART)
def test_gradients_of_gradients(schedule):
    packed = decompk.pack(members_of(LeNet), input_dims=4)
    x = image(4).requires_grad_()
    packed(x)
    found = []
    for name in ("together", schedule):
        with decompk.schedule(name):
            out = packed(x)
        parameters = list(packed.parameters())
        first = torch.autograd.grad(out.square().sum(), [x, *parameters], create_graph=True)
        packed.zero_grad()
        sum((g**2).sum() for g in first).backward()
        found.append([*first, *(p.grad.clone() for p in parameters)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=TOLERANCE)


@pytest.mark.parametrize("schedule", APART)
def test_a_graph_that_is_kept_can_be_gone_through_twice_and_another_cannot(schedule):
    packed = decompk.pack(members_of(mlp), input_dims=4)
    with decompk.schedule(schedule):
        loss = packed(image(4)).square().sum()
    loss.backward(retain_graph=True)
    once = packed[1].weight.grad.clone()
    loss.backward()
    assert torch.allclose(packed[1].weight.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_only_gradients_that_are_asked_for_are_computed():
    packed = decompk.pack(members_of(mlp), input_dims=4)
    packed[1].weight.requires_grad_(False)
    with decompk.schedule("on threads"):
        loss = packed(image(4))[0].square().sum()
    (found,) = torch.autograd.grad(loss, [packed[3].bias])
    assert found[0].any() and not found[1:].any()
    assert all(p.grad is None for p in packed.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("schedule", APART)
def test_without_gradients(schedule, mode):
    packed = decompk.pack(members_of(Residual), input_dims=4).eval()
    x = image(4)
    wanted = packed(x)
    with mode(), decompk.schedule(schedule):
        out = packed(x)
    assert not out.requires_grad and out.is_inference() == (mode is torch.inference_mode)
    assert torch.allclose(out, wanted, atol=TOLERANCE)


@pytest.mark.parametrize("schedule", APART)
def test_under_autocast(schedule):
    packed = decompk.pack([member.float() for member in members_of(mlp)], input_dims=4)
    x = image(4).float()
    found = []
    for name in ("together", schedule):
        packed.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), decompk.schedule(name):
            out = packed(x)
        out.float().square().sum().backward()
        found.append([out, packed[1].weight.grad])
    assert found[1][0].dtype == torch.bfloat16
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=0.02, atol=0.02 * one.abs().max().item())


@pytest.mark.parametrize("schedule", ["in turn", "fused"])
def test_one_member(schedule):
    packed = decompk.pack(members_of(Residual, 1), input_dims=4)
    x = image(4)
    packed(x)
    assert_same_step(step(packed, x, schedule), step(packed, x, "together"))


def test_backward_goes_member_after_member():
    packed = decompk.pack(members_of(LeNet), input_dims=4)
    x, order = image(4), []
    packed(x)
    with decompk.schedule("in turn"):
        packed(x)
        members = packed._plans.standing(packed).members(packed)._members
        for k, member in enumerate(members):
            for layer in (member.a, member.b, member.fc):
                layer.register_full_backward_hook(lambda m, i, o, k=k: order.append(k))
        packed(x.requires_grad_()).sum().backward()
    assert order == [2, 2, 2, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("schedule", APART)
def test_what_a_member_raises_comes_through(schedule):
    packed = decompk.pack(members_of(mlp), input_dims=4, rehearse=False)
    x = image(4)
    with decompk.schedule(schedule):
        packed(x)
        standing = packed._plans.standing(packed)
        error = ArithmeticError("too large")

        def fail(module, args):
            raise error

        hook = standing.members(packed)._members[1][2].register_forward_pre_hook(fail)
        with pytest.raises(ArithmeticError) as caught:
            packed(x)
        assert caught.value is error
        hook.remove()
        assert torch.allclose(packed(x), step(packed, x, "together")[0][0])


def test_a_network_that_owns_parameters_runs_on_threads_alone():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = nn.Linear(192, 5), nn.Parameter(torch.rand(5))

        def forward(self, x):
            return self.fc(x.flatten(1)) * self.scale

    with pytest.warns(UserWarning, match="member by member"):
        packed = decompk.pack(members_of(Owner), input_dims=4)
    assert isinstance(packed._inner, PerMember)
    x = image(4)
    assert_same_step(step(packed, x, "on threads"), step(packed, x, "together"))
    for name in ("fused", "in turn"):
        with decompk.schedule(name), pytest.raises(DecompkError, match="member by member"):
            packed(x)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 5)

    def forward(self, x):
        out = self.last = self.fc(x.flatten(1))
        return out


class Keeping(nn.Module):
    """Adds to each sample what was left of the last batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(192, 8), nn.Linear(8, 8)
        self.last, self.factor = None, 0.5

    def forward(self, x):
        y = self.b(torch.relu(self.a(x)))
        if self.last is not None:
            y = y + self.factor * self.last
        self.last = y.detach().mean(0)
        return y


def test_what_parts_keep_between_calls_is_kept_in_one_place():
    """By whichever schedule and in whichever mode the calls are, and what a user changes meanwhile counts."""
    members = members_of(lambda: nn.Sequential(nn.Flatten(), Keeping(), nn.Linear(8, 5)))
    found, wanted = (decompk.pack(copy.deepcopy(members), input_dims=4) for _ in range(2))
    assert "member by member" in found.describe()
    for i, name in enumerate(["together", "on threads", "in turn", "together", "on threads", "on threads", "in turn"]):
        x, results = image(4), []
        for packed, schedule in ((found, name), (wanted, "together")):
            packed.train(i % 3 > 0)
            packed[1].factor = 2.0 if i == 4 else 0.5
            packed.zero_grad()
            with decompk.schedule(schedule):
                out = packed(x)
            out.square().sum().backward()
            results.append((out, packed[1].last, *(p.grad for p in packed.parameters())))
        for one, other in zip(*results, strict=True):
            assert torch.allclose(one, other, atol=TOLERANCE), (i, name)
        assert found[1].last.shape == (3, 8)


@pytest.mark.parametrize("schedule", APART)
def test_hooks_of_parts_that_run_member_by_member_are_seen(schedule):
    packed = decompk.pack(members_of(lambda: nn.Sequential(nn.Flatten(), Keeping())), input_dims=4)
    x = image(4)
    with decompk.schedule(schedule):
        packed(x)
        handle = packed[1].register_forward_hook(lambda m, i, o: 10 * o)
        with pytest.raises(DecompkError, match="Keeping has hooks"):
            packed(x)
        handle.remove()
        packed(x)


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 5)

    def forward(self, x):
        return self.fc(x.mul_(2).flatten(1))


IMPOSSIBLE = {
    "dropout": (lambda: nn.Sequential(mlp(), nn.Dropout(0.5)), "draws random numbers"),
    "an attribute": (Counting, "forward of Counting keeps 'last'"),
    "its input": (Overwriting, "changes its input"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_members_do_not_run_apart_where_that_would_compute_something_else(name):
    make, reason = IMPOSSIBLE[name]
    packed = decompk.pack(members_of(make), input_dims=4, rehearse=name != "its input")
    for schedule in APART:
        with decompk.schedule(schedule), pytest.raises(DecompkError, match=f"'{schedule}' cannot .*{reason}"):
            packed(image(4))
    with decompk.schedule("together"):
        assert packed(image(4)).shape == (3, 4, 5)


@pytest.mark.parametrize("schedule", APART)
def test_dropout_that_is_off_is_no_obstacle_until_it_is_on(schedule):
    packed = decompk.pack(members_of(lambda: nn.Sequential(mlp(), nn.Dropout(0.5))), input_dims=4).eval()
    x = image(4)
    wanted = packed(x)
    with decompk.schedule(schedule):
        assert torch.allclose(packed(x), wanted, atol=TOLERANCE)
        packed[1].train()
        with pytest.raises(DecompkError, match="random"):
            packed(x)
        packed[1].p = 0.0
        assert torch.allclose(packed(x), wanted, atol=TOLERANCE)


def test_hooks_see_all_members_together():
    packed = decompk.pack(members_of(LeNet), input_dims=4)
    x, seen = image(4), []
    with decompk.schedule("in turn"):
        packed(x)
        handle = packed.a.register_forward_hook(lambda m, i, o: seen.append(o.shape))
        with pytest.raises(DecompkError, match="hooks"):
            packed(x)
        handle.remove()
        packed(x)
        everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        with pytest.raises(DecompkError, match="hooks of all modules"):
            packed(x)
        everywhere.remove()
        with torch.autograd.graph.save_on_cpu(), pytest.raises(DecompkError, match="saved tensors"):
            packed(x)
    assert not seen


def test_what_is_asked_for_must_be_possible():
    packed = decompk.pack(members_of(LeNet), input_dims=4)
    x = image(4)
    with pytest.raises(BackendError, match="no schedule 'sideways': choose one of together, fused"):
        decompk.schedule("sideways").__enter__()
    with decompk.schedule("in turn"):
        with decompk.backend("torch"), pytest.raises(DecompkError, match="backend 'torch' is asked for"):
            packed(x)
        with pytest.raises(DecompkError, match="other arguments"):
            packed(x=x)
        with decompk.schedule("together"):
            packed(x)
    with decompk.schedule("fused"), pytest.raises(DecompkError, match="fused already"):
        decompk.fuse(packed)(x)
    with decompk.schedule("on threads"), pytest.raises(DecompkError, match="one member"):
        decompk.pack(members_of(LeNet, 1), input_dims=4)(x)


@pytest.mark.parametrize("schedule", APART)
def test_a_fused_network_runs_apart_as_well(schedule):
    packed = decompk.fuse(decompk.pack(members_of(Residual), input_dims=4))
    x = image(4)
    packed(x)
    assert_same_step(step(packed, x, schedule), step(packed, x, "together"))


@pytest.mark.parametrize("schedule", OTHERS)
def test_what_a_user_changes_is_followed(schedule):
    packed = decompk.pack(members_of(Residual), input_dims=4)
    x = image(4)

    def same(x=x):
        assert_same_step(step(packed, x, schedule), step(packed, x, "together"))
        with torch.no_grad(), decompk.schedule(schedule):
            found = packed(x)
        with torch.no_grad():
            assert torch.allclose(found, packed(x), atol=1e-4)

    packed.eval()
    same()
    packed.train()
    packed.stem[1].momentum = 0.5
    same()
    packed.stem[0].weight.requires_grad_(False)
    with torch.no_grad():
        packed.fc.weight.mul_(2)
    same()
    with torch.no_grad(), decompk.schedule(schedule):
        packed.float()(x.float())
        assert packed(x.float()).dtype == torch.float32
    packed.double()
    same()


@pytest.mark.parametrize("schedule", APART)
def test_copies_of_a_network_that_has_run_so(schedule):
    packed = decompk.pack([member.float() for member in members_of(mlp)], input_dims=4)
    x = image(4).float()
    with decompk.schedule(schedule):
        out = packed(x)
        for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            assert other.state_dict().keys() == packed.state_dict().keys()
            assert torch.allclose(other(x), out, atol=1e-6)
            with torch.no_grad():
                next(other.parameters()).zero_()
            assert torch.allclose(packed(x), out, atol=1e-6)
    assert torch.allclose(packed.unpack()[1](x), out[1], atol=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_forked_process_has_workers_of_its_own():
    assert on_threads.each(3, lambda k: k * k) == [0, 1, 4]
    child = os.fork()
    if not child:
        os._exit(0 if on_threads.each(3, lambda k: k + 1) == [1, 2, 3] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_workers_compute_on_one_thread_each_and_leave_the_caller_its_own():
    threads = torch.get_num_threads()
    assert (
        on_threads.each(2, lambda k: (torch.get_num_threads(), threading.current_thread().name[:7]))
        == [(1, "decompk")] * 2
    )
    assert torch.get_num_threads() == threads


# ---- the choice -----------------------------------------------------------------------------------------------------


@pytest.fixture
def measures(monkeypatch, tmp_path):
    """Measuring is allowed, into a cache of its own; a list of what was measured, by times that the test gives."""
    monkeypatch.setenv("DECOMPK_MEASURE", "1")
    monkeypatch.setattr(measure, "path", lambda: tmp_path / "choices.json")
    measured = []
    times = {"together": 3.0, "fused": 2.5, "side by side": 2.2, "in turn": 1.0, "on threads": 2.0}

    def time_each(call, schedules):
        measured.append([one.name for one in schedules])
        return {one.name: times[one.name] for one in schedules if len(schedules) > 1}

    monkeypatch.setattr(schedules, "time_each", time_each)
    return measured


def floats(make, K=3):
    return decompk.pack([member.float() for member in members_of(make, K)], input_dims=4)


def runs(monkeypatch):
    """Receives the name of each schedule that runs."""
    found = []
    for one in SCHEDULES.values():
        run = type(one).run
        monkeypatch.setattr(type(one), "run", lambda self, call, run=run: found.append(self.name) or run(self, call))
    return found


def test_the_third_call_of_a_kind_measures_and_the_fastest_runs_from_then_on(measures, monkeypatch):
    found, packed = runs(monkeypatch), floats(LeNet)
    x = image(4).float()
    out = [packed(x) for _ in range(5)]
    assert measures == [["together", "fused", "side by side", "in turn", "on threads"]]
    assert found == ["together"] * 2 + ["in turn"] * 3
    assert all(torch.allclose(one, out[0], atol=1e-5) for one in out)
    kind = f"train, gradients, shared 3×8×8 float32, {torch.get_num_threads()} threads, batch 4"
    assert packed.schedules == {kind: "in turn"}

    packed(image(6).float())  # another size: as the nearest one, until it is measured itself
    assert found[-1] == "in turn" and len(measures) == 1
    with torch.no_grad():
        packed.eval()(x)
    assert found[-1] == "together" and len(measures) == 1

    again = floats(LeNet)  # the same structure, as another process would have it
    again(x)
    assert found[-1] == "in turn" and len(measures) == 1 and again.schedules == packed.schedules


def test_a_network_keeps_what_was_chosen_and_takes_what_it_is_given(measures, monkeypatch, tmp_path):
    found, packed = runs(monkeypatch), floats(LeNet)
    x = image(4).float()
    for _ in range(3):
        packed(x)
    chosen = packed.schedules
    (tmp_path / "choices.json").unlink()
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), floats(LeNet)):
        other.schedules = chosen
        other(x)
        assert found[-1] == "in turn"
    packed.schedules = dict.fromkeys(chosen, "fused")
    packed(x)
    assert found[-1] == "fused" and len(measures) == 1
    with pytest.raises(BackendError, match="no schedule 'sideways'"):
        packed.schedules = {"train": "sideways"}


@pytest.mark.parametrize(
    "why", ["DECOMPK_MEASURE", "deterministic", "float64", "hooks", "a backend", "saved tensors", "a watching mode"]
)
def test_nothing_is_measured_where_that_must_not_be(why, measures, monkeypatch):
    packed, x = floats(LeNet), image(4).float()
    with contextlib.ExitStack() as stack:
        if why == "DECOMPK_MEASURE":
            monkeypatch.setenv("DECOMPK_MEASURE", "0")
        elif why == "deterministic":
            torch.use_deterministic_algorithms(True)
            stack.callback(torch.use_deterministic_algorithms, False)
        elif why == "float64":
            packed, x = packed.double(), x.double()
        elif why == "hooks":
            packed.a.register_forward_hook(lambda *_: None)
        elif why == "a backend":
            stack.enter_context(decompk.backend("torch"))
        elif why == "saved tensors":
            stack.enter_context(torch.autograd.graph.save_on_cpu())
        else:
            stack.enter_context(FlopCounterMode(display=False))
        for _ in range(4):
            packed(x)
    assert measures in ([], [["together", "fused"]]) and "in turn" not in packed.schedules.values()


def test_a_network_that_draws_is_measured_by_layers_alone(measures):
    packed = floats(lambda: nn.Sequential(mlp(), nn.Dropout(0.5)))
    for _ in range(3):
        packed(image(4).float())
    assert measures == [["together", "fused"]]


def test_a_schedule_that_became_impossible_is_left(measures, monkeypatch):
    found, packed, x = runs(monkeypatch), floats(LeNet), image(4).float()
    for _ in range(3):
        packed(x)
    shapes = []
    packed.a.register_forward_hook(lambda m, i, o: shapes.append(o.shape[0]))
    packed(x)
    assert found[-2:] == ["in turn", "together"] and shapes == [12]


def test_layers_together_win_what_is_nearly_a_tie():
    assert choice.best_of({"together": 1.0, "in turn": 0.98}) == "together"
    assert choice.best_of({"together": 1.0, "in turn": 0.93, "fused": 0.97}) == "in turn"
    assert choice.best_of({"together": 1.0, "fused": 0.99}) == "fused"


@pytest.mark.parametrize("fused", [False, True], ids=["packed", "fused"])
def test_a_measurement_is_seen_by_nobody(fused):
    packed, x = floats(Residual), image(4).float().requires_grad_()
    packed = decompk.fuse(packed) if fused else packed
    packed.fc.weight.register_hook(lambda g: pytest.fail("a hook ran"))
    x.register_hook(lambda g: pytest.fail("a hook ran"))
    packed(x)
    before = {name: t.clone() for name, t in packed.state_dict().items()}
    random = torch.get_rng_state()
    call = packed._call(x)
    offered = [one for one in SCHEDULES.values() if one.why_not(call) is None]
    times = choice.time_each(call, offered)
    assert list(times) == [one.name for one in offered] and len(times) == (4 if fused else 5)
    assert all(ms > 0 for ms in times.values())
    assert all(torch.equal(before[name], t) for name, t in packed.state_dict().items())
    assert all(t.grad is None for t in (x, *packed.parameters())) and torch.equal(torch.get_rng_state(), random)


def test_explain_says_what_was_measured(measures, capsys):
    packed, x = floats(LeNet), image(4).float()
    decompk.explain(packed, x)
    assert "schedule: together (not measured: it is at the third call of a kind)" in capsys.readouterr().out
    for _ in range(3):
        packed(x)
    decompk.explain(packed, x)
    wanted = "schedule: in turn (measured here, ms: in turn 1, on threads 2, side by side 2.2, fused 2.5, together 3)"
    assert wanted in " ".join(capsys.readouterr().out.split())
    with decompk.schedule("fused"):
        decompk.explain(packed, x)
    assert "schedule: fused (asked for by name)" in capsys.readouterr().out


def test_settling_measures_now_and_nothing_later(measures, monkeypatch):
    found, packed = runs(monkeypatch), floats(LeNet)
    schedules.settle(packed, image(4).float())
    assert measures == [["together", "fused", "side by side", "in turn", "on threads"], ["in turn"]] and not found
    for _ in range(4):
        packed(image(3).float())
        with torch.no_grad():
            packed(image(4).float())
    assert set(found[::2]) == {"in turn"} and set(found[1::2]) == {"together"} and len(measures) == 2


def test_a_call_pays_little_for_the_choice():
    packed, x = floats(LeNet), image(4).float()
    packed(x)
    call = packed._call(x)
    chosen = packed._plans.chosen
    seconds = min(timeit.repeat(lambda: chosen(call), number=100, repeat=20)) / 100
    assert seconds < 20e-6


def test_kept_slices_follow_parameters_that_lie_otherwise_or_are_others():
    members = [nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double() for _ in range(3)]
    packed = decompk.pack(members)
    x = torch.randn(4, 6, dtype=torch.float64)

    def assert_alone():
        with decompk.schedule("on threads"):
            torch.testing.assert_close(packed(x), torch.stack([m(x) for m in packed.unpack()]), rtol=0, atol=1e-12)

    assert_alone()
    packed[0].weight.data = packed[0].weight.data.transpose(1, 2)  # at the same place
    assert_alone()
    gone = weakref.ref(packed[1].weight)
    packed[1].weight = nn.Parameter(torch.randn_like(packed[1].weight))
    assert_alone()
    gc.collect()
    assert gone() is None
    packed.load_state_dict({name: torch.randn_like(t) for name, t in packed.state_dict().items()})
    assert_alone()
