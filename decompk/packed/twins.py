"""Member-aware twins of torch's leaves: the table."""

from __future__ import annotations

from torch import nn

from . import conv, linear, norm, recurrent
from .twin import Twin

TWINS: dict[type[nn.Module], type[Twin]] = {
    nn.Conv1d: conv.PackedConv1d,
    nn.Conv2d: conv.PackedConv2d,
    nn.Conv3d: conv.PackedConv3d,
    nn.ConvTranspose1d: conv.PackedConvTranspose1d,
    nn.ConvTranspose2d: conv.PackedConvTranspose2d,
    nn.ConvTranspose3d: conv.PackedConvTranspose3d,
    nn.Linear: linear.PackedLinear,
    nn.Embedding: linear.PackedEmbedding,
    nn.PReLU: linear.PackedPReLU,
    nn.RNN: recurrent.PackedRNN,
    nn.GRU: recurrent.PackedGRU,
    nn.LSTM: recurrent.PackedLSTM,
    nn.BatchNorm1d: norm.PackedBatchNorm1d,
    nn.BatchNorm2d: norm.PackedBatchNorm2d,
    nn.BatchNorm3d: norm.PackedBatchNorm3d,
    nn.InstanceNorm1d: norm.PackedInstanceNorm1d,
    nn.InstanceNorm2d: norm.PackedInstanceNorm2d,
    nn.InstanceNorm3d: norm.PackedInstanceNorm3d,
    nn.GroupNorm: norm.PackedGroupNorm,
    nn.LayerNorm: norm.PackedLayerNorm,
}
