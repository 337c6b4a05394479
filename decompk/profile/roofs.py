"""What this device can do at most: bytes it copies and operations it multiplies in a second, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from ..kernels.timer import device_seconds

DTYPES = (torch.float32, torch.bfloat16)
ENOUGH = 0.02  # seconds one measured call should take
LARGE, SMALL = {"cpu": 2**27, "cuda": 2**29}, {"cpu": 2**17, "cuda": 2**22}  # bytes copied: from memory, from cache


@dataclass(frozen=True)
class Roofs:
    """Measured rates of one device: bytes/s, read and written together, and FLOP/s of a matrix product by dtype."""

    device: str
    bandwidth: float  # of memory
    cached_bandwidth: float  # of `cached_bytes` that stay in cache
    cached_bytes: int
    rates: dict[str, float]

    def seconds(self, moved: int, flops: int, dtype: str) -> float:
        """The least time of moving so many bytes and computing so many FLOPs, whichever of the two binds."""
        return max(moved / self.bandwidth, flops / self.rates[dtype])

    def ridge(self, dtype: str) -> float:
        """FLOP/byte above which the arithmetic binds."""
        return self.rates[dtype] / self.bandwidth


def measure_roofs(device: torch.device | str = "cpu") -> Roofs:
    """Copy bandwidth and matmul rates of `device`; takes a few hundred milliseconds on a GPU, a second on a CPU."""
    device = torch.device(device)
    large, small = LARGE[device.type], SMALL[device.type]
    bandwidth, cached = (_bandwidth(size, device) for size in (large, small))
    with _precision_of_convolutions(device):
        rates = {str(dtype).removeprefix("torch."): _matmul_rate(dtype, device) for dtype in DTYPES}
    return Roofs(name_of_device(device), bandwidth, cached, 2 * small, rates)


def name_of_device(device: torch.device) -> str:
    """The GPU's name; of a CPU, on how many threads torch computes."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _bandwidth(size: int, device: torch.device) -> float:
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)  # zeros, so that its pages exist
    repeats = max(1, LARGE[device.type] // size // 8)

    def copy() -> None:
        for _ in range(repeats):
            target.copy_(source)

    return 2 * size * repeats / fastest(copy, device)


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s at the first size that takes long enough: slow types must not take seconds."""
    n = 256
    while True:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = fastest(partial(torch.mm, a, b), device)
        if seconds >= ENOUGH or n >= 8192:
            return 2 * n**3 / seconds
        n *= 2


@contextmanager
def _precision_of_convolutions(device: torch.device) -> Iterator[None]:
    """float32 products in TF32, where convolutions use it."""
    matmul = torch.backends.cuda.matmul
    if device.type != "cuda" or torch.backends.cudnn.conv.fp32_precision != "tf32":
        yield
        return
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def fastest(work: Callable[[], object], device: torch.device, times: int = 4) -> float:
    """Seconds of the fastest of `times` runs after one that is not counted: a roof is what can be reached."""
    work()
    return min(device_seconds(work, device)[0] for _ in range(times))
