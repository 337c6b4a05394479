"""What a training step launches: Triton's kernels noted as they are launched, torch's operators as kernels of theirs.

Where launches are noted instead of made, torch's operators compute nothing either, so that a step of any size takes no
time and touches no memory. On a CPU it is torch's way there that is noted: dropout alone takes more operators in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from decompk.kernels.launch import Launch, recording

LAUNCH_MS = 0.0025  # as dispatch's model has it; here, too, for checkouts that are older than that
# Bytes a millisecond, assumed and not measured, and the bytes up to which a launch is served by L2.
MEMORY, L2, CACHED = 2.8e9, 4.5e9, 25e6

# One call of a foreach or fused function is several kernels: so many tensors each, by tensors in a row (depth), and so
# many blocks of so many elements. As torch is built for CUDA 12; for CUDA 13 a kernel takes seven times as much.
TENSORS, BLOCKS, CHUNK = (110, 64, 48, 36, 30), 320, 65536


@dataclass(frozen=True)
class Row:
    """A launch, or an operator of torch's that takes several: what ran, the bytes it reads and writes, on what."""

    name: str
    launches: int
    bytes: int
    tensors: tuple[str, ...] = ()  # "4×128×16 bfloat16", in the order of the arguments, results last

    @property
    def ms(self) -> float:
        """By the model."""
        return model_ms(self.launches, self.bytes)


def model_ms(launches: int, moved: int) -> float:
    """Milliseconds of `launches` alike that move so many bytes together."""
    return launches * LAUNCH_MS + moved / (MEMORY if moved > launches * CACHED else L2)


class Onlooker(TorchDispatchMode):
    """Notes in `launches` what torch's operators would launch, as Rows, and lets them make their results unfilled."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Any] = _Rows()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = operator._schema
        if schema.name in OPDEFS:  # written in Python: of kernels and operators, which are looked on in their turn
            with self:
                return OPDEFS[schema.name]._init_fn(*args, **kwargs)
        name = schema.name.rpartition("::")[2]
        if operator.is_view or name in _NO_KERNEL or operator.namespace not in ("aten", "prims", "decompk"):
            return operator(*args, **kwargs)
        written = [value for value, argument in _bound(schema, args, kwargs) if _writes(argument)]
        results = tree_leaves(written) if written else _unfilled(operator, args, kwargs)
        outputs = _tensors(results)
        if any(t.numel() for t in outputs):
            fresh = {a.name for a in schema.arguments if a.is_out}  # written over, not read
            inputs = _read(name, args, {k: value for k, value in kwargs.items() if k not in fresh})
            moved = sum(map(_size, [*inputs, *outputs]))  # what is changed in place stands in both
            self.launches.append(Row(name, _kernels(name, args), moved, _described([*inputs, *outputs])))
        if not written:
            return results
        returned = [value for value in written if not isinstance(value, list | tuple)]
        return None if not schema.returns else returned[0] if len(returned) == 1 else tuple(returned)


class _Rows(list[Any]):
    """Each launch as a Row from the first, so that no tensor is kept."""

    def append(self, one: Launch | Row) -> None:
        super().append(row(one))


_NO_KERNEL = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "lift_fresh"}
_NO_KERNEL |= {"detach", "alias", "_unsafe_view", "_reshape_alias", "unsafe_split", "unsafe_chunk", "as_strided_"}
_NO_KERNEL |= {"unsafe_split_with_sizes", "resize_", "set_", "record_stream", "_local_scalar_dense"}
# The place of an argument of which an operator reads the shape alone.
_UNREAD = dict.fromkeys(("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_"), 0)
_UNREAD |= dict.fromkeys(("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"), 0)
_UNREAD |= {"max_pool2d_with_indices_backward": 1, "nll_loss_backward": 1}


def _read(name: str, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator reads, each as often as its kernels do together."""
    if name == "convolution_backward":
        (dy, x, weight), (dgrad, wgrad, bias) = args[:3], args[-1]
        return [*(dy, weight) * dgrad, *(dy, x) * wgrad, *(dy,) * bias]
    return _tensors(([value for i, value in enumerate(args) if i != _UNREAD.get(name)], kwargs))


def _bound(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Each argument that was given, with its place in the schema."""
    for i, argument in enumerate(schema.arguments):
        if i < len(args) or argument.name in kwargs:
            yield (args[i] if i < len(args) else kwargs[argument.name]), argument


def _writes(argument: Any) -> bool:
    """Whether an operator does; fused optimizers say so of gradients, too, which they only scale for a scaler."""
    return argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"


def _unfilled(operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Results as the operator would make them, of memory that nobody has written."""

    def absent(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    found = tree_leaves((args, kwargs))
    device = kwargs.get("device") or next((t.device for t in found if isinstance(t, Tensor)), torch.device("cpu"))
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
        if name.startswith("_fused_adam"):
            lists.pop()  # the step counts go beside the others
        return _chunked([t.numel() for t in lists[0]], TENSORS[len(lists) - 1])
    return 1


def _chunked(sizes: Sequence[int], most: int) -> int:
    """Kernels for tensors of these sizes, each of which takes `most` tensors or BLOCKS blocks."""
    kernels = tensors = blocks = 0
    for n in filter(None, sizes):
        tensors += 1
        for left in reversed(range(-(-n // CHUNK))):  # blocks of this tensor that are still to come
            blocks += 1
            if blocks == BLOCKS or (tensors == most and not left):
                kernels, blocks, tensors = kernels + 1, 0, int(left > 0)
    return kernels + (blocks > 0)


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _size(t: Tensor) -> int:
    """Bytes that t really has: what was expanded is read once."""
    size = t.element_size()
    for n, stride in zip(t.shape, t.stride(), strict=True):
        size *= n if stride else 1
    return size if t.numel() else 0


def _described(tensors: Sequence[Tensor]) -> tuple[str, ...]:
    if len(tensors) > 12:
        return (f"{len(tensors)} tensors",)
    return tuple(f"{'×'.join(map(str, t.shape)) or 'scalar'} {str(t.dtype).removeprefix('torch.')}" for t in tensors)


def row(one: Launch | Row) -> Row:
    """A launch of Triton's with each of its tensors once; views of one tensor are parts of it."""
    if isinstance(one, Row):
        return one
    tensors = [getattr(value, "base", value) for value in one.arguments.values()]
    distinct = {(t.data_ptr(), t.shape): t for t in tensors if isinstance(t, Tensor)}.values()
    return Row(one.kernel.__name__, 1, sum(map(_size, distinct)), _described([*distinct]))


def rows_of(step: Callable[[], Any]) -> list[Row]:
    """What `step` launches, in order; none of it runs."""
    with recording(Onlooker()) as launches:
        step()
    return list(launches)
