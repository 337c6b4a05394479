"""The matmul form: 1×1 convolutions as one batched matrix product, torch's own."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..device import Device
from ..problem import Geometry, Pair, Problem
from .torch_form import TorchForm, copied_ms, product_ms, result_bytes


class Matmul(TorchForm):
    """The pixels that a 1×1 kernel reads as rows of K matrices."""

    name = "matmul"

    def why_not(self, problem: Problem, config: None, device: Device) -> str | None:
        plain = problem.kernel == (1, 1) and problem.padding == (0, 0)
        return None if plain else "it is not 1×1 without padding"

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, differentiable: bool = False
    ) -> Tensor:
        rows, shape = _rows(x, geometry[0])
        weight = weight.flatten(2).mT
        y = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight)
        return y.view(*shape, -1).movedim(-1, 2)

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        stride = geometry[0]
        flat = dy.movedim(2, -1).reshape(len(x), -1, dy.shape[2])
        dx = dw = None
        if wanted[0]:
            dx = torch.bmm(flat, weight.flatten(2)).view(*dy.shape[:2], *dy.shape[3:], -1).movedim(-1, 2)
            if stride != (1, 1):
                read, dx = dx, torch.zeros_like(x)
                dx[..., :: stride[0], :: stride[1]] = read
        if wanted[1]:
            dw = torch.bmm(flat.mT, _rows(x, stride)[0]).view(weight.shape)
        return dx, dw

    def predicted(self, problem: Problem, device: Device) -> tuple[int, dict[str, float], str]:
        p = problem
        spent = {"library": product_ms(p, device, split=False)}
        if p.stride == (1, 1):
            return 1, spent, "one batched product"
        # What is read of x is copied together; in dgrad it is written between zeros.
        read = p.K * p.N * prod(p.out_size) * p.C * p.element_size
        spent["memory"] = copied_ms(2 * read + (result_bytes(p) if p.kind == "dgrad" else 0), device)
        return 3 if p.kind == "dgrad" else 2, spent, "one batched product, its pixels copied"


def _rows(x: Tensor, stride: Pair) -> tuple[Tensor, tuple[int, ...]]:
    """(K, N·H'·W', C) of the pixels that a 1×1 kernel reads, and (K, N, H', W')."""
    x = x[..., :: stride[0], :: stride[1]].movedim(2, -1)
    return x.reshape(x.shape[0], -1, x.shape[-1]), tuple(x.shape[:4])
