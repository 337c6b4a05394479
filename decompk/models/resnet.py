"""ResNet50 and ResNet101 in the two forms the paper counts, which differ in where they stride and in their head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import DecompkError
from .declared import image
from .initial import he

VARIANTS = ("table2.2", "table3.4")


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with batch norm; `strides` of the first two. The shortcut is projected where its width changes."""

    def __init__(self, c_in: int, width: int, strides: tuple[int, int], bias: bool):
        super().__init__()
        c_out, stride = 4 * width, strides[0] * strides[1]
        self.conv1 = nn.Conv2d(c_in, width, 1, strides[0], bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, strides[1], padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=bias)
        self.bn3 = nn.BatchNorm2d(c_out)
        if c_in != c_out:
            projection = nn.Conv2d(c_in, c_out, 1, stride, bias=bias)
            self.downsample: nn.Module = nn.Sequential(projection, nn.BatchNorm2d(c_out))
        elif stride > 1:
            self.downsample = nn.MaxPool2d(1, stride)
        else:
            self.downsample = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    """(N, C, H, W) → (N, num_classes): a 7x7/2 stem, a 3x3/2 max-pool, four stages of bottlenecks, average pooling."""

    def __init__(self, blocks: tuple[int, ...], num_classes: int, variant: str, channels: int, width: int):
        super().__init__()
        first_1x1 = variant == "table3.4"
        self.conv1 = nn.Conv2d(channels, width, 7, 2, padding=3, bias=first_1x1)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        c_in, stages = width, []
        for stage, count in enumerate(blocks):
            units = []
            for unit in range(count):
                if first_1x1:
                    strides = (2 if unit == 0 and stage > 0 else 1, 1)
                else:
                    strides = (1, 2 if unit == count - 1 and stage < len(blocks) - 1 else 1)
                units.append(Bottleneck(c_in, width << stage, strides, bias=first_1x1))
                c_in = 4 * (width << stage)
            stages.append(nn.Sequential(*units))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        if first_1x1:
            hidden = 16 * width
            self.fc: nn.Module = nn.Sequential(nn.Linear(c_in, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
        else:
            self.fc = nn.Linear(c_in, num_classes)
        he(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


@image
def resnet50(
    num_classes: int | None = None,
    variant: str = "table2.2",
    input_size: tuple[int, int, int] = (3, 224, 224),
    width: int = 64,
) -> ResNet:
    """ResNet50 as the paper counts it; `width` is the number of channels of the stem.

    "table2.2": the 3x3 of the last unit of stages 1 to 3 strides (its shortcut is subsampled by a 1x1 max-pool), no
    convolution bias, one fully connected layer, 1000 classes. "table3.4": the first 1x1 and the projection of stages 2
    to 4 stride, every convolution has a bias, a 1024-way (16 · width) layer with ReLU precedes the 101 classes. Both
    put batch norm on the projection. Padding is symmetric; every map has the ⌈H/stride⌉ pixels TensorFlow's "same"
    padding gives. Raises DecompkError on an unknown variant.
    """
    return _resnet((3, 4, 6, 3), num_classes, variant, input_size, width)


@image
def resnet101(
    num_classes: int | None = None,
    variant: str = "table2.2",
    input_size: tuple[int, int, int] = (3, 224, 224),
    width: int = 64,
) -> ResNet:
    """ResNet101: resnet50 with 23 units in stage 3."""
    return _resnet((3, 4, 23, 3), num_classes, variant, input_size, width)


def _resnet(blocks: tuple[int, ...], num_classes: int | None, variant: str, input_size: tuple, width: int) -> ResNet:
    if variant not in VARIANTS:
        raise DecompkError(f"ResNet variant {variant!r} is not one of {', '.join(map(repr, VARIANTS))}; choose one.")
    if num_classes is None:
        num_classes = 1000 if variant == "table2.2" else 101
    return ResNet(blocks, num_classes, variant, input_size[0], width)
