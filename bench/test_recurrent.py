"""A training step of K recurrent networks: one batched product a time step, beside torch's layers in turn."""

from functools import partial

import pytest
import torch
from contestants import Job, Setting, builds, members_alone, side, training_work
from race import CLOCK, Race, Spec, Work, race
from torch import nn

import decompk
from decompk import models

STEPS, CLASSES, MEMBER = 28, 10, 64  # time steps, classes, and a member's hidden state
CASES = {  # name: options of models.Recurrent, K
    "GRU": ({}, 8),
    "LSTM": ({"kind": "LSTM"}, 8),
    "RNN": ({"kind": "RNN"}, 8),
    "GRU, 2 layers, bidirectional": ({"num_layers": 2, "bidirectional": True}, 4),
}
CONTESTANTS = ("ours", "members in turn", "members on threads")


def specs(setting: Setting, full: bool, compiled: bool) -> list[Spec]:
    return [
        Spec(
            "recurrent",
            f"{name}, K={K}, hidden {MEMBER}, {STEPS} steps, {batch} sequences",
            {name: side(name) for name in CONTESTANTS},
            partial(run, options, K, batch, setting),
            {"network": name, "K": K, "batch": batch},
        )
        for name, (options, K) in CASES.items()
        for batch in ((16, 64) if full else (16,))
    ]


def run(options: dict, K: int, batch: int, setting: Setting) -> Race:
    torch.manual_seed(0)
    size = (STEPS, K * 8)
    d = decompk.decompose(models.Recurrent(size[1], CLASSES, K * MEMBER, **options), size, K)
    x, y = torch.randn(batch, *size), torch.randint(CLASSES, (batch,))
    one = training_work(d.member_skeleton(), d.member_size, batch, 4)
    members: list[nn.Module] = [member.to(setting.device) for member in d.subnets(seed=0)]
    work = Work(K * one.bytes, K * one.flops)
    step = Job(setting, members, d.crops, x.to(setting.device), y.to(setting.device), work)
    return race(builds(step, CONTESTANTS), members_alone(step), ("members in turn",), rounds=7, least=0.05, most=1.0)


@pytest.mark.benchmark(timer=CLOCK)
def test_recurrent_training_step(entry):
    entry()
