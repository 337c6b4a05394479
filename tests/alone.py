"""How far a packed network is from its members run alone: the largest relative error of every stage of its life."""

import copy

import torch
from helpers import leaves, loss_of
from torch import nn

from decompk.packed.pack import pack


def members_of(make, count=3):
    """`count` float64 networks in which no tensor is zero, one or a constant, and nothing is drawn at random."""
    members = []
    for seed in range(count):
        torch.manual_seed(seed)
        members.append(_randomised(make().double()))
    return members


@torch.no_grad()
def _randomised(net):
    for module in net.modules():
        for name in ("p", "drop_prob", "drop_path", "drop_rate", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not tensor.is_floating_point():
                continue
            layer = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and name == "weight"
            tensor.add_(torch.randn_like(tensor), alpha=0.5 / tensor[0].numel() ** 0.5 if layer else 0.1)
            if "var" in name:
                tensor.abs_().add_(0.1)
    return net


def errors_of(members, call, again=None, packed=None):
    """{stage: largest relative error} of packed against the members alone; leaves `members` as they are.

    `call(net, k)` is one call of a network: k is None for the packed one and a member's number else. `again` is another
    batch, for the last stage. Twice in eval mode, because of caches; in train mode outputs, gradients and statistics;
    after a step of SGD the outputs in eval mode, packed and unpacked, and the weights.
    """
    again = again or call
    members = [copy.deepcopy(member) for member in members]
    packed = packed or pack(members)
    found = {}
    for net in (packed, *members):
        net.eval()
    with torch.no_grad():
        alone = [leaves(call(member, k)) for k, member in enumerate(members)]
        for stage in ("eval", "eval again"):
            found[stage] = _error(leaves(call(packed, None)), alone)

    for net in (packed, *members):
        net.train()
    alone = [leaves(call(member, k)) for k, member in enumerate(members)]
    outputs = leaves(call(packed, None))
    found["train"] = _error(outputs, alone)
    floating = [i for i, leaf in enumerate(outputs) if leaf.is_floating_point() and leaf.requires_grad]
    sum(_loss([outputs[i][k] for i in floating]) for k in range(len(members))).backward()
    for own in alone:
        _loss([own[i] for i in floating]).backward()
    found["gradients"] = _gradient_error(packed, members)
    found["statistics"] = _named_error(packed.named_buffers(), members, "named_buffers")

    for net in (packed, *members):
        torch.optim.SGD(net.parameters(), lr=1e-3).step()
        net.eval()
    found["weights"] = _named_error(packed.named_parameters(), members, "named_parameters")
    with torch.no_grad():
        alone = [leaves(again(member, k)) for k, member in enumerate(members)]
        found["after a step"] = _error(leaves(again(packed, None)), alone)
        unpacked = [leaves(again(member, k)) for k, member in enumerate(packed.unpack())]
        found["unpacked"] = max(
            _relative(a, b) for both in zip(unpacked, alone, strict=True) for a, b in zip(*both, strict=True)
        )
    return found


def _loss(outputs):
    return loss_of([leaf if leaf.dim() else leaf.reshape(1) for leaf in outputs])  # a model may return its loss


def _error(packed, alone):
    assert all(len(own) == len(packed) > 0 for own in alone), "another number of outputs"
    return max(_relative(packed[i], torch.stack([own[i] for own in alone])) for i in range(len(packed)))


def _named_error(packed, members, which):
    packed, own = dict(packed), [dict(getattr(member, which)()) for member in members]
    assert packed.keys() == own[0].keys(), "other names"
    pairs = [(tensor, torch.stack([names[name] for names in own])) for name, tensor in packed.items()]
    return max((_relative(a, b) for a, b in pairs), default=0.0)


def _gradient_error(packed, members):
    own = [dict(member.named_parameters()) for member in members]
    pairs = []
    for name, parameter in packed.named_parameters():
        grads = [names[name].grad for names in own]
        if parameter.grad is None or grads[0] is None:
            assert not any(g.any() for g in (parameter.grad, *grads) if g is not None), f"no gradient of {name}"
        else:
            pairs.append((parameter.grad, torch.stack(grads)))
    # A bias in front of a batch norm has the gradient 0: what is left of it is rounding.
    largest = max(alone.abs().max().item() for _, alone in pairs)
    return max(_relative(a, b, 1e-4 * largest) for a, b in pairs)


def _relative(packed, alone, least=1e-30):
    assert packed.shape == alone.shape, f"{tuple(packed.shape)} packed, {tuple(alone.shape)} alone"
    if not alone.numel():
        return 0.0
    if not alone.is_floating_point():
        return float((packed != alone).any())
    assert alone.isfinite().all(), "the members' own values are not finite"
    error = (packed - alone).abs().max() / alone.abs().max().clamp_min(least)
    return error.item() if error.isfinite() else float("inf")
