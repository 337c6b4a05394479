"""Recurrent layers of K members: all members and both directions in one loop over time, or torch's own in turn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PackError
from ..kernels.thresholds import recurrent_form
from ..ops.recurrent import prepared, recurrence
from .twin import Twin, member_rows


class _PackedRecurrent(Twin):
    """x (K·N, T, I) → (K·N, T, D·H) and the last states (L·D, K·N, H), with D directions and L layers.

    Weights (K, G·H, ·) under torch's names, in its order of gates.
    """

    _twin_dims = 3

    @classmethod
    def _twin_fits(cls, leaf: nn.RNNBase) -> bool:
        return leaf.batch_first and not leaf.proj_size

    def flatten_parameters(self) -> None:
        """Nothing: what cuDNN would lay out anew are the weights of one network."""

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        if not isinstance(x, Tensor) or x.dim() != 3 or not x.shape[1]:
            raise PackError(f"'{self._twin_path}' takes a padded batch (samples, steps, features) in a packed module.")
        self._twin_check(x)
        lstm = self.mode == "LSTM"
        directions = 1 + self.bidirectional
        if hx is None:
            zeros = x.new_zeros(self.num_layers * directions, x.shape[0], self.hidden_size)
            hx = (zeros, zeros) if lstm else zeros
        else:
            self.check_forward_args(x, hx, None)
        K, N = self._twin_K, x.shape[0] // self._twin_K
        if recurrent_form(self.mode, K, x.dtype, x.is_cuda) == "loop":
            return self._twin_in_turn(x, hx)
        h, *cells = (_by_layer(s, self.num_layers, directions, K) for s in (hx if lstm else (hx,)))

        y = x.unflatten(0, (K, N)).permute(2, 0, 1, 3)  # (T, K, N, I)
        last_h, last_c = [], []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                y = F.dropout(y, self.dropout, self.training)
            lanes = [self._twin_lane(y, layer, reverse) for reverse in range(directions)]
            rows, into, shift, weight, bias = map(_cat, zip(*lanes, strict=True))
            before = h[layer], cells[0][layer] if lstm else None
            states, cell = recurrence(self.mode, y.shape[0], rows, into, shift, *before, weight, bias)
            last_h.append(states[-1])
            last_c.append(cell)
            forward, *backward = states.split(K, 1)
            y = torch.cat([forward, backward[0].flip(0)], -1) if backward else forward
        y = y.permute(1, 2, 0, 3).flatten(0, 1)
        h = _by_sample(last_h, directions)
        return y, (h, _by_sample(last_c, directions)) if lstm else h

    def _twin_in_turn(self, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        """Torch's own layer, one member after the other: to the bit what each computes alone."""
        function = getattr(torch, self.mode.lower())
        pair = self.mode == "LSTM"
        samples = [x.shape[0] // self._twin_K] * self._twin_K
        states = zip(*(s.split(samples, 1) for s in hx), strict=True) if pair else hx.split(samples, 1)
        weights = zip(*(getattr(self, name).unbind(0) for name in self._flat_weights_names), strict=True)
        options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, True)
        members = zip(member_rows(x, self._twin_K), states, weights, strict=True)
        y, *last = zip(*(function(part, state, own, *options) for part, state, own in members), strict=True)
        last = tuple(torch.cat(parts, 1) for parts in last)
        return torch.cat(y), last if pair else last[0]

    def _twin_lane(self, y: Tensor, layer: int, reverse: int) -> tuple[Tensor | None, ...]:
        """What `recurrence` takes of one direction: its rows (K, T·N, I), U, b, W, and a GRU's bias beside W."""
        names = [f"{name}_l{layer}{'_reverse' * reverse}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        into, across, *biases = (getattr(self, name) if self.bias or i < 2 else None for i, name in enumerate(names))
        into, across = (prepared(self.mode, weight) for weight in (into, across))
        y = y.flip(0) if reverse else y
        rows = y.transpose(0, 1).flatten(1, 2)
        shift = inner = None
        if self.bias:
            shift, own = biases
            if self.mode == "GRU":  # the reset gate scales the new gate's W h together with its bias
                H = self.hidden_size
                shift, inner = shift + F.pad(own[:, : 2 * H], (0, H)), own[:, 2 * H :]
            else:
                shift = prepared(self.mode, shift + own)
        return rows, into, shift, across, inner


class PackedRNN(_PackedRecurrent, nn.RNN):
    pass


class PackedGRU(_PackedRecurrent, nn.GRU):
    pass


class PackedLSTM(_PackedRecurrent, nn.LSTM):
    pass


def _by_layer(states: Tensor, layers: int, directions: int, K: int) -> Tensor:
    """(L·D, K·N, H) → (L, D·K, N, H): a layer's lanes, those of the first direction first."""
    return states.unflatten(0, (layers, directions)).unflatten(2, (K, -1)).flatten(1, 2)


def _by_sample(states: list[Tensor], directions: int) -> Tensor:
    """L of (D·K, N, H) → (L·D, K·N, H)."""
    return torch.stack(states).unflatten(1, (directions, -1)).flatten(2, 3).flatten(0, 1)


def _cat(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)
