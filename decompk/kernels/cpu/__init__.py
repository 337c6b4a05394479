"""Convolutions and norms of K members on a CPU: C++ that is compiled here, once, for this very processor."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import cache

SOURCES = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fPIC",
    "-fopenmp",
    "-Wno-psabi",
)
COMPILERS = ("c++", "g++", "clang++")

DIRECT, WINOGRAD, BY_CHANNEL = "direct", "winograd", "by channel"
BY = {DIRECT: 0, WINOGRAD: 1, BY_CHANNEL: 2}  # how a layer is computed, as functions.h has it

_pointer, _int, _long, _double = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_double
_SIGNATURES = {
    "dgrad": [_pointer] * 4,
    "wgrad": [_pointer] * 4,
    "winograd_dgrad": [_pointer] * 4,
    "winograd_wgrad": [_pointer] * 4,
    "layer": [_pointer] * 11 + [_int, _double, _double, _int, _pointer],
    "layer_backward": [_pointer] * 6 + [_int] + [_pointer] * 6 + [_int, _pointer],
    "batch_norm": [_pointer] * 8 + [_int, _int, _double, _double] + [_long] * 3,
    "batch_norm_backward": [_pointer] * 4 + [_int, _int] + [_pointer] * 4 + [_long] * 3,
    "stretch": [_pointer, _long, _long] + [_pointer] * 4,
    "stretch_backward": [_pointer, _long, _long] + [_pointer] * 6 + [_long] + [_pointer] * 2,
    "max_pool": [_pointer] * 4,
    "max_unpool": [_pointer] * 4,
    "layer_norm": [_pointer] * 5 + [_double] + [_long] * 3,
    "layer_norm_backward": [_pointer] * 7 + [_long] * 3,
}


@functools.cache
def why_not() -> str | None:
    """Why these kernels cannot run here, None where they can: compiles them where that has not been done yet."""
    if torch.version.hip is not None or os.name != "posix" or os.uname().sysname != "Linux":
        return "they are built on Linux alone"
    try:
        _opened()
    except (OSError, subprocess.SubprocessError) as error:
        return _reason(error)
    return None


def where() -> str:
    """Where the library is, and why it is not in the cache where it is not. Raises what `why_not` says."""
    return _opened()[1]


@functools.cache
def library() -> ctypes.CDLL:
    return _opened()[0]


@functools.cache
def _opened() -> tuple[ctypes.CDLL, str]:
    """The library and where it is: from the cache, built if there is none that is whole and loads; else a private one.

    Raises OSError and SubprocessError where none can be built, or what was built does not load.
    """
    compiler = _compiler()
    path = cache.folder() / _name(compiler)
    made = None
    try:
        cache.prepare(path.parent)
        with contextlib.suppress(OSError):
            return _load(path.name, cache.read_code(path)), f"in {cache.shown(path)}"
        with cache.lock(path):  # the second of two processes finds what the first has built
            was = ""
            try:
                return _load(path.name, cache.read_code(path)), f"in {cache.shown(path)}"
            except FileNotFoundError:
                pass
            except OSError as error:
                was = f", built again: {_reason(error)}"
            made = _compiled(path.parent if cache.alone(path.parent) else None, path.name)
            cache.write_code(path, made)
            return _load(path.name, made), f"in {cache.shown(path)}{was}"
    except OSError as error:
        unusable = _reason(error)
    library = _load(path.name, made or _compiled(None, path.name))
    return library, f"built for this process alone: {cache.shown(path.parent)} cannot be used ({unusable})"


def _reason(error: Exception) -> str:
    """What an error says, without its number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror


def _load(name: str, content: bytes) -> ctypes.CDLL:
    """The library of these bytes: the ones that were checked, whatever has become of their file since."""
    try:
        descriptor = os.memfd_create(name)
        with open(descriptor, "wb", closefd=False) as file:  # stays open: for the loader its number is the library
            file.write(content)
        return _functions(f"/proc/self/fd/{descriptor}")
    except (AttributeError, OSError) as error:  # a library that does not load, or a system that runs no such files
        with tempfile.TemporaryDirectory(prefix="decompk-", ignore_cleanup_errors=True) as private:
            path = Path(private) / name
            try:
                path.write_bytes(content)
            except OSError:
                raise error from None
            return _functions(str(path))


