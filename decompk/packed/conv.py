"""Convolutions of K members: decompk::grouped_conv2d, or torch's own in turn or as channel groups."""

from __future__ import annotations

from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..kernels.backend import EXACT, asked_for, exact, forced
from ..kernels.call import runs_cpu, settle, unwatched, watched
from ..kernels.thresholds import conv_form
from ..kernels.torch_limits import as_torch_can, mixes_groups
from ..ops.conv import convolve_now
from ..ops.cpu_layer import call_of, cpu_layer
from .twin import Twin, batch_rows, channel_grouped, member_major


class _PackedConv(Twin):
    """x (K·N, c, *spatial), weight (K, O, c / groups, *kernel), bias (K, O) → (K·N, O, *spatial')."""

    def forward(self, x: Tensor) -> Tensor:
        self._twin_check(x, self.in_channels)
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        y = self._twin_grouped(x, padding) if self.groups == 1 else self._twin_by_channel(x, padding)
        if y is not None:
            return self._twin_laid_out(y)

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
            x, weight = as_torch_can(x, weight, self.stride, padding, self.dilation)
            return self._twin_function(x, weight, bias, self.stride, padding, self.dilation, groups)

        return self._twin_laid_out(self._twin_run(convolve, x))

    def _twin_grouped(self, x: Tensor, padding) -> Tensor | None:
        """By one operator for all members; None where members compute in turn, or by torch's own."""
        return None

    def _twin_by_channel(self, x: Tensor, padding) -> Tensor | None:
        """By a kernel for as many groups as channels; None where there is none."""
        return None

    def _twin_run(self, convolve, x: Tensor) -> Tensor:
        inner = self.in_channels // self.groups
        positions = x.shape[0] * prod(x.shape[2:]) // self._twin_K
        form = conv_form(
            self.kernel_size,
            self.stride,
            pointwise=False,  # what a product could compute has gone by `_twin_grouped`
            in_channels=inner,
            out_channels=self.out_channels,
            positions=positions,
            dtype=x.dtype,
            cuda=x.is_cuda,
        )
        of_group = self.weight.shape[1] // self.groups, self.weight.shape[2]
        if form == "loop" or mixes_groups(x, self._twin_K * self.groups, *of_group):
            return self._twin_each(lambda x, w, b: convolve(x, w, b, self.groups), x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.flatten()
        y = convolve(channel_grouped(x, self._twin_K), self.weight.flatten(0, 1), bias, self._twin_K * self.groups)
        return member_major(y, self._twin_K)


class PackedConv1d(_PackedConv, nn.Conv1d):
    _twin_function = staticmethod(F.conv1d)
    _twin_dims = 3

    def _twin_grouped(self, x: Tensor, padding) -> Tensor | None:
        # A CPU's own 1-D convolutions want the samples first and the channels second, as they come.
        if exact(x.dtype) or not (x.is_cuda or asked_for("triton")) or watched():
            return None
        x = x.unflatten(0, (self._twin_K, x.shape[0] // self._twin_K)).unsqueeze(3)
        padding = padding if isinstance(padding, str) else (0, *(padding if isinstance(padding, tuple) else (padding,)))
        y = ops.grouped_conv2d(x, self.weight.unsqueeze(3), self.bias, (1, *self.stride), padding, (1, *self.dilation))
        return y.squeeze(3).flatten(0, 1)


class PackedConv2d(_PackedConv, nn.Conv2d):
    _twin_function = staticmethod(F.conv2d)
    _twin_dims = 4

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if unwatched(x, weight, bias) and self._twin_is_plain(x):
            y = convolve_now(x, weight, bias, (self.stride, self.padding, self.dilation))
            return y.contiguous() if self._twin_contiguous else y
        return super().forward(x)

    def _twin_is_plain(self, x: Tensor) -> bool:
        """Whether x fits, and one operator computes all that is to be computed."""
        shape = x.shape
        return (
            len(shape) == 4
            and shape[1] == self.in_channels
            and shape[0] % (batch_rows.get() or self._twin_K) == 0
            and self.groups == 1
            and type(self.padding) is tuple
            and self.padding_mode == "zeros"
            and x.dtype not in EXACT
            and forced.get() != "loop"
        )

    def _twin_grouped(self, x: Tensor, padding) -> Tensor | None:
        if exact(x.dtype) or watched():
            return None
        samples = (self._twin_K, x.shape[0] // self._twin_K)
        y = ops.grouped_conv2d(x.unflatten(0, samples), self.weight, self.bias, self.stride, padding, self.dilation)
        return y.flatten(0, 1)

    def _twin_is_by_channel(self) -> bool:
        """Whether every output reads one channel, its own, as the kernels for that take it."""
        return 1 < self.groups == self.in_channels == self.out_channels and self.dilation == (1, 1)

    def _twin_by_channel(self, x: Tensor, padding) -> Tensor | None:
        if not self._twin_is_by_channel() or padding == "same":
            return None
        if not runs_cpu(x, self.weight, self.bias) or not x.numel():
            return None
        padding = padding if isinstance(padding, tuple) else (0, 0)  # "valid", or padded before
        x = settle(x)
        how = call_of(x, self.weight, self.bias, (self.stride, padding, self.dilation), None, x.requires_grad, True)
        return None if how is None else cpu_layer(x, self.weight, self.bias, how)


class PackedConv3d(_PackedConv, nn.Conv3d):
    _twin_function = staticmethod(F.conv3d)
    _twin_dims = 5


class _PackedConvTranspose(_PackedConv):
    """x (K·N, c, *spatial), weight (K, c, O / groups, *kernel), bias (K, O) → (K·N, O, *spatial')."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        self._twin_check(x, self.in_channels)
        extra = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, x.dim() - 2, self.dilation
        )

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
            return self._twin_function(x, weight, bias, self.stride, self.padding, extra, groups, self.dilation)

        return self._twin_laid_out(self._twin_run(convolve, x))


class PackedConvTranspose1d(_PackedConvTranspose, nn.ConvTranspose1d):
    _twin_function = staticmethod(F.conv_transpose1d)
    _twin_dims = 3


class PackedConvTranspose2d(_PackedConvTranspose, nn.ConvTranspose2d):
    _twin_function = staticmethod(F.conv_transpose2d)
    _twin_dims = 4


class PackedConvTranspose3d(_PackedConvTranspose, nn.ConvTranspose3d):
    _twin_function = staticmethod(F.conv_transpose3d)
    _twin_dims = 5
