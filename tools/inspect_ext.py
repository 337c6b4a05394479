"""Compile every instantiation of the C++ kernels without a GPU and read what comes out: registers, spills, SASS.

    python tools/inspect_ext.py [--arch 80,90a,100] [--out FILE]

Prints one row a kernel and architecture; CTAs a processor are what registers and shared memory of its largest tile, all
flags set, leave room for. Exit code 1 where one spills, has no tensor-core product, or fits on no processor; where nvcc
is not installed nothing is inspected, which it says, with exit code 0.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import build_ext

from decompk.kernels import conv
from decompk.kernels.problem import Problem

TRITONS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NAME = re.compile(r"halo_kernelI4HaloILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E")
TYPES = {"0": "bfloat16", "1": "float16"}  # as HaloType
INSTRUCTIONS = {  # as cuobjdump names them
    "HMMA": r"\bHMMA\.",
    "LDSM": r"\bLDSM\.",
    "copies of 16 bytes": r"\bLDGSTS\.\S*\.128\b",
    "stores of 16 bytes": r"\bSTG\.\S*\.128\b",
    "local": r"\b(?:LDL|STL)\b",
}
REGISTERS, THREADS, CTAS = 65_536, 2_048, 32  # of a processor
SHARED = {80: 167_936, 90: 233_472, 100: 233_472}  # bytes of a processor, of which each CTA costs 1024 more


@dataclass(frozen=True)
class Report:
    """What one kernel's machine code for one architecture uses."""

    label: str
    arch: str
    registers: int
    stack: int
    shared: int
    ctas: int
    counts: dict[str, int]

    @property
    def faults(self) -> list[str]:
        found = []
        if self.stack or self.counts["local"]:
            found.append(f"spills: {self.stack} bytes of stack, {self.counts['local']} local loads and stores")
        if not self.counts["HMMA"]:
            found.append("no tensor cores")
        if not self.ctas:
            found.append("fits on no processor")
        return found


def inspect(arch: str) -> list[Report]:
    """Compile everything for sm_`arch` and read what comes out."""
    disassembler = shutil.which("cuobjdump") or str(TRITONS)
    with tempfile.TemporaryDirectory() as scratch:
        cubin = f"{scratch}/halo.cubin"
        nvcc = [build_ext.compiler("nvcc"), *build_ext.NVCC_FLAGS, f"-arch=sm_{arch}", "-cubin"]
        build_ext.run([*nvcc, f"{build_ext.SOURCES}/halo.cu", "-o", cubin])
        usage, code = (
            subprocess.run([disassembler, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    bodies = {}
    for part in re.split(r"Function : ", code)[1:]:
        name, _, body = part.partition("\n")
        bodies[name.strip()] = body
    reports = []
    for name, figures in re.findall(r"Function (\S+):\s*\n\s*(.*)", usage):
        if not (match := NAME.search(name)):
            continue
        block_in, block_out, stride = map(int, match.groups()[:3])
        registers, stack, local = (int(re.search(rf"{f}:(\d+)", figures)[1]) for f in ("REG", "STACK", "LOCAL"))
        warps, shared = _largest(block_in, block_out, stride, arch)
        counts = {what: len(re.findall(pattern, bodies[name])) for what, pattern in INSTRUCTIONS.items()}
        label = f"{TYPES[match[4]]} {block_in} → {block_out}, stride {stride}"
        ctas = _resident(arch, registers, warps, shared)
        reports.append(Report(label, arch, registers, stack + local, shared, ctas, counts))
    return sorted(reports, key=lambda r: r.label)


def _largest(block_in: int, block_out: int, stride: int, arch: str) -> tuple[int, int]:
    """(warps, bytes of shared memory) of the candidate tile with most warps that one CTA's shared memory holds."""
    wide = Problem("fprop", "bfloat16", 1, 64, block_in, block_out, 64, 64, (3, 3), (stride,) * 2, (1, 1))
    halo = conv.named("halo")
    found = [(c.warps, halo.shared_bytes(wide, c)) for c in halo.configs(wide)]
    return max((c for c in found if c[1] + 1024 <= SHARED[_number(arch)]), default=max(found))


def _resident(arch: str, registers: int, warps: int, shared: int) -> int:
    """CTAs that one processor holds at once; a warp's registers come in blocks of 256."""
    of_warp = -(-registers * 32 // 256) * 256
    of_cta = {REGISTERS: of_warp * warps, THREADS: warps * 32, SHARED[_number(arch)]: shared + 1024}
    return min(CTAS, *(limit // need for limit, need in of_cta.items()))


def _number(arch: str) -> int:
    number = int(arch.rstrip("af"))
    return max(n for n in SHARED if n <= max(80, number))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(build_ext.ARCHITECTURES), help="architectures, as in sm_90a")
    parser.add_argument("--out", type=Path, help="write the table here, too")
    args = parser.parse_args()
    try:
        build_ext.compiler("nvcc")
    except build_ext.BuildError as error:
        print(f"Nothing is inspected: {error}")
        return 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = [r for found in pool.map(inspect, args.arch.split(",")) for r in found]
    head = ["kernel", "arch", "registers", "stack", "shared", "CTAs", *INSTRUCTIONS, "faults"]
    rows = [
        (r.label, f"sm_{r.arch}", r.registers, r.stack, r.shared, r.ctas, *r.counts.values(), "; ".join(r.faults))
        for r in reports
    ]
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    print(table)
    if args.out:
        args.out.write_text(table + "\n")
    faults = [r for r in reports if r.faults]
    print(f"{len(reports)} kernels compiled, {len(faults)} with faults")
    return 1 if faults or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
