"""A training step of SplitNet's split networks: dense with masked gradients, and on the block engine."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from contestants import CL, Setting, training_work
from race import CLOCK, Contestant, Race, Result, Spec, Work, race
from torch import Tensor, nn

import decompk
from decompk import models
from decompk.splitnet import Assignment, Nodes, Split, split, split_points
from decompk.splitnet.run import deal

SIZE, CLASSES = (3, 32, 32), 100
CASES = {  # name: the supplement's setting, and whether groups are even or of the sizes that a random start gives
    "Shallow, even": ("Shallow", True),
    "Deep, even": ("Deep", True),
    "Hierarchical, even": ("Hierarchical", True),
    "Deep, uneven": ("Deep", False),
}
QUICK = ("Deep, even", "Deep, uneven")
SIDES = {"masked": "peer", "masked, channels_last": "peer", "block engine": "ours"}


def specs(setting: Setting, full: bool, compiled: bool) -> list[Spec]:
    return [
        Spec(
            "split",
            f"WRN-16-8 {case}, {batch} images",
            SIDES,
            partial(run, *CASES[case], batch, setting),
            {"network": "wrn_16_8", "K": max(split_points("wrn_16_8", CASES[case][0])[0].values()), "batch": batch},
        )
        for case in (CASES if full or setting.gpu else QUICK)
        for batch in ((16, 64) if full else (16,))
    ]


def made(name: str, even: bool) -> Split:
    torch.manual_seed(0)
    net = models.wrn_16_8(CLASSES)
    assignment = Assignment(Nodes(net, SIZE), *split_points("wrn_16_8", name), spread=2.0)
    if even:
        deal(assignment, 0)
    return split(net, assignment)


def run(name: str, even: bool, batch: int, setting: Setting) -> Race:
    found = made(name, even)
    x, y = torch.randn(batch, *SIZE).to(setting.device), torch.randint(CLASSES, (batch,)).to(setting.device)
    masks = {name: mask.to(setting.device) for name, mask in found.masks.items()}
    whole, kept = training_work(found.dense, SIZE, batch, 4), _work(found, batch)

    def step(net: nn.Module, x: Tensor, y: Tensor, masked: bool) -> tuple[Tensor, nn.Module]:
        for parameter in net.parameters():
            parameter.grad = None
        with setting.autocast():
            logits = net(x)
            loss = F.cross_entropy(logits, y)
        loss.backward()
        if masked:
            for name, mask in masks.items():
                net.get_parameter(name).grad.mul_(mask)
        return logits.detach(), net

    def result(of: tuple[Tensor, nn.Module]) -> Result:
        logits, net = of
        gradients = {f"gradient of {name}": p.grad.unsqueeze(0) for name, p in net.named_parameters()}
        return {"output": logits.unsqueeze(0), **gradients}

    def contestant(format: torch.memory_format, engine: bool) -> Contestant:
        mine = copy.deepcopy(found) if engine else found
        mine.dense.to(setting.device, memory_format=format)
        net = mine.fast() if engine else copy.deepcopy(mine.dense)
        return Contestant(
            partial(step, net, x.contiguous(memory_format=format), y, not engine), result, kept if engine else whole
        )

    reference = result(step(copy.deepcopy(found.dense).to(setting.device).double(), x.double(), y, masked=True))
    builds = {
        "masked": partial(contestant, torch.contiguous_format, False),
        "masked, channels_last": partial(contestant, CL, False),
        "block engine": partial(contestant, CL, True),
    }
    return race(builds, reference, ("masked",), rounds=3)


def _work(found: Split, batch: int) -> Work:
    """Of the network without what lies between its groups."""
    whole = training_work(found.dense, SIZE, batch, 4)
    done = decompk.block_diagonal(found.dense, SIZE).skipped(SIZE).objects()[-1]
    return Work(whole.bytes, whole.flops * done["done"] / done["dense MACs"])


@pytest.mark.benchmark(timer=CLOCK)
def test_split_training_step(entry):
    entry()
