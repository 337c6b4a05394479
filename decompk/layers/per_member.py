"""Modules without a member-aware twin: they run whole, once per member, on that member's slices."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PackError
from ..shell import Shell
from .base import check_rows, split
from .nest import leaves, spread, tree_map

State = tuple[nn.Module, tuple[str, ...], list[dict[str, Any]]]


class PerMember(Shell):
    """Runs `inner` member by member: exact for any module that returns one row per sample.

    The tensors of `inner` are stacked, (K, …). A call cuts every tensor argument with as many rows as the first one
    into K, swaps the slices of member k in, and concatenates the outputs. Other methods of `inner` run the same way.
    `state` lists the submodules whose forward assigns plain attributes: their names, and each member's values.
    """

    def __init__(self, inner: nn.Module, K: int, path: str, reason: str, state: list[State]):
        super().__init__(inner)
        vars(self).update(_K=K, _path=path, _reason=reason, _state=state)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._each_member(self._inner, *args, **kwargs)

    def _each_member(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """`function`, which uses inner's tensors, once per member."""
        rows, inputs = self._cut(args, kwargs)
        stores = [
            (store, name)
            for module in self._inner.modules()
            for store in (module._parameters, module._buffers)
            for name, tensor in store.items()
            if tensor is not None
        ]
        stacks = [store[name] for store, name in stores]
        slices = [_slices(stack) for stack in stacks]
        outputs = []
        try:
            for k, (member_args, member_kwargs) in enumerate(inputs):
                for (store, name), parts in zip(stores, slices, strict=True):
                    store[name] = parts[k]
                self._load_state(k)
                outputs.append(function(*member_args, **member_kwargs))
                self._keep_state(k)
                for (store, name), parts in zip(stores, slices, strict=True):
                    if store[name] is not parts[k]:
                        self._write_back(name, store[name], parts[k])
        finally:
            for (store, name), stack in zip(stores, stacks, strict=True):
                store[name] = stack
        return self._join(rows // self._K, outputs)

    def _cut(self, args: tuple, kwargs: dict) -> tuple[int, list[tuple[tuple, dict]]]:
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        if not tensors:
            raise PackError(
                f"'{self._path}' got no tensor with samples: name the module that calls it in "
                "pack(..., member_by_member=[...])."
            )
        rows = tensors[0].shape[0]
        check_rows(rows, self._K, self._path, tensors[0].shape)

        def cut(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == rows:
                return split(leaf, self._K)
            return [leaf] * self._K

        return rows, spread(cut, (args, kwargs), self._K)

    def _join(self, rows: int, outputs: list) -> Any:
        def join(*parts: Any) -> Any:
            if all(isinstance(part, Tensor) and part.dim() and part.shape[0] == rows for part in parts):
                return torch.cat(parts)
            if any(isinstance(part, Tensor) for part in parts):
                shape = next(tuple(part.shape) for part in parts if isinstance(part, Tensor))
                raise PackError(
                    f"'{self._path}' returned a tensor of {shape} for {rows} rows: name the module that calls it in "
                    "pack(..., member_by_member=[...]), so that it runs member by member, too."
                )
            if any(type(part) is not type(parts[0]) or part != parts[0] for part in parts):
                raise PackError(f"'{self._path}' returned a value that is not a tensor and differs between members.")
            return parts[0]

        return tree_map(join, *outputs)

    def _write_back(self, name: str, new: Tensor, old: Tensor) -> None:
        if new.shape != old.shape or new.dtype != old.dtype:
            raise PackError(
                f"'{self._path}' changed '{name}' from {tuple(old.shape)} {old.dtype} to {tuple(new.shape)} "
                f"{new.dtype} during forward; a packed tensor keeps its shape and dtype."
            )
        with torch.no_grad():
            old.copy_(new)

    def _load_state(self, k: int) -> None:
        """Give inner the plain attributes of member k."""
        for module, names, values in self._state:
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(values[k])

    def _keep_state(self, k: int) -> None:
        for module, names, values in self._state:
            values[k] = {name: vars(module)[name] for name in names if name in vars(module)}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_inner":  # not yet restored by pickle or deepcopy
                raise
        value = getattr(self._inner, name)
        if isinstance(value, MethodType) and value.__self__ is self._inner:
            return functools.partial(self._each_member, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            super().__setattr__(name, value)
        else:
            setattr(self._inner, name, value)


def _slices(stack: Tensor) -> Sequence[Tensor]:
    """The K slices of a stacked tensor, in its memory: what a module writes into a slice is in the stack."""
    if not stack.requires_grad or torch.compiler.is_compiling():
        return stack.unbind(0)
    # Autograd lets nobody write into what unbind returns, and some modules change their weights while they run.
    return [part.squeeze(0) for part in stack.unsafe_split(1)]


class RecurrentPerMember(PerMember):
    """An RNN, LSTM or GRU with batch_first: (K·N, L, I) → (K·N, L, H) and hidden states (layers, K·N, H)."""

    def _cut(self, args: tuple, kwargs: dict) -> tuple[int, list[tuple[tuple, dict]]]:
        def bind(input: Any, hx: Any = None) -> tuple:
            return input, hx

        x, hidden = bind(*args, **kwargs)
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise PackError(f"'{self._path}' takes a padded batch (samples, steps, features) in a packed module.")
        check_rows(x.shape[0], self._K, self._path, x.shape)

        def cut(leaf: Tensor | None) -> Any:
            return [None] * self._K if leaf is None else leaf.split([leaf.shape[1] // self._K] * self._K, 1)

        states = spread(cut, hidden, self._K)
        return x.shape[0], [((part, state), {}) for part, state in zip(split(x, self._K), states, strict=True)]

    def _join(self, rows: int, outputs: list) -> Any:
        sequences, states = zip(*outputs, strict=True)
        return torch.cat(sequences), tree_map(lambda *parts: torch.cat(parts, 1), *states)


class AttentionPerMember(PerMember):
    """An nn.MultiheadAttention with batch_first: a 2-D attn_mask belongs to everyone, a 3-D one to the samples."""

    def _cut(self, args: tuple, kwargs: dict) -> tuple[int, list[tuple[tuple, dict]]]:
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = kwargs.pop("attn_mask", None)
        if kwargs["query"].dim() != 3:
            raise PackError(f"'{self._path}' takes a batch (samples, tokens, features) in a packed module.")
        rows, inputs = super()._cut((), kwargs)
        masks = split(mask, self._K) if mask is not None and mask.dim() == 3 else [mask] * self._K
        return rows, [((), {**own, "attn_mask": part}) for (_, own), part in zip(inputs, masks, strict=True)]


def member_of(shell: PerMember, k: int, memo: dict[int, Any]) -> nn.Module:
    """A copy of what the shell runs, as member k has it; `memo` maps id of each stacked tensor to member k's own."""
    shell._load_state(k)
    return copy.deepcopy(shell._inner, memo)


def description(shell: PerMember) -> tuple[str, str, str]:
    """(path, class, why it runs member by member)."""
    return shell._path, type(shell._inner).__name__, f"member by member: {shell._reason}"


def per_member_kind(module: nn.Module) -> type[PerMember]:
    """The class that runs `module` member by member."""
    if isinstance(module, nn.RNNBase):
        return RecurrentPerMember
    return AttentionPerMember if type(module) is nn.MultiheadAttention else PerMember
