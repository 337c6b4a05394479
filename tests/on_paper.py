"""Launches by kept handles against Triton's own, byte by byte, on the GPU on paper: test_launch.py runs this file."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
import triton
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import paper_gpu

import decompk
from decompk.kernels import block, conv, handles, norm
from decompk.kernels import device as devices
from decompk.kernels import launch as launching
from decompk.kernels.conv import band, pointer, tile
from decompk.kernels.launch import Fixed, descriptor, launch, recording
from decompk.kernels.problem import Config, Epilogue, Problem, Prologue

PAPER = paper_gpu.activate()
LAUNCHED = paper_gpu.Launched()
SIZES = {"u1": 1, "i32": 4, "i64": 8, "fp32": 4}


def sizes_of(compiled):
    """Bytes of each parameter of a compiled kernel, its scratch pointers left out."""
    found = []
    for kind in compiled.src.signature.values():
        if kind.startswith("tensordesc"):
            assert compiled.metadata.tensordesc_meta  # else it is rewritten to pointers
            rank = kind.count(",") + 1
            found += [128, *[4] * rank, *[8] * rank]
        elif kind != "constexpr":
            found.append(8 if kind.startswith("*") else SIZES[kind])
    return found


@contextlib.contextmanager
def launched_by_triton():
    """Counts what Triton launches itself, in the list it gives."""
    before, seen = launching._launch, []

    def counted(kernel, *arguments):
        seen.append(kernel.__name__)
        return before(kernel, *arguments)

    launching._launch = counted
    try:
        yield seen
    finally:
        launching._launch = before


def both(kernel, grid, warps, stages, fixed=launching._NOTHING_FIXED, /, **arguments):
    """Launch by Triton and by a handle; returns what libcuda was told, the same by either."""
    LAUNCHED.expect([])  # of a kernel that is not known yet
    LAUNCHED.expect(sizes_of(launching._launch(kernel, grid, warps, stages, fixed, arguments)))
    launching._launch(kernel, grid, warps, stages, fixed, arguments)
    by_triton = LAUNCHED.read()
    launch(kernel, grid, warps, stages, fixed, **arguments)  # makes the handle, where there was none
    assert LAUNCHED.read() == by_triton
    with launched_by_triton() as seen:
        launch(kernel, grid, warps, stages, fixed, **arguments)
    assert not seen and LAUNCHED.read() == by_triton != b""
    both.kernels.append(kernel.__name__)
    return by_triton


@pytest.fixture(autouse=True)
def _nothing_launched():
    LAUNCHED.expect([])
    both.kernels = []


@pytest.fixture
def kernels(monkeypatch):
    """Every launch of the package is made both ways; the names of the kernels that were."""
    for module in (tile, band, pointer, norm, block):
        monkeypatch.setattr(module, "launch", both)
    monkeypatch.setattr(devices, "why_not_triton_on", lambda device: None)
    return both.kernels


def tensors(*shapes, dtype=torch.bfloat16):
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


# ---- the package's own launches --------------------------------------------------------------------------------------


def test_a_step_of_a_packed_network_tells_the_driver_the_same_by_either_way(kernels):
    def member():
        return nn.Sequential(
            *(nn.Conv2d(4, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16)),
            *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)),
        ).to(torch.bfloat16)

    packed = decompk.pack([member() for _ in range(2)], rehearse=False)
    x = torch.randn(4, 4, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with decompk.backend("triton"):
        for _ in range(2):
            packed(x).float().sum().backward()
    assert {name for name in kernels if "kernel" in name} >= {"moments_kernel", "finalise_kernel", "apply_kernel"}
    assert sum("wgrad" in name for name in kernels) >= 2


FORMS = {"tile": ((1, 8, 8), 16, 16), "pointer": ((1, 1, 32), 16, 16), "band": None}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_tells_the_driver_the_same_by_either_way(kernels, name, stride):
    form, sizes = conv.named(name), (8 + stride - 1) // stride
    x, w, y = tensors((2, 4, 8, 8, 16), (2, 16, 3, 3, 16), (2, 4, sizes, sizes, 16))
    vectors = tensors((2, 16), (2, 16), dtype=torch.float32)
    for kind in ("fprop", "dgrad", "wgrad"):
        problem = Problem(kind, "bfloat16", 2, 4, 16, 16, 8, 8, (3, 3), (stride, stride), (1, 1))
        config = Config(name, *FORMS[name]) if FORMS[name] else form.configs(problem)[0]
        if kind == "fprop":
            form.fprop(problem, config, x, w, y)
            form.fprop(problem, config, x, w, y, Epilogue(w[0, :, 0, 0], *vectors, y, True), Prologue(*vectors))
        elif kind == "dgrad":
            form.dgrad(problem, config, y, w, x)
        else:
            form.wgrad(problem, config, y, x, torch.empty((config.splits, *w.shape), dtype=torch.float32))
    assert len(kernels) >= 4


def test_what_is_recorded_has_every_parameter_by_name():
    x, w, y = tensors((2, 4, 8, 8, 16), (2, 16, 3, 3, 16), (2, 4, 8, 8, 16))
    problem = Problem("fprop", "bfloat16", 2, 4, 16, 16, 8, 8, (3, 3), (1, 1), (1, 1))
    with recording() as launches:
        for name in ("tile", "pointer"):
            conv.named(name).fprop(problem, Config(name, *FORMS[name]), x, w, y)
        norm.launch_moments(x.permute(0, 1, 4, 2, 3), 4)
    assert len(launches) == 3
    for one in launches:
        assert set(one.arguments) == {parameter.name for parameter in one.kernel.params}
        assert len(one.specialisation()[0]) == len(one.kernel.params)


# ---- what a handle is kept for ---------------------------------------------------------------------------------------


@triton.jit
def told(a, b, size, rate, FLAG: triton.language.constexpr, WIDTH: triton.language.constexpr):
    i = triton.language.arange(0, WIDTH)
    value = triton.language.load(a + i * size)
    if b is not None:
        value += triton.language.load(b + i)
    if FLAG:
        value = value * rate
    triton.language.store(a + i * size, value)


def of(call):
    """The function of a launch's bytes: what was compiled and loaded for it."""
    return call[36:44]


