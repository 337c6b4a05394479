"""What a demo looks like: the scores of all networks, and what its members see or make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..divide.decompose import Decomposition
from ..report.figure import BLUE, GRAY, GREEN, ORANGE, PINK, RED, SKY, YELLOW, new_figure
from .data import Samples
from .kinds import Demo

COLORS = (SKY, ORANGE, BLUE, PINK, YELLOW, GRAY, "#44AA99", "#882255")  # of the members
ROWS = {"composed": GREEN, "composed, trained": "#00664B", "from random weights": RED}


def draw(
    name: str,
    demo: Demo,
    d: Decomposition,
    rows: list[list[Any]],
    samples: Samples,
    composed: nn.Module,
    trained: nn.Module,
    path: Path,
) -> None:
    """A PNG: on the left the test score of each row, on the right samples with the members' parts in their colours."""
    figure = new_figure(11, 4.2)
    left, right = figure.subfigures(1, 2, width_ratios=(5, 6))
    _scores(left.subplots(), demo, rows, d.K)
    {"regression": _scatter, "autoencoder": _reconstructions}.get(name, _parts)(right, d, samples, composed, trained)
    figure.suptitle(f"{name}: {demo.what}", fontsize=10)
    figure.savefig(path)


def _scores(axes: Any, demo: Demo, rows: list[list[Any]], K: int) -> None:
    bars = [row for row in rows if not row[0].startswith("all ")]
    colors = [*(COLORS[k % len(COLORS)] for k in range(K)), *ROWS.values()]
    axes.barh([row[0] for row in bars], [row[2] for row in bars], color=colors)
    for i, row in enumerate(bars):
        text = f"{row[2]:.1f} " if demo.higher_is_better else f"{row[2]:.3g} "
        axes.text(row[2], i, text, va="center", ha="right", fontsize=8, color="white", weight="bold")
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %" if demo.higher_is_better else "test mean squared error (less is better)")
    axes.spines[["top", "right"]].set_visible(False)


def _scatter(figure: Any, d: Decomposition, samples: Samples, composed: nn.Module, trained: nn.Module) -> None:
    axes = figure.subplots()
    with torch.no_grad():
        for label, net in (("composed", composed), ("composed, trained", trained)):
            marker = "o" if label == "composed" else "^"
            points = samples.y_test.numpy(), net(samples.x_test).numpy()
            axes.scatter(*points, s=12, color=ROWS[label], alpha=0.6, label=label, marker=marker)
    low, high = samples.y_test.min().item(), samples.y_test.max().item()
    axes.plot([low, high], [low, high], color="black", lw=0.8)
    axes.set(xlabel="true progression (standard deviations)", ylabel="predicted")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _reconstructions(figure: Any, d: Decomposition, samples: Samples, composed: nn.Module, trained: nn.Module) -> None:
    x = samples.x_test[:8]
    with torch.no_grad():
        lines = {"input": x, "composed": composed(x), "trained": trained(x)}
    grid = figure.subplots(len(lines), len(x))
    for row, (label, images) in zip(grid, lines.items(), strict=True):
        for axes, image in zip(row, images, strict=True):
            axes.imshow(image.view(8, 8).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, fontsize=9)


def _parts(figure: Any, d: Decomposition, samples: Samples, composed: nn.Module, trained: nn.Module) -> None:
    """Four test samples; what each member sees of them in its colour."""
    grid = figure.subplots(2, 2)
    for axes, x, y in zip(grid.flat, samples.x_test, samples.y_test, strict=False):
        if len(d.crops[0].size) == 1 and x.dim() == 2 and x.shape[0] == 1:
            _wave(axes, d, x[0])
        else:
            _image(axes, d, x)
        axes.set_title(samples.names[int(y)], fontsize=9)


def _wave(axes: Any, d: Decomposition, x: torch.Tensor) -> None:
    axes.plot(x.numpy(), color="black", lw=0.8)
    low, high = x.min().item(), x.max().item()
    for k, crop in enumerate(d.crops):
        at = crop.positions[0]
        axes.plot([at[0], at[-1]], [low - 0.3 - 0.25 * (k % 2)] * 2, color=COLORS[k % len(COLORS)], lw=3)
    axes.set(yticks=[], ylim=(low - 0.9, high + 0.3))
    axes.spines[["top", "right", "left"]].set_visible(False)


def _image(axes: Any, d: Decomposition, x: torch.Tensor) -> None:
    """A digit, written as a vector or as a sequence of rows, tinted by member; or a volume's middle slice."""
    axes.set(xticks=[], yticks=[])
    if len(d.crops[0].size) == 3:
        _slice(axes, d, x[0].numpy())
        return
    owner: np.ndarray = np.empty(x.shape[-1], dtype=int)
    for k, part in enumerate(d.crops):
        owner[part.positions[0]] = k
    picture = x.reshape(8, 8).numpy()
    owner = np.broadcast_to(owner if owner.size == 8 else owner.reshape(8, 8), (8, 8))
    tint = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in COLORS])[owner % len(COLORS)]
    axes.imshow(tint * (0.25 + 0.75 * picture[..., None]), interpolation="nearest")


def _slice(axes: Any, d: Decomposition, volume: np.ndarray) -> None:
    """The middle slice in gray, around it the members' crops, those behind each other one inside the other."""
    from matplotlib.patches import Rectangle

    middle = len(volume) // 2
    axes.imshow(volume[middle], cmap="gray", interpolation="nearest")
    behind: dict[tuple[int, ...], int] = {}
    for k, crop in enumerate(d.crops):
        if crop.start[0] <= middle < crop.stop[0]:
            (top, left), (height, width) = crop.start[1:], crop.size[1:]
            inside = 0.8 * behind.setdefault((top, left), 0)
            behind[top, left] += 1
            corner, size = (left - 0.5 + inside, top - 0.5 + inside), (width - 2 * inside, height - 2 * inside)
            axes.add_patch(Rectangle(corner, *size, fill=False, lw=2, edgecolor=COLORS[k % len(COLORS)]))
