"""Members → global network (2.11)–(2.14), and back: the two directions read the same division."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import DecompkError, PackError
from .division import Division

_HEADS = ("sum", "mean", "concat")


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, shared ones once."""
    return dict([*module.named_parameters(), *module.named_buffers()])


def put(module: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Replace parameters and buffers by name, wherever the module holds them: a tensor of two owners stays shared."""
    new: dict[int, Any] = {}
    for name, old in tensors(module).items():
        if name in values:
            value = values[name]
            new[id(old)] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    for owner in module.modules():
        for store in (owner._parameters, owner._buffers):
            store.update({name: new[id(old)] for name, old in store.items() if id(old) in new})


def _take_state(net: nn.Module, members: Sequence[nn.Module]) -> None:
    """Give `net` its members' modes: eval where all have it. A parameter trains where any member's does."""
    modules = [dict(member.named_modules(remove_duplicate=False)) for member in members]
    for path, module in net.named_modules(remove_duplicate=False):
        module.training = any(own[path].training for own in modules if path in own)
    trained = {name for member in members for name, p in member.named_parameters() if p.requires_grad}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in trained)


def compose(division: Division, skeleton: nn.Module, members: Sequence[nn.Module], head: str) -> nn.Module:
    """Fill `skeleton` (the global network on the meta device) with the members' tensors.

    Layers become block-diagonal; every value between two members is zero. The last layer is joined along its input:
    its biases add up ("sum", 2.14), or weights and biases are averaged ("mean", 2.22); "concat" keeps every member's
    outputs apart, K·C of them. Modes and what trains are the members', see _take_state.
    """
    K = division.members
    per_member = [tensors(member) for member in members]
    values: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, empty in tensors(skeleton).items():
            parts = [found[name] for found in per_member]
            if name in division.places:
                scale = 1 / K if head == "mean" and name in division.head_weights else 1
                shape = list(empty.shape)
                apart = output_axis(skeleton, name) if head == "concat" and name in division.head_weights else None
                if apart is not None:
                    shape[apart] *= K
                whole = parts[0].new_zeros(shape)
                for k, (place, part) in enumerate(zip(division.places[name], parts, strict=True)):
                    index = [torch.from_numpy(i) for i in place]
                    if apart is not None:
                        index[apart] = index[apart] + k * empty.shape[apart]
                    whole[tuple(index)] = part if scale == 1 else part * scale
            elif name in division.summed:
                whole = torch.cat(parts) if head == "concat" else _sum(parts)
                if head == "mean":
                    whole = whole / K
            else:
                whole = parts[0].clone()
            values[name] = whole
    put(skeleton, values)
    _take_state(skeleton, members)
    if head == "concat":
        _widen(division, skeleton)
    return skeleton


def output_axis(net: nn.Module, weight: str) -> int:
    """Along which axis of a layer's weight its outputs lie: a transposed convolution holds its inputs first."""
    return 1 if getattr(net.get_submodule(weight.rpartition(".")[0]), "transposed", False) else 0


def _widen(division: Division, net: nn.Module) -> None:
    """Let the last layers say that they have the outputs of all members beside each other."""
    for name in division.head_weights:
        layer = net.get_submodule(name.rpartition(".")[0])
        for attribute in ("out_channels", "out_features"):
            if hasattr(layer, attribute):
                setattr(layer, attribute, getattr(layer, attribute) * division.members)


def apart_skeleton(division: Division, skeleton: nn.Module) -> nn.Module:
    """`skeleton`, on the meta device, with last layers as compose(head="concat") makes them."""
    values = {}
    for name, tensor in tensors(skeleton).items():
        if name in division.head_weights or name in division.summed:
            axis = output_axis(skeleton, name) if name in division.head_weights else 0
            values[name] = tensor.new_empty(
                [n * division.members if a == axis else n for a, n in enumerate(tensor.shape)]
            )
    put(skeleton, values)
    return skeleton


def assemble(x: torch.Tensor, boxes: Sequence[Sequence[tuple[int, int]]]) -> torch.Tensor:
    """The outputs of K members, each on the whole of its map, put together: member k's inside box k (N, K·C, *spatial).

    boxes: (start, stop) per axis, for each member; together they fill the map. → (N, C, *spatial)
    """
    members = x.unflatten(1, (len(boxes), -1)).unbind(1)
    whole = torch.empty_like(members[0])
    for member, box in zip(members, boxes, strict=True):
        place = (slice(None), slice(None), *(slice(*ends) for ends in box))
        whole[place] = member[place]
    return whole


def extract(
    division: Division, skeletons: dict[int, nn.Module], model: nn.Module, head: str, apart: bool = False
) -> list[nn.Module]:
    """Fill one skeleton per member (by its number) with the diagonal blocks of `model`: the inverse of compose.

    apart: the members' outputs lie side by side in `model`, as compose(head="concat") puts them. head="mean" undoes
    (2.22), to the bit where K is a power of two. A head's bias, which composition adds up, comes back as 1/K each; the
    last member takes what rounding left over, so that the sum is the bias to the bit.
    """
    K = division.members
    whole = tensors(model)
    with torch.no_grad():
        for k, skeleton in skeletons.items():
            values: dict[str, torch.Tensor] = {}
            for name in tensors(skeleton):
                value = whole[name].detach()
                if apart and (name in division.head_weights or name in division.summed):
                    value = value.chunk(K, output_axis(model, name) if name in division.head_weights else 0)[k]
                if name in division.places:
                    part = value[tuple(torch.from_numpy(i) for i in division.places[name][k])]
                    if head == "mean" and name in division.head_weights:
                        part = part * K
                elif name in division.summed and head == "sum":
                    part = value / K if k < K - 1 else value - _sum([value / K] * (K - 1)) if K > 1 else value
                else:
                    part = value
                values[name] = part.clone(memory_format=torch.contiguous_format)
            put(skeleton, values)
            _take_state(skeleton, [model])
    return list(skeletons.values())


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def check_head(head: str, split_outputs: bool) -> None:
    """Raise DecompkError for an unknown head, or one that does not fit how the network was decomposed."""
    if head not in _HEADS:
        raise DecompkError(f"head={head!r} is unknown; choose 'sum', 'mean' (regression) or 'concat' (auto-encoder).")
    if split_outputs and head != "concat":
        raise DecompkError(
            f"this network was decomposed with head='concat', so head={head!r} has no last layer to join."
        )


def check_members(skeleton: nn.Module, members: Sequence[nn.Module], count: int, what: str = "sub-network") -> None:
    """Raise PackError unless there are `count` networks with the tensors of `skeleton`; name the first that differs."""
    if len(members) != count:
        raise PackError(f"{len(members)} {what}s were given where {count} are needed.")
    first = tensors(members[0])
    for k, member in enumerate(members):
        for name, tensor in tensors(member).items():
            if name in first and (tensor.dtype, tensor.device) != (first[name].dtype, first[name].device):
                raise PackError(
                    f"'{name}' is {tensor.dtype} on {tensor.device} in {what} {k} and {first[name].dtype} on "
                    f"{first[name].device} in {what} 0; bring them to one dtype and device."
                )
    expected = {name: tuple(t.shape) for name, t in tensors(skeleton).items()}
    for k, member in enumerate(members):
        found = {name: tuple(t.shape) for name, t in tensors(member).items()}
        for name in [*expected, *(name for name, _ in member.named_parameters())]:
            if expected.get(name) != found.get(name):
                raise PackError(
                    f"{what} {k} has '{name}' of shape {found.get(name, 'none')} where {expected.get(name, 'none')} is "
                    "expected; use networks made by this decomposition."
                )
