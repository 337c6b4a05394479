"""What only a GPU can say: every config that ships, against float64, and the operators under compile and capture."""
# ruff: noqa: E402, T201 (the tools stand beside the package)

import copy
import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "tools")]

from layers import CASES, Captured, layers, networks, problem, training_step
from timing import Gate, Trial, describe, errors, precision, sentence

import decompk
from decompk import device as devices
from decompk import dispatch, extension, ops
from decompk.config import PASSES, Epilogue, Prologue
from decompk.kernels import conv
from decompk.models.basic import BasicResNet
from decompk.ops import library
from decompk.ops.layout import ORDERS, strides_of

GPU, DEVICE = torch.cuda.is_available(), torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")]

DTYPES = ("bfloat16", "float16", "tf32", "float32")  # the last compiles slowest
BATCH = 5  # fills no tile evenly

PADDED, STRIDED = dict(padding=(1, 1)), dict(padding=(1, 1), stride=(2, 2))
ODD = [  # (K, N, C, O, H, W), kernel, layout, the rest
    ((2, 5, 16, 32, 9, 11), (3, 3), "member", PADDED),
    ((3, 2, 4, 4, 17, 6), (1, 3), "member", dict(padding=(0, 1))),
    ((3, 5, 3, 5, 13, 9), (7, 7), "member", dict(stride=(2, 2), padding=(3, 3))),
    ((2, 3, 24, 40, 9, 11), (3, 3), "member", PADDED),
    ((1, 1, 100, 12, 7, 7), (1, 1), "member", {}),
    ((4, 2, 16, 32, 15, 10), (3, 3), "member", STRIDED),
    ((2, 3, 32, 16, 9, 9), (1, 1), "member", dict(stride=(2, 2))),
    ((2, 3, 8, 8, 8, 8), (3, 3), "member", dict(padding=(2, 2), dilation=(2, 2))),
    ((2, 2, 16, 16, 12, 12), (3, 3), "member", dict(stride=(3, 3))),
    ((2, 3, 16, 16, 9, 8), (3, 3), "member", dict(stride=(2, 1), padding=(1, 0))),
    ((2, 2, 16, 8, 1, 1), (1, 1), "member", {}),
    ((2, 2, 130, 70, 5, 5), (3, 3), "member", PADDED),
    ((3, 2, 64, 64, 8, 8), (3, 3), "grouped", PADDED),
    ((3, 2, 4, 4, 9, 9), (3, 3), "grouped", STRIDED),
    ((2, 2, 32, 16, 9, 9), (3, 3), "strided", PADDED),
    ((4, 3, 3, 16, 20, 20), (3, 3), "crops", PADDED),
    ((4, 3, 3, 8, 21, 15), (7, 7), "crops", dict(stride=(2, 2), padding=(3, 3))),
]


def odd(dtype, *kinds):
    for sides, kernel, layout, rest in ODD:
        for kind in kinds or PASSES:
            if (layout, kind) != ("crops", "dgrad"):
                yield problem(kind, dtype, sides, kernel, layout, **rest)


def of_networks(dtype):
    found = [layer for case in CASES for layer in layers(case, dtype, BATCH)]
    return list(dict.fromkeys(layer.problem.of(one.kind) for layer in found for one in layer.passes()))


def pytest_generate_tests(metafunc):
    """Without a GPU one case stands for all: the networks need not be traced."""
    if "odd_problem" in metafunc.fixturenames:
        every = [one for dtype in DTYPES for one in odd(dtype)]
        metafunc.parametrize("odd_problem", every if GPU else every[:1], ids=dispatch.key_of)
    if "network_problem" in metafunc.fixturenames:
        every = [one for dtype in DTYPES for one in of_networks(dtype)] if GPU else list(odd("bfloat16"))[:1]
        metafunc.parametrize("network_problem", every, ids=dispatch.key_of)


