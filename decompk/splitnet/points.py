"""Where SplitNet's supplement splits its networks (its section 4.1): which layers, in how many groups."""

from __future__ import annotations

import re

from ..errors import DecompkError

LATE = ("layer3.0.conv2", "layer3.1.conv1", "layer3.1.conv2", "fc")
EARLY = ("layer2.0.conv2", "layer2.1.conv1", "layer2.1.conv2", "layer3.0.conv1", "layer3.0.projection")


def _stage(path: str) -> tuple[str, ...]:
    """The five convolutions of a stage of ResNet-18x2, which the supplement counts as split depth 5; its entries first.

    The entries are the first convolution and the projection, which both read the stage before.
    """
    return tuple(f"{path}.{name}" for name in ("0.conv1", "0.downsample.0", "0.conv2", "1.conv1", "1.conv2"))


# Settings with a name, and what the numbers of a setting "a-b-c" are the groups of: layer paths, in order.
NAMED: dict[str, dict[str, dict[str, int]]] = {
    "wrn_16_8": {
        "FC": {"fc": 4},
        "Shallow": dict.fromkeys(LATE, 2),
        "Shallow 3": dict.fromkeys(LATE, 3),
        "Shallow 4": dict.fromkeys(LATE, 4),
        "Deep": dict.fromkeys((*EARLY, *LATE), 2),
        "Hierarchical": dict.fromkeys(EARLY, 2) | dict.fromkeys(LATE, 4),
    },
    "alexnet": {"2x5": dict.fromkeys(("conv4", "conv5", "fc6", "fc7", "fc8"), 2)},
    "resnet18x2": {},
}
NUMBERED: dict[str, dict[str, tuple[str, ...]]] = {
    "alexnet": {"fc6": ("fc6",), "fc7": ("fc7",), "fc8": ("fc8",)},
    "resnet18x2": {"conv4-1&2": _stage("layers.2"), "conv5-1&2": _stage("layers.3"), "fc": ("fc",)},
}
ENTRIES = (*_stage("layers.2")[:2], *_stage("layers.3")[:2])


def split_points(model: str, setting: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """(layer path → groups, whole_inputs) of a registered network, for `Assignment` or to count a split.

    wrn_16_8: FC, Shallow, Deep, Hierarchical, as in Table 1, and "Shallow 3" and "Shallow 4" of Table 2. alexnet:
    "a-b-c", the groups of fc6, fc7 and fc8, and "2x5", conv4 to fc8 in 2 groups each. resnet18x2: "a-b-c", the groups
    of the convolutions of conv4-1&2 (here layers.2), of those of conv5-1&2 (layers.3) and of fc. In "a-b-c" 1 means not
    split and no number is below the one before it.

    One rule holds for all: what the first layer of a split reads is in groups, too, by dealing out the outputs of the
    layers that produce it, which are not named here and keep all their weights. Where a stage of ResNet-18x2 is the
    first to be split, the two that produce its groups, its first convolution and its projection, belong to its split
    depth of 5: they are named, and are the whole_inputs, those that read everything and keep all their weights. Raises
    DecompkError on an unknown network or setting.
    """
    if model not in NAMED:
        raise DecompkError(
            f"{model!r} is no network that SplitNet's supplement splits; choose one of {_listed(NAMED)}."
        )
    if setting in NAMED[model]:
        return dict(NAMED[model][setting]), ()
    numbers = re.fullmatch(r"(\d+)-(\d+)-(\d+)", setting) if model in NUMBERED else None
    counts = [int(number) for number in numbers.groups()] if numbers else []
    if not counts or counts != sorted(counts) or counts[0] < 1 or counts[-1] < 2:
        raise DecompkError(f"{setting!r} is no split of {model}; choose {_choices(model)}.")
    parts = [(paths, count) for paths, count in zip(NUMBERED[model].values(), counts, strict=True) if count > 1]
    groups = {path: count for paths, count in parts for path in paths}
    return groups, tuple(path for path in parts[0][0] if path in ENTRIES)


def _choices(model: str) -> str:
    named = f"one of {_listed(NAMED[model])}" if len(NAMED[model]) > 1 else _listed(NAMED[model])
    if model not in NUMBERED:
        return named
    numbered = f"the groups of {_listed(NUMBERED[model])}, such as 2-2-4, none fewer than those before them"
    return f"{named}, or {numbered}" if named else numbered


def _listed(names: dict) -> str:
    return ", ".join(names)
