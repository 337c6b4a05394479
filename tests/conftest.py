import pytest
import torch

torch.set_num_threads(1)  # pytest-xdist already uses every core


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
