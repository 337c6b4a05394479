"""How kernels are launched: by handles that are kept, on a GPU on paper; and as ever in the interpreter."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from decompk.kernels import norm
from decompk.kernels.device import interpreted
from decompk.kernels.launch import recording

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

triton = pytest.importorskip("triton")


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler builds Triton's launchers")
def test_a_kept_handle_tells_the_driver_what_triton_does(tmp_path):
    import paper_gpu

    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    variables = {**paper_gpu.environment(tmp_path), "PYTHONPATH": str(ROOT), "DECOMPK_MEASURE": "0"}
    path = str(ROOT / "tests" / "on_paper.py")
    run = subprocess.run([*command, path], env=variables, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.skipif(not interpreted(), reason="runs kernels on the CPU")
def test_the_interpreter_keeps_no_handles():
    x = torch.randn(2, 3, 8, 4, 4).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    moments = norm.launch_moments(x, 2)
    _, _, fixed = norm._cut(x.shape, x.stride(), x.element_size(), 2)
    assert not fixed.calls and torch.isfinite(moments).all()
    with recording() as launches:
        norm.launch_moments(x, 2)
    assert launches[0].arguments["x"] is x and launches[0].arguments["rows"] == fixed["rows"]
