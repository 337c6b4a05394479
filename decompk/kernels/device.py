"""The machine an operation runs on, as far as a choice of kernel depends on it."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """What a kernel may use and what bounds it. Rates are reachable ones, for predictions: `measured` says whence."""

    name: str
    capability: int  # 80, 90, 100: 10 · major + minor
    processors: int
    shared_bytes: int  # largest shared memory of one block
    memory_gbps: float  # device memory, copy
    l2_gbps: float
    tensor_tflops: float  # dense bf16 / fp16
    measured: bool = False

    @functools.cached_property
    def descriptors(self) -> bool:
        """Whether tensor descriptors are the copy engine's (TMA) here, and not rewritten to pointers."""
        return self.capability >= 90


# Datasheet rates times what copies and matrix products commonly reach (0.9 and 0.8); a GPU run replaces them.
KNOWN = {
    80: Device("A100", 80, 108, 166_912, 1_750, 4_000, 250),
    90: Device("H100", 90, 132, 232_448, 3_000, 5_500, 800),
    100: Device("B200", 100, 148, 232_448, 7_000, 10_000, 1_800),
}


@functools.lru_cache
def of(device: torch.device) -> Device:
    """The Device behind a CUDA device; for the CPU, where kernels only run interpreted, the H100's numbers."""
    if device.type != "cuda":
        return KNOWN[90]
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    near = KNOWN[max((c for c in KNOWN if c <= capability), default=80)]
    return Device(
        properties.name,
        capability,
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", near.shared_bytes),
        4_300 if "H200" in properties.name else near.memory_gbps,
        near.l2_gbps,
        near.tensor_tflops,
    )


@functools.lru_cache
def why_no_triton() -> str | None:
    """Why Triton kernels cannot be built here, None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors: TRITON_INTERPRET=1 when they are first used."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.lru_cache
def why_no_interpreter() -> str | None:
    """Why Triton's interpreter fails with this numpy, None where it runs."""
    import numpy
    import triton

    old, new = (tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy))
    if old < (3, 7) and new >= (2, 4):
        return (
            f"the interpreter of triton {triton.__version__} fails with numpy {numpy.__version__}: it needs numpy<2.4"
        )
    return None


def why_not_triton_on(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of `device`, None where they can."""
    if reason := why_no_triton():
        return reason
    if device.type == "cuda":
        capability = 10 * torch.cuda.get_device_capability(device)[0]
        return None if capability >= 80 else f"sm_{capability} is older than sm_80"
    if device.type == "cpu":
        return (
            why_no_interpreter() if interpreted() else "on a CPU Triton runs only interpreted: set TRITON_INTERPRET=1"
        )
    return f"no Triton on {device.type}"
