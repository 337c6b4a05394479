"""Compile every shipped kernel without a GPU and read what comes out: registers, spills, shared memory, instructions.

    python tools/inspect_kernels.py [--arch 80,90,100] [--only TEXT] [--out FILE]

Shipped is what is chosen for the layers of tools/layers.py in bfloat16 (ResNet32's in float32, too), with no
flags, those of inference and those of training; what the tuned tables hold; batch norms and block convolutions.
Prints one row a kernel; exit code 1 where one spills, is over the shared memory limit, or lacks the tensor cores, the
rounding of tf32 or (from sm_90) the tensor copies that its form promises.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import layers

from decompk import errors
from decompk.kernels import block as block_conv
from decompk.kernels import conv, tables
from decompk.kernels import device as devices
from decompk.kernels import norm as batch_norm
from decompk.kernels.call import wgrad
from decompk.kernels.choose import candidates
from decompk.kernels.conv.form import Choice
from decompk.kernels.launch import Launch, recording
from decompk.kernels.layout import strides_of
from decompk.kernels.problem import (
    PLAIN_GRADIENT,
    Config,
    Epilogue,
    GradientEpilogue,
    Offsets,
    Problem,
    Prologue,
)

# As PTX names them; the assembler has no other instruction for either.
TENSOR_CORES, TENSOR_COPIES = r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.", r"cp\.async\.bulk\.tensor\."
ROUNDING = r"cvt\.rna\.tf32\."
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FLAGS = {"fprop": ("", "inference", "moments"), "dgrad": ("", "sums", "gated sums"), "wgrad": ("",)}
FUSED = {"moments": "moments", "sums": "sums", "gated sums": "sums"}  # as Problem.fused
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


def launches(problem: Problem, config: Config, flags: str = "") -> list[Launch]:
    """What `config` launches for `problem`, recorded on tensors without memory.

    `flags`: "inference" for every flag that inference may set, "moments" and "sums" for those of training, where
    weights are float32.
    """
    p = problem
    dtype = DTYPES.get(p.dtype) or getattr(torch, p.dtype)
    held = torch.float32 if flags and flags != "inference" else dtype
    layout = "channel-grouped" if p.layout == "channel-grouped" else "member"

    def activation(channels: int, height: int, width: int) -> torch.Tensor:
        shape = (p.K, p.N, channels, height, width)
        return torch.empty_strided(shape, strides_of(layout, shape), dtype=dtype).permute(0, 1, 3, 4, 2)

    with FakeTensorMode(), recording() as found:
        form = conv.named(config.form)
        offsets = Offsets((), torch.empty((p.K, 2), dtype=torch.int32)) if p.layout == "crops" else None
        y, w = activation(p.O, *p.out_size), torch.empty((p.K, p.O, *p.kernel, p.C), dtype=held)
        x = activation(p.C, p.H, p.W) if offsets is None else torch.empty((1, p.N, 2 * p.H, 2 * p.W, p.C), dtype=dtype)
        if p.kind == "fprop":
            around = Epilogue(), None
            bias, vectors = torch.empty((p.K, p.O), dtype=dtype), [torch.empty((p.K, c)) for c in (p.O, p.O, p.C, p.C)]
            if flags == "inference":
                around = Epilogue(bias, *vectors[:2], y, True), Prologue(*vectors[2:])
            elif flags == "moments":
                pieces = torch.empty((p.K, form.moments_pieces(p, config), 3, p.O))
                around = Epilogue(bias, moments=pieces), None
            form.fprop(p, config, x, w, y, *around, offsets)
        elif p.kind == "dgrad":
            around = PLAIN_GRADIENT
            if flags:
                vectors = [torch.empty((p.K, p.C)) for _ in range(4)]
                pieces = torch.empty((p.K, form.moments_pieces(p, config), 2, p.C))
                others = (x, x, None) if flags == "gated sums" else (x, x, x)  # by what a ReLU let pass
                around = GradientEpilogue(*others, *vectors, True, pieces)
            form.dgrad(p, config, y, w, x, around)
        else:
            wgrad(Choice(form, config, 0.0, ""), p, y, x, w, offsets)
    return found


def inspect(kernel: Kernel, arch: int) -> Report:
    """Compile for sm_`arch` and read what comes out."""
    launch = kernel.launch
    source = ASTSource(launch.kernel, *launch.specialisation())
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # of the compiler's own passes, which say more on stderr
        return Report(kernel.label, arch, 0, 0, 0, {}, (f"does not compile: {errors.brief(error)}",))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    counts = {name: len(re.findall(name, compiled.asm["ptx"])) for name in (TENSOR_CORES, TENSOR_COPIES, ROUNDING)}
    shared, limit = compiled.metadata.shared, devices.KNOWN[arch].shared_bytes
    faults = []
    if stack or local:
        faults.append(f"spills: {stack} bytes of stack, {local} of local memory")
    if shared > limit:
        faults.append(f"{shared} bytes of shared memory, over {limit}")
    named = {"tensor cores": TENSOR_CORES, "tensor copies": TENSOR_COPIES, "rounded operands": ROUNDING}
    for name, promise in named.items():
        if promise in kernel.promises and not counts[promise] and (promise != TENSOR_COPIES or arch >= 90):
            faults.append(f"no {name}")
    return Report(kernel.label, arch, registers, stack, shared, counts, tuple(faults))


def shipped(arch: int, only: str = "") -> Iterator[Kernel]:
    """Every distinct kernel that ships for sm_`arch`; `only`: for networks whose title holds this, and batch norms."""
    here = devices.KNOWN[arch]
    seen = set()
    for label, problem, config in _choices(here, only):
        # One config's epilogue is alike in every layer, whatever its taps.
        fresh = (problem.kind, problem.dtype, config) not in seen
        seen.add((problem.kind, problem.dtype, config))
        form = conv.named(config.form)
        for flags in FLAGS[problem.kind] if fresh else ("",):
            if form.why_not(replace(problem, fused=FUSED.get(flags, "")), config, here):
                continue
            for launch in launches(problem, config, flags):
                if _key(launch) not in seen:
                    seen.add(_key(launch))
                    what = f"{launch.kernel.__name__} {label} {flags}"
                    yield Kernel(what, launch, _promises(problem, config, launch))
    for label, launch in batch_norm.variants():
        yield Kernel(f"batch norm {label}", launch)
    for label, launch in () if only else block_conv.variants():
        yield Kernel(label, launch, () if " float32 " in label else (TENSOR_CORES,))


def _choices(here: devices.Device, only: str) -> Iterator[tuple[str, Problem, Config]]:
    """The Triton config that is preferred for every layer and pass, and what the tuned table holds."""
    for case in (case for case in layers.CASES if only in case.title):
        for dtype in ("bfloat16", "tf32", "float32") if case.model == "resnet32" else ("bfloat16",):
            for layer in layers.layers(case, dtype):
                for problem in layer.passes():
                    # Where moments or sums are wanted another config may be preferred.
                    fused = {"fprop": "moments", "dgrad": "sums"}.get(problem.kind, "")
                    wanted = dict.fromkeys((problem, replace(problem, fused=fused)))
                    found = [next((c.config for c in candidates(p, here, "triton")), None) for p in wanted]
                    found = list(dict.fromkeys(filter(None, found)))
                    tuned = tables.lookup(problem, here)
                    for config in found + ([tuned.config] if tuned and tuned.backend == "triton" else []):
                        yield f"{problem.kind} {dtype} {layer.name}", problem, config


def _key(launch: Launch) -> tuple:
    """What decides the machine code: the kernel as the compiler is given it."""
    return launch.kernel.__name__, *map(str, launch.specialisation()), launch.warps, launch.stages


def _promises(problem: Problem, config: Config, launch: Launch) -> tuple[str, ...]:
    """Tensor cores in every product but exact float32, rounding in tf32; tensor copies of descriptors."""
    cores = () if problem.dtype == "float32" or "PRECISION" not in launch.arguments else (TENSOR_CORES,)
    cores += (ROUNDING,) if cores and problem.dtype == "tf32" else ()
    copies = any(kind.startswith("tensordesc") for kind in launch.specialisation()[0].values())
    return (*cores, TENSOR_COPIES) if copies else cores


JOBS: list[tuple[Kernel, int]] = []  # inherited by forked processes: kernels cannot be pickled


def _inspect_job(i: int) -> Report:
    return inspect(*JOBS[i])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="80,90,100", help="compute capabilities, as in sm_90")
    parser.add_argument("--only", default="", metavar="TEXT", help="the networks whose title holds this, no blocks")
    parser.add_argument("--out", type=Path, help="write the table here, too")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, which replaces the compiler")
    JOBS.extend((kernel, arch) for arch in map(int, args.arch.split(",")) for kernel in shipped(arch, args.only))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        reports = list(pool.map(_inspect_job, range(len(JOBS)), chunksize=4))
    rows = []
    for r in reports:
        counts = [r.counts.get(name, 0) for name in (TENSOR_CORES, TENSOR_COPIES, ROUNDING)]
        figures = (f"sm_{r.arch}", r.registers, r.stack, r.shared, *counts, "; ".join(r.faults))
        rows.append(f"| {r.label} | {' | '.join(map(str, figures))} |")
    head = "| kernel | arch | registers | stack | shared | tensor cores | tensor copies | rounded | faults |"
    table = "\n".join([head, "|---" * 9 + "|", *rows])
    print(table)
    if args.out:
        args.out.write_text(table + "\n")
    faults = [r for r in reports if r.faults]
    print(f"{len(reports)} kernels compiled with triton {triton.__version__}, {len(faults)} with faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
