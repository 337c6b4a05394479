"""Which backend and config each convolution gets, what else was legal, what it would take, and why."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..cost.formulas import conv_bytes, conv_flops
from ..errors import BackendError, DecompkError, brief
from ..fx.graph import in_mode
from ..kernels import device as devices
from ..kernels.backend import in_force
from ..kernels.call import dtype_on_a_gpu, fprop_call
from ..kernels.choose import candidates, choose
from ..kernels.conv.form import Choice
from ..kernels.problem import DTYPES, PASSES, Problem, key_of
from ..packed.pack import Packed
from ..packed.schedule import described, schedule
from ..threads import one_at_a_time
from .table import Column, Table


def explain(what: Problem | nn.Module, x: Tensor | None = None) -> None:
    """Print who runs a Problem, or each convolution of a packed module on input x, on this machine.

    A Problem: every legal choice, predicted fastest first, with its config, predicted or measured time, compulsory
    bytes and those re-read through L2, useful and executed FLOPs, what binds it, and the microseconds of its launches
    and of each bound alone; Problem.fused says what is summed up beside it. A module: one row a convolution and pass.
    Nothing is computed: shapes alone are followed. x may be left out where the module knows its images' size
    (`grouped_subnets`, once its crops are laid): it is a batch of 16 then. Without a GPU the choices of an H100 are
    shown beside this machine's, unless a backend is asked for. Layers that run in turn on torch's own have no row.
    On a CPU a note says by which schedule calls with x run, in the modes in force, and how long each took.
    Raises DecompkError.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(what, Problem):
        print(_of_problem(what, device).to_text())
    elif isinstance(what, nn.Module):
        print(_of_module(what, x, device).to_text())
    else:
        raise DecompkError(f"explain takes a Problem or a packed module, not {type(what).__name__}.")


def _of_problem(problem: Problem, device: torch.device) -> Table:
    choice = choose(problem, device, measure=False)
    legal, where = _legal(problem, device)
    others = [c for c in legal if (c.form, c.config) != (choice.form, choice.config)]
    terms = list(dict.fromkeys(name for c in [choice, *others] for name, _ in c.terms))
    headers = ("choice", "config", "predicted\nms", "L2\nMB", "executed\nGFLOP", *(f"{t}\nµs" for t in terms), "why")
    columns = [Column(h) for h in headers]
    rows = [
        (
            *_who(c),
            f"{c.cost.l2_bytes / 1e6:.1f}" if c.cost else "",
            f"{c.cost.executed_flops / 1e9:.2f}" if c.cost else "",
            *(f"{1e3 * ms:.1f}" if (ms := dict(c.terms).get(t)) else "" for t in terms),
            c.reason,
        )
        for c in [choice, *others]
    ]
    work = f"{conv_bytes(problem) / 1e6:.1f} MB, {conv_flops(problem) / 1e9:.2f} GFLOP" if legal else "no kernel for it"
    fused = f" with {problem.fused}" if problem.fused else ""
    return Table(
        f"{key_of(problem)}{fused}: {work}; first the choice here, then what is legal on {where}", columns, rows
    )


def _legal(problem: Problem, device: torch.device) -> tuple[list[Choice], str]:
    """Every legal choice on this GPU, or on an H100 where there is none, and whose choices they are."""
    here = devices.of(device)
    where = here.name if device.type == "cuda" else f"an {here.name} (no GPU here)"
    known = problem.dtype in DTYPES and devices.why_no_triton() is None
    return (candidates(problem, here) if known else []), where


def _who(choice: Choice) -> tuple[str, str, str]:
    """(backend and form, config, ms), as text."""
    c = choice.config
    config = ""
    if c is not None:
        splits = f", {c.splits} splits{' atomic' if c.atomic else ''}" if c.splits > 1 else ""
        config = (
            f"{'×'.join(map(str, c.tile))} px, {c.block_in}→{c.block_out}, {c.warps} warps, {c.stages} stages{splits}"
        )
    return f"{choice.backend} {choice.form.name}", config, "" if math.isnan(choice.ms) else f"{choice.ms:.4f}"


def _of_module(net: nn.Module, x: Tensor | None, device: torch.device) -> Table:
    calls = convolutions(net, x)
    as_a_gpu = device.type == "cpu" and in_force() is None  # would: what is asked for by name runs here
    headers = ["layer", "pass", "K", "N", "C→O", "pixels", "kernel", "MB", "choice", "config", "ms", "why"]
    rows: list[tuple[object, ...]] = []
    for path, problem in calls:
        for kind in PASSES:
            p = problem.of(kind)
            sides = (p.K, p.N, f"{p.C}→{p.O}", f"{p.H}×{p.W}", f"{p.kernel[0]}×{p.kernel[1]}/{p.stride[0]}")
            moved = f"{conv_bytes(p) / 1e6:.1f}" if p.dtype in DTYPES else ""
            try:
                here = choose(p, device, measure=False)
            except BackendError as error:
                rows.append((path, kind, *sides, moved, "none", "", "", brief(error)))
                continue
            shown = next(iter(_legal(p, device)[0]), here) if as_a_gpu else here
            rows.append((path, kind, *sides, moved, *_who(shown), shown.reason, *([_who(here)[0]] if as_a_gpu else [])))
    if device.type == "cuda":
        where = f"on {torch.cuda.get_device_name()}"
    elif as_a_gpu:
        where, headers = "as an H100 would run them, and who does here, without a GPU", [*headers, "here"]
    else:
        where = f"on this CPU, by backend '{in_force()}'"
    notes = []
    if isinstance(net, Packed) and device.type == "cpu":
        notes.append(described(net, _default_input(net) if x is None else x))
    return Table(f"{type(net).__name__}: {len(calls)} convolutions {where}", [Column(h) for h in headers], rows, notes)


def convolutions(net: nn.Module, x: Tensor | None = None) -> list[tuple[str, Problem]]:
    """(layer, its fprop Problem) of every decompk convolution that one forward of `net` runs, in order."""
    x = _default_input(net) if x is None else x
    found: list[tuple[str, Problem]] = []
    current, thread = [""], threading.get_ident()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.decompk.grouped_conv2d.default, torch.ops.decompk.fused_conv2d.default):
                x, weight = args[:2]
                window = tuple(args[10]) if func is torch.ops.decompk.fused_conv2d.default else ()
                geometry: Any = tuple(map(tuple, args[-3:]))
                call = fprop_call(x, weight, None, geometry, window, dtype=dtype_on_a_gpu(x.dtype))
                found.append((current[0], call.problem))
            return out

    def enter(module: nn.Module, args: tuple) -> None:
        if threading.get_ident() == thread:  # the hook is the process's
            current[0] = getattr(module, "_twin_path", current[0])

    with one_at_a_time():
        hook = nn.modules.module.register_module_forward_pre_hook(enter)
        try:
            with (
                schedule("together"),
                in_mode(net, False),
                torch.no_grad(),
                FakeTensorMode(allow_non_fake_inputs=True) as mode,
                Watch(),
            ):
                net(mode.from_tensor(x))
        finally:
            hook.remove()
    return found


def _default_input(net: nn.Module) -> Tensor:
    size = getattr(getattr(net, "decomposition", None), "input_size", None)
    if size is None:
        raise DecompkError(
            f"explain needs a batch, as {type(net).__name__} does not know the size of one: write explain(packed, x); "
            "the values of x do not matter."
        )
    parameter = next(net.parameters())
    return torch.empty((16, *size), dtype=parameter.dtype, device=parameter.device)
