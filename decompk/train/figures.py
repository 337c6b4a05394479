"""The paper's figures: accuracy (3.2, 3.6), training time (3.1, 3.5), feature maps (3.7), class activation (3.8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..crops import by
from ..divide.decompose import Decomposition
from ..divide.operations import ELEMENTWISE_FUNCTIONS, ELEMENTWISE_MODULES, operation_name
from ..errors import DecompkError
from ..report.figure import GREEN, RED, SKY, new_figure
from ..theory import feature_maps
from .summary import curve, has

COLORS = {"members": SKY, "global": GREEN, "random": RED}
LAYERS, CHANNELS, DRAWN_MEMBERS, DRAWN_IMAGES = 3, 6, 4, 4
TILE, GAP = 72, 4  # pixels of a feature map's longer side as drawn, and between two maps


def draw_all(
    result: dict[str, Any],
    decomposition: Decomposition,
    subnets: Sequence[nn.Module],
    composed: nn.Module,
    trained: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    classes: Sequence[str],
    folder: Path,
    mean: Sequence[float] | None = None,
) -> list[str]:
    """Every figure that applies, into `folder`; returns the names of the files. Arguments as of the single figures.

    Feature maps and class activation need images (two axes) and a convolution.
    """
    draws: dict[str, Callable[[Path], None]] = {
        "accuracy.png": lambda path: draw_accuracy(result, path),
        "times.png": lambda path: draw_times(result, path),
    }
    if len(decomposition.input_size) == 3 and _activations(decomposition):
        draws["features.png"] = lambda path: draw_features(decomposition, subnets, composed, images, path)
        draws["cam.png"] = lambda path: draw_cam(
            decomposition, subnets, composed, trained, images, labels, classes, path, mean
        )
    for name, draw in draws.items():
        draw(folder / name)
    return [*draws]


def _band(axes: Any, x: np.ndarray, y: np.ndarray, phase: str, **style: Any) -> None:
    """y (seeds, points): the mean as a line over the mean of x, and from the least to the most as a band."""
    axes.plot(x.mean(0), y.mean(0), color=COLORS[phase], **style)
    if len(y) > 1:
        axes.fill_between(x.mean(0), y.min(0), y.max(0), color=COLORS[phase], alpha=0.2, linewidth=0)


def draw_accuracy(result: dict[str, Any], path: Path) -> None:
    """Figures 3.2 and 3.6: test accuracy over epochs and over training seconds; a second row for top-5.

    The composed network's curve begins where the members ended, at its accuracy before any training. Lines are means
    over the seeds, bands go from the worst to the best seed; the members' lines are thin and have none. "max acc" is
    the best epoch's accuracy, the mean over the seeds, as in `summary.tables`.
    """
    keys = {"accuracy": "test accuracy (%)"}
    if all(run["composed"]["top5"] is not None for run in result["runs"]):
        keys["top5"] = "top-5 test accuracy (%)"
    seeds = len(result["runs"])
    figure = new_figure(13, 0.5 + 3.7 * len(keys))
    panels = figure.subplots(len(keys), 2, sharex="col", sharey="row", squeeze=False)
    for row, (key, label) in zip(panels, keys.items(), strict=True):
        for axes, unit in zip(row, ("epoch", "seconds"), strict=True):
            _accuracy_panel(axes, result, key, unit)
            axes.grid(alpha=0.3)
        top = np.nanmax(np.concatenate([line.get_ydata() for line in row[0].lines]), initial=1)
        row[0].set(ylabel=label, ylim=(0, min(1.08 * top, 102)))
        row[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    panels[-1][0].set_xlabel("epochs")
    panels[-1][0].xaxis.get_major_locator().set_params(integer=True)
    panels[-1][1].set_xlabel("training time (seconds, without evaluation)")
    spread = f": mean of {seeds} seeds, band from the worst to the best" if seeds > 1 else ""
    figure.suptitle(f"{result['title']}{spread}")
    figure.savefig(path)


def _accuracy_panel(axes: Any, result: dict[str, Any], key: str, unit: str) -> None:
    K = result["K"]
    start: np.ndarray = np.zeros((len(result["runs"]), 1))
    if has(result, "members"):
        x, y = curve(result, "members", unit)[:, :, 0], curve(result, "members", key)
        start = x[:, -1:]
        for k in range(K):
            label = f"SNet-1 … SNet-{K}, each on its crop\nmax acc of an SNet: {y.max(1).mean(0).max():.2f} %"
            style = {"linewidth": 0.9, "label": None if k else label}
            axes.plot(x.mean(0), y[:, :, k].mean(0), color=COLORS["members"], **style)
    x, y = start, np.array([[run["composed"][key]] for run in result["runs"]], dtype=float)
    before = y.mean()
    if has(result, "global"):
        x = np.concatenate([start, start + curve(result, "global", unit)[:, :, 0]], 1)
        y = np.concatenate([y, curve(result, "global", key)[:, :, 0]], 1)
    best = f"GNet-T, before its training: {before:.2f} %\nmax acc of GNet-T: {y.max(1).mean():.2f} %"
    _band(axes, x, y, "global", marker=".", label=best)
    if has(result, "random"):
        x, y = curve(result, "random", unit)[:, :, 0], curve(result, "random", key)[:, :, 0]
        _band(axes, x, y, "random", linestyle="--", label=f"max acc of GNet-R: {y.max(1).mean():.2f} %")
    at = start.mean()
    axes.axvline(at, color="gray", linewidth=0.8, linestyle=":")
    side = {"xytext": (-4, 5), "ha": "right"} if at > sum(axes.get_xlim()) / 2 else {"xytext": (4, 5)}
    axes.annotate("compose", (at, 0), textcoords="offset points", color="gray", fontsize=9, **side)


def draw_times(result: dict[str, Any], path: Path) -> None:
    """Figures 3.1 and 3.5: seconds of ten epochs, global network beside all members; seconds of both strategies.

    Bars are means over the seeds, error bars go from the fastest to the slowest.
    """
    names = {"members": f"SNet-1 … SNet-{result['K']} together", "global": "GNet-T", "random": "GNet-R"}
    whole = {phase: curve(result, phase, "seconds")[:, -1, 0] for phase in names if has(result, phase)}
    epochs = {phase: np.array([len(run[phase]["epoch"]) for run in result["runs"]]) for phase in whole}
    tens = {phase: 10 * whole[phase] / epochs[phase] for phase in whole}
    either = "random" if "random" in whole else "global"
    figure = new_figure(10, 4.4)
    panels, legend = figure.subplots(1, 2), {}
    for axes, title, seconds, stacks in (
        (panels[0], "10 epochs", tens, [[either], ["members"]]),
        (panels[1], "the whole training", whole, [["random"], ["members", "global"]]),
    ):
        stacks = [found for stack in stacks if (found := [phase for phase in stack if phase in whole])]
        labels, tops = [], []
        for at, stack in enumerate(stacks):
            top, lines = np.zeros(len(result["runs"])), []
            for phase in stack:
                legend[names[phase]] = axes.bar(at, seconds[phase].mean(), 0.6, bottom=top.mean(), color=COLORS[phase])
                length = 10 if seconds is tens else epochs[phase].mean()
                lines.append(f"{length:g} epochs: {seconds[phase].mean():,.1f} s")
                top = top + seconds[phase]
            if len(top) > 1:
                reach = [[top.mean() - top.min()], [top.max() - top.mean()]]
                axes.errorbar([at], [top.mean()], yerr=reach, color="black", capsize=5, linewidth=1)
            tops.append(top.mean())
            labels.append("\n+ ".join(lines) + (f"\n= {top.mean():,.1f} s" if len(lines) > 1 else ""))
        ratio = f"\nGNet takes {tops[0] / tops[1]:.2f} times as long" if len(tops) > 1 else ""
        axes.set_title(title + ratio, fontsize=11)
        axes.set_xticks(range(len(labels)), labels)
        axes.set(xlim=(-0.6, 1.6), ylabel="training time (seconds)", axisbelow=True)
        axes.grid(axis="y", alpha=0.3)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{result['title']}, on {result['made_with']['device']}")
    figure.savefig(path)


@dataclass(frozen=True)
class FeaturePanel:
    """One layer of figure 3.7: for every member (own, composed), maps (n, channels, h, w) on the field Ω_k (2.15).

    claimed: for which members Theorem 2.1 has a field; without one the maps are those of the same place. difference:
    the largest |own − composed| over the members with a field, or over all where none has one.
    """

    layer: str
    maps: list[tuple[torch.Tensor, torch.Tensor]]
    claimed: list[bool]
    difference: float


def feature_panels(
    decomposition: Decomposition, subnets: Sequence[nn.Module], composed: nn.Module, images: torch.Tensor
) -> list[FeaturePanel]:
    """First, middle and last convolution that has an output of more than one pixel, after norm and activation."""
    names = _activations(decomposition)
    found = feature_maps(decomposition, subnets, composed, _like(images, composed), [*names])
    spatial = [name for name, maps in found.items() if min(min(own.shape[2:]) for own, _, _ in maps) > 1]
    spatial = spatial or [*found]
    panels = []
    for name in [spatial[at] for at in _spread(len(spatial), LAYERS)]:
        maps, claimed = [], []
        for k, (own, whole, spans) in enumerate(found[name]):
            claimed.append(not isinstance(spans, str))
            for axis in (2, 3):
                if not spans or isinstance(spans, str):  # what lies nearest to the crop
                    size = own.shape[axis]
                    start = decomposition.crops[k].start[axis - 2] * whole.shape[axis]
                    first = min(round(start / decomposition.input_size[axis - 1]), whole.shape[axis] - size)
                    whole = whole.narrow(axis, first, size)
                else:
                    span = spans[axis - 2]
                    own = own.narrow(axis, span.low, span.high - span.low)
                    whole = whole.narrow(axis, span.low + int(span.offset), span.high - span.low)
            maps.append((own.float().cpu(), whole.float().cpu()))
        apart = [(a - b).abs().max().item() for (a, b), c in zip(maps, claimed, strict=True) if c or not any(claimed)]
        layer = f"convolution {[*names].index(name) + 1} of {len(names)}, '{names[name]}'"
        panels.append(FeaturePanel(layer, maps, claimed, max(apart)))
    return panels


def _activations(d: Decomposition) -> dict[str, str]:
    """Node → name of every 2-D convolution whose channels are divided; the node is that of the activation behind it."""
    found = {}
    modules = dict(d.model.named_modules(remove_duplicate=False))

    def alone(node: fx.Node) -> bool:
        module = modules.get(node.target) if node.op == "call_module" else None
        known = type(module).__name__ in ELEMENTWISE_MODULES or isinstance(module, nn.modules.batchnorm._BatchNorm)
        return known or operation_name(node) in ELEMENTWISE_FUNCTIONS

    for node in d.division.graphs[False].nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d) or operation_name(node) == "conv2d":
            name = str(node.target) if module is not None else node.name
            while len(node.users) == 1 and (after := next(iter(node.users))).all_input_nodes == [node] and alone(after):
                node = after
            if d.division.channels[False].get(node.name) is not None:
                found[node.name] = name
    return found


def _like(images: torch.Tensor, net: nn.Module) -> torch.Tensor:
    """`images` on the network's device and in its precision."""
    parameter = next(net.parameters())
    return images.to(parameter.device, parameter.dtype)


