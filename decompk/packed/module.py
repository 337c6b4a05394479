"""The packed module: K members in one, called as one of them is."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..crops import Part, by
from ..errors import PackError, PartitionError, brief
from ..fx.pytree import leaves, spread, tensors_of, tree_map
from ..fx.unseen import possible, unseen
from ..fx.wrapper import Shell, innermost
from ..kernels.call import watched
from ..threads import one_at_a_time
from .apart import Call
from .bare import Bare, compiled_batch
from .inputs import check_image, fits, misfit
from .kinds import Kinds, kind_of, switches_of
from .per_member import PerMember, description
from .rehearsal import Rehearsal, Way
from .roles import Unknown, find_roles_apart
from .schedule import Plans, check_schedule, refuse_forced, run
from .stack import laid_out
from .surgery import Changes, apart_for_once, member_alone, without_insides
from .trial import SAME, Role, Rows, Trial
from .twin import Twin, packed_batch

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..divide.decompose import Decomposition
    from .program import Program

_NOT_USERS = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)
_PUBLIC = {
    "K": "_K",
    "crops": "_crops",
    "input_dims": "_input_dims",
    "decomposition": "_decomposition",
    "schedules": "_schedules",
}
_ABSENT: Any = object()  # as a parameter of its own, x is what exports and traces ask for


class Packed(Shell):
    """K members in one module; built by `pack`.

    Input: (N, …) shared by all members, or (K, N, …); with crops the global batch (N, C, *spatial), or crops already
    cut, (K, N, C, *crop size). It is called as a member is: by position or keyword, tensors in tuples, lists, dicts
    and dataclasses. Further tensors belong to the batch, shared or (K, N, …), or are the same for all members; which,
    the first call of a kind finds out by what the members do with them (or `pack(shared=…)` says). Output: every tensor
    the members return, stacked to (K, N, …), a scalar to (K,). Parameters and buffers have the members' names and a
    leading dimension K.

    That first call also runs a few samples, and as many as it has, through one member alone and through all of them
    packed, unseen by their buffers, the random state and hooks. Where the two differ (samples that see each other, a
    `view` of what lies otherwise, outputs that are no rows), the smallest module that mends it runs member by member
    from then on, as `describe()` says, or a layer lays out its output as alone. `pack(rehearse=False)` leaves that out.
    """

    K: int
    crops: tuple[Part, ...] | Any  # None where members see the whole input
    input_dims: int | None
    decomposition: Decomposition | Any  # None unless grouped_subnets packed them
    schedules: dict[str, str]  # by which schedule each kind of call runs, in words, as far as that was found out
    _inner: Any
    _kinds: Kinds
    _plans: Plans
    _WHY_NOT_APART: str | None = None  # why its members cannot run each by itself

    def __init__(
        self,
        net: nn.Module,
        K: int,
        crops: tuple[Part, ...] | None,
        input_dims: int | None,
        shared: Collection[str] | None = None,
        rehearse: bool = True,
        told: bool = False,
    ):
        """input_dims: of one member's batch; `told` by the user, else what the first layer takes."""
        super().__init__(net)
        vars(self).update(_K=K, _crops=crops, _input_dims=input_dims, _decomposition=None, _told=told)
        vars(self).update(_ways={}, _tried={}, _shared=shared, _rehearse=rehearse)
        vars(self).update(_schedules={}, _plans=Plans())
        vars(self)["_kinds"] = Kinds(switches_of(net))
        for store in (net._modules, net._parameters, net._buffers):  # a network's own names win over our methods'
            vars(self).update({name: value for name, value in store.items() if hasattr(type(self), name)})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            private, inner = _PUBLIC.get(name), vars(self).get("_inner")
            if isinstance(inner, PerMember) and name in vars(inner._members[0]):
                return getattr(inner, name)
            inner = innermost(inner)
            if inner is not None and not name.startswith("_") and name in vars(inner):
                return vars(inner)[name]
            if private in vars(self):
                return dict(self._schedules) if name == "schedules" else vars(self)[private]
            if callable(getattr(type(inner), name, None)):
                raise AttributeError(
                    f"a packed module runs {type(inner).__name__}.forward, not {name}: call {name} in a forward, or of "
                    "each of packed.unpack()."
                ) from None
            raise

    def __getitem__(self, index: Any) -> Any:
        """A part of a packed nn.Sequential or ModuleList."""
        return self._inner[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)

    def __bool__(self) -> bool:
        return True

    def __setattr__(self, name: str, value: Any) -> None:
        inner = innermost(vars(self).get("_inner"))
        if inner is None or name.startswith("_") or any(name in store for store in (inner._modules, inner._parameters)):
            super().__setattr__(name, value)
        elif name in vars(inner) and name != "training":  # what the network's code reads
            vars(inner)[name] = value
        elif name == "schedules":
            for schedule in value.values():
                check_schedule(schedule)
            vars(self)["_schedules"] = dict(value)
            self._plans.forget()
        elif name in _PUBLIC:
            vars(self).update({_PUBLIC[name]: value, **({"_told": True} if name == "input_dims" else {})})
        else:
            super().__setattr__(name, value)

    def forward(self, x: Any = _ABSENT, /, *args: Any, **kwargs: Any) -> Any:
        if self._crops != () or torch.compiler.is_compiling():
            return self._called(x, *args, **kwargs)
        with one_at_a_time():
            lays = self._crops == ()  # still: another thread may have laid them
            try:
                return self._called(x, *args, **kwargs)
            except Exception:  # whatever members raise: a batch that they do not take shall not lay the crops for good
                if lays:
                    vars(self)["_crops"] = ()
                    self._plans.forget()
                    self._decomposition.lift_crops()
                raise

    def _called(self, x: Any = _ABSENT, /, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not isinstance(x, Tensor) or not x.dim():
            return self._forward_any(args if x is _ABSENT else (x, *args), kwargs)
        call = self._call(x)
        if torch.compiler.is_compiling():
            return self._together(x, call.shared, call.N, call.way)
        return run(call)

    def _call(self, x: Tensor) -> Call:
        """A call with x, and how its kind runs."""
        shared = self._is_shared(x, (x,))
        N = x.shape[0] if shared else x.shape[1]
        kind = self._in_full((self.training, shared, x.dim()), N)
        way = self._ways.get(kind) or self._way(kind, (x,), {}, [x], shared, N)
        return Call(self, x, shared, N, way)

    def _together(self, x: Tensor, shared: bool, N: int, way: Way, program: Program | None = None) -> Any:
        """What all members return together for x, layer after layer, or by their fused graphs."""
        if way.apart or isinstance(self._inner, PerMember):
            return self._members_apart(way, (x,), {}, shared)
        cuts = shared and len(self._crops or ()) > 0
        rows = x if cuts else torch.cat([x] * self._K) if shared else x.flatten(0, 1)
        if torch.compiler.is_compiling():
            compiled_batch(self._inner, self._K * N)
            return self._stacked(self._run(rows, cuts), way, N)
        with packed_batch(self._K * N):
            out = self._run(rows, cuts) if program is None else self._by_program(program, rows, cuts)
        return self._stacked(out, way, N)

    def _forward_any(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call with other arguments than one tensor."""
        if not torch.compiler.is_compiling():
            refuse_forced("it has other arguments than one tensor")
        tensors = tensors_of((args, kwargs))
        x = next((t for t in tensors if t.dim()), None)
        if self._crops and args and isinstance(args[0], list | tuple):
            raise PackError("a packed module takes crops as one tensor (K, N, C, …): give it torch.stack(crops).")
        if x is None:
            trial = Trial(self._inner, self._K, args, kwargs, True, 0)
            with unseen():
                way = Way(self._roles_apart(trial))
                if not isinstance(self._inner, PerMember):
                    self._change(Changes(whole={"": "it is called without a batch"}))
            return self._members_apart(way, args, kwargs, True)
        shared = self._is_shared(x, args, kwargs)
        N = x.shape[0] if shared else x.shape[1]
        kind = self._in_full((self.training, shared, *kind_of(args, kwargs, self._K, N)), N, args, kwargs)
        way = self._ways.get(kind) or self._way(kind, args, kwargs, tensors, shared, N)
        if way.apart or isinstance(self._inner, PerMember):
            return self._members_apart(way, args, kwargs, shared)
        roles = iter(way.roles)

        def rows(leaf: Any) -> Any:
            role: Any = next(roles) if isinstance(leaf, Tensor) else SAME
            if role is SAME:
                return leaf
            if role.own:
                return leaf.movedim(0, role.dim).flatten(role.dim, role.dim + 1)
            return self._cut(leaf) if leaf is x and self._crops else torch.cat([leaf] * self._K, role.dim)

        args, kwargs = tree_map(rows, (args, kwargs))
        if torch.compiler.is_compiling():
            compiled_batch(self._inner, self._K * N)
            return self._stacked(self._inner(*args, **kwargs), way, N)
        with packed_batch(self._K * N):
            out = self._inner(*args, **kwargs)
        return self._stacked(out, way, N)

    def _in_full(self, kind: tuple, N: int, args: tuple = (), kwargs: dict[str, Any] | None = None) -> tuple:
        """The kind of a call with what else may decide how it runs; compiled code knows the kind alone."""
        return kind if torch.compiler.is_compiling() else self._kinds.in_full(kind, N, args, kwargs)

    def _run(self, x: Tensor, cuts: bool) -> Any:
        """What the members return for their rows x (K·N, …), or, if it cuts, for their crops of the image x."""
        return self._inner(self._cut(x) if cuts else x)

    def _by_program(self, program: Program, x: Tensor, cuts: bool) -> Any:
        """The same by fused graphs."""
        uncut = cuts and program.reads_image()
        return program(self._cut(x) if cuts and not uncut else x, self._crops if uncut else None)

    def _members_apart(self, way: Way, args: tuple, kwargs: dict[str, Any], shared: bool) -> Any:
        """What the members return, each called with its own arguments, stacked."""
        roles, first = iter(way.roles), iter([True])

        def each(leaf: Any) -> list:
            if not isinstance(leaf, Tensor):
                return [leaf] * self._K
            role = next(roles)
            if shared and self._crops and leaf.dim() and next(first, False):
                return [crop.cut(leaf) for crop in self._crops]
            return list(leaf.unbind(0)) if role is not SAME and role.own else [leaf] * self._K

        whole = self._inner if isinstance(self._inner, PerMember) else apart_for_once(self._inner, self._K)
        outputs = whole._run(spread(each, (args, kwargs), self._K))
        return tree_map(self._stack, *outputs)

    def _stack(self, *parts: Any) -> Any:
        """One output of all members: tensors (K, …), numbers that differ as a tensor (K,), other values as a list."""
        if all(isinstance(part, Tensor) for part in parts):
            if all(part.shape == parts[0].shape for part in parts):
                return self._by_member(torch.stack(parts))
            raise PackError(f"the members return tensors of {' and '.join(str(tuple(p.shape)) for p in parts)}.")
        if all(part is parts[0] for part in parts) or all(isinstance(part, str | type(None)) for part in parts):
            return parts[0] if len(set(parts)) == 1 else list(parts)
        if all(isinstance(part, bool | int | float | complex) for part in parts):
            return parts[0] if len(set(parts)) == 1 else torch.tensor(parts)
        return list(parts)

    def _stacked(self, out: Any, way: Way, N: int) -> Any:
        """What the members return as rows, by member: (K, N, …)."""
        if type(out) is Tensor and way.outs in (None, (0,)):
            return self._by_member(self._unflattened(out, 0, N))
        places = iter(way.outs or ())

        def by_member(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            place = next(places, 0)
            return self._by_member(
                leaf.expand(self._K, *leaf.shape) if place is None else self._unflattened(leaf, place, N)
            )

        return tree_map(by_member, out)

    def _unflattened(self, leaf: Tensor, place: int, N: int) -> Tensor:
        if leaf.dim() <= place or leaf.shape[place] % self._K or (place == 0 and N and leaf.shape[0] % (self._K * N)):
            raise PackError(
                f"the members return a tensor of {tuple(leaf.shape)} for {self._K} · {N} samples, which is no row per "
                "sample: call the packed network once as it is, before it is compiled or traced, and it runs member by "
                "member; or pack(..., member_by_member=[''])."
            )
        y = leaf.unflatten(place, (self._K, -1) if place or leaf.numel() else (self._K, N))
        return y.movedim(place, 0) if place else y

    def _by_member(self, leaf: Tensor) -> Tensor:
        """What is returned for a tensor (K, …) of the members' outputs."""
        return leaf

    # ---- how a kind of call runs ------------------------------------------------------------------------------------

    def _way(
        self, kind: tuple, args: tuple, kwargs: dict[str, Any], tensors: Sequence[Tensor], shared: bool, N: int
    ) -> Way:
        """How a kind of call runs that is met for the first time; the network is changed where that is needed.

        Of threads that meet it at once, the first finds out, and the others read what it found.
        """
        if torch.compiler.is_compiling():
            return self._found_way(kind, args, kwargs, tensors, shared, N)
        with one_at_a_time():
            kind = self._in_full(kind[0], N, args, kwargs)  # another may be watched
            return self._ways.get(kind) or self._found_way(kind, args, kwargs, tensors, shared, N)

    def _found_way(
        self, kind: tuple, args: tuple, kwargs: dict[str, Any], tensors: Sequence[Tensor], shared: bool, N: int
    ) -> Way:
        named = None if self._shared is None or len(tensors) == 1 else self._named_roles(args, kwargs, shared, N)
        one = Way((Rows(0, not shared),)) if len(tensors) == 1 else named and Way(named)
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if one and ((alone and isinstance(self._inner, PerMember)) or not self._rehearse):
            return self._ways.setdefault(kind, one)
        if not N or not possible(tensors):
            if one and watched() and not torch.compiler.is_compiling():
                warn("call a packed network once as it is before it is traced or transformed.")
            if one:
                return one
            raise PackError(
                "which of these arguments belong to the batch is found out at the first plain call: call the packed "
                "network once before it is compiled or traced, or name those that do not in pack(..., shared=[...])."
            )
        crops = self._crops
        cut = (lambda t, k: crops[k].cut(t)) if crops else None
        trial = Trial(self._inner, self._K, args, kwargs, shared, N, cut)
        rehearsal = Rehearsal(trial, named)
        apart, changes = isinstance(self._inner, PerMember), None
        switches = len(self._kinds.switched())
        with unseen():
            try:
                known = self._ways.get(kind[:2])
                if apart:
                    way, changes = Way(()), Changes()
                else:
                    way, changes = rehearsal.again(known) if known else rehearsal.run()
            except Unknown as unknown:
                if one:
                    with contextlib.suppress(Unknown):  # else the call itself is wrong, as its members will say
                        find_roles_apart(trial)
                        changes = Changes(whole={"": "it takes no other number of samples: nothing can be tried"})
                    if changes is None:
                        return one
                elif not shared or self._crops:
                    raise PackError(
                        "it cannot be told which of these arguments belong to the batch, because a member does not "
                        "take another number of samples: name those that do not in pack(..., shared=[...])."
                    ) from unknown
                else:
                    changes = Changes(whole={"": "it cannot be told which of its arguments belong to the batch"})
            if apart or "" in changes.whole:
                way = one or Way(self._roles_apart(trial))
                if one:
                    with contextlib.suppress(Unknown):  # as its members will say
                        find_roles_apart(trial)
            self._change(changes)
        rehearsal.hand_over(self._inner)
        kind = kind[0], (*self._kinds.switched(), *kind[1][switches:]), kind[2]  # fewer modules may be watched now
        self._ways[kind] = way
        if not way.apart:
            self._ways[kind[:2]] = self._ways[kind[0]] = way  # for other sizes; for compiled code, which asks no more
        return way

    def _roles_apart(self, trial: Trial) -> tuple[Role, ...]:
        """Which arguments are the members' own, where members run one by one. Raises PackError."""
        try:
            return find_roles_apart(trial)
        except Unknown as unknown:
            cause = unknown.__cause__ or unknown
            raise PackError(f"a member alone does not take these arguments: {brief(cause)}.") from cause

    def _named_roles(self, args: tuple, kwargs: dict[str, Any], shared: bool, N: int) -> tuple[Role, ...]:
        """Each tensor's role where `pack(shared=…)` names the arguments that are the same for all members."""
        bound = inspect.signature(innermost(self._inner).forward).bind(*args, **kwargs).arguments
        roles: list[Role] = []
        names = {id(leaf): name for name, value in bound.items() for leaf in leaves(value)}
        for leaf in leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                own = leaf.shape[:2] == (self._K, N)
                batch = leaf.dim() > 0 and names.get(id(leaf)) not in self._shared
                roles.append(Rows(0, own if not shared or leaf.shape[:1] != (N,) else False) if batch else SAME)
        return tuple(roles)

    def _change(self, changes: Changes) -> None:
        """Let the network run as a rehearsal found that it must."""
        vars(self)["_inner"] = changes.applied(self._inner, self._K)
        if changes.whole or changes.contiguous:
            self._plans.forget()
        if changes.whole:
            vars(self)["_kinds"] = Kinds(switches_of(self._inner))
        for path, reason in changes.whole.items():
            warn(f"{type(innermost(self._inner)).__name__}: {_named(path)} runs member by member: {reason}.")

    def _copied(self, inner: nn.Module) -> Packed:
        """The same packed network around other modules of the same kinds."""
        new = Packed(inner, self._K, self._crops, self._input_dims, self._shared, self._rehearse, self._told)
        vars(new).update(_ways=self._ways, _decomposition=self._decomposition)
        return new

    def _is_shared(self, x: Tensor, args: tuple, kwargs: dict[str, Any] | None = None) -> bool:
        """Whether x, the first of the arguments, is one batch for all members (True) or has the member dimension."""
        shape, dims = tuple(x.shape), self._input_dims
        strict = len(args) == 1 and args[0] is x and not kwargs  # else x may not go to the network's first layer
        if self._crops == () and x.dim() == dims:  # they wait for the first batch
            compiles = torch.compiler.is_compiling()
            lay = _crops_of_first_batch_uncompiled if compiles else _crops_of_first_batch
            vars(self)["_crops"] = lay(self._decomposition, shape[1:])
        if dims is None and x.dim() in (1, 2):
            return True
        if not self._told and x.dim() > (dims or 2):
            place = (len(args), *(kwargs or ()), shape[2:])
            if place not in self._tried:
                self._tried[place] = fits(self._inner, self._K, x, args, kwargs or {}) if self._rehearse else None
            if (shared := self._tried[place]) or (shared is False and shape[0] == self._K):
                return shared
        if dims is None and not strict:
            return True
        if dims is None:
            raise PackError(
                f"an input of {shape} may be one batch for all members or one per member: tell pack with input_dims=, "
                "the number of dimensions of one member's batch."
            )
        if self._crops:
            size = self._crops[0].size
            spatial = shape[-len(size) :]
            if x.dim() == dims:
                check_image(spatial, self._crops, self._decomposition)
            elif x.dim() == dims + 1 and spatial != size:
                raise PartitionError(f"an input of {shape} is not cut into crops of {by(size)} pixels.")
        if x.dim() == dims or (x.dim() == dims + 1 and x.shape[0] == self._K):
            return x.dim() == dims
        if not strict and not self._crops:
            return True
        raise misfit(shape, dims, self._K, self._crops not in (None, ()), self._decomposition)

    def _cut(self, x: Tensor) -> Tensor:
        return torch.cat([crop.cut(x) for crop in self._crops])

    def ensemble(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Σ_k of the members' outputs: (N, classes) for classifiers."""
        return tree_map(lambda leaf: leaf.sum(0) if isinstance(leaf, Tensor) else leaf, self(x, *args, **kwargs))

    def unpack(self) -> list[nn.Module]:
        """The K members as ordinary, independent modules of their own classes, with the packed module's modes."""
        return [member_alone(self._inner, k) for k in range(self._K)]

    def compose(self, head: str = "sum") -> nn.Module:
        """The global network made of the members (2.11)–(2.14); needs `decomposition`, which grouped_subnets sets."""
        if self._decomposition is None:
            raise PackError(
                "this packed module knows no decomposition: build it with decompk.grouped_subnets, or call "
                "decompk.decompose(...).compose(packed.unpack())."
            )
        return self._decomposition.compose(self.unpack(), head=head)

    def describe(self) -> str:
        """A table of the layers: which run as twins, and which member by member and why."""
        rows, paths = [], {module: path for path, module in self._inner.named_modules()}
        for module in without_insides(self._inner):
            if isinstance(module, PerMember):
                rows.append(description(module))
            elif isinstance(module, Twin):
                rows.append((module._twin_path, module._twin_class.__name__, self._how(module)))
            elif isinstance(module, Bare):
                rows.append((paths[module], type(module).__name__, "reads its own parameters by rows"))
        net = description(self._inner)[1] if isinstance(self._inner, PerMember) else type(self._inner).__name__
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines = [f"{path or '.':<{widths[0]}}  {kind:<{widths[1]}}  {how}" for path, kind, how in rows]
        known = self._decomposition is not None and self._crops is not None
        cut = [self._decomposition.layout()] if known else []
        return "\n".join([f"{self._K} members of {net}", *cut, *lines])

    def _how(self, twin: Twin) -> str:
        """How a layer runs, for `describe`."""
        return "twin" + ", laid out for a view" * twin._twin_contiguous

    def to(self, *args: Any, memory_format: torch.memory_format | None = None, **kwargs: Any) -> Self:
        """nn.Module.to; `memory_format` is each member's: channels_last makes weights (K, OHWI) in memory."""
        if args or kwargs:
            super().to(*args, **kwargs)
        if memory_format is not None:
            for tensor in (*self.parameters(), *self.buffers()):
                tensor.data = laid_out(tensor.data, memory_format)
        return self

    def extra_repr(self) -> str:
        return f"K={self._K}" + (f", crops={self._crops}" if self._crops else "")


def _named(path: str) -> str:
    return f"'{path}'" if path else "the network"


def warn(text: str) -> None:
    """Warn at the user's line, so that Python, which says a thing once a line, says it of every network."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_code.co_filename.startswith(_NOT_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def _crops_of_first_batch(decomposition: Any, size: tuple[int, ...]) -> tuple[Part, ...]:
    return decomposition.lay_crops(size)


# Outside a compiled graph; torch.compiler.disable would import the compiler now.
_crops_of_first_batch_uncompiled = torch._disable_dynamo(_crops_of_first_batch)
