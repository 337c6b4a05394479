"""The one place that launches Triton kernels; a recorder in its way lets what would run be compiled elsewhere.

Triton binds, types and looks up 50 to 60 arguments a launch, and encodes every descriptor anew. Most of them are the
same whenever one (problem, config) is launched: those are a `Fixed`, which keeps a handle of each kernel compiled with
it. A handle is used again where all that Triton would compile for is as it was, so that only the others are looked at:

    None, bool, int, str    the value, which decides more than Triton asks (is it 1, divisible by 16, of 32 bits)
    float                   nothing: Triton never compiles for its value
    tensor                  its dtype, and whether it starts at a multiple of 16 bytes
    descriptor              its shape, strides, block and dtype

and the kernel, warps, stages, device and Triton's driver. Anything else is launched by Triton alone, as is everything
while somebody watches (Triton's hooks, TRITON_DEBUG), in the interpreter, and where Triton is not as known here.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import BackendError
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


@functools.cache
def _descriptors() -> Any:
    """Triton's tensor descriptor, loaded with the first kernel that is launched."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor


class _View:
    """A descriptor that Triton found right, without its tensor."""

    def __init__(self, made: Any):
        self.fields = {name: value for name, value in vars(made).items() if name != "base"}
        self.fields["view"] = self


_views: dict[tuple[Any, ...], _View] = {}


