"""WRN-16-8, SplitNet's network for CIFAR-100: pre-activation blocks, three stages eight times as wide as the stem."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .declared import image
from .initial import he


class PreActBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions; the projection reads what the first of them reads."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.projection = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.projection is None else self.projection(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + shortcut


class WideResNet(nn.Module):
    """(N, C, H, W) → (N, num_classes): a 3x3 stem of `width` filters, three stages of 8, 16 and 32 times as many."""

    def __init__(self, units: int, widen: int, num_classes: int, channels: int, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        c_in, stages = width, []
        for stage in range(3):
            c_out = widen * (width << stage)
            blocks = [PreActBlock(c_in, c_out, 2 if stage > 0 else 1)]
            blocks += [PreActBlock(c_out, c_out, 1) for _ in range(units - 1)]
            stages.append(nn.Sequential(*blocks))
            c_in = c_out
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(c_in)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c_in, num_classes)
        he(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(F.relu(self.bn(x))), 1))


@image
def wrn_16_8(num_classes: int = 100, input_size: tuple[int, int, int] = (3, 32, 32), width: int = 16) -> WideResNet:
    """The wide residual network of depth 16 and widening factor 8, without dropout."""
    return WideResNet(2, 8, num_classes, input_size[0], width)
