"""Host time of one warm packed convolution, forward and backward, up to its launch: the CPU's way, or Triton's.

python tools/host_time.py cpu | triton | launch

Kernels are called with nothing to do, so what is left is Python, autograd and allocation. One thread; medians in µs.
`launch` goes on from there: what a launch takes up to libcuda, by Triton alone and by the handles of kernels/launch.py,
on a GPU on paper (paper_gpu.py): kernels are compiled and loaded, and libcuda does nothing.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ["DECOMPK_MEASURE"] = "0"
if sys.argv[1:] == ["triton"]:
    os.environ["TRITON_INTERPRET"] = "1"

import paper_gpu
import torch
from torch import nn

import decompk
from decompk.kernels import conv, cpu, norm
from decompk.kernels import launch as launching
from decompk.kernels.conv import band, pointer, tile
from decompk.kernels.problem import Config, Problem
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


def launches() -> dict[str, Callable[[], None]]:
    """What calls one launch, by its kernel's name: whatever is computed on the way to the launch is part of it."""
    bf16, shape = torch.bfloat16, (K, N, SIZE, SIZE, 16)
    x, y, w = (torch.empty(size, dtype=bf16) for size in (shape, shape, (K, 16, 3, 3, 16)))
    fprop, wgrad = (
        Problem(kind, "bfloat16", K, N, 16, 16, SIZE, SIZE, (3, 3), (1, 1), (1, 1)) for kind in ("fprop", "wgrad")
    )
    config, banded = Config("tile", (1, 8, 8), 16, 16), conv.named("band").configs(fprop)[0]
    correlated = Config("tile", (1, 8, 8), 16, 16, splits=4)
    dw, image = torch.empty((4, *w.shape)), x.permute(0, 1, 4, 2, 3)
    vectors, moments = [torch.empty((K, 16)) for _ in range(4)], torch.empty((K, 8, 3, 16))
    return {
        "conv_tile": lambda: conv.named("tile").fprop(fprop, config, x, w, y),
        "wgrad_tile": lambda: conv.named("tile").wgrad(wgrad, correlated, y, x, dw),
        "conv_band": lambda: conv.named("band").fprop(fprop, banded, x, w, y),
        "moments_kernel": lambda: norm.launch_moments(image, 8, moments),
        "finalise_kernel": lambda: norm.launch_finalise(moments, *vectors[:2], 0.1, 1e-5, vectors[2:]),
        "apply_kernel": lambda: norm.launch_apply(image, *vectors, None, True, y.permute(0, 1, 4, 2, 3)),
    }


def launch_times() -> None:
    """Print µs of every launch, alone and with what calls it, by Triton and by kept handles."""
    import triton

    paper_gpu.activate()
    print(f"triton {triton.__version__}: µs a launch, alone and with what calls it")
    for name, call in launches().items():
        found = []
        for watched in (lambda kernel: True, launching.watched):
            with replaced(launching, "watched", watched):
                call(), call()
                found += [fastest(alone(call)), fastest(call)]
        print(f"{name}: by Triton {found[0]:.1f} and {found[1]:.1f}, kept {found[2]:.1f} and {found[3]:.1f}")


def alone(call: Callable[[], None]) -> Callable[[], None]:
    """Only the launch that `call` makes, with the arguments it makes it with."""
    seen = []
    with contextlib.ExitStack() as stack:
        for module in (tile, band, norm):
            stack.enter_context(replaced(module, "launch", lambda *given, **named: seen.append((given, named))))
        call()
    ((given, named),) = seen
    return lambda: launching.launch(*given, **named)


@contextlib.contextmanager
def replaced(module, name: str, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def fastest(call: Callable[[], None]) -> float:
    """Median µs in the fastest of 40 runs of 50 calls: others use the machine, too."""

    def median() -> float:
        times = []
        for _ in range(50):
            with Clock() as clock:
                call()
            times.append(clock.seconds)
        return statistics.median(times)

    return 1e6 * min(median() for _ in range(40))


def main(argv: list[str]) -> int:
    if argv not in (["cpu"], ["triton"], ["launch"]):
        print(__doc__.strip())
        return 2
    torch.set_num_threads(1)
    if argv == ["launch"]:
        if "LD_LIBRARY_PATH" in os.environ and "TRITON_LIBCUDA_PATH" in os.environ:
            launch_times()
            return 0
        with tempfile.TemporaryDirectory() as folder:
            return subprocess.run([sys.executable, *sys.argv], env=paper_gpu.environment(Path(folder))).returncode
    without_kernels()
    with decompk.backend(argv[0]):
        for name, case in CASES.items():
            forward, backward = measured(argv[0], *case)
            print(f"{argv[0]} {name}: forward {forward:.0f} µs, backward {backward:.0f} µs")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