def descriptor(x: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> Any:
    """Memory of x, seen in `shape` and `strides`, as the copy engine reads it and writes it, a block at a time."""
    if type(x) not in _TENSORS or x.data_ptr() % 16:
        return _descriptors()(x, list(shape), list(strides), list(block))
    key = tuple(shape), tuple(strides), tuple(block), x.dtype
    view = _views.get(key)
    if view is None:
        made = _descriptors()(x, *map(list, key[:3]))
        if not hasattr(made, "__dict__"):
            return made
        _make_room(_views)
        view = _views[key] = _View(made)
    made = object.__new__(_descriptors())
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
        self.calls: dict[tuple[Any, ...], _Call] = {}


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
    if not hasattr(kernel, "device_caches") or _watched(kernel):  # only the compiler has these caches
        _launch(kernel, grid, warps, stages, fixed, arguments)
        return
    values = tuple(arguments.values())
    kind = id(kernel), warps, stages, tuple(arguments), tuple(map(type, values))
    call = fixed.calls.get(kind)
    if call is None:
        _make_room(fixed.calls)
        call = fixed.calls[kind] = _Call(kernel, *kind[3:])
    key = call.key(values)
    if handle := call.handles.get(key):
        handle.launch(programs, values)
        return
    compiled = _launch(kernel, grid, warps, stages, fixed, arguments)
    if key is not None and key not in call.handles and isinstance(compiled, _triton().CompiledKernel):
        _make_room(call.handles)
        call.handles[key] = _handle(call, compiled, key[0], fixed, values)


def _launch(
    kernel: Any, grid: tuple[int, ...], warps: int, stages: int, fixed: Fixed, arguments: dict[str, Any]
) -> Any:
    """The launch as Triton does it; returns what it compiled."""
    values = (a.base if isinstance(a, _descriptors()) else a for a in arguments.values())
    device = next(value.device for value in values if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return kernel[grid](**arguments, **fixed, num_warps=warps, num_stages=stages)


@functools.lru_cache(maxsize=4096)
def _whole(grid: tuple[int, ...]) -> tuple[int, ...] | None:
    """Programs along x, y and z; None where they are more than a GPU takes."""
    whole = (*grid, 1, 1)[:3]
    return None if any(map(operator.gt, whole, GRID_LIMITS)) else whole


# ---- kept handles ---------------------------------------------------------------------------------------------------


_TENSORS = (Tensor, Parameter)  # a subclass may mean anything by its address
ROOM = 1024  # entries of a table that grows with what is met


def _make_room(table: dict[Any, Any]) -> None:
    if len(table) >= ROOM:
        table.clear()


class _Call:
    """One way to call a kernel: which arguments are given by name, of which types; and handles for what they hold."""

    def __init__(self, kernel: Any, names: tuple[str, ...], types: tuple[type, ...]):
        self.kernel, self.names = kernel, names  # kept, so that its id stays its own

        def places(*wanted: type) -> list[int]:
            return [i for i, kind in enumerate(types) if kind in wanted]

        self.tensors, self.descriptors = places(*_TENSORS), places(_descriptors())
        self.values, self.floats = places(bool, int, str), places(float)
        known = len(self.tensors) + len(self.descriptors) + len(self.values) + len(self.floats)
        self.known = known + types.count(type(None)) == len(types) and bool(self.tensors or self.descriptors)
        self.handles: dict[tuple[Any, ...] | None, _Handle | None] = {}

    def key(self, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The device, and what else decides the machine code; None where that is not known."""
        if not self.known:
            return None
        tensors = [values[i] for i in self.tensors]
        views = [getattr(values[i], "view", None) for i in self.descriptors]
        if None in views:
            return None
        active = _triton().driver.active
        device = (tensors[0] if tensors else values[self.descriptors[0]].base).get_device()
        return (
            active.get_current_device() if device < 0 else device,
            active,
            *views,
            *[x.dtype for x in tensors],
            *[x.data_ptr() % 16 == 0 for x in tensors],
            *[values[i] for i in self.values],
        )


def _watched(kernel: Any) -> bool:
    """Whether somebody hears of launches, or has other code compiled for them."""
    knobs = _triton().knobs
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or getattr(kernel, "pre_run_hooks", None)
        or getattr(runtime, "add_stages_inspection_hook", None)
        or getattr(knobs.compilation, "instrumentation_mode", None)
    )


class _Handle:
    """A kernel compiled for one kind of arguments, and how they reach its launcher.

    parts: (place among what is given, what stands before it, encoded before by address, metadata) of each descriptor
    that is encoded here. rest: what stands after them. varying: (place among what is given, place in what is launched).
    """

    def __init__(self, call: _Call, compiled: Any, device: int, fixed: Fixed, values: tuple[Any, ...]):
        self.call, self.compiled, self.device = call, compiled, device  # what is compiled lives as long as it is kept
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata
        self.driver = _triton().driver.active
        given = {**dict(zip(call.names, values, strict=True)), **fixed}
        self.parts: list[tuple[int, list[Any], dict[int, list[Any]], Any]] = []
        self.rest = [given[parameter.name] for parameter in call.kernel.params]
        at = {parameter.name: i for i, parameter in enumerate(call.kernel.params)}
        self.varying = [(i, at[call.names[i]]) for i in (*call.tensors, *call.floats, *call.descriptors)]
        for _, place in self.varying:
            self.rest[place] = None  # no memory is kept alive

    def launch(self, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        if self.driver.get_current_device() == self.device:
            self._launch(grid, values)
        else:
            with torch.cuda.device(self.device):
                self._launch(grid, values)

    def _launch(self, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        arguments: list[Any] = []
        for i, before, known, metadata in self.parts:
            address = values[i].base.data_ptr()
            encoded = known.get(address)
            if encoded is None:
                _make_room(known)
                encoded = known[address] = _encode(values[i], metadata)
            arguments += before
            arguments += encoded
        arguments += self.rest
        for i, place in self.varying:
            arguments[place] = values[i]
        stream = self.driver.get_current_stream(self.device)
        self.run(*grid, stream, self.function, self.metadata, None, None, None, *arguments)

    def encode_once(self, values: tuple[Any, ...]) -> None:
        """From now on encode a descriptor once for each address, for a launcher of the same kernel that takes them so.

        Encoded, it is its address, its view and what the compiled kernel says of its place, and nothing else: it stays
        right when other memory comes to lie there.
        """
        places = {place: i for i, place in self.varying if i in self.call.descriptors}
        known = getattr(self.compiled.metadata, "tensordesc_meta", None) or []
        if not places or len(known) != len(places) or None in known or not _encodes_alike():
            return
        kinds, parts, start, shift, moved = [], [], 0, 0, {}
        said = iter(known)
        for place, kind in enumerate(self.compiled.src.signature.values()):
            moved[place] = place + shift
            if place not in places:
                kinds.append(kind)
                continue
            i, metadata = places[place], next(said)
            rank = len(values[i].shape)
            parts.append(
                (i, self.rest[start:place], {values[i].base.data_ptr(): _encode(values[i], metadata)}, metadata)
            )
            if any(len(one) != 1 + 2 * rank for one in parts[-1][2].values()):
                return
            kinds += ["nvTmaDesc", *["i32"] * rank, *["i64"] * rank]
            start, shift = place + 1, shift + 2 * rank
        source = SimpleNamespace(fn=self.compiled.src.fn, constants={}, signature=dict(enumerate(kinds)))
        run = self.driver.launcher_cls(source, self.compiled.metadata._replace(tensordesc_meta=None))
        if getattr(run, "kernel_signature", None) == getattr(self.compiled.run, "kernel_signature", None):
            varying = [(i, moved[place]) for i, place in self.varying if place not in places]
            self.run, self.parts, self.rest, self.varying = run, parts, self.rest[start:], varying


def _handle(call: _Call, compiled: Any, device: int, fixed: Fixed, values: tuple[Any, ...]) -> _Handle | None:
    """A handle for launches like the one that `compiled` was made for; None where this Triton is not as known here."""
    names = {*call.names, *fixed}
    chosen = {call.names[i] for i in call.floats}
    if (
        not _launchers_are_called_alike()
        or compiled.metadata.target.backend != "cuda"
        or any(p.name not in names or (p.is_constexpr and p.name in chosen) for p in call.kernel.params)
    ):
        return None
    handle = _Handle(call, compiled, device, fixed, values)
    with contextlib.suppress(Exception):  # Triton's own launcher encodes them, at every launch
        handle.encode_once(values)
    return handle


@functools.cache
def _triton() -> SimpleNamespace:
    """What is used of Triton, loaded with the first kernel that is launched."""
    from triton import compiler, knobs
    from triton.runtime import driver

    return SimpleNamespace(knobs=knobs, driver=driver, CompiledKernel=getattr(compiler, "CompiledKernel", ()))


@functools.cache
def _launchers_are_called_alike() -> bool:
    """Whether Triton calls a kernel's launcher as _Handle does: it is shown a kernel that notes how it is called."""
    calls: list[tuple[Any, ...]] = []
    shown = SimpleNamespace(
        _init_handles=lambda: None,
        launch_metadata=lambda *a: None,
        function="function",
        packed_metadata="metadata",
        run=lambda *a: calls.append(a),
    )
    with contextlib.suppress(Exception):
        _triton().CompiledKernel.__getitem__(shown, (1, 2, 3))("first", "second", stream=4)
    known = (1, 2, 3, 4, "function", "metadata", None)
    return len(calls) == 1 and calls[0][:7] == known and calls[0][9:] == ("first", "second")


@functools.cache
def _encodes_alike() -> bool:
    """Whether Triton translates a descriptor as `_encode` asks it to."""
    from triton.backends.nvidia import driver

    encode = getattr(driver, "make_tensordesc_arg", None)
    parameters = tuple(inspect.signature(encode).parameters) if encode else ()
    return parameters in (("arg", "metadata"), ("arg", "metadata", "_"))  # "_": from Triton 3.8 on


def _encode(descriptor: Any, metadata: Any) -> list[Any]:
    """What a launcher takes for a descriptor: the copy engine's, sizes and strides."""
    from triton.backends.nvidia.driver import make_tensordesc_arg as encode

    return encode(descriptor, metadata, *[None] * (encode.__code__.co_argcount - 2))


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
    if isinstance(value, _descriptors()):
        return f"tensordesc<{_NAMES[value.base.dtype]}{list(value.block_shape)}>", False
    if isinstance(value, Tensor):
        return f"*{_NAMES[value.dtype]}", value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
    return "fp32", False
