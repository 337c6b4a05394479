"""Who runs an operation: the keys of real networks, the backend asked for by name in every thread, unknown names."""
# ruff: noqa: E402 (the tools stand beside the package)

import json
import math
import sys
import threading
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import asked_by_operators

sys.path[:0] = [str(Path(__file__).parents[1] / "tools")]

from launched import Onlooker
from layers import CASES, Case, layers, problem
from timing import Trial

import decompk
from decompk import losses, ops
from decompk.errors import BackendError
from decompk.kernels import conv, extension, tables
from decompk.kernels import device as devices
from decompk.kernels.backend import backend
from decompk.kernels.call import fprop_call
from decompk.kernels.choose import candidates
from decompk.kernels.conv.form import Choice
from decompk.kernels.conv.halo import Halo
from decompk.kernels.device import interpreted
from decompk.kernels.launch import launch, recording
from decompk.kernels.layout import aligned, nhwc
from decompk.kernels.problem import Config, key_of

needs_interpreter = pytest.mark.skipif(not interpreted(), reason="runs kernels on the CPU")
BATCH = 2


@pytest.fixture
def asked(monkeypatch):
    """(Problem, Choice) of every convolution that runs."""
    return asked_by_operators(monkeypatch)


# ---- keys -----------------------------------------------------------------------------------------------------------


def _keys(case, first):
    """Of the passes of the first layer, on crops and on the image, or of all others."""
    every = (layer for layer in layers(case, "bfloat16", BATCH) if layer.first == first)
    return {key_of(one) for layer in every for one in layer.passes()}


@needs_interpreter
@pytest.mark.parametrize("case", [Case("resnet50", 4, 140), Case("resnet50", 16, 70), CASES[5], CASES[3]], ids=str)
def test_networks_ask_for_the_problems_that_tools_measure(case, asked):
    assert case in CASES
    d, size = case.decomposition(), decompk.models.spec(case.model).input_size
    image = torch.randn(BATCH, *size).contiguous(memory_format=torch.channels_last)
    wanted = {first: _keys(case, first) for first in (False, True)}
    packed = decompk.pack(d.subnets(seed=0), crops=d.crops, rehearse=False).train()
    for fused in (False, True):
        net = decompk.fuse(packed) if fused else packed
        asked.clear()
        with backend("triton"), recording(Onlooker()), torch.autocast("cpu", torch.bfloat16):
            logits = net(image)
            losses.cross_entropy(logits.float(), torch.zeros(BATCH, dtype=torch.long)).backward()
        keys = {key_of(one) for one, _ in asked}
        assert len(keys & wanted[True]) == 2  # of the crops or of the image, fprop and wgrad
        assert keys - wanted[True] == wanted[False]
    pointwise = [one for one, _ in asked if one.taps == 1 and one.C % 8 == one.O % 8 == 0]
    assert pointwise or case.model == "vgg16"
    for one in pointwise:
        tile = conv.named("tile")
        assert one.aligned and any(tile.why_not(one, c, devices.KNOWN[90]) is None for c in tile.configs(one)), one


@pytest.mark.parametrize("shape", [(4, 8, 16, 1, 1), (1, 8, 16, 1, 1), (4, 1, 16, 1, 1), (1, 1, 16, 3, 1)])
def test_dimensions_of_size_1_leave_a_weight_aligned(shape):
    weight = torch.randn(shape)
    inside = weight.movedim(2, -1).contiguous().movedim(-1, 2)

    def taken(weight):
        x = torch.randn(len(weight), 2, 6, 6, weight.shape[2]).movedim(-1, 2)
        return fprop_call(x, weight, None, ((1, 1), (0, 0), (1, 1))).weight(weight)

    for one in (weight, inside):
        assert torch.equal(taken(one), weight.movedim(2, -1)) and aligned([taken(one)])
    assert taken(inside).data_ptr() == inside.data_ptr()
    assert not aligned([taken(torch.randn(2, 4, 3, 1, 1))])  # 12 bytes a pixel


