import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first used: they run on the CPU then

os.environ["DECOMPK_MEASURE"] = "0"  # which kernel runs does not depend on what else the machine does

torch.set_num_threads(1)  # pytest-xdist already uses every core


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
