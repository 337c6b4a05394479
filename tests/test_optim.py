"""One step of K members is K steps of torch's optimizers, each with its own hyperparameters, each free to pause."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from helpers import HostValues
from torch import nn
from torch.optim import lr_scheduler

import decompk
from decompk import optim
from decompk.errors import CheckpointError, DecompkError, PackError

K = 3
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}  # relative to the largest element

LR = [0.1, 0.01, 0.03]
DECAY = [0.0, 0.1, 0.01]
BETAS = [(0.9, 0.999), (0.8, 0.9), (0.5, 0.99)]
KINDS = {  # optimizer: what all members share, what each has of its own
    "sgd": ("SGD", {}, {"lr": LR, "weight_decay": DECAY}),
    "momentum": ("SGD", {}, {"lr": LR, "weight_decay": DECAY, "momentum": [0.9, 0.0, 0.5]}),
    "nesterov": ("SGD", {"nesterov": True}, {"lr": LR, "momentum": [0.9, 0.8, 0.5]}),
    "dampening": ("SGD", {"maximize": True}, {"lr": LR, "momentum": [0.9, 0.8, 0.5], "dampening": [0.0, 0.5, 0.1]}),
    "adam": ("Adam", {}, {"lr": LR, "weight_decay": DECAY, "betas": BETAS, "eps": [1e-8, 1e-3, 1e-6]}),
    "amsgrad": ("Adam", {"amsgrad": True, "maximize": True}, {"lr": LR, "betas": BETAS}),
    "adamw": ("AdamW", {}, {"lr": LR, "weight_decay": [0.0, 0.5, 0.1], "betas": BETAS}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def network(seed, width=5):
    """Convolutions without bias: batch norm leaves theirs no gradient but rounding errors, which Adam would enlarge."""
    torch.manual_seed(seed)
    layers = {
        "stem": nn.Conv2d(3, width, 3, padding=1, bias=False),
        "norm": nn.BatchNorm2d(width),
        "relu": nn.ReLU(),
        "conv": nn.Conv2d(width, 8, 3, stride=2, bias=False),
        "last_norm": nn.BatchNorm2d(8),
        "last_relu": nn.ReLU(),
        "point": nn.Conv2d(8, 8, 1),
        "pool": nn.AdaptiveAvgPool2d(2),
        "flat": nn.Flatten(),
        "head": nn.Linear(32, 4),
    }
    return nn.Sequential(OrderedDict(layers))


def members_and_packed(dtype=torch.float32, width=5):
    members = [network(seed, width).to(dtype) for seed in range(K)]
    return members, decompk.pack(members)


def alone(members, kind, **more):
    """torch's optimizers of the separate members."""
    name, shared, own = KINDS[kind]
    return [
        getattr(torch.optim, name)(m.parameters(), **shared, **{n: v[k] for n, v in own.items()}, **more)
        for k, m in enumerate(members)
    ]


def together(packed, kind, **more):
    name, shared, own = KINDS[kind]
    return getattr(optim, name)(packed, **{**shared, **own, **more})


def feed(packed, members, t):
    """The same gradients for both, in the parameters' own layouts."""
    noise = torch.Generator().manual_seed(t)
    for p, *own in zip(packed.parameters(), *(m.parameters() for m in members), strict=True):
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=noise))
        for k, q in enumerate(own):
            q.grad = torch.empty_like(q).copy_(p.grad[k])


def train(packed, optimizer, t):
    """One step on batch t."""
    batch = torch.Generator().manual_seed(t)
    x, y = torch.randn(6, 3, 9, 9, generator=batch), torch.randint(4, (6,), generator=batch)
    optimizer.zero_grad()
    decompk.losses.cross_entropy(packed(x.to(next(packed.parameters()).dtype)), y).backward()
    optimizer.step()


def snapshot(packed, optimizer, members=range(K)):
    """Copies of all that belongs to the members: weights, statistics and optimizer state."""
    tensors = dict(packed.state_dict())
    for name, p in packed.named_parameters():
        tensors |= {f"{name} {key}": t for key, t in optimizer.state[p].items()}
    assert all(t.shape[0] == K for t in tensors.values())
    return {(name, k): t[k].clone() for name, t in tensors.items() for k in members}


def assert_same_bits(one, two):
    assert one.keys() == two.keys() and one
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