def told_with(fixed, **changes):
    given = dict(a=torch.empty(64), b=None, size=32, rate=0.5, FLAG=True)
    return both(told, (3,), 4, 1, fixed, **{**given, **changes})


def test_what_is_compiled_anew_is_launched_anew():
    fixed, memory = Fixed(WIDTH=16), torch.empty(64)
    first = told_with(fixed, a=memory)
    assert told_with(fixed, a=memory) == first
    others = [
        told_with(fixed, a=memory[1:]),
        told_with(fixed, a=memory.to(torch.float16)),
        told_with(fixed, b=memory),
        told_with(fixed, b=memory[1:]),
        told_with(fixed, size=33),
        told_with(fixed, size=1),
        told_with(fixed, size=True),
        told_with(fixed, size=2**40),
        told_with(fixed, FLAG=False),
        told_with(Fixed(WIDTH=32), a=memory),
    ]
    assert len({of(call) for call in (first, *others)}) == 11
    assert of(told_with(fixed, a=nn.Parameter(memory))) == of(first)


def test_what_is_not_compiled_for_reaches_the_kernel():
    fixed, memory = Fixed(WIDTH=16), torch.empty(64)
    calls = [
        told_with(fixed, a=a, size=size, rate=rate)
        for a in (memory, memory[4:])
        for size in (32, 48)
        for rate in (0.5, 1.0)
    ]
    assert len(set(calls)) == 8 and len({of(call) for call in calls}) == 1


def test_the_stream_and_the_device_are_those_of_the_launch(monkeypatch):
    fixed, memory = Fixed(WIDTH=16), torch.empty(64)
    monkeypatch.setattr(PAPER, "stream", 7, raising=False)
    assert told_with(fixed, a=memory)[28:36] == (7).to_bytes(8, "little")
    first = told_with(fixed, a=memory)
    monkeypatch.setattr(PAPER, "device", 1, raising=False)
    second = told_with(fixed, a=memory)
    assert of(first) != of(second)

    @contextlib.contextmanager
    def current(device):
        monkeypatch.setattr(PAPER, "device", device)
        yield
        monkeypatch.setattr(PAPER, "device", 0)

    monkeypatch.setattr(torch.cuda, "device", current)
    (call,) = fixed.calls.values()
    for index, told_before in ((0, first), (1, second)):
        (handle,) = (handle for handle in call.handles.values() if handle.device == index)
        PAPER.device = 0
        handle.launch((3, 1, 1), (memory, None, 32, 0.5, True))
        assert LAUNCHED.read() == told_before


