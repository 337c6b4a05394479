"""VGG16 as Table 2.1 draws it, thirteen 3x3 convolutions and three fully connected layers, and a small relative."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import DecompkError
from .declared import image
from .initial import he

# Convolutions per stage and their width in units of the first stage's; each stage ends in a 2x2 max-pool.
STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))


class VGG16(nn.Module):
    """(N, C, H, W) → (N, num_classes). The first fully connected layer reads the whole last map, without pooling it."""

    def __init__(self, num_classes: int, input_size: tuple[int, int, int], width: int, fc: int):
        super().__init__()
        channels, rows, columns = input_size
        layers: list[nn.Module] = []
        for count, factor in STAGES:
            for _ in range(count):
                layers += [nn.Conv2d(channels, factor * width, 3, padding=1), nn.ReLU()]
                channels = factor * width
            layers.append(nn.MaxPool2d(2))
            rows, columns = rows // 2, columns // 2
        if min(rows, columns) < 1:
            raise DecompkError(
                f"vgg16 halves its input five times, which leaves nothing of {input_size[1]}×{input_size[2]} pixels; "
                "give at least 32×32."
            )
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels * rows * columns, fc),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(fc, fc),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(fc, num_classes),
        )
        he(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


@image
def vgg16(
    num_classes: int = 1000, input_size: tuple[int, int, int] = (3, 224, 224), width: int = 64, fc: int = 4096
) -> VGG16:
    """VGG16 with `width` channels in its first stage and `fc` neurons in its hidden fully connected layers.

    Max-pooling floors odd maps: a 112-pixel sub-network ends at 3x3 (Table 2.1). Raises DecompkError below 32 pixels.
    """
    return VGG16(num_classes, input_size, width, fc)


class VGG8(nn.Module):
    """(N, C, H, W) → (N, num_classes): three stages of two 3x3 convolutions with batch norm, then two linear layers.

    Its first fully connected layer reads the whole last map, so a composed network adds up its members' own fields.
    """

    def __init__(self, num_classes: int, input_size: tuple[int, int, int], width: int, fc: int):
        super().__init__()
        channels, rows, columns = input_size
        layers: list[nn.Module] = []
        for factor in (1, 2, 4):
            for _ in range(2):
                layers += [nn.Conv2d(channels, factor * width, 3, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(factor * width), nn.ReLU()]
                channels = factor * width
            layers.append(nn.MaxPool2d(2))
            rows, columns = rows // 2, columns // 2
        if min(rows, columns) < 1:
            raise DecompkError(
                f"vgg8 halves its input three times, which leaves nothing of {input_size[1]}×{input_size[2]} pixels; "
                "give at least 8×8."
            )
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(channels * rows * columns, fc), nn.ReLU(), nn.Linear(fc, num_classes))
        he(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


@image
def vgg8(num_classes: int = 10, input_size: tuple[int, int, int] = (3, 32, 32), width: int = 16, fc: int = 128) -> VGG8:
    """VGG8 with `width` channels in its first stage and `fc` hidden neurons, for small trials on small images.

    Raises DecompkError below 8 pixels.
    """
    return VGG8(num_classes, input_size, width, fc)
