"""The backend in force: asked for by name, noted by a forward for its backward, or none where the fastest is chosen."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import BackendError
from . import cpu, extension
from . import device as devices
from .problem import DTYPES

BACKENDS = ("torch", "loop", "cpu", "triton", "cuda", "emulation")
EXTENSION = ("cuda", "emulation")  # the C++ kernels, on a GPU and built for the host
EXACT = (torch.float64, torch.complex64, torch.complex128)  # nobody trains in these for speed: see `exact`

forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("the backend asked for by name", default=None)


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
    check_backend(name)
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
    token = forced.set(name)
    _traced.name = name
    try:
        yield
    finally:
        forced.reset(token)
        _traced.name = forced.get()  # not what it was before, which another thread may have set


def check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise BackendError(f"there is no backend '{name}': choose one of {', '.join(BACKENDS)}.")


ANY = "any"  # what an operation notes for its backward where no backend was asked for


def noted() -> str:
    """What a forward notes of the backend in force, for `resumed` in its backward."""
    return forced.get() or ANY


@contextlib.contextmanager
def resumed(backend: str | None) -> Iterator[None]:
    """The backend in force is again the `noted` one; None leaves it as it is."""
    if backend is None:
        yield
        return
    if backend != ANY:
        check_backend(backend)
    token = forced.set(None if backend == ANY else backend)
    try:
        yield
    finally:
        forced.reset(token)


def in_force() -> str | None:
    """The backend asked for. Code that reads it while it is compiled is guarded by it."""
    return _traced.name if torch.compiler.is_compiling() else forced.get()


def asked_for(name: str) -> bool:
    """Whether backend `name` is in force."""
    return in_force() == name


def exact(dtype: torch.dtype) -> bool:
    """Whether members compute in turn, each what it would compute alone: asked for, or in EXACT dtypes."""
    return dtype in EXACT or asked_for("loop")


def sizeless() -> bool:
    """Whether the code that runs is written down for batches of other sizes, too.

    Members in turn do not ask for the size; views that join members and samples do, of torch's symbolic shapes.
    """
    return torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None


def runs_triton(x: Tensor) -> bool:
    """Whether an operation on x that is not a convolution runs on Triton: on a GPU, or where it is asked for."""
    asked = forced.get()
    if asked in ("torch", "loop") or str(x.dtype).removeprefix("torch.") not in DTYPES:
        return False
    if x.device.type == "cpu" and asked != "triton":
        return False
    return triton_or_raise(x.device)


def triton_or_raise(device: torch.device) -> bool:
    """Whether Triton runs on `device`; raises BackendError where it does not although it is asked for."""
    reason = devices.why_not_triton_on(device)
    if reason and forced.get() == "triton":
        raise BackendError(f"backend 'triton' cannot run here: {reason}.")
    return reason is None