def assert_members(packed, members, dtype):
    """Member k of the stacks is the k-th separate member, up to the dtype's tolerance."""
    for name, p in packed.named_parameters():
        for k, member in enumerate(members):
            q = member.get_parameter(name)
            error = (p[k] - q).abs().max() / q.abs().max()
            assert error <= TOLERANCE[dtype], f"{name} of member {k}: {error:.1e}"


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every fused call."""
    seen = []
    for name in ("_fused_sgd_", "_fused_adam_", "_fused_adamw_"):
        fused = getattr(torch, name)

        def counted(*args, fused=fused, **kwargs):
            seen.append((args, kwargs))
            return fused(*args, **kwargs)

        monkeypatch.setattr(torch, name, counted)
    return seen


@each_kind
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_each_member_becomes_what_torchs_optimizer_makes_of_it_alone(kind, dtype):
    members, packed = members_and_packed(dtype)
    start = [p.detach().clone() for p in packed.parameters()]
    singles, optimizer = alone(members, kind, foreach=False), together(packed, kind)
    for t in range(20):
        feed(packed, members, t)
        optimizer.step()
        for single in singles:
            single.step()
    assert_members(packed, members, dtype)
    assert all((p - before).abs().max() > 0.05 for p, before in zip(packed.parameters(), start, strict=True))
    for name, p in packed.named_parameters():
        for k, (member, single) in enumerate(zip(members, singles, strict=True)):
            for key, expected in single.state[member.get_parameter(name)].items():
                if expected is not None:
                    error = (optimizer.state[p][key][k] - expected).abs().max() / expected.abs().max()
                    assert error <= 10 * TOLERANCE[dtype], f"{key} of {name} of member {k}: {error:.1e}"


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_member_gets_the_bits_of_torchs_fused_optimizer_on_it_alone(kind, dtype):
    members, packed = members_and_packed(dtype)
    members = [member.to(memory_format=torch.channels_last) for member in members]  # as the stacks are
    packed.to(memory_format=torch.channels_last)
    broken = dtype == torch.bfloat16 and KINDS[kind][0] == "SGD"  # on a CPU, up to torch 2.13 (pytorch#191763)
    singles, optimizer = alone(members, kind, fused=not broken), together(packed, kind)
    for t in range(5):
        feed(packed, members, t)
        optimizer.step()
        for single in singles:
            single.step()
    for name, p in packed.named_parameters():
        assert all(torch.equal(p[k], member.get_parameter(name)) for k, member in enumerate(members)), name


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_member_is_no_further_from_float64_than_torchs_own(kind, dtype):
    members, packed = members_and_packed(dtype)
    exact = [copy.deepcopy(member).double() for member in members]
    start = [p.detach().clone() for p in packed.parameters()]
    optimizers = [together(packed, kind), *alone(members, kind, foreach=False), *alone(exact, kind)]
    for t in range(10):
        feed(packed, members, t)
        feed(packed, exact, t)
        for optimizer in optimizers:
            optimizer.step()
    ours = torch.zeros(K)
    torchs = torch.zeros(K)
    for p, before, *both in zip(packed.parameters(), start, *(m.parameters() for m in members + exact), strict=True):
        assert (p - before).abs().max() > 0.05
        for k in range(K):
            single, truth = both[k], both[K + k]
            ours[k] = torch.maximum(ours[k], (p[k] - truth).abs().max())
            torchs[k] = torch.maximum(torchs[k], (single - truth).abs().max())
    assert torchs.min() > 0 and (ours <= 2 * torchs).all(), (ours, torchs)


@pytest.mark.parametrize("kind", ["momentum", "nesterov", "adam", "adamw"])
def test_trained_on_one_batch_the_packed_members_stay_the_separate_ones(kind):
    members, packed = members_and_packed(torch.float64)
    singles, optimizer = alone(members, kind), together(packed, kind)
    for t in range(20):
        batch = torch.Generator().manual_seed(t)
        x, y = torch.randn(6, 3, 9, 9, generator=batch, dtype=torch.float64), torch.randint(4, (6,), generator=batch)
        optimizer.zero_grad()
        decompk.losses.cross_entropy(packed(x), y).backward()
        optimizer.step()
        for member, single in zip(members, singles, strict=True):
            single.zero_grad()
            F.cross_entropy(member(x), y).backward()
            single.step()
    stacked = packed.state_dict()
    for k, member in enumerate(members):
        for name, expected in member.state_dict().items():
            assert torch.allclose(stacked[name][k], expected, rtol=1e-7, atol=1e-9), f"{name} of member {k}"


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equal_members_are_one_fused_call_with_the_bits_of_torchs_on_the_stacks(name, memory_format, calls):
    packed = decompk.pack([nn.Conv2d(16, 64, 3).requires_grad_() for _ in range(K)]).to(memory_format=memory_format)
    packed.to(torch.float32)
    other = copy.deepcopy(packed)
    how = {"momentum": 0.9} if name == "SGD" else {"amsgrad": True}
    optimizer = getattr(optim, name)(packed, 0.1, weight_decay=0.1, **how)
    single = getattr(torch.optim, name)(other.parameters(), 0.1, weight_decay=0.1, fused=True, **how)
    for t in range(4):
        feed(packed, [], t)
        for p, q in zip(packed.parameters(), other.parameters(), strict=True):
            q.grad = p.grad.clone()
        calls.clear()
        optimizer.step()
        assert len(calls) == 1 and [p.shape for p in calls[0][0][0]] == [p.shape for p in packed.parameters()]
        single.step()
        assert all(torch.equal(p, q) for p, q in zip(packed.parameters(), other.parameters(), strict=True))
    assert packed.weight.stride() == optimizer.state[packed.weight][[*optimizer.state[packed.weight]][-1]].stride()


def test_adjacent_members_with_equal_hyperparameters_share_their_call(calls):
    _, packed = members_and_packed()
    optimizer = optim.AdamW(packed, lr=[0.1, 0.1, 0.2])
    feed(packed, [], 0)
    optimizer.step()
    assert [kwargs["lr"] for _, kwargs in calls] == [0.1, 0.2]
    optimizer.param_groups[2]["lr"] = 0.1
    optimizer.step()
    assert len(calls) == 3
    optimizer.param_groups[1]["weight_decay"] = 0.5
    optimizer.step()
    assert len(calls) == 6


def test_members_of_two_dtypes_are_updated_in_one_call_each(calls):
    members, packed = members_and_packed()
    for net in (*members, packed):
        net.stem.to(torch.bfloat16)
    optimizer, singles = optim.Adam(packed, 0.1), [torch.optim.Adam(m.parameters(), 0.1, fused=True) for m in members]
    feed(packed, members, 0)
    optimizer.step()
    assert len(calls) == 2
    for k, single in enumerate(singles):
        single.step()
        for p, q in zip(packed.parameters(), members[k].parameters(), strict=True):
            assert p.dtype == q.dtype and torch.equal(p[k], q)


@each_kind
def test_the_layout_of_a_gradient_changes_no_bit(kind):
    _, packed = members_and_packed()
    other = copy.deepcopy(packed)
    one, two = together(packed, kind), together(other, kind)
    turned = 0
    for t in range(3):
        feed(packed, [], t)
        for p, q in zip(packed.parameters(), other.parameters(), strict=True):
            q.grad = p.grad.transpose(0, -1).contiguous().transpose(0, -1)
            turned += q.grad.stride() != q.stride()
        one.step()
        two.step()
    assert turned
    assert_same_bits(snapshot(packed, one), snapshot(other, two))


def test_a_gradient_whose_strides_differ_in_name_only_is_not_copied(calls):
    packed = decompk.pack([nn.Conv2d(16, 64, 1, bias=False) for _ in range(K)])
    p = packed.weight
    p.grad = torch.randn(K, 64, 1, 1, 16).movedim(-1, 2)
    assert p.grad.stride() != p.stride()
    optim.SGD(packed).step()
    assert calls[0][0][1][0].data_ptr() == p.grad.data_ptr()


@each_kind
def test_another_memory_format_on_the_way_changes_no_bit(kind):
    _, packed = members_and_packed(width=64)  # weights that fill a CPU's vectors: no element is rounded otherwise
    other = copy.deepcopy(packed)
    one, two = together(packed, kind), together(other, kind)
    for t, memory_format in enumerate([torch.contiguous_format, torch.channels_last, torch.contiguous_format]):
        other.to(memory_format=memory_format)
        for net, optimizer in ((packed, one), (other, two)):
            feed(net, [], t)
            optimizer.step()
    assert packed.stem.weight.stride() != other.stem.weight.stride()
    assert_same_bits(snapshot(packed, one), snapshot(other, two))


def test_a_stack_without_gradient_stays_and_takes_its_first_step_later():
    members, packed = members_and_packed(torch.float64)
    for kind in ("dampening", "adam"):
        singles, optimizer = alone(members, kind, foreach=False), together(packed, kind)
        for t in range(6):
            feed(packed, members, t)
            for net in (packed, *members):
                if t in (0, 3):
                    net.conv.weight.grad = None
            optimizer.step()
            for single in singles:
                single.step()
        assert optimizer.state[packed.conv.weight]["step"].tolist() == [4] * K
        assert_members(packed, members, torch.float64)


def test_parameters_that_need_no_gradient_rest_until_they_do():
    _, packed = members_and_packed()
    packed.stem.requires_grad_(False)
    optimizer, before = optim.SGD(packed, 0.1), packed.stem.weight.clone()
    assert [p for group in optimizer.param_groups for p in group["params"]] == [*packed.parameters()]
    for trains in (False, True):
        packed.stem.requires_grad_(trains)
        packed(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        assert torch.equal(packed.stem.weight, before) != trains


def test_param_groups_have_hyperparameters_of_their_own():
    members, packed = members_and_packed(torch.float64)

    def split(net, **own):
        *body, weight, bias = net.parameters()
        return [{"params": body}, {"params": (p for p in (weight, bias)), "betas": (0.5, 0.6), **own}]

    optimizer = optim.AdamW(split(packed, lr=[0.3, 0.2, 0.1]), lr=LR, packed=packed)
    assert [group["lr"] for group in optimizer.param_groups] == [*LR, 0.3, 0.2, 0.1]
    singles = [torch.optim.AdamW(split(m, lr=[0.3, 0.2, 0.1][k]), lr=LR[k]) for k, m in enumerate(members)]
    for t in range(5):
        feed(packed, members, t)
        optimizer.step()
        for single in singles:
            single.step()
    assert_members(packed, members, torch.float64)


def test_it_takes_a_compiled_module_and_a_closure():
    members, packed = members_and_packed()
    other = copy.deepcopy(packed)
    compiled = torch.compile(packed, backend="eager")
    one, two = optim.SGD(compiled, LR, momentum=0.9), optim.SGD(other, LR, momentum=0.9)
    x = torch.randn(5, 3, 9, 9)

    def loss():
        one.zero_grad()
        value = packed(x).square().sum()
        value.backward()
        return value

    value = one.step(loss)
    assert value.requires_grad and value > 0
    other(x).square().sum().backward()
    two.step()
    assert_same_bits(snapshot(packed, one), snapshot(other, two))
    one.stop(0)
    assert one.state_dict()["stopped"][0].keys() == dict(packed.named_buffers()).keys()


SCHEDULERS = {
    "lambda": (
        lambda o: lr_scheduler.LambdaLR(o, [lambda t, k=k: 0.9 ** (t * (k + 1)) for k in range(K)]),
        lambda o, k: lr_scheduler.LambdaLR(o, lambda t: 0.9 ** (t * (k + 1))),
    ),
    "multistep": (
        lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.3),
        lambda o, k: lr_scheduler.MultiStepLR(o, [2, 5], 0.3),
    ),
    "onecycle": (
        lambda o: lr_scheduler.OneCycleLR(o, LR, total_steps=20),
        lambda o, k: lr_scheduler.OneCycleLR(o, LR[k], total_steps=20),
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("kind", ["nesterov", "adamw"])
def test_torchs_schedulers_reach_every_member(name, kind, capturable):
    members, packed = members_and_packed(torch.float64)
    singles, optimizer = alone(members, kind), together(packed, kind, capturable=capturable)
    schedule, schedules = SCHEDULERS[name][0](optimizer), [SCHEDULERS[name][1](s, k) for k, s in enumerate(singles)]
    rates = set()
    for t in range(10):
        feed(packed, members, t)
        for each in (optimizer, *singles, schedule, *schedules):
            each.step()
        rates |= {group["lr"] for group in optimizer.param_groups}
        assert [group["lr"] for group in optimizer.param_groups] == [s.param_groups[0]["lr"] for s in singles]
    assert len(rates) > K
    assert_members(packed, members, torch.float64)


@each_kind
@pytest.mark.parametrize("capturable", [False, True])
def test_a_stopped_member_keeps_every_bit_and_so_do_the_others(kind, capturable):
    _, packed = members_and_packed()
    _, other = members_and_packed()
    optimizer, untouched = together(packed, kind, capturable=capturable), together(other, kind)
    for t in range(3):
        train(packed, optimizer, t)
        train(other, untouched, t)
    optimizer.stop(1)
    assert optimizer.stopped == (1,) and untouched.stopped == ()
    before = snapshot(packed, optimizer, [1])
    for t in range(3, 7):
        train(other, untouched, t)
        batch = torch.Generator().manual_seed(t)
        x, y = torch.randn(6, 3, 9, 9, generator=batch), torch.randint(4, (6,), generator=batch)
        optimizer.zero_grad()
        decompk.losses.cross_entropy(packed(x), y).backward()
        for p in packed.parameters():
            p.grad[1] = torch.nan
        moved = packed.norm.running_mean[1].clone()
        optimizer.step()
        assert not torch.equal(packed.norm.running_mean[1], moved)
        assert_same_bits(snapshot(packed, optimizer, [1]), before)
        assert_same_bits(snapshot(packed, optimizer, [0, 2]), snapshot(other, untouched, [0, 2]))
    packed(x)
    optimizer.resume(1)
    assert_same_bits(snapshot(packed, optimizer, [1]), before)


def test_stopping_changes_no_bit_of_equal_members_that_shared_a_call():
    for name, how in (("SGD", {"momentum": 0.9, "dampening": 0.1}), ("Adam", {}), ("AdamW", {"amsgrad": True})):
        for dtype in (torch.float32, torch.bfloat16):
            _, packed = members_and_packed(dtype)
            other = copy.deepcopy(packed)
            one, two = getattr(optim, name)(packed, 0.1, **how), getattr(optim, name)(other, 0.1, **how)
            one.stop(0)
            for t in range(4):
                for net, optimizer in ((packed, one), (other, two)):
                    feed(net, [], t)
                    optimizer.step()
            assert_same_bits(snapshot(packed, one, [1, 2]), snapshot(other, two, [1, 2]))
            assert not torch.equal(packed.stem.weight[0], other.stem.weight[0])


@each_kind
@pytest.mark.parametrize("pause", [range(4), range(3, 6)])
@pytest.mark.parametrize("equal", [False, True])
def test_a_resumed_member_goes_on_like_a_torch_optimizer_that_paused(kind, pause, equal):
    members, packed = members_and_packed(torch.float64)
    singles, optimizer = alone(members, kind), together(packed, kind)
    if equal:
        groups = [single.param_groups[0] for single in singles]
        own = {name: value for name, value in groups[2].items() if name in KINDS[kind][2]}
        for group in (*groups, *optimizer.param_groups):
            group.update(own)
    for t in range(10):
        if t == pause.start:
            optimizer.stop(1)
        if t == pause.stop:
            optimizer.resume(1)
        feed(packed, members, t)
        optimizer.step()
        for k, single in enumerate(singles):
            if not (k == 1 and t in pause):
                single.step()
    assert optimizer.stopped == ()
    assert_members(packed, members, torch.float64)
    for p in packed.parameters():
        assert optimizer.state[p]["step"].tolist() == [10, 10 - len(pause), 10]


def test_momentum_that_is_switched_on_later_starts_with_the_gradient():
    members, packed = members_and_packed(torch.float64)
    singles, optimizer = alone(members, "sgd", foreach=False), together(packed, "sgd")
    for t in range(4):
        if t == 2:
            for group in [*optimizer.param_groups, *(single.param_groups[0] for single in singles)]:
                group.update(momentum=0.9, dampening=0.5)
        feed(packed, members, t)
        for each in (optimizer, *singles):
            each.step()
    assert_members(packed, members, torch.float64)


@pytest.mark.parametrize("on_the_way", ["nothing", "a checkpoint", "a copy", "another member's pause"])
def test_momentum_that_one_member_gets_later_starts_with_its_gradient(on_the_way):
    alone = [nn.Linear(3, 2) for _ in range(3)]
    packed = decompk.pack(alone)
    ours = decompk.optim.SGD(packed, lr=0.1, momentum=[0.9, 0.0, 0.9], dampening=0.5)
    theirs = [torch.optim.SGD(member.parameters(), lr=0.1, momentum=0.9, dampening=0.5) for member in alone]
    theirs[1].param_groups[0]["momentum"] = 0.0
    for step in range(5):
        if step == 2:
            ours.param_groups[1]["momentum"] = theirs[1].param_groups[0]["momentum"] = 0.9
            if on_the_way == "a checkpoint":
                ours.load_state_dict(copy.deepcopy(ours.state_dict()))
            elif on_the_way == "a copy":
                packed, ours = copy.deepcopy((packed, ours))
            elif on_the_way == "another member's pause":
                ours.stop(0)
                ours.resume(0)
        x = torch.randn(4, 3)
        for optimizer, net in ((ours, packed), *zip(theirs, alone, strict=True)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    for k, member in enumerate(alone):
        assert torch.allclose(packed.get_parameter("weight")[k], member.weight, rtol=1e-6, atol=1e-7), k


def test_all_members_can_stop():
    _, packed = members_and_packed()
    optimizer = optim.Adam(packed, LR)
    train(packed, optimizer, 0)
    before = snapshot(packed, optimizer)
    for k in range(K):
        optimizer.stop(k)
    train(packed, optimizer, 1)
    assert_same_bits(snapshot(packed, optimizer), before)


def test_members_that_pause_equally_long_share_a_call_again(calls):
    for name, expected in (("Adam", [1, 2, 2, 2, 1, 2, 3]), ("SGD", [1, 1, 1, 2, 1, 2, 1])):
        _, packed = members_and_packed()
        optimizer = getattr(optim, name)(packed)
        feed(packed, [], 0)
        optimizer.step()
        lengths = []
        for stopped in (0, None, 2, 1, None, 1, None):
            for k in range(K):
                optimizer.resume(k)
            if stopped is not None:
                optimizer.stop(stopped)
            calls.clear()
            optimizer.step()
            lengths.append(len(calls))
        assert lengths == expected, name


def through_a_file(*state_dicts):
    file = io.BytesIO()
    torch.save(state_dicts, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_kind
def test_a_loaded_optimizer_goes_on_with_the_bits_of_one_that_was_never_interrupted(kind):
    _, packed = members_and_packed()
    optimizer = together(packed, kind)
    for t in range(8):
        if t == 2:
            optimizer.stop(2)
        if t == 4:
            optimizer.resume(2)
            optimizer.stop(0)
            optimizer.param_groups[1]["lr"] = 0.02
        train(packed, optimizer, t)

    members = [network(seed + 10) for seed in range(K)]
    again = decompk.pack(members)
    loaded = together(again, kind, lr=0.5)
    train(again, loaded, 99)
    loaded.stop(1)
    weights, state = through_a_file(packed.state_dict(), optimizer.state_dict())
    again.load_state_dict(weights)
    loaded.load_state_dict(state)
    assert loaded.stopped == (0,)
    assert [g["lr"] for g in loaded.param_groups] == [g["lr"] for g in optimizer.param_groups]
    assert_same_bits(snapshot(again, loaded), snapshot(packed, optimizer))
    frozen = snapshot(packed, optimizer, [0])
    for t in range(8, 12):
        train(packed, optimizer, t)
        train(again, loaded, t)
    assert_same_bits(snapshot(again, loaded), snapshot(packed, optimizer))
    assert_same_bits(snapshot(again, loaded, [0]), frozen)
    for each in (loaded, optimizer):
        each.resume(0)
    train(packed, optimizer, 12)
    train(again, loaded, 12)
    assert_same_bits(snapshot(again, loaded), snapshot(packed, optimizer))
    assert not torch.equal(frozen["stem.weight", 0], packed.stem.weight[0])


def test_loading_shares_no_memory_and_takes_any_layout_and_no_mention_of_stopped_members():
    _, packed = members_and_packed(width=64)
    optimizer = together(packed, "adam")
    train(packed, optimizer, 0)
    again = copy.deepcopy(packed).to(memory_format=torch.contiguous_format)
    loaded = together(again, "adam")
    loaded.stop(1)
    state = optimizer.state_dict()
    del state["stopped"]
    before = snapshot(packed, optimizer)
    loaded.load_state_dict(state)
    assert loaded.stopped == ()
    feed(again, [], 1)
    loaded.step()
    assert_same_bits(snapshot(packed, optimizer), before)
    feed(packed, [], 1)
    optimizer.step()
    assert_same_bits(snapshot(again, loaded), snapshot(packed, optimizer))


def test_module_and_optimizer_can_be_copied_together():
    _, packed = members_and_packed()
    optimizer = together(packed, "dampening")
    optimizer.stop(2)
    train(packed, optimizer, 0)
    again, copied = copy.deepcopy((packed, optimizer))
    before = snapshot(packed, optimizer)
    train(again, copied, 1)
    assert copied.stopped == (2,)
    assert_same_bits(snapshot(packed, optimizer), before)
    train(packed, optimizer, 1)
    assert_same_bits(snapshot(again, copied), snapshot(packed, optimizer))


def test_a_checkpoint_of_another_module_is_refused_and_changes_nothing():
    _, packed = members_and_packed()
    optimizer = optim.Adam(packed)
    train(packed, optimizer, 0)
    before = snapshot(packed, optimizer)

    _, wider = members_and_packed(width=7)
    other = optim.Adam(wider)
    train(wider, other, 0)
    with pytest.raises(
        CheckpointError, match=r"exp_avg of 'stem.weight' is \(3, 7, 3, 3, 3\) in the checkpoint and \(3, 5"
    ):
        optimizer.load_state_dict(other.state_dict())
    other = optim.Adam(wider)
    other.stop(1)
    with pytest.raises(
        CheckpointError, match=r"'norm.running_mean' of member 1 is \(7,\) in the checkpoint and \(5,\)"
    ):
        optimizer.load_state_dict(other.state_dict())
    for other in (optim.SGD(packed), optim.Adam(decompk.pack([network(0)] * 2))):
        with pytest.raises(CheckpointError, match="of another optimizer, other members or other parameter groups"):
            optimizer.load_state_dict(other.state_dict())
    state = optimizer.state_dict()
    with pytest.raises(CheckpointError, match="member 2 was stopped with other buffers"):
        optimizer.load_state_dict({**state, "stopped": {2: {}}})
    with pytest.raises(DecompkError, match="no member 3: members are 0 to 2"):
        optimizer.load_state_dict({**state, "stopped": {3: {}}})
    assert optimizer.stopped == ()
    assert_same_bits(snapshot(packed, optimizer), before)


def test_what_must_be_captured_again_shows_and_learning_rates_alone_do_not():
    _, packed = members_and_packed()
    optimizer = optim.SGD(packed, LR, momentum=0.9, capturable=True)
    key = optimizer.prepare()
    hash(key)
    train(packed, optimizer, 0)
    assert optimizer.prepare() == key
    groups = optimizer.param_groups
    for group in groups:
        group["lr"] *= 0.5
    assert optimizer.prepare() == key

    seen = [key]

    def changed():
        seen.append(optimizer.prepare())
        assert optimizer.prepare() == seen[-1]
        return seen[-1] not in seen[:-1]

    groups[1]["momentum"] = 0.8
    assert changed()
    groups[1]["weight_decay"] = 0.1
    assert changed()
    groups[0].update(groups[1] | {"params": groups[0]["params"]})
    assert changed()  # members 0 and 1 are one run now
    optimizer.stop(2)
    assert changed()
    optimizer.resume(2)
    optimizer.stop(1)
    assert changed()
    optimizer.resume(1)
    optimizer.stop(1)
    assert changed()  # the saved statistics lie elsewhere
    optimizer.load_state_dict(optimizer.state_dict())
    assert changed()
    packed.stem.weight.data = packed.stem.weight.data.clone()
    assert changed()
    train(packed, optimizer, 1)
    assert optimizer.prepare() == seen[-1]
    optimizer.state.clear()
    assert changed()


@each_kind
def test_learning_rates_on_the_device_change_no_bit(kind, calls):
    _, packed = members_and_packed()
    other = copy.deepcopy(packed)
    one, two = together(packed, kind, capturable=True), together(other, kind)
    for t in range(4):
        for group in (*one.param_groups, *two.param_groups):
            group["lr"] *= 0.7
        train(packed, one, t)
        assert all(isinstance(kwargs["lr"], torch.Tensor) and kwargs["lr"].dim() == 0 for _, kwargs in calls)
        train(other, two, t)
        calls.clear()
    assert_same_bits(snapshot(packed, one), snapshot(other, two))


def test_a_step_under_capture_uploads_nothing_and_makes_no_state(monkeypatch):
    _, packed = members_and_packed()
    optimizer = optim.SGD(packed, LR, momentum=0.9, capturable=True)
    plain = optim.SGD(packed, LR)
    feed(packed, [], 0)
    packed.conv.weight.grad = None

    def capture(optimizer):
        with monkeypatch.context() as patch:
            patch.setattr(optim, "_capturing", lambda: True)
            optimizer.step()

    for each in (optimizer, plain):
        with pytest.raises(DecompkError, match="a CUDA graph can capture step.. with capturable=True, after one step"):
            capture(each)
    optimizer.prepare()
    with pytest.raises(DecompkError, match="'stem.weight' has no state yet: take one step"):
        capture(optimizer)
    optimizer.stop(0)
    optimizer.step()
    feed(packed, [], 1)
    with pytest.raises(DecompkError, match="'conv.weight' has no state yet: take one step"):
        capture(optimizer)
    optimizer.step()
    optimizer.resume(0)
    optimizer.prepare()
    with pytest.raises(DecompkError, match="the first step with momentum differs from the others"):
        capture(optimizer)
    optimizer.step()

    other, reference = copy.deepcopy((packed, optimizer))
    for t, factor in enumerate([1.0, 0.5, 0.1]):
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] *= factor
        optimizer.prepare()
        for group in optimizer.param_groups:
            group["lr"] *= 3  # comes too late for this step
        feed(packed, [], t)
        capture(optimizer)
        for group in optimizer.param_groups:
            group["lr"] /= 3
        feed(other, [], t)
        reference.step()
        assert all(
            torch.allclose(p, q, rtol=1e-6) for p, q in zip(packed.parameters(), other.parameters(), strict=True)
        )


@each_kind
def test_a_captured_step_with_unequal_clipping_makes_no_tensor_of_host_values(kind, monkeypatch):
    _, packed = members_and_packed()
    optimizer = together(packed, kind, capturable=True)
    limits = [0.1, 0.2 + list(KINDS).index(kind), 3.0]  # no other test has put them on the device
    feed(packed, [], 0)
    with monkeypatch.context() as patch, pytest.raises(DecompkError, match="after one call with them outside it"):
        patch.setattr(optim, "_capturing", lambda: True)
        optim.clip_grad_norm_(packed, limits)
    for t in range(2):
        feed(packed, [], t)
        optim.clip_grad_norm_(packed, limits)
        optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    optimizer.prepare()
    feed(packed, [], 2)
    with monkeypatch.context() as patch, HostValues() as made:
        patch.setattr(optim, "_capturing", lambda: True)
        optim.clip_grad_norm_(packed, limits)
        optimizer.step()
    assert made.names == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_captured_step_replays_with_new_learning_rates_and_without_a_stopped_member(name):
    _, packed = members_and_packed()
    packed.to("cuda")
    other = copy.deepcopy(packed)
    how = {"momentum": 0.9, "dampening": 0.1} if name == "SGD" else {}
    one = getattr(optim, name)(packed, LR, capturable=True, **how)
    two = getattr(optim, name)(other, LR, capturable=True, **how)

    def gradients(net, t):
        noise = torch.Generator("cuda").manual_seed(t)
        for p in net.parameters():
            p.grad = torch.empty_like(p) if p.grad is None else p.grad
            p.grad.copy_(torch.randn(p.shape, generator=noise, device="cuda"))

    key = graph = None
    for t in range(8):
        for group in (*one.param_groups, *two.param_groups):
            group["lr"] *= 0.7
        if t == 4:
            one.stop(1)
            two.stop(1)
        gradients(packed, t)
        gradients(other, t)
        if t == 0:
            one.step()
        else:
            if key != one.prepare():
                key, graph = one.prepare(), torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    one.step()
            graph.replay()
        two.step()
        assert_same_bits(snapshot(packed, one), snapshot(other, two))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("limits", [0.7, [0.1, 1e6, 3.0], torch.tensor([1.0, 0.2, 1e6])])
def test_clipping_is_each_members_own(norm_type, limits):
    members, packed = members_and_packed()
    feed(packed, members, 0)
    packed.point.weight.grad = None
    before = [p.grad.clone() for p in packed.parameters() if p.grad is not None]
    norms = optim.clip_grad_norm_(packed, limits, norm_type)
    assert norms.shape == (K,)
    own = [limits] * K if isinstance(limits, float) else [float(limit) for limit in limits]
    for k, member in enumerate(members):
        member.point.weight.grad = None
        expected = nn.utils.clip_grad_norm_(member.parameters(), own[k], norm_type)
        assert torch.allclose(norms[k], expected, rtol=1e-5)
        for p, q in zip(packed.parameters(), member.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.allclose(p.grad[k], q.grad, rtol=1e-5, atol=0)
    after = [p.grad for p in packed.parameters() if p.grad is not None]
    kept = [k for k in range(K) if all(torch.equal(a[k], b[k]) for a, b in zip(before, after, strict=True))]
    assert kept == [k for k in range(K) if own[k] > 1e5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_member_whose_gradient_is_not_finite_leaves_the_others_norms_alone(bad):
    members, packed = members_and_packed()
    feed(packed, members, 0)
    other = copy.deepcopy(packed)
    for p, q in zip(packed.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    packed.stem.weight.grad[1, 0, 0, 0, 0] = bad
    norms, expected = optim.clip_grad_norm_(packed, 0.5), optim.clip_grad_norm_(other, 0.5)
    assert torch.equal(norms[[0, 2]], expected[[0, 2]]) and not norms[1].isfinite()
    for p, q in zip(packed.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad[[0, 2]], q.grad[[0, 2]])
    assert not packed.stem.weight.grad[1].isfinite().all()


def test_members_scaled_in_few_launches_are_those_scaled_stack_by_stack():
    shapes = [(3, 4, 2, 3, 3), (3, 5), (3,)]
    grads = [torch.randn(shape) for shape in shapes]
    grads[0] = grads[0].transpose(1, 4).contiguous().transpose(1, 4)
    factors = torch.tensor([0.5, float("nan"), 3.0])
    expected = [grad * factors.view(3, *[1] * (grad.dim() - 1)) for grad in grads]
    optim._scale(grads, factors)
    assert all(torch.equal(a[[0, 2]], b[[0, 2]]) and a[1].isnan().all() for a, b in zip(grads, expected, strict=True))


def test_clipping_handles_one_number_a_member_and_no_gradient_at_all():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * self.scale

    packed = decompk.pack([Scale() for _ in range(K)], input_dims=2)
    assert torch.equal(optim.clip_grad_norm_(packed, 1.0), torch.zeros(K))
    packed.scale.grad = torch.tensor([-3.0, 0.5, 2.0])
    assert optim.clip_grad_norm_(packed, 1.0).tolist() == [3.0, 0.5, 2.0]
    assert torch.allclose(packed.scale.grad, torch.tensor([-1.0, 0.5, 1.0]))
    optimizer = optim.SGD(packed, [1.0, 0.1, 0.1])
    optimizer.step()
    assert torch.allclose(packed.scale, torch.tensor([2.0, 0.95, 0.9]))


@pytest.mark.parametrize(
    ("name", "how", "sentence"),
    [
        ("SGD", {"lr": [0.1, 0.2]}, "lr has 2 values for 3 members: give one for all, or 3"),
        ("SGD", {"lr": -0.1}, "lr -0.1 is not a number from 0 on"),
        ("SGD", {"lr": float("nan")}, "lr nan is not"),
        ("SGD", {"lr": [0.1, "much", 0.1]}, "lr 'much' is not"),
        ("SGD", {"momentum": [0.1, -0.2, 0.1]}, "momentum -0.2 is not"),
        ("SGD", {"dampening": -1}, "dampening -1 is not"),
        ("SGD", {"weight_decay": (0.1,) * 4}, "weight_decay has 4 values"),
        ("SGD", {"nesterov": True, "momentum": [0.9, 0.0, 0.9]}, "nesterov needs a momentum above 0"),
        ("SGD", {"nesterov": [True, False, True]}, "nesterov is one bool for all members"),
        ("Adam", {"eps": -1e-8}, "eps -1e-08 is not"),
        ("Adam", {"betas": (0.9, 1.0)}, r"betas \(0.9, 1.0\) is not a pair of numbers from 0 to below 1"),
        ("Adam", {"betas": 0.9}, "betas 0.9 is not a pair"),
        ("Adam", {"betas": [(0.9, 0.9)] * 2}, "betas has 2 values for 3 members"),
        ("Adam", {"betas": [(0.9, 0.9), (0.9, 0.9), 0.9]}, "betas 0.9 is not a pair"),
        ("AdamW", {"weight_decay": [0, 0, -1]}, "weight_decay -1 is not"),
    ],
)
def test_hyperparameters_that_do_not_fit_are_refused_by_name(name, how, sentence):
    _, packed = members_and_packed()
    with pytest.raises(DecompkError, match=sentence) as caught:
        getattr(optim, name)(packed, **how)
    assert str(caught.value).endswith(".") and str(caught.value).count(". ") == 0
    with pytest.raises(DecompkError, match=sentence):
        getattr(optim, name)([{"params": list(packed.parameters()), **how}], packed=packed)


def test_what_is_not_a_stack_of_the_members_is_refused_by_name():
    members, packed = members_and_packed()
    with pytest.raises(PackError, match="Sequential has no members: give the packed module"):
        optim.SGD(members[0])
    itself = r"give the packed module itself, not packed\.parameters\(\)\.$"
    for wrong in (optim.SGD, lambda parameters: optim.clip_grad_norm_(parameters, 1.0)):
        with pytest.raises(PackError, match=f"generator has no members: {itself}"):
            wrong(packed.parameters())
    with pytest.raises(PackError, match=f"list has no members: {itself}"):
        optim.AdamW(list(packed.parameters()), lr=LR)
    with pytest.raises(PackError, match=r"do not say whose they are: write AdamW\(groups, packed=packed\)\.$"):
        optim.AdamW([{"params": list(packed.parameters())}])
    with pytest.raises(PackError, match=r"write lambda net: AdamW\(net\.parameters\(\)\), not AdamW\.$"):
        optim.each(packed, torch.optim.AdamW)
    with pytest.raises(PackError, match="build returns NoneType: let it return a member's optimizer"):
        optim.each(packed, lambda net: None)
    with pytest.raises(PackError, match=r"a parameter of \(5, 3, 3, 3\) is not a stack of 3 members"):
        optim.SGD([{"params": members[0].parameters()}], packed=packed)
    packed.head.bias = nn.Parameter(torch.zeros(4, K))
    with pytest.raises(PackError, match=r"'head.bias' of \(4, 3\) is not a stack of 3 members"):
        optim.Adam(packed)
    packed.head.bias = nn.Parameter(torch.zeros(4, K).t())
    with pytest.raises(PackError, match=r"'head.bias' has strides \(1, 3\)"):
        optim.Adam(packed)
    packed.head.bias = nn.Parameter(torch.zeros(12).as_strided((K, 4), (4, 0)))
    with pytest.raises(PackError, match=r"'head.bias' has strides \(4, 0\)"):
        optim.Adam(packed)
    packed.head.bias = nn.Parameter(torch.zeros(K, 4))
    optimizer = optim.Adam(packed)
    for call in (optimizer.stop, optimizer.resume):
        for k in (-1, 3):
            with pytest.raises(DecompkError, match=f"no member {k}: members are 0 to 2"):
                call(k)
    packed.head.bias.grad = torch.zeros(K, 4).to_sparse()
    with pytest.raises(DecompkError, match="gradient of 'head.bias' is sparse"):
        optimizer.step()
    for limit, sentence in (([1.0], "max_norm has 1 values"), (-1.0, "max_norm -1.0 is not")):
        with pytest.raises(DecompkError, match=sentence):
            optim.clip_grad_norm_(packed, limit)
    with pytest.raises(DecompkError, match=r"max_norm of \(2,\) is neither"):
        optim.clip_grad_norm_(packed, torch.ones(2))


def test_a_gradient_scaler_unscales_once_and_skips_what_is_not_finite():
    members, packed = members_and_packed(torch.float64)
    optimizer, singles = (
        optim.Adam(packed, LR),
        [torch.optim.Adam(m.parameters(), LR[k]) for k, m in enumerate(members)],
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(6):
        feed(packed, members, t)
        for p in packed.parameters():
            p.grad *= scaler.get_scale()
        if t == 2:
            packed.stem.weight.grad.fill_(torch.inf)
        if t % 2:
            scaler.scale(torch.ones(()))  # as in a training step, for the scaler to know its device
            scaler.unscale_(optimizer)
            assert torch.allclose(packed.stem.weight.grad[1], members[1].stem.weight.grad)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        for single in singles:
            if t != 2:
                single.step()
    assert scaler.get_scale() == 512.0
    assert_members(packed, members, torch.float64)


def test_zero_grad_reaches_every_stack():
    _, packed = members_and_packed()
    optimizer = optim.SGD(packed)
    feed(packed, [], 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in packed.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in packed.parameters())


# ---- what is meant for one network -----------------------------------------------------------------------------------


ALONE = {  # every optimizer of torch.optim that works number by number
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "Adamax": {"lr": 0.01, "weight_decay": 0.1},
    "NAdam": {"lr": 0.01, "weight_decay": 0.1},
    "RAdam": {"lr": 0.01, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.01, "weight_decay": 0.1},
    "Adadelta": {"lr": 0.5, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "Rprop": {"lr": 0.01},
    "ASGD": {"lr": 0.01, "t0": 2},
}
COUPLE = {"Adafactor": {"lr": 0.1}, "Muon": {"lr": 0.1}, "LBFGS": {"lr": 0.1, "max_iter": 2}}
REFUSE = {"SparseAdam"}


class LARS(torch.optim.SGD):
    """A rate of its own for each tensor, by the norms of all of it."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad *= p.norm() / (p.grad.norm() + 1e-9)
        return super().step(closure)


