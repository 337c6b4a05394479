"""Layers: those with parameters, which a member has with fewer channels, and modules that are operations."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ...errors import MISFITS, PartitionError
from ...fx.graph import on_meta, shape_of, where, windows
from ..channel_pass import ChannelPass
from ..divided_layer import (
    CONV_OR_LINEAR,
    SIDES,
    ChannelwiseLayer,
    RecurrentLayer,
    WeightedLayer,
    channel_vectors,
    narrow,
    sides,
)
from ..operations import FUNCTIONAL_LAYERS
from ..values import PARTIAL, SHARED, Divided, MapExtent, TensorPair, globally, in_member
from .combine import gated
from .elementwise import elementwise, join
from .registry import RULES, rule
from .spatial import covers, scaled, spatial

_PLAIN_FORWARDS = {
    kind.forward
    for kind in (
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
}


# ---- convolutions and linear layers ---------------------------------------------------------------------------------


@rule(*CONV_OR_LINEAR)
def weighted(p: ChannelPass, target: str, args: tuple, kwargs: dict) -> Any:
    module = p.modules[target]
    bias = None if module.bias is None else f"{target}.bias"
    layer = WeightedLayer(target, module, weight=f"{target}.weight", bias=bias)
    return _divide_weighted(p, layer, args[0], (*args[1:], *kwargs.values()))


@rule(*FUNCTIONAL_LAYERS)
def functional(p: ChannelPass, name: str, args: tuple, kwargs: dict) -> Any:
    """F.conv2d(x, self.weight, …): the layer's module is made up, its tensors keep their names."""
    order = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    if name.startswith("conv_transpose"):
        order = [*order[:5], "output_padding", "groups", "dilation"]
    node, given = p.node, dict(zip(order, args, strict=False)) | kwargs
    nodes = dict(zip(order, node.args, strict=False)) | node.kwargs
    names = [nodes.get("weight"), nodes.get("bias")]
    if any(n is not None and (not isinstance(n, fx.Node) or n.op != "get_attr") for n in names):
        p.refuse("its weight is computed, not a parameter as it stands", "make it a module of its own")
    key, bias = names[0].target, names[1].target if names[1] is not None else None
    weight = p.tensor(key)
    options = {k: v for k, v in given.items() if k not in ("input", "weight", "bias")}
    groups = options.get("groups", 1)
    options["dtype"] = weight.dtype
    with torch.device("meta"):
        if name == "linear":
            module: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, **options)
        else:
            kind = getattr(nn, {"conv": "Conv", "conv_transpose": "ConvTranspose"}[name[:-2]] + name[-2:])
            channels = [weight.shape[0], weight.shape[1] * groups][:: 1 if "transpose" in name else -1]
            module = kind(*channels, tuple(weight.shape[2:]), bias=bias is not None, **options)
    result = _divide_weighted(p, WeightedLayer(key, module, weight=key, bias=bias), given["input"], ())
    if groups > 1:
        own = p.layers[key].member_groups
        if "groups" in node.kwargs:
            p.rewrite(node.args, {**node.kwargs, "groups": own})
        else:
            p.rewrite(tuple(own if i == 6 else a for i, a in enumerate(node.args)), node.kwargs)
    return result


