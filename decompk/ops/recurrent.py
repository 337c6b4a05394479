"""The recurrences of K members in step: one batched product a time step advances all of them, in both directions.

A *lane* is one member's recurrence in one direction. Tensors are time-major, (T, P, N, ·) for P lanes. The gates'
share of the input has no recurrence in it and comes as one product for all steps from outside; what is left in the
loop is h Wᵀ of every lane, one `baddbmm`, and the gates' arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    mode: str, gates: Tensor, h: Tensor, c: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One layer's recurrence (2.27) of P lanes over T steps.

    mode: "RNN_TANH", "RNN_RELU", "GRU" or "LSTM". gates: (T, P, N, G·H), the input's share U x + b of every gate, in
    torch's order of gates; U, b and W are `prepared`. h, and for an LSTM c: (P, N, H), the states before the first
    step. weight: (P, G·H, H), W of every gate. bias: (P, H), of a GRU's new gate beside W, where its reset gate scales
    both; None without biases.
    Computed in the dtype of `gates`, also under autocast. Returns the hidden states of all steps (T, P, N, H) and an
    LSTM's last c (P, N, H). Differentiable once.
    """
    h, c, weight, bias = (t if t is None else t.to(gates.dtype) for t in (h, c, weight, bias))
    with torch.autocast(gates.device.type, enabled=False):
        return _Recurrence.apply(mode, gates, h, c, weight, bias)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mode: str, gates: Tensor, h: Tensor, c: Tensor | None, weight: Tensor, bias: Tensor | None):
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
            saved = opened, cells, squashed, c
            last = last.clone()
        elif mode == "GRU":
            opened, inner = gates.clone(), torch.empty_like(states)
            shift = gates.new_zeros(1) if bias is None else bias.unsqueeze(1)
            open_, into = across.split([2 * H, H], -1)
            for t in range(T):
                g = opened[t]
                rz, n = g.split([2 * H, H], -1)
                rz.baddbmm_(before, open_).sigmoid_()
                torch.baddbmm(shift, before, into, out=inner[t])
                n.addcmul_(rz[..., :H], inner[t]).tanh_()
                before = torch.lerp(n, before, rz[..., H:], out=states[t])
            saved = opened, inner
        else:
            squash = torch.tanh_ if mode == "RNN_TANH" else torch.relu_
            for t in range(T):
                before = squash(torch.baddbmm(gates[t], before, across, out=states[t]))
            saved = ()
        ctx.mode = mode
        ctx.save_for_backward(weight, h, states, *saved)
        ctx.set_materialize_grads(False)
        return states, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dstates: Tensor | None, dlast: Tensor | None):
        weight, h, states, *saved = ctx.saved_tensors
        T, P, N, H = states.shape
        dstates = torch.zeros_like(states) if dstates is None else dstates
        dgates = states.new_empty(T, P, N, weight.shape[1])
        dh = torch.zeros_like(h)
        dc = dbias = None
        across = dgates  # what W's products got back
        if ctx.mode == "LSTM":
            opened, cells, squashed, c = saved
            dc = torch.zeros_like(h) if dlast is None else dlast.clone()
            for t in reversed(range(T)):
                dh += dstates[t]
                (i, f, n, o), (di, df, dn, do) = opened[t].split(H, -1), dgates[t].split(H, -1)
                dc += _through_tanh(dh * o, squashed[t])
                torch.mul(dc, i, out=dn).mul_(2)
                torch.mul(dc, n, out=di).mul_(2).sub_(dc)
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
            if ctx.needs_input_grad[5]:
                dbias = across[..., 2 * H :].sum((0, 2))
        else:
            through = _through_tanh if ctx.mode == "RNN_TANH" else _through_relu
            for t in reversed(range(T)):
                dh += dstates[t]
                through(dh, states[t], out=dgates[t])
                dh = torch.bmm(dgates[t], weight)
        dweight = None
        if ctx.needs_input_grad[4]:
            dweight = torch.zeros_like(weight)
            if T:
                dweight = torch.bmm(across[0].mT, h)
            if T > 1:
                rows, columns = (t.transpose(0, 1).flatten(1, 2) for t in (across[1:], states[:-1]))
                dweight = dweight.baddbmm_(rows.mT, columns)
        return None, dgates, dh, dc, dweight, dbias


def _through_tanh(grad: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """grad · (1 − y²)"""
    if out is None:
        return torch.ops.aten.tanh_backward.default(grad, y)
    return torch.ops.aten.tanh_backward.grad_input(grad, y, grad_input=out)


def _through_sigmoid(grad: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """grad · y (1 − y)"""
    return torch.ops.aten.sigmoid_backward.grad_input(grad, y, grad_input=out)


def _through_relu(grad: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """grad where y > 0"""
    return torch.mul(grad, y > 0, out=out)
