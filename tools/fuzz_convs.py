"""The convolutions that tools/fuzz.py draws problems of, and the same by torch's own."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from fuzz_op import Normal, Op, Problem, Tensors, size, statistics_floors
from torch import Tensor

import decompk
from decompk import ops
from decompk.kernels import conv
from decompk.kernels.block_choice import mask_text
from decompk.kernels.call import dgrad_call, fprop_call, wgrad_call
from decompk.kernels.conv.form import Choice
from decompk.kernels.layout import in_layout
from decompk.kernels.problem import Epilogue

# ---- convolutions ---------------------------------------------------------------------------------------------------

CONV = dict(K=1, N=1, C=1, O=1, H=1, W=1, kh=1, kw=1, sh=1, sw=1, ph=0, pw=0, dh=1, dw=1, bias=False)
ALL = {"default": 4, "cpu": 4, "torch": 2, "loop": 1, "emulation": 2, "triton": 0.04}


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


BY_WINOGRAD = Choice(conv.named("winograd"), None, math.nan, "asked for")


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, geometry):
        x = in_layout(x, "member")
        ctx.save_for_backward(x, weight)
        ctx.call = fprop_call(x, weight, bias, geometry)
        return ctx.call.fprop(BY_WINOGRAD, x, weight, Epilogue(bias))

    @staticmethod
    def backward(ctx, dy):
        (x, weight), needs = ctx.saved_tensors, ctx.needs_input_grad
        dy = in_layout(dy, "member")
        dx = dgrad_call(ctx.call, dy).dgrad(BY_WINOGRAD, dy, weight) if needs[0] else None
        dw = wgrad_call(ctx.call, dy).wgrad(BY_WINOGRAD, dy, x) if needs[1] else None
        return dx, dw, dy.sum((1, 3, 4)) if needs[2] else None, None


def draw_winograd(rng: random.Random) -> Problem:
    p = draw_conv(rng) | dict(kh=3, kw=3, sh=1, sw=1, dh=1, dw=1)
    p |= dict(N=size(rng, 4), C=8 * size(rng, 3), O=8 * size(rng, 3))
    return p | dict(ph=max(p["ph"], 1), pw=max(p["pw"], 1))


def winograd(p: Problem, t: Tensors) -> Tensors:
    kernel = p["kh"], p["kw"], p["sh"], p["sw"], p["dh"], p["dw"]
    if kernel != (3, 3, 1, 1, 1, 1) or p["C"] % 8 or p["O"] % 8 or min(p["K"], p["N"]) < 1:
        raise decompk.DecompkError("Winograd takes 3×3 with stride 1, multiples of 8 channels and one image or more")
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
    size = y.double().nan_to_num(0, 0, 0).square().sum() / max(y.numel(), 1)  # what a ReLU leaves may be much less
    return {"y": (y.relu() if p["relu"] else y).to(x.dtype), "_floors": dict(y=size.sqrt().item())}


def with_moments(p: Problem, t: Tensors) -> Tensors:
    x = t["x"][0] if p["crops"] else t["x"]
    y, moments = ops.conv2d_moments(x, t["weight"], t.get("bias"), *_geometry(p), crops=_windows(p))
    count, mean, squares = moments.squeeze(1).unbind(1)
    return {"y": y, "count": count, "mean": mean, "var": squares / count}


def and_moments(p: Problem, t: Tensors) -> Tensors:
    y = each_conv(p, _members(p, t), t["weight"], t.get("bias"))
    var, mean = torch.var_mean(y.detach().to(_statistics(y)), (1, 3, 4), correction=0)
    found = {"y": y, "count": torch.full_like(mean, y[0, :, 0].numel()), "mean": mean, "var": var}
    return found | {"_floors": statistics_floors(y, "mean", "var")}


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


WINOGRAD = dict(dtypes=("float32",), exempt=("denormal",))  # its transforms round what has few bits
BLOCKS = dict(apart=False, fewer=("y", "dx", "dweight"))
OPS = {
    "grouped_conv2d": Op(draw_conv, CONV, conv_inputs, grouped, convs, ALL),
    "conv2d": Op(draw_conv, CONV, conv_inputs, channel_groups, convs, {"default": 2, "cpu": 1, "torch": 1}),
    "winograd": Op(draw_winograd, CONV, conv_inputs, winograd, convs, {"cpu": 1}, **WINOGRAD),
    "fused_conv2d": Op(draw_around, AROUND, around_inputs, fused, around, ALL, ("x", "residual")),
    "conv2d_moments": Op(draw_moments, AROUND, around_inputs, with_moments, and_moments, ALL),
    "block_conv2d": Op(
        draw_block, BLOCK, block_inputs, blocks(False), masked(False), {"default": 1, "triton": 0.03}, **BLOCKS
    ),
    "block_linear": Op(draw_linear, BLOCK, block_inputs, blocks(True), masked(True), {"default": 1}, **BLOCKS),
}
