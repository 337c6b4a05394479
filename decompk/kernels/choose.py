"""Who runs an operation: the choice, from shapes alone, between backends, their forms and their configs."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from ..cost.formulas import OpCost, conv_bytes, conv_flops, op_cost
from ..errors import BackendError
from . import cpu, extension
from . import device as devices
from . import measure as measured
from .cache import slug
from .device import Device
from .problem import DTYPES, TORCH_FORMS, Config, Problem

BACKENDS = ("torch", "loop", "cpu", "triton", "cuda", "emulation")
EXTENSION = ("cuda", "emulation")  # the C++ kernels, on a GPU and built for the host

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("the backend asked for by name", default=None)


class _Traced:
    """The backend of whoever asked last, which compiled code is guarded by: a ContextVar cannot be traced."""

    name: str | None = None


_traced = _Traced()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operation inside on one backend: "torch", "triton" (on a CPU only with TRITON_INTERPRET=1), "cuda".

    "cpu" is the C++ kernels for processors (float32).
    "loop" is torch's own operators, one member after the other: every member computes, to the bit on a CPU, what it
    would compute alone of images that lie channels_last, as the packed ones do. "cuda" is the C++ extension, which
    convolves only (batch norms stay on Triton), "emulation" the same on the CPU.
    Raises BackendError where that backend does not exist here; an operation it cannot run raises it later. A backward
    runs where its forward ran, whenever and in whichever thread that is: autograd has threads of its own. Compiled code
    is compiled again for each backend. What torch.utils.checkpoint computes again is a forward of its own, and needs
    `context_fn=lambda: (nullcontext(), backend(name))`.
    """
    _check_backend(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = None
    if name == "triton":
        reason = devices.why_not_triton_on(device)
    elif name == "cpu":
        reason = cpu.why_not()
    elif name in EXTENSION:
        reason = extension.why_not(name)
    if reason:
        raise BackendError(f"backend '{name}' cannot run here: {reason}.")
    token = _forced.set(name)
    _traced.name = name
    try:
        yield
    finally:
        _forced.reset(token)
        _traced.name = _forced.get()  # not what it was before, which another thread may have set


def _check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise BackendError(f"there is no backend '{name}': choose one of {', '.join(BACKENDS)}.")


ANY = "any"  # what an operation notes for its backward where no backend was asked for


def noted() -> str:
    """What a forward notes of the backend in force, for `resumed` in its backward."""
    return _forced.get() or ANY


@contextlib.contextmanager
def resumed(backend: str | None) -> Iterator[None]:
    """The backend in force is again the `noted` one; None leaves it as it is."""
    if backend is None:
        yield
        return
    if backend != ANY:
        _check_backend(backend)
    token = _forced.set(None if backend == ANY else backend)
    try:
        yield
    finally:
        _forced.reset(token)


def runs_on_cpu() -> bool:
    """Whether the C++ kernels for processors may run: built here, no other backend asked for, and nothing compiled."""
    return in_force() in (None, "cpu") and not torch.compiler.is_compiling() and cpu.why_not() is None


def asked_for(name: str) -> bool:
    """Whether backend `name` is in force."""
    return in_force() == name


def in_force() -> str | None:
    """The backend asked for. Code that reads it while it is compiled is guarded by it."""
    return _traced.name if torch.compiler.is_compiling() else _forced.get()


def watched() -> bool:
    """Whether torch's own operators have to run: forward mode, torch.func, a trace or an export looks on.

    Those follow torch's operators alone: ours are constants to them, or do not run elsewhere.
    """
    return (
        forward_ad._current_level >= 0
        # compiled code takes any other question about the stack for a yes
        or isinstance(_functorch.peek_interpreter_stack(), _functorch.CInterpreter)
        or torch._C._get_tracing_state() is not None
        or torch.compiler._is_exporting_flag  # is_exporting() is true of all that torch 2.11 compiles
    )


def exact(dtype: torch.dtype) -> bool:
    """Whether members compute in turn, each what it would compute alone: asked for, or in EXACT dtypes."""
    return dtype in EXACT or asked_for("loop")


def runs_triton(x: Tensor) -> bool:
    """Whether an operation on x that is not a convolution runs on Triton: on a GPU, or where it is asked for."""
    if _forced.get() in ("torch", "loop") or str(x.dtype).removeprefix("torch.") not in DTYPES:
        return False
    if x.device.type == "cpu" and _forced.get() != "triton":
        return False
    return _triton_or_raise(x.device)


def _triton_or_raise(device: torch.device) -> bool:
    reason = devices.why_not_triton_on(device)
    if reason and _forced.get() == "triton":
        raise BackendError(f"backend 'triton' cannot run here: {reason}.")
    return reason is None


# ---- convolutions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Who runs a Problem: "torch" or "cpu" in a form of `ops.library`, or a kernel with a Config; `ms` is predicted or
    tuned. Raises BackendError for names that nobody has."""

    backend: str
    form: str
    config: Config | None
    ms: float
    reason: str
    cost: OpCost | None = None

    def __post_init__(self) -> None:
        _check_backend(self.backend)
        library = {"torch": TORCH_FORMS, "cpu": cpu.FORMS}.get(self.backend)
        if library is not None:
            known = self.config is None and self.form in library
        else:
            known = self.config is not None and self.config.form == self.form
            known = known and (self.backend in EXTENSION) == (self.form == "halo")
        if not known:
            raise BackendError(f"backend '{self.backend}' has no form '{self.form}' with {self.config}.")


def choose(problem: Problem, device: torch.device, measure: bool = True) -> Choice:
    """The Choice for `problem` on `device`; always answers, or raises BackendError for a backend asked for by name.

    On a CPU it may be measured first, unless `measure` is False: see `measured`.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    if device.type == "cpu" and _forced.get() in (None, "cpu"):
        return _on_cpu(problem, _forced.get() is not None, measure)
    return _choose(replace(problem, deterministic=deterministic), device, _forced.get())


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, device: torch.device, forced: str | None) -> Choice:
    if forced == "loop":
        return Choice("torch", "loop", None, math.nan, "asked for by name")
    if forced in EXTENSION:
        return _extension(problem, device, forced)
    triton = problem.dtype in DTYPES and forced != "torch" and (device.type != "cpu" or forced == "triton")
    if not triton or not _triton_or_raise(device):
        if forced == "triton":
            raise BackendError(f"no Triton kernel computes in {problem.dtype}; use float32, bfloat16 or float16.")
        return _library(problem, device)
    here = devices.of(device)
    if forced is None and (tuned := lookup(problem, here)):
        return tuned
    found = [c for c in candidates(problem, here) if forced in (None, c.backend)]
    if not found:
        raise BackendError(f"no Triton kernel computes {problem}.")
    return found[0]


