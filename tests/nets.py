"""Small networks, one per pattern that a decomposition must carry. NETS: name → (constructor, input size, K, crop)."""

from __future__ import annotations

from collections import namedtuple

import torch
from torch import nn
from torch.nn import functional as F


def conv(i: int, o: int, k: int = 3, **options) -> nn.Sequential:
    options.setdefault("padding", k // 2)
    return nn.Sequential(nn.Conv2d(i, o, k, bias=False, **options), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Head(nn.Module):
    def __init__(self, width: int, classes: int = 5):
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


class Plain(nn.Module):
    """Every conv option, two FC layers behind a flatten."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.PReLU(16),
            nn.Conv2d(16, 16, 3, dilation=2, padding=2, padding_mode="reflect"),
            nn.GroupNorm(8, 16),
            nn.MaxPool2d(3, 2, ceil_mode=True),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(16 * 4 * 4, 24), nn.ReLU(), nn.Dropout(0.0), nn.Linear(24, 5)
        )

    def forward(self, x):
        return self.classifier(self.features(x))


class Residual(nn.Module):
    """A projection, an identity, a shortcut padded with zero channels, a squeeze-excite gate; functional forms."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.a, self.b = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.project = nn.Conv2d(8, 16, 1, 2)
        self.c = nn.Conv2d(16, 32, 3, 2, 1)
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.head = Head(32)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))
        x = torch.relu_(y + self.project(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
        x = self.c(x).add(shortcut).relu()
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(x * gate)


class Branches(nn.Module):
    """Several convolutions read the image; cat in every order; the next convolution's columns are permuted."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8, 1), conv(3, 16, 3)
        self.c, self.d, self.e = conv(24, 8, 1), conv(24, 8, 5), conv(8, 8)
        self.f = conv(24 + 8 + 24, 16, 3)
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.head = Head(16)

    def forward(self, x):
        x = torch.cat([self.a(x), self.b(x)], 1)
        y = self.c(x)
        x = torch.cat((self.e(y), x, torch.concat([self.d(x), y, self.pool(y)], dim=1)), dim=-3)
        return self.head(self.f(x))


class Pieces(nn.Module):
    """chunk, split and slices, with the numbers written out as in the author's code."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 24)
        self.a, self.b, self.c = conv(12, 12), conv(8, 8), conv(16, 16)
        self.d = conv(36, 16, 1)
        self.head = Head(16)

    def forward(self, x):
        x = self.stem(x)
        left, right = x.chunk(2, dim=1)
        x = torch.cat([left, self.a(right)], 1)
        one, two = torch.split(x, [8, 16], dim=1)
        x = torch.cat([self.b(one), self.c(two)], 1)
        x = torch.cat([x[:, :12], x[:, 12:], x[:, 4:16]], 1)
        return self.head(self.d(x))


class ScaledPieces(nn.Module):
    """A number written out in the network, and a bare parameter that its edited graph reads."""

    def __init__(self):
        super().__init__()
        self.stem, self.scale = conv(3, 16), nn.Parameter(torch.rand(16, 1, 1))
        self.shift = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.head = Head(16)

    def forward(self, x):
        left, right = (self.stem(x) * self.scale).split(8, 1)
        return self.head(torch.cat([right, left + self.shift], 1))


def channel_shuffle(x, groups: int):
    n, c, h, w = x.size()
    x = x.view(n, groups, c // groups, h, w)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(n, -1, h, w)


class Shuffle(nn.Module):
    """ShuffleNet's units: the composed network needs a shuffle within every member's channels."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 16)
        self.units = nn.ModuleList(nn.Sequential(conv(8, 8, 1), conv(8, 8, groups=8)) for _ in range(3))
        self.mix = nn.ChannelShuffle(2)
        self.grouped = conv(16, 16, groups=2)
        self.head = Head(16)

    def forward(self, x):
        x = self.stem(x)
        for unit in self.units:
            left, right = x.chunk(2, dim=1)
            x = channel_shuffle(torch.cat([left, unit(right)], 1), 2)
        return self.head(self.grouped(self.mix(x)))


class Groups(nn.Module):
    """Groups that divide by K, that do not (lcm), depthwise, with a multiplier, and beside their own image."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 24)
        self.two, self.six = conv(24, 24, groups=2), conv(24, 48, groups=6)
        self.deep, self.wide = conv(48, 48, 5, groups=48), nn.Conv2d(48, 96, 3, padding=1, groups=48)
        self.ghost = conv(192, 24, 1)
        self.head = Head(24)

    def forward(self, x):
        x = self.deep(self.six(self.two(self.stem(x))))
        y = self.wide(x)
        return self.head(self.ghost(torch.cat([x, y, self.deep(x)], 1)))


class NormAct(nn.BatchNorm2d):
    """A batch norm with its activation inside, as several libraries have it."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(super().forward(x))


class OwnWeight(nn.Module):
    """A layer that is no torch layer: it owns bare parameters and calls the functional form."""

    def __init__(self, i: int, o: int, groups: int = 1):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(o, i // groups, 3, 3) / 10)
        self.shift = nn.Parameter(torch.randn(o) / 10)
        self.gamma = nn.Parameter(torch.rand(o, 1, 1))
        self.scale = nn.Parameter(torch.rand(o))
        self.groups = groups

    def forward(self, x):
        x = F.conv2d(x, self.kernel, self.shift, padding=1, groups=self.groups)
        return x * self.gamma + x * self.scale.view(1, -1, 1, 1)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), NormAct(16))
        self.own, self.grouped = OwnWeight(16, 16), OwnWeight(16, 16, groups=2)
        self.head = Head(16)

    def forward(self, x):
        return self.head(self.grouped(F.gelu(self.own(self.stem((x - self.mean) / 2)))))


Outputs = namedtuple("Outputs", ["logits", "aux"])


class Auxiliary(nn.Module):
    """A second head, in train mode only."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = conv(3, 8), conv(8, 16, stride=2)
        self.aux, self.head = nn.Sequential(conv(8, 8, 1), Head(8)), Head(16)

    def forward(self, x):
        x = self.stem(x)
        if self.training:
            return Outputs(self.head(self.body(x)), self.aux(x))
        return self.head(self.body(x))


class Repeated(nn.Module):
    """The same layer twice, with a residual around it."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = conv(3, 16), conv(16, 16), Head(16)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            x = x + self.body(x)
        return self.head(x)


class Decoder(nn.Module):
    """Transposed convolutions, pixel shuffle, gated units, resizing; the last layer is a convolution."""

    def __init__(self):
        super().__init__()
        self.down, self.deeper = conv(3, 16, stride=2), conv(16, 32, stride=2)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.grouped = nn.ConvTranspose2d(16, 16, 3, 2, 1, 1, groups=2)
        self.more, self.gate = conv(16, 64), conv(16, 32)
        self.shuffle, self.glu = nn.PixelShuffle(2), nn.GLU(dim=1)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        skip = self.down(x)
        x = self.up(self.deeper(skip)) + skip
        x = self.grouped(x)
        x = F.interpolate(self.shuffle(self.more(x)), scale_factor=0.5)
        return self.last(self.glu(self.gate(x)))


class FullyPooled(nn.Module):
    """A pooling and a convolution over the whole map, as old classifiers have them; both follow the crop."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = conv(3, 8, stride=2), conv(8, 16)
        self.whole = nn.Conv2d(16, 16, 8)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.body(self.stem(x))
        y = F.avg_pool2d(x, 8)
        return self.head(torch.cat([self.whole(x), y], 1).view(-1, 32))


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.pool, self.head = conv(3, 8), nn.AvgPool2d(16), nn.Linear(8, 5)

    def forward(self, x):
        x = self.pool(self.stem(x))
        return self.head(x.view(x.size(0), -1))


class Signal(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv1d(2, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 8),
            nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3),
        )  # fmt: skip


class Volume(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(8, 16, 3, padding=1), nn.InstanceNorm3d(16, affine=True), nn.ReLU(),
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 3),
        )  # fmt: skip


class Block(nn.Module):
    """ConvNeXt's: channels last, a layer norm over them, a layer scale."""

    def __init__(self, width: int):
        super().__init__()
        self.deep, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 0.5))

    def forward(self, x):
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        return x + self.layer_scale * self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(3, 8, 2, 2), nn.Sequential(Block(8), Block(8)), Head(8)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Standardised(nn.Sequential):
    def __init__(self):
        super().__init__(StandardisedConv(3, 8, 3), nn.ReLU(), StandardisedConv(8, 8, 3, padding=1), Head(8))