def small(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def after_steps(net, build, scale=1.0, steps=3, clip=None):
    """The parameters after a few steps; `scale` multiplies member 0's loss."""
    optimizer = build(net)
    batch = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x, y = torch.randn(8, 4, generator=batch).double(), torch.randn(8, 3, generator=batch).double()

        def loss():
            net.zero_grad()
            out = net(x)  # noqa: B023
            weights = torch.tensor([scale] + [1.0] * (K - 1)).view(-1, 1, 1) if out.dim() == 3 else 1.0
            value = ((out - y).square() * weights).sum()  # noqa: B023
            value.backward()
            return value

        loss()
        if clip:
            clip(net.parameters() if clip is nn.utils.clip_grad_norm_ else net, 0.1)
        optimizer.step(*[loss] * isinstance(optimizer, torch.optim.LBFGS))
    return dict(net.named_parameters())


def assert_as_alone(found, nets, tolerance=1e-9):
    for name, p in found.items():
        for k, own in enumerate(nets):
            assert torch.allclose(p[k], own[name], rtol=0, atol=tolerance), f"{name} of member {k}"


def test_every_optimizer_of_torch_is_known_for_what_it_does_to_stacks():
    known = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type)} - {"Optimizer"}
    assert known == ALONE.keys() | COUPLE.keys() | REFUSE
    for name in known:
        assert name in optim.__doc__, name