@pytest.mark.parametrize("shape", [(1, 1, 8, 1, 1), (1, 3, 8, 1, 1), (4, 1, 8, 1, 5), (4, 2, 8, 5, 1)])
def test_dimensions_of_size_1_leave_activations_aligned(shape):
    K, N, C, H, W = shape
    assert aligned([nhwc(torch.randn(K, N, H, W, C).movedim(-1, 2))])
    assert aligned([nhwc(torch.randn(N, H, W, K, C).permute(3, 0, 4, 1, 2))])


# ---- the backend in every thread ------------------------------------------------------------------------------------


def in_a_thread_of_autograds(run):
    """Call `run` in the thread pool that autograd keeps for backward passes within backward passes, 60 deep."""
    threads = []

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, left):
            ctx.left = left
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if ctx.left:
                with torch.enable_grad():
                    Nested.apply(torch.ones((), requires_grad=True), ctx.left - 1).backward()
            else:
                threads.append(threading.get_ident())
                run()
            return grad, None

    Nested.apply(torch.ones((), requires_grad=True), 61).backward()
    assert threads and threads[0] != threading.get_ident()


def small(*, groups=3):
    x = torch.randn(2, 3, 8, 6, 6).requires_grad_()
    return x, torch.randn(2, 8, 8, groups, groups).requires_grad_()


@needs_interpreter
@pytest.mark.parametrize("name", ["torch", "triton", "loop"])
def test_the_backend_reaches_the_backward_in_a_thread_of_autograds_own(name, asked):
    x, weight = small()
    with decompk.backend(name):
        y = ops.grouped_conv2d(x, weight, padding=1)
    asked.clear()
    in_a_thread_of_autograds(y.sum().backward)
    assert x.grad is not None and weight.grad is not None
    assert {one.kind for one, _ in asked} == {"dgrad", "wgrad"}
    assert {choice.backend for _, choice in asked} == {"triton" if name == "triton" else "torch"}
    if name == "loop":
        assert {choice.form.name for _, choice in asked} == {"loop"}


@pytest.mark.parametrize("name", ["cuda", "emulation"])
def test_the_extension_is_asked_for_in_a_thread_of_autograds_own(name, asked, monkeypatch):
    monkeypatch.setattr(extension, "why_not", lambda *a: None)
    for one, written in (("fprop", 4), ("dgrad", 4)):
        monkeypatch.setattr(Halo, one, lambda *a, written=written: a[written + 1])
    x = torch.randn(2, 3, 8, 8, 16, dtype=torch.bfloat16).movedim(-1, 2).requires_grad_()
    weight = torch.randn(2, 16, 16, 3, 3, dtype=torch.bfloat16)
    with decompk.backend(name):
        y = ops.grouped_conv2d(x, weight, padding=1)
    asked.clear()
    in_a_thread_of_autograds(lambda: y.backward(torch.ones_like(y)))
    assert [(one.kind, choice.backend, choice.form.name) for one, choice in asked] == [("dgrad", name, "halo")]


@needs_interpreter
def test_a_whole_networks_backward_runs_where_its_forward_ran(asked, monkeypatch):
    from decompk.kernels import norm as batch_norm

    launched, backward = [], batch_norm.launch_input
    monkeypatch.setattr(batch_norm, "launch_input", lambda *a: launched.append(1) or backward(*a))
    parts = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 1)
    packed = decompk.pack([torch.nn.Sequential(*parts) for _ in range(2)])
    x = torch.randn(2, 3, 6, 6)
    for name, net in (("triton", packed), ("torch", packed), ("triton", decompk.fuse(packed))):
        launched.clear()
        with decompk.backend(name):
            loss = net(x).square().sum()
        asked.clear()
        in_a_thread_of_autograds(loss.backward)
        assert len(asked) >= 3 and {choice.backend for _, choice in asked} == {name}
        assert bool(launched) == (name == "triton")


def test_what_ran_under_no_name_is_not_forced_later(asked):
    x, weight = small()
    y = ops.grouped_conv2d(x, weight)
    asked.clear()
    with decompk.backend("loop"):
        y.sum().backward()
    assert len(asked) == 2 and all(choice.reason != "asked for by name" for _, choice in asked)


def test_the_short_way_of_a_cpu_carries_its_backend(asked):
    x = torch.randn(2, 3, 7, 6, 8).movedim(-1, 2).requires_grad_()
    with decompk.backend("cpu"):
        y = ops.grouped_conv2d(x, torch.randn(2, 8, 8, 3, 3, requires_grad=True), padding=1)
    y.sum().backward()
    assert [one.kind for one, _ in asked] == ["fprop", "dgrad", "wgrad"]
    assert {choice.reason for _, choice in asked} == {"asked for by name"}


@needs_interpreter
def test_block_convolutions_and_crops_carry_their_backend(asked, monkeypatch):
    from decompk.kernels import block as block_conv

    ran, dgrad = [], block_conv.dgrad
    monkeypatch.setattr(block_conv, "dgrad", lambda *a: ran.append(1) or dgrad(*a))
    x, weight = torch.randn(2, 16, 5, 5, requires_grad=True), torch.randn(16, 16, 3, 3, requires_grad=True)
    image, kernels = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 3, 3, 3, requires_grad=True)
    crops = [decompk.Crop(0, 0, 5, 5), decompk.Crop(3, 3, 5, 5)]
    for name in ("triton", "torch"):
        ran.clear()
        with decompk.backend(name):
            blocks = ops.block_conv2d(x, weight, "11/01", padding=1)
            crop, _ = ops.conv2d_moments(image, kernels, crops=crops)
        asked.clear()
        in_a_thread_of_autograds((blocks.sum() + crop.sum()).backward)
        assert bool(ran) == (name == "triton")
        assert {(one.kind, choice.backend) for one, choice in asked} == {("wgrad", name)}


@needs_interpreter
def test_a_compiled_backward_keeps_its_backend(asked):
    x, weight = small()
    compiled = torch.compile(lambda x, w: ops.grouped_conv2d(x, w, padding=1).square(), backend="aot_eager")
    with decompk.backend("triton"):
        y = compiled(x, weight)
    asked.clear()
    in_a_thread_of_autograds(y.sum().backward)
    assert {(one.kind, choice.backend) for one, choice in asked} == {("dgrad", "triton"), ("wgrad", "triton")}


@needs_interpreter
@pytest.mark.parametrize("fused", [False, True])
def test_compiled_code_is_compiled_for_each_backend(fused, asked):
    parts = torch.nn.Conv2d(4, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 1)
    net = decompk.pack([torch.nn.Sequential(*parts) for _ in range(2)])
    net = decompk.fuse(net) if fused else net
    torch._dynamo.reset()  # what else compiles the same layers would reach its limit here
    compiled, x = torch.compile(net, backend="aot_eager"), torch.randn(2, 4, 6, 6)
    for name in ("torch", "triton", "cpu", "triton"):
        asked.clear()
        with decompk.backend(name):
            y = compiled(x)
        in_a_thread_of_autograds(y.sum().backward)
        assert {choice.backend for _, choice in asked} == {name}
        assert {one.kind for one, _ in asked} == {"fprop", "dgrad", "wgrad"}
    with decompk.backend("loop"):  # torch's own, as they are
        wanted, found = net(x), compiled(x)
    assert torch.equal(wanted, found)


# ---- names that nobody has ------------------------------------------------------------------------------------------


def test_unknown_forms_and_backends_raise():
    halo = Config("halo", (1, 8, 16), 8, 8, 4, 2)

    def kept(backend, form, config):
        return {"backend": backend, "form": form, "config": config and asdict(config), "ms": 1.0}

    for wrong in (
        lambda: conv.named("nonsense"),
        lambda: conv.named("halo", "triton"),
        lambda: conv.named("loop", "nonsense"),
        lambda: tables.choice_of(kept("nonsense", "loop", None)),
        lambda: tables.choice_of(kept("torch", "nonsense", None)),
        lambda: tables.choice_of(kept("torch", "halo", halo)),
        lambda: tables.choice_of(kept("triton", "halo", halo)),
        lambda: tables.choice_of(kept("triton", "tile", None)),
        lambda: tables.choice_of(kept("triton", "tile", halo)),
        lambda: tables.choice_of(kept("torch", "loop", halo)),
    ):
        with pytest.raises(BackendError):
            wrong()
    assert tables.choice_of(kept("cuda", "halo", halo)).config == halo


def test_a_halo_choice_without_the_extension_is_not_timed_as_torchs(monkeypatch):
    monkeypatch.setattr(extension, "library", lambda kind: Path("/nowhere") / kind)
    monkeypatch.setattr(extension, "load", extension.load.__wrapped__)
    trial = Trial(problem("fprop", "bfloat16", (2, 3, 8, 8, 9, 9), (3, 3), padding=(1, 1)), "cpu")
    halo = conv.named("halo")
    config = halo.configs(trial.asked)[0]
    with pytest.raises(BackendError, match="not built"):
        trial.by_choice(Choice(halo, config, math.nan, ""))


def test_a_table_serves_no_extension_that_is_not_built(monkeypatch, tmp_path):
    here = devices.KNOWN[90]
    one = problem("fprop", "bfloat16", (2, 8, 16, 16, 18, 18), (3, 3), padding=(1, 1))
    config = conv.named("halo").configs(one)[0]
    choice = Choice(conv.named("halo"), config, 0.1, "")
    entries = {key_of(one): tables.entry_of(choice)}
    nonsense = {**tables.entry_of(Choice(conv.named("matmul"), None, 0.1, ""))}
    entries[key_of(one.of("dgrad"))] = nonsense  # no product computes 3×3
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    tables.table_path(here).write_text(json.dumps({"entries": entries}))
    with ExitStack() as stack:
        stack.callback(tables.table.cache_clear)
        tables.table.cache_clear()
        monkeypatch.setattr(extension, "why_not", lambda *a: "the extension is not built")
        assert tables.lookup(one, here) is None and tables.lookup(one.of("dgrad"), here) is None
        monkeypatch.setattr(extension, "why_not", lambda *a: None)
        assert tables.lookup(one, here).config == config


def test_a_damaged_table_is_none(monkeypatch, tmp_path):
    here, one = devices.KNOWN[90], problem("fprop", "bfloat16", (2, 8, 16, 16, 18, 18), (3, 3), padding=(1, 1))
    entry = tables.entry_of(next(c for c in candidates(one, here) if c.config))
    texts = [b"", b"{", b"null", b"5", b"[]", b'{"entries": 5}', b'{"entries": null}', b"\xff", b"[" * 200_000]
    bad = [None, 5, "x", [], {}, {**entry, "backend": "x"}]
    bad += [{**entry, "config": config} for config in ([], {}, "", 0, 5, False, {"a": 1})]
    wrong = {"tile": ["a"], "warps": "4", "block_in": None, "splits": None}
    bad += [{**entry, "config": {**entry["config"], name: value}} for name, value in wrong.items()]
    bad += [{**entry, "ms": ms} for ms in ("x", None, -1, math.nan)]
    texts += [json.dumps({"entries": {key_of(one): found}}).encode() for found in bad]
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    monkeypatch.setattr(tables, "table", tables.table.__wrapped__)
    for text in texts:
        tables.table_path(here).write_bytes(text)
        assert tables.lookup(one, here) is None
    tables.table_path(here).write_text(json.dumps({"entries": {key_of(one): entry}}))
    assert tables.lookup(one, here) is not None


# ---- grids ----------------------------------------------------------------------------------------------------------


def test_a_grid_over_the_limit_of_an_axis_is_refused():
    def kernel():
        pass

    with recording() as launches:
        launch(kernel, (2**31 - 1, 65535, 65535), 4, 1)
        for grid in ((2**31,), (1, 65536), (1, 1, 65536)):
            with pytest.raises(BackendError, match="programs"):
                launch(kernel, grid, 4, 1)
    assert len(launches) == 1


# ---- what cannot run ------------------------------------------------------------------------------------------------


def test_an_interpreter_that_its_numpy_breaks_is_named(monkeypatch):
    import numpy
    import triton

    for versions, runs in ((("3.6.0", "2.3.5"), True), (("3.7.1", "2.5"), True), (("3.6.0", "2.4.1"), False)):
        devices.why_no_interpreter.cache_clear()
        monkeypatch.setattr(triton, "__version__", versions[0])
        monkeypatch.setattr(numpy, "__version__", versions[1])
        reason = devices.why_no_interpreter()
        assert reason is None if runs else "needs numpy<2.4" in reason
    devices.why_no_interpreter.cache_clear()
