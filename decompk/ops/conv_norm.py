"""A convolution and the batch norm of its batch behind it, with residual and ReLU: in training one operator each way.

Forward three launches: the convolution, which takes the moments of what it writes; their sum; and the pass that
normalises. Backward four: the norm's sums over its gradient are taken by the dgrad that writes that gradient, where the
layer above is one of these, too; they are added up; then the norm's input gradient, dgrad and wgrad.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.backend import ANY, forced, resumed
from ..kernels.call import Call, adds_to_zero, dgrad_call, follows, settle, unwatched, wgrad_call
from ..kernels.conv.form import Choice
from ..kernels.layout import cut, pieces_of
from ..kernels.problem import Epilogue, Geometry, GradientEpilogue
from .conv import call_again, chosen, gradients_seen, settled_call
from .followed import activated, by_torch, gradients
from .norm import contiguous, kernels, torch_norm


class Norm(NamedTuple):
    """A batch norm by its batch's statistics: weight and bias (K, C), what a batch moves, and how far."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    counter: Tensor | None  # (K,) int64, of batches
    momentum: float
    eps: float


def conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    norm: Norm,
    residual: Tensor | None = None,
    relu: bool = False,
    window: tuple[int, ...] = (),
    passes: bool = False,
    private: bool = False,
) -> tuple[Tensor, Tensor]:
    """relu(batch_norm(conv(x)) + residual) of K members, and x for whoever reads it next.

    x rows (K·N, C, H, W), or with a window of crops the image (N, C, H, W) that all members share; weight
    (K, O, C, kh, kw), bias (K, O); residual as the result, rows (K·N, O, H', W'). For what is `unwatched` and runs on
    Triton. passes: whether other layers read x, too, from the second result, whose gradient is then added in the
    launch that writes x's. private: whether nobody but these layers sees the result or its gradient, which then comes
    without what the ReLU did not let pass.
    """
    # What x came out of: its backward wants the sums of the gradient that this one's writes.
    below = x.grad_fn if type(x.grad_fn) is _NODE and x.output_nr == 0 and x.grad_fn.private else None
    master = torch.is_autocast_enabled(x.device.type)
    read, call = settled_call(x.unsqueeze(0) if window else x, weight, bias, geometry, window, master=master)
    residual = None if residual is None else settle(residual)
    around = call, norm, relu, passes and read is x and x.requires_grad, private, below
    z, passed = _ConvNorm.apply(read, weight, bias, norm.weight, norm.bias, residual, *around)
    return z, x if passed is None else passed


@dataclass
class _Above:
    """What the layer above, which read z, did for the backward of the one that wrote it: dz past its ReLU, and sums."""

    gradient: Tensor
    version: int
    sums: Tensor

    def is_of(self, dz: Tensor) -> bool:
        """Whether this dz has come, and not one that was added to or that a hook changed."""
        mine = self.gradient
        lies = dz.data_ptr() == mine.data_ptr() and (dz.shape, dz.stride()) == (mine.shape, mine.stride())
        return lies and dz._version == self.version


class _Saved(NamedTuple):
    """What a forward keeps: y is what its norm normalises, joined its result where a residual came before the ReLU."""

    x: Tensor
    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    y: Tensor
    mean: Tensor
    rstd: Tensor
    joined: Tensor | None


class _ConvNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        call: Call,
        norm: Norm,
        relu: bool,
        passes: bool,
        private: bool,
        below: Any,
    ) -> tuple[Tensor, Tensor | None]:
        asked = forced.get()
        y, moments = _convolved(call, chosen(call, asked, "moments"), x, weight, bias)
        members, moved = _members(y, weight), (norm.running_mean, norm.running_var, norm.counter)
        mean, rstd = moments.new_empty((2, *weight.shape[:2]))
        kernels().launch_finalise(moments, *moved[:2], norm.momentum, norm.eps, (mean, rstd), norm.counter)
        torch.autograd.graph.increment_version([t for t in moved if t is not None])
        z = torch.empty_like(y)
        added = None if residual is None else residual.view(members)
        kernels().launch_apply(y.view(members), mean, rstd, *contiguous(gamma, beta), added, relu, z.view(members))
        ctx.call, ctx.asked, ctx.eps, ctx.relu = call, asked, norm.eps, relu
        ctx.has_residual, ctx.below, ctx.above = residual is not None, below, None
        ctx.bias = bias  # not saved: the norm takes off whatever it is, so it may change
        ctx.set_materialize_grads(False)
        joined = z if relu and residual is not None else None
        ctx.save_for_backward(*_Saved(x, weight, gamma, beta, y, mean, rstd, joined))
        ctx.private = private
        # Whoever packs what is saved, as checkpointing does, gives it back once, to its own backward.
        ctx.packed = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        return z, x if passes else None

    @staticmethod
    def backward(ctx, dz: Tensor | None, other: Tensor | None) -> tuple[Tensor | None, ...]:
        above, ctx.above = ctx.above, None
        if dz is None:
            return other, *(None,) * 11
        saved = _Saved(*ctx.saved_tensors)
        if follows(dz, other):
            return *_followed(ctx, saved, dz, other), *(None,) * 6
        if not unwatched(dz, other, saved.x, saved.weight, saved.y, saved.joined):
            return *_seen(ctx, saved, dz, other), *(None,) * 6
        return *_backward(ctx, saved, dz, other, above), *(None,) * 6


