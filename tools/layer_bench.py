"""Layers and batch norms beside cuDNN: a record of each contestant, and none is timed that has not passed the gate."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from compiling import launches_of
from desk import Desk
from layers import Case, Layer, Norm, fitting_batch, layers, norms
from timing import Contestant, Gate, Timing, Trial, channel_groups, describe, free_memory, precision, rivals, same
from torch import Tensor

from decompk import ops
from decompk.cost import formulas
from decompk.kernels import device as devices
from decompk.kernels.choose import candidates, choose
from decompk.kernels.conv.form import Choice
from decompk.kernels.problem import Problem

RIVALS = ("cudnn", "native")  # of whom nothing is asked but a number


def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True).relu()


def normalise_packed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.batch_norm(x, weight, bias, relu=True)


def runner(how: Callable[..., Tensor], jobs: list[tuple[Tensor, ...]], kind: str) -> Callable[[], list[Tensor]]:
    """One pass of `how` over jobs of (x, weight, bias, dy): y, or dx on the graph that a forward pass left."""
    if kind == "forward":
        return torch.no_grad()(lambda: [how(*job[:3]) for job in jobs])
    leaves = [[t.detach().requires_grad_() for t in job[:3]] for job in jobs]
    outputs, flat = [how(*leaf) for leaf in leaves], [t for leaf in leaves for t in leaf]
    return lambda: list(torch.autograd.grad(outputs, flat, [job[3] for job in jobs], retain_graph=True)[::3])


@functools.cache
def kernels(problem: Problem, device: torch.device) -> dict[str, Choice]:
    """Of every form with configs the candidate that is predicted fastest, but for the one that is chosen."""
    found = {}
    for choice in candidates(problem, devices.of(device)):
        if choice.config:
            found.setdefault(choice.form.name, choice)
    ours = choose(problem, device)
    return {form: choice for form, choice in found.items() if choice.config != ours.config}


def with_moments(trial: Trial, grouped: Contestant) -> dict[str, Contestant]:
    """A forward pass and the moments of its result: in the epilogue, in a pass behind it, and by torch behind cuDNN."""
    p = trial.problem
    geometry = (p.stride, p.padding, p.dilation)
    crops = {"crops": trial.crops} if trial.window else {}
    x = trial.x[0] if trial.window else trial.x

    @torch.no_grad()
    def epilogue() -> Tensor:
        return ops.conv2d_moments(x, trial.weight, None, *geometry, **crops)[0]

    @torch.no_grad()
    def behind() -> Tensor:
        y = trial.by_op()
        torch.ops.decompk.batch_norm_moments(y)
        return y

    call, view = grouped

    def native() -> Tensor:
        y = call()
        torch.var_mean(y, (0, 2, 3), correction=0)
        return y

    return {
        "ours, moments in the epilogue": (epilogue, same),
        "ours, moments behind": (behind, same),
        "cudnn_grouped, moments behind": (native, view),
    }


@dataclass
class Bench:
    """Times a case's layers and norms at a desk, the most bytes first; what the journal has is not run again."""

    desk: Desk
    timer: Callable
    roofs: dict[str, float]

    def __post_init__(self) -> None:
        self.plan, self.journal, self.device = self.desk.plan, self.desk.journal, self.desk.plan.device
        self.dtype = self.plan.dtype

    def run(self, case: Case) -> None:
        batch = fitting_batch(case, free_memory(self.device), self.plan.batch)
        work = [(layer, one) for layer in layers(case, self.dtype, batch) for one in layer.passes()]
        work.sort(key=lambda pair: -pair[0].count * formulas.conv_bytes(pair[1]))
        work = work[: self.plan.few]
        for layer, one in work:
            for choice in kernels(one, self.device).values():
                self.desk.compiler.ask(self.launches(layer, one, choice))
        for layer, one in work:
            self.item(partial(self.layer, layer, one), part="layers", net=case.title, case=layer.name, kind=one.kind)
        for norm in sorted(norms(case, batch), key=lambda norm: -norm.count * math.prod(norm.shape))[: self.plan.few]:
            for kind in ("forward", "backward"):
                self.item(partial(self.norm, norm, kind), part="norms", net=case.title, case=norm.name, kind=kind)

    def launches(self, layer: Layer, one: Problem, choice: Choice) -> list:
        if choice.backend != "triton":
            return []
        return launches_of(lambda: Trial(layer.problem.of(one.kind), "meta", layer.image).by_choice(choice))

    def item(self, work: Callable[[dict[str, str]], None], kind: str, **key: str) -> None:
        """`impl` "timing" stands for the whole: it is there when all who compete have their record."""
        key = {**key, "pass": kind}
        self.desk.guarded(lambda: work(key), seconds=2, patience=40, **key, impl="timing")

    def layer(self, layer: Layer, problem: Problem, key: dict[str, str]) -> None:
        trial = Trial(layer.problem.of(problem.kind), self.device, layer.image)
        others, ours = kernels(problem, self.device), choose(problem, self.device)
        choices = {"ours": ours, **{f"kernel {form}": choice for form, choice in others.items()}}
        contestants = {name: (partial(trial.by_choice, choice), same) for name, choice in choices.items()}
        contestants |= {"ours": (trial.by_op, same), **rivals(trial)}
        if problem.kind == "fprop":
            contestants |= with_moments(trial, contestants["cudnn_grouped"])
        facts = {name: {"config": describe(one), "predicted_ms": one.ms} for name, one in choices.items()}
        known = {one.form.name: one for one in candidates(problem, devices.of(self.device)) if not one.config}
        for form, name in (("loop", "cudnn_loop"), ("grouped", "cudnn_grouped_copied")):
            facts[name] = {"predicted_ms": known[form].ms} if form in known else {}
        common = {"count": layer.count, "batch": trial.problem.N, "dtype": problem.dtype}
        common |= {"bytes": formulas.conv_bytes(problem), "flops": formulas.conv_flops(problem)}
        for choice in choices.values():
            self.desk.compiler.wait(self.launches(layer, problem, choice), max(self.desk.left(), 0.0))
        with precision(problem.dtype):
            self.compete(key, contestants, trial.gate(), trial.poison, common, facts)

    def norm(self, norm: Norm, kind: str, key: dict[str, str]) -> None:
        K, N, C, H, W = norm.shape
        dtype = getattr(torch, self.dtype)
        x, dy = (torch.randn(K, N, H, W, C, device=self.device).to(dtype).movedim(-1, 2) for _ in range(2))
        weight, bias = 1 + 0.1 * torch.randn(K, C, device=self.device), torch.randn(K, C, device=self.device)
        vectors = list(zip(x.double(), weight.double(), bias.double(), strict=True))
        z = torch.stack([F.batch_norm(a, None, None, b, c, training=True) for a, b, c in vectors])
        dy = dy.where(z.abs() > 1e-3, 0)  # where rounding decides what ReLU lets pass there is nothing to compare
        jobs = list(zip(x, weight, bias, dy, strict=True))
        exact = [tuple(t.double() for t in job) for job in jobs]
        wide = (channel_groups(x), weight.flatten(), bias.flatten(), channel_groups(dy))
        gate = Gate(torch.stack(runner(normalise, exact, kind)()), torch.stack(runner(normalise, jobs, kind)()))
        contestants = {
            "ours": (runner(normalise_packed, [(x, weight, bias, dy)], kind), lambda found: found[0]),
            "native_grouped": (
                runner(normalise, [wide], kind),
                lambda found: found[0].unflatten(1, (K, C)).movedim(1, 0),
            ),
            "native_loop": (runner(normalise, jobs, kind), torch.stack),
        }
        common = {"count": norm.count, "batch": N, "dtype": self.dtype, "flops": 0}
        reads = x.numel() if kind == "forward" else 2 * x.numel()
        common |= {"bytes": formulas.pass_bytes(reads, 0, x.numel(), x.element_size())}
        self.compete(key, contestants, gate, lambda: torch.full_like(x, math.nan), common)

    def compete(
        self,
        key: dict[str, str],
        contestants: dict[str, Contestant],
        gate: Callable[[Tensor], tuple[float, str | None]],
        poison: Callable[[], Any],
        common: dict[str, Any],
        facts: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Check each contestant, time those that run, a record each; of ours only what passed the gate."""
        sound, errors = {}, {}
        for name, (call, view) in contestants.items():
            if self.journal.has(**key, impl=name):
                continue
            self.journal.begin(20.0, **key, impl=name)
            try:
                poison()
                errors[name], fault = gate(view(call()))
            except Exception as error:
                self.desk.failed(error, **key, impl=name)
                continue
            ours = not name.startswith(RIVALS)
            if fault and (ours or not math.isfinite(errors[name])):
                self.journal.add(**key, impl=name, **{"fault" if ours else "error": fault}, rel_error=errors[name])
            else:
                sound[name] = call
        self.journal.begin(20.0, **key, impl="timing")
        for name, timing in self.timer(sound).items() if sound else ():
            figures = {**vars(timing), **reached(timing, common, self.roofs), "rel_error": errors[name]}
            self.journal.add(**key, impl=name, **figures, **common, **(facts or {}).get(name, {}))
        self.journal.add(**key, impl="timing")


def reached(timing: Timing, common: dict[str, Any], roofs: dict[str, float]) -> dict[str, Any]:
    """GB/s of compulsory bytes, TFLOP/s, and the percentage of the roof that binds."""
    rates = {"gbps": common["bytes"] / timing.ms / 1e6, "tflops": common["flops"] / timing.ms / 1e9}
    percents = {
        "memory": 100 * rates["gbps"] / roofs["copy_gbps"],
        "arithmetic": 100 * rates["tflops"] / roofs[f"{common['dtype']}_tflops"],
    }
    bound = max(percents, key=percents.__getitem__)
    return {**rates, "bound": bound, "roof_percent": percents[bound]}