def _on_cpu(problem: Problem, forced: bool, measure: bool) -> Choice:
    """The fastest of our own kernels and torch's operators, as measured here; where nothing is, our own."""
    if problem.dtype == "tf32":  # a GPU's way to multiply float32
        problem = replace(problem, dtype="float32")
    reason = cpu.why_not_conv(problem)
    if reason and forced:
        raise BackendError(f"backend 'cpu' cannot run this {problem.kind}: {reason}.")
    if reason:
        return _choose(problem, torch.device("cpu"), None)
    forms = [form for form in cpu.FORMS if cpu.why_not_conv(problem, form) is None]
    own = [Choice("cpu", form, None, math.nan, "asked for by name" if forced else "") for form in forms]
    flops = 2 * problem.K * problem.N * math.prod(problem.out_size) * problem.C * problem.O * problem.taps
    if flops < WORTH:
        return replace(own[0], reason=own[0].reason or "too small to measure")
    others = [] if forced else [Choice("torch", form, None, math.nan, "") for form in library_forms(problem)]
    return measured.choose(problem, [*own, *others], measure)


WORTH = 2e6  # FLOPs of all members from which it is worth measuring who is fastest


def _extension(problem: Problem, device: torch.device, name: str) -> Choice:
    """The C++ kernel's best config; raises BackendError where it computes nothing of the kind."""
    from . import conv

    here = devices.of(device)
    configs = conv.halo.configs(problem) if problem.dtype in DTYPES else []
    legal = [c for c in configs if conv.why_not(problem, c, here) is None]
    if not legal:
        reason = conv.why_not(problem, configs[0], here) if configs else f"no kernel computes in {problem.dtype}"
        raise BackendError(f"backend '{name}' cannot run this {problem.kind}: {reason}.")
    return min((_predicted_choice(problem, c, here, name) for c in legal), key=lambda choice: choice.ms)


