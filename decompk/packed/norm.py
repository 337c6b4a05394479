"""Normalisation of K members, each with its own statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..kernels.backend import asked_for, exact
from ..kernels.call import runs_cpu, watched
from ..kernels.thresholds import norm_form
from ..ops.layer_norm import layer_norm_rows
from ..ops.norm import batch_norm_rows
from .twin import Twin, channel_grouped, member_major


class _PackedBatchNorm(Twin):
    """x (K·N, c, *spatial); weight, bias, running_mean, running_var (K, c), num_batches_tracked (K,) → x's shape."""

    @classmethod
    def _twin_fits(cls, leaf: nn.Module) -> bool:
        return True  # batch statistics need it even without tensors

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """relu(batch norm(x) + residual), the latter two for `fuse`; the residual is of x's shape."""
        self._twin_check(x, self.num_features)
        self._check_input_dim(x)
        batch_statistics = self.training or (self.running_mean is None and self.running_var is None)
        tracks = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracks else (None, None)
        factors = [0.0 if self.momentum is None else self.momentum] * self._twin_K
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factors = [1.0 / count for count in self.num_batches_tracked.tolist()]

        vectors = (self.weight, self.bias, mean, var)
        options = (batch_statistics, factors[0], self.eps)
        alike = len(set(factors)) == 1 and x.dim() == 4 and not exact(x.dtype)
        if alike and self._twin_on_cpu(x, residual, batch_statistics, mean, var):
            return self._twin_laid_out(batch_norm_rows(x, *vectors, self._twin_K, *options, residual, relu))
        if alike and (x.is_cuda or asked_for("triton")) and not watched():
            y = ops.batch_norm(x.unflatten(0, (self._twin_K, x.shape[0] // self._twin_K)), *vectors, *options).flatten(
                0, 1
            )
        else:
            y = self._twin_by_torch(x, *vectors, batch_statistics, factors)
        y = y if residual is None else y + residual
        return self._twin_laid_out(y.relu() if relu else y)

    def _twin_by_torch(
        self, x: Tensor, weight, bias, mean, var, batch_statistics: bool, factors: list[float]
    ) -> Tensor:
        form = norm_form(x.numel() // self._twin_K, self.num_features, batch_statistics, x.dtype, x.is_cuda)
        if form == "loop" or len(set(factors)) > 1:

            def normalise(x, mean, var, weight, bias, factor):
                return F.batch_norm(x, mean, var, weight, bias, batch_statistics, factor, self.eps)

            return self._twin_each(normalise, x, mean, var, weight, bias, factors)
        mean, var, weight, bias = (None if t is None else t.flatten() for t in (mean, var, weight, bias))
        groups = channel_grouped(x, self._twin_K)
        y = F.batch_norm(groups, mean, var, weight, bias, batch_statistics, factors[0], self.eps)
        return member_major(y, self._twin_K)

    def _twin_on_cpu(self, x: Tensor, residual: Tensor | None, training: bool, *statistics: Tensor | None) -> bool:
        if not runs_cpu(x, self.weight, self.bias, residual, *statistics):
            return False
        vectors, shape = (self.weight, self.bias, *statistics), (self._twin_K, x.shape[1])
        fit = all(t is None or t.shape == shape for t in vectors) and (residual is None or residual.shape == x.shape)
        dense = fit and all(t is None or t.is_contiguous() for t in statistics)
        return dense and x.numel() > (self._twin_K * self.num_features if training else 0)  # one value has no variance


class PackedBatchNorm1d(_PackedBatchNorm, nn.BatchNorm1d):
    pass


class PackedBatchNorm2d(_PackedBatchNorm, nn.BatchNorm2d):
    _twin_dims = 4


class PackedBatchNorm3d(_PackedBatchNorm, nn.BatchNorm3d):
    _twin_dims = 5


class _PackedInstanceNorm(Twin):
    """x (K·N, c, *spatial); weight, bias, running_mean, running_var (K, c) → x's shape."""

    def forward(self, x: Tensor) -> Tensor:
        self._twin_check(x)
        momentum = 0.0 if self.momentum is None else self.momentum
        instance_statistics = self.training or not self.track_running_stats

        def normalise(x, mean, var, weight, bias):
            return F.instance_norm(x, mean, var, weight, bias, instance_statistics, momentum, self.eps)

        return self._twin_each(normalise, x, self.running_mean, self.running_var, self.weight, self.bias)


class PackedInstanceNorm1d(_PackedInstanceNorm, nn.InstanceNorm1d):
    _twin_dims = 3


class PackedInstanceNorm2d(_PackedInstanceNorm, nn.InstanceNorm2d):
    _twin_dims = 4


class PackedInstanceNorm3d(_PackedInstanceNorm, nn.InstanceNorm3d):
    _twin_dims = 5


def _group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """F.group_norm as its formula: torch's own knows no tangents and no batches of images that lie channels_last."""
    rows = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(x.shape[0], groups, -1)
    var, mean = torch.var_mean(rows, -1, correction=0, keepdim=True)
    y = ((rows - mean) * torch.rsqrt(var + eps)).reshape(x.shape)
    channels = (1, -1, *[1] * (x.dim() - 2))
    y = y if weight is None else y * weight.view(channels)
    y = y if bias is None else y + bias.view(channels)
    return y.to(x.dtype)


class PackedGroupNorm(Twin, nn.GroupNorm):
    """x (K·N, c, …), weight and bias (K, c) → x's shape."""

    def forward(self, x: Tensor) -> Tensor:
        self._twin_check(x)
        normalise = _group_norm if watched() else F.group_norm
        return self._twin_each(lambda x, w, b: normalise(x, self.num_groups, w, b, self.eps), x, self.weight, self.bias)


class PackedLayerNorm(Twin, nn.LayerNorm):
    """x (K·N, …, *normalized_shape), weight and bias (K, *normalized_shape) → x's shape."""

    def forward(self, x: Tensor) -> Tensor:
        self._twin_check(x)
        if self._twin_on_cpu(x):
            return layer_norm_rows(x, self.weight, self.bias, self._twin_K, self.normalized_shape, self.eps)
        return self._twin_each(
            lambda x, w, b: F.layer_norm(x, self.normalized_shape, w, b, self.eps), x, self.weight, self.bias
        )

    def _twin_on_cpu(self, x: Tensor) -> bool:
        if not runs_cpu(x, self.weight, self.bias) or not x.numel():
            return False
        shape = self.normalized_shape
        fit = all(t is None or t.shape == (self._twin_K, *shape) for t in (self.weight, self.bias))
        return fit and x.dim() > len(shape) and x.shape[x.dim() - len(shape) :] == shape  # what torch takes
