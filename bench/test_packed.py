"""One training step, forward and backward, of K narrow ResNet-like members: packed, and the members in turn."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from decompk.losses import cross_entropy
from decompk.packed import pack

SAMPLES = 16
CASES = {"K=4 at 140 px": (4, 16, 140), "K=16 at 70 px": (16, 4, 70)}  # members, width of the first stage, pixels


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


def make_member(width):
    """ResNet50's stem and the first block of each of its stages."""
    stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = [width, *(4 * width * 2**stage for stage in range(3))]
    blocks = [Bottleneck(inputs[stage], width * 2**stage, 1 if stage == 0 else 2) for stage in range(4)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32 * width, 10))


def step_packed(packed, x, target):
    packed.zero_grad()
    cross_entropy(packed(x), target).backward()


def step_in_turn(members, x, target):
    for k, member in enumerate(members):
        member.zero_grad()
        F.cross_entropy(member(x[k]), target).backward()


def compare(members, x, target):
    """A speed-up on a wrong result is none."""
    members = [copy.deepcopy(member).double() for member in members]
    packed = pack(members)
    step_packed(packed, x.double(), target)
    step_in_turn(members, x.double(), target)
    for k, member in enumerate(members):
        for (name, one), (_, all_members) in zip(member.named_parameters(), packed.named_parameters(), strict=True):
            torch.testing.assert_close(all_members.grad[k], one.grad, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("how", ["packed", "in turn", "in turn, channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_training_step(benchmark, case, how):
    K, width, pixels = CASES[case]
    torch.manual_seed(0)
    members = [make_member(width) for _ in range(K)]
    x, target = torch.randn(K, SAMPLES, 3, pixels, pixels), torch.randint(10, (SAMPLES,))
    compare(members, x, target)
    benchmark.group = f"{case}, {SAMPLES} samples a member, {torch.get_num_threads()} threads"
    if how == "packed":
        benchmark.pedantic(step_packed, (pack(members), x, target), rounds=7, warmup_rounds=2)
        return
    if "channels_last" in how:
        members = [member.to(memory_format=torch.channels_last) for member in members]
        x = torch.stack([one.contiguous(memory_format=torch.channels_last) for one in x.unbind(0)])
    benchmark.pedantic(step_in_turn, (members, x, target), rounds=7, warmup_rounds=2)
