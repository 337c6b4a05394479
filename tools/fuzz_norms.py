"""The batch norms and recurrences that tools/fuzz.py draws problems of, and the same by torch's own."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from fuzz_op import FLOATS, HOT, Normal, Op, Problem, Tensors, size, statistics_floors
from torch import Tensor, nn

import decompk
from decompk import ops
from decompk.kernels import cpu
from decompk.ops.norm import batch_norm_rows
from decompk.ops.recurrent import GATES, prepared, recurrence

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
    return p | dict(momentum=rng.choice((0.1, 0.1, 0.3, 1.0)), eps=rng.choice((1e-5, 1e-3)))


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
        raise decompk.DecompkError("its kernels take one image or more")
    residual = t["residual"].flatten(0, 1) if "residual" in t else None
    options = p["K"], p["training"], p["momentum"], p["eps"], residual, p["relu"]
    return {"y": batch_norm_rows(t["x"].flatten(0, 1), *_vectors(t), *options).unflatten(0, t["x"].shape[:2])}


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
    floors = dict(y=1.0, z=1.0, dx=steepest.nan_to_num(0, 0, 0).max().item(), dweight=sums, dbias=sums)
    floors |= statistics_floors(t["x"], "running_mean", "running_var")
    return {"_floors": floors if p.get("track", True) else floors | dict(e=1.0)}


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
    # Where torch's operators run packed ones they lie channels_last, of which torch's sums are less exact.
    on_torch = p["backend"] == "torch" or cpu.why_not() is not None
    lay = torch.channels_last if on_torch else torch.contiguous_format

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
    sums = (p["T"] * p["N"]) ** 0.5  # whose terms may cancel
    found["_floors"] = dict(dbias=sums, down=sums, dh=0.25)  # one step's share; those of several may cancel, too
    if p["mode"] != "RNN_RELU":
        found["_floors"] |= dict(y=0.25, last=0.25)  # states lie between −1 and 1, and may be near zero
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


SATURATING = ("mean10", "mean100", "mean1000", "1e30")  # of gates
PACKED_ON = {"default": 3, "torch": 1}
OPS = {
    "batch_norm": Op(draw_norm, NORM, norm_inputs, norm, norms, {"default": 1, "triton": 0.05}, HOT),
    "batch_norm_on_cpu": Op(draw_norm, NORM, norm_inputs, norm_on_cpu, norms, {"cpu": 1}, HOT, ("float32",)),
    "packed_batch_norm": Op(draw_packed, PACKED, packed_inputs, packed_norm, separate_norms, PACKED_ON, dtypes=FLOATS),
    "recurrence": Op(
        draw_recurrent, RECURRENT, recurrent_inputs, together, in_turn, {"default": 1}, dtypes=FLOATS, exempt=SATURATING
    ),
}
