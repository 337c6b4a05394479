"""Where a stage of the GPU suite works: what machine and sizes, how much time is left, and the record of every item."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from checks import FIRST, LATER, MOST_WANTED, OTHERS, Checks
from compiling import Compiler
from journal import Journal, sentence
from layers import BATCH, CASES, Case
from timing import HostTimer, Timer, end_if_lost
from torch import nn

import decompk
from decompk.kernels.backend import backend

KEYS = ("part", "net", "case", "pass", "impl")
CPU_LACKS = {
    "graph": "a CPU has no CUDA graphs and no streams",
    "extension": "the CUDA C++ kernels need a GPU",
    "compile": "torch.compile takes longer here than a rehearsal may",
    "opcheck": "opcheck runs each operator a dozen times, which takes minutes in the interpreter",
    "profiler": "a CPU launches no kernels that could be counted",
    "sanitizer": "compute-sanitizer needs a GPU",
    "GPU": "nvidia-smi, a GPU's tensor cores and its L2 are not here",
}


@dataclass(frozen=True)
class Plan:
    """What is run and how large: on a GPU in earnest, or everything in miniature on a CPU, in Triton's interpreter.

    steps: networks with their share of the box. others: dtypes that come after `dtype`. cases: whose layers are checked
    and tuned, and after all else those of `later`. lacks: what cannot be done here, and why. few: no list of items is
    longer. roofs: bytes of the copies from memory and from L2, and the side of products. arch: that kernels are
    compiled for. first: the sides of a problem that every form computes.
    """

    device: torch.device
    dtype: str
    others: tuple[str, ...]
    steps: dict[Case, float]
    layers: Case
    cases: Sequence[Case]
    later: Sequence[Case] = ()
    batch: int = BATCH
    lacks: dict[str, str] = field(default_factory=dict)
    few: int = 10**6
    roofs: tuple[int, int, int] = (2**30, 2**24, 8192)
    arch: int = 0
    first: tuple[int, ...] = FIRST
    runs: int = 5  # of a step whose host time is taken

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.dtype == "bfloat16" else None

    def checks(self) -> Checks:
        return Checks(self.device, self.dtype, self.others, self.cases, self.later, self.first, self.batch)

    def timer(self) -> Callable:
        return Timer(self.device) if self.device.type == "cuda" else HostTimer()

    def backend(self) -> contextlib.AbstractContextManager:
        """On a CPU Triton's kernels run where they are asked for by name alone."""
        return contextlib.nullcontext() if self.device.type == "cuda" else backend("triton")


def in_earnest() -> Plan:
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    steps = {Case("resnet32", 4, 16): 3.0, Case("resnet50", 4, 140): 7.0, Case("resnet50", 16, 70): 5.0}
    return Plan(device, "bfloat16", OTHERS, steps, CASES[0], MOST_WANTED, LATER, arch=10 * major + minor)


@dataclass(frozen=True)
class Tiny(Case):
    """A network of two small convolutions: in the interpreter a training step of it takes two seconds."""

    def decomposition(self) -> decompk.Decomposition:
        parts = [
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        ]
        parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
        return decompk.decompose(nn.Sequential(*parts), (3, 16, 16), (1, 2), crop_size=self.crop)


def in_miniature() -> Plan:
    """float32 and float16: what bf16 products give in Triton's interpreter is wrong."""
    tiny = Tiny("resnet32", (1, 2), 4)
    return Plan(
        torch.device("cpu"), "float32", ("float16",), {tiny: 1.0}, tiny, (tiny,), batch=2, lacks=CPU_LACKS, few=6,
        roofs=(2**20, 2**14, 64), first=(2, 1, 4, 4, 5, 6), runs=1,
    )  # fmt: skip


@dataclass
class Desk:
    """One stage at work, until `until` (seconds since the epoch)."""

    plan: Plan
    journal: Journal
    until: float
    compiler: Compiler
    out: Path
    late: int = 0  # items that there was no time for
    told: set[str] = field(default_factory=set)

    def left(self) -> float:
        return self.until - time.time()

    def within(self, seconds: float) -> Desk:
        """The same desk for `seconds` at most."""
        return replace(self, until=min(self.until, time.time() + seconds), late=0)

    def lacks(self, need: str, **key: Any) -> bool:
        """Whether this machine lacks `need`; the record then says why."""
        if need not in self.plan.lacks:
            return False
        if not self.journal.has(**key):
            self.journal.add(**key, missing=self.plan.lacks[need])
        return True

    def guarded(self, work: Callable[[], None], seconds: float = 1.0, patience: float = 30.0, **key: Any) -> None:
        """Run one item if it is not done and there is time; its failure is a record."""
        if self.journal.has(**key):
            return
        if self.left() < seconds:
            self.late += 1
            return
        self.journal.begin(patience, **key)
        try:
            work()
        except Exception as error:
            self.failed(error, **key)

    def failed(self, error: Exception, **key: Any) -> None:
        """Record an exception: each kind of it once with its trace; a lost GPU ends the process."""
        trace, line = "".join(traceback.format_exception(error)), sentence(error)
        facts = {"error": line}
        if line[:60] not in self.told:
            self.told.add(line[:60])
            facts["trace"] = trace[-6000:]
            print(trace, flush=True)
        self.journal.add(**key, **facts)
        end_if_lost(self.plan.device)
