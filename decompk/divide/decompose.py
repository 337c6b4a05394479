"""Global network → K narrow sub-networks (2.7), each on its own crop of the input."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..crops import Crop, Part, Partitions, by, make_crops
from ..errors import DecompkError, PackError, PartitionError
from ..fx.graph import on_meta
from ..fx.hooks import refuse_hooks, refuse_parameter_hooks
from ..fx.wrapper import Buffer, Rewritten, edited
from ..packed.pack import Packed, pack
from ..report.decomposition import Report, report
from ..threads import one_at_a_time
from .channels import divide_channels
from .compose import apart_skeleton, assemble, check_head, check_members, compose, extract, put, tensors
from .division import Division
from .sizes import Found, check_shape, find_size, refuse_size, same_members


def decompose(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    partitions: Partitions = 4,
    crop_size: int | Sequence[int] | None = None,
    margin: int = 0,
    head: str = "sum",
) -> Decomposition:
    """Cut `model` along its width into K sub-networks, and its input into K crops (paper 2.1).

    model: any torch.fx-traceable network; it is not changed. input_size of one sample: (C, *spatial) of images, signals
    and volumes, whose pixels are divided; (D,) of vectors and (T, D) of sequences that a linear or recurrent layer
    reads, whose features are; None for the size that the model declares or alone accepts, otherwise that of the first
    batch. partitions: a number (4 → 2×2, 8 → 2×4: the squarest grid, of three axes the most cubic), the parts per axis,
    a list of equal Crops, or of index sets for features, which must be divided exactly. crop_size: pixels per axis;
    None cuts without overlap, H // n each. margin: border to cut off first. head: "concat" is for auto-encoders: output
    k is member k's reconstruction of input k, so neither may overlap; otherwise every member has all outputs of the
    last layer.

    Every layer keeps depth, kernel and stride and gets 1/K of the channels; the first keeps all its inputs, the last
    all its outputs. Raises PartitionError (widths that do not divide, crops that do not fit, a size that must be given)
    and UnsupportedOperation (operations that mix the channels of different members, hooks), each naming the place.
    """
    if not isinstance(model, nn.Module):
        raise DecompkError(f"decompose needs an nn.Module, not {type(model).__name__}.")
    check_head(head, split_outputs=False)
    refuse_hooks(model)
    refuse_parameter_hooks(model)
    head = "concat" if head == "concat" else "sum"
    cut = functools.partial(make_crops, partitions=partitions, crop_size=crop_size, margin=margin)
    if input_size is None:
        found = find_size(model, cut, head)
        return Decomposition(model, found.size, found.crops, head, found, cut if found.waits else None)
    if isinstance(input_size, int):
        raise PartitionError(
            f"input_size {input_size} must be (channels, *spatial), such as (3, {input_size}, {input_size}), or "
            f"({input_size},) for vectors."
        )
    try:
        size = tuple(operator.index(n) for n in input_size)
    except TypeError:
        size = ()
    if not 1 <= len(size) <= 4 or min(size) < 1:
        given = "as a tensor" if isinstance(input_size, torch.Tensor) else repr(input_size)
        raise PartitionError(
            f"input_size {given} must be (channels, *spatial) with one to three spatial axes, or (features,)."
        )
    try:
        return Decomposition(model, size, cut(size[1:] or size), head)
    except DecompkError:
        refuse_size(model, size)  # the truer cause, where it is one
        raise


class Decomposition:
    """One network cut into K: its crops, its sub-networks, and the way back. Made by `decompose`.

    model: the global network. K: how many. input_size of one sample, and crops, a tuple of K Crops; while they wait for
    the first batch, which `split`, `lay_crops` or the packed module may bring, the size is None and crops raise.
    notes: where the composed network is not exactly the sum of its members, one sentence a place; empty when
    composed(x) = Σ_k member_k(x) on any full image the members can run on. adapted: layers that follow the crop's
    smaller map (first FC layers, poolings over all of it); with any, members run on their crops only.
    """

    division: Division
    notes: list[str]
    adapted: list[str]
    input_size: tuple[int, ...] | Any  # None while the crops wait
    _crops: tuple[Part, ...] | None

    def __init__(
        self,
        model: nn.Module,
        input_size: tuple[int, ...],
        crops: tuple[Part, ...],
        head: str,
        found: Found | None = None,
        cut: Callable[[tuple[int, ...]], tuple[Part, ...]] | None = None,
    ):
        """found: how a size that nobody gave was found; cut: makes the crops of the first batch, where they wait."""
        self.model = model
        self.K = len(crops)
        self._head, self._cut = head, cut
        self._source = found.source if found else ""
        self._sample_shape = found.shape if found else input_size
        self._divide(input_size, crops, found.division if found else divide_channels(model, input_size, crops, head))
        if cut is not None:
            self.input_size = self._crops = None
        self._split_outputs = head == "concat"
        self._assembles = any(self.division.assemblies.values())
        if not self.division.places:
            raise PartitionError(f"{type(model).__name__} has no layer whose channels could be divided.")

    def _divide(self, input_size: tuple[int, ...], crops: tuple[Part, ...], division: Division) -> None:
        self.division = division
        self.notes, self.adapted = division.notes, division.adapted
        self.input_size, self._crops = input_size, crops

    @property
    def crops(self) -> tuple[Part, ...]:
        """The K parts of the input. Raises PartitionError while they wait for the first batch."""
        return self._laid()

    def _laid(self) -> tuple[Part, ...]:
        if self._crops is None:
            raise PartitionError(
                f"the crops of {type(self.model).__name__} wait for the size of its first batch: run one, or give "
                "decompose or grouped_subnets input_size=."
            )
        return self._crops

    def lay_crops(self, size: tuple[int, ...]) -> tuple[Part, ...]:
        """The crops; where they wait for the first batch, they are laid for its samples of `size` (C, *spatial)."""
        if self._crops is None:
            name, size = type(self.model).__name__, tuple(size)
            check_shape(self._sample_shape, size, name)
            assert self._cut is not None
            crops = self._cut(size[1:])
            division = divide_channels(self.model, size, crops, self._head, self.division.graphs)
            if not same_members(self.division, division):
                raise PartitionError(
                    f"for samples of {by(size)} the members of {name} would be others than they are: give decompose or "
                    f"grouped_subnets input_size={size}."
                )
            self._divide(size, crops, division)
        return self.crops

    def lift_crops(self) -> None:
        """Let the crops wait again for a first batch, if they did: the one that laid them did not run."""
        if self._cut is not None:
            self.input_size = self._crops = None

    @property
    def origin(self) -> str:
        """Where a size that nobody gave was taken from, in brackets."""
        return f" ({self._source})" if self._source else ""

    def layout(self) -> str:
        """What the members read, in one line: the size of a sample, where it was taken from, and its division."""
        if self._crops is None:
            return f"input of the first batch's size, then cut into {self.K} parts"
        axes = range(len(self.crops[0].size))
        grid = [len({crop.start[axis] for crop in self.crops}) for axis in axes]
        what = (
            f"{by(grid)} crops" if isinstance(self.crops[0], Crop) and math.prod(grid) == self.K else f"{self.K} parts"
        )
        return f"input of {by(self.input_size)}{self.origin}, cut into {what} of {by(self.crops[0].size)}"

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(N, C, *spatial) → K views (N, C, *crop), (N, …, D) → K times (N, …, D / K); only index sets copy."""
        crops = self.lay_crops(tuple(x.shape[1:]))
        if tuple(x.shape[1:]) != self.input_size:
            raise PartitionError(f"an input of shape {tuple(x.shape)} is not a batch of {self.input_size} samples.")
        return [crop.cut(x) for crop in crops]

    def member_skeleton(self) -> nn.Module:
        """One sub-network on the meta device: the model's classes and names, with narrower leaves."""
        net = on_meta(self.model)
        for target, attributes in self.division.attributes.items():
            leaf = net.get_submodule(target)
            for name, value in attributes.items():
                setattr(leaf, name, value)
        values = {}
        for name, tensor in tensors(net).items():
            if name in self.division.places:
                place = self.division.places[name][0]
                shape = torch.broadcast_shapes(*(i.shape for i in place)) + tensor.shape[len(place) :]
                values[name] = tensor.new_empty(shape)
        put(net, values)
        if self.input_size is not None and vars(net).get("input_size") == self.input_size:  # what a model declares
            net.input_size = self.member_size  # type: ignore[assignment]  # torch's stub knows no plain attributes
        return self._rewritten(net, self.division.member_args)

    @property
    def member_size(self) -> tuple[int, ...]:
        """The size of one sample of a member's input: `input_size` with the crop's axes."""
        size = self.crops[0].size
        return (*self.input_size[: -len(size)], *size)

    def _rewritten(self, net: nn.Module, arguments: dict, behind: dict | None = None) -> nn.Module:
        """`net` with other arguments for some nodes of its graph, and with calls behind others."""
        behind = behind or {}
        if not any(arguments.values()) and not any(behind.values()):
            return net
        graphs = self.division.graphs
        edits = {mode: edited(g, arguments.get(mode, {}), behind.get(mode, {})) for mode, g in graphs.items()}
        return Rewritten(net, edits)

    def subnets(self, seed: int | Sequence[int] | None = None) -> list[nn.Module]:
        """K freshly initialised, independent sub-networks; from one seed in turn, or each from its own of K seeds.

        Every leaf draws its own `reset_parameters`; weights are then scaled so that std · √fan_in is the global
        network's, and what is constant there (biases at 0, norms at 1) stays so: the author's initialisation is
        kept whatever its law. With a seed the global random state is left alone, from which no other thread may draw
        meanwhile.
        """
        if isinstance(seed, Sequence) and len(seed) != self.K:
            raise DecompkError(f"{len(seed)} seeds were given for {self.K} sub-networks; give one number, or one each.")
        with one_at_a_time(), torch.random.fork_rng(devices=[], enabled=seed is not None):
            members = []
            for k in range(self.K):
                if isinstance(seed, Sequence):
                    torch.manual_seed(seed[k])
                elif seed is not None and k == 0:
                    torch.manual_seed(seed)
                members.append(self._fresh(k))
            return members

    def _fresh(self, k: int) -> nn.Module:
        (member,) = extract(self.division, {k: self.member_skeleton()}, self.model, "sum")
        known = tensors(self.model)
        redrawn = set()
        for path, module in member.named_modules():
            own = {f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)}
            divided = not own or own & (
                self.division.places.keys() | self.division.summed
            )  # else forward never reaches it
            if divided and callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()
                redrawn |= own
        with torch.no_grad():
            for name, parameter in member.named_parameters():
                whole = known[name]
                if name not in redrawn:
                    continue
                if bool((whole == whole.reshape(-1)[0]).all()):
                    parameter.copy_(whole.reshape(-1)[0].expand_as(parameter))
                elif parameter.dim() > 1 and parameter.numel() > 1:
                    fan_in = whole[0].numel() / parameter[0].numel()
                    parameter.mul_(whole.std() * fan_in**0.5 / parameter.std())
        return member

    def extract(self, model: nn.Module, head: str = "sum") -> list[nn.Module]:
        """K sub-networks holding the diagonal blocks of `model`'s weights: the inverse of compose.

        The bias of a head comes back as 1/K each (2.14 adds them up); head="mean" undoes (2.22). Modes and
        requires_grad are `model`'s.
        """
        check_head(head, self._split_outputs and head != "sum")
        if head == "concat" and not self._split_outputs:
            raise DecompkError("only a network decomposed with head='concat' can be extracted so; use 'sum' or 'mean'.")
        apart = self._assembles and isinstance(model, Rewritten)
        skeleton = on_meta(self.model)
        check_members(apart_skeleton(self.division, skeleton) if apart else skeleton, [model], 1, "network")
        skeletons = {k: self.member_skeleton() for k in range(self.K)}
        return extract(self.division, skeletons, model, "concat" if self._assembles else head, apart)

    def compose(self, subnets: Sequence[nn.Module] | Packed, head: str = "sum") -> nn.Module:
        """The global network of K sub-networks (2.11)–(2.14), or of a packed module: block-diagonal, zero in between.

        head: "sum" adds the members' outputs, "mean" averages them (2.22), "concat" puts them side by side. Modes are
        the members', eval where all of them have it, and a parameter trains (requires_grad) where any member's does.
        Raises PackError when the sub-networks are not of this decomposition.
        """
        if isinstance(subnets, Packed):
            subnets = subnets.unpack()
        one = isinstance(subnets, nn.Module) and not isinstance(subnets, nn.ModuleList)
        if one or not isinstance(subnets, Iterable):
            raise PackError(
                f"compose takes the {self.K} sub-networks in a list, or packed, not {type(subnets).__name__}."
            )
        subnets = list(subnets)
        if self._split_outputs and head == "sum":
            head = "concat"
        check_head(head, self._split_outputs)
        check_members(self.member_skeleton(), subnets, self.K)
        if self._assembles:
            self._laid()
        net = on_meta(self.model)
        behind: dict[bool, dict[str, tuple[Callable, tuple]]] = {}
        buffers: dict[str, Any] = {}
        for mode, reorders in self.division.reorders.items():
            names = {node: f"_order_{'train' if mode else 'eval'}_{node}" for node in reorders}
            buffers |= {names[node]: order for node, order in reorders.items()}
            behind[mode] = {node: (torch.index_select, (1, Buffer(name))) for node, name in names.items()}
            behind[mode] |= {node: (assemble, (boxes,)) for node, boxes in self.division.assemblies[mode].items()}
        net = compose(self.division, net, subnets, "sum" if self._split_outputs and not self._assembles else head)
        device = next(subnets[0].parameters()).device
        for name, order in buffers.items():
            net.register_buffer(name, torch.from_numpy(order).to(device), persistent=False)
        return self._rewritten(net, {}, behind)

    def report(self) -> Report:
        """The cost of the global network, one member and all K, layer by layer (paper 2.1.2)."""
        return report(self)

    def __repr__(self) -> str:
        return f"Decomposition of {type(self.model).__name__} into {self.K} sub-networks: {self.layout()}"


def grouped_subnets(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    partitions: Partitions = 4,
    crop_size: int | Sequence[int] | None = None,
    margin: int = 0,
    head: str = "sum",
    seed: int | Sequence[int] | None = None,
) -> Packed:
    """The K fresh sub-networks of `model` as one module that reads the global batch; arguments as in `decompose`.

    packed(x): (N, *input_size) → (K, N, classes); packed.compose() gives the global network back. Without input_size
    the crops may wait for the first batch, whose size they then have for good; packed.describe() says.
    """
    decomposition = decompose(model, input_size, partitions, crop_size, margin, head)
    waits = decomposition.input_size is None
    dims = 1 + len(decomposition._sample_shape)
    packed = pack(decomposition.subnets(seed), crops=None if waits else decomposition.crops, input_dims=dims)
    packed.decomposition = decomposition
    if waits:
        vars(packed)["_crops"] = ()
    return packed


__all__ = ["Decomposition", "decompose", "grouped_subnets"]
