"""AlexNet as one tower: Krizhevsky's network of 2012 without the groups of its convolutions, which a split learns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import DecompkError
from .declared import image
from .initial import he


class AlexNet(nn.Module):
    """(N, C, H, W) → (N, num_classes): conv1 to conv5, the first two normalised over 5 channels, then fc6 to fc8."""

    def __init__(self, num_classes: int, input_size: tuple[int, int, int], width: int, fc: int):
        super().__init__()
        if width % 3:
            raise DecompkError(f"conv2 of alexnet is 8/3 as wide as conv1: give a width that 3 divides, not {width}.")
        channels, *pixels = input_size
        rows, columns = (_last_map(size) for size in pixels)
        if min(rows, columns) < 1:
            raise DecompkError(
                f"alexnet strides by 4 and pools three times, which leaves nothing of {pixels[0]}×{pixels[1]} pixels; "
                "give at least 63×63."
            )
        middle = width * 8 // 3
        self.conv1 = nn.Conv2d(channels, width, 11, 4, padding=2)
        self.norm1 = _response_norm()
        self.pool1 = nn.MaxPool2d(3, 2)
        self.conv2 = nn.Conv2d(width, middle, 5, padding=2)
        self.norm2 = _response_norm()
        self.pool2 = nn.MaxPool2d(3, 2)
        self.conv3 = nn.Conv2d(middle, 4 * width, 3, padding=1)
        self.conv4 = nn.Conv2d(4 * width, 4 * width, 3, padding=1)
        self.conv5 = nn.Conv2d(4 * width, middle, 3, padding=1)
        self.pool5 = nn.MaxPool2d(3, 2)
        self.fc6 = nn.Linear(middle * rows * columns, fc)
        self.drop6 = nn.Dropout()
        self.fc7 = nn.Linear(fc, fc)
        self.drop7 = nn.Dropout()
        self.fc8 = nn.Linear(fc, num_classes)
        he(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool1(self.norm1(F.relu(self.conv1(x))))
        x = self.pool2(self.norm2(F.relu(self.conv2(x))))
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = torch.flatten(self.pool5(F.relu(self.conv5(x))), 1)
        x = self.drop7(F.relu(self.fc7(self.drop6(F.relu(self.fc6(x))))))
        return self.fc8(x)


def _response_norm() -> nn.LocalResponseNorm:
    return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)


def _last_map(pixels: int) -> int:
    """Pixels along one axis that reach fc6, below 1 for an input that is too small."""
    size = (pixels + 2 * 2 - 11) // 4 + 1
    for _ in range(3):
        size = (size - 3) // 2 + 1
    return size


@image
def alexnet(
    num_classes: int = 1000, input_size: tuple[int, int, int] = (3, 224, 224), width: int = 96, fc: int = 4096
) -> AlexNet:
    """AlexNet with `width` channels in conv1, 8/3, 4, 4 and 8/3 times as many in conv2 to conv5, and `fc` neurons.

    Every layer reads all channels of the one before, so conv2, conv4 and conv5 have twice the weights that they had on
    two GPUs. Padding by 2 makes the map of conv1 55 pixels at 224, and 6×6 pixels reach fc6, as at 227. Raises
    DecompkError below 63 pixels and where 3 does not divide the width.
    """
    return AlexNet(num_classes, input_size, width, fc)