@pytest.mark.parametrize("name", ALONE)
def test_an_optimizer_that_works_number_by_number_trains_members_as_alone(name):
    def build(net):
        return getattr(torch.optim, name)(net.parameters(), **ALONE[name])

    found = after_steps(decompk.pack([small(k) for k in range(K)]), build)
    assert_as_alone(found, [after_steps(small(k), build) for k in range(K)])
    assert not torch.equal(found["0.weight"][0], small(0)[0].weight)


@pytest.mark.parametrize("name", [*COUPLE, "LARS", "clip"])
def test_what_reads_whole_tensors_couples_the_members(name):
    """What becomes of members 1 and 2 depends on the loss of member 0."""

    def build(net):
        if name in ("LARS", "clip"):
            return (LARS if name == "LARS" else torch.optim.SGD)(net.parameters(), lr=0.1)
        ndim = 2 if name == "Muon" else 0  # biases and norms of members, side by side, are a matrix
        return getattr(torch.optim, name)([p for p in net.parameters() if p.dim() == ndim or not ndim], **COUPLE[name])

    clip = nn.utils.clip_grad_norm_ if name == "clip" else None
    one, two = (after_steps(decompk.pack([small(k) for k in range(K)]), build, scale, 1, clip) for scale in (1.0, 50.0))
    assert any(not torch.allclose(one[n][1:], two[n][1:], rtol=0, atol=1e-6) for n in one)


