"""Algorithm 1 in two minutes: scikit-learn's digits, a small ResNet, four members, composed and fine-tuned."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from . import losses
from .cost import layers, total
from .decompose import grouped_subnets
from .errors import DecompkError
from .models.basic import BasicResNet
from .report.table import Column, Table
from .theory import theorem_2_2

SIZE, CROP, BATCH, CLASSES = 32, 20, 64, 10  # 20-pixel crops of 32: the paper's overlap for CIFAR
MEMBERS = 4
TIMES_FORWARD = 3  # a training step costs about three forward passes


@dataclass
class Curve:
    """One training: accuracy on the test images (%) and seconds, after each epoch."""

    name: str
    accuracy: list[list[float]] = field(default_factory=list)  # per epoch, one number per member or a single one
    seconds: list[float] = field(default_factory=list)


def run(out: Path, epochs: tuple[int, int] = (16, 6), seed: int = 0) -> dict[str, Any]:
    """Train, compose, fine-tune, compare; prints one table, writes demo.json and demo.png into `out`.

    epochs: (members, global). The comparison network trains members + global epochs from random weights, on the same
    images with the same optimizer. Returns what demo.json holds.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DecompkError(f"the folder {out} cannot be made ({error.strerror}); name another with --out.") from error
    torch.manual_seed(seed)
    train, test = _digits(seed)
    net = resnet8()
    size = (1, SIZE, SIZE)
    print(f"ResNet of {_count(net):,} parameters on {len(train[0])} digits of {SIZE}×{SIZE}; test: {len(test[0])}.")
    packed = grouped_subnets(net, size, MEMBERS, crop_size=CROP, seed=seed)
    print(f"Cut into {MEMBERS} members of {_count(packed) // MEMBERS:,} parameters, on crops of {CROP}×{CROP}.\n")

    members = _fit("members", packed, train, test, epochs[0], 3e-3, _packed_loss, seed)
    composed = packed.compose()
    before = _accuracy(composed, test)[0]
    bound = _bound(packed, composed, test)
    tuned = _fit("composed", composed, train, test, epochs[1], 5e-4, F.cross_entropy, seed)
    scratch = _fit("random", net, train, test, sum(epochs), 1e-3, F.cross_entropy, seed)

    forward = {
        "global": total(layers(net, size)).flops(),
        "member": total(layers(packed.unpack()[0], (1, CROP, CROP))).flops(),
    }
    steps = TIMES_FORWARD * len(train[0])
    flops = {
        "members": steps * epochs[0] * MEMBERS * forward["member"],
        "composed": steps * epochs[1] * forward["global"],
        "random": steps * sum(epochs) * forward["global"],
    }
    result = {
        "epochs": {"members": epochs[0], "composed": epochs[1], "random": sum(epochs)},
        "members": members.__dict__,
        "composed_before_training": before,
        "composed": tuned.__dict__,
        "random": scratch.__dict__,
        "training_flops": flops,
        "theorem_2_2": bound.__dict__,
        "made_with": {
            "command": f"decompk demo --epochs {epochs[0]},{epochs[1]} --seed {seed}",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        },
    }
    print("\n" + table(result).to_text())
    (out / "demo.json").write_text(json.dumps(result, indent=1))
    _draw(result, out / "demo.png")
    print(f"Written: {out / 'demo.json'}, {out / 'demo.png'}")
    return result


def resnet8(width: int = 24) -> nn.Module:
    """The CIFAR ResNet with one block a stage, for one-channel images."""
    stem = nn.Conv2d(1, width, 3, padding=1)
    return BasicResNet(stem, nn.Identity(), (1, 1, 1), CLASSES, bias=True, norm_projection=False)


Images = tuple[torch.Tensor, torch.Tensor]


