"""The recurrences of K members in step: one batched product a time step advances all of them, in both directions.

A *lane* is one member's recurrence in one direction. Tensors are time-major, (T, P, N, ·) for P lanes. The gates'
share of the input has no recurrence in it and is one product for all steps; what is left in the loop is h Wᵀ of every
lane, one `baddbmm`, and the gates' arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..kernels.call import follows, watched
from .followed import gradients

GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "GRU": 3, "LSTM": 4}  # in nn.RNNBase's names, each of H rows


def prepared(mode: str, rows: Tensor) -> Tensor:
    """A weight (P, G·H, ·) or bias (P, G·H) as `recurrence` takes it: an LSTM's cell gate doubled.

    tanh(a) = 2 σ(2a) − 1: with it one σ over contiguous memory serves all four gates.
    """
    if mode != "LSTM":
        return rows
    H = rows.shape[1] // 4
    factor = torch.ones(4 * H, dtype=rows.dtype, device=rows.device)
    factor[2 * H : 3 * H] = 2
    return rows * factor.view(-1, *(1,) * (rows.dim() - 2))


def recurrence(
    mode: str,
    steps: int,
    rows: Tensor,
    into: Tensor,
    shift: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One layer's recurrence (2.27) of P lanes over T = `steps`.

    mode: "RNN_TANH", "RNN_RELU", "GRU" or "LSTM". rows: (P, T·N, I), the inputs x; into: (P, G·H, I) and shift:
    (P, G·H), the U and b of every gate's share U x + b, in torch's order of gates. h, and for an LSTM c: (P, N, H), the
    states before the first step. weight: (P, G·H, H), W of every gate. bias: (P, H), of a GRU's new gate beside W,
    where its reset gate scales both. into, shift and weight are `prepared`; shift and bias None without biases.
    Computed in one dtype: that of rows, or autocast's. Returns the hidden states of all steps (T, P, N, H) and an
    LSTM's last c (P, N, H). Differentiable as often as torch's own operators.
    """
    device = rows.device.type
    low = torch.is_autocast_enabled(device) and rows.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if low else rows.dtype
    tensors = [t if t is None else t.to(dtype) for t in (rows, into, shift, h, c, weight, bias)]
    with torch.autocast(device, enabled=False):
        if watched() or torch.compiler.is_compiling():
            return _by_steps(mode, steps, *tensors)
        return _Recurrence.apply(mode, steps, *tensors)