def test_muon_refuses_stacks_of_matrices_and_sparse_adam_dense_gradients():
    packed = decompk.pack([small(k) for k in range(K)])
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon([packed.get_parameter("0.weight")])
    optimizer = torch.optim.SparseAdam(packed.parameters())
    packed(torch.randn(8, 4).double()).sum().backward()
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
        optimizer.step()


def adafactor(net):
    return torch.optim.Adafactor(net.parameters(), lr=0.1)


def muon_and_adamw(net):
    matrices, rest = ([p for p in net.parameters() if (p.dim() == 2) == two] for two in (True, False))
    return [torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW(rest, lr=0.1)]


class Both:
    """Two optimizers of one network."""

    def __init__(self, built):
        self.step = lambda: [optimizer.step() for optimizer in built]


@pytest.mark.parametrize("build", [adafactor, muon_and_adamw, lambda net: LARS(net.parameters(), 0.1)])
def test_each_member_has_an_optimizer_of_its_own_on_the_stacks(build):
    packed = decompk.pack([small(k) for k in range(K)])
    found = after_steps(packed, lambda net: optim.each(net, build))
    assert all(p is q for p, q in zip(found.values(), packed.parameters(), strict=True))
    one_at_a_time = lambda net: Both(built) if isinstance(built := build(net), list) else built  # noqa: E731
    tolerance = 5e-2 if build is muon_and_adamw else 1e-9  # Muon computes in bfloat16
    assert_as_alone(found, [after_steps(small(k), one_at_a_time) for k in range(K)], tolerance)