def _digits(seed: int) -> tuple[Images, Images]:
    """1797 digits, 8×8 enlarged to 32×32, a fifth of them held out."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DecompkError("the demo needs scikit-learn for its images: pip install 'decompk[train]'.") from error
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16 - 0.3
    x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear")
    y = torch.from_numpy(labels)
    train, test = train_test_split(range(len(y)), test_size=0.2, random_state=seed, stratify=labels)
    return (x[train], y[train]), (x[test], y[test])


def _packed_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return losses.cross_entropy(logits, target)


def _fit(
    name: str, net: nn.Module, train: Images, test: Images, epochs: int, lr: float, loss_of: Callable, seed: int
) -> Curve:
    """Adam with the rate divided by 10 for the last third, channels last; the packed module trains like any other."""
    curve = Curve(name)
    x, y = train
    net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs - epochs // 3])
    order = torch.Generator().manual_seed(seed)
    spent = 0.0
    with _progress(epochs * len(range(0, len(y), BATCH)), name) as bar:
        for _ in range(epochs):
            started = time.perf_counter()
            net.train()
            for picked in torch.randperm(len(y), generator=order).split(BATCH):
                optimizer.zero_grad()
                loss = loss_of(net(x[picked]), y[picked])
                loss.backward()
                optimizer.step()
                bar.update()
            schedule.step()
            spent += time.perf_counter() - started
            curve.seconds.append(spent)
            curve.accuracy.append(_accuracy(net, test))
            bar.set_postfix_str(f"test accuracy {max(curve.accuracy[-1]):.1f} %")
    return curve


def _progress(steps: int, name: str) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise DecompkError("the demo shows its progress with tqdm: pip install 'decompk[train]'.") from error
    return tqdm(total=steps, desc=f"{name:9}", unit="step", mininterval=0.5)


@torch.no_grad()
def _accuracy(net: nn.Module, test: Images) -> list[float]:
    """Percent of the test images, one number per member."""
    net.eval()
    logits = net(test[0])
    right = (logits.argmax(-1) == test[1]).double().mean(-1) * 100
    return right.reshape(-1).tolist()


@torch.no_grad()
def _bound(packed: nn.Module, composed: nn.Module, test: Images) -> Any:
    """Theorem 2.2 on the trained members, all seeing the whole image, where the composed network is their sum."""
    composed.eval()
    logits = torch.stack([member.eval()(test[0]) for member in packed.unpack()]).double()
    return theorem_2_2(logits, test[1], composed(test[0]).double())


def _count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def table(result: dict[str, Any]) -> Table:
    """What demo.json holds, as the demo prints it."""
    percent, figure = (lambda v: f"{v:.1f}"), (lambda v: f"{v:.2f}")
    columns = [
        Column("network"),
        Column("epochs"),
        Column("test\naccuracy %", percent),
        Column("training\nseconds", percent),
        Column("training\nTFLOPs", figure),
    ]
    epochs, flops = result["epochs"], {k: v / 1e12 for k, v in result["training_flops"].items()}
    members, tuned, scratch = result["members"], result["composed"], result["random"]
    rows: list[list[Any]] = [
        [f"member {k}, its own crop", epochs["members"], accuracy, None, flops["members"] / MEMBERS]
        for k, accuracy in enumerate(members["accuracy"][-1])
    ]
    both = members["seconds"][-1] + tuned["seconds"][-1]
    rows += [
        ["all members, one packed module", epochs["members"], None, members["seconds"][-1], flops["members"]],
        ["composed, not trained further", 0, result["composed_before_training"], 0.0, 0.0],
        [
            "composed, then trained",
            epochs["composed"],
            tuned["accuracy"][-1][0],
            tuned["seconds"][-1],
            flops["composed"],
        ],
        ["  with its members", epochs["random"], None, both, flops["members"] + flops["composed"]],
        ["from random weights", epochs["random"], scratch["accuracy"][-1][0], scratch["seconds"][-1], flops["random"]],
    ]
    bound = result["theorem_2_2"]
    notes = [
        f"Theorem 2.2, members on the whole image: {bound['all_right']} test images are right for all {MEMBERS} "
        f"members, {bound['lost']} of them wrong when composed; composed loss {bound['loss']:.1f}, bound (2.19) "
        f"{bound['bound']:.1f}.",
        "FLOPs: 2 per MAC, a training step counted as three forward passes. Overlapping crops and global average "
        "pooling: the composed network is not exactly the sum of members on their crops (2.16), so it starts lower "
        "than they end.",
    ]
    return Table("Digits, 4 members", columns, rows, notes)


def _draw(result: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise DecompkError("the demo draws its curves with matplotlib: pip install 'decompk[plot]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    members, tuned, scratch = result["members"], result["composed"], result["random"]
    flops = {name: figure / 1e12 for name, figure in result["training_flops"].items()}
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axes, unit in zip(panels, ("seconds", "TFLOPs"), strict=True):

        def spent(curve: dict[str, Any], unit: str = unit) -> list[float]:
            if unit == "seconds":
                return curve["seconds"]
            epochs = len(curve["seconds"])
            return [flops[curve["name"]] * (epoch + 1) / epochs for epoch in range(epochs)]

        for k in range(MEMBERS):
            accuracy = [accuracies[k] for accuracies in members["accuracy"]]
            axes.plot(
                spent(members),
                accuracy,
                color="tab:blue",
                alpha=0.4,
                label=None if k else "4 members, one packed module",
            )
        start = spent(members)[-1]
        accuracy = [result["composed_before_training"], *(a[0] for a in tuned["accuracy"])]
        axes.plot(
            [start, *(start + s for s in spent(tuned))],
            accuracy,
            color="tab:green",
            marker=".",
            label="composed, then trained",
        )
        accuracy = [a[0] for a in scratch["accuracy"]]
        axes.plot(spent(scratch), accuracy, color="tab:orange", label="from random weights")
        axes.axvline(start, color="gray", linewidth=0.8, linestyle=":")
        axes.annotate("compose", (start, 2), xytext=(4, 0), textcoords="offset points", color="gray")
        axes.set(xlabel=f"training {unit}", ylim=(0, 102))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy (%)")
    panels[1].legend(loc="lower right")
    figure.suptitle("Digits: Algorithm 1 beside random weights")
    figure.savefig(path, dpi=110)
    plt.close(figure)
