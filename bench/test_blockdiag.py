"""Inference of a composed network: dense, as torch runs it, and without its zero blocks, whole or layer by layer."""

import functools

import pytest
import torch

import decompk
from decompk import models
from decompk.blockdiag import Layerwise, _layer_by_layer

CASES = {"ResNet32, K=4": ("resnet32", 32), "VGG16, K=4": ("vgg16", 4)}  # network, images


@functools.cache
def contestants(name):
    """The composed network in the two memory formats, and its zero-skipping forms."""
    torch.manual_seed(0)
    size = models.spec(name).input_size
    d = decompk.decompose(models.build(name), size, 4)
    dense, other = (d.compose(d.subnets(seed=0)).eval() for _ in range(2))
    by_layer = _layer_by_layer(dense, "")
    assert isinstance(by_layer, Layerwise)
    return {
        "dense": dense,
        "dense, channels_last": other.to(memory_format=torch.channels_last),
        "members": decompk.block_diagonal(dense, size),
        "layer by layer": by_layer,
    }


@torch.no_grad()
def run(net, x):
    return net(x)


@pytest.mark.parametrize("how", ["dense", "dense, channels_last", "members", "layer by layer"])
@pytest.mark.parametrize("case", CASES)
def test_composed_inference(benchmark, case, how):
    name, images = CASES[case]
    nets = contestants(name)
    torch.manual_seed(1)
    x = torch.randn(images, *models.spec(name).input_size)
    torch.testing.assert_close(run(nets[how], x[:2]), run(nets["dense"], x[:2]), rtol=1e-3, atol=1e-3)
    if "channels_last" in how:
        x = x.contiguous(memory_format=torch.channels_last)
    benchmark.group = f"{case}, {images} images, {torch.get_num_threads()} threads"
    benchmark.pedantic(run, (nets[how], x), rounds=15, warmup_rounds=2)
