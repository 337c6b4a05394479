"""What is available on this machine, and why the rest is not."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from .. import __version__
from ..kernels import cpu, extension, measure
from ..kernels.cache import shown
from ..kernels.device import why_not_triton_on
from .table import Column, Table


def info() -> Table:
    """Versions, device and backends, one row each with what is missing and why. Imports nothing heavy."""
    rows = [
        ("decompk", __version__, ""),
        ("python", platform.python_version(), ""),
        ("torch", torch.__version__, f"{torch.get_num_threads()} CPU threads"),
        _device(),
        ("backend torch", "available", "runs every packed layer"),
        *_cpu(),
        _triton(),
        _extension(),
        _package("fvcore", "the tests cross-check the counts with it", "test"),
        _package("scikit-learn", "holds the demo's images", "demo"),
        _package("matplotlib", "draws the demo's curves", "plot"),
    ]
    return Table("decompk here", [Column("what"), Column("state"), Column("detail")], rows)


def _device() -> tuple[str, str, str]:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch is built for CUDA {built}, but no GPU answers" if built else "this torch is built without CUDA"
        return ("GPU", "none", why)
    major, minor = torch.cuda.get_device_capability()
    return ("GPU", torch.cuda.get_device_name(), f"sm_{major}{minor}, CUDA {torch.version.cuda}")


def _cpu() -> list[tuple[str, str, str]]:
    reason = cpu.why_not()
    kept = "; freed memory stays with the process" if cpu.keeps_memory() else ""
    known = len(measure.entries(measure.path()))
    return [
        ("backend cpu", "absent" if reason else "available", reason or f"C++ for float32 on this processor{kept}"),
        ("kernels on this CPU", "absent" if reason else "built", "see above" if reason else cpu.where()),
        (
            "choices on this CPU",
            f"{known} measured",
            f"{shown(measure.path())}: remove it to measure them again",
        ),
    ]


def _triton() -> tuple[str, str, str]:
    reason = why_not_triton_on(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    detail = reason or "grouped convolutions and batch norms, each in one launch"
    return ("backend triton", "absent" if reason else "available", f"triton {_version('triton') or 'none'}: {detail}")


def _extension() -> tuple[str, str, str]:
    reason = extension.why_not("cuda")
    return (
        "backend cuda",
        "absent" if reason else "available",
        reason or "3×3 convolutions of up to 64 channels a member",
    )


def _package(name: str, purpose: str, extra: str) -> tuple[str, str, str]:
    version = _version(name)
    return (name, version or "absent", purpose if version else f"{purpose}: pip install decompk[{extra}]")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
