import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first used: here they run on the CPU

import pytest
import torch

torch.set_num_threads(1)  # pytest-xdist already uses every core


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
