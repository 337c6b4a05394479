"""torchvision where it is installed: `torchvision` is the module, or None."""

import sys

import torch


def _load():
    try:
        import torchvision
    except ImportError:
        return None
    except RuntimeError:  # built for another torch, its C++ operators do not load; the networks need none of them
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
        import torchvision
    return torchvision


torchvision = _load()
