"""Kernels compiled before they are wanted, many at a time, by processes that need no GPU."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from journal import sentence
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.tools.tensor_descriptor import TensorDescriptor

from decompk.kernels.launch import Launch, recording


def launches_of(call: Callable[[], Any]) -> list[Launch]:
    """What `call` launches, forward and backward. Nothing of it runs, so that what `call` computes is noise."""
    with recording() as found, contextlib.suppress(Exception):  # whoever runs it in earnest hears of it
        call()
    return found


@dataclass(frozen=True)
class Offline:
    """Triton's driver of a GPU that is not there: enough to compile for it, without a CUDA context of one's own."""

    arch: int

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class Compiler:
    """Compiles for sm_`arch` into Triton's cache, which all processes share; with arch 0 it does nothing."""

    def __init__(self, arch: int, processes: int = 0, nice: int = 0):
        self.arch, self.pool = arch, None
        self.jobs: dict[Any, Future] = {}
        if arch:
            processes = processes or max(1, len(os.sched_getaffinity(0)) - 2)
            self.pool = ProcessPoolExecutor(
                processes, multiprocessing.get_context("spawn"), initializer=_work_for, initargs=(arch, nice)
            )

    def ask(self, launches: Sequence[Launch]) -> None:
        for launch in launches if self.pool else ():
            if (key := _key(launch)) not in self.jobs:
                with (
                    contextlib.suppress(RuntimeError),
                    _compiled_not_interpreted(),
                ):  # a broken pool: the launch does it
                    self.jobs[key] = self.pool.submit(_compile, *_portable(launch))

    def wait(self, launches: Sequence[Launch], seconds: float | None = None) -> None:
        """Until they are compiled, or have failed to: then the launch raises it again."""
        wait([self.jobs[key] for key in map(_key, launches) if key in self.jobs], seconds)

    def prepare(self, call: Callable[[], Any], seconds: float | None = None) -> int:
        """Compile whatever `call` launches, all at once; returns how many kernels these are."""
        launches = launches_of(call) if self.pool else []
        self.ask(launches)
        self.wait(launches, seconds)
        return len(set(map(_key, launches)))

    def counts(self) -> dict[str, int]:
        """How many were asked for, are done, and have failed."""
        done = [job for job in self.jobs.values() if job.done() and not job.cancelled()]
        return {"asked": len(self.jobs), "done": len(done), "failed": sum(job.exception() is not None for job in done)}

    def errors(self) -> dict[str, str]:
        """Kernel → what the compiler said, in a line."""
        failed = ((key[0], job) for key, job in self.jobs.items() if job.done() and not job.cancelled())
        return {name: sentence(e) for name, job in failed if (e := job.exception())}

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)


def _key(launch: Launch) -> tuple:
    """What decides the machine code."""
    known = launch.specialisation() if hasattr(launch.kernel, "params") else launch.arguments
    return launch.kernel.fn.__name__, repr(known), launch.warps, launch.stages


def _portable(launch: Launch) -> tuple:
    """A launch for another process: the kernel by name, tensors without memory."""

    def portable(value: Any) -> Any:
        if isinstance(value, TensorDescriptor):
            return replace(value, base=portable(value.base))
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return value

    arguments = {name: portable(value) for name, value in launch.arguments.items()}
    return launch.kernel.fn.__module__, launch.kernel.fn.__name__, launch.grid, arguments, launch.warps, launch.stages


def _work_for(arch: int, nice: int) -> None:
    os.nice(nice)
    triton.runtime.driver.set_active(Offline(arch))


def _compile(module: str, name: str, grid: tuple, arguments: dict[str, Any], warps: int, stages: int) -> None:
    kernel = getattr(importlib.import_module(module), name)
    compiled = kernel.warmup(grid=grid, num_warps=warps, num_stages=stages, **arguments)
    with contextlib.suppress(Exception):  # Triton 3.6 builds a C module a kernel, which takes as long; 3.7 builds none
        CudaLauncher(compiled.src, compiled.metadata)


@contextlib.contextmanager
def _compiled_not_interpreted() -> Iterator[None]:
    """The environment of processes started inside: a rehearsal interprets, but compiles for real."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
