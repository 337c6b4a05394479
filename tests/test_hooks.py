"""What acts beside the forward code is refused by name: hooks, computed weights, replaced forwards."""

import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, remove_spectral_norm, remove_weight_norm, spectral_norm, weight_norm

import decompk
from decompk import UnsupportedOperation

SIZE = (3, 8, 8)


def network():
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    return nn.Sequential(stem, nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


# name → (registers it, how the message begins)
HOOKS = {
    "a leaf's forward hook": (lambda net: net[1].register_forward_hook(flipped), "'1' has a forward hook"),
    "a leaf's pre-hook": (lambda net: net[1].register_forward_pre_hook(ignored), "'1' has a forward pre-hook"),
    "a block's forward hook": (lambda net: net[0].register_forward_hook(ignored), "'0' has a forward hook"),
    "the network's own": (lambda net: net.register_forward_hook(ignored), "the network has a forward hook"),
    "a backward hook": (lambda net: net[4].register_full_backward_hook(ignored), "'4' has a backward hook"),
    "a backward pre-hook": (lambda net: net[4].register_full_backward_pre_hook(ignored), "'4' has a backward pre-hook"),
    "a gradient mask": (lambda net: net[1].weight.register_hook(lambda g: g * 0), "'1.weight' has a hook"),
    "behind a gradient": (lambda net: net[1].bias.register_post_accumulate_grad_hook(ignored), "'1.bias' has a hook"),
}


def flipped(module, inputs, output):
    return output.flip(1)


def ignored(*arguments):
    return None


@pytest.mark.parametrize("size", [SIZE, None])
@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_refused_by_name_and_once_removed_the_network_decomposes(name, size):
    hang, words = HOOKS[name]
    net = network()
    handle = hang(net)
    with pytest.raises(UnsupportedOperation, match=words) as caught:
        decompk.decompose(net, size)
    assert "handle.remove()" in str(caught.value) and str(caught.value).endswith(".")
    handle.remove()
    assert decompk.decompose(net, size).K == 4


COMPUTED = {
    "weight_norm": (weight_norm, remove_weight_norm, r"remove_weight_norm\(module, 'weight'\)"),
    "spectral_norm": (spectral_norm, remove_spectral_norm, r"remove_spectral_norm\(module, 'weight'\)"),
    "pruning": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.remove(layer, "weight"),
        r"prune.remove\(module, 'weight'\)",
    ),
    "pruning twice": (
        lambda layer: prune.random_unstructured(prune.ln_structured(layer, "weight", 0.5, 2, 1), "weight", 0.5),
        lambda layer: prune.remove(layer, "weight"),
        r"prune.remove\(module, 'weight'\)",
    ),
    "pruning of biases": (
        lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
        lambda layer: prune.remove(layer, "bias"),
        r"prune.remove\(module, 'bias'\)",
    ),
    "a parametrization": (
        parametrizations.weight_norm,
        lambda layer: nn.utils.parametrize.remove_parametrizations(layer, "weight"),
        r"remove_parametrizations\(module, 'weight'\)",
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_computed_is_refused_with_what_takes_that_away(name):
    put, take, words = COMPUTED[name]
    net = network()
    put(net[1])
    with pytest.raises(UnsupportedOperation, match=f"^'1' .*{words}"):
        decompk.decompose(net, SIZE)
    with torch.no_grad():
        net(torch.randn(1, *SIZE))
    take(net[1])
    assert decompk.decompose(net, SIZE).K == 4


def test_a_replaced_forward_and_a_compiled_network_are_refused():
    net = network()
    net[1].forward = types.MethodType(lambda layer, x: x.flip(1), net[1])
    with pytest.raises(UnsupportedOperation, match="'1' has a forward of its own"):
        decompk.decompose(net, SIZE)
    with pytest.raises(UnsupportedOperation, match="the network is compiled"):
        decompk.decompose(torch.compile(network()), SIZE)
