"""Writes tools/survey.md: which of torchvision's CNNs train by `grouped_subnets(model)`, and why the others do not."""

import gc
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from zoo import torchvision  # noqa: E402

import decompk  # noqa: E402

NOT_CNNS = ("vit", "swin", "maxvit")
SIDES = (64, 96, 128, 160, 192, 224)  # of the batch, where the network has no size of its own


def main() -> None:
    rows, trained = [], 0
    names = [n for n in torchvision.models.list_models(module=torchvision.models) if not n.startswith(NOT_CNNS)]
    for name in names:
        net = torchvision.models.get_model(name, num_classes=8)
        try:
            packed = decompk.grouped_subnets(net)
            size = step(packed)
        except decompk.DecompkError as error:
            row = f"| {name} | | {error} |"
        else:
            trained += 1
            d, (whole, members) = packed.decomposition, (sum(p.numel() for p in m.parameters()) for m in (net, packed))
            notes = f"; {len(d.notes)} places not exact" if d.notes else ""
            row = f"| {name} | {size}{d.origin} | parameters 1/{whole / (members / d.K):.1f}{notes} |"
        rows.append(row)
        print(row, flush=True)
        gc.collect()
    head = (
        f"{trained} of torchvision {torchvision.__version__}'s {len(names)} CNNs decompose into 4 members on a quarter "
        "of the image each, by `decompk.grouped_subnets(model)` alone, and take a training step on 2 images of the "
        "size that is listed; the others are refused as below. Made by `python tools/survey.py`, torch "
        f"{torch.__version__.partition('+')[0]}."
    )
    table = "\n".join([head, "", "| network | input | member / global, or why not |", "| --- | --- | --- |", *rows])
    Path(__file__).with_name("survey.md").write_text(table + "\n")


def step(packed: decompk.Packed) -> str:
    """One training step at the network's size, or else at the first of SIDES that it takes; returns that size."""
    known = packed.decomposition.input_size
    sizes = [known] if known else [(3, side, side) for side in SIDES]
    for size in sizes:
        x, y = torch.randn(2, *size), torch.randint(8, (2,))
        try:
            out = packed(x)
            break
        except decompk.PartitionError:  # too small for its members
            if size == sizes[-1]:
                raise
    optimizer = torch.optim.SGD(packed.parameters(), lr=1e-3)
    outputs = [out] if isinstance(out, torch.Tensor) else [part for part in out if part is not None]  # auxiliary heads
    loss = sum(decompk.losses.cross_entropy(part, y) for part in outputs)
    loss.backward()
    optimizer.step()
    assert loss.isfinite(), loss
    return "×".join(map(str, size))


if __name__ == "__main__":
    main()