class SqueezeNet(nn.Sequential):
    """The last convolution is followed by a ReLU."""

    def __init__(self):
        super().__init__(conv(3, 8), nn.Conv2d(8, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


IMAGE = (3, 16, 16)
# Composed(x) is exactly Σ_k member_k(x) on any x.
EXACT = {
    "residual": (Residual, IMAGE, 4, None),
    "branches": (Branches, IMAGE, 4, 10),
    "pieces": (Pieces, IMAGE, 4, None),
    "pieces in two": (Pieces, IMAGE, (1, 2), None),
    "scaled pieces": (ScaledPieces, IMAGE, 4, None),
    "shuffle": (Shuffle, IMAGE, 4, None),
    "groups": (Groups, IMAGE, 4, None),
    "groups in three": (Groups, IMAGE, (1, 3), None),
    "custom": (Custom, IMAGE, 4, None),
    "auxiliary": (Auxiliary, IMAGE, 4, None),
    "repeated": (Repeated, IMAGE, 4, None),
    "decoder": (Decoder, IMAGE, 4, None),
    "pooled": (Pooled, IMAGE, 4, 16),
    "signal": (Signal, (2, 32), 4, None),
    "volume": (Volume, (1, 8, 8, 8), 8, None),
}
# A first FC layer follows the crop.
ADAPTED = {
    "plain": (Plain, IMAGE, 4, None),
    "plain overlapping": (Plain, IMAGE, 4, 10),
    "fully pooled": (FullyPooled, IMAGE, 4, None),
}
# Weights compose, the sum is not exact, and the decomposition says so.
NOTED = {
    "convnext": (ConvNext, IMAGE, 4, None),
    "standardised": (Standardised, IMAGE, 4, None),
    "squeezenet": (SqueezeNet, IMAGE, 4, None),
}
NETS = EXACT | ADAPTED | NOTED


def build(name: str):
    """(network in float64, decomposition)."""
    from decompk import decompose

    make, size, partitions, crop = NETS[name]
    net = make().double()
    return net, decompose(net, size, partitions, crop_size=crop)