def test_optimizers_of_each_member_follow_schedulers_moves_and_checkpoints():
    packed = decompk.pack([small(k) for k in range(K)])
    x = torch.randn(8, 4)

    def step(net, optimizer):
        optimizer.zero_grad()
        net(x.to(next(net.parameters()).dtype)).square().sum().backward()
        optimizer.step()

    optimizer = optim.each(packed, adafactor)
    step(packed, optimizer)
    other = copy.deepcopy(packed)
    again = optim.each(torch.compile(other, backend="eager"), adafactor)
    again.load_state_dict(optimizer.state_dict())
    for p in packed.parameters():
        p.data = p.data.clone()  # as .to(device) does
    for net, own in ((packed, optimizer), (other, again)):
        scheduler = lr_scheduler.LambdaLR(own.optimizers[1][0], lambda t: 0.0)
        assert scheduler.get_last_lr() == [0.0]
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        step(net, own)
        for name, p in net.named_parameters():
            assert torch.equal(p[1], before[name][1]) and not torch.equal(p[2], before[name][2])
    assert all(torch.equal(p, q) for p, q in zip(packed.parameters(), other.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="of other members or other optimizers"):
        again.load_state_dict({"members": again.state_dict()["members"][1:]})


@pytest.mark.parametrize("name", ["torch", "packed", "packed, named", "each"])
def test_biases_and_norms_are_told_from_weights_by_a_members_dimensions(name):
    def one(net):
        groups = [[p for p in net.parameters() if (p.dim() > 1) == decays] for decays in (True, False)]
        return torch.optim.AdamW(
            [{"params": p, "weight_decay": d} for p, d in zip(groups, (0.5, 0.0), strict=True)], lr=0.1
        )

    def build(net):
        if name == "each":
            return optim.each(net, one)
        groups = optim.decay_groups(net, 0.5)
        assert [len(group["params"]) for group in groups] == [2, 3]
        if name == "torch":
            return torch.optim.AdamW(groups, lr=0.1)
        return optim.AdamW(groups, 0.1, packed=net if name == "packed, named" else None)

    found = after_steps(decompk.pack([small(k) for k in range(K)]), build)
    assert_as_alone(found, [after_steps(small(k), one) for k in range(K)])


class Routed(nn.Module):
    """A network that runs one of two layers, by its own weights."""

    def __init__(self, first):
        super().__init__()
        self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)
        nn.init.constant_(self.a.weight, 1.0 if first else -1.0)

    def forward(self, x):
        return self.a(x) if self.a.weight.sum() > 0 else self.b(x)