def candidates(problem: Problem, device: Device) -> list[Choice]:
    """Every legal choice on a GPU, predicted fastest first; of the C++ extension's only where it is built."""
    from . import conv

    found = [_predicted_library(problem, device, form) for form in library_forms(problem)]
    for name, form in conv.FORMS.items():
        if name == "band" and problem.dtype == "float32":
            continue  # without tensor cores a band's zeros are not free, and its products spill
        if name == "halo" and extension.why_not("cuda"):
            continue
        for config in dict.fromkeys(form.configs(problem)):
            if conv.why_not(problem, config, device) is None:
                found.append(_predicted_choice(problem, config, device, backend_of(name)))
    return sorted(found, key=lambda choice: choice.ms)


def backend_of(form: str) -> str:
    """The backend of a form that has Configs."""
    from . import conv

    if form not in conv.FORMS:
        raise BackendError(f"there is no form '{form}': choose one of {', '.join(conv.FORMS)}.")
    return "cuda" if form == "halo" else "triton"


# The model of a GPU until it is tuned: none of these four is measured.
LAUNCH_MS = 0.003
POINTER_SLOWDOWN = 4.0  # loads of single values instead of blocks
CUDNN_GROUPED_SLOWDOWN = 3.0  # a tile project's public figure: 19.7 against 6.6 µs
CUDNN_SLOWDOWN = 1.5


def _rate(problem: Problem, device: Device) -> float:
    """TFLOP/s of the dtype: exact float32 has no tensor cores."""
    return device.tensor_tflops * {"float32": 0.06, "tf32": 0.5}.get(problem.dtype, 1)


def _predicted_choice(problem: Problem, config: Config, device: Device, backend: str) -> Choice:
    """A config with its predicted time: device memory, L2 or arithmetic, the last wave of programs filled up."""
    from . import conv

    cost = op_cost(problem, config)
    rate = _rate(problem, device)
    if config.form == "halo":
        rate *= conv.halo.tensor_rate(problem, config, device)
    bounds = {
        "device memory": cost.compulsory_bytes / device.memory_gbps / 1e6,
        "L2": cost.l2_bytes / device.l2_gbps / 1e6 * (POINTER_SLOWDOWN if config.form == "pointer" else 1),
        "arithmetic": cost.executed_flops / rate / 1e9,
    }
    binding = max(bounds, key=bounds.__getitem__)
    waves = conv.FORMS[config.form].programs(problem, config) / device.processors
    ms = LAUNCH_MS + bounds[binding] * math.ceil(waves) / waves
    return Choice(backend, config.form, config, ms, f"bound by {binding}, {waves:.1f} waves", cost)


def library_forms(problem: Problem) -> list[str]:
    """The forms of `ops.library` that compute `problem`."""
    pointwise = problem.kernel == (1, 1) and problem.padding == (0, 0)
    return ["loop", "grouped"] + (["matmul"] if pointwise else [])


