"""Networks whose weights hold zero blocks, run without them: found from the values, swapped in, and taken back."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..cost.walk import layers
from ..crops import Crop
from ..errors import DecompkError, PackError, brief
from ..fx.graph import on_meta
from ..fx.wrapper import Shell
from ..packed.linear import PackedLinear
from ..packed.pack import Packed, pack
from ..packed.twin import HOOKS, dotted
from ..report.table import Column, Table, decimals
from .compose import tensors
from .decompose import Decomposition
from .zero_skipping import (
    BLOCK_LAYERS,
    LEAST,
    SUMMED_HEADS,
    Blocks,
    CroppedLinear,
    count_components,
    find_blocks,
    hold_zeros,
    keeps_zeros,
    nonzero_channels,
    release_zeros,
    stack_bias,
    sum_bias,
)

_SIZES = (224, 32, 64, 299, 28, 8)  # pixels tried where the caller gives no input size
_GAIN = 1.2  # a layer is worth swapping from here on: less is lost in smaller products


@dataclass(frozen=True)
class Decision:
    """What becomes of one layer: `kept` is the share of its multiply-accumulates that is left; dense layers keep all.

    form: "members" (runs as a part of K packed sub-networks), "blocks" (a zero-skipping layer), "masked" (computed
    with its zeros, which get no gradient), "dense" (as it was). The reason says where training does not keep zeros.
    """

    path: str
    form: str
    kept: float
    reason: str

    @property
    def gain(self) -> float:
        """Multiply-accumulates before over after: the speed-up predicted where arithmetic or weights bind."""
        return 1 / self.kept if self.kept else float("inf")

    def __str__(self) -> str:
        return f"{self.path}: {self.form}, {self.gain:.2f}× ({self.reason})"


def block_diagonal(net: nn.Module, input_size: Sequence[int] | None = None) -> ZeroSkipping:
    """`net` without its zero blocks: the same outputs, and in training the zeros between channels stay zero.

    A network that is uniformly block-diagonal throughout, as a composed one is, becomes K packed members that share the
    full input and whose heads are added. It holds *copies* of the parameters, each with a leading dimension K, and of a
    first fully connected layer only the columns that some crop of the map fills. Otherwise every Conv2d and Linear with
    exact zero blocks, perhaps after a permutation of its channels, becomes a zero-skipping layer and all else stays;
    the result then *shares* every parameter and buffer with `net`. A dense network comes back as it is.
    Zeros between channels (of a convolution: whole kernels) that are not skipped are kept by a mask on the weight.
    `fast.decisions` lists what was done with each layer, and why, and where zeros do not stay.

    `input_size`: (C, *spatial) of one sample, to follow shapes with; without it common sizes are tried. Nothing
    depends on it but whether the network is recognised as a whole. `densify` is the way back. Raises DecompkError
    for what is not a module.
    """
    if not isinstance(net, nn.Module):
        raise DecompkError(f"block_diagonal takes an nn.Module, not {type(net).__name__}.")
    if isinstance(net, ZeroSkipping):
        return net
    found, why = _as_members(net, input_size)
    return found or layer_by_layer(net, why)


def densify(fast: nn.Module) -> nn.Module:
    """The dense network of a zero-skipping one: the classes, names and values of `fast`, its zero blocks written out.

    From packed members the tensors are new; otherwise they are those of `fast`. Raises DecompkError for anything that
    `block_diagonal` did not return.
    """
    if not isinstance(fast, ZeroSkipping):
        raise DecompkError(f"densify takes what block_diagonal returned, not {type(fast).__name__}.")
    return fast._dense()


class ZeroSkipping(nn.Module):
    """What `block_diagonal` returns: `decisions` holds a Decision for each layer."""

    decisions: tuple[Decision, ...]

    def _dense(self) -> nn.Module:
        raise NotImplementedError

    def skipped(self, input_size: Sequence[int]) -> Table:
        """A table of the layers: multiply-accumulates of one sample as a dense network, done, and skipped."""
        kept = {decision.path: decision for decision in self.decisions}
        rows: list[list[Any]] = []
        for layer in layers(densify(self), input_size):
            decision = kept.get(layer.name)
            if layer.macs:
                done = round(layer.macs * (decision.kept if decision else 1))
                rows.append([layer.name, layer.macs, done, layer.macs - done, decision.form if decision else "dense"])
        sums = [sum(row[i] for row in rows) for i in (1, 2, 3)]
        rows.append(["total", *sums, f"{sums[0] / max(1, sums[1]):.2f}× fewer"])
        whole = decimals(0)
        columns = [Column("layer"), Column("dense MACs", whole), Column("done", whole), Column("skipped", whole)]
        return Table("zero blocks", [*columns, Column("how")], rows)


# ---- K members ------------------------------------------------------------------------------------------------------


class Members(ZeroSkipping, Packed):
    """A uniformly block-diagonal network as K packed members on one shared input: x (N, …) → what the network returns.

    Parameters and buffers carry the network's names and a leading dimension K; the biases of heads, which add up, are
    one for all.
    """

    _WHY_NOT_APART = "the biases of its heads are one for all members"

    def _by_member(self, leaf: Tensor) -> Tensor:
        return leaf.sum(0)

    def ensemble(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The network's output itself: its members are joined already."""
        return self(x, *args, **kwargs)

    def unpack(self) -> list[nn.Module]:
        """The K members as ordinary modules; the biases of heads are in the first."""
        inner = copy.deepcopy(self._inner)
        release_zeros(inner)
        for module in inner.modules():
            if isinstance(module, CroppedLinear):
                module._twin_widen()
            elif type(module) in SUMMED_HEADS.values():
                stack_bias(module)
        return Packed(inner, self._K, None, self._input_dims).unpack()

    def _dense(self) -> nn.Module:
        return self._decomposition.compose(self.unpack())