def test_a_layer_that_some_members_leave_out_has_a_zero_gradient_there_where_alone_it_has_none():
    """One gradient of the stack cannot be None for one member; README's table says so."""
    nets, x = [Routed(True), Routed(False)], torch.randn(5, 4)
    kept = nets[0].b.weight.detach().clone()

    def build(net):
        return torch.optim.AdamW(net.parameters(), lr=0.1)

    for how in (build, optim.AdamW, lambda net: optim.each(net, build)):
        packed = decompk.pack(nets)
        optimizer = how(packed)
        packed(x).square().sum().backward()
        assert not packed.get_parameter("b.weight").grad[0].any()
        optimizer.step()
        assert not torch.equal(packed.get_parameter("b.weight")[0], kept)  # decay has moved it
    alone = decompk.pack(nets).unpack()[0]
    optimizer = build(alone)
    alone(x).square().sum().backward()
    optimizer.step()
    assert alone.b.weight.grad is None and torch.equal(alone.b.weight, kept)


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrapped(kind, packed):
    ddp = nn.parallel.DistributedDataParallel
    return {
        "ddp": lambda: ddp(packed),
        "compile": lambda: torch.compile(packed, backend="eager"),
        "compile of ddp": lambda: torch.compile(ddp(packed), backend="eager"),
        "ddp of compile": lambda: ddp(torch.compile(packed, backend="eager")),
        "average": lambda: torch.optim.swa_utils.AveragedModel(packed),
    }[kind]()