def _predicted_library(problem: Problem, device: Device, form: str) -> Choice:
    moved = conv_bytes(problem) / device.memory_gbps / 1e6
    arithmetic = conv_flops(problem) / _rate(problem, device) / 1e9
    if form == "loop":
        ms = problem.K * LAUNCH_MS + CUDNN_SLOWDOWN * max(moved, arithmetic) + moved
        reason = f"{problem.K} launches, then side by side in memory"
    elif form == "matmul":
        ms, reason = LAUNCH_MS + CUDNN_SLOWDOWN * max(moved, arithmetic), "one batched product"
    else:
        copies = 0 if problem.layout == "grouped" else 2 * moved
        ms = LAUNCH_MS + CUDNN_GROUPED_SLOWDOWN * max(moved, arithmetic) + copies
        reason = "one grouped call" + ("" if problem.layout == "grouped" else ", copied to channel groups and back")
    return Choice("torch", form, None, ms, reason)


def _library(problem: Problem, device: torch.device) -> Choice:
    """Torch's own operators: on a CPU by measured thresholds, on a GPU by prediction."""
    if device.type == "cuda" and problem.dtype in DTYPES:
        here = devices.of(device)
        return min((_predicted_library(problem, here, form) for form in library_forms(problem)), key=lambda c: c.ms)
    pointwise = problem.kernel == (1, 1) and problem.padding == (0, 0)
    positions = problem.N * math.prod(problem.out_size)
    dtype = getattr(torch, problem.dtype, torch.float32)
    form = conv_form(problem.kernel, problem.stride, pointwise, problem.C, problem.O, positions, dtype)
    return Choice("torch", form, None, math.nan, "thresholds measured on a CPU")


# ---- tuned tables ---------------------------------------------------------------------------------------------------

TABLES = Path(__file__).parent / "configs"


def table_path(device: Device) -> Path:
    """Where `tools/tune.py` writes what it measured on `device`."""
    return TABLES / f"{slug(device.name)}.json"


def key_of(problem: Problem) -> str:
    """A Problem as the name of a table's entry."""
    p = problem
    pairs = "_".join(f"{name}{a}x{b}" for name, (a, b) in zip("ksp", (p.kernel, p.stride, p.padding), strict=True))
    flags = ("" if p.aligned else "_unaligned") + ("_deterministic" if p.deterministic else "")
    return (
        f"{p.kind}_{p.dtype}_{p.layout}_K{p.K}_N{p.N}_C{p.C}_O{p.O}_{p.H}x{p.W}_{pairs}_"
        f"d{p.dilation[0]}x{p.dilation[1]}{flags}"
    )


