"""What only a GPU can say: the checks of tools/checks.py, one test each, and the steps of decompk.train."""
# ruff: noqa: E402, T201 (the tools stand beside the package)

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1] / "tools")]

from checks import Checks
from journal import sentence
from timing import precision

import decompk
from decompk.kernels import extension
from decompk.kernels import launch as launching
from decompk.kernels.choose import choose
from decompk.kernels.problem import Problem

GPU, DEVICE = torch.cuda.is_available(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")]


def pytest_generate_tests(metafunc):
    """Without a GPU a few cases stand for all: the networks need not be traced."""
    if "check" in metafunc.fixturenames:
        every = Checks(DEVICE).every() if GPU else Checks(DEVICE).steps()
        metafunc.parametrize("check", every, ids=[f"{check.kind} {check.name}" for check in every])


@pytest.fixture(autouse=True)
def _context_alive():
    """After an illegal access nothing answers: the process ends, and pytest-xdist goes on in another."""
    yield
    try:
        torch.cuda.synchronize(DEVICE)
    except RuntimeError as error:
        print(sentence(error), file=sys.stderr, flush=True)
        os._exit(3)


def test_it_is_right(check):
    if check.needs == "extension" and extension.why_not("cuda"):
        pytest.skip(extension.why_not("cuda"))
    assert check.run() is None


def test_deterministic_algorithms_choose_no_atomic_sums():
    torch.use_deterministic_algorithms(True)
    try:
        choice = choose(Problem("wgrad", "bfloat16", 4, 64, 16, 16, 35, 35, (3, 3), padding=(1, 1)), DEVICE)
    finally:
        torch.use_deterministic_algorithms(False)
    assert choice.config is None or not choice.config.atomic


def test_launches_by_kept_handles_compute_what_tritons_do(monkeypatch):
    members = [nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(4)]
    packed = decompk.pack([member.to(DEVICE, torch.bfloat16) for member in members])
    x = torch.randn(8, 16, 16, 16, device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    launched, by_triton = [], launching._launch
    monkeypatch.setattr(launching, "_launch", lambda *a: launched.append(a[0].__name__) or by_triton(*a))

    def step():
        launched.clear()
        y = packed(x)
        return [y, *torch.autograd.grad(y.float().square().mean(), list(packed.parameters()))]

    torch.use_deterministic_algorithms(True)
    try:
        with decompk.backend("triton"):
            with monkeypatch.context() as patch:
                patch.setattr(launching, "_watched", lambda kernel: True)
                expected = step()
                assert launched
            for _ in range(3):
                found = step()
                assert all(map(torch.equal, found, expected))
            assert not launched
    finally:
        torch.use_deterministic_algorithms(False)


def trained_by(packed, batches, **how):
    """The network after training by `batches`, while a rate changes and a member is stopped, and the sums of it all."""
    net = copy.deepcopy(packed).to(DEVICE, memory_format=torch.channels_last)
    graph = how.get("graph", False)
    optimizer = decompk.optim.Adam(net, lr=[1e-3, 2e-3, 1e-3, 1e-3], capturable=graph)
    step = decompk.Step(net, optimizer, **{"graph": False, **how})
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
