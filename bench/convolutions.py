"""One convolution of all K members, forward and backward, by everybody who can compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from contestants import CL, NCHW, Setting
from layers import Layer
from race import Contestant, Result, Work
from torch import Tensor

from decompk import ops
from decompk.cost import formulas

Passes = list[Tensor]  # output, gradient of the weight and, but for the first layer, of the input
NAMES = ("output", "gradient of the weight", "gradient of the input")


@dataclass
class Call:
    """One convolution with its operands; x needs a gradient unless `first`."""

    convolve: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    weight: Tensor
    dy: Tensor
    first: bool

    def __post_init__(self) -> None:
        self.weight = self.weight.detach().requires_grad_()
        self.x = self.x.detach().requires_grad_(not self.first)

    def __call__(self) -> Passes:
        y = self.convolve(self.x, self.weight)
        return [y, *torch.autograd.grad(y, [self.weight] if self.first else [self.weight, self.x], self.dy)]


@dataclass
class Operands:
    """Of a layer: x (K, N, C, H, W), weight (K, O, C, kh, kw), dy (K, N, O, H', W')."""

    layer: Layer
    x: Tensor
    weight: Tensor
    dy: Tensor

    @staticmethod
    def random(layer: Layer, setting: Setting) -> Operands:
        torch.manual_seed(0)
        p = layer.problem
        shapes = (p.K, p.N, p.C, p.H, p.W), (p.K, p.O, p.C, *p.kernel), (p.K, p.N, p.O, *p.out_size)
        x, weight, dy = (torch.randn(shape).to(setting.device, setting.dtype) for shape in shapes)
        return Operands(layer, x, weight / (p.C * p.taps) ** 0.5, dy)

    def contestant(self, calls: list[Call], by_member: Callable[[list[Passes]], Passes]) -> Contestant:
        """`by_member` turns what the calls return into tensors (K, …)."""

        def result(passes: list[Passes]) -> Result:
            return {name: t.detach() for name, t in zip(NAMES, by_member(passes), strict=False)}

        p, count = self.layer.problem, 2 if self.layer.first else 3
        work = Work(count * formulas.conv_bytes(p), count * formulas.conv_flops(p))
        return Contestant(lambda: [call() for call in calls], result, work)


def ours(o: Operands) -> Contestant:
    """decompk.ops.grouped_conv2d on member-major memory, by the form that is chosen."""
    p = o.layer.problem
    convolve = partial(ops.grouped_conv2d, stride=p.stride, padding=p.padding, dilation=p.dilation)
    x, weight, dy = (t.movedim(2, -1).contiguous().movedim(-1, 2) for t in (o.x, o.weight, o.dy))
    return o.contestant([Call(convolve, x, weight, dy, o.layer.first)], lambda passes: passes[0])


def in_turn(o: Operands, dtype: torch.dtype | None = None) -> Contestant:
    """torch's convolution, one member after the other, channels_last; in float64 the reference."""
    p = o.layer.problem
    convolve = partial(F.conv2d, stride=p.stride, padding=p.padding, dilation=p.dilation)
    members = zip(*(t.to(dtype or t.dtype) for t in (o.x, o.weight, o.dy)), strict=True)
    calls = [Call(convolve, *(t.contiguous(memory_format=CL) for t in one), o.layer.first) for one in members]
    return o.contestant(calls, lambda passes: [torch.stack(ts) for ts in zip(*passes, strict=True)])


def grouped(o: Operands, format: torch.memory_format) -> Contestant:
    """torch's grouped convolution, the members' channels side by side."""
    p = o.layer.problem
    convolve = partial(F.conv2d, stride=p.stride, padding=p.padding, dilation=p.dilation, groups=p.K)
    x, dy = (t.transpose(0, 1).flatten(1, 2).contiguous(memory_format=format) for t in (o.x, o.dy))
    weight = o.weight.flatten(0, 1).contiguous(memory_format=format)

    def by_member(passes: list[Passes]) -> Passes:
        y, dweight, *dx = passes[0]
        y, *dx = (t.unflatten(1, (p.K, -1)).transpose(0, 1) for t in (y, *dx))
        return [y, dweight.unflatten(0, (p.K, -1)), *dx]

    return o.contestant([Call(convolve, x, weight, dy, o.layer.first)], by_member)


CONVOLUTIONS: dict[str, Callable[[Operands], Contestant]] = {
    "ours": ours,
    "members in turn, channels_last": in_turn,
    "grouped": partial(grouped, format=NCHW),
    "grouped, channels_last": partial(grouped, format=CL),
}


def reference(o: Operands) -> Result:
    exact = in_turn(o, torch.float64)
    return exact.result(exact.run())
