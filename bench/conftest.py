"""The bench's options, what a result file says of where it was made, and the short table at the end of a run."""
# ruff: noqa: E402 (tools/layers.py stands beside the package)

from __future__ import annotations

import functools
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent
sys.path[:0] = [str(BENCH.parent), str(BENCH.parent / "tools")]

from contestants import Setting
from race import LEFT_OUT, Work, enter, entries

from decompk.kernels.cache import cores, processor, slug
from decompk.profile.roofs import measure_roofs
from decompk.report import bench as page

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def pytest_addoption(parser):
    group = parser.getgroup("decompk")
    group.addoption("--full", action="store_true", help="every network and layer, batch 16 and 64")
    group.addoption("--compiled", action="store_true", help="on a CPU, too, what torch.compile builds, and the global")
    group.addoption("--precision", choices=list(DTYPES), help="default: bf16 on a GPU, float32 on a CPU")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """A whole run writes bench/results/<device>/bench.json; one of some tests writes what --benchmark-json names."""
    option = config.option
    whole = not (option.keyword or option.markexpr or option.collectonly)
    whole = whole and all(Path(argument).resolve() in (BENCH, BENCH.parent) for argument in config.args)
    if option.benchmark_only and whole and not option.benchmark_json:
        path = BENCH / "results" / slug(_device()) / "bench.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        option.benchmark_json = str(path)
    option.benchmark_columns = option.benchmark_columns or ["median", "iqr", "min", "max", "rounds"]
    torch.backends.cudnn.benchmark = True


def _setting(config) -> Setting:
    return Setting.here(DTYPES.get(config.getoption("--precision")))


def pytest_generate_tests(metafunc):
    if "spec" in metafunc.fixturenames:
        options = (metafunc.config.getoption(option) for option in ("--full", "--compiled"))
        specs = metafunc.module.specs(_setting(metafunc.config), *options)
        metafunc.parametrize("spec,name", entries(specs))


@pytest.fixture
def entry(benchmark, spec, name, pytestconfig):
    """Runs the race that `spec` describes, once for all its contestants, and enters the one called `name`."""
    setting = _setting(pytestconfig)
    return lambda: enter(benchmark, spec, name, _roofs(setting))


def _device() -> str:
    """The GPU's name, or the processor's, with its generation, and how many cores of it there are."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {processor().name}, {cores()} cores"


@functools.cache
def _roofs(setting: Setting) -> Work:
    """What the machine moves and computes in a second, measured once."""
    found = measure_roofs(setting.device)
    return Work(found.bandwidth, found.rates[str(setting.dtype).removeprefix("torch.")])


def pytest_benchmark_update_machine_info(config, machine_info):
    """Versions and processor, not whose machine it was."""
    for key in ("node", "release", "python_build", "python_compiler"):
        machine_info.pop(key, None)
    setting = _setting(config)
    roofs = _roofs(setting)
    machine_info["cpu"] = {key: machine_info["cpu"].get(key) for key in ("brand_raw", "count", "arch")}
    machine_info |= {
        "device": _device(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "threads": torch.get_num_threads(),
        "precision": str(setting.dtype).removeprefix("torch."),
        "copy_gbps": round(roofs.bytes / 1e9, 2),
        "matmul_gflops": round(roofs.flops / 1e9, 1),
    }
    if setting.gpu:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        machine_info["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip() or None


def pytest_benchmark_update_json(config, benchmarks, output_json):
    asked = [str(argument) for argument in config.invocation_params.args]
    for at in [i for i, argument in enumerate(asked) if argument.startswith("--benchmark-json")]:
        asked[at : at + 1 if "=" in asked[at] else at + 2] = []  # where the file lies is nobody's business
    output_json["command"] = shlex.join(["pytest", *asked])
    output_json["commit_info"] = {"id": output_json["commit_info"].get("id")}
    output_json["left_out"] = LEFT_OUT
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # the seconds are in extra_info
        benchmark["options"] = {}  # of how pytest-benchmark would have timed
        benchmark["params"].pop("spec", None)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    found = [page.Entry.of(b.extra_info) for b in (session.benchmarks if session else []) if b.extra_info.get("part")]
    if found:
        terminalreporter.section("decompk beside its peers")
        terminalreporter.write_line(page.summary(found).to_text())
        if config.option.benchmark_json:
            terminalreporter.write_line(f"All of it: {config.option.benchmark_json}; as a page: decompk bench-report")