_NODE: Any = _ConvNorm._backward_cls


def _convolved(call: Call, choice: Choice, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y, rows (K·N, O, H', W'), and its moments (K, S, 3, O)."""
    K, O = weight.shape[:2]
    (bias,) = contiguous(bias)
    if choice.backend == "torch":  # whose moments are a pass of several operators
        y = _rows(call.fprop(choice, x, weight, Epilogue(bias)))
        members = y.view(_members(y, weight))
        return y, kernels().launch_moments(members, pieces_of(members))
    moments = x.new_empty((K, call.moments_pieces(choice), 3, O), dtype=torch.float32)
    return _rows(call.fprop(choice, x, weight, Epilogue(bias, moments=moments))), moments


def _backward(
    ctx: Any, saved: _Saved, dz: Tensor, other: Tensor | None, above: _Above | None
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, gamma, beta and residual."""
    x, weight, gamma, beta, y, mean, rstd, z = saved
    needs, asked, norm = ctx.needs_input_grad, ctx.asked, kernels()
    x, call = call_again(ctx.call, x, weight)  # hooks of saved tensors may have given back what lies otherwise
    dz, y, z = settle(dz), settle(y), None if z is None else settle(z)
    members = _members(y, weight)
    raw, vectors = y.view(members), (mean, rstd, *contiguous(gamma, beta))
    if above is not None and above.is_of(dz):
        sums, g, gated = above.sums, dz.view(members), False
    else:
        joined = None if z is None else z.view(members)
        sums, found = norm.launch_sums(dz.view(members), raw, joined, *vectors, ctx.relu, pieces_of(raw))
        g, gated = (dz.view(members), ctx.relu) if found is None else (found, False)

    rows = torch.empty_like(y)
    dy = rows.view(call.shape)
    wgrad = wgrad_call(call, dy)
    choice = chosen(wgrad, asked)
    adds = needs[1] and adds_to_zero(choice, weight.dtype)
    dw = wgrad.empty() if adds else None
    dgamma, dbeta = torch.empty_like(mean), torch.empty_like(mean)
    # Of the convolution's bias zero, as the norm takes off what it adds.
    dbias = torch.empty_like(mean) if ctx.bias is not None and needs[2] else None
    norm.launch_merge(sums, dgamma, dbeta, dbias, dw)
    norm.launch_input(g, raw, *vectors, dgamma, dbeta, gated, True, rows.view(members))
    dx = _input_gradient(ctx, call, dy, weight, other) if needs[0] else None
    dw = wgrad.wgrad(choice, dy, x, dw) if needs[1] else None
    return (
        dx,
        dw,
        None if dbias is None else _as(dbias, weight),
        _as(dgamma, gamma) if needs[3] else None,
        _as(dbeta, beta) if needs[4] else None,
        g.flatten(0, 1) if ctx.has_residual and needs[5] else None,
    )


def _input_gradient(ctx: Any, call: Call, dy: Tensor, weight: Tensor, other: Tensor | None) -> Tensor:
    """dx + other; where x came out of another of these layers, past its ReLU, its norm's sums left there."""
    dgrad = dgrad_call(call, dy)
    below = ctx.below
    if below is not None and (below.packed or not torch._C._will_engine_execute_node(below)):
        below = None
    choice = chosen(dgrad, ctx.asked, "" if below is None else "sums")
    if not choice.form.gradient_epilogue:
        dx = dgrad.dgrad(choice, dy, weight)
        return dx if other is None else dx.add_(other)
    added, sums = None if other is None else settle(other), None
    epilogue = None if added is None else GradientEpilogue(added)
    if below is not None:
        theirs = _Saved(*below.saved_tensors)
        read = theirs.y, theirs.joined
        if all(t is None or (t.stride() == dgrad.strides and t.dtype == dy.dtype) for t in read):
            pieces = (weight.shape[0], dgrad.moments_pieces(choice), 2, weight.shape[2])
            sums = theirs.mean.new_empty(pieces)
            vectors = theirs.mean, theirs.rstd, *contiguous(theirs.gamma, theirs.beta)
            epilogue = GradientEpilogue(added, *read, *vectors, below.relu, sums)
    dx = dgrad.dgrad(choice, dy, weight, epilogue)
    if sums is not None:
        below.above = _Above(dx, dx._version, sums)
    return dx


# ---- for who looks on at a backward ---------------------------------------------------------------------------------


def _followed(ctx: Any, saved: _Saved, dz: Tensor, other: Tensor | None) -> Sequence[Tensor | None]:
    """Gradients by torch's own operators, differentiable again."""
    x, weight, gamma, beta, *_, z = saved
    dx, *others = layer_gradients(ctx, ctx.eps, dz, (x, weight, ctx.bias, gamma, beta), z)
    dx = other if dx is None else dx if other is None else dx + other
    return dx, *others


def layer_gradients(
    ctx: Any, eps: float | None, dz: Tensor, inputs: Sequence[Tensor | None], z: Tensor | None
) -> Sequence[Tensor | None]:
    """Those of x, weight, bias, gamma, beta and residual by torch's own operators, differentiable again.

    ctx: of a layer's forward, with its call, backend asked for, relu and has_residual. eps: None without a norm.
    z: the result, where it says what the ReLU let pass.
    """
    ends = ctx.call.ends

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        read = cut(x, ends.window) if ends.window else x.unflatten(0, (weight.shape[0], -1))
        y = by_torch(read, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *ends.geometry)
        y = y if eps is None else torch_norm(y, gamma, beta, None, None, True, 0.0, eps)
        y = y.flatten(0, 1)
        return y if z is not None else activated(y, ctx.relu)

    stopped = None if z is None else ~((z > 0) & (z < ctx.relu)) if ctx.relu > 1 else z <= 0
    g = dz if stopped is None else dz.masked_fill(stopped, 0)
    needs = ctx.needs_input_grad
    with resumed(ctx.asked or ANY):
        found = gradients(layer, inputs, g, needs[:5])
    return *found, g if ctx.has_residual and needs[5] else None


def _seen(ctx: Any, saved: _Saved, dz: Tensor, other: Tensor | None) -> Sequence[Tensor | None]:
    """Gradients by the operators of either part, which modes see."""
    x, weight, gamma, beta, y, mean, rstd, z = saved
    K = weight.shape[0]
    y, z = (t if t is None else t.unflatten(0, (K, -1)) for t in (y, z))
    dz = settle(dz).unflatten(0, (K, -1))
    needs = ctx.needs_input_grad
    around = mean, rstd, gamma, beta, ctx.relu, True, ctx.asked or ANY
    dy, dgamma, dbeta, g = torch.ops.decompk.batch_norm_backward(dz, y, z, *around)
    dy = dy if ctx.call.ends.window else dy.flatten(0, 1)
    dx, dw, _ = gradients_seen(dy, x, weight, ctx.call, (*needs[:2], False), ctx.asked)
    dx = dx if other is None or dx is None else dx + other
    dbias = weight.new_zeros(weight.shape[:2]) if ctx.bias is not None and needs[2] else None
    dgamma, dbeta = dgamma if gamma is None else dgamma.to(gamma.dtype), dbeta if beta is None else dbeta.to(beta.dtype)
    residual = (dz if z is None else g).flatten(0, 1) if ctx.has_residual else None
    found = dx, dw, dbias, dgamma, dbeta, residual
    return [t if wants else None for t, wants in zip(found, needs, strict=False)]


def _as(gradient: Tensor, of: Tensor) -> Tensor:
    """In the dtype of what it is the gradient of; looked at first, as `to` takes its time where it is so already."""
    return gradient if gradient.dtype is of.dtype else gradient.to(of.dtype)


# ---- how they lie ---------------------------------------------------------------------------------------------------


def _rows(y: Tensor) -> Tensor:
    """(K·N, O, H', W') of what may be members."""
    return y if y.dim() == 4 else y.flatten(0, 1)


def _members(y: Tensor, weight: Tensor) -> tuple[int, ...]:
    """(K, N, O, H', W') of rows."""
    K = weight.shape[0]
    return K, y.shape[0] // K, *y.shape[1:]
