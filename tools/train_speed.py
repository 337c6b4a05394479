"""Images per second of decompk.train's step: members and the global network, eager, compiled, as a CUDA graph.

    python tools/train_speed.py --out FILE.jsonl [--minutes M] [--only TEXT]

Synthetic images. On a GPU CIFAR ResNet32 and ResNet50 at the paper's crops, bf16 and channels_last, 128 images a batch;
on a CPU the quick preset's network alone. Each way first trains a few steps beside the eager one from the same weights
and must come to the same loss; then all ways of a case are timed in turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from journal import Journal

import decompk
from decompk import optim, train
from decompk.kernels.cache import cores, processor
from decompk.kernels.timer import in_turns, wall_seconds

KEYS = ("case", "network", "how")
HOWS = {"eager": {}, "compiled": {"compile": True}, "graph": {"graph": True}}
HOWS["compiled, graph"] = {"compile": True, "graph": True}
CHECKED, ROUNDS, WARM = 3, 7, 5
TOLERANCE = {"float32": 1e-3, "bf16": 3e-2}  # of the loss after CHECKED steps


@dataclass(frozen=True)
class Case:
    """A network, its decomposition and a batch."""

    name: str
    model: str
    size: tuple[int, int, int]
    partitions: int | tuple[int, int]
    crop: int | None
    margin: int = 0
    batch: int = 128

    def networks(self) -> dict[str, nn.Module]:
        """Packed members and the global network, freshly drawn."""
        torch.manual_seed(0)
        known = {"input_size": self.size, "num_classes": 10}
        net = decompk.models.build(self.model, **known)
        d = (net, self.size, self.partitions, self.crop, self.margin)
        return {"members": decompk.grouped_subnets(*d, seed=0), "global": net}


CPU = (Case("VGG8, K=4 at 16", "vgg8", (1, 32, 32), 4, None, batch=64),)
GPU = (
    Case("ResNet32, K=4 at 16", "resnet32", (3, 32, 32), 4, None),
    Case("ResNet32, K=4 at 20", "resnet32", (3, 32, 32), 4, 20),
    Case("ResNet50, K=4 at 140", "resnet50_food101", (3, 224, 224), 4, 140),
    Case("ResNet50, K=8 at 96", "resnet50_food101", (3, 224, 224), (2, 4), 96),
    Case("ResNet50, K=16 at 70", "resnet50_food101", (3, 224, 224), 16, 70, 24),
)


def step_of(net: nn.Module, device: torch.device, precision: str, how: dict[str, bool]) -> train.Step:
    """A Step on a copy of `net`, with Adam."""
    net = copy.deepcopy(net).to(device, memory_format=torch.channels_last).train()
    graph = how.get("graph", False)
    if hasattr(net, "K"):
        optimizer: torch.optim.Optimizer = optim.Adam(net, lr=1e-4, capturable=graph)
    else:
        rate = torch.tensor(1e-4, device=device) if graph else 1e-4
        optimizer = torch.optim.Adam(net.parameters(), lr=rate, fused=True, capturable=graph)
    return train.Step(net, optimizer, precision=precision, **{"graph": False, **how})


def losses(step: train.Step, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """What training by these batches comes to."""
    for x, y in batches:
        step(x, y)
    found = step.read().loss
    step.reset()
    return found


def seconds(step: train.Step, x: torch.Tensor, y: torch.Tensor, least: float) -> float:
    """Of one step, over as many as take `least` seconds."""
    count = 1
    while (each := wall_seconds(partial(step, x, y), x.device, count)) * count < least:
        count *= 2
    return each


def measure(case: Case, device: torch.device, precision: str, journal: Journal, least: float, hows: dict) -> None:
    """Every way of both networks of a case, timed in turns, into the journal."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, *case.size, generator=generator).to(device)
    labels = torch.randint(10, (case.batch,), generator=generator).to(device)
    rows = [torch.randperm(case.batch, generator=generator).to(device) for _ in range(CHECKED)]
    batches = [(images[row], labels[row]) for row in rows]
    for network, net in case.networks().items():
        steps, reference = {}, None
        for how, options in hows.items():
            key = {"case": case.name, "network": network, "how": how}
            if journal.has(**key):
                continue
            journal.begin(**key)
            step = step_of(net, device, precision, options)
            found = losses(step, batches)
            reference = reference or losses(step_of(net, device, precision, {}), batches)
            error = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(found, reference, strict=True))
            if error > TOLERANCE[precision]:
                journal.add(**key, wrong=f"the loss is off by {error:.1e}")
                continue
            for _ in range(WARM):
                step(images, labels)
            if step.reasons:
                journal.add(**key, error="; ".join(step.reasons.values()))
                continue
            steps[how] = step
        timed = {how: partial(seconds, step, images, labels, least) for how, step in steps.items()}
        for how, found in in_turns(timed, ROUNDS).items():
            rate = case.batch / statistics.median(found)
            journal.add(
                case=case.name,
                network=network,
                how=how,
                images_per_s=rate,
                ms=1e3 * statistics.median(found),
                ms_least=1e3 * min(found),
                ms_most=1e3 * max(found),
            )
        del steps
        if device.type == "cuda":
            torch.cuda.empty_cache()


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: images per second, and how much faster members are than the global network done the same way."""
    yield "| case | network | how | images/s | ms a step (least–most) | faster than global |"
    yield "| --- | --- | --- | ---: | ---: | ---: |"
    rates = {(r["case"], r["network"], r["how"]): r["images_per_s"] for r in records if "images_per_s" in r}
    for r in records:
        start = f"| {r['case']} | {r['network']} | {r['how']} |"
        if "images_per_s" not in r:
            yield f"{start} {r.get('wrong') or r.get('error')} | | |"
            continue
        against = rates.get((r["case"], "global", r["how"]))
        ratio = f"{r['images_per_s'] / against:.2f}×" if against and r["network"] == "members" else ""
        yield f"{start} {r['images_per_s']:,.0f} | {r['ms']:.2f} ({r['ms_least']:.2f}–{r['ms_most']:.2f}) | {ratio} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--minutes", type=float, default=10.0, help="no case is begun after them")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this in their name")
    arguments = parser.parse_args(argv)
    end = time.monotonic() + 60 * arguments.minutes
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    head = {
        "command": "python tools/train_speed.py --out FILE",
        "device": torch.cuda.get_device_name() if gpu else f"CPU {processor().name}, {cores()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": "bf16" if gpu else "float32",
    }
    journal = Journal(arguments.out, KEYS, "train")
    journal.note("head", **head)
    for case in GPU if gpu else CPU:
        if arguments.only in case.name and time.monotonic() < end:
            hows = HOWS if gpu else {how: o for how, o in HOWS.items() if "graph" not in o}
            measure(case, device, head["precision"], journal, 0.2, hows)
    arguments.out.with_suffix(".md").write_text("\n".join(table(journal.records)) + "\n")
    return 1 if any(r.get("wrong") for r in journal.records) else 0


if __name__ == "__main__":
    sys.exit(main())
