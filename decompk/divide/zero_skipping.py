"""Layers that skip what is zero: blocks of a dense weight, a head's bias held once, columns outside a crop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..kernels.block_choice import Mask, is_diagonal, mask_text
from ..packed import conv
from ..packed.conv import PackedConv2d
from ..packed.linear import PackedLinear

LEAST = 8  # channels of a block: what tensor cores and vectors take whole
_CHANCE = 0.01  # of a dense weight's numbers may be zero: of random bfloat16 up to 0.004 are
_OVERHEAD = 8  # channels' worth of work that a block costs beside its own, in the choice of block sizes


@dataclass(frozen=True)
class Blocks:
    """Which blocks of a weight (O, C, …) hold anything: mask[r][s] for the r-th share of O and the s-th of C.

    `outputs` and `inputs`: the order of channels in which it holds, None for their own. `uneven`: the true outputs and
    inputs of each block on the diagonal, where they differ; the orders then fill every block up to the largest, with
    channels that count as zero, and name inputs again that several blocks read. `dense`: (O, C).
    """

    mask: Mask
    dense: tuple[int, int]
    outputs: tuple[int, ...] | None = None
    inputs: tuple[int, ...] | None = None
    uneven: tuple[tuple[int, int], ...] | None = None

    @property
    def sides(self) -> tuple[int, int]:
        """Outputs and inputs of all block rows and columns together, those that fill up included."""
        return tuple(
            n if order is None else len(order) for order, n in zip((self.outputs, self.inputs), self.dense, strict=True)
        )

    @property
    def kept(self) -> float:
        """The share of the dense weight's work that is left."""
        share = sum(map(sum, self.mask)) / (len(self.mask) * len(self.mask[0]))
        return share * math.prod(self.sides) / math.prod(self.dense)

    @property
    def uniform(self) -> int:
        """K where the mask is the diagonal of K × K blocks, else 0."""
        return len(self.mask) if is_diagonal(self.mask) else 0

    def __str__(self) -> str:
        O, C = len(self.mask), len(self.mask[0])
        if self.uneven:
            rows, columns = (n // O for n in self.sides)
            return f"{O} blocks of up to {rows}×{columns} channels, filled up and put on the diagonal"
        what = f"{O} blocks on the diagonal" if self.uniform else f"{sum(map(sum, self.mask))} of {O}×{C} blocks hold"
        return what + (", after a permutation of channels" if self.outputs or self.inputs else "")


def find_blocks(weight: Tensor) -> Blocks | None:
    """The blocks worth skipping around in weight (O, C, …), from its exact zeros; None where there are none.

    Equal blocks of at least 8 channels, so large that they cost the least together; if no cut of the channels as they
    stand gives any, one after the permutation that brings channels together that share a weight; and where outputs fall
    into sets that read the same inputs, sets of any size, filled up to the largest, if that is cheaper by a fifth.
    """
    nonzero = nonzero_channels(weight)
    if bool(nonzero.all()):
        return None
    straight = _best_mask(nonzero)
    labels = components(nonzero)
    parts = [torch.sort(side, stable=True).indices for side in labels]
    sorted_already = all(bool((order == torch.arange(len(order))).all()) for order in parts)
    moved = None if sorted_already else _best_mask(nonzero[parts[0]][:, parts[1]])
    dense = tuple(nonzero.shape)
    found = straight and Blocks(straight, dense)
    if moved and (straight is None or _price(moved, nonzero) < _price(straight, nonzero) / 1.5):
        found = Blocks(moved, dense, tuple(parts[0].tolist()), tuple(parts[1].tolist()))
    uneven = _uneven(nonzero)
    best = _cost(found) if found else 1.0
    return uneven if uneven and _cost(uneven) < best / 1.2 else found


def _uneven(nonzero: Tensor) -> Blocks | None:
    """A block on the diagonal for each set of outputs that read the same inputs, as large as the largest of them."""
    _, sets = np.unique(np.packbits(nonzero.numpy(), axis=1), axis=0, return_inverse=True)
    K = int(sets.max()) + 1
    if not 1 < K <= min(64, len(nonzero) // LEAST):
        return None
    rows = [np.nonzero(sets.reshape(-1) == k)[0].tolist() for k in range(K)]
    rows.sort()
    columns = [nonzero[of[0]].nonzero().flatten().tolist() for of in rows]
    R, C = max(map(len, rows)), max(map(len, columns))
    if min(R, C) < LEAST or not all(columns):
        return None
    outputs, inputs = (
        sum((of + [0] * (most - len(of)) for of in side), []) for side, most in ((rows, R), (columns, C))
    )
    mask = tuple(tuple(r == s for s in range(K)) for r in range(K))
    sizes = tuple((len(a), len(b)) for a, b in zip(rows, columns, strict=True))
    return Blocks(mask, tuple(nonzero.shape), tuple(outputs), tuple(inputs), sizes)


def components(nonzero: Tensor) -> tuple[Tensor, Tensor]:
    """The connected component of every output (O) and input (C), numbered as they come; filled (O, C) are the edges."""
    rows, columns = (torch.full((n,), -1) for n in nonzero.shape)
    found = 0
    for o in range(len(rows)):
        if rows[o] >= 0:
            continue
        front = torch.zeros(len(rows), dtype=torch.bool)
        front[o] = True
        while bool(front.any()):
            rows[front] = found
            met = nonzero[front].any(0) & (columns < 0)
            columns[met] = found
            front = nonzero[:, met].any(1) & (rows < 0)
        found += 1
    columns[columns < 0] = found  # inputs that nothing reads
    return rows, columns


def count_components(weight: Tensor) -> int:
    """Into how many parts without a weight between them the outputs of weight (O, C, …) fall."""
    return int(components(nonzero_channels(weight))[0].max()) + 1


def nonzero_channels(weight: Tensor, dims: int = 2) -> Tensor:
    """(O, C) on the CPU: where weight (O, C, …) holds anything but zeros; of a stack (K, O, C, …) with three `dims`."""
    return (weight.detach() != 0).reshape(*weight.shape[:dims], -1).any(dims).cpu()


def _best_mask(nonzero: Tensor) -> Mask | None:
    """The cheapest cut into equal blocks that leaves any of them out."""
    choices = []
    for R in _shares(nonzero.shape[0]):
        for S in _shares(nonzero.shape[1]):
            blocks = nonzero.view(R, nonzero.shape[0] // R, S, nonzero.shape[1] // S).any(3).any(1)
            if not bool(blocks.all()):
                mask = tuple(tuple(row) for row in blocks.tolist())
                choices.append((_price(mask, nonzero), R * S, mask))
    return min(choices)[2] if choices else None


def _shares(channels: int) -> Iterator[int]:
    return (n for n in range(1, min(channels // LEAST, 64) + 1) if channels % n == 0)


def _price(mask: Mask, nonzero: Tensor) -> float:
    return _cost(Blocks(mask, tuple(nonzero.shape)))


def _cost(blocks: Blocks) -> float:
    """Work relative to the dense layer's, small blocks dearer."""
    rows, columns = blocks.sides
    return blocks.kept * (1 + _OVERHEAD / min(rows // len(blocks.mask), columns // len(blocks.mask[0])))


class _BlockLayer:
    """Mixin of a dense layer that skips `blocks`; its parameters are the layer's own, shapes and all."""

    blocks: Blocks
    _mask: str  # as the operator takes it without reading it again

    @classmethod
    def adopt(cls, leaf: nn.Module, blocks: Blocks, nonzero: Tensor | None = None) -> None:
        """Turn a leaf into its zero-skipping form, in place; where `nonzero` (O, C) is False, its zeros stay."""
        leaf.blocks, leaf._mask = blocks, mask_text(blocks.mask)
        inputs, outputs, back, real = _orders(blocks)
        real = _inside(blocks, nonzero) if real is None and nonzero is not None else real
        for name, value in (("_inputs", inputs), ("_outputs", outputs), ("_back", back), ("_real", real)):
            leaf.register_buffer(name, value if value is None else value.to(leaf.weight.device), persistent=False)
        leaf.__class__ = cls

    def release(self) -> None:
        """Turn it into an ordinary leaf again, in place."""
        for name in ("_inputs", "_outputs", "_back", "_real"):
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        del self.blocks, self._mask
        self.__class__ = type(self).__mro__[2]

    def _permuted(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in the order of the blocks."""
        weight, bias = self.weight, self.bias
        if self._outputs is not None:
            weight, bias = weight[self._outputs], None if bias is None else bias[self._outputs]
        weight = weight if self._inputs is None else weight[:, self._inputs]
        if self._real is not None:
            weight = weight * self._real.view(*self._real.shape, *(1,) * (weight.dim() - 2))
        return weight, bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.blocks}"


def _orders(blocks: Blocks) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Which input and output comes to each place, where each output then is, and what of uneven blocks is its own."""
    inputs, outputs = (None if order is None else torch.tensor(order) for order in (blocks.inputs, blocks.outputs))
    if blocks.uneven is None:
        return inputs, outputs, None if outputs is None else torch.argsort(outputs), None
    K = len(blocks.uneven)
    own = torch.tensor(blocks.uneven).T[..., None]  # outputs and inputs of each block
    rows, columns = ((torch.arange(n // K) < true).flatten() for n, true in zip(blocks.sides, own, strict=True))
    back = torch.empty(blocks.dense[0], dtype=torch.long)
    back[outputs[rows]] = rows.nonzero().flatten()
    return inputs, outputs, back, rows[:, None] & columns


def _inside(blocks: Blocks, nonzero: Tensor) -> Tensor | None:
    """holds (O, C) in the order of the blocks, if blocks that are kept have zeros of their own."""
    nonzero = nonzero if blocks.outputs is None else nonzero[list(blocks.outputs)]
    nonzero = nonzero if blocks.inputs is None else nonzero[:, list(blocks.inputs)]
    kept = torch.tensor(blocks.mask)
    for dim in (0, 1):
        kept = kept.repeat_interleave(nonzero.shape[dim] // kept.shape[dim], dim)
    return None if bool(nonzero[kept].all()) else nonzero


class BlockConv2d(_BlockLayer, nn.Conv2d):
    """nn.Conv2d on `ops.block_conv2d`: x (N, C, H, W) → (N, O, H', W')."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._permuted()
        x = x if self._inputs is None else x.index_select(-3, self._inputs)
        y = ops.block_conv2d(x, weight, self._mask, bias, self.stride, self.padding, self.dilation)
        return y if self._back is None else y.index_select(-3, self._back)


class BlockLinear(_BlockLayer, nn.Linear):
    """nn.Linear on `ops.block_linear`: x (…, C) → (…, O)."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._permuted()
        x = x if self._inputs is None else x.index_select(-1, self._inputs)
        y = ops.block_linear(x, weight, self._mask, bias)
        return y if self._back is None else y.index_select(-1, self._back)


BLOCK_LAYERS: dict[type, Any] = {nn.Conv2d: BlockConv2d, nn.Linear: BlockLinear}


# ---- zeros that are computed with, and stay -------------------------------------------------------------------------


class _Held:
    """Mixin of a layer whose zeros between channels get no gradient: it reads its weight times a mask.

    Without autograd `weight` is the parameter itself; with it, what is written in place into `weight` is lost.
    """

    @property
    def weight(self) -> Tensor:
        weight = self._parameters["weight"]
        return weight * self._nonzero if torch.is_grad_enabled() else weight

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        with torch.no_grad():
            self._parameters["weight"].mul_(self._nonzero)

    def release_zeros(self) -> None:
        """The way back, in place."""
        del self._buffers["_nonzero"]
        self._non_persistent_buffers_set.discard("_nonzero")
        self.__class__ = type(self).__mro__[2]


_HELD: dict[type[nn.Module], type[_Held]] = {}  # a layer → the same with zeros that stay


def hold_zeros(layer: nn.Module, nonzero: Tensor) -> bool:
    """Keep a layer's weight zero where `nonzero`, over its leading dimensions, is False; whether its class allows that.

    Zeros by chance, as in a few of a linear layer's weights, and weights that hold nothing else are left alone.
    """
    weight = layer._parameters.get("weight")
    parts = nonzero if nonzero.dim() == 3 else [nonzero]
    if type(layer) not in _HELD or weight is None or not bool(nonzero.any()) or not any(map(_is_structured, parts)):
        return False
    mask = nonzero.view(*nonzero.shape, *(1,) * (weight.dim() - nonzero.dim())).to(weight.device)
    layer.register_buffer("_nonzero", mask, persistent=False)
    layer.__class__ = _HELD[type(layer)]
    return True


def _is_structured(nonzero: Tensor) -> bool:
    """Whether the zeros of (O, C) are there on purpose: some in a hundred, or such that divide or fill blocks."""
    zeros = int((~nonzero).sum())
    return zeros > _CHANCE * nonzero.numel() or (
        zeros > 0 and (int(components(nonzero)[0].max()) > 0 or _best_mask(nonzero) is not None)
    )


def release_zeros(net: nn.Module) -> None:
    """Turn all layers of `net` that hold their zeros into what they were, in place."""
    for module in net.modules():
        if isinstance(module, _Held):
            module.release_zeros()


def keeps_zeros(layer: nn.Module) -> bool:
    return isinstance(layer, _Held | _BlockLayer)


# ---- twins of a block-diagonal network's members ---------------------------------------------------------------------


def _stacked(self: nn.Module) -> Tensor:
    """(K, O): all of the bias in member 0, since members add up."""
    bias = self._parameters["bias"]
    return torch.cat([bias.unsqueeze(0), bias.new_zeros(self._twin_K - 1, *bias.shape)])


class HeadLinear(PackedLinear):
    """A head of K members that are added up: its bias (O) is one for all."""

    bias = property(_stacked)


class HeadConv2d(PackedConv2d):
    """A convolution as a head of K members that are added up: its bias (O) is one for all."""

    bias = property(_stacked)


SUMMED_HEADS = {PackedLinear: HeadLinear, PackedConv2d: HeadConv2d}


def sum_bias(head: nn.Module) -> None:
    """Turn a packed head, a key of SUMMED_HEADS, into one whose bias is the sum of its members', in place."""
    total = head.bias.detach().sum(0)
    head._parameters["bias"] = nn.Parameter(total, head.bias.requires_grad)
    head.__class__ = SUMMED_HEADS[type(head)]


def stack_bias(head: nn.Module) -> None:
    """The way back: the bias as (K, O), zero but in member 0, in place."""
    stacked = nn.Parameter(head.bias.detach(), head._parameters["bias"].requires_grad)
    head._parameters["bias"] = stacked
    head.__class__ = {once: plain for plain, once in SUMMED_HEADS.items()}[type(head)]


class CroppedLinear(PackedLinear):
    """A first fully connected layer of K members of which each reads its crop of the map: x (K·N, I) → (K·N, O).

    weight (K, O, n) holds the n columns of each member that are not zero, `_twin_columns` (K, n) says which.
    """

    @classmethod
    def _twin_narrow(cls, leaf: PackedLinear) -> bool:
        """Turn a packed layer into this where every member leaves equally many columns zero, in place."""
        used = (leaf.weight.detach() != 0).any(1)
        counts = used.sum(1)
        n = int(counts[0])
        if type(leaf) is not PackedLinear or not 0 < n < used.shape[1] or bool((counts != n).any()):
            return False
        columns = used.nonzero()[:, 1].view(leaf._twin_K, n)
        weight = leaf.weight.detach().gather(2, columns.unsqueeze(1).expand(-1, leaf.out_features, -1))
        leaf._parameters["weight"] = nn.Parameter(weight, leaf.weight.requires_grad)
        leaf.register_buffer("_twin_columns", columns, persistent=False)
        leaf.__class__ = cls
        return True

    def _twin_widen(self) -> None:
        """The way back, in place."""
        wide = self.weight.new_zeros(self._twin_K, self.out_features, self.in_features)
        wide.scatter_(2, self._twin_columns.unsqueeze(1).expand_as(self.weight), self.weight.detach())
        self._parameters["weight"] = nn.Parameter(wide, self.weight.requires_grad)
        del self._buffers["_twin_columns"]
        self._non_persistent_buffers_set.discard("_twin_columns")
        self.__class__ = PackedLinear

    def forward(self, x: Tensor) -> Tensor:
        self._twin_check(x)
        if x.dim() != 2:
            return self._twin_each(
                lambda x, w, b, c: F.linear(x[..., c], w, b), x, self.weight, self.bias, self._twin_columns
            )
        x = x.view(self._twin_K, -1, self.in_features)
        x = x.gather(2, self._twin_columns.unsqueeze(1).expand(-1, x.shape[1], -1))
        y = (
            torch.bmm(x, self.weight.mT)
            if self.bias is None
            else torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.mT)
        )
        return y.flatten(0, 1)


for _kind in (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(PackedLinear, HeadLinear, CroppedLinear, conv.PackedConv1d, PackedConv2d, HeadConv2d, conv.PackedConv3d),
    *(conv.PackedConvTranspose1d, conv.PackedConvTranspose2d, conv.PackedConvTranspose3d),
):  # by name in this module, so that they can be pickled
    _HELD[_kind] = globals()[f"Held{_kind.__name__}"] = type(
        f"Held{_kind.__name__}", (_Held, _kind), {"__module__": __name__, "__doc__": _Held.__doc__}
    )
