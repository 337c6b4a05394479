"""Host time of one warm packed convolution, forward and backward, up to its launch: the CPU's way, or Triton's.

python tools/host_time.py cpu | triton

Kernels are called with nothing to do, so what is left is Python, autograd and allocation. One thread; medians in µs.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]
os.environ["DECOMPK_MEASURE"] = "0"
if sys.argv[1:] == ["triton"]:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import nn

import decompk
from decompk.kernels import cpu
from decompk.kernels.conv import band, pointer, tile
from decompk.kernels.timer import Clock

K, N, SIZE = 4, 8, 16
CASES = {"3×3 16→16": (16, 16, 3, 1), "1×1 16→32": (16, 32, 1, 1), "3×3/2 16→16": (16, 16, 3, 2)}
ROUNDS, FIRST = 2000, 200


def without_kernels() -> None:
    """Every launch does nothing from now on; so does every function of the C++ library."""

    class Idle:
        def __getattr__(self, name: str):
            return lambda *arguments: None

    cpu.library = Idle
    for form in (tile, band, pointer):
        form.launch = lambda *arguments, **named: None


def measured(backend: str, C: int, O: int, kernel: int, stride: int) -> tuple[float, float]:
    """Median µs of forward and of backward."""
    dtype = torch.float32 if backend == "cpu" else torch.bfloat16
    members = [nn.Sequential(nn.Conv2d(C, O, kernel, stride, kernel // 2)).to(dtype) for _ in range(K)]
    layer = decompk.pack(members, rehearse=False)._inner[0]
    x = torch.randn(K * N, C, SIZE, SIZE, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy, times = torch.randn_like(layer(x)), []
    for _ in range(ROUNDS + FIRST):
        with Clock() as forward:
            y = layer(x)
        with Clock() as backward:
            torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
        times.append((forward.seconds, backward.seconds))
    return tuple(1e6 * statistics.median(way) for way in zip(*times[FIRST:], strict=True))


def main(argv: list[str]) -> int:
    if argv not in (["cpu"], ["triton"]):
        print(__doc__.strip())
        return 2
    torch.set_num_threads(1)
    without_kernels()
    with decompk.backend(argv[0]):
        for name, case in CASES.items():
            forward, backward = measured(argv[0], *case)
            print(f"{argv[0]} {name}: forward {forward:.0f} µs, backward {backward:.0f} µs")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