def _divide_weighted(p: ChannelPass, layer: WeightedLayer, x: TensorPair, extra: tuple) -> Any:
    """The first layer keeps its inputs, a head its outputs, all others 1/K of both (2.7)."""
    module, conv, head = layer.module, layer.is_conv, layer.path in p.heads
    (into, out), (inputs, outputs) = SIDES[conv], sides(module)
    layer.groups, axis = (module.groups, 1) if conv else (1, x.full.dim() - 1)
    layer.attributes = {into: inputs, out: outputs} | ({"groups": layer.groups} if conv else {})
    _refuse_other_tensors(p, module, {"weight", "bias"})
    if type(module).forward not in _PLAIN_FORWARDS:
        p.note(f"{type(module).__name__} computes with its whole weight, so composed(x) may not be the sum")
    _divide_inputs(p, layer, x, axis)
    if head and layer.groups > 1:
        p.refuse("the last layer is a grouped convolution, whose members' outputs cannot add up")
    if not head:
        if outputs % p.K:
            raise PartitionError(
                f"{where(p.node)}: {outputs} channels cannot be divided into {p.K} equal parts; "
                f"choose a number of partitions that divides {outputs}{_dividing(p)}."
            )
        layer.attributes[out] = outputs // p.K
    if layer.groups > 1:
        # lcm(G, K) / K groups a member: each lies inside one global group. G and K divide both widths, so lcm does.
        layer.member_groups = layer.attributes["groups"] = math.lcm(layer.groups, p.K) // p.K
    known = _first_call(p, layer)
    if known is layer and not head:
        same = layer.groups > 1 and len(layer.inputs) == outputs
        layer.outputs = layer.inputs if same else p.strands.new(outputs)
        if layer.groups > 1:
            both = (layer.inputs, layer.outputs)
            p.expect(partial(_groups_whole, p.K, layer.groups, layer.member_groups, both))
    owner = layer.weight.rpartition(".")[0]
    if isinstance(p.modules[owner], CONV_OR_LINEAR):  # a functional may take the weight of a layer's module
        p.division.attributes[owner] = layer.attributes
    full = on_meta(module)(x.full, *globally(extra))
    try:
        part = narrow(module, layer.attributes, layer.member_shapes())(x.part, *in_member(extra))
    except MISFITS as error:
        raise p.misfit(x, error) from error
    scale = x.scale
    if conv:
        scale = scaled(x, windows(module, x.full.dim() - 2) if layer.flat is None else None, full, part)
    ownership = p.last_output(full, part, scale) if head else Divided(known.outputs, (axis,))
    return p.wrap(full, part, ownership, scale)


def _divide_inputs(p: ChannelPass, layer: WeightedLayer, x: TensorPair, axis: int) -> None:
    """What a member's layer reads: all of the image, else its own channels, and of a flattened map its crop's part."""
    if x.ownership is PARTIAL:
        p.refuse("it reads the output of a last layer", 'where no layer is a last one, use head="concat"')
    if x.ownership is SHARED:
        if layer.path in p.heads:
            p.refuse("it is the first and the last layer at once, and no channels lie between")
        if layer.groups > 1:
            p.refuse("a grouped convolution reads the image, whose channels are never divided")
        if not layer.is_conv:
            p.refuse(
                "a linear layer reads an image",
                "flatten the images yourself and decompose for vectors, input_size=(features,)",
            )
        return
    divided = _activation(p, x)
    if divided.axes != (axis,) or (layer.is_conv and divided.flat):
        p.refuse("it does not read the divided axis as its channels")
    layer.inputs, layer.flat = divided.ids, divided.flat
    layer.attributes[SIDES[layer.is_conv][0]] = x.part.shape[axis]
    if layer.is_conv and covers(windows(layer.module, x.full.dim() - 2), x):  # a fully connected layer in disguise
        full, part = tuple(x.full.shape[2:]), tuple(x.part.shape[2:])
        layer.flat = MapExtent(tuple(range(len(full))), full, part, x.scale)
        layer.attributes["kernel_size"] = part


# ---- recurrent layers, norms ----------------------------------------------------------------------------------------


