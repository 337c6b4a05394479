"""Inference of a composed network: dense, as torch runs it, and without its zero blocks, whole or layer by layer."""

import copy
from functools import partial

import pytest
import torch
from contestants import CL, Setting
from race import CLOCK, HOPELESS, Contestant, Race, Spec, Work, race
from torch import nn

import decompk
from decompk import models
from decompk.cost import walk
from decompk.cost.figures import total
from decompk.divide.blockdiag import Layerwise, ZeroSkipping, layer_by_layer
from decompk.packed.pack import Packed
from decompk.packed.schedule import CALLS

CASES = (("ResNet32", 4, 32), ("ResNet32", 16, 32), ("VGG16", 4, 4))  # network, K, images
SIDES = {"dense": "peer", "dense, channels_last": "peer", "members": "ours", "layer by layer": "ours"}


def specs(setting: Setting, full: bool, compiled: bool) -> list[Spec]:
    return [
        Spec("composed", f"{title}, K={K}", SIDES, partial(run, name, K, images, setting), facts)
        for title, K, images in CASES
        for name in (title.lower(),)
        for facts in ({"network": name, "K": K, "batch": images},)
    ]


@torch.no_grad()
def run(name: str, K: int, images: int, setting: Setting) -> Race:
    torch.manual_seed(0)
    size = models.spec(name).input_size
    d = decompk.decompose(models.build(name), size, K)
    dense = d.compose(d.subnets(seed=0)).eval()
    by_layer = layer_by_layer(dense)
    assert isinstance(by_layer, Layerwise)
    nets = {
        "dense": dense,
        "dense, channels_last": copy.deepcopy(dense).to(memory_format=CL),
        "members": decompk.block_diagonal(dense, size),
        "layer by layer": by_layer,
    }
    x = torch.randn(images, *size).to(setting.device)
    exact = copy.deepcopy(dense).to(setting.device, torch.float64)(x.double())

    def contestant(how: str) -> Contestant:
        net = nets[how].to(setting.device)
        mine = x.contiguous(memory_format=CL) if "channels_last" in how else x

        @torch.no_grad()
        def forward() -> torch.Tensor:
            with setting.autocast():
                return net(mine)

        for _ in range(CALLS if isinstance(net, Packed) else 0):  # until it has chosen its schedule
            forward()
        return Contestant(forward, lambda y: {"output": y.unsqueeze(0)}, work(dense, net, size, images))

    builds = {how: partial(contestant, how) for how in nets}
    return race(builds, {"output": exact.unsqueeze(0)}, tuple(nets)[:2], rounds=5, most=1.0, hopeless=HOPELESS)


def work(dense: nn.Module, net: nn.Module, size: tuple[int, ...], images: int) -> Work:
    """Of a forward pass; without the zeros among the weights where `net` skips them."""
    whole = total(walk.layers(dense, size))
    if not isinstance(net, ZeroSkipping):
        return Work(whole.forward_bytes(4, images), images * whole.flops())
    weights = sum(int(parameter.count_nonzero()) for parameter in dense.parameters())
    macs = net.skipped(size).objects()[-1]["done"]
    return Work(4 * (images * whole.forward_samples + weights), 2 * images * macs)


@pytest.mark.benchmark(timer=CLOCK)
def test_composed_inference(entry):
    entry()