def _gates(steps: int, rows: Tensor, into: Tensor, shift: Tensor | None) -> Tensor:
    """The input's share of every gate, (T, P, N, G·H): one product for all steps."""
    gates = torch.bmm(rows, into.mT) if shift is None else torch.baddbmm(shift.unsqueeze(1), rows, into.mT)
    return gates.unflatten(1, (steps, gates.shape[1] // steps)).transpose(0, 1)


def _by_steps(
    mode: str,
    steps: int,
    rows: Tensor,
    into: Tensor,
    shift: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence as its formula, for whatever follows torch's own operators alone."""
    H, across = h.shape[2], weight.mT
    states = []
    for gates in _gates(steps, rows, into, shift).unbind(0):
        if mode == "LSTM":
            i, f, n, o = torch.baddbmm(gates, h, across).sigmoid().split(H, -1)
            c = f * c + i * (2 * n - 1)
            h = o * c.tanh()
        elif mode == "GRU":
            open_, new = across.split([2 * H, H], -1)
            r, z = torch.baddbmm(gates[..., : 2 * H], h, open_).sigmoid().split(H, -1)
            inner = torch.bmm(h, new) if bias is None else torch.baddbmm(bias.unsqueeze(1), h, new)
            n = (gates[..., 2 * H :] + r * inner).tanh()
            h = n + z * (h - n)
        else:
            h = torch.baddbmm(gates, h, across)
            h = h.tanh() if mode == "RNN_TANH" else h.relu()
        states.append(h)
    return torch.stack(states), c


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mode: str, steps: int, rows, into, shift, h, c, weight, bias) -> tuple[Tensor, Tensor | None]:
        gates = _gates(steps, rows, into, shift)
        T, P, N, H = *gates.shape[:3], h.shape[2]
        states = gates.new_empty(T, P, N, H)
        across = weight.mT
        saved: Sequence[Tensor]
        last = None
        before = h
        if mode == "LSTM":
            opened, cells, squashed = gates.new_empty(gates.shape), torch.empty_like(states), torch.empty_like(states)
            last = c
            for t in range(T):
                g = torch.baddbmm(gates[t], before, across, out=opened[t]).sigmoid_()
                i, f, n, o = g.split(H, -1)
                last = torch.mul(f, last, out=cells[t]).sub_(i).addcmul_(i, n, value=2)
                before = torch.mul(o, torch.tanh(last, out=squashed[t]), out=states[t])
            saved = opened, cells, squashed
            last = last.clone()
        elif mode == "GRU":
            opened, inner = gates, torch.empty_like(states)
            beside = gates.new_zeros(1) if bias is None else bias.unsqueeze(1)
            open_, new = across.split([2 * H, H], -1)
            for t in range(T):
                g = opened[t]
                rz, n = g.split([2 * H, H], -1)
                rz.baddbmm_(before, open_).sigmoid_()
                torch.baddbmm(beside, before, new, out=inner[t])
                n.addcmul_(rz[..., :H], inner[t]).tanh_()
                before = torch.lerp(n, before, rz[..., H:], out=states[t])
            saved = opened, inner
        else:
            squash = torch.tanh_ if mode == "RNN_TANH" else torch.relu_
            for t in range(T):
                before = squash(torch.baddbmm(gates[t], before, across, out=states[t]))
            saved = ()
        ctx.mode, ctx.steps = mode, steps
        ctx.save_for_backward(rows, into, shift, h, c, weight, bias, states, *saved)
        ctx.set_materialize_grads(False)
        return states, last

    @staticmethod
    def backward(ctx, dstates: Tensor | None, dlast: Tensor | None):
        rows, into, shift, h, c, weight, bias, states, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        if follows(dstates, dlast):
            inputs = rows, into, shift, h, c, weight, bias
            return None, None, *gradients(partial(_by_steps, ctx.mode, ctx.steps), inputs, (dstates, dlast), needs)
        T, P, N, H = states.shape
        dstates = torch.zeros_like(states) if dstates is None else dstates
        dgates = states.new_empty(P, T, N, weight.shape[1]).transpose(0, 1)  # its rows are then those of the products
        dh = torch.zeros_like(h)
        dc = dbias = None
        across = dgates  # what W's products got back
        if ctx.mode == "LSTM":
            opened, cells, squashed = saved
            dc = torch.zeros_like(h) if dlast is None else dlast.clone()
            for t in reversed(range(T)):
                dh += dstates[t]
                (i, f, n, o), (di, df, dn, do) = opened[t].split(H, -1), dgates[t].split(H, -1)
                dc += _through_tanh(dh * o, squashed[t])
                torch.mul(dc, i, out=dn).mul_(2)
                torch.mul(n, 2, out=di).sub_(1).mul_(dc)
                torch.mul(dc, cells[t - 1] if t else c, out=df)
                torch.mul(dh, squashed[t], out=do)
                _through_sigmoid(dgates[t], opened[t], out=dgates[t])
                dc *= f
                dh = torch.bmm(dgates[t], weight)
        elif ctx.mode == "GRU":
            opened, inner = saved
            across = torch.empty_like(dgates)
            for t in reversed(range(T)):
                before = states[t - 1] if t else h
                dh += dstates[t]
                r, z, n = opened[t].split(H, -1)
                kept = dh * z
                dr, dz, dn = dgates[t].split(H, -1)
                _through_tanh(dh - kept, n, out=dn)
                _through_sigmoid(dh * (before - n), z, out=dz)
                _through_sigmoid(dn * inner[t], r, out=dr)
                torch.cat((dgates[t][..., : 2 * H], dn * r), -1, out=across[t])
                dh = kept.baddbmm_(across[t], weight)
            if needs[6]:
                dbias = across[..., 2 * H :].sum((0, 2))
        else:
            through = _through_tanh if ctx.mode == "RNN_TANH" else _through_relu
            for t in reversed(range(T)):
                dh += dstates[t]
                through(dh, states[t], out=dgates[t])
                dh = torch.bmm(dgates[t], weight)
        dweight = None
        if needs[5]:
            dweight = torch.zeros_like(weight)
            if T:
                dweight = torch.bmm(across[0].mT, h)
            if T > 1:
                later, before = (t.transpose(0, 1).flatten(1, 2) for t in (across[1:], states[:-1]))
                dweight = dweight.baddbmm_(later.mT, before)
        dgates = dgates.transpose(0, 1).flatten(1, 2)
        drows = torch.bmm(dgates, into) if needs[0] else None
        dinto = torch.bmm(dgates.mT, rows) if needs[1] else None
        dshift = dgates.sum(1) if needs[2] else None
        return None, None, drows, dinto, dshift, dh, dc, dweight, dbias


def _through_tanh(grad: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """grad · (1 − y²)"""
    if out is None:
        return torch.ops.aten.tanh_backward.default(grad, y)
    return torch.ops.aten.tanh_backward.grad_input(grad, y, grad_input=out)


def _through_sigmoid(grad: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """grad · y (1 − y)"""
    return torch.ops.aten.sigmoid_backward.grad_input(grad, y, grad_input=out)


def _through_relu(grad: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """grad but where y <= 0"""
    return torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=out)
