"""The C++ extension: finds what tools/build_ext.py has built, loads it when it is first needed, says why it cannot."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import torch

from ..errors import BackendError
from ..threads import once

LIBRARIES = Path(__file__).parent / "lib"
BUILD = {"cuda": "python tools/build_ext.py", "emulation": "python tools/build_ext.py --emulation"}

# Implemented for CUDA by one library, for the CPU by the emulation; tensors as in `kernels.conv`, moments (K, S, 3, O).
SCHEMA = (
    "halo_conv2d(Tensor x, Tensor weight, Tensor(a!) y, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, "
    "bool relu, Tensor(b!)? moments, Tensor? in_scale, Tensor? in_shift, bool in_relu, "
    "int stride, int pad_h, int pad_w, int[] tile, int warps) -> ()"
)


def library(kind: str) -> Path:
    """Where the library of `kind`, "cuda" or "emulation", stands once it is built."""
    if kind not in BUILD:
        raise BackendError(f"there is no extension '{kind}': choose one of {', '.join(BUILD)}.")
    return LIBRARIES / f"halo_{kind}.so"


def why_not(kind: str, device: torch.device | None = None) -> str | None:
    """Why the extension cannot run here, None where it can: "cuda" on `device`, "emulation" on the CPU."""
    if not library(kind).exists():
        return f"the extension is not built: run {BUILD[kind]}"
    if kind == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        capability = torch.cuda.get_device_capability(device)
        built = _made(kind)[1]
        if built and not any(runs_on(architecture, capability) for architecture in built):
            wanted = "".join(map(str, capability))
            return (
                f"the extension is built for sm_{', sm_'.join(built)}, not sm_{wanted}: "
                f"run {BUILD[kind]} --arch {wanted}"
            )
    return _load(kind)


def _made(kind: str) -> tuple[str, list[str]]:
    """Digest and architectures, as tools/build_ext.py wrote them beside the library; empty where that is damaged."""
    try:
        made = json.loads(library(kind).with_suffix(".json").read_text())
        digest, architectures = str(made["sha256"]), list(made["architectures"])
        for architecture in architectures:
            runs_on(architecture, (0, 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", []
    return digest, architectures


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for `architecture`, as in sm_90a, runs on a device of `capability` (major, minor)."""
    number = int(architecture.rstrip("af"))
    major, minor = divmod(number, 10)
    if not architecture.isdigit():
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]


@functools.cache  # a call that raises is not kept
def load(kind: str, device: torch.device | None = None) -> None:
    """Make torch.ops.decompk.halo_conv2d run on CUDA ("cuda") or CPU tensors ("emulation"), or raise BackendError."""
    if reason := why_not(kind, device):
        raise BackendError(f"backend '{kind}' cannot run here: {reason}.")


@functools.cache
def _load(kind: str) -> str | None:
    try:  # before it is loaded: what is cut short ends the process
        digest = hashlib.sha256(library(kind).read_bytes()).hexdigest()
    except OSError as error:
        return f"the extension cannot be read: {error.strerror}"
    if digest != _made(kind)[0]:
        return f"the extension is damaged: run {BUILD[kind]}"
    _define()
    try:
        torch.ops.load_library(str(library(kind)))
    except OSError as error:
        return f"the extension failed to load: {error.__cause__ or error}"
    return None


@once
def _define() -> torch.library.Library:
    definitions = torch.library.Library("decompk", "FRAGMENT")
    definitions.define(SCHEMA)
    return definitions
