"""Kernels that were compiled, and how they are launched again without asking Triton.

Triton binds, types and looks up 50 to 60 arguments a launch, and encodes every descriptor anew. Most of them are the
same whenever one (problem, config) is launched: those are a `launch.Fixed`, which keeps a handle of each kernel
compiled with it. A handle is used again where all that Triton would compile for is as it was: only the other arguments
are looked at.

    None, bool, int, str    the value, which decides more than Triton asks (is it 1, divisible by 16, of 32 bits)
    float                   nothing: Triton never compiles for its value
    tensor                  its dtype, and whether it starts at a multiple of 16 bytes
    descriptor              its shape, strides, block and dtype

and the kernel, warps, stages, device and Triton's driver. Anything else is launched by Triton alone, as is everything
while somebody watches (Triton's hooks, TRITON_DEBUG), in the interpreter, and where Triton is not as known here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

TENSORS = (Tensor, Parameter)  # a subclass may mean anything by its address
ROOM = 1024  # entries of a table that grows with what is met


def make_room(table: dict[Any, Any]) -> None:
    if len(table) >= ROOM:
        table.clear()


@functools.cache
def descriptor_class() -> Any:
    """Triton's tensor descriptor, loaded with the first kernel that is launched."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor


class Signature:
    """One way to call a kernel: which arguments are given by name, of which types; and handles for what they hold."""

    def __init__(self, kernel: Any, names: tuple[str, ...], types: tuple[type, ...]):
        self.kernel, self.names = kernel, names  # kept, so that its id stays its own

        def places(*wanted: type) -> list[int]:
            return [i for i, kind in enumerate(types) if kind in wanted]

        self.tensors, self.descriptors = places(*TENSORS), places(descriptor_class())
        self.values, self.floats = places(bool, int, str), places(float)
        known = len(self.tensors) + len(self.descriptors) + len(self.values) + len(self.floats)
        self.known = known + types.count(type(None)) == len(types) and bool(self.tensors or self.descriptors)
        self.handles: dict[tuple[Any, ...] | None, Handle | None] = {}

    def key(self, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The device, and what else decides the machine code; None where that is not known."""
        if not self.known:
            return None
        tensors = [values[i] for i in self.tensors]
        views = [getattr(values[i], "view", None) for i in self.descriptors]
        if None in views:
            return None
        active = triton_parts().driver.active
        device = (tensors[0] if tensors else values[self.descriptors[0]].base).get_device()
        return (
            active.get_current_device() if device < 0 else device,
            active,
            *views,
            *[x.dtype for x in tensors],
            *[x.data_ptr() % 16 == 0 for x in tensors],
            *[values[i] for i in self.values],
        )


def watched(kernel: Any) -> bool:
    """Whether somebody hears of launches, or has other code compiled for them."""
    knobs = triton_parts().knobs
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


class Handle:
    """A kernel compiled for one kind of arguments, and how they reach its launcher.

    parts: (place among what is given, what stands before it, encoded before by address, metadata) of each descriptor
    that is encoded here. rest: what stands after them. varying: (place among what is given, place in what is launched).
    """

    def __init__(self, call: Signature, compiled: Any, device: int, fixed: dict[str, Any], values: tuple[Any, ...]):
        self.call, self.compiled, self.device = call, compiled, device  # what is compiled lives as long as it is kept
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata
        self.driver = triton_parts().driver.active
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
                make_room(known)
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


def kept(call: Signature, compiled: Any, device: int, fixed: dict[str, Any], values: tuple[Any, ...]) -> Handle | None:
    """A handle for launches like the one that `compiled` was made for; None where this Triton is not as known here."""
    names = {*call.names, *fixed}
    chosen = {call.names[i] for i in call.floats}
    if (
        not _launchers_are_called_alike()
        or compiled.metadata.target.backend != "cuda"
        or any(p.name not in names or (p.is_constexpr and p.name in chosen) for p in call.kernel.params)
    ):
        return None
    handle = Handle(call, compiled, device, fixed, values)
    with contextlib.suppress(Exception):  # Triton's own launcher encodes them, at every launch
        handle.encode_once(values)
    return handle


@functools.cache
def triton_parts() -> SimpleNamespace:
    """What is used of Triton, loaded with the first kernel that is launched."""
    from triton import compiler, knobs
    from triton.runtime import driver

    return SimpleNamespace(knobs=knobs, driver=driver, CompiledKernel=getattr(compiler, "CompiledKernel", ()))


@functools.cache
def _launchers_are_called_alike() -> bool:
    """Whether Triton calls a kernel's launcher as Handle does: it is shown a kernel that notes how it is called."""
    calls: list[tuple[Any, ...]] = []
    shown = SimpleNamespace(
        _init_handles=lambda: None,
        launch_metadata=lambda *a: None,
        function="function",
        packed_metadata="metadata",
        run=lambda *a: calls.append(a),
    )
    with contextlib.suppress(Exception):
        triton_parts().CompiledKernel.__getitem__(shown, (1, 2, 3))("first", "second", stream=4)
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
