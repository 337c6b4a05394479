"""Kernels compiled ahead of a step: what a run launches is found without a trace, and is not compiled again."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import decompk
from decompk.kernels.device import interpreted
from decompk.packed.ahead import launches_of

ROOT = Path(__file__).parents[1]


def packed():
    parts = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 8, 1), nn.Flatten()
    return decompk.pack([nn.Sequential(*parts, nn.Linear(288, 3)) for _ in range(2)])


@pytest.mark.skipif(not interpreted(), reason="the GPU's way on a CPU")
def test_what_a_step_launches_is_found_and_leaves_no_trace():
    net, x = packed().train(), torch.randn(4, 3, 6, 6)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    net(x).sum().backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.load_state_dict(before)
    torch.set_rng_state(state)

    def run():
        torch.autograd.grad(net(x).sum(), list(net.parameters()))

    with decompk.backend("triton"):
        found = launches_of(net, run)
    names = {one.kernel.__name__ for one in found}
    assert any("wgrad" in name for name in names) and any("backward" in name for name in names)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(p.grad, grads[name]) for name, p in net.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_on_a_cpu_nothing_is_compiled_or_run():
    net = packed()
    net.register_forward_hook(lambda *a: pytest.fail("it ran"))
    assert decompk.compile_ahead(net, torch.randn(4, 3, 6, 6)) == 0


COMPILED = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Paper:  # a GPU that compiles and runs nothing
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    launchers = []
    launcher_cls = lambda self, source, metadata: self.launchers.append(metadata.name)


driver.set_active(Paper())
from decompk.packed.ahead import compile_launches
from decompk.kernels.problem import Config, Problem
from decompk.kernels import conv
from decompk.kernels.launch import recording

problem = Problem("fprop", "bfloat16", 2, 4, 16, 16, 8, 8, (3, 3), (1, 1), (1, 1))
meta = dict(device="meta", dtype=torch.bfloat16)
x, w, y = (torch.empty(shape, **meta) for shape in ((2, 4, 8, 8, 16), (2, 16, 3, 3, 16), (2, 4, 8, 8, 16)))
with recording() as launches:
    for block in (16, 32):
        conv.named("tile").fprop(problem, Config("tile", (1, 8, 8), 16, block), x, w, y)
print(compile_launches(launches, torch.device("cpu")))
print(compile_launches(launches, torch.device("cpu")))
one = launches[0]
found = one.kernel.warmup(grid=one.grid, num_warps=one.warps, num_stages=one.stages, **one.arguments)
print(len(Paper.launchers))
print("wgmma" in found.asm["ptx"] or "mma.sync" in found.asm["ptx"])
"""


def test_what_was_compiled_ahead_is_not_compiled_again(tmp_path):
    variables = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    variables.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-c", COMPILED], env=variables, capture_output=True, text=True)
    assert run.stdout.split() == ["2", "0", "2", "True"], run.stdout + run.stderr
