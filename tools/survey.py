"""Writes tools/survey.md: which of torchvision's CNNs decompose into 4 members, and why the others do not."""

import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from zoo import torchvision  # noqa: E402

import decompk  # noqa: E402

NOT_CNNS = ("vit", "swin", "maxvit")
PIXELS = {"inception_v3": 299}


def main() -> None:
    rows, decomposed = [], 0
    names = [n for n in torchvision.models.list_models(module=torchvision.models) if not n.startswith(NOT_CNNS)]
    for name in names:
        with mock.patch.multiple(torch.nn.init, **dict.fromkeys(INITIALISERS, lambda tensor, *a, **k: tensor)):
            net = torchvision.models.get_model(name)
        size = (3, *[PIXELS.get(name, 224)] * 2)
        try:
            d = decompk.decompose(net, size, partitions=4)
        except decompk.DecompkError as error:
            verdict = str(error)
        else:
            decomposed += 1
            whole, member = (sum(p.numel() for p in m.parameters()) for m in (net, d.member_shell()))
            verdict = f"parameters 1/{whole / member:.1f}" + (f"; {len(d.notes)} places not exact" if d.notes else "")
        rows.append(f"| {name} | {verdict} |")
        print(rows[-1], flush=True)
    head = (
        f"{decomposed} of torchvision {torchvision.__version__}'s {len(names)} CNNs decompose into 4 members on a "
        "quarter of the image each; the others are refused as below. Made by `python tools/survey.py`, torch "
        f"{torch.__version__.partition('+')[0]}."
    )
    table = "\n".join([head, "", "| network | member / global, or why not |", "| --- | --- |", *rows])
    Path(__file__).with_name("survey.md").write_text(table + "\n")


# Only shapes matter here, and drawing the weights would take most of the time.
INITIALISERS = ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_uniform_")

if __name__ == "__main__":
    main()
