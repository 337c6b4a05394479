"""What compiled kernels take of a multiprocessor: tables by architecture, written by tools/resources.py."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from .device import KNOWN, Device
from .problem import Config, Problem, cdiv

TABLES = Path(__file__).parent / "configs"
REGISTERS, THREADS, CTAS = 65536, 2048, 32  # of a multiprocessor from sm_80 on, of those that `device.KNOWN` lists
RESERVED = 1024  # bytes of shared memory that the driver keeps of each CTA
MOST = 255  # registers a thread


@dataclass(frozen=True)
class Resources:
    """What one CTA takes: registers a thread, bytes of shared memory."""

    registers: int
    shared: int

    def ctas(self, warps: int, device: Device) -> int:
        """CTAs of so many warps that a multiprocessor holds at once; registers are handed out by eight a thread."""
        registers = 32 * warps * 8 * cdiv(self.registers, 8)
        shared = (device.shared_bytes + RESERVED) // (self.shared + RESERVED)
        return max(1, min(REGISTERS // registers, shared, THREADS // (32 * warps), CTAS))


def table_path(arch: int) -> Path:
    """Where `tools/resources.py` writes what it compiled for sm_`arch`."""
    return TABLES / f"resources_sm{arch}.json"


def keys_of(problem: Problem, config: Config) -> tuple[str, str]:
    """What decides the machine code, as far as no compiler is needed to say so: the config's part, and the layer's.

    Sizes that are arguments of a running kernel (members, images, rows, splits) are left out.
    """
    p, c = problem, config
    flags = (" atomic" if c.atomic else "") + (f" {p.fused}" if p.fused else "")
    tile = "x".join(map(str, c.tile))
    pairs = " ".join(
        f"{name}{a}x{b}"
        for name, (a, b) in zip("kspd", (p.kernel, p.stride, p.padding, p.dilation), strict=True)
        if name == "k" or (a, b) != ((0, 0) if name == "p" else (1, 1))
    )
    lies = "" if p.aligned else " unaligned"
    dtype = "16-bit" if p.element_size == 2 else p.dtype
    return (
        f"{c.form} {p.kind} {dtype} {tile} {c.block_in}>{c.block_out} {c.warps} warps {c.stages} stages{flags}",
        f"{p.C}>{p.O} {pairs} W{p.W} {p.layout}{lies}",
    )


@functools.lru_cache
def table(arch: int) -> dict[str, dict[str, Resources]]:
    """Config → layer → Resources, as compiled for sm_`arch`; empty where none is whole."""
    try:
        entries = json.loads(table_path(arch).read_text())["entries"]
        return {config: {layer: Resources(*pair) for layer, pair in found.items()} for config, found in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # without a table, forms estimate
        return {}


@functools.lru_cache(maxsize=8192)
def compiled(problem: Problem, config: Config, capability: int) -> Resources | None:
    """What the kernel took when it was compiled, or else the most that its config took in any other layer; or None."""
    arch = max((known for known in KNOWN if known <= capability), default=80)
    config_key, layer_key = keys_of(problem, config)
    if not (layers := table(arch).get(config_key)):
        return None
    if found := layers.get(layer_key):
        return found
    return Resources(max(r.registers for r in layers.values()), max(r.shared for r in layers.values()))
