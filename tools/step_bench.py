"""Training steps beside every peer: a record of each contestant as it finishes, with what a step launches."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import steps
import torch
from desk import Desk, Plan
from layers import Case
from steps import Captured, Field, Training

WAYS: dict[str, Callable[[Field], list]] = {
    "ours fused": steps.fused,
    "ours packed": steps.packed,
    "grouped": steps.grouped,
    "members in turn": steps.alone,
    "members on streams": steps.alone,
    "global": steps.whole,
    "vmap": steps.vmapped,
}
ORDER = [  # the most decisive first
    *(
        (way, "graph")
        for way in ("ours fused", "grouped", "members in turn", "global", "ours packed", "members on streams")
    ),
    *((way, "eager") for way in ("ours fused", "grouped", "members in turn", "global", "ours packed")),
    *((way, "eager") for way in ("members on streams", "vmap")),
]
TOLERANCE = 0.02  # of the members' own loss


def run(desk: Desk) -> None:
    """Training steps beside every peer, a network after the other, each with its share of what is left."""
    torch.backends.cudnn.benchmark = True
    shares = dict(desk.plan.steps)
    desk.journal.note("plan", items=len(shares) * len(ORDER))
    for case in desk.plan.steps:
        part = desk.within(desk.left() * shares[case] / sum(shares.values()))
        Steps(part, case).run()
        desk.late += part.late
        del shares[case]


def field_of(case: Case, plan: Plan) -> Field:
    """Fresh members of `case` and random images."""
    torch.manual_seed(0)
    d = case.decomposition()
    image = torch.randn(plan.batch, *d.input_size, device=plan.device).contiguous(memory_format=torch.channels_last)
    return Field(d.subnets(seed=0), d.crops, image, torch.randint(10, (plan.batch,), device=plan.device), d.model)


class Steps:
    """Everybody who trains the members of one case, a record each as it finishes."""

    def __init__(self, desk: Desk, case: Case):
        self.desk, self.case, self.plan = desk, case, desk.plan
        self.timer = desk.plan.timer()
        self.losses: list[float] = []
        self.field: Field | None = None

    def key(self, impl: str, kind: str = "step") -> dict[str, str]:
        return {"part": "steps", "net": self.case.title, "pass": kind, "impl": impl}

    def run(self) -> None:
        todo = [(way, mode) for way, mode in ORDER if not self.desk.journal.has(**self.key(f"{way}, {mode}"))]
        if not todo:
            return
        self.prepare()
        for way, mode in todo:
            self.contestant(way, mode, f"{way}, {mode}")
        self.contestant(*ORDER[0], f"{', '.join(ORDER[0])}, again")  # shows how much the machine drifts

    def prepare(self) -> None:
        """The members' own losses by which the others are judged; a restarted process needs them, too."""
        key = self.key("their own losses", "reference")
        self.desk.journal.begin(60.0, **key)
        try:
            self.field = field_of(self.case, self.plan)
            step = self.training("members in turn")
            self.losses = [float(step()) for _ in range(Captured.warm + 2)]
            if not self.desk.journal.has(**key):
                self.desk.journal.add(**key, losses=self.losses)
        except Exception as error:
            self.desk.failed(error, **key)
        self.free()

    def training(self, way: str) -> Training:
        K = 1 if way == "global" else self.case.K
        return Training(WAYS[way](self.field), self.field.target, K, self.plan.autocast, way == "members on streams")

    def contestant(self, way: str, mode: str, impl: str) -> None:
        key = self.key(impl)
        if (mode == "graph" or "streams" in way) and self.desk.lacks("graph", **key):
            return
        if self.field is None:
            self.field = field_of(self.case, self.plan)
        self.desk.guarded(partial(self.measure, way, mode, key), 6 if not self.plan.lacks else 0.5, 75, **key)
        self.free()

    def measure(self, way: str, mode: str, key: dict[str, str]) -> None:
        device, journal = self.plan.device, self.desk.journal
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        step = self.training(way)
        facts: dict[str, Any] = {"built_s": time.perf_counter() - began}
        if way.startswith("ours"):
            began = time.perf_counter()
            facts["kernels"] = self.desk.compiler.prepare(step.gradients, max(self.desk.left(), 1))
            facts["compiled_s"] = time.perf_counter() - began
        began = time.perf_counter()
        losses = [float(step())]
        facts["first_step_s"] = time.perf_counter() - began
        call = Captured(step) if mode == "graph" else step
        if mode == "eager":
            losses += [float(step()) for _ in range(Captured.warm)]
        losses.append(float(call()))  # in either way the step of the same number
        if fault := self.fault(way, losses):
            journal.add(**key, fault=fault, **facts)
            return
        timing = self.timer({way: call}, cold=False, seconds=1.0, runs=200, least=20)[way]
        if device.type == "cuda":
            facts["peak_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
        if mode == "eager":
            facts["host_ms"] = steps.host_ms(call, device, self.plan.runs)
        journal.add(**key, **vars(timing), **facts, losses=[losses[0], losses[-1]])
        counts = {**key, "pass": "launches"}
        if not key["impl"].endswith("again") and not self.desk.lacks("profiler", **counts):
            self.desk.guarded(lambda: journal.add(**counts, **steps.launches(call)), 1, 40, **counts)

    def fault(self, way: str, losses: list[float]) -> str | None:
        """What is wrong with the first and the last loss: the global network has its own."""
        if not all(map(math.isfinite, losses)):
            return f"losses {losses}"
        pairs = [(losses[0], self.losses[0]), (losses[-1], self.losses[-1])] if self.losses and way != "global" else []
        away = max((abs(own / members - 1) for own, members in pairs), default=0.0)
        return None if away <= TOLERANCE else f"wrong: the losses are {away:.1%} off the members' own, {pairs}"

    def free(self) -> None:
        gc.collect()
        if self.plan.device.type == "cuda":
            torch.cuda.empty_cache()
