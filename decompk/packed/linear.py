"""Linear layers and look-up tables of K members."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PackError
from ..kernels.backend import runs_triton
from ..kernels.call import unwatched
from ..kernels.thresholds import linear_form
from .twin import Twin


class PackedLinear(Twin, nn.Linear):
    """x (K·N, …, I), weight (K, O, I), bias (K, O) → (K·N, …, O)."""

    def forward(self, x: Tensor) -> Tensor:
        self._twin_check(x)
        shape = x.shape[:-1]
        if x.shape[-1] != self.in_features:
            raise PackError(
                f"'{self._twin_path}' takes {self.in_features} features, and got an input of {tuple(x.shape)}."
            )
        rows = prod(shape) // self._twin_K  # torch.Size.numel() would fix the batch of an export
        here = unwatched(x, self.weight, self.bias)
        on_triton = here and runs_triton(x)
        if linear_form(rows, self.in_features, self.out_features, x.dtype, x.is_cuda or on_triton) == "loop":
            return self._twin_each(F.linear, x, self.weight, self.bias)
        x, weight = x.reshape(self._twin_K, rows, self.in_features), self.weight.mT
        trains = x.is_cpu and self.weight.requires_grad and torch.is_grad_enabled()
        if on_triton or (here and trains):
            autocast = torch.is_autocast_enabled(x.device.type)
            if autocast or all(t is None or t.dtype == x.dtype for t in (self.weight, self.bias)):
                x = x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x
                return _Linear.apply(x, self.weight, self.bias).view(*shape, self.out_features)
        y = torch.bmm(x, weight) if self.bias is None else torch.baddbmm(self.bias.unsqueeze(1), x, weight)
        return y.view(*shape, self.out_features)


class _Linear(torch.autograd.Function):
    """x (K, N, I), weight (K, O, I), bias (K, O) → (K, N, O), all in x's dtype.

    Gradients lie as what they are of, so that they are kept as they come, where torch's would be copied first.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        read, written, _ = ctx.needs_input_grad
        cast = weight.to(x.dtype)
        ctx.cast, ctx.dtypes = cast if read else None, (weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(x if written else None, weight if read else None)  # what is not read may change
        if bias is None:
            return torch.bmm(x, cast.mT)
        return torch.baddbmm(bias.unsqueeze(1).to(x.dtype), x, cast.mT)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs, (dtype, of_bias) = ctx.needs_input_grad, ctx.dtypes
        dx = None
        if needs[0]:
            dx = torch.bmm(dy, weight.to(dy.dtype) if torch.is_grad_enabled() else ctx.cast)
        return (
            dx,
            torch.bmm(dy.mT, x).to(dtype) if needs[1] else None,
            dy.sum(1, dtype=of_bias) if needs[2] else None,
        )


class PackedEmbedding(Twin, nn.Embedding):
    """x (K·N, …) of integers, weight (K, V, D) → (K·N, …, D)."""

    @classmethod
    def _twin_fits(cls, leaf: nn.Embedding) -> bool:
        return leaf.max_norm is None and not leaf.sparse  # max_norm writes into the weight it reads

    def forward(self, x: Tensor) -> Tensor:
        self._twin_check(x)

        def look_up(x: Tensor, weight: Tensor) -> Tensor:
            return F.embedding(x, weight, self.padding_idx, None, self.norm_type, self.scale_grad_by_freq)

        return self._twin_each(look_up, x, self.weight)


class PackedPReLU(Twin, nn.PReLU):
    """x (K·N, …), weight (K, 1) or (K, c) → x's shape."""

    def forward(self, x: Tensor) -> Tensor:
        self._twin_check(x)
        return self._twin_each(F.prelu, x, self.weight)
