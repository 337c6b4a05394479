"""The supplement's figures: how assignments part over training (1), and weights before and after the sorting (2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..report.figure import BLACK, BLUE, GRAY, GREEN, ORANGE, PINK, RED, SKY, YELLOW, new_figure

BINS = 40
LEAST = 1e-3  # the share from which on the shade deepens; what is rarer is as light, and only 0 is white
GROUP_COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, RED, BLACK)
PIECES = 1200  # into at least so many is an image cut along each axis: more than it has pixels
STRIP = 7  # points: how thick a strip of groups' colours is


def shares(values: np.ndarray, bins: int = BINS) -> np.ndarray:
    """(T, bins): of each row of values (T, n), in [0, 1], the share in [b/bins, (b+1)/bins); 1 is in the last one."""
    counts = np.empty((len(values), bins))
    for row, found in zip(counts, values, strict=True):  # n may be large: no second array of all of them
        row[:] = np.bincount((found * bins).astype(np.intp).clip(0, bins - 1), minlength=bins)
    return counts / values.shape[1]


def step_edges(steps: Sequence[int]) -> np.ndarray:
    """(T + 1,): where the columns of increasing steps (T,) meet, halfway; the outer ones end at their steps."""
    at = np.asarray(steps, dtype=float)
    if len(at) == 1:
        return at[0] + np.array([-0.5, 0.5])
    return np.concatenate([at[:1], (at[1:] + at[:-1]) / 2, at[-1:]])


def draw_assignments(histories: Mapping[str, tuple[Sequence[int], np.ndarray]], path: Path) -> None:
    """Figure 1: how all assignments are distributed at each step, a panel for each entry, in rows of at most three.

    histories: title → (steps (T,), increasing; values (T, n), in [0, 1]). Each panel has its own scale of steps.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    # The palest blues cannot be told from white, which is left to what is not there at all.
    blues = ListedColormap(colormaps["Blues"](np.linspace(0.15, 1, 256)))
    rows = math.ceil(len(histories) / 3)
    columns = math.ceil(len(histories) / rows)
    figure = new_figure(1.4 + 3.6 * columns, 0.2 + 3.3 * rows)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels = grid.flatten()
    for axes, (title, (steps, values)) in zip(panels, histories.items(), strict=False):
        edges, found = step_edges(steps), shares(values).T
        mesh = axes.pcolormesh(edges, np.linspace(0, 1, BINS + 1), np.ma.masked_equal(found, 0), cmap=blues)
        mesh.set_norm(LogNorm(LEAST, 1, clip=True))
        axes.set(title=title, xlim=edges[[0, -1]], ylim=(0, 1), xlabel="step")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for axes in panels[len(histories) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("assignment")
    bar = figure.colorbar(mesh, ax=grid, extend="min", aspect=22 * rows, format=lambda share, _: f"{100 * share:g} %")
    bar.set_label("share of assignments")
    figure.savefig(path)


def draw_weights(weights: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]], path: Path) -> None:
    """Figure 2: weights as they are, and sorted by group; a layer a row, on a scale of its own.

    weights: path of a layer → (before (O, I), after (O, I), rows (O,), columns (I,)): magnitudes in the network's own
    order and sorted, and the groups of the sorted outputs and inputs, which do not decrease; −1 stands for none.
    """
    from matplotlib.patches import Patch

    heights = [1.0 + min(1.6, len(after) / 60) for _, after, _, _ in weights.values()]  # of the matrices, in inches
    figure = new_figure(10, sum(heights) + 0.9 * len(heights) + 0.4)
    figure.get_layout_engine().set(wspace=0.03)
    grid = figure.subplots(len(weights), 2, squeeze=False, height_ratios=[height + 0.9 for height in heights])
    present: set[int] = set()
    for line, (name, (before, after, rows, columns)) in zip(grid, weights.items(), strict=True):
        positive = np.concatenate([before[before > 0], after[after > 0]])
        # One large weight would leave all others white.
        top = float(np.quantile(positive, 0.995, method="higher")) if positive.size else 1.0
        for axes, matrix in zip(line, (before, after), strict=True):
            image = _matrix(axes, matrix, top)
            axes.set(xlabel="inputs", ylabel="outputs")
            for axis in (axes.xaxis, axes.yaxis):
                axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        by = " × ".join(str(size) for size in after.shape)
        line[0].set_title(f"'{name}', {by}", fontsize=10, pad=12)
        line[1].set_title("sorted by group", fontsize=10, pad=12)
        _strip(line[1], columns, "columns")
        _strip(line[1], rows, "rows")
        present |= {*rows.tolist(), *columns.tolist()}
        bar = figure.colorbar(image, ax=line, extend="max" if (positive > top).any() else "neither", aspect=15)
        bar.set_label("norm of the weight")
    handles = [Patch(color=_color(group), label=f"group {group + 1}") for group in sorted(present - {-1})]
    if -1 in present:
        handles.append(Patch(color=GRAY, label="in no group"))
    style = {"frameon": False, "fontsize": 9, "handlelength": 1.2, "columnspacing": 1.4}
    figure.legend(handles=handles, loc="outside lower center", ncols=min(9, len(handles)), **style)
    figure.savefig(path)


def _matrix(axes: Any, matrix: np.ndarray, top: float) -> Any:
    """The image of `matrix`, white at 0 and black from `top` on, which fills `axes`."""
    O, I = matrix.shape
    # Smoothing keeps columns finer than a pixel from getting lost; of entries many pixels wide, cut into as many pieces
    # as that takes, it leaves the borders sharp.
    fine = matrix.repeat(-(-PIECES // O), 0).repeat(-(-PIECES // I), 1)
    style = {"cmap": "Greys", "vmin": 0, "vmax": top, "interpolation": "hanning", "interpolation_stage": "data"}
    return axes.imshow(fine, aspect="auto", extent=(-0.5, I - 0.5, O - 0.5, -0.5), **style)


def _color(group: int) -> str:
    return GRAY if group < 0 else GROUP_COLORS[group % len(GROUP_COLORS)]


def _strip(axes: Any, groups: np.ndarray, side: str) -> None:
    """The colours of the rows' or columns' non-decreasing groups beside the matrix, and lines where they change."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation

    starts = [0, *np.flatnonzero(np.diff(groups)) + 1]
    shift = 0.55 * STRIP / 72  # inches: half the strip, and a little air
    beside = axes.get_yaxis_transform() + ScaledTranslation(shift, 0, axes.figure.dpi_scale_trans)
    above = axes.get_xaxis_transform() + ScaledTranslation(0, shift, axes.figure.dpi_scale_trans)
    for start, end in zip(starts, [*starts[1:], len(groups)], strict=True):
        along, across = (start - 0.5, end - 0.5), (1, 1)
        points, transform = ((across, along), beside) if side == "rows" else ((along, across), above)
        style: dict[str, Any] = {"linewidth": STRIP, "solid_capstyle": "butt", "clip_on": False}
        axes.add_artist(Line2D(*points, color=_color(int(groups[start])), transform=transform, **style))
    for start in starts[1:]:
        draw = axes.axhline if side == "rows" else axes.axvline
        draw(start - 0.5, color=RED, linewidth=0.8)
