"""What the machine of a GPU suite is and reaches, and what the later stages need, made while the GPU has other work."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import step_bench
import steps
import torch
import triton
import triton.language as tl
from compiling import Compiler, launches_of
from desk import Desk, Plan
from journal import read
from layer_bench import Bench, kernels
from layers import Case, layers
from timing import precision

from decompk.kernels import device as devices
from decompk.kernels import extension, tables
from decompk.kernels.conv.model import LAUNCH_MS
from decompk.report.info import info

ROOT = Path(__file__).parents[1]

# ---- machine: what this one is and reaches --------------------------------------------------------------------------


def machine(desk: Desk) -> None:
    """Versions, then measured roofs beside those that predictions assume."""
    desk.guarded(
        lambda: desk.journal.add(part="machine", case="versions", **versions(desk.plan)),
        part="machine",
        case="versions",
    )
    desk.guarded(
        lambda: desk.journal.add(part="machine", case="info", text=info().to_text()),
        part="machine",
        case="info",
    )
    for case, measure in roofs(desk.plan):
        key = {"part": "roof", "case": case}
        if case.startswith("graph") and desk.lacks("graph", **key):
            continue
        desk.guarded(lambda key=key, measure=measure: desk.journal.add(**key, **measure()), **key)


def versions(plan: Plan) -> dict[str, Any]:
    """What a result has to say of where it was made."""
    gpu, here = plan.device.type == "cuda", devices.of(plan.device)
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total"
    return {
        "device": torch.cuda.get_device_name(plan.device) if gpu else "cpu",
        "smi": said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "table": tables.table_path(here).name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "numpy": importlib.metadata.version("numpy"),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "nvcc": said("nvcc", "--version", line=3),
        "commit": said("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "extension": extension.why_not("cuda") or "carried, loads",
        "assumed": {
            "copy_gbps": here.memory_gbps,
            "l2_gbps": here.l2_gbps,
            "bfloat16_tflops": here.tensor_tflops,
            "launch_ms": LAUNCH_MS,
        },
    }


def said(*command: str, line: int = 0, wait: float = 10) -> str | None:
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=wait).stdout
        return text.splitlines()[line]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


@triton.jit
def nothing(x):
    tl.store(x, 1.0)


def roofs(plan: Plan) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Each with what measures it. GB/s count bytes read and written, TFLOP/s are of products of random values."""
    timer, device = plan.timer(), plan.device
    large, small, side = plan.roofs

    def copy(size: int, times: int) -> dict[str, float]:
        a = torch.randn(size // 4, device=device)
        b = torch.empty_like(a)
        calls = {"copy": lambda: [b.copy_(a) for _ in range(times)]}
        ms = timer(calls, cold=times == 1, seconds=0.3)["copy"].ms
        return {"value": 2 * size * times / ms / 1e6}

    def product(dtype: str) -> dict[str, float]:
        kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        with precision(dtype):
            ms = timer({"product": partial(torch.mm, a, b)}, seconds=0.3)["product"].ms
        return {"value": 2 * side**3 / ms / 1e9}

    def eager() -> dict[str, float]:
        """The host's time for one empty kernel of Triton, in ms."""
        x = torch.zeros(1, device=device)
        calls = {"launches": lambda: [nothing[(1,)](x) for _ in range(100)]}
        return {"value": timer(calls, cold=False, seconds=0.2)["launches"].ms / 100}

    def node() -> dict[str, float]:
        """One node of a CUDA graph behind another, in ms."""
        x = torch.zeros(1, device=device)
        step = steps.Captured(lambda: [nothing[(1,)](x) for _ in range(1000)])
        step()
        return {"value": timer({"nodes": step}, cold=False, seconds=0.2)["nodes"].ms / 1000}

    yield "copy_gbps", partial(copy, large, 1)
    yield "bfloat16_tflops", partial(product, "bfloat16")
    yield "graph_node_ms", node
    yield "l2_gbps", partial(copy, small, 20)
    yield "launch_ms", eager
    for dtype in ("tf32", "float16", "float32"):
        yield f"{dtype}_tflops", partial(product, dtype)


def known_roofs(desk: Desk) -> dict[str, float]:
    """The newest measured ones; what was not measured is what predictions assume."""
    here = devices.of(desk.plan.device)
    found = {"copy_gbps": here.memory_gbps}
    for dtype, share in (("bfloat16", 1.0), ("float16", 1.0), ("tf32", 0.5), ("float32", 0.06)):
        found[f"{dtype}_tflops"] = here.tensor_tflops * share
    lines = read(desk.journal.path)
    return found | {line["case"]: line["value"] for line in lines if line.get("part") == "roof" and "value" in line}


# ---- ahead: what the others need, while the GPU has other work ------------------------------------------------------


def ahead(desk: Desk) -> None:
    """Beside the first stages: builds the extension, then compiles the kernels of steps and layers at low priority."""
    plan, extension_key = desk.plan, {"part": "ahead", "case": "extension"}
    lacking = desk.lacks("extension", **extension_key) or desk.journal.has(**extension_key)
    building = None if lacking else build(plan.arch)
    # A rehearsal compiles, too, if little.
    compiler = Compiler(plan.arch or 90, nice=10, processes=6 if plan.arch else 1)  # the checks have the others
    for title, ask in wanted(desk):
        key = {"part": "ahead", "case": title}

        def compile(key: dict[str, str] = key, ask: Callable[[], list] = ask) -> None:
            launches = ask()
            compiler.ask(launches if plan.arch else launches[:3])
            desk.journal.add(**key, launches=len(launches))

        desk.guarded(compile, patience=90, **key)
    if building is not None:
        desk.guarded(lambda: desk.journal.add(**extension_key, **built(building, desk.left())), **extension_key)
    key = {"part": "ahead", "case": "kernels"}
    desk.journal.begin(600.0, **key)
    while (counts := compiler.counts())["done"] < counts["asked"] and desk.left() > 1:
        time.sleep(0.1)
    errors = compiler.errors()
    desk.journal.add(**key, **counts, **({"errors": errors} if errors else {}))
    compiler.close()


def build(arch: int) -> subprocess.Popen:
    """The extension's compiler at work; nothing to do where the library was carried."""
    command = [sys.executable, str(ROOT / "tools" / "build_ext.py"), "--arch", f"{arch}a" if arch >= 90 else str(arch)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def built(process: subprocess.Popen, seconds: float) -> dict[str, Any]:
    said = process.communicate(timeout=max(seconds, 1))[1]
    if process.returncode:
        return {"error": f"the extension was not built: {said[:300]}", "trace": said[-6000:]}
    reason = extension.why_not("cuda")
    return {"error": reason} if reason else {"built": True}


def wanted(desk: Desk) -> Iterator[tuple[str, Callable[[], list]]]:
    """Launches by title: our steps, then the layers with every form's best config."""
    plan = desk.plan

    def of_step(case: Case, way: Callable) -> list:
        field = step_bench.field_of(case, plan)
        return launches_of(steps.Training(way(field), field.target, case.K, plan.autocast).gradients)

    def of_layers() -> list:
        bench = Bench(desk, desk.plan.timer(), {})
        found = [(layer, one) for layer in layers(plan.layers, plan.dtype, plan.batch) for one in layer.passes()]
        choices = ((layer, one, c) for layer, one in found[: plan.few] for c in kernels(one, plan.device).values())
        return [launch for layer, one, choice in choices for launch in bench.launches(layer, one, choice)]

    for case in plan.steps:
        yield f"{case.title}, fused", partial(of_step, case, steps.fused)
    for case in plan.steps:
        yield f"{case.title}, packed", partial(of_step, case, steps.packed)
    yield "layers", of_layers
