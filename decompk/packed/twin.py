"""What all member-aware layers share: the packed batch, its members' rows, and the two layouts of K activations."""

from __future__ import annotations

import contextlib
import contextvars
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..errors import PackError
from ..fx.pytree import leaves
from ..kernels.layout import side_by_side

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

batch_rows = contextvars.ContextVar("K·N of the packed batch under way", default=0)


@contextlib.contextmanager
def packed_batch(rows: int) -> Iterator[None]:
    """While it runs, every layer checks that what it gets is a whole number of batches of `rows` = K·N."""
    token = batch_rows.set(rows)
    try:
        yield
    finally:
        batch_rows.reset(token)


def check_rows(count: int, K: int, path: str, shape: torch.Size) -> None:
    """Raise PackError where dimension 0 cannot be the packed batch: its rows would go to the wrong members."""
    # A traced ContextVar would be a constant, so a compiled network checks against K alone.
    rows = K if torch.compiler.is_compiling() else batch_rows.get() or K
    if count % rows:
        raise PackError(
            f"'{path}' got an input of {tuple(shape)}, whose dimension 0 is not a multiple of the packed batch of "
            f"{rows} rows: name the module that calls it so in pack(..., member_by_member=[...])."
        )


class Record:
    """Which tensors of one kind of call belong to the batch: found in a rehearsal, where a size tells, else guessed."""

    def __init__(self) -> None:
        self._inputs: tuple[bool, ...] | None = None
        self._outputs: tuple[bool, ...] | None = None

    def inputs(self, sizes: Sequence[int], guess: Sequence[bool]) -> Sequence[bool]:
        """`sizes`: of dimension 0 of each tensor, where rows of all K members would be."""
        if rows := _rehearsal_rows():
            self._inputs = tuple(size > 0 and size % rows == 0 for size in sizes)
        return guess if self._inputs is None else self._inputs

    def outputs(self, sizes: Sequence[int | None], guess: Sequence[bool], K: int) -> Sequence[bool]:
        """`sizes`: of dimension 0 of each tensor that one member returns, None where it has no dimension."""
        if rows := _rehearsal_rows():
            self._outputs = tuple(size not in (None, 0) and size % (rows // K) == 0 for size in sizes)
        return guess if self._outputs is None or len(self._outputs) != len(sizes) else self._outputs


_rehearsing = contextvars.ContextVar("K·N of the rehearsal under way", default=0)


def _rehearsal_rows() -> int:
    return 0 if torch.compiler.is_compiling() else _rehearsing.get()


@contextlib.contextmanager
def rehearsal_of(rows: int) -> Iterator[None]:
    """While it runs, K·N = `rows` samples are under way, and no other tensor's size is a multiple of that."""
    token = _rehearsing.set(rows)
    try:
        with packed_batch(rows):
            yield
    finally:
        _rehearsing.reset(token)


class Twin:
    """Mixin of a torch leaf whose parameters and statistics have a leading dimension of K members.

    Everything else stays the leaf's own. The input is member-major: (K·N, …), all rows of member 0 first.
    """

    _twin_K: int
    _twin_path: str
    _twin_class: type[nn.Module]
    _twin_dims: int | None = None
    _twin_contiguous = False  # for a `view` behind it: images come out channels first, as a member alone lays them out

    @classmethod
    def _twin_fits(cls, leaf: nn.Module) -> bool:
        """Whether this leaf needs its twin and has one; without tensors of its own it runs as it is."""
        return any(t is not None for t in (*leaf._parameters.values(), *leaf._buffers.values()))

    @classmethod
    def _twin_adopt(cls, leaf: nn.Module, K: int, path: str) -> None:
        """Turn a leaf that already holds the stacked tensors into its twin, in place."""
        vars(leaf).update(_twin_K=K, _twin_path=path, _twin_class=type(leaf))
        leaf.__class__ = cls

    def _twin_release(self) -> None:
        """Turn a twin that already holds one member's tensors back into an ordinary leaf, in place."""
        self.__class__ = vars(self).pop("_twin_class")
        del self._twin_K, self._twin_path
        vars(self).pop("_twin_contiguous", None)

    def reset_parameters(self) -> None:
        """Initialise every member as the leaf does: from its own fan-in, which the stack does not have."""
        stacks = dict(self._parameters)
        try:
            for k in range(self._twin_K):
                for name, stack in stacks.items():
                    self._parameters[name] = None if stack is None else nn.Parameter(stack.detach()[k])
                super().reset_parameters()
        finally:
            self._parameters.update(stacks)

    def _twin_check(self, x: Tensor, channels: int | None = None) -> None:
        """Raise PackError where x does not have the dimensions, the packed batch's rows or these many channels."""
        if not isinstance(x, Tensor):
            raise PackError(f"'{self._twin_path}' takes a tensor, and got {type(x).__name__}.")
        if self._twin_dims is not None and x.dim() != self._twin_dims:
            raise PackError(
                f"'{self._twin_path}' got an input of {tuple(x.shape)}: in a packed module {self._get_name()} takes "
                f"{self._twin_dims} dimensions, the samples first."
            )
        check_rows(x.shape[0] if x.dim() else 1, self._twin_K, self._twin_path, x.shape)
        if channels is not None and x.dim() > 1 and x.shape[1] != channels:
            raise PackError(f"'{self._twin_path}' takes {channels} channels, and got an input of {tuple(x.shape)}.")

    def _twin_laid_out(self, y: Tensor) -> Tensor:
        return y.contiguous() if self._twin_contiguous else y

    def _twin_each(self, function: Callable[..., Tensor], x: Tensor, *stacks: Any) -> Tensor:
        """Concatenate `function(x_k, *slices_k)` over members; a stack is a (K, …) tensor, a sequence of K, or None."""
        columns = [(None,) * self._twin_K if s is None else s.unbind(0) if isinstance(s, Tensor) else s for s in stacks]
        return torch.cat([function(*row) for row in zip(member_rows(x, self._twin_K), *columns, strict=True)])


def member_rows(x: Tensor, K: int) -> tuple[Tensor, ...]:
    """(K·N, …) → K views (N, …). Its backward is a concatenation, which keeps channels_last."""
    return x.split([x.shape[0] // K] * K)


def channel_grouped(x: Tensor, K: int) -> Tensor:
    """(K·N, c, *spatial) → (N, K·c, *spatial): members as channel groups; images stay channels_last."""
    samples = (K, x.shape[0] // K)
    if x.dim() == 4:  # in this order of views the gradients are channels_last, too
        return side_by_side(x.permute(0, 2, 3, 1).unflatten(0, samples).movedim(-1, 2))
    return side_by_side(x.unflatten(0, samples))


def member_major(x: Tensor, K: int) -> Tensor:
    """(N, K·c, *spatial) → (K·N, c, *spatial): the inverse of `channel_grouped`."""
    groups = (K, x.shape[1] // K)
    if x.dim() == 4:
        return x.permute(0, 2, 3, 1).unflatten(3, groups).permute(3, 0, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)
    return x.unflatten(1, groups).transpose(0, 1).flatten(0, 1)


def dotted(path: str, name: str) -> str:
    """The full name of what is called `name` in the module at `path`; either may be empty."""
    return f"{path}.{name}" if path and name else path or name


class _Computed(TorchFunctionMode):
    """While it is on, a tensor that was computed is copied like any other; torch copies leaves of its graph alone."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args[0], args[1] if len(args) > 1 else kwargs["memo"]
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return function(*args, **(kwargs or {}))


def deep_copy(value: Any, memo: dict[int, Any]) -> Any:
    """copy.deepcopy, also of what holds computed tensors, as hooks and caches of weights leave them behind.

    Handles of hooks that are gone stay what they are: torch cannot copy them.
    """
    modules = value.modules() if isinstance(value, nn.Module) else ()
    held = (leaf for m in modules for part in vars(m).values() if type(part) not in _ATOMS for leaf in leaves(part))
    handles = (leaf for leaf in held if isinstance(leaf, RemovableHandle))
    memo.update({id(h): h for h in handles if any(part is None for part in h.__getstate__())})
    with _Computed():
        return _copied(value, memo)


_ATOMS = {bool, int, float, str, type(None)}


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """copy.deepcopy, in a third of the time for modules, which are dictionaries of mostly empty dictionaries."""
    kind = type(value)
    default = getattr(object, "__getstate__", None)
    if not isinstance(value, nn.Module) or hasattr(kind, "__deepcopy__") or "__deepcopy__" in vars(value):
        return copy.deepcopy(value, memo)
    if kind.__reduce_ex__ is not object.__reduce_ex__ or getattr(kind, "__getstate__", None) is not default:
        return copy.deepcopy(value, memo)
    if id(value) in memo:
        return memo[id(value)]
    new = memo[id(value)] = kind.__new__(kind)
    state = {}
    for name, part in vars(value).items():
        if type(part) in _ATOMS:
            state[name] = part
        elif id(part) in memo:
            state[name] = memo[id(part)]
        elif type(part) in (dict, OrderedDict) and (not part or name == "_modules"):
            state[name] = memo[id(part)] = type(part)()
            state[name].update({key: _copied(child, memo) for key, child in part.items()})
        else:
            state[name] = copy.deepcopy(part, memo)
    new.__setstate__(state)
    return new