def _functions(file: str) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(file)
    except OSError as error:
        raise OSError(f"the library does not load: {error}") from error
    for name, signature in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            raise OSError(f"the library has no function {name}")
        function.argtypes, function.restype = signature, None
    keep_freed_memory()
    return library


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keeps_memory() -> bool:
    """Whether freed memory stays with the process: unless DECOMPK_KEEP_MEMORY=0."""
    return os.environ.get("DECOMPK_KEEP_MEMORY") != "0"


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep what is freed, as torch does on a GPU.

    An activation in fresh pages costs ten times what writing to it does: the kernel has to find and clear them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and keeps_memory():
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26)):
            mallopt(option, value)


def _compiler() -> list[str]:
    compiler = shlex.split(os.environ.get("CXX", "")) or [*filter(None, map(shutil.which, COMPILERS))][:1]
    if not compiler:
        raise FileNotFoundError(f"there is no C++ compiler ({', '.join(COMPILERS)}, or CXX): install one, such as g++")
    return compiler


def _name(compiler: list[str]) -> str:
    """The library's name in the cache: of all that decides what is in it."""
    contents = hashlib.sha256(repr((compiler, FLAGS, cache.processor())).encode())
    for source in (*sorted(SOURCES.glob("*.cpp")), *sorted(SOURCES.glob("*.h"))):
        contents.update(source.read_bytes())
    return f"cpu-{contents.hexdigest()[:16]}.so"


def _compiled(place: Path | None, name: str) -> bytes:
    """The library, built in a folder of its own in `place`, by default where temporary files belong."""
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=place, ignore_cleanup_errors=True) as scratch:
        library = Path(scratch) / name
        build(library, FLAGS)
        return library.read_bytes()


def build(library: Path, flags: Sequence[str], linking: Sequence[str] = ()) -> None:
    """Compile the sources into the shared library `library`; all that is left on the way lies in its folder.

    flags: for the compiler; linking: for the linker. Raises OSError and SubprocessError where that cannot be done.
    """
    compiler, sources = _compiler(), sorted(SOURCES.glob("*.cpp"))
    objects = [str(library.with_name(f"{source.stem}.o")) for source in sources]
    commands = [[*compiler, *flags, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor(len(commands)) as pool:
        list(pool.map(_run, commands, [library.parent] * len(commands)))
    # Linked without -fopenmp: its symbols are then torch's own, and so are its threads.
    _run([*compiler, "-shared", *linking, *objects, "-o", str(library)], library.parent)


def _run(command: list[str], scratch: Path) -> None:
    """Run a compiler, which keeps its own temporary files in `scratch`, too."""
    environment = {**os.environ, "TMPDIR": str(scratch), "LC_ALL": "C"}
    options = dict(stdin=subprocess.DEVNULL, text=True, errors="replace", timeout=300, env=environment)
    found = subprocess.run(command, capture_output=True, **options)
    if found.returncode:
        lines = (line for line in found.stderr.splitlines() if "error" in line or "failed" in line)
        said = next(lines, found.stderr[-200:]).strip()
        raise OSError(f"{command[0]} failed: {said or f'exit status {found.returncode}'}")


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    saved: Tensor,
    training: bool,
    relu: bool,
    momentum: float,
    eps: float,
) -> None:
    """y as `ops.batch_norm` defines it; x, residual, y NHWC without gaps, the rest (K, C). Fills saved (4, K, C)."""
    K, C = saved.shape[1:]
    tensors = map(_at, (x, weight, bias, running_mean, running_var, residual, y, saved))
    library().batch_norm(*tensors, training, relu, momentum, eps, K, x.numel() // (K * C), C)


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    saved: Tensor,
    training: bool,
    relu: bool,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    g: Tensor | None,
) -> None:
    """dx, dweight, dbias and, if it is given, g: dy as the ReLU lets it pass. y: given where a residual was added."""
    K, C = saved.shape[1:]
    before = map(_at, (dy, x, y, saved))
    library().batch_norm_backward(
        *before, training, relu, *map(_at, (dx, dweight, dbias, g)), K, x.numel() // (K * C), C
    )


def layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Sequence[Tensor | None],
    residual: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    saved: Tensor | None,
    relu: int,
    momentum: float,
    eps: float,
    by: str,
    sizes: Any,
) -> None:
    """y = conv(x), and z = relu(norm(y) + residual) by its batch's moments; saved (4, K, O) is filled for the backward.

    x, y, z, residual NHWC without gaps, weight (K, O, kh, kw, C), channel by channel (K, O, kh, kw), the rest (K, O);
    norm: weight, bias, running_mean and running_var, which move. Without a norm, saved and z None, y is relu(conv(x) +
    residual). relu: 0 where there is none, 1, or 6 for a ReLU6. by: one of BY. sizes: Shape in conv.h.
    """
    tensors = map(_at, (x, weight, bias, *norm, residual, y, z, saved))
    library().layer(*tensors, relu, momentum, eps, BY[by], sizes)


