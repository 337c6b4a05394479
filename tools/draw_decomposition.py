"""Draws tools/decomposition.png: a real decomposition and the weights that composition gives, member by member."""

from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from sklearn.datasets import load_digits

import decompk

matplotlib.use("Agg")
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")


def main() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(32 * 4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10),
    )  # fmt: skip
    d = decompk.decompose(net, (1, 8, 8), partitions=4)
    marked = d.subnets(seed=0)
    for k, member in enumerate(marked):
        for parameter in member.parameters():
            parameter.data.fill_(k + 1)
    composed = d.compose(marked)

    figure, axes = plt.subplots(1, 5, figsize=(12, 3.1), layout="constrained", width_ratios=(1, 0.35, 1, 2, 0.9))
    image = torch.from_numpy(load_digits().images[12])
    axes[0].imshow(image, cmap="gray_r")
    for crop, color in zip(d.crops, COLORS, strict=True):
        box = plt.Rectangle(
            (crop.left - 0.4, crop.top - 0.4), crop.width - 0.2, crop.height - 0.2, fill=False, color=color, linewidth=3
        )
        axes[0].add_patch(box)
    axes[0].set_title("crops (2.6)")
    cmap = ListedColormap(["white", *COLORS])
    layers = {
        "first conv\n(2.11)": composed[0].weight.amax((2, 3)),
        "conv (2.12)": composed[3].weight.amax((2, 3)),
        "first FC: the crop's window (2.13)": composed[7].weight,
        "last FC\n(2.14)": composed[9].weight,
    }
    for axis, (title, weight) in zip(axes[1:], layers.items(), strict=True):
        axis.imshow(weight.detach(), cmap=cmap, vmin=0, vmax=4, interpolation="nearest", aspect="auto")
        axis.set_title(title)
        axis.set_xlabel(f"{weight.shape[1]} in")
        axis.set_ylabel(f"{weight.shape[0]} out")
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle("One member a colour: its part of the image, and its part of every composed weight (white is zero)")
    figure.savefig(Path(__file__).with_name("decomposition.png"), dpi=110)


if __name__ == "__main__":
    main()