class NamedK(nn.Module):
    """A network with a submodule called K, and one called module."""

    def __init__(self):
        super().__init__()
        self.K, self.module = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.module(self.K(x).tanh())


@pytest.mark.parametrize("kind", ["ddp", "compile", "compile of ddp", "ddp of compile", "average"])
def test_it_takes_packed_modules_in_wrappers(kind, one_rank):
    packed = decompk.pack([small(k) for k in range(K)])
    outer = wrapped(kind, packed)
    inner = outer.module if kind == "average" else packed
    assert optim.inside(outer) is inner
    for params, named in ((outer, None), ([{"params": list(outer.parameters())}], outer)):
        optimizer = optim.SGD(params, lr=LR, packed=named)
        assert optimizer.packed is inner and optimizer.K == K
    inner.get_parameter("3.bias").grad = torch.ones(K, 3).double()
    assert torch.allclose(optim.clip_grad_norm_(outer, [1.0] * K), torch.full((K,), 3.0**0.5).double())
    optim.each(outer, adafactor).step()
    assert len(optim.decay_groups(outer, 0.1)[1]["params"]) == 3


def test_a_wrapper_that_joins_outputs_along_the_members_is_refused():
    packed = decompk.pack([small(k) for k in range(K)])
    outer = nn.DataParallel(packed)
    if len(outer.device_ids) < 2:  # it only calls what it wraps, and has no dimension on a CPU
        assert optim.inside(outer) is packed
        vars(outer).update(device_ids=[0, 1], dim=0)
    with pytest.raises(PackError, match="DataParallel joins outputs along the members' dimension: use Distributed"):
        optim.SGD(outer)
    for what in (nn.Linear(3, 3), nn.DataParallel(nn.Linear(3, 3)), NamedK()):
        with pytest.raises(PackError, match=f"{type(what).__name__} has no members"):
            optim.clip_grad_norm_(what, 1.0)


def test_a_network_of_ones_own_may_call_its_layers_as_wrappers_and_counts_are_called():
    torch.manual_seed(0)
    nets = [NamedK() for _ in range(K)]
    packed = decompk.pack(nets)
    assert optim.inside(packed) is packed
    optimizer = optim.SGD(packed, lr=LR)
    assert optimizer.K == K
    dict(packed.named_parameters())["K.weight"].grad = torch.ones(K, 6, 4)
    assert optim.clip_grad_norm_(packed, 1e9).shape == (K,)
    optimizer.step()
    for k, net in enumerate(nets):
        assert torch.allclose(dict(packed.named_parameters())["K.weight"][k], net.K.weight - LR[k])