def layer_backward(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    saved: Tensor | None,
    relu: int,
    dx: Tensor | None,
    dw: Tensor,
    dgamma: Tensor | None,
    dbeta: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    by: str,
    sizes: Any,
) -> None:
    """Of dz, the gradient of what `layer` gave: dw, and what is not None of dx, dgamma, dbeta, and g, the residual's.

    z: where it says what was let pass, behind a residual or without a norm; then dbeta is the bias's gradient.
    dy: room for the gradient of y, as y, where the convolution is strided or its result of another size than x.
    """
    before = map(_at, (dz, x, weight, y, z, saved))
    library().layer_backward(*before, relu, *map(_at, (dx, dw, dgamma, dbeta, g, dy)), BY[by], sizes)


def sizes(values: Sequence[int]) -> Any:
    """Shape in conv.h, of its numbers."""
    return (ctypes.c_long * len(values))(*values)


def stretch(steps: Any, members: int, x: Tensor, result: Tensor, room: Tensor, tensors: Any) -> None:
    """Fills result and room as stretch.cpp says; steps and tensors: arrays of ctypes."""
    library().stretch(steps, len(steps), members, *map(_at, (x, result, room)), tensors)


def stretch_backward(
    steps: Any,
    members: int,
    x: Tensor,
    result: Tensor | None,
    room: Tensor,
    dz: Tensor,
    dx: Tensor | None,
    gradients: Tensor,
    tensors: Any,
    found: Any,
) -> None:
    """Fills dx and what `found` points to; gradients: room, as much for each member."""
    size = len(gradients) // members
    given = map(_at, (x, result, room, dz, dx, gradients))
    library().stretch_backward(steps, len(steps), members, *given, size, tensors, found)


def max_pool(x: Tensor, y: Tensor, place: Tensor, sizes: Any) -> None:
    """y and the places (uint8) of x's maxima in their windows: all NHWC without gaps; sizes: with K = 1."""
    library().max_pool(*map(_at, (x, y, place)), sizes)


def max_unpool(dy: Tensor, place: Tensor, dx: Tensor, sizes: Any) -> None:
    """dx of dy and what `max_pool` left in `place`."""
    library().max_unpool(*map(_at, (dy, place, dx)), sizes)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor, saved: Tensor, eps: float) -> None:
    """y of x (K, R, D), row by row, without gaps; weight and bias (K, D). Fills saved (3, K, R)."""
    library().layer_norm(*map(_at, (x, weight, bias, y, saved)), eps, *x.shape)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    saved: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """What is not None of dx (K, R, D), dweight and dbias (K, D), as `layer_norm` has them."""
    library().layer_norm_backward(*map(_at, (dy, x, weight, saved, dx, dweight, dbias)), *x.shape)