def draw_features(
    decomposition: Decomposition,
    subnets: Sequence[nn.Module],
    composed: nn.Module,
    images: torch.Tensor,
    path: Path,
    samples: int = 1,
) -> None:
    """Figure 3.7: feature maps of the members, and the same channels of the composed network, on Theorem 2.1's fields.

    images: (n, C, H, W), normalised; the first `samples` are run. Both maps of a channel share one scale of brightness.
    """
    panels = feature_panels(decomposition, subnets, composed, images[:samples])
    rows = [(n, k) for n in range(min(samples, len(images))) for k in _spread(len(subnets), DRAWN_MEMBERS)]
    figure = new_figure(9, len(panels) * (0.9 + 0.65 * len(rows)) + 0.5)
    figure.get_layout_engine().set(h_pad=0.12)
    grid = figure.subplots(len(panels), 2, squeeze=False)
    for line, panel in zip(grid, panels, strict=True):
        varied = torch.stack([own.std((0, 2, 3), correction=0) for own, _ in panel.maps]).mean(0)
        channels = varied.argsort(descending=True)[:CHANNELS].sort().values.tolist()
        step = TILE + GAP
        sheets = np.full((2, step * len(rows) - GAP, step * len(channels) - GAP), np.nan)
        names = []
        for i, (n, k) in enumerate(rows):
            size = panel.maps[k][0].shape[2:]
            lines = [f"SNet-{k + 1}, {by(size)}", "" if panel.claimed[k] else "no field", f"image {n + 1}"]
            names.append("\n".join(filter(None, lines if samples > 1 else lines[:2])))
            rounding = 1e-3 * panel.maps[k][0].abs().max().item()  # not to be blown up to black and white
            shown = [round(pixels * TILE / max(size)) for pixels in size]
            for j, channel in enumerate(channels):
                pair = _scaled(torch.stack([maps[n, channel] for maps in panel.maps[k]]), rounding)
                tile = F.interpolate(pair[None], size=shown, mode="area" if max(size) > TILE else "nearest")[0]
                sheets[:, i * step : i * step + shown[0], j * step : j * step + shown[1]] = tile.numpy()
        for axes, sheet in zip(line, sheets, strict=True):
            axes.imshow(sheet, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks(step * np.arange(len(channels)) + (step - GAP) / 2, channels)
            axes.set_yticks(step * np.arange(len(rows)) + (step - GAP) / 2, names)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0, labelsize=9, labelleft=axes is line[0])
        line[0].set_title(f"{panel.layer}\nSNets, each on its crop", fontsize=9)
        difference = f"largest difference {panel.difference:.1e}" if panel.difference else "no difference at all"
        line[1].set_title(f"GNet-T, same channels, {_claim(panel)}\n{difference}", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("channel of the member", fontsize=9)
    figure.suptitle("Feature maps of the members (left) and of the composed network (right)")
    figure.savefig(path)


def _claim(panel: FeaturePanel) -> str:
    if all(panel.claimed):
        return r"on $\Omega_k$ (2.15)"
    if not any(panel.claimed):
        return "same place: no field claimed"
    return rf"$\Omega_k$ claimed for {sum(panel.claimed)} of {len(panel.claimed)} members"


def _spread(count: int, most: int) -> list[int]:
    """At most so many of range(count), first and last among them."""
    return sorted({round(at) for at in np.linspace(0, count - 1, min(count, most))})


def _scaled(x: torch.Tensor, least: float = 0.0) -> torch.Tensor:
    """Between 0 and 1, all of x by one scale, which spans at least `least`; what is not finite counts as 0."""
    x = torch.nan_to_num(x.float(), posinf=0.0, neginf=0.0)
    return (x - x.min()) / (x.max() - x.min()).clamp_min(max(1e-12, least))


class _Calls(TorchFunctionMode):
    """Watches a forward pass: maps (N, C, H, W) from the last convolution with space on, and linear layers after it.

    It sees functions as well as modules, and leaves nothing behind in the network.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[torch.Tensor] = []
        self.linear: list[tuple[torch.Tensor, ...]] = []  # input, weight, output

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name == "conv2d" and (not self.maps or out.shape[2:].numel() > 1):
            self.maps, self.linear = [out], []
        elif name == "linear":
            self.linear.append((*[*args, *(kwargs or {}).values()][:2], out))
        elif self.maps and isinstance(out, torch.Tensor) and out.dim() == 4:
            self.maps.append(out)
        return out


def class_activation(
    net: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Where `net` sees class labels[i] in images[i]: maps (n, H, W) of the image's size, p(label) (n,), the method.

    "CAM": M = Σ_n w_n X_n, where one linear layer reads the means X_n of the last maps. Otherwise "Grad-CAM": the
    last convolution's maps, weighted by the mean gradient of the class score, negative sums cut off. Raises
    DecompkError where no 2-D convolution runs.
    """
    x = _like(images.detach(), net)
    with torch.no_grad(), _Calls() as calls:
        output = net(x)
    if not calls.maps:
        raise DecompkError(f"{type(net).__name__} has no 2-D convolution, and class activation needs one.")
    labels = labels.to(output.device)[:, None]
    maps, method = _averaged(calls, output), "CAM"
    if maps is not None:
        seen = torch.einsum("nc,nchw->nhw", calls.linear[0][1].detach()[labels[:, 0]], maps)
    else:
        method = "Grad-CAM"
        with torch.enable_grad(), _Calls() as calls:
            scores = net(x.clone().requires_grad_()).gather(1, labels)
            (gradient,) = torch.autograd.grad(scores.sum(), calls.maps[0])
        seen = F.relu((gradient.mean((2, 3), keepdim=True) * calls.maps[0].detach()).sum(1))
    seen = F.interpolate(seen[:, None].float(), size=x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return seen.cpu(), output.float().softmax(1).gather(1, labels)[:, 0].cpu(), method


def _averaged(calls: _Calls, output: torch.Tensor) -> torch.Tensor | None:
    """The maps whose spatial means the only linear layer reads, if the network ends so."""
    if len(calls.linear) != 1 or not calls.linear[0][2].equal(output):
        return None
    read = calls.linear[0][0]
    same = [x for x in calls.maps if x.shape[:2] == read.shape and torch.allclose(x.mean((2, 3)), read, 1e-3, 1e-5)]
    return same[0] if same else None


def draw_cam(
    decomposition: Decomposition,
    subnets: Sequence[nn.Module],
    composed: nn.Module,
    trained: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    classes: Sequence[str],
    path: Path,
    mean: Sequence[float] | None = None,
) -> None:
    """Figure 3.8: where each network sees the true class, over the image; members at the place of their crops.

    images: (n, C, H, W), normalised, labels: (n,), classes: their names, mean: what was taken off each channel. Drawn
    are up to four images, of different classes where there are, and p, the probability that the network gives them.
    """
    first = [n for n, label in enumerate(labels.tolist()) if label not in labels[:n].tolist()]
    rows = sorted([*first, *(n for n in range(len(labels)) if n not in first)][:DRAWN_IMAGES])
    images, labels, shown = images[rows], labels[rows], _spread(len(subnets), DRAWN_MEMBERS)
    height, width = images.shape[2:]
    seen = []  # title, crop (top, left, height, width), what class_activation says
    for k in shown:
        crop: Any = decomposition.crops[k]  # of images
        place = (crop.top, crop.left, crop.height, crop.width)
        seen.append((f"SNet-{k + 1}", place, class_activation(subnets[k], crop.cut(images), labels)))
    for name, net in (("GNet-T", composed), ("GNet-T-trained", trained)):
        seen.append((name, (0, 0, height, width), class_activation(net, images, labels)))

    figure = new_figure(1.55 * (1 + len(seen)) + 0.8, 1.75 * len(rows) + 0.7)
    grid = figure.subplots(len(rows), 1 + len(seen), squeeze=False)
    offset = torch.zeros(images.shape[1]) if mean is None else torch.as_tensor(mean).cpu()
    for i, line in enumerate(grid):
        picture = _scaled(images[i].cpu() + offset.reshape(-1, 1, 1)).permute(1, 2, 0).numpy()
        color = picture if picture.shape[2] == 3 else picture.mean(2)
        gray = picture.mean(2)
        line[0].imshow(color, cmap="gray", vmin=0, vmax=1)
        line[0].set_ylabel(str(classes[int(labels[i])]), fontsize=9)
        for axes, (name, (top, left, h, w), (maps, sure, _)) in zip(line[1:], seen, strict=True):
            axes.imshow(0.85 + 0.15 * gray, cmap="gray", vmin=0, vmax=1)
            extent = (left - 0.5, left + w - 0.5, top + h - 0.5, top - 0.5)
            axes.imshow(gray[top : top + h, left : left + w], cmap="gray", vmin=0, vmax=1, extent=extent)
            heat = axes.imshow(_scaled(maps[i]).numpy(), cmap="inferno", vmin=0, vmax=1, alpha=0.6, extent=extent)
            axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
            axes.set_xlabel(f"p = {sure[i]:.2f}", fontsize=9, labelpad=2)
            if i == 0:
                axes.set_title(name, fontsize=10)
        for axes in line:
            axes.set(xticks=[], yticks=[])
    grid[0][0].set_title("image, true class", fontsize=10)
    bar = figure.colorbar(heat, ax=grid, ticks=[0, 1], shrink=0.6, aspect=30)
    bar.ax.set_yticklabels(["least", "most"])
    bar.set_label("activation, every map on its own scale", fontsize=9)
    methods = sorted({method for _, _, (_, _, method) in seen})
    figure.suptitle(f"Class activation for the true class ({' and '.join(methods)}); p: its probability")
    figure.savefig(path)
