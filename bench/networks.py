"""Small networks as people train ensembles of them; each takes a batch to ten classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decompk.models.basic import BasicResNet

CLASSES = 10


def resnet(units: int, width: int) -> BasicResNet:
    """CIFAR's ResNet of 6 · units + 2 layers, as `decompk.models` has it: images (N, 3, 32, 32)."""
    stem = nn.Conv2d(3, width, 3, padding=1)
    return BasicResNet(stem, nn.Identity(), (units,) * 3, CLASSES, bias=True, norm_projection=False)


def lenet() -> nn.Sequential:
    """Images (N, 1, 28, 28)."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, CLASSES),
    )  # fmt: skip


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1×1 wider, 3×3 channel by channel, 1×1 narrow without ReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int, expand: int = 4):
        super().__init__()
        wide = expand * c_in
        self.body = nn.Sequential(
            *convolved(c_in, wide, 1),
            *convolved(wide, wide, 3, stride, groups=wide),
            *convolved(wide, c_out, 1)[:2],
        )
        self.keeps = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.keeps else self.body(x)


def convolved(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU6()]


def mobilenet(width: int = 16) -> nn.Sequential:
    """Six inverted residuals between a stem and a head; images (N, 3, 32, 32)."""
    widths, strides = [width, width, 2 * width, 2 * width, 4 * width, 4 * width], (1, 2, 1, 2, 1, 1)
    blocks = (InvertedResidual(*sizes) for sizes in zip([width, *widths], widths, strides, strict=False))
    head = *convolved(widths[-1], 8 * width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, CLASSES)
    return nn.Sequential(*convolved(3, width, 3), *blocks, *head)


class Attention(nn.Module):
    """(N, T, dim) → (N, T, dim)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer of a transformer's encoder, its norms first."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(dim), Attention(dim, heads), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer on the mean of its tokens; images (N, 3, 32, 32)."""

    def __init__(self, patch: int = 4, dim: int = 64, depth: int = 4, heads: int = 4):
        super().__init__()
        self.embed = nn.Conv2d(3, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (32 // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))
