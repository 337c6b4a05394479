"""K networks of one architecture as one module, activations member-major: members ↔ packed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .dispatch import EXACT
from .errors import PackError, PartitionError
from .layers.alike import check_members
from .layers.base import Twin, dotted, packed_batch
from .layers.forward_code import read_forward
from .layers.nest import tree_map
from .layers.per_member import PerMember, description, member_of, per_member_kind
from .layers.plan import input_dims_of, plan
from .partition import Part, by
from .shell import Shell


def pack(
    members: Sequence[nn.Module],
    crops: Sequence[Part] | None = None,
    *,
    input_dims: int | None = None,
    member_by_member: Collection[str] = (),
) -> Packed:
    """K networks of one architecture as one module that trains them all, each as if it were alone.

    The members stay as they are; the packed module holds copies. With `crops`, one per member, the module takes the
    global batch and cuts it. `input_dims` is the number of dimensions of one member's batch, needed where the first
    layer does not tell it. `member_by_member` names modules to run whole, once per member, that would not be
    recognised as needing it: the members' own code sees all K·N samples at once, so where it mixes samples, or moves
    them out of dimension 0, it must run so. `describe()` lists what does. Raises PackError where the members differ in
    more than their values.
    """
    members = list(members)
    check_members(members)
    K, first = len(members), members[0]
    if crops is not None:
        crops = tuple(crops)
        if len(crops) != K:
            raise PackError(f"{len(crops)} crops do not fit {K} members; give each member its crop.")
        if any(crop.size != crops[0].size for crop in crops):
            raise PartitionError(f"crops of unequal size {sorted({c.size for c in crops})} cannot be packed.")
        input_dims = input_dims or 2 + len(crops[0].size)
    twins, whole = plan(first, member_by_member)

    stacks = _stack_tensors(members, {path for path, kind in twins.items() if kind.input_dims == 4})
    shells: dict[int, Any] = {}
    for path, reason in whole.items():
        module = first.get_submodule(path)
        if id(module) in shells:
            continue
        inner = _copy(module, dict(stacks))
        shells[id(module)] = per_member_kind(module)(inner, K, path, reason, _state(members, path, inner))
    net = _copy(first, {**stacks, **shells})
    for path, kind in twins.items():
        leaf = net.get_submodule(path)
        if not isinstance(leaf, Twin):  # registered under two names
            kind.adopt(leaf, K, path)
    return Packed(net, K, crops, input_dims or input_dims_of(first))


class Packed(Shell):
    """K members in one module; built by `pack`.

    Input: (N, …) shared by all members, or (K, N, …); with crops the global batch (N, C, *spatial), or crops already
    cut, (K, N, C, *crop size). Further tensor arguments follow the first one: those that start with its N samples,
    or K and N, belong to the batch, and anything else is handed on as it is. Output: every tensor the members return,
    stacked to (K, N, …). Parameters and buffers have the members' names and a leading dimension K.
    """

    decomposition: Any = None

    def __init__(self, net: nn.Module, K: int, crops: tuple[Part, ...] | None, input_dims: int | None):
        super().__init__(net)
        vars(self).update(K=K, crops=crops, input_dims=input_dims)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Tensor):
            raise PackError(f"a packed module takes a tensor first, not {type(x).__name__}.")
        shared = self._is_shared(x)
        N = x.shape[0] if shared else x.shape[1]

        def spread_rows(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if shared:
                return torch.cat([leaf] * self.K) if leaf.shape[:1] == (N,) else leaf
            return leaf.flatten(0, 1) if leaf.shape[:2] == (self.K, N) else leaf

        cuts = shared and len(self.crops or ()) > 0
        x = x if cuts else spread_rows(x)
        args, kwargs = tree_map(spread_rows, (args, kwargs))
        if torch.compiler.is_compiling():
            out = self._run(x, cuts, args, kwargs)
        else:
            with packed_batch(self.K * N):
                out = self._run(x, cuts, args, kwargs)
        return tree_map(functools.partial(self._by_member, N), out)

    def _run(self, x: Tensor, cuts: bool, args: tuple, kwargs: dict) -> Any:
        """What the members return for their rows x (K·N, …), or, if it cuts, for their crops of the image x."""
        return self._inner(self._cut(x) if cuts else x, *args, **kwargs)

    def _is_shared(self, x: Tensor) -> bool:
        """Whether x is one batch for all members (True) or already has the member dimension (False)."""
        shape, dims = tuple(x.shape), self.input_dims
        if self.crops == () and x.dim() == dims:  # they wait for the first batch
            compiles = torch.compiler.is_compiling()
            lay = _crops_of_first_batch_uncompiled if compiles else _crops_of_first_batch
            vars(self)["crops"] = lay(self.decomposition, shape[1:])
        if dims is None:
            if x.dim() in (1, 2):
                return True
            raise PackError(
                f"an input of {shape} may be one batch for all members or one per member: tell pack with input_dims=, "
                "the number of dimensions of one member's batch."
            )
        if self.crops:
            size = self.crops[0].size
            spatial = shape[-len(size) :]
            if x.dim() == dims:
                self._check_image(spatial)
            elif x.dim() == dims + 1 and spatial != size:
                raise PartitionError(f"an input of {shape} is not cut into crops of {by(size)} pixels.")
        if x.dim() == dims or (x.dim() == dims + 1 and x.shape[0] == self.K):
            return x.dim() == dims
        if self.crops:
            raise PartitionError(
                f"an input of {shape} is neither a global batch of {dims} dimensions nor ({self.K}, N, C, …) crops."
            )
        raise PackError(
            f"an input of {shape} is neither one batch of {dims} dimensions for all members nor ({self.K}, N, …) of "
            f"{dims + 1}; if the members' batches have another number of dimensions, tell pack with input_dims=."
        )

    def _check_image(self, spatial: tuple[int, ...]) -> None:
        whole = getattr(self.decomposition, "input_size", spatial)[-len(spatial) :]
        if tuple(whole) != spatial:
            raise PartitionError(
                f"an image of {by(spatial)} pixels does not fit this packed module, which was "
                f"decomposed for {by(whole)}{self.decomposition.origin}; resize it, or decompose for its input_size=."
            )
        for crop in self.crops:
            if any(stop > pixels for stop, pixels in zip(crop.stop, spatial, strict=True)):
                raise PartitionError(f"{crop} does not fit an image of {by(spatial)} pixels.")

    def _cut(self, x: Tensor) -> Tensor:
        return torch.cat([crop.cut(x) for crop in self.crops])

    def _by_member(self, N: int, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.shape[:1] != (self.K * N,):
            raise PackError(
                f"the members return a tensor of {tuple(leaf.shape)} for {self.K} · {N} samples: only outputs with one "
                "row per sample can be packed."
            )
        return leaf.unflatten(0, (self.K, N))

    def ensemble(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Σ_k of the members' outputs: (N, classes) for classifiers."""
        return tree_map(lambda leaf: leaf.sum(0) if isinstance(leaf, Tensor) else leaf, self(x, *args, **kwargs))

    def unpack(self) -> list[nn.Module]:
        """The K members as ordinary, independent modules of their own classes, with the packed module's modes."""
        return [self._member(k) for k in range(self.K)]

    def _member(self, k: int) -> nn.Module:
        memo: dict[int, Any] = {}
        for tensor in (*self._inner.parameters(), *self._inner.buffers()):
            own = tensor.detach()[k].clone(memory_format=torch.contiguous_format)
            memo[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
        for shell in _without_insides(self._inner):
            if isinstance(shell, PerMember):
                memo[id(shell)] = member_of(shell, k, dict(memo))
        return _release(copy.deepcopy(self._inner, memo))

    def compose(self, head: str = "sum") -> nn.Module:
        """The global network made of the members (2.11)–(2.14); needs `decomposition`, which grouped_subnets sets."""
        if self.decomposition is None:
            raise PackError(
                "this packed module knows no decomposition: build it with decompk.grouped_subnets, or call "
                "decompk.decompose(...).compose(packed.unpack())."
            )
        return self.decomposition.compose(self.unpack(), head=head)

    def describe(self) -> str:
        """A table of the layers: which run as twins, and which member by member and why."""
        rows = []
        for module in _without_insides(self._inner):
            if isinstance(module, PerMember):
                rows.append(description(module))
            elif isinstance(module, Twin):
                rows.append((module.path, module.member_class.__name__, self._how(module)))
        net = description(self._inner)[1] if isinstance(self._inner, PerMember) else type(self._inner).__name__
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines = [f"{path or '.':<{widths[0]}}  {kind:<{widths[1]}}  {how}" for path, kind, how in rows]
        cut = [self.decomposition.layout()] if self.decomposition is not None and self.crops is not None else []
        return "\n".join([f"{self.K} members of {net}", *cut, *lines])

    def _how(self, twin: Twin) -> str:
        """How a layer runs, for `describe`."""
        return "twin"

    def to(self, *args: Any, memory_format: torch.memory_format | None = None, **kwargs: Any) -> Packed:
        """nn.Module.to; `memory_format` is each member's: channels_last makes weights (K, OHWI) in memory."""
        if args or kwargs:
            super().to(*args, **kwargs)
        if memory_format is not None:
            for tensor in (*self.parameters(), *self.buffers()):
                tensor.data = _laid_out(tensor.data, memory_format)
        return self

    def extra_repr(self) -> str:
        return f"K={self.K}" + (f", crops={self.crops}" if self.crops else "")


def _crops_of_first_batch(decomposition: Any, size: tuple[int, ...]) -> tuple[Part, ...]:
    return decomposition.lay_crops(size)


# Outside a compiled graph; torch.compiler.disable would import the compiler now.
_crops_of_first_batch_uncompiled = torch._disable_dynamo(_crops_of_first_batch)


def _laid_out(stack: Tensor, memory_format: torch.memory_format) -> Tensor:
    """(K, …) tensors with every member's slice in `memory_format`, where that format has its number of dimensions."""
    dims = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format)
    if dims is None:
        return stack.contiguous()
    if stack.dim() != 1 + dims:
        return stack
    stack = stack.movedim(2, -1).contiguous().movedim(-1, 2)
    strides = list(stack.stride())
    strides[2] = 1  # with one channel any stride fits, and torch knows the format by this one
    return stack.as_strided(stack.shape, strides)


