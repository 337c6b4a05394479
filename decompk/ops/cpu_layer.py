"""A convolution on a CPU and what stands behind it, batch norm of the batch, residual, ReLU: one operator each way."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..kernels import cpu
from ..kernels.backend import forced
from ..kernels.call import Call, follows, fprop_call, settle, unwatched
from ..kernels.conv.direct import sizes_of
from ..kernels.layer_choice import LayerChoice, choose_layer, in_one_go
from ..kernels.problem import Geometry, Problem
from .conv_norm import Norm, layer_gradients
from .norm import contiguous

How = tuple["Call | ByChannel", LayerChoice]


def call_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    norm: Norm | None,
    gradient: bool,
    by_channel: bool = False,
) -> How | None:
    """How `cpu_layer` runs a layer, None where it does not; all tensors are float32 on the CPU, and unwatched.

    x: settled. gradient: whether x's is wanted. by_channel: whether every output reads one channel, its own.
    """
    if by_channel:
        fits = weight.shape[1:3] == (x.shape[1], 1) and x.shape[0] % weight.shape[0] == 0
        if not fits or (bias is not None and bias.shape != weight.shape[:2]):
            return None
    call = _by_channel(x.shape, weight.shape, geometry) if by_channel else fprop_call(x, weight, bias, geometry)
    if not call.as_given.N or min(call.as_given.out_size) < 1:
        return None
    if norm is not None:
        shape, vectors = weight.shape[:2], norm[:4]
        if any(t is not None and (t.shape != shape or t.dtype is not torch.float32) for t in vectors):
            return None
        if any(t is not None and not t.is_contiguous() for t in vectors[2:]):
            return None
    found = CHANNELS if by_channel else choose_layer(call.as_given, norm is not None, gradient)
    return None if found is None else (call, found)


class ByChannel:
    """What a `Call` tells of a convolution, for one of as many groups as channels: rows (K·N, C, H, W)."""

    def __init__(self, x: torch.Size, weight: torch.Size, geometry: Geometry):
        K, C, _, *kernel = weight
        N, (H, W) = x[0] // K, x[2:]
        self.as_given = Problem("fprop", "float32", K, N, C, C, H, W, (kernel[0], kernel[1]), *geometry)
        self.shape = torch.Size((K * N, C, *self.as_given.out_size))
        self.geometry, self.window = geometry, ()
        self.ends = self

    def empty(self) -> Tensor:
        return torch.empty(self.shape, memory_format=torch.channels_last, dtype=torch.float32, device="cpu")

    def weight(self, weight: Tensor) -> Tensor:
        return weight.contiguous()


_by_channel = functools.lru_cache(maxsize=1024)(ByChannel)
CHANNELS = LayerChoice(cpu.BY_CHANNEL, cpu.BY_CHANNEL)


def needs_dy(problem: Problem, by: LayerChoice) -> bool:
    """Whether dgrad needs the gradient of y whole, in room that it is given."""
    return by.backward != cpu.BY_CHANNEL and not in_one_go(problem)


def cpu_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    how: How,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    relu: int = 0,
) -> Tensor:
    """relu(batch_norm(conv(x)) + residual) of K members, rows (K·N, O, H', W'), for what `call_of` took.

    x settled rows (K·N, C, H, W), weight (K, O, C, kh, kw) or, channel by channel, (K, O, 1, kh, kw), bias (K, O);
    residual, only beside a norm, as the result. relu: 0 for none, 1, or 6 for a ReLU6.
    """
    residual = None if residual is None else settle(residual)
    gamma, beta = (None, None) if norm is None else (norm.weight, norm.bias)
    return _Layer.apply(x, weight, bias, gamma, beta, residual, how, norm, relu)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        how: How,
        norm: Norm | None,
        relu: int,
    ) -> Tensor:
        K, O = weight.shape[:2]
        call, by = how
        y, z, saved = call.empty(), None, None
        moved: tuple[Tensor | None, ...] = (None, None)
        if norm is not None:
            z, saved, moved = torch.empty_like(y), x.new_empty(4, K, O), (norm.running_mean, norm.running_var)
        momentum, eps = (0.0, 0.0) if norm is None else (norm.momentum, norm.eps)
        affine, around = (
            (*contiguous(gamma, beta), *moved),
            (relu, momentum, eps, by.forward, sizes_of(call.as_given)),
        )
        cpu.layer(x, call.weight(weight), *contiguous(bias), affine, residual, y, z, saved, *around)
        if norm is not None and norm.counter is not None:
            norm.counter.add_(1)
        torch.autograd.graph.increment_version([t for t in moved if t is not None])
        ctx.call, ctx.by, ctx.relu, ctx.asked = call, by, relu, forced.get()
        ctx.eps, ctx.has_residual, ctx.bias = None if norm is None else eps, residual is not None, bias
        result = y if z is None else z
        decides = result if relu and (norm is None or residual is not None) else None
        ctx.save_for_backward(x, weight, gamma, beta, None if z is None else y, decides, saved)
        return result

    @staticmethod
    def backward(ctx, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gamma, beta, y, z, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if follows(dz) or not unwatched(dz, x, weight, y, z):
            return *layer_gradients(ctx, ctx.eps, dz, (x, weight, ctx.bias, gamma, beta), z), *(None,) * 3
        call = ctx.call
        p = call.as_given
        dz, x = settle(dz), settle(x)  # hooks of saved tensors may have given back what lies otherwise
        y, z = (None if t is None else settle(t) for t in (y, z))
        dx = torch.empty_like(x) if needs[0] else None
        dw = weight.new_empty(*weight.shape[:2], *p.kernel, weight.shape[2])
        dgamma = None if saved is None else torch.empty_like(saved[0])
        dbeta = x.new_empty(p.K, p.O) if saved is not None or needs[2] else None
        g = torch.empty_like(dz) if ctx.has_residual and needs[5] else None
        dy = torch.empty_like(dz) if dx is not None and needs_dy(p, ctx.by) else None
        found = dx, dw, dgamma, dbeta, g, dy, ctx.by.backward, sizes_of(p)
        cpu.layer_backward(dz, x, call.weight(weight), y, z, saved, ctx.relu, *found)
        dbias = dbeta if saved is None else 0 * dbeta if needs[2] else None  # zero, as the norm takes it off again
        affine = (dgamma if needs[3] else None, dbeta if saved is not None and needs[4] else None)
        return dx, dw.movedim(-1, 2) if needs[1] else None, dbias if needs[2] else None, *affine, g, None, None, None