@pytest.fixture(autouse=True)
def _context_alive():
    """After an illegal access nothing answers: the process ends, and pytest-xdist goes on in another."""
    yield
    try:
        torch.cuda.synchronize(DEVICE)
    except RuntimeError as error:
        print(sentence(error), file=sys.stderr, flush=True)
        os._exit(3)


def configs(problem, batch=128):
    """What the heuristic could choose, here and for `batch` images, form by form: the first guesses and the others."""
    device, first, rest = devices.of(DEVICE), [], []
    asked = [Trial(replace(problem, N=n), "meta").asked for n in (batch, problem.N)]
    guesses = [replace(one, deterministic=d) for one in asked for d in (False, True)]
    for name, form in conv.FORMS.items():
        if name == "halo" and extension.why_not("cuda"):
            continue
        legal = [
            config
            for config in dict.fromkeys(c for one in guesses for c in form.configs(one))
            if conv.why_not(asked[1], config, device) is None
        ]
        first, rest = first + legal[:1], rest + legal[1:]
    return first, rest


def faults(problem, candidates):
    trial = Trial(problem, DEVICE)
    gate = trial.gate()
    for config in candidates:
        trial.poison()
        try:
            _, fault = gate(trial.by_kernel(config))
        except Exception as error:
            fault = sentence(error)
        if fault:
            yield f"{config}: {fault}"


def check(problem, candidates):
    found = list(faults(problem, candidates))
    assert not found, "\n".join([dispatch.key_of(problem), *found])


@pytest.mark.parametrize("kind", PASSES)
def test_the_first_config_of_every_form_runs(kind):
    sides = (2, 3, 16, 16, 9, 8)
    for rest in (PADDED, STRIDED):
        one = problem(kind, "bfloat16", sides, (3, 3), **rest)
        check(one, configs(one)[0])


def test_every_config_of_odd_problems_is_as_exact_as_torch(odd_problem):
    first, rest = configs(odd_problem)
    assert first
    check(odd_problem, first + rest)


def test_the_operator_is_as_exact_as_torch(odd_problem):
    trial = Trial(odd_problem, DEVICE)
    trial.poison()
    _, fault = trial.gate()(trial.by_op())
    assert fault is None


FUSED = [
    {"bias"},
    {"affine", "relu"},
    {"residual", "relu"},
    {"bias", "affine", "residual", "relu"},
    {"prologue"},
    {"prologue", "in_relu", "bias", "affine", "residual", "relu"},
]


