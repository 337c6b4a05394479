"""Compile every shipped kernel without a GPU and read the machine code: registers, spills, shared memory, instructions.

    python tools/inspect_kernels.py [--arch 80,90,100] [--out FILE]

Shipped is what dispatch answers for the layers of tools/layers.py, what the tuned tables hold, and the batch norms. Prints
one row a kernel; exit code 1 where one spills, is over the shared memory limit, or lacks the tensor cores or (from sm_90) the
tensor copies that its form promises.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from decompk import device as devices
from decompk import dispatch
from decompk.config import Config, Epilogue, Problem, Prologue
from decompk.kernels import batch_norm, conv
from decompk.kernels.launch import Launch, recording
from decompk.ops.layout import strides_of

TENSOR_CORES, TENSOR_COPIES, SPILLS = r"HMMA|HGMMA|UTC\w*MMA", r"UTMALDG", r"LDL|STL"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"tf32": torch.float32}


@dataclass(frozen=True)
class Kernel:
    """One kernel to compile: what it is for, the launch, and what its machine code has to hold."""

    label: str
    launch: Launch
    promises: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What the machine code of one kernel for one architecture uses."""

    label: str
    arch: int
    registers: int
    stack: int
    shared: int
    counts: dict[str, int]
    faults: tuple[str, ...]


def launches(problem: Problem, config: Config, epilogue: bool = False) -> list[Launch]:
    """What `config` launches for `problem`, recorded on tensors without memory; `epilogue`: with every flag."""
    p = problem
    dtype = DTYPES.get(p.dtype) or getattr(torch, p.dtype)
    layout = "grouped" if p.layout == "grouped" else "member"

    def activation(channels: int, height: int, width: int) -> torch.Tensor:
        shape = (p.K, p.N, channels, height, width)
        return torch.empty_strided(shape, strides_of(layout, shape), dtype=dtype).permute(0, 1, 3, 4, 2)

    with FakeTensorMode(), recording() as found:
        offsets = torch.empty((p.K, 2), dtype=torch.int32) if p.layout == "crops" else None
        y, w = activation(p.O, *p.out_size), torch.empty((p.K, p.O, *p.kernel, p.C), dtype=dtype)
        x = activation(p.C, p.H, p.W) if offsets is None else torch.empty((1, p.N, 2 * p.H, 2 * p.W, p.C), dtype=dtype)
        if p.kind == "fprop":
            extra = {}
            if epilogue:
                vectors = [torch.empty((p.K, c)) for c in (p.O, p.O, p.C, p.C)]
                moments = torch.empty((p.K, conv.moments_pieces(p, config), 3, p.O))
                extra["epilogue"] = Epilogue(torch.empty((p.K, p.O), dtype=dtype), *vectors[:2], y, True, moments)
                extra["prologue"] = Prologue(*vectors[2:])
            conv.fprop(p, config, x, w, y, offsets=offsets, **extra)
        elif p.kind == "dgrad":
            conv.dgrad(p, config, y, w, x)
        else:
            conv.wgrad(p, config, y, x, w, offsets)
    return found


def inspect(kernel: Kernel, arch: int) -> Report:
    """Compile for sm_`arch` and read what comes out."""
    launch = kernel.launch
    source = ASTSource(launch.kernel, *launch.specialisation())
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("cuobjdump", "--dump-sass", file.name)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    counts = {name: len(re.findall(rf"\b(?:{name})\b", code)) for name in (TENSOR_CORES, TENSOR_COPIES, SPILLS)}
    shared, limit = compiled.metadata.shared, devices.KNOWN[arch].shared_bytes
    faults = []
    if stack or counts[SPILLS]:
        faults.append(f"spills: {stack} bytes of stack, {counts[SPILLS]} local loads and stores")
    if shared > limit:
        faults.append(f"{shared} bytes of shared memory, over {limit}")
    for name, promise in (("tensor cores", TENSOR_CORES), ("tensor copies", TENSOR_COPIES)):
        if promise in kernel.promises and not counts[promise] and (promise == TENSOR_CORES or arch >= 90):
            faults.append(f"no {name}")
    return Report(kernel.label, arch, registers, stack, shared, counts, tuple(faults))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout
