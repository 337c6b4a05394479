"""The operators that tools/fuzz.py draws problems of: their sizes and options, inputs, and the same by torch's own.

A problem is a flat dict that JSON can hold. Tensors lie members first, (K, …); an operator that takes others gets views
of them. What `torchs` gives under a name with "_" before it is not compared: see `Op`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import decompk
from decompk import ops
from decompk.ops import library, on_cpu
from decompk.ops.block import mask_text
from decompk.ops.layout import strides_of
from decompk.ops.recurrent import GATES, prepared, recurrence

Problem = dict
Tensors = dict[str, Tensor]
Normal = Callable[..., Tensor]  # (*shape, scale=1) → random values

HOT = ("x", "dy", "residual")
HALVES, FLOATS = ("bfloat16", "float16"), ("float32", "float32", "float32", "float64")


@dataclass(frozen=True)
class Op:
    """An operator. `plain` is what shrinking leads to; `hot` names what may hold NaN and infinities ("dy": gradients).

    Of `torchs`, "_before" is y before its ReLU, which near zero may round to either side, "_sharp" says that there are
    such ReLUs inside, and "_floors" how large a result is beside which its errors count: of gradients, for dy of 1.
    What one NaN makes NaN: `apart` says that no other member's values; it may be fewer values than torch's operator
    makes NaN in results named in `fewer`, and more in `more`: where a product with zero is skipped, or added.
    """

    draw: Callable[[random.Random], Problem]
    plain: Problem
    inputs: Callable[[Problem, Normal], Tensors]
    ours: Callable[[Problem, Tensors], Tensors]
    torchs: Callable[[Problem, Tensors], Tensors]
    backends: dict[str, float]
    hot: tuple[str, ...] = ("x", "dy")
    dtypes: tuple[str, ...] = FLOATS + HALVES
    apart: bool = True
    fewer: tuple[str, ...] = ("dweight",)  # with infinite dy times the padding's zeros
    more: tuple[str, ...] = ("dweight",)
    exempt: tuple[str, ...] = ()  # hard inputs that it is not made for


def laid(x: Tensor, layout: str) -> Tensor:
    """x (K, N, C, H, W) in another layout: "member", "grouped", "first" (channels first) or "gaps" (between values)."""
    if layout == "first":
        return x.contiguous()
    if layout == "gaps":
        return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
    return x.new_empty(x.numel()).as_strided(x.shape, strides_of(layout, x.shape)).copy_(x)


def size(rng: random.Random, most: int, least: int = 1) -> int:
    return rng.choice((least, rng.randint(least, most), rng.randint(least, most)))


# ---- convolutions ---------------------------------------------------------------------------------------------------

CONV = dict(K=1, N=1, C=1, O=1, H=1, W=1, kh=1, kw=1, sh=1, sw=1, ph=0, pw=0, dh=1, dw=1, bias=False)
CPU, ALL = {"default": 4, "cpu": 4}, {"default": 4, "cpu": 4, "torch": 2, "loop": 1, "emulation": 2, "triton": 0.04}


def draw_conv(rng: random.Random) -> Problem:
    channels = (1, 2, 3, 4, 4, 5, 8, 8, 12, 16, 20, 24)
    while True:
        p = dict(K=size(rng, 4), N=0 if rng.random() < 0.03 else size(rng, 4), C=rng.choice(channels))
        p |= dict(O=rng.choice(channels), H=size(rng, 12), W=size(rng, 12), bias=rng.random() < 0.5)
        square = rng.random() < 0.5  # what most kernels are made for
        for axis in "hw":
            p["k" + axis] = 3 if square else size(rng, 5)
            p["s" + axis] = rng.choice((1, 1, 1, 2) if square else (1, 1, 2, 3))
            p["p" + axis] = 1 if square and rng.random() < 0.6 else size(rng, 3, 0)
            p["d" + axis] = 2 if rng.random() < 0.06 else 1
        if min(_out(p)) > 0:
            return p


def _out(p: Problem) -> list[int]:
    sides = (("H", "h"), ("W", "w"))
    return [(p[s] + 2 * p["p" + a] - p["d" + a] * (p["k" + a] - 1) - 1) // p["s" + a] + 1 for s, a in sides]


def _geometry(p: Problem) -> tuple:
    return tuple((p[name + "h"], p[name + "w"]) for name in "spd")


def conv_inputs(p: Problem, normal: Normal) -> Tensors:
    t = {"x": normal(p["K"], p["N"], p["C"], p["H"], p["W"])}
    t["weight"] = normal(p["K"], p["O"], p["C"], p["kh"], p["kw"], scale=(p["C"] * p["kh"] * p["kw"]) ** -0.5)
    if p["bias"]:
        t["bias"] = normal(p["K"], p["O"])
    return t


def each_conv(p: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch.conv2d of every member in turn."""
    biases = [None] * p["K"] if bias is None else bias
    return torch.stack([F.conv2d(*own, *_geometry(p)) for own in zip(x.contiguous(), weight, biases, strict=True)])


def grouped(p: Problem, t: Tensors) -> Tensors:
    return {"y": ops.grouped_conv2d(t["x"], t["weight"], t.get("bias"), *_geometry(p))}


def convs(p: Problem, t: Tensors) -> Tensors:
    return {"y": each_conv(p, t["x"], t["weight"], t.get("bias"))}


def channel_groups(p: Problem, t: Tensors) -> Tensors:
    bias = None if "bias" not in t else t["bias"].flatten()
    x, weight = t["x"].transpose(0, 1).flatten(1, 2), t["weight"].flatten(0, 1)
    y = ops.conv2d(x, weight, bias, *_geometry(p), p["K"])
    return {"y": y.unflatten(1, (p["K"], p["O"])).transpose(0, 1)}


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, geometry):
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return library.forward("winograd", x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx, dy):
        found = library.backward("winograd", dy, *ctx.saved_tensors, *ctx.geometry, ctx.needs_input_grad[:2])
        return *found, dy.sum((1, 3, 4)) if ctx.needs_input_grad[2] else None, None


def draw_winograd(rng: random.Random) -> Problem:
    p = draw_conv(rng) | dict(kh=3, kw=3, sh=1, sw=1, dh=1, dw=1)
    p |= dict(N=size(rng, 4), C=8 * size(rng, 3), O=8 * size(rng, 3))
    return p | dict(ph=max(p["ph"], 1), pw=max(p["pw"], 1))


def winograd(p: Problem, t: Tensors) -> Tensors:
    if p["C"] % 8 or p["O"] % 8 or min(p["K"], p["N"]) < 1:
        raise decompk.DecompkError("not its sizes")
    return {"y": _Winograd.apply(t["x"], t["weight"], t.get("bias"), _geometry(p))}


# ---- a convolution and what stands around it ------------------------------------------------------------------------

AROUND = CONV | dict(affine=False, residual=False, relu=False, prologue=False, in_relu=False, crops=False)


def draw_around(rng: random.Random) -> Problem:
    flags = ("affine", "residual", "relu", "prologue", "in_relu")
    return draw_conv(rng) | {flag: rng.random() < 0.4 for flag in flags} | dict(crops=rng.random() < 0.2)


def draw_moments(rng: random.Random) -> Problem:
    p = draw_conv(rng)
    return p | dict(N=max(p["N"], 1), crops=rng.random() < 0.2)


def around_inputs(p: Problem, normal: Normal) -> Tensors:
    t = conv_inputs(p, normal)
    if p["crops"]:
        t["x"] = normal(1, p["N"], p["C"], p["H"] + 2, p["W"] + 2)
    names = dict(scale="affine", shift="affine", in_scale="prologue", in_shift="prologue")
    for name, flag in names.items():
        if p.get(flag):
            t[name] = normal(p["K"], p["C"] if name.startswith("in") else p["O"], statistics=True)
    if p.get("residual"):
        t["residual"] = normal(p["K"], p["N"], p["O"], *_out(p))
    return t


def _windows(p: Problem) -> list[decompk.Crop] | None:
    rng = random.Random(p["seed"])
    corners = [(rng.randint(0, 2), rng.randint(0, 2)) for _ in range(p["K"])]
    return [decompk.Crop(*corner, p["H"], p["W"]) for corner in corners] if p["crops"] else None


def _members(p: Problem, t: Tensors) -> Tensor:
    windows = _windows(p)
    return t["x"] if windows is None else torch.stack([crop.cut(t["x"][0]) for crop in windows])


def fused(p: Problem, t: Tensors) -> Tensors:
    names = ("scale", "shift", "residual", "in_scale", "in_shift")
    around = {name: t[name] for name in names if name in t} | dict(relu=p["relu"], in_relu=p["in_relu"])
    x = t["x"][0] if p["crops"] else t["x"]
    return {"y": ops.fused_conv2d(x, t["weight"], t.get("bias"), *_geometry(p), **around, crops=_windows(p))}


def around(p: Problem, t: Tensors) -> Tensors:
    def affine(value: Tensor, scale: str, shift: str) -> Tensor:
        return value * t[scale][:, None, :, None, None] + t[shift][:, None, :, None, None] if scale in t else value

    x = affine(_members(p, t), "in_scale", "in_shift")
    x = (x.relu() if p["in_relu"] and p["prologue"] else x).to(t["x"].dtype)
    y = affine(each_conv(p, x, t["weight"], t.get("bias")), "scale", "shift")
    y = y + t["residual"] if "residual" in t else y
    return {"y": (y.relu() if p["relu"] else y).to(x.dtype)}


def with_moments(p: Problem, t: Tensors) -> Tensors:
    x = t["x"][0] if p["crops"] else t["x"]
    y, moments = ops.conv2d_moments(x, t["weight"], t.get("bias"), *_geometry(p), crops=_windows(p))
    count, mean, squares = moments.squeeze(1).unbind(1)
    return {"y": y, "count": count, "mean": mean, "var": squares / count}


def and_moments(p: Problem, t: Tensors) -> Tensors:
    y = each_conv(p, _members(p, t), t["weight"], t.get("bias"))
    var, mean = torch.var_mean(y.detach().to(_statistics(y)), (1, 3, 4), correction=0)
    return {"y": y, "count": torch.full_like(mean, y[0, :, 0].numel()), "mean": mean, "var": var}


def _statistics(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ---- blocks ---------------------------------------------------------------------------------------------------------

BLOCK = CONV | dict(R=1, S=1, kept=100, skipped_nan=False, skipped_gradients=False)


def draw_block(rng: random.Random) -> Problem:
    p = draw_conv(rng) | dict(R=size(rng, 4), S=size(rng, 4), kept=rng.choice((0, 30, 60, 90)), K=1)
    nan = rng.random() < 0.5
    return p | dict(C=rng.choice((1, 2, 4, 8)), skipped_nan=nan, skipped_gradients=not nan and rng.random() < 0.3)


def _mask(p: Problem) -> Tensor:
    rng = random.Random(p["seed"])
    kept = [[rng.random() * 100 < p["kept"] for _ in range(p["S"])] for _ in range(p["R"])]
    diagonal = p["R"] == p["S"] and rng.random() < 0.3
    return torch.eye(p["R"], dtype=torch.bool) if diagonal else torch.tensor(kept)


def _blocks(p: Problem) -> Tensor:
    """Which values of the weight are kept, (O, C, 1, 1); here O and C count the channels of a block."""
    return _mask(p).repeat_interleave(p["O"], 0).repeat_interleave(p["C"], 1)[..., None, None]


def block_inputs(p: Problem, normal: Normal) -> Tensors:
    t = conv_inputs(p | dict(O=p["R"] * p["O"], C=p["S"] * p["C"]), normal)
    if p["skipped_nan"]:
        t["weight"].masked_fill_(~_blocks(p), float("nan"))
    return t


def blocks(linear: bool) -> Callable[[Problem, Tensors], Tensors]:
    def run(p: Problem, t: Tensors) -> Tensors:
        x, weight, bias = t["x"][0], t["weight"][0], t["bias"][0] if "bias" in t else None
        options = dict(skipped_gradients=p["skipped_gradients"])
        text = mask_text(_mask(p))
        if linear:
            return {"y": ops.block_linear(x.movedim(1, -1), weight[..., 0, 0], text, bias, **options)}
        return {"y": ops.block_conv2d(x, weight, text, bias, *_geometry(p), **options)}

    return run


def masked(linear: bool) -> Callable[[Problem, Tensors], Tensors]:
    def run(p: Problem, t: Tensors) -> Tensors:
        x, weight, bias = t["x"][0], t["weight"][0], t["bias"][0] if "bias" in t else None
        kept = torch.where(_blocks(p), weight, 0)
        weight = kept.detach() + (weight - weight.detach()) if p["skipped_gradients"] else kept
        if linear:
            return {"y": F.linear(x.movedim(1, -1), weight[..., 0, 0], bias)}
        return {"y": F.conv2d(x.contiguous(), weight, bias, *_geometry(p))}

    return run


def draw_linear(rng: random.Random) -> Problem:
    return draw_block(rng) | {name: CONV[name] for name in ("kh", "kw", "sh", "sw", "ph", "pw", "dh", "dw")}


# ---- batch norms ----------------------------------------------------------------------------------------------------

NORM = dict(K=1, N=2, C=1, H=1, W=1, affine=False, running=False, residual=False, relu=False, training=True)
NORM |= dict(momentum=0.1, eps=1e-5)


def draw_norm(rng: random.Random) -> Problem:
    flags = ("affine", "running", "residual", "relu", "training")
    p = dict(K=size(rng, 4), N=size(rng, 6, 2), C=rng.choice((1, 2, 3, 4, 5, 8, 12, 16, 17, 32)))
    p |= dict(H=size(rng, 24), W=size(rng, 12)) | {flag: rng.random() < 0.6 for flag in flags}
    p["running"] |= not p["training"]
    if not p["training"] and rng.random() < 0.1:
        p["N"] = 0
    return p | dict(momentum=rng.choice((0.1, 0.1, 0.3, 1.0, 0.0)), eps=rng.choice((1e-5, 1e-3)))


def norm_inputs(p: Problem, normal: Normal) -> Tensors:
    t, vectors = {"x": normal(p["K"], p["N"], p["C"], p["H"], p["W"])}, (p["K"], p["C"])
    if p["affine"]:
        t |= dict(weight=normal(*vectors, statistics=True), bias=normal(*vectors, statistics=True))
    if p.get("residual"):
        t["residual"] = normal(*t["x"].shape)
    if p.get("running"):
        mean, var = (normal(*vectors, statistics=True) for _ in range(2))
        t |= dict(running_mean=mean, running_var=var.abs() + 0.5)
    return t


def _vectors(t: Tensors) -> list[Tensor | None]:
    return [t.get(name) for name in ("weight", "bias", "running_mean", "running_var")]


def norm(p: Problem, t: Tensors) -> Tensors:
    options = p["training"], p["momentum"], p["eps"], t.get("residual"), p["relu"]
    return {"y": ops.batch_norm(t["x"], *_vectors(t), *options)}


def norm_on_cpu(p: Problem, t: Tensors) -> Tensors:
    if not p["N"]:
        raise decompk.DecompkError("not its sizes")
    residual = t["residual"].flatten(0, 1) if "residual" in t else None
    options = p["K"], p["training"], p["momentum"], p["eps"], residual, p["relu"]
    return {"y": on_cpu.batch_norm(t["x"].flatten(0, 1), *_vectors(t), *options).unflatten(0, t["x"].shape[:2])}


def norms(p: Problem, t: Tensors) -> Tensors:
    vectors = [[None] * p["K"] if v is None else v for v in _vectors(t)]
    y = torch.stack(
        [
            F.batch_norm(x, mean, var, weight, bias, p["training"], p["momentum"], p["eps"])
            for x, weight, bias, mean, var in zip(t["x"].contiguous(), *vectors, strict=True)
        ]
    )
    y = y + t["residual"] if "residual" in t else y
    return ({"y": y.relu(), "_before": y} if p["relu"] else {"y": y}) | _floors(p, t)


def _floors(p: Problem, t: Tensors) -> dict:
    """A channel's values are about 1 before its weight, and its gradients differences of 1 / deviation."""
    var = t["x"].detach().double().var((1, 3, 4), correction=0) if p["N"] else torch.zeros(1)
    if not p.get("training", True):
        var = t["running_var"]
    steepest = (t["weight"].detach().abs() if "weight" in t else 1) / (var + p["eps"]).sqrt()
    sums = t["x"][0, :, 0].numel() ** 0.5
    return {"_floors": dict(y=1.0, z=1.0, dx=steepest.nan_to_num(0, 0, 0).max().item(), dweight=sums, dbias=sums)}


PACKED = dict(K=1, N=2, C=1, H=1, W=1, affine=False, track=False, momentum=0.1, eps=1e-5)


def draw_packed(rng: random.Random) -> Problem:
    p = {name: value for name, value in draw_norm(rng).items() if name in PACKED}
    return p | dict(N=max(p["N"], 2), track=rng.random() < 0.7, momentum=rng.choice((0.1, 1.0, None)))


def packed_inputs(p: Problem, normal: Normal) -> Tensors:
    t = norm_inputs(p, normal)
    return {name: value.to(t["x"].dtype) for name, value in t.items()}


def _modules(p: Problem, dtype: torch.dtype) -> list[nn.Module]:
    options = p["eps"], p["momentum"], p["affine"], p["track"]
    return [nn.BatchNorm2d(p["C"], *options, dtype=dtype) for _ in range(p["K"])]


def packed_norm(p: Problem, t: Tensors) -> Tensors:
    packed = decompk.pack(_modules(p, t["x"].dtype))
    for name in ("weight", "bias"):
        if name in t:
            getattr(packed, name).data.copy_(t[name])
            t[name] = getattr(packed, name)
    y, z = packed(t["x"]), packed(t["x"] * 2 + 1)
    return {"y": y, "z": z, "e": packed.eval()(t["x"])} | dict(packed.named_buffers())


def separate_norms(p: Problem, t: Tensors) -> Tensors:
    members = _modules(p, t["x"].dtype)
    # Where torch's operators run packed ones, they lie channels_last, of which torch's sums are less exact.
    theirs = p["backend"] == "torch" or p["dtype"] in HALVES
    lay = torch.channels_last if theirs else torch.contiguous_format

    def run(x: Tensor) -> Tensor:
        own = [{name: t[name][k] for name in ("weight", "bias") if name in t} for k in range(p["K"])]
        return torch.stack(
            [
                torch.func.functional_call(m, o, v.contiguous(memory_format=lay))
                for m, o, v in zip(members, own, x, strict=True)
            ]
        )

    y, z = run(t["x"]), run(t["x"] * 2 + 1)
    [member.eval() for member in members]
    found = {"y": y, "z": z, "e": run(t["x"])}
    buffers = {name: torch.stack([m.get_buffer(name) for m in members]) for name, _ in members[0].named_buffers()}
    return found | buffers | _floors(p, t)


# ---- recurrences ----------------------------------------------------------------------------------------------------

RECURRENT = dict(K=1, N=1, T=1, I=1, H=1, mode="RNN_TANH", bias=False)


def draw_recurrent(rng: random.Random) -> Problem:
    sizes = dict(K=size(rng, 4), N=size(rng, 4), T=size(rng, 6), I=size(rng, 9), H=size(rng, 9))
    return sizes | dict(mode=rng.choice(tuple(GATES)), bias=rng.random() < 0.7)


def recurrent_inputs(p: Problem, normal: Normal) -> Tensors:
    K, N, H, rows = p["K"], p["N"], p["H"], GATES[p["mode"]] * p["H"]
    t = dict(x=normal(K, p["T"], N, p["I"]), h=normal(K, N, H))
    t |= dict(into=normal(K, rows, p["I"], scale=p["I"] ** -0.5), weight=normal(K, rows, H, scale=H**-0.5))
    if p["mode"] == "LSTM":
        t["c"] = normal(K, N, H)
    if p["bias"]:
        t |= dict(bias=normal(K, rows), own=normal(K, rows))
    return t


def together(p: Problem, t: Tensors) -> Tensors:
    mode, shift, inner = p["mode"], None, None
    into, weight = (prepared(mode, t[name]) for name in ("into", "weight"))
    if p["bias"] and mode == "GRU":
        H = p["H"]
        shift, inner = t["bias"] + F.pad(t["own"][:, : 2 * H], (0, H)), t["own"][:, 2 * H :]
    elif p["bias"]:
        shift = prepared(mode, t["bias"] + t["own"])
    y, c = recurrence(mode, p["T"], t["x"].flatten(1, 2), into, shift, t["h"], t.get("c"), weight, inner)
    return {"y": y.transpose(0, 1)} | ({} if c is None else {"last": c})


def in_turn(p: Problem, t: Tensors) -> Tensors:
    function, ys, cs = getattr(torch, p["mode"].lower()), [], []
    for k in range(p["K"]):
        own = [t[name][k] for name in ("into", "weight", "bias", "own") if name in t]
        state = (t["h"][k][None], t["c"][k][None]) if "c" in t else t["h"][k][None]
        y, *last = function(t["x"][k], state, own, p["bias"], 1, 0.0, False, False, False)
        ys.append(y)
        cs.append(last[-1][0])
    found = {"y": torch.stack(ys)} | ({"last": torch.stack(cs)} if "c" in t else {})
    return found | ({"_sharp": _near_zero(p, t)} if p["mode"] == "RNN_RELU" else {})


def _near_zero(p: Problem, t: Tensors) -> Tensor:
    """Whether some state is, before its ReLU, so near zero that rounding decides."""
    shift = (t["bias"] + t["own"])[:, None] if p["bias"] else 0
    h, near = t["h"], torch.zeros((), dtype=torch.bool)
    for x in t["x"].unbind(1):
        h = x @ t["into"].mT + h @ t["weight"].mT + shift
        near |= h.abs().min() < 1e-3 * h.abs().max()
        h = h.relu()
    return near


BLOCKS = dict(apart=False, fewer=("y", "dx", "dweight"))
OPS = {
    "grouped_conv2d": Op(draw_conv, CONV, conv_inputs, grouped, convs, ALL),
    "conv2d": Op(draw_conv, CONV, conv_inputs, channel_groups, convs, {"default": 2, "cpu": 1, "torch": 1}),
    "winograd": Op(
        draw_winograd, CONV, conv_inputs, winograd, convs, {"cpu": 1}, dtypes=("float32",), more=("y", "dx", "dweight")
    ),
    "fused_conv2d": Op(draw_around, AROUND, around_inputs, fused, around, ALL, ("x", "residual")),
    "conv2d_moments": Op(draw_moments, AROUND, around_inputs, with_moments, and_moments, ALL),
    "block_conv2d": Op(
        draw_block, BLOCK, block_inputs, blocks(False), masked(False), {"default": 1, "triton": 0.03}, **BLOCKS
    ),
    "block_linear": Op(draw_linear, BLOCK, block_inputs, blocks(True), masked(True), {"default": 1}, **BLOCKS),
    "batch_norm": Op(draw_norm, NORM, norm_inputs, norm, norms, {"default": 1, "triton": 0.05}, HOT, fewer=(), more=()),
    "batch_norm on_cpu": Op(
        draw_norm, NORM, norm_inputs, norm_on_cpu, norms, {"cpu": 1}, HOT, ("float32",), fewer=(), more=()
    ),
    "packed batch_norm": Op(
        draw_packed, PACKED, packed_inputs, packed_norm, separate_norms, {"default": 3, "torch": 1}, fewer=(), more=()
    ),
    "recurrence": Op(
        draw_recurrent,
        RECURRENT,
        recurrent_inputs,
        together,
        in_turn,
        {"default": 1},
        dtypes=FLOATS,
        exempt=("mean10", "mean100", "mean1000", "1e30"),  # they saturate its gates
    ),
}