@pytest.mark.parametrize("flags", FUSED, ids=lambda flags: "-".join(sorted(flags)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_fused_is_as_exact_as_torch(dtype, flags):
    for one in odd(dtype, "fprop"):
        trial = Trial(one, DEVICE)
        K, O, C = one.K, one.O, one.C
        vectors = {name: torch.randn(K, size, device=DEVICE) for name, size in dict(b=O, a=O, s=O, i=C, t=C).items()}
        residual = torch.randn_like(trial.out) if "residual" in flags else None
        affine = (vectors["a"], vectors["s"]) if "affine" in flags else (None, None)
        bias = vectors["b"].to(trial.dtype) if "bias" in flags else None
        prologue = Prologue(vectors["i"], vectors["t"], "in_relu" in flags) if "prologue" in flags else None

        def by_torch(dtype, trial=trial, bias=bias, affine=affine, residual=residual, prologue=prologue, flags=flags):
            p = trial.problem
            bias, residual = (None if t is None else t.to(dtype) for t in (bias, residual))
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            affine = [None if t is None else t.to(wide) for t in affine]
            epilogue = Epilogue(bias, *affine, residual, "relu" in flags)
            before = prologue and Prologue(prologue.scale.to(wide), prologue.shift.to(wide), prologue.relu)
            x = trial.members().to(dtype)
            geometry = (p.stride, p.padding, p.dilation)
            with precision(p.dtype):
                return library.fused("loop", x, trial.weight.to(dtype), *geometry, epilogue, before, False)[0]

        gate = Gate(by_torch(torch.float64), by_torch(trial.dtype))
        for config in configs(one)[0]:
            trial.poison()
            _, fault = gate(trial.by_kernel(config, Epilogue(bias, *affine, residual, "relu" in flags), prologue))
            assert fault is None, f"{dispatch.key_of(one)} {config}: {fault}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_moments_are_those_of_what_is_written(dtype):
    for one in odd(dtype, "fprop"):
        trial = Trial(one, DEVICE)
        for config in configs(one)[0]:
            pieces = torch.full((one.K, conv.moments_pieces(trial.asked, config), 3, one.O), torch.nan, device=DEVICE)
            y = trial.by_kernel(config, Epilogue(moments=pieces)).double()
            count, means, m2 = pieces.double().unbind(2)
            total = count.sum(1)
            mean = (count * means).sum(1) / total
            m2 = (m2 + count * (means - mean[:, None]) ** 2).sum(1)
            wanted = library.moments_of(y)[:, 0].unbind(1)
            for found, exact in zip((total, mean, m2), wanted, strict=True):
                torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5, msg=f"{dispatch.key_of(one)} {config}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_gradient_without_atomics_has_the_same_bits_twice(dtype):
    for one in odd(dtype, "wgrad"):
        trial = Trial(one, DEVICE)
        for config in itertools.chain(*configs(one)):
            if not config.atomic:
                first, second = (trial.by_kernel(config).clone() for _ in range(2))
                assert torch.equal(first, second), f"{dispatch.key_of(one)} {config}"


def test_deterministic_algorithms_give_the_same_bits_twice():
    one = problem("wgrad", "bfloat16", (4, 64, 16, 16, 35, 35), (3, 3), **PADDED)
    trial = Trial(one, DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        choice = dispatch.choose(trial.asked, trial.device)
        assert choice.config is None or not choice.config.atomic
        assert torch.equal(trial.by_op(), trial.by_op())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("relu", "residual"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("layout", list(ORDERS))
def test_batch_norm_is_as_exact_as_torch(dtype, relu, residual, layout):
    def by_torch(x, weight, bias, other):
        each = zip(x, weight, bias, strict=True)
        z = torch.stack([torch.nn.functional.batch_norm(a, None, None, b, c, True) for a, b, c in each])
        z = z + other if residual else z
        return z.relu() if relu else z

    def by_op(x, weight, bias, other):
        return ops.batch_norm(x, weight, bias, relu=relu, residual=other if residual else None)

    def gradients(how, leaves, dy, exact=False):
        leaves = [(t.double() if exact else t).detach().requires_grad_() for t in leaves]
        y = how(*leaves)
        found = torch.autograd.grad(y, leaves if residual else leaves[:3], dy.to(y.dtype))
        return [y.detach(), *found]

    for shape in [(4, 6, 16, 35, 35), (16, 6, 4, 18, 18), (4, 6, 512, 5, 5), (2, 3, 3, 9, 5)]:
        x, other, dy = (
            torch.empty_strided(shape, strides_of(layout, shape), dtype=dtype, device=DEVICE).normal_()
            for _ in range(3)
        )
        vectors = [torch.randn(shape[0], shape[2], device=DEVICE) for _ in range(2)]
        leaves = [x, *vectors, other]
        z = gradients(by_torch, leaves, dy, exact=True)[0]
        dy = dy.where(z.abs() > 1e-2, 0)  # where rounding decides what ReLU lets pass there is nothing to compare
        exact, own = gradients(by_torch, leaves, dy, exact=True), gradients(by_torch, leaves, dy)
        for i, results in enumerate(zip(exact, own, gradients(by_op, leaves, dy), strict=True)):
            _, fault = Gate(*results[:2])(results[2])
            name = ("y", "dx", "dweight", "dbias", "dresidual")[i]
            assert fault is None, f"{name} of {shape}: {fault}"


def test_torch_accepts_the_operators():
    x = torch.randn(2, 3, 9, 8, 16, device=DEVICE).movedim(-1, 2).requires_grad_()
    weight = torch.randn(2, 32, 3, 3, 16, device=DEVICE).movedim(-1, 2).requires_grad_()
    bias, dy = torch.randn(2, 32, device=DEVICE), torch.randn(2, 3, 9, 8, 32, device=DEVICE).movedim(-1, 2)
    geometry = ([1, 1], [1, 1], [1, 1])
    torch.library.opcheck(torch.ops.decompk.grouped_conv2d, (x, weight, bias, *geometry), rtol=1e-3, atol=1e-3)
    operands = (dy, x.detach(), weight.detach(), *geometry, [True, True, True])
    torch.library.opcheck(torch.ops.decompk.grouped_conv2d_backward, operands, rtol=1e-3, atol=1e-3)
    mean, rstd = torch.randn(2, 16, device=DEVICE), torch.rand(2, 16, device=DEVICE)
    moments = torch.ops.decompk.batch_norm_moments(x.detach())
    torch.library.opcheck(torch.ops.decompk.batch_norm_moments, (x.detach(),))
    torch.library.opcheck(torch.ops.decompk.batch_norm_finalise, (moments, mean.clone(), rstd.clone(), 0.1, 1e-5))
    torch.library.opcheck(torch.ops.decompk.batch_norm_apply, (x, mean, rstd, mean, rstd, None, True, True))


def small_members():
    stem = torch.nn.Conv2d(3, 32, 3, padding=1)
    net = BasicResNet(stem, torch.nn.Identity(), (1, 1, 1), 10, bias=False, norm_projection=True)
    d = decompk.decompose(net, (3, 32, 32), 4, crop_size=20)
    members = d.subnets(seed=0)
    image = torch.randn(8, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return members, d.crops, image, torch.randint(10, (8,), device=DEVICE)


def trained(net, image, target, steps=3):
    """Parameters and losses after some steps in float32."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(decompk.losses.cross_entropy(net(image), target))
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach(), [p.detach().flatten() for p in net.parameters()]


def test_a_compiled_packed_network_trains_as_the_eager_one():
    members, crops, image, target = small_members()
    packed = decompk.pack(members, crops=crops).to(DEVICE).train()
    other = copy.deepcopy(packed)
    losses, parameters = trained(packed, image, target)
    again, others = trained(torch.compile(other, fullgraph=True), image, target)
    torch.testing.assert_close(again, losses, rtol=1e-2, atol=1e-2)
    assert errors(torch.cat(others), torch.cat(parameters).double())[0] < 1e-2


def test_a_captured_training_step_equals_the_eager_one():
    members, crops, image, target = small_members()
    # The same jobs twice: networks() copies the members.
    eager, captured = (training_step(networks(members, crops, image)["packed"], target, 4) for _ in range(2))
    torch.use_deterministic_algorithms(True)
    try:
        wanted = [float(eager()) for _ in range(Captured.warm + 3)][Captured.warm :]
        step = Captured(captured)
        found = [float(step()) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize("mask", ["1100/0110/0001/1001", "110/000/011", "10/01"])
@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 1), (24, 3, 2), (64, 1, 1), (64, 3, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_convolutions_are_as_exact_as_torch(mask, size, kernel, stride, dtype):
    R = mask.count("/") + 1
    values = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    x, weight = torch.randn(3, R * size, 13, 9, device=DEVICE), torch.randn(R * size, R * size, kernel, kernel)
    keep = torch.tensor([[block == "1" for block in row] for row in mask.split("/")])
    keep = keep.repeat_interleave(size, 0).repeat_interleave(size, 1)[:, :, None, None].to(DEVICE)
    x, weight = x.to(values), (weight.to(DEVICE) / (size * kernel)).to(values)
    geometry = dict(stride=stride, padding=kernel // 2)

    def passes(function, x, weight):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = function(x, weight)
        return y.detach(), *torch.autograd.grad(y, (x, weight), torch.cos(torch.arange(y.numel())).view(y.shape).to(y))

    def dense(x, weight):
        return torch.nn.functional.conv2d(x, weight.where(keep, 0), **geometry)

    with precision(dtype):
        found = passes(lambda x, w: ops.block_conv2d(x, w, mask, **geometry), x, weight.where(keep, float("nan")))
        theirs = passes(dense, x, weight)
    exact = passes(dense, x.double(), weight.double())
    for what, ours, torchs, wanted in zip(("y", "dx", "dw"), found, theirs, exact, strict=True):
        own, others = ((t.double() - wanted).norm() / wanted.norm() for t in (ours, torchs))
        assert own <= 2 * others + 1e-6, f"{what}: {own:.1e}, torch's own {others:.1e}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-K{case.K}-{case.crop}")
def test_every_tuned_entry_is_legal_and_right(case):
    device = devices.of(DEVICE)
    entries = dispatch.table(device)
    found = []
    work = [(layer, one) for layer in layers(case) for one in layer.passes()]
    for layer, one in ((layer, one) for layer, one in work if dispatch.key_of(one) in entries):
        choice = dispatch.lookup(one, device)
        assert choice is not None, f"{dispatch.key_of(one)} is in the table, but not legal"
        trial = Trial(layer.problem.of(one.kind), DEVICE, layer.image)
        trial.poison()
        _, fault = trial.gate()(trial.by_choice(choice))
        found += [f"{dispatch.key_of(one)} {describe(choice)}: {fault}"] if fault else []
    assert not found, "\n".join(found)


def test_the_first_configs_of_the_networks_are_as_exact_as_torch(network_problem):
    first, _ = configs(network_problem)
    assert first
    check(network_problem, first)


def test_every_other_config_of_the_networks_is_as_exact_as_torch(network_problem):
    check(network_problem, configs(network_problem)[1])


# ---- training steps -------------------------------------------------------------------------------------------------


def trained_by(packed, batches, **how):
    """The network after training by `batches`, while a rate changes and a member is stopped, and the sums of it all."""
    net = copy.deepcopy(packed).to(DEVICE, memory_format=torch.channels_last)
    graph = how.get("graph", False)
    optimizer = decompk.optim.Adam(net, lr=[1e-3, 2e-3, 1e-3, 1e-3], capturable=graph)
    step = decompk.train.Step(net, optimizer, **how)
    for i, (x, y) in enumerate(batches):
        if i == 6:
            optimizer.param_groups[1]["lr"] = 5e-4
        if i == 9:
            optimizer.stop(2)
        step(x, y)
    assert not step.reasons, step.reasons
    return net, step.read()


@pytest.mark.parametrize("how", [{"graph": True}, {"compile": True}, {"graph": True, "compile": True}], ids=str)
def test_a_captured_or_compiled_step_trains_as_the_eager_one(how):
    torch.manual_seed(0)
    packed = decompk.grouped_subnets(decompk.models.vgg8(input_size=(3, 32, 32)), (3, 32, 32), seed=0)
    sizes = [16] * 8 + [6] * 6 + [16] * 4
    batches = [(torch.randn(n, 3, 32, 32, device=DEVICE), torch.randint(10, (n,), device=DEVICE)) for n in sizes]
    with precision("highest"):
        eager, sums = trained_by(packed, batches)
        other, found = trained_by(packed, batches, **how)
    assert found.images == sums.images == sum(sizes)
    assert found.loss == pytest.approx(sums.loss, rel=1e-2)
    for (name, a), b in zip(eager.state_dict().items(), other.state_dict().values(), strict=True):
        assert (a.double() - b.double()).norm() <= 2e-2 * a.double().norm() + 1e-6, name
