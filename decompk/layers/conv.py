"""Convolutions of K members: in turn, as channel groups of one call, or as one batched product."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import conv_form
from .base import Twin, member_major, side_by_side


class _PackedConv(Twin):
    """x (K·N, c, *spatial), weight (K, O, c / groups, *kernel), bias (K, O) → (K·N, O, *spatial')."""

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
            return self.function(x, weight, bias, self.stride, padding, self.dilation, groups)

        positions = x.shape[0] * x.shape[2:].numel() // math.prod(self.stride)
        pointwise = (
            x.dim() == 4 and self.kernel_size == (1, 1) and self.groups == 1 and padding in (0, (0, 0), "valid", "same")
        )
        form = self._form(x, positions, pointwise)
        return self._pointwise(x) if form == "matmul" else self._run(form, convolve, x)

    def _form(self, x: Tensor, positions: int, pointwise: bool = False) -> str:
        inner = self.in_channels // self.groups
        return conv_form(
            self.kernel_size, self.stride, pointwise, inner, self.out_channels, positions // self.K, x.dtype
        )

    def _run(self, form: str, convolve, x: Tensor) -> Tensor:
        if form == "loop":
            return self.each_member(lambda x, w, b: convolve(x, w, b, self.groups), x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.flatten()
        y = convolve(side_by_side(x, self.K), self.weight.flatten(0, 1), bias, self.K * self.groups)
        return member_major(y, self.K)

    def _pointwise(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
        shape = x.shape[:3]
        x = x.reshape(self.K, shape.numel() // self.K, self.in_channels)
        weight = self.weight.flatten(2).mT
        y = torch.bmm(x, weight) if self.bias is None else torch.baddbmm(self.bias.unsqueeze(1), x, weight)
        return y.view(*shape, self.out_channels).permute(0, 3, 1, 2)


class PackedConv1d(_PackedConv, nn.Conv1d):
    function = staticmethod(F.conv1d)
    input_dims = 3


class PackedConv2d(_PackedConv, nn.Conv2d):
    function = staticmethod(F.conv2d)
    input_dims = 4


class PackedConv3d(_PackedConv, nn.Conv3d):
    function = staticmethod(F.conv3d)
    input_dims = 5


class _PackedConvTranspose(_PackedConv):
    """x (K·N, c, *spatial), weight (K, c, O / groups, *kernel), bias (K, O) → (K·N, O, *spatial')."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        self.check(x)
        extra = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, x.dim() - 2, self.dilation
        )

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
            return self.function(x, weight, bias, self.stride, self.padding, extra, groups, self.dilation)

        return self._run(self._form(x, x.numel() // self.in_channels), convolve, x)


class PackedConvTranspose1d(_PackedConvTranspose, nn.ConvTranspose1d):
    function = staticmethod(F.conv_transpose1d)
    input_dims = 3


class PackedConvTranspose2d(_PackedConvTranspose, nn.ConvTranspose2d):
    function = staticmethod(F.conv_transpose2d)
    input_dims = 4


class PackedConvTranspose3d(_PackedConvTranspose, nn.ConvTranspose3d):
    function = staticmethod(F.conv_transpose3d)
    input_dims = 5
