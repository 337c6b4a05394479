"""Residual networks of basic blocks: the CIFAR ResNet32, 56 and 110 of Table 3.1, and SplitNet's ResNet-18x2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .declared import image
from .initial import he


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, the first with `stride`; `projection` where the width or size changes."""

    def __init__(self, c_in: int, c_out: int, stride: int, bias: bool, norm_projection: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(c_out)
        if stride == 1 and c_in == c_out:
            self.downsample: nn.Module = nn.Identity()
        else:
            projection = nn.Conv2d(c_in, c_out, 1, stride, bias=bias)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(c_out)) if norm_projection else projection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class BasicResNet(nn.Module):
    """(N, C, H, W) → (N, num_classes). `stem` is the first convolution (and pooling); each stage doubles the width."""

    def __init__(
        self,
        stem: nn.Conv2d,
        pool: nn.Module,
        blocks: tuple[int, ...],
        num_classes: int,
        bias: bool,
        norm_projection: bool,
    ):
        super().__init__()
        width = stem.out_channels
        self.conv1 = stem
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = pool
        stages, c_in = [], width
        for stage, count in enumerate(blocks):
            units = []
            for unit in range(count):
                stride = 2 if stage > 0 and unit == 0 else 1
                units.append(BasicBlock(c_in, width << stage, stride, bias, norm_projection))
                c_in = width << stage
            stages.append(nn.Sequential(*units))
        self.layers = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c_in, num_classes)
        he(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(self.maxpool(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _cifar(units: int, num_classes: int, input_size: tuple[int, int, int], width: int) -> BasicResNet:
    stem = nn.Conv2d(input_size[0], width, 3, padding=1)
    return BasicResNet(stem, nn.Identity(), (units,) * 3, num_classes, bias=True, norm_projection=False)


@image
def cifar_resnet8(
    num_classes: int = 10, input_size: tuple[int, int, int] = (3, 32, 32), width: int = 24
) -> BasicResNet:
    """ResNet8: cifar_resnet32 with one block a stage, for small trials."""
    return _cifar(1, num_classes, input_size, width)


@image
def cifar_resnet32(
    num_classes: int = 10, input_size: tuple[int, int, int] = (3, 32, 32), width: int = 64
) -> BasicResNet:
    """ResNet32 with filters width, 2 · width, 4 · width: every convolution biased, projections without batch norm."""
    return _cifar(5, num_classes, input_size, width)


@image
def cifar_resnet56(
    num_classes: int = 10, input_size: tuple[int, int, int] = (3, 32, 32), width: int = 64
) -> BasicResNet:
    """ResNet56: cifar_resnet32 with 9 blocks a stage."""
    return _cifar(9, num_classes, input_size, width)


@image
def cifar_resnet110(
    num_classes: int = 10, input_size: tuple[int, int, int] = (3, 32, 32), width: int = 64
) -> BasicResNet:
    """ResNet110: cifar_resnet32 with 18 blocks a stage."""
    return _cifar(18, num_classes, input_size, width)


@image
def resnet18x2(
    num_classes: int = 1000, input_size: tuple[int, int, int] = (3, 224, 224), width: int = 128
) -> BasicResNet:
    """SplitNet's ResNet-18x2: ResNet-18 with twice the filters, 128 to 1024, no convolution bias."""
    stem = nn.Conv2d(input_size[0], width, 7, 2, padding=3, bias=False)
    pool = nn.MaxPool2d(3, 2, padding=1)
    return BasicResNet(stem, pool, (2, 2, 2, 2), num_classes, bias=False, norm_projection=True)
