"""A Chrome trace of one training step of the packed members."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..divide.decompose import Decomposition
from .counters import backward
from .measurement import SEED, build


def write_trace(
    d: Decomposition,
    path: Path | str,
    batch: int = 4,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write to `path` what chrome://tracing and Perfetto open: forward, backward and update after a warm-up step."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        ((net, x, optimizer),) = build(d, batch, device, dtype)["packed"].job

        def step() -> None:
            with record_function("forward"):
                outputs = net(x)
            with record_function("backward"):
                backward(outputs)
            with record_function("update"):
                optimizer.step()
            optimizer.zero_grad()

        step()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=activities) as found:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    found.export_chrome_trace(str(path))
