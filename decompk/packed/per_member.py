"""Modules without a member-aware twin: they run whole, once per member, each member's own module on its own slices."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import PackError
from ..fx.forward_code import read_forward
from ..fx.pytree import leaves, spread, tree_map
from ..fx.wrapper import Shell
from ..kernels.call import watched
from ..kernels.torch_limits import is_delicate
from ..threads import Turn
from .follow import HOOK_STORES, STORES, Noted, held_tensors, own_module
from .twin import Record, check_rows, deep_copy, member_rows

Inputs = tuple[tuple, dict[str, Any]]


class _Laid(NamedTuple):
    """A stack whose slices lie in the members' places for it; where code writes `.data`, the slices' memory too."""

    name: str
    kind: str
    stack: Tensor
    stores: Sequence[dict[str, Tensor | None]]
    parts: Sequence[Tensor]
    pointers: Sequence[int] | None


class PerMember(Shell):
    """Runs K modules in turn, each on its member's slices: exact whatever their code does.

    `inner` holds the stacked tensors (K, …): it names them, and is what a user sees and changes. `members` are what
    runs: one member's module each, with its own plain attributes, caches and hooks, whose tensors are slices of the
    stacks, laid in at each call (and left there, where a checkpoint finds them that computes again in backward). What
    the user has changed in `inner` since, attributes, modes, hooks and modules, is brought over first.
    """

    def __init__(self, inner: nn.Module, K: int, path: str, reason: str, members: Sequence[nn.Module]):
        super().__init__(inner)
        vars(self).update(_K=K, _path=path, _reason=reason, _members=list(members), _batch={}, _turn=Turn())
        self._note()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._on_rows("forward", *args, **kwargs)

    def _on_rows(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of every member on its rows of the arguments, which are all members', and the results as rows."""
        if method != "forward" and not any(isinstance(leaf, Tensor) for leaf in leaves((args, kwargs))):
            return tree_map(self._agreed, *self._run([(args, kwargs)] * self._K, method))
        rows, inputs, record = self._cut(args, kwargs)
        return self._join(rows // self._K, self._run(inputs, method), record)

    def _run(self, inputs: Sequence[Inputs], method: str = "") -> list:
        """What each member returns for its own arguments; of a module call, or of a method by name."""
        if torch.compiler.is_compiling():
            return self._run_in_turn(inputs, method)
        with self._turn:  # members hold the slices of one call
            return self._run_in_turn(inputs, method)

    def _run_in_turn(self, inputs: Sequence[Inputs], method: str) -> list:
        self._bring_over()
        laid = self._lay_in()
        outputs, written = [], len(laid) < len(self._places)  # a member may fill a place that was empty
        for k, (member, (args, kwargs)) in enumerate(zip(self._members, inputs, strict=True)):
            call = member if method in ("", "forward") else getattr(member, method)
            outputs.append(call(*args, **kwargs))
            written |= self._write_back(laid, k)
        if torch.compiler.is_compiling():
            self._clear()
        elif written:
            self._renew()
        return outputs

    # ---- members' tensors -------------------------------------------------------------------------------------------

    def _lay_in(self, sliced: Callable[[Tensor], Sequence[Tensor]] | None = None) -> list[_Laid]:
        """Give every member its slices, of stacks `sliced`; → what to look at when it has run."""
        laid = []
        slices: dict[int, Sequence[Tensor]] = {}
        for stacked, kind, name, stores in self._places:
            stack = stacked[name]
            if stack is None:
                continue
            parts = slices.get(id(stack))
            if parts is None:
                parts = slices[id(stack)] = (sliced or _slices)(stack)
            for store, part in zip(stores, parts, strict=True):
                store[name] = part
            pointers = [part.data_ptr() for part in parts] if self._writes_data else None
            laid.append(_Laid(name, kind, stack, stores, parts, pointers))
        for stacked, name, containers, key in self._aliases:
            for container, part in zip(containers, slices[id(stacked[name])], strict=True):
                container[key] = part
        return laid

    def _write_back(self, laid: Sequence[_Laid], k: int) -> bool:
        """Bring what member k put in place of a slice, or under it by `.data`, into the stacks; → whether it did."""
        written = False
        for name, kind, stack, stores, parts, pointers in laid:
            new, part = stores[k][name], parts[k]
            if new is part and (pointers is None or new.data_ptr() == pointers[k]):
                continue
            written = True
            if new is not None and new.shape == stack.shape[1:] and new.dtype == stack.dtype:
                with torch.no_grad():
                    (stack.detach()[k] if new is part else part).copy_(new)
            elif kind == "_parameters" or torch.compiler.is_compiling():
                raise PackError(
                    f"'{self._path}' changed '{name}' from {tuple(stack.shape[1:])} {stack.dtype} to "
                    f"{'None' if new is None else f'{tuple(new.shape)} {new.dtype}'} during forward; a packed tensor "
                    "keeps its shape and dtype."
                )
        return written

    def _renew(self) -> None:
        """Buffers that every member has filled, or made in another shape, are stacks of these from now on."""
        for stacked, kind, name, stores in self._places:
            if kind == "_buffers":
                values, stack = [store[name] for store in stores], stacked[name]
                kinds = {None if v is None else (v.shape, v.dtype) for v in values}
                if len(kinds) > 1:
                    raise PackError(
                        f"'{self._path}' made buffers '{name}' of {len(kinds)} shapes for {self._K} members."
                    )
                if kinds != {None if stack is None else (stack.shape[1:], stack.dtype)}:
                    stacked[name] = None if kinds == {None} else torch.stack([v.detach() for v in values])

    def _clear(self) -> None:
        for _, _, name, stores in self._places:
            for store in stores:
                store[name] = None
        for _, _, containers, key in self._aliases:
            for container in containers:
                container[key] = None

    # ---- what a user changes in `inner` -----------------------------------------------------------------------------

    def _note(self) -> None:
        """Remember what `inner` is like, since its members are like it now."""
        trees = zip(*(list(tree.modules()) for tree in (self._inner, *self._members)), strict=True)
        rows = [(m, own) for m, *own in trees]
        owners = {
            id(t): [(getattr(m, kind), name)]
            for m, _ in rows
            for kind in STORES
            for name, t in getattr(m, kind).items()
            if t is not None
        }
        self.__dict__.update(
            _was=[(Noted(m), own) for m, own in rows],
            _places=[
                (getattr(m, kind), kind, name, [getattr(o, kind) for o in own])
                for m, own in rows
                for kind in STORES
                for name in getattr(m, kind)
            ],
            _aliases=[
                (store, name, [vars(o)[attribute] for o in own], key)
                for m, own in rows
                for attribute, key, value in held_tensors(m)
                for store, name in owners.get(id(value), ())
            ],
            _writes_data=any(_writes_data(own[0]) for _, own in rows),
            _is_delicate=any(is_delicate(m) for m, _ in rows),
        )

    def _bring_over(self) -> None:
        """Members' modules, plain attributes, modes and hooks follow what has changed in `inner`."""
        if torch.compiler.is_compiling():  # a compiler guards modes, and follows no more
            for noted, members in self._was:
                for own in members:
                    if own.training != noted.module.training:
                        own.training = noted.module.training
        elif not all(noted.holds() for noted, _ in self._was):
            memos: list[dict[int, Any]] = [{} for _ in self._members]  # what modules share, a member's share, too
            for noted, members in self._was:
                for own, memo in zip(members, memos, strict=True):
                    noted.bring_over(own, memo)
            self._note()

    def train(self, mode: bool = True) -> PerMember:
        with self._turn:
            self._bring_over()
            laid = self._lay_in()
            for k, member in enumerate(self._members):
                member.train(mode)  # what a network's own `train` does, it does to each member's own state and tensors
                self._write_back(laid, k)
            for module, like in zip(self._inner.modules(), self._members[0].modules(), strict=True):
                module.training = like.training
            self._note()
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> PerMember:
        with self._turn:
            self._clear()
            for tree in (self._inner, *self._members):
                tree._apply(fn, recurse)
            self._note()
        return self

    # ---- rows of all members ----------------------------------------------------------------------------------------

    def _cut(self, args: tuple, kwargs: dict) -> tuple[int, list[Inputs], Record]:
        """(rows of the first tensor, each member's arguments, what is known of the tensors of such a call)."""
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor and args[0].dim():  # most modules': no need to ask
            x = args[0]
            check_rows(x.shape[0], self._K, self._path, x.shape)
            record = self._batch.setdefault((x.dim(),), Record())
            return x.shape[0], [((part,), {}) for part in self._member_rows(x)], record
        found = leaves((args, kwargs))
        tensors = [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.dim()]
        if not tensors:
            raise PackError(
                f"'{self._path}' got no tensor with samples: name the module that calls it in "
                "pack(..., member_by_member=[...])."
            )
        record = self._batch.setdefault(tuple(t.dim() for t in tensors), Record())
        rows = tensors[0].shape[0]
        belongs = record.inputs([t.shape[0] for t in tensors], [t.shape[0] == rows for t in tensors])
        verdict = iter(belongs)
        first = next((t for t, own in zip(tensors, belongs, strict=True) if own), tensors[0])
        rows = first.shape[0]

        def cut(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.dim() and next(verdict):
                check_rows(leaf.shape[0], self._K, self._path, leaf.shape)
                return self._member_rows(leaf)
            return [leaf] * self._K

        check_rows(rows, self._K, self._path, first.shape)
        return rows, spread(cut, (args, kwargs), self._K), record

    def _member_rows(self, x: Tensor) -> Sequence[Tensor]:
        """Each member's rows; laid out as it would get them alone where its own convolutions might not survive ours."""
        parts = member_rows(x, self._K)
        if not self._is_delicate or not x.is_floating_point():
            return parts
        return [part.clone(memory_format=torch.contiguous_format) for part in parts]

    def _join(self, rows: int, outputs: list, record: Record) -> Any:
        if all(type(output) is Tensor and output.dim() for output in outputs):
            size = outputs[0].shape[0]
            if record.outputs((size,), (size == rows,), self._K)[0]:
                return torch.cat(outputs)
        first = [leaf for leaf in leaves(outputs[0]) if isinstance(leaf, Tensor)]
        sizes = [leaf.shape[0] if leaf.dim() else None for leaf in first]
        verdict = iter(record.outputs(sizes, [size == rows for size in sizes], self._K))

        def join(*parts: Any) -> Any:
            if isinstance(parts[0], Tensor) and next(verdict) and all(isinstance(p, Tensor) and p.dim() for p in parts):
                return torch.cat(parts)
            if any(isinstance(part, Tensor) for part in parts):
                shape = next(tuple(part.shape) for part in parts if isinstance(part, Tensor))
                raise PackError(
                    f"'{self._path}' returned a tensor of {shape} for {rows} rows: name the module that calls it in "
                    "pack(..., member_by_member=[...]), so that it runs member by member, too."
                )
            return self._agreed(*parts)

        return tree_map(join, *outputs)

    def _agreed(self, *parts: Any) -> Any:
        """What all members return alike, other than rows of tensors."""
        alike = all(type(part) is type(parts[0]) and not isinstance(part, Tensor) for part in parts)
        if not alike or any(part != parts[0] for part in parts):
            raise PackError(
                f"'{self._path}' returned a value that is no rows of a tensor and differs between members: name the "
                "module that calls it in pack(..., member_by_member=[...])."
            )
        return parts[0]

    @property
    def __class__(self) -> type:
        """It is of the wrapped module's class to who asks by isinstance: loops look for modules so, to change them."""
        inner = vars(self).get("_inner")
        # A compiler looks up methods by this, which are not the wrapped module's, since they run once a member.
        return type(self) if inner is None or torch._guards.TracingContext.try_get() else type(inner)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _blank, (type(self),), self.__getstate__()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_inner":  # not yet restored by pickle or deepcopy
                raise
        own = [vars(member).get(name) for member in self._members]
        if all(isinstance(value, Tensor) for value in own) and len({value.shape for value in own}) == 1:
            return torch.stack(own)  # what each member's forward has left there
        if name in vars(self._inner) and all(isinstance(value, bool | int | float) for value in own):
            self._bring_over()  # what a user has set since counts
            own = [vars(member)[name] for member in self._members]
            return own[0] if len(set(own)) == 1 else torch.tensor(own)
        value = getattr(self._inner, name)
        if isinstance(value, MethodType) and value.__self__ is self._inner:
            return functools.partial(self._on_rows, name)
        return value

    def __iter__(self) -> Iterator:
        raise PackError(f"'{self._path}' runs member by member, and the code around it takes it apart")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self) or name == "training":
            super().__setattr__(name, value)
        else:
            setattr(self._inner, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> PerMember:
        new = self.__new__(type(self))
        memo[id(self)] = new
        state = self.__getstate__()
        members = state.pop("_members")  # copies already
        inner = deep_copy(state.pop("_inner"), memo)
        new.__setstate__({**copy.deepcopy(state, memo), "_inner": inner, "_members": members})
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Without the members' slices, which only the stacks own."""
        derived = ("_was", "_places", "_aliases", "_writes_data", "_is_delicate")
        state = {name: value for name, value in vars(self).items() if name not in derived}
        return {**state, "_members": [own_module(member) for member in self._members]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._note()


def _blank(kind: type[PerMember]) -> PerMember:
    return kind.__new__(kind)


def _slices(stack: Tensor) -> Sequence[Tensor]:
    """The K slices of a stacked tensor, in its memory: what a module writes into a slice is in the stack."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return stack.unbind(0)
    if not stack.requires_grad:
        # `.data` counts changes for itself: for one member's graph another's forward changes nothing that it has saved.
        return stack.unbind(0) if watched() else [part.data for part in stack.unbind(0)]
    # Where autograd watches, it lets nobody write into what unbind returns, and some modules change their weights.
    return [part.squeeze(0) for part in stack.unsafe_split(1)]


def _writes_data(module: nn.Module) -> bool:
    """Whether code of a user's module assigns to `.data`, in forward or in `train`."""
    return not of_torch(module) and any("data" in read_forward(module, of).stored for of in ("forward", "train"))


def of_torch(module: nn.Module) -> bool:
    """Whether it is a module of torch's own."""
    return type(module).__module__.partition(".")[0] == "torch"


class RecurrentPerMember(PerMember):
    """An RNN, LSTM or GRU with batch_first: (K·N, L, I) → (K·N, L, H) and hidden states (layers, K·N, H)."""

    def _cut(self, args: tuple, kwargs: dict) -> tuple[int, list[Inputs], Record]:
        def bind(input: Any, hx: Any = None) -> tuple:
            return input, hx

        x, hidden = bind(*args, **kwargs)
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise PackError(f"'{self._path}' takes a padded batch (samples, steps, features) in a packed module.")
        check_rows(x.shape[0], self._K, self._path, x.shape)

        def cut(leaf: Tensor | None) -> Any:
            return [None] * self._K if leaf is None else leaf.split([leaf.shape[1] // self._K] * self._K, 1)

        states = spread(cut, hidden, self._K)
        inputs = [((part, state), {}) for part, state in zip(member_rows(x, self._K), states, strict=True)]
        return x.shape[0], inputs, Record()

    def _join(self, rows: int, outputs: list, record: Record) -> Any:
        sequences, states = zip(*outputs, strict=True)
        return torch.cat(sequences), tree_map(lambda *parts: torch.cat(parts, 1), *states)


class AttentionPerMember(PerMember):
    """An nn.MultiheadAttention with batch_first: a 2-D attn_mask belongs to everyone, a 3-D one to the samples."""

    def _cut(self, args: tuple, kwargs: dict) -> tuple[int, list[Inputs], Record]:
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = kwargs.pop("attn_mask", None)
        if kwargs["query"].dim() != 3:
            raise PackError(f"'{self._path}' takes a batch (samples, tokens, features) in a packed module.")
        rows, inputs, record = super()._cut((), kwargs)
        masks = member_rows(mask, self._K) if mask is not None and mask.dim() == 3 else [mask] * self._K
        return rows, [((), {**own, "attn_mask": part}) for (_, own), part in zip(inputs, masks, strict=True)], record


class UnflattenPerMember(PerMember):
    """An nn.Unflatten of dimension 0: a member's rows become other rows, of whatever number, that are its own."""

    def _join(self, rows: int, outputs: list, record: Record) -> Tensor:
        return torch.cat(outputs)


def member_of(shell: PerMember, k: int, memo: dict[int, Any]) -> nn.Module:
    """A copy of member k's module with its own tensors; `memo` maps id of each stacked tensor to member k's own."""
    shell._bring_over()
    new = own_module(shell._members[k])
    for module, own in zip(shell._inner.modules(), new.modules(), strict=True):
        for kind in STORES:
            for name, stack in getattr(module, kind).items():
                if stack is not None:
                    getattr(own, kind)[name] = memo[id(stack)]
        for attribute, key, stack in held_tensors(module):
            if id(stack) in memo:
                vars(own)[attribute][key] = memo[id(stack)]
    for module, own in zip(shell._inner.modules(), new.modules(), strict=True):
        memo.update({id(getattr(module, name)): getattr(own, name) for name in HOOK_STORES})  # for handles elsewhere
    return new


def description(shell: PerMember) -> tuple[str, str, str]:
    """(path, class, why it runs member by member)."""
    return shell._path, type(shell._inner).__name__, f"member by member: {shell._reason}"


def per_member_kind(module: nn.Module) -> type[PerMember]:
    """The class that runs `module` member by member."""
    if isinstance(module, nn.RNNBase):
        return RecurrentPerMember
    if isinstance(module, nn.Unflatten):
        return UnflattenPerMember
    return AttentionPerMember if type(module) is nn.MultiheadAttention else PerMember
