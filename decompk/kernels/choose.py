"""Who runs a convolution: the choice, from shapes alone, between the forms and their configs."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from ..errors import BackendError
from . import conv, tables
from . import device as devices
from .backend import EXTENSION, forced, triton_or_raise
from .conv.form import Choice, Form
from .device import Device
from .measure import fastest
from .problem import DTYPES, Problem
from .thresholds import conv_form

WORTH = 2e6  # FLOPs of all members from which it is worth measuring who is fastest


def choose(problem: Problem, device: torch.device, measure: bool = True) -> Choice:
    """The Choice for `problem` on `device`; always answers, or raises BackendError for a backend asked for by name.

    On a CPU it may be measured first (`fastest`), unless `measure` is False.
    """
    if not problem.N:
        return Choice(conv.named("loop"), None, 0.0, "there is nothing to compute")
    if device.type == "cpu" and forced.get() in (None, "cpu"):
        return _on_cpu(problem, forced.get() is not None, measure)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _choose(replace(problem, deterministic=deterministic), device, forced.get())


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, device: torch.device, asked: str | None) -> Choice:
    if asked == "loop":
        return Choice(conv.named("loop"), None, math.nan, "asked for by name")
    if asked in EXTENSION:
        return _by_extension(problem, device, asked)
    triton = problem.dtype in DTYPES and asked != "torch" and (device.type != "cpu" or asked == "triton")
    if not triton or not triton_or_raise(device):
        if asked == "triton":
            raise BackendError(f"no Triton kernel computes in {problem.dtype}; use float32, bfloat16 or float16.")
        return _by_torch(problem, device)
    here = devices.of(device)
    if asked is None and (tuned := tables.lookup(problem, here)):
        return tuned
    found = candidates(problem, here, asked)
    if not found:
        raise BackendError(f"no Triton kernel computes {problem}.")
    return found[0]


def candidates(problem: Problem, device: Device, backend: str | None = None) -> list[Choice]:
    """Every legal choice on a GPU, or of one backend, predicted fastest first; none of a form that is not there.

    None either where there are no images: there is nothing to compute.
    """
    if not problem.N:
        return []
    forms = (form for form in conv.FORMS if form.backend == (backend or form.backend))
    return _ranked(problem, device, (f for f in forms if "cuda" in f.devices and f.missing() is None))


def _ranked(problem: Problem, device: Device, forms: Iterable[Form[Any]]) -> list[Choice]:
    """The legal choices among `forms`, predicted fastest first."""
    found = []
    for form in forms:
        for config in dict.fromkeys(form.configs(problem)):
            if form.why_not(problem, config, device) is None:
                predicted = form.predict(problem, config, device)
                found.append(Choice(form, config, predicted.ms, predicted.reason, predicted.cost, predicted.terms))
    return sorted((one for one in found if one.ms < math.inf), key=lambda choice: choice.ms)


def _by_extension(problem: Problem, device: torch.device, backend: str) -> Choice:
    """The best config of the C++ extension's forms; raises BackendError where they compute nothing of the kind."""
    here, forms = devices.of(device), [form for form in conv.FORMS if form.backend == backend]
    reason = f"no kernel computes in {problem.dtype}"
    if problem.dtype in DTYPES:
        if found := _ranked(problem, here, forms):
            return found[0]
        reason = next(filter(None, (form.why_not(problem, form.configs(problem)[0], here) for form in forms)))
    raise BackendError(f"backend '{backend}' cannot run this {problem.kind}: {reason}.")


def _by_torch(problem: Problem, device: torch.device) -> Choice:
    """Torch's own operators: on a CPU by measured thresholds, on a GPU by prediction."""
    if device.type == "cuda" and problem.dtype in DTYPES:
        return candidates(problem, devices.of(device), "torch")[0]
    pointwise = problem.kernel == (1, 1) and problem.padding == (0, 0)
    positions = problem.N * math.prod(problem.out_size)
    dtype = getattr(torch, problem.dtype, torch.float32)
    form = conv_form(problem.kernel, problem.stride, pointwise, problem.C, problem.O, positions, dtype)
    return Choice(conv.named(form), None, math.nan, "thresholds measured on a CPU")


def _on_cpu(problem: Problem, asked: bool, measure: bool) -> Choice:
    """The fastest of our own kernels and torch's operators, as measured here; where nothing is, our own."""
    if problem.dtype == "tf32":  # a GPU's way to multiply float32
        problem = replace(problem, dtype="float32")
    here = devices.of(torch.device("cpu"))
    forms = [form for form in conv.FORMS if "cpu" in form.devices]
    ours, reason = [], None
    for form in forms:
        if form.backend == "cpu" or (form.backend != "torch" and not asked):
            why = form.why_not(problem, None, here) or form.missing()
            reason = reason or why
            if why is None:
                ours.append(Choice(form, None, math.nan, "asked for by name" if asked else ""))
    if not ours and asked:
        raise BackendError(f"backend 'cpu' cannot run this {problem.kind}: {reason}.")
    if not ours:
        return _choose(problem, torch.device("cpu"), None)
    flops = 2 * problem.K * problem.N * math.prod(problem.out_size) * problem.C * problem.O * problem.taps
    if flops < WORTH:
        return replace(ours[0], reason=ours[0].reason or "too small to measure")
    others = [
        Choice(form, None, math.nan, "")
        for form in forms
        if not asked and form.backend == "torch" and form.why_not(problem, None, here) is None
    ]
    return fastest(problem, [*ours, *others], measure)