@rule(nn.RNNBase)
def recurrent(p: ChannelPass, target: str, args: tuple, kwargs: dict) -> Any:
    """nn.RNN, nn.GRU and nn.LSTM (2.27): U, W and every gate share one division of the hidden state."""
    module = p.modules[target]
    x, H = args[0], module.hidden_size
    if module.proj_size:
        p.refuse("its hidden state is projected", "leave proj_size out")
    if any(value is not None for value in (*args[1:], *kwargs.values())):
        p.refuse("it is given its first states", "leave them out: they begin at zero")
    if not isinstance(x, TensorPair) or x.full.dim() != 3:
        p.refuse("it does not read a padded batch of sequences")
    divided = _activation(p, x)
    if divided.axes != (2,) or divided.flat:
        p.refuse("it does not read the divided axis as its features")
    if H % p.K:
        raise PartitionError(
            f"{where(p.node)}: a hidden state of {H} cannot be divided into {p.K} equal parts; "
            f"choose a number of partitions that divides {H}{_dividing(p)}."
        )
    directions = 1 + module.bidirectional
    attributes = {"input_size": x.part.shape[2], "hidden_size": H // p.K}
    layer = p.layers.get(target)
    if layer is None:
        hidden = [[p.strands.new(H) for _ in range(directions)] for _ in range(module.num_layers)]
        layer = p.layers[target] = RecurrentLayer(target, module, attributes, divided.ids, hidden)
        p.division.attributes[target] = attributes
    p.strands.tie(layer.inputs, divided.ids)
    shapes = {}
    for name, tensor in module.named_parameters():
        rows, *columns = tensor.shape
        into = attributes["input_size"] if name in ("weight_ih_l0", "weight_ih_l0_reverse") else None
        shapes[name] = (rows // p.K, *(into or c // p.K for c in columns))
    full = shape_of(on_meta(module), x.full)
    part = shape_of(narrow(module, attributes, shapes), x.part)
    outputs = Divided(np.concatenate(layer.hidden[-1]), (2,))
    states = Divided(np.stack([ids for depth in layer.hidden for ids in depth]), (0, 2))
    return p.wrap(full[0], part[0], outputs), p.wrap(full[1], part[1], states)


@rule(nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU)
def channelwise(p: ChannelPass, target: str, args: tuple, kwargs: dict) -> Any:
    """One parameter per channel: normalisations and PReLU keep the channels of their input."""
    module, x = p.modules[target], args[0]
    divided = _activation(p, x)
    if len(divided.axes) != 1 or divided.flat:
        p.refuse("its channels are not one axis")
    whole, own = x.full.shape[divided.axes[0]], x.part.shape[divided.axes[0]]
    _refuse_other_tensors(p, module, {"weight", "bias", "running_mean", "running_var"})
    layer = ChannelwiseLayer(target, module, inputs=divided.ids)
    if isinstance(module, nn.GroupNorm):
        if module.num_groups % p.K:
            raise PartitionError(
                f"{where(p.node)}: {module.num_groups} groups do not divide among {p.K} members, whose "
                "statistics would mix; choose a number of groups that is a multiple of the partitions."
            )
        layer.groups, member_groups = module.num_groups, module.num_groups // p.K
        layer.attributes = {"num_channels": own, "num_groups": member_groups}
        p.expect(partial(_groups_whole, p.K, layer.groups, member_groups, (divided.ids,)))
    elif isinstance(module, nn.LayerNorm):
        if tuple(module.normalized_shape) != (whole,):
            p.refuse(f"its parameters of shape {tuple(module.normalized_shape)} are not one per channel")
        layer.attributes = {"normalized_shape": (own,)}
        p.note("normalises over all channels, a member over its own: composed(x) is not exactly the sum")
    elif isinstance(module, nn.PReLU):
        if module.num_parameters != whole:
            p.refuse("one slope serves all channels, and composition has one place for K", "use PReLU(channels)")
        layer.attributes = {"num_parameters": own}
    else:
        layer.attributes = {"num_features": own}
    p.division.attributes[target] = layer.attributes
    known = p.layers.setdefault(target, layer)
    p.strands.tie(known.inputs, layer.inputs)
    shapes = dict.fromkeys(channel_vectors(module), (own,))
    full = shape_of(on_meta(module), x.full)
    part = shape_of(narrow(module, layer.attributes, shapes), x.part)
    return p.wrap(full, part, divided, x.scale, x.moved)


# ---- what they share ------------------------------------------------------------------------------------------------


def _first_call(p: ChannelPass, layer: WeightedLayer) -> WeightedLayer:
    """The layer as its first call met it; both calls must see the same division."""
    known = p.layers.setdefault(layer.path, layer)
    if known is not layer:
        if known.attributes != layer.attributes or (known.inputs is None) != (layer.inputs is None):
            p.refuse("the layer is called twice on inputs that are divided differently")
        if layer.inputs is not None:
            p.strands.tie(known.inputs, layer.inputs)
        known.bias = known.bias or layer.bias  # a functional may be given it in one of its calls
    return known


def _activation(p: ChannelPass, x: TensorPair) -> Divided:
    if not isinstance(x.ownership, Divided) or x.ownership.bare is not None:
        p.refuse("it acts on the image itself or on a head's output, where its parameters have no one owner")
    return x.ownership


def _refuse_other_tensors(p: ChannelPass, module: nn.Module, known: set[str]) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name not in known and (tensor.numel() > 1 or isinstance(tensor, nn.Parameter)):
            p.refuse(f"{type(module).__name__} holds '{name}', whose axes are not known")


def _groups_whole(K: int, groups: int, member_groups: int, sides: tuple[np.ndarray, ...], owner: np.ndarray) -> bool:
    """Every group of every member lies inside one global group, the same on both sides of the layer."""
    for k in range(K):
        found = []
        for ids in sides:
            group = np.nonzero(owner[ids] == k)[0] // (len(ids) // groups)
            group = group.reshape(member_groups, -1)
            if (group != group[:, :1]).any():
                return False
            found.append(group[:, 0])
        if (found[0] != found[-1]).any():
            return False
    return True


def _dividing(p: ChannelPass) -> str:
    """The numbers that divide the widths of all layers but the last."""
    nodes = [node for graph in p.division.graphs.values() for node in graph.nodes]
    paths = {node.target for node in nodes if node.op == "call_module"} - p.heads
    layers = [p.modules[path] for path in paths]
    widths = [sides(layer)[1] for layer in layers if isinstance(layer, CONV_OR_LINEAR)]
    common = math.gcd(*widths, *(layer.hidden_size for layer in layers if isinstance(layer, nn.RNNBase)))
    numbers = [str(n) for n in range(2, common + 1) if common % n == 0]
    return f" (all widths: {', '.join(numbers)})" if numbers else " (no number divides all widths)"


# ---- modules that are operations ------------------------------------------------------------------------------------

_AS_OPERATIONS = {
    nn.Flatten: "flatten",
    nn.Unflatten: "unflatten",
    nn.LocalResponseNorm: "local_response_norm",
    nn.ChannelShuffle: "channel_shuffle",
    nn.PixelShuffle: "pixel_shuffle",
    nn.PixelUnshuffle: "pixel_shuffle",
}


@rule(*_AS_OPERATIONS)
def as_operation(p: ChannelPass, target: str, args: tuple, kwargs: dict) -> Any:
    name = next(name for kind, name in _AS_OPERATIONS.items() if isinstance(p.modules[target], kind))
    return RULES[name](p, name, args, kwargs)


@rule(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._LPPoolNd)
def pool(p: ChannelPass, target: str, args: tuple, kwargs: dict) -> Any:
    module, x = p.modules[target], args[0]
    found = windows(module, x.full.dim() - 2)
    if covers(found, x):  # a last pooling over the whole map follows the member's smaller map
        extent = tuple(x.part.shape[2:])
        p.division.attributes[target] = {"kernel_size": extent, "stride": extent}
        p.adapt(target)
    return spatial(p, type(module).__name__, args, kwargs, found)


@rule(nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd, nn.Upsample)
def resize(p: ChannelPass, target: str, args: tuple, kwargs: dict) -> Any:
    return spatial(p, type(p.modules[target]).__name__, args, kwargs, None)


@rule(
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
)
def pad(p: ChannelPass, target: str, args: tuple, kwargs: dict) -> Any:
    x = args[0]
    full, part = p.run_both(args, kwargs)
    return p.wrap(full, part, join(p, "pad", [x], full.dim())[0], x.scale)


@rule(nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)
def softmax(p: ChannelPass, target: str, args: tuple, kwargs: dict) -> Any:
    module, x = p.modules[target], args[0]
    dim = getattr(module, "dim", None)
    if isinstance(module, nn.Softmax2d) or dim is None:
        dim = 1
    if isinstance(x.ownership, Divided) and dim % x.full.dim() in x.ownership.axes:
        p.refuse(f"{type(module).__name__} mixes the channels of different members")
    return elementwise(p, type(module).__name__, args, kwargs)


@rule(nn.GLU)
def glu(p: ChannelPass, target: str, args: tuple, kwargs: dict) -> Any:
    x = args[0]
    return gated(p, x, p.modules[target].dim % x.full.dim(), *p.run_both(args, kwargs))
