"""How good a network is on images it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .augment import normalise
from .data import Dataset, test_order
from .ranks import Ranks
from .step import autocast, prepared

TOP = 5


@dataclass(frozen=True)
class Scores:
    """A number per member: mean cross-entropy, top-1 and top-5 accuracy in % (None with fewer than six classes)."""

    loss: list[float]
    accuracy: list[float]
    top5: list[float] | None


@torch.no_grad()
def evaluate(
    net: nn.Module,
    data: Dataset,
    device: torch.device,
    batch: int = 256,
    precision: str = "float32",
    ranks: Ranks | None = None,
) -> Scores:
    """Scores of `net`, packed or not, on the test images, in eval mode; its mode is put back.

    With `ranks` every process takes its share of each batch, and all get the scores of the whole.
    """
    training, classes = net.training, len(data.classes)
    net.eval()
    order = test_order(len(data.test), batch)
    if ranks is not None and ranks.size > 1:
        order = [rows[share.start : share.stop] for rows in order if (share := ranks.share(len(rows)))]
    sums: Any = None
    try:
        for x, y in data.test.batches(order, device):
            with autocast(device, precision):
                logits = net(prepared(normalise(x, data.mean), precision))
            logits = (logits.unsqueeze(0) if logits.dim() == 2 else logits).double()
            K, N = logits.shape[:2]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.repeat(K), reduction="none").view(K, N)
            best = logits.topk(min(TOP, classes), -1).indices == y.view(1, N, 1)
            found = torch.stack([loss.sum(1), best[..., 0].sum(1).double(), best.any(-1).sum(1).double()])
            sums = found if sums is None else sums + found
    finally:
        net.train(training)
    if ranks is not None and ranks.size > 1:
        sums = ranks.sum(torch.zeros(3, 1, dtype=torch.float64, device=device) if sums is None else sums)
    loss, right, among = (sums / len(data.test)).tolist()
    top5 = [100 * share for share in among] if classes > TOP else None
    return Scores(loss, [100 * share for share in right], top5)