def _as_members(net: nn.Module, input_size: Sequence[int] | None) -> tuple[Members | None, str]:
    """`net` as packed members, or why it is not block-diagonal throughout."""
    counts = {
        path: count_components(module.weight)
        for path, module in net.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and not module.weight.is_meta
    }
    if max(counts.values(), default=1) < 2:
        return None, "no layer falls into blocks"
    reason = ""
    for K in _candidates(counts):
        found: Any = _decomposed(net, K, input_size)
        why = found if isinstance(found, str) else _why_not_members(net, found)
        if why is None:
            try:
                return _members(net, found, counts), ""
            except PackError as error:
                why = brief(error)
        reason = reason or f"as {K} members: {why}"
    return None, reason or "no number of members fits its layers"


def _candidates(counts: dict[str, int]) -> list[int]:
    """Numbers of members worth trying: what most layers fall into, then its divisors."""
    most = Counter(count for count in counts.values() if count > 1).most_common(1)[0][0]
    return [K for K in range(most, 1, -1) if most % K == 0][:6]


def _decomposed(net: nn.Module, K: int, input_size: Sequence[int] | None) -> Decomposition | str:
    """The decomposition of `net` into K that all read the whole input; or what stands against it."""
    first: Any = next(m for m in net.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)))
    axes = {nn.Conv1d: 1, nn.Conv3d: 3}.get(type(first), 2)
    channels = first.in_channels if hasattr(first, "in_channels") else first.in_features
    guesses = [(channels, *[pixels] * axes) for pixels in _SIZES]
    skeleton, why = on_meta(net), ""
    for size in guesses if input_size is None else [tuple(input_size)]:
        try:
            return Decomposition(skeleton, size, (Crop(*(0,) * (len(size) - 1), *size[1:]),) * K, "sum")
        except DecompkError as error:
            why = why or brief(error)
    return why


def _why_not_members(net: nn.Module, d: Decomposition) -> str | None:
    """What in `net` is not the sum of the members of `d`; None if it is exactly that."""
    if d.notes or d.adapted:
        return (d.notes or d.adapted)[0].rstrip(".")
    division = d.division
    known = tensors(net)
    for name, _ in net.named_parameters():
        if name not in division.places and name not in division.summed:
            return f"'{name}' is one for all members"
    for name, places in division.places.items():
        outside = torch.ones(known[name].shape, dtype=torch.bool, device=known[name].device)
        for place in places:
            outside[tuple(torch.from_numpy(i) for i in place)] = False
        if bool((known[name].detach()[outside] != 0).any()):
            return f"'{name}' is not zero between members"
    return None


def _members(net: nn.Module, d: Decomposition, counts: dict[str, int]) -> Members:
    packed = pack(d.extract(net))
    fast = Members(packed._inner, d.K, None, packed._input_dims, rehearse=False)
    fast.decomposition = d
    for name in d.division.summed:
        head = fast._inner.get_submodule(name.rpartition(".")[0])
        if type(head) not in SUMMED_HEADS:
            raise PackError(f"'{name}' belongs to a {type(head).__name__}, whose bias cannot be one for all members.")
        sum_bias(head)
    decisions = []
    for path in counts:
        dense: Any = net.get_submodule(path)
        twin, whole = fast._inner.get_submodule(path), dense.weight.numel()
        share = twin.weight.numel() / whole
        what = f"a block of each of {d.K} members" if share < 1 else "every member needs all of it"
        if type(twin) is PackedLinear and CroppedLinear._twin_narrow(twin):
            share = twin.weight.numel() / whole
            what += f", {twin.weight.shape[2]} of {twin.in_features} columns"
        if hold_zeros(twin, nonzero_channels(twin.weight, 3)):
            what += ", its zeros kept by a mask"
        decisions.append(Decision(path, "members", share, what))
    fast.decisions = _with_losses(fast._inner, decisions, 3)
    return fast