def test_a_descriptor_is_encoded_once_for_each_address(monkeypatch):
    encoded = []
    before = handles._encode
    monkeypatch.setattr(handles, "_encode", lambda one, said: encoded.append(one.base.data_ptr()) or before(one, said))
    problem = Problem("fprop", "bfloat16", 2, 4, 16, 16, 8, 8, (3, 3), (1, 1), (1, 1), layout="member")
    config = Config("tile", (1, 8, 8), 16, 16, stages=2)
    monkeypatch.setattr(tile, "launch", both)
    for _ in range(2):
        x, w, y = tensors((2, 4, 8, 8, 16), (2, 16, 3, 3, 16), (2, 4, 8, 8, 16))
        for _ in range(3):
            conv.named("tile").fprop(problem, config, x, w, y)
        assert len(encoded) == 9 and set(encoded) == {t.data_ptr() for t in (x, w, y)}
        encoded.clear()
        kept = x, w, y  # else the next ones may lie where these did
    assert kept


def test_views_of_one_address_are_encoded_apart(monkeypatch):
    monkeypatch.setattr(tile, "launch", both)
    problem = Problem("fprop", "bfloat16", 2, 4, 16, 16, 8, 8, (3, 3), (1, 1), (1, 1))
    x, w, y = tensors((2, 8, 8, 8, 16), (2, 16, 3, 3, 16), (2, 4, 8, 8, 16))
    for view in (x[:, :4], x.view(4, 4, 8, 8, 16)[:2], x[:, ::2]):
        conv.named("tile").fprop(problem, Config("tile", (1, 8, 8), 16, 16), view, w, y)


@pytest.mark.parametrize("name", ["_launchers_are_called_alike", "_encodes_alike"])
def test_where_triton_is_not_as_known_it_launches_or_encodes_itself(name, monkeypatch):
    monkeypatch.setattr(handles, name, lambda: False)
    monkeypatch.setattr(tile, "launch", both if name == "_encodes_alike" else launch)
    x, w, y = tensors((2, 4, 8, 8, 16), (2, 16, 3, 3, 16), (2, 4, 8, 8, 16))
    problem = Problem("fprop", "bfloat16", 2, 4, 16, 16, 8, 8, (3, 3), (1, 1), (1, 1))
    config = Config("tile", (1, 8, 8), 16, 16, stages=1)
    tile._convolution.cache_clear()
    for _ in range(3):
        with launched_by_triton() as seen:
            conv.named("tile").fprop(problem, config, x, w, y)
        assert bool(seen) or name == "_encodes_alike"
    calls = tile._convolution(problem, config)[0].calls.values()
    found = [handle for call in calls for handle in call.handles.values()]
    assert found and all(handle is None or not handle.parts for handle in found)


def test_whoever_watches_launches_hears_of_each_of_them(monkeypatch):
    fixed, memory = Fixed(WIDTH=16), torch.empty(64)
    told_with(fixed, a=memory)
    heard = []
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(listener := lambda metadata: heard.append(metadata.get()["name"]))
    for _ in range(3):
        launch(told, (3,), 4, 1, fixed, a=memory, b=None, size=32, rate=0.5, FLAG=True)
    hooks.remove(listener)
    assert heard == ["told"] * 3
    told_with(fixed, a=memory)
    assert heard == ["told"] * 3
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    with launched_by_triton() as seen:
        launch(told, (3,), 4, 1, fixed, a=memory, b=None, size=32, rate=0.5, FLAG=True)
    assert seen == ["told"]


def test_a_descriptor_is_one_of_tritons_and_is_held_to_its_rules():
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = torch.empty((4, 64), dtype=torch.bfloat16)
    for _ in range(2):
        made = descriptor(x, x.shape, x.stride(), (1, 16))
        assert made == TensorDescriptor(x, [4, 64], [64, 1], [1, 16])
        with pytest.raises(AssertionError, match="aligned"):
            descriptor(x[:, 1:], (4, 63), x.stride(), (1, 16))
        with pytest.raises(AssertionError, match="contiguous"):
            descriptor(x, (4, 32), (64, 2), (1, 16))