@functools.lru_cache
def table(device: Device) -> dict[str, dict]:
    """The tuned entries for `device`: key → {"backend", "form", "config", "ms"}; empty where none is whole."""
    try:
        return dict(json.loads(table_path(device).read_text())["entries"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # without a table, the model decides
        return {}


def lookup(problem: Problem, device: Device) -> Choice | None:
    """The measured winner for exactly this problem, if it is in the table, still legal, and built here."""
    from . import conv

    try:
        choice = choice_of(table(device)[key_of(problem)])
    except (BackendError, KeyError, TypeError, ValueError, AttributeError):  # none, or none of this version
        return None
    if choice.config is None:
        return choice if choice.form in library_forms(problem) else None
    if choice.backend == "cuda" and extension.why_not("cuda"):
        return None
    if conv.why_not(problem, choice.config, device):
        return None
    return replace(choice, cost=op_cost(problem, choice.config))


def entry_of(choice: Choice) -> dict:
    """A Choice as a table keeps it."""
    config = choice.config and asdict(choice.config)
    return {"backend": choice.backend, "form": choice.form, "config": config, "ms": choice.ms}


def choice_of(entry: dict) -> Choice:
    """The Choice that a table keeps as `entry`; raises BackendError for names that nobody has."""
    config = entry["config"] and Config(**{**entry["config"], "tile": tuple(entry["config"]["tile"])})
    return Choice(entry["backend"], entry["form"], config, entry["ms"], "measured when tuned")


# ---- forms on a CPU -------------------------------------------------------------------------------------------------

# Nobody trains in these for speed: the loop computes, bit for bit, what the members alone compute.
EXACT = (torch.float64, torch.complex64, torch.complex128)

# Thresholds: forward + backward on one CPU core, fp32, channels_last, 16 samples a member, medians in ms.


def _sizeless() -> bool:
    """Whether the code that runs is written down for batches of other sizes, too.

    Members in turn do not ask for the size; views that join members and samples do, of torch's symbolic shapes.
    """
    return torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None


def conv_form(
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pointwise: bool,
    in_channels: int,
    out_channels: int,
    positions: int,
    dtype: torch.dtype = torch.float32,
    cuda: bool = False,
) -> str:
    """How K convolutions run: "loop" over members, "grouped" as one call, "matmul" as one batched product.

    The sizes are one member's: `in_channels` of one of its groups, `positions` = samples · output pixels.
    `pointwise` says that a batched product computes the same (1×1, no padding, one group, images). On a GPU it is
    always one launch.
    """
    # 3×3, loop / grouped: 8→8 at 9², K=16 (0.7 M MAC): 14 / 9; 16→16 at 9², K=16 (3 M): 25 / 27; at 35², K=4: 39 / 56.
    if exact(dtype) or _sizeless():
        return "loop"
    if cuda:
        return "matmul" if pointwise else "grouped"
    small = positions * out_channels * in_channels * math.prod(kernel) < 2**21
    # 1×1, loop / grouped / matmul: 16→64 at 35², K=4: 24 / 50 / 22; 8→32 at 9², K=16: 16 / 10 / 7; with stride 2,
    # 64→128 at 35², K=4: 54 / 94 / 79; 16→32 at 18², K=16: 31 / 23 / 15.
    if pointwise and (small or set(stride) == {1}):
        return "matmul"
    return "grouped" if small else "loop"


def norm_form(
    elements: int, channels: int, training: bool, dtype: torch.dtype = torch.float32, cuda: bool = False
) -> str:
    """How K batch norms run, "loop" or "grouped": `elements` values and `channels` channels a member."""
    # 8 channels at 9², K=16: 3.2 / 2.3; 64 at 9², K=4: 2.2 / 1.8; 64 at 35², K=4: 22 / 35; 4 at 35², K=16: 35 / 16.
    if exact(dtype) or _sizeless():
        return "loop"
    if cuda:
        return "grouped"
    if training:
        return "grouped" if elements < 2**16 or channels < 8 else "loop"
    # Forward alone: 16 channels at 5², K=16: 0.6 / 0.3; 4 at 18², K=16: 2.0 / 2.4; 64 at 9², K=4: 0.47 / 0.58.
    return "grouped" if elements < 2**14 else "loop"


def recurrent_form(mode: str, K: int, dtype: torch.dtype = torch.float32, cuda: bool = False) -> str:
    """How K recurrent layers run: "loop", torch's own in turn, or "together", all of them a step at a time."""
    # oneDNN has LSTMs of its own, and nothing else. 16 steps of 16 samples, two cores, loop / together in ms: LSTM,
    # hidden 64, K=4: 11.5 / 13.9, K=16: 37.3 / 28.6; hidden 16: 6.6 / 9.7, 24.7 / 13.5; GRU, hidden 64: 32.9 / 14.2,
    # 75.5 / 17.7.
    if _sizeless():
        return "loop"
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or watched():
        return "together"
    return "loop" if exact(dtype) or (mode == "LSTM" and K <= 8 and not cuda) else "together"


def linear_form(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype = torch.float32, cuda: bool = False
) -> str:
    """How K linear layers run, "loop" or "grouped" as one batched product: the sizes are one member's."""
    # 32→10 on 16 rows, K=16: 1.2 / 0.3; 64→192 on 1024 rows, K=4: 7.3 / 6.7; 512→1000 on 16 rows, K=4: 10 / 25.
    if exact(dtype) or _sizeless():
        return "loop"
    if cuda:
        return "grouped"
    return "loop" if rows < 64 and in_features * out_features >= 2**18 else "grouped"