def _without_insides(module: nn.Module) -> Iterator[nn.Module]:
    """Every module once, but none inside a module that runs member by member."""
    seen: set[nn.Module] = set()
    queue = [module]
    while queue:
        module = queue.pop()
        if module not in seen:
            seen.add(module)
            yield module
            if not isinstance(module, PerMember):
                queue += reversed([child for child in module._modules.values() if child is not None])


def _release(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, Twin):
            module.release()
    return net


def _copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # whatever the module's attributes raise
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise PackError(f"member 0 cannot be copied, which packing needs: {reason}.") from error


def _stack_tensors(members: list[nn.Module], channels_last: set[str]) -> dict[int, Tensor]:
    """id of each tensor of member 0 → all members' in one; a tensor shared inside a member stays shared."""
    modules = [dict(member.named_modules(remove_duplicate=False)) for member in members]
    stacks: dict[int, Tensor] = {}
    for path, module in modules[0].items():
        for store in ("_parameters", "_buffers"):
            for name, tensor in getattr(module, store).items():
                if tensor is None or id(tensor) in stacks:
                    continue
                stack = torch.stack([getattr(m[path], store)[name].detach() for m in modules])
                if path in channels_last and stack.dtype not in EXACT:
                    stack = _laid_out(stack, torch.channels_last)
                stacks[id(tensor)] = nn.Parameter(stack, tensor.requires_grad) if store == "_parameters" else stack
    return stacks


def _state(members: list[nn.Module], path: str, inner: nn.Module) -> list:
    """The plain attributes that forward code below `path` assigns: (module, names, each member's values)."""
    state = []
    for below, module in inner.named_modules():
        if type(module).__module__.partition(".")[0] == "torch":
            continue
        name = dotted(path, below)
        stored = read_forward(module).stored
        empty = [key for key in stored if key in module._buffers and module._buffers[key] is None]
        if empty or "data" in stored:
            what = f"fills the buffer '{empty[0]}'" if empty else "assigns to .data"
            raise PackError(
                f"the forward of '{name}' {what}, which a packed module cannot follow; register it, use copy_."
            )
        names = tuple(sorted(stored - module._parameters.keys() - module._buffers.keys() - module._modules.keys()))
        if names:
            values = [vars(member.get_submodule(name)) for member in members]
            state.append((module, names, [{n: copy.deepcopy(v[n]) for n in names if n in v} for v in values]))
    return state