# ---- layer by layer -------------------------------------------------------------------------------------------------


class Layerwise(ZeroSkipping, Shell):
    """A network some of whose layers skip blocks of zeros; it shares every parameter and buffer with the original."""

    why_not_members: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner(*args, **kwargs)

    def _dense(self) -> nn.Module:
        dense: Any = _sharing(self._inner)
        release_zeros(dense)
        for module in dense.modules():
            if type(module) in BLOCK_LAYERS.values():
                module.release()
        return dense


def layer_by_layer(net: nn.Module, why: str = "not asked for", masks: Mapping[str, Tensor] | None = None) -> Layerwise:
    """`net` with a zero-skipping layer for each that has blocks of zeros; `why` it is not run as members.

    masks: name of a weight → where it may hold anything, for weights of which that is known; elsewhere values tell.
    With masks it is for the caller to keep the zeros that are not skipped.
    """
    fast = Layerwise(_sharing(net))
    decisions = []
    for path, module in fast._inner.named_modules():
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            continue
        weight = (masks or {}).get(f"{path}.weight", module.weight.detach())
        nonzero = nonzero_channels(weight) if masks is None else None
        blocks, reason = _skippable(module, weight)
        form = "blocks" if blocks else "dense"
        if blocks:
            BLOCK_LAYERS[type(module)].adopt(module, blocks, nonzero)
        elif nonzero is not None and hold_zeros(module, nonzero):
            form, reason = "masked", f"{reason}; its zeros are kept by a mask"
        decisions.append(Decision(path, form, blocks.kept if blocks else 1.0, reason))
    fast.decisions = tuple(decisions) if masks is not None else _with_losses(fast._inner, decisions, 2)
    fast.why_not_members = why
    return fast


def _skippable(module: nn.Module, weight: Tensor) -> tuple[Blocks | None, str]:
    """The blocks to skip around in a layer, or None, and the reason; `weight` is zero where nothing may be."""
    if type(module) not in BLOCK_LAYERS:
        return None, f"no zero-skipping form of {type(module).__name__}"
    if "forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS):
        return None, "it has hooks or a forward of its own"
    if getattr(module, "groups", 1) > 1:
        return None, "it is grouped already"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return None, f"padding_mode={module.padding_mode!r}"
    if bool((weight != 0).all()):
        return None, "it holds no zeros"
    if not bool(weight.any()):
        return None, "it holds nothing but zeros"
    blocks = find_blocks(weight)
    if blocks is None:
        return None, f"its zeros fill no block of {LEAST} channels or more"
    if 1 / blocks.kept < _GAIN:
        return None, f"its blocks of zeros are {1 - blocks.kept:.0%} of it, too few to gain from"
    return blocks, str(blocks)


def _sharing(net: nn.Module) -> nn.Module:
    """A copy of `net`'s modules around the same parameters and buffers."""
    return copy.deepcopy(net, {id(t): t for t in (*net.parameters(), *net.buffers())})


# ---- zeros that nothing skips ---------------------------------------------------------------------------------------


def _with_losses(net: nn.Module, decisions: list[Decision], dims: int) -> tuple[Decision, ...]:
    """The decisions, with a word, or one more, for every weight of the swapped `net` whose zeros training fills.

    `dims`: how many dimensions of a weight are no kernel: output and input, and before them the member of stacks.
    """
    modules = dict(net.named_modules())
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        for name, p in module._parameters.items():
            if p is not None and not (keeps_zeros(module) and name == "weight"):
                owners.setdefault(id(p), []).append(dotted(path, name))
    found: dict[str, str] = {}
    for path, module in modules.items():
        for name, p in module._parameters.items():
            if p is not None and p.dim() >= dims and not p.is_meta and id(p) in owners and bool((p == 0).any()):
                if isinstance(module, nn.Embedding) and _padded_alone(module, p, dims):
                    continue
                where = f"'{owners[id(p)][0]}' is the same tensor, and " if keeps_zeros(module) else ""
                found.setdefault(path, f"{where}training does not keep the zeros of its {name}")
    known = {decision.path for decision in decisions}
    more = [Decision(path, "dense", 1.0, word) for path, word in found.items() if path not in known]
    said = [replace(d, reason=f"{d.reason}; {found[d.path]}") if d.path in found else d for d in decisions]
    return (*said, *more)


def _padded_alone(table: nn.Embedding, weight: Tensor, dims: int) -> bool:
    """Whether a table's only zeros are its padding, which gets no gradient."""
    if table.padding_idx is None:
        return False
    rest = torch.arange(weight.shape[dims - 2], device=weight.device) != table.padding_idx
    return bool((weight.detach().movedim(dims - 2, 0)[rest] != 0).all())
