"""The one place that launches Triton kernels; a recorder in its way lets what would run be compiled elsewhere."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from .handles import TENSORS, Signature, descriptor_class, kept, make_room, triton_parts, watched
from .problem import PLAIN, PLAIN_GRADIENT, Epilogue, GradientEpilogue, Prologue

GRID_LIMIT = 2**31 - 1  # programs along x, where all that grows with the batch lies
GRID_LIMITS = (GRID_LIMIT, 2**16 - 1, 2**16 - 1)  # along x, y and z

_recorder: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("launches are recorded", default=None)
# Dispatch modes that note what runs and change nothing: what happens under them is what happens without.
onlookers: contextvars.ContextVar[int] = contextvars.ContextVar("modes that only look on", default=0)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the kernel, its grid, its arguments by name (constexprs among them) and its resources."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int

    def specialisation(self) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[Any]]]:
        """(signature, constants, attributes) as triton.compiler.ASTSource takes them: what the JIT would compile."""
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[Any]] = {}
        for i, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            kind, divisible = _kind(value)
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            signature[parameter.name] = kind
            if divisible:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return signature, constants, attributes


class _View:
    """A descriptor that Triton found right, without its tensor."""

    def __init__(self, made: Any):
        self.fields = {name: value for name, value in vars(made).items() if name != "base"}
        self.fields["view"] = self


_views: dict[tuple[Any, ...], _View] = {}


def descriptor(x: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> Any:
    """Memory of x, seen in `shape` and `strides`, as the copy engine reads it and writes it, a block at a time."""
    if type(x) not in TENSORS or x.data_ptr() % 16:
        return descriptor_class()(x, list(shape), list(strides), list(block))
    key = tuple(shape), tuple(strides), tuple(block), x.dtype
    view = _views.get(key)
    if view is None:
        made = descriptor_class()(x, *map(list, key[:3]))
        if not hasattr(made, "__dict__"):
            return made
        make_room(_views)
        view = _views[key] = _View(made)
    made = object.__new__(descriptor_class())
    made.__dict__.update(view.fields)
    made.base = x
    return made


def around(
    epilogue: Epilogue = PLAIN, prologue: Prologue | None = None, gradient: GradientEpilogue = PLAIN_GRADIENT
) -> dict[str, Any]:
    """Kernel arguments: the tensors (None where absent, the residual as it is) and compile-time flags."""
    e, p, g = epilogue, prologue, gradient
    return dict(
        bias=e.bias, scale=e.scale, shift=e.shift, residual=e.residual, moments=e.moments,
        BIAS=e.bias is not None, AFFINE=e.scale is not None, RESIDUAL=e.residual is not None,
        MOMENTS=e.moments is not None, RELU=e.relu,
        in_scale=p and p.scale, in_shift=p and p.shift, PROLOGUE=p is not None, IN_RELU=bool(p and p.relu),
        added=g.added, raw=g.raw, joined=g.joined, mean=g.mean, rstd=g.rstd, gamma=g.gamma, beta=g.beta, sums=g.sums,
        GATED=g.gated,
    )  # fmt: skip


class Fixed(dict[str, Any]):
    """Arguments by name that nobody changes once they are made, and the ways in which kernels were called with them."""

    __slots__ = ("calls",)

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.calls: dict[tuple[Any, ...], Signature] = {}


_NOTHING_FIXED = Fixed()


def launch(
    kernel: Any, grid: tuple[int, ...], warps: int, stages: int, fixed: Fixed = _NOTHING_FIXED, /, **arguments: Any
) -> None:
    """Run `kernel` on `grid`, on the device of its first tensor; or record it. The arguments are these and `fixed`."""
    programs = _whole(grid)
    if programs is None:
        raise BackendError(
            f"{kernel.__name__} would take a grid of {grid} programs, and a GPU's largest is {GRID_LIMITS}: "
            'use fewer members or channels, or decompk.backend("torch").'
        )
    recorded = _recorder.get()
    if recorded is not None:
        recorded.append(Launch(kernel, grid, {**arguments, **fixed}, warps, stages))
        return
    if not hasattr(kernel, "device_caches") or watched(kernel):  # only the compiler has these caches
        _launch(kernel, grid, warps, stages, fixed, arguments)
        return
    values = tuple(arguments.values())
    kind = id(kernel), warps, stages, tuple(arguments), tuple(map(type, values))
    call = fixed.calls.get(kind)
    if call is None:
        make_room(fixed.calls)
        call = fixed.calls[kind] = Signature(kernel, *kind[3:])
    key = call.key(values)
    if handle := call.handles.get(key):
        handle.launch(programs, values)
        return
    compiled = _launch(kernel, grid, warps, stages, fixed, arguments)
    if key is not None and key not in call.handles and isinstance(compiled, triton_parts().CompiledKernel):
        make_room(call.handles)
        call.handles[key] = kept(call, compiled, key[0], fixed, values)


def _launch(
    kernel: Any, grid: tuple[int, ...], warps: int, stages: int, fixed: Fixed, arguments: dict[str, Any]
) -> Any:
    """The launch as Triton does it; returns what it compiled."""
    values = (a.base if isinstance(a, descriptor_class()) else a for a in arguments.values())
    device = next(value.device for value in values if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return kernel[grid](**arguments, **fixed, num_warps=warps, num_stages=stages)


@functools.lru_cache(maxsize=4096)
def _whole(grid: tuple[int, ...]) -> tuple[int, ...] | None:
    """Programs along x, y and z; None where they are more than a GPU takes."""
    whole = (*grid, 1, 1)[:3]
    return None if any(map(operator.gt, whole, GRID_LIMITS)) else whole


@contextlib.contextmanager
def recording(onlooker: Any = None) -> Iterator[list[Any]]:
    """While it runs nothing is launched: the launches are appended to the list it gives, a backward's among them.

    onlooker: a TorchDispatchMode that notes torch's operators between them in its `launches`, which is then that list.
    """
    launches: list[Any] = [] if onlooker is None else onlooker.launches
    token, others = _recorder.set(launches), onlookers.set(onlookers.get() + (onlooker is not None))
    try:
        # autograd's threads would not see the recorder
        with torch.autograd.set_multithreading_enabled(False), onlooker or contextlib.nullcontext():
            yield launches
    finally:
        _recorder.reset(token)
        onlookers.reset(others)


_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


def _kind(value: Any) -> tuple[str, bool]:
    """(Triton's type, whether it is divisible by 16); storages are taken to be aligned, as torch allocates them."""
    if isinstance(value, descriptor_class()):
        return f"tensordesc<{_NAMES[value.base.dtype]}{list(value.block_shape)}>", False
    if isinstance(value, Tensor):
        return f"*{_NAMES[value.dtype]}", value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
    return "fp32", False
