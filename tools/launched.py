"""What a training step launches: Triton's kernels noted as they are launched, torch's operators as kernels of theirs.

Where launches are noted instead of made, torch's operators compute nothing either, so that a step of any size takes no
time and touches no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from decompk.kernels.launch import Launch, recording

LAUNCH_MS = 0.0025  # of a kernel in a captured graph, as all rates here not measured
MEMORY, L2, CACHED = 2.8e9, 4.5e9, 25e6  # bytes a millisecond, and the bytes up to which a launch is served by L2

# One call of a foreach or fused function is several kernels: so many tensors each, by tensors in a row (depth), and so
# many blocks of so many elements.
TENSORS, BLOCKS, CHUNK = (110, 64, 48, 36, 30), 320, 65536


@dataclass(frozen=True)
class Row:
    """A launch, or an operator of torch's that takes several: what ran, and the bytes it reads and writes."""

    name: str
    launches: int
    bytes: int

    @property
    def ms(self) -> float:
        """By the model."""
        rate = MEMORY if self.bytes > CACHED else L2
        return self.launches * LAUNCH_MS + self.bytes / rate


class Onlooker(TorchDispatchMode):
    """Notes in `launches` what torch's operators would launch, as Rows, and lets them make their results unfilled."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Any] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None):
        kwargs = kwargs or {}
        schema = operator._schema
        name = schema.name.removeprefix("aten::")
        if operator.is_view or name in _NO_KERNEL or operator.namespace not in ("aten", "prims"):
            return operator(*args, **kwargs)
        written = [value for value, argument in _bound(schema, args, kwargs) if _writes(argument)]
        results = tree_leaves(written) if written else _unfilled(operator, args, kwargs)
        read = [value for i, value in enumerate(args) if i != _UNREAD.get(name)]
        inputs, outputs = _tensors((read, kwargs)), _tensors(results)
        if any(t.numel() for t in outputs):
            moved = sum(map(_size, [*inputs, *outputs]))  # what is changed in place stands in both
            self.launches.append(Row(name, _kernels(name, args), moved))
        if not written:
            return results
        returned = [value for value in written if not isinstance(value, list | tuple)]
        return None if not schema.returns else returned[0] if len(returned) == 1 else tuple(returned)


_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "alias"}
_NO_KERNEL |= {
    "_unsafe_view",
    "_reshape_alias",
    "record_stream",
    "resize_",
    "set_",
    "_local_scalar_dense",
    "as_strided_",
}
_UNREAD = dict.fromkeys(("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_"), 0)  # the place of an argument
_UNREAD["max_pool2d_with_indices_backward"] = 1


def _bound(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Each argument that was given, with its place in the schema."""
    for i, argument in enumerate(schema.arguments):
        if i < len(args) or argument.name in kwargs:
            yield (args[i] if i < len(args) else kwargs[argument.name]), argument


def _writes(argument: Any) -> bool:
    """Whether an operator does; torch's fused optimizers say so of gradients, too, which they only scale for a scaler."""
    return argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"


def _unfilled(operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Results as the operator would make them, of memory that nobody has written."""

    def absent(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    found, device = tree_leaves((args, kwargs)), torch.device("cpu")
    device = next((t.device for t in found if isinstance(t, Tensor)), kwargs.get("device") or device)
    kwargs = {**kwargs, "device": torch.device("meta")} if kwargs.get("device") is not None else kwargs
    if not any(isinstance(t, Tensor) for t in found):
        kwargs = {**kwargs, "device": torch.device("meta")}
    results = operator(*tree_map_only(Tensor, absent, args), **tree_map_only(Tensor, absent, kwargs))

    def here(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)

    return tree_map_only(Tensor, here, results)


def _kernels(name: str, args: tuple) -> int:
    """How many kernels an operator is."""
    if name == "convolution_backward":
        return sum(args[-1])
    if name.startswith(("_foreach_", "_fused_")):
        lists = [value for value in args if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor)]
        sizes = [t.numel() for t in lists[0]]
        blocks = sum(-(-n // CHUNK) for n in sizes)
        return max(-(-len(sizes) // TENSORS[min(len(lists), 5) - 1]), -(-blocks // BLOCKS))
    return 1


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _size(t: Tensor) -> int:
    """Bytes that t really has: what was expanded is read once."""
    size = t.element_size()
    for n, stride in zip(t.shape, t.stride(), strict=True):
        size *= n if stride else 1
    return size if t.numel() else 0


def row(one: Launch | Row) -> Row:
    """A launch of Triton's with each of its tensors once; views of one tensor are parts of it."""
    if isinstance(one, Row):
        return one
    tensors = [getattr(value, "base", value) for value in one.arguments.values()]
    distinct = {(t.data_ptr(), t.shape): t for t in tensors if isinstance(t, Tensor)}
    return Row(one.kernel.__name__, 1, sum(map(_size, distinct.values())))


def rows_of(step: Callable[[], Any]) -> list[Row]:
    """What `step` launches, in order; none of it runs."""
    with recording(Onlooker()) as launches:
        step()
    return list(map(row, launches))
