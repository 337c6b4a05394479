"""A network's kernels compiled before its first step, many at once: one after the other they take a minute or two."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..kernels.device import why_not_triton_on
from ..kernels.launch import Launch, recording
from ..threads import one_at_a_time


def compile_ahead(net: nn.Module, *inputs: Any) -> int:
    """Compile what a forward pass of `net` on `inputs` launches, and in training its backward; returns how many.

    Call it before the first step, with a batch of the shape that the steps will have, in the mode (`train`, `eval`)
    and under the autocast of these steps; a kernel that is met without is compiled then. Weights, gradients, buffers
    and random numbers are as before, but the network's own code runs once, and what it computes is garbage. Where
    nothing is compiled, on a CPU or where Triton cannot run, it does nothing and returns 0.
    """
    device = next((p.device for p in net.parameters()), torch.device("cpu"))

    def run() -> None:
        outputs = [t for t in tree_leaves(net(*inputs)) if isinstance(t, Tensor) and t.requires_grad]
        wanted = [p for p in net.parameters() if p.requires_grad]
        if outputs and wanted and net.training:
            total: Any = sum(t.sum() for t in outputs)
            torch.autograd.grad(total, wanted, allow_unused=True)

    return compile_launches(launches_of(net, run), device) if can_compile(device) else 0


def can_compile(device: torch.device) -> bool:
    """Whether kernels are compiled for `device`."""
    return device.type == "cuda" and why_not_triton_on(device) is None


def launches_of(net: nn.Module, run: Callable[[], Any]) -> list[Launch]:
    """What `run` would launch; all else of it runs, on memory that nobody has written."""
    cards = {p.device for p in net.parameters() if p.device.type == "cuda"}
    with one_at_a_time(), torch.random.fork_rng(list(cards)), kept_buffers(net), recording() as launches:
        run()
    return launches


def compile_launches(launches: Sequence[Launch], device: torch.device) -> int:
    """Compile `launches` for the GPU `device` on all cores; returns how many kernels this process had not compiled.

    What cannot be compiled is left to the launch, which says why.
    """
    from triton import AsyncCompileMode
    from triton.runtime import driver

    def build_launcher(kernel: Any) -> None:
        with contextlib.suppress(Exception):  # the launch says what is wrong
            driver.active.launcher_cls(kernel.src, kernel.metadata)

    with (
        torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext(),
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
    ):
        with AsyncCompileMode(threads, ignore_errors=True) as compiling:
            for one in launches:
                one.kernel.warmup(grid=one.grid, num_warps=one.warps, num_stages=one.stages, **one.arguments)
            found = compiling.future_kernels  # from Triton 3.9 on the mode forgets them when it ends
        compiled = [one.kernel for one in found.values() if one.kernel is not None]
        list(threads.map(build_launcher, compiled))  # Triton 3.6 builds a C module for each; later ones build none
    return len(compiled)


@contextlib.contextmanager
def kept_buffers(net: nn.Module) -> Iterator[None]:
    """Put every buffer (running statistics) back to what it was before."""
    saved = [(buffer, buffer.clone()) for buffer in net.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)
