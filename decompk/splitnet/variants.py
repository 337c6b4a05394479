"""What `decompk split` compares: names such as "Deep overlap" or "2-4-8 simplex", and what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import DecompkError
from .points import split_points

DENSE, SSL = "dense", "SSL"
# The supplement's rows: Table 1, whose SSL strengths are those of its own optimizer, and section 4.1's ImageNet splits.
DEFAULT = {
    "wrn_16_8": (
        DENSE, "FC", "Shallow", "Deep", "Hierarchical", "Deep even", "Deep random", "Shallow simplex",
        "FC overlap", "Shallow overlap", "Deep overlap", f"{SSL} 0.8", f"{SSL} 1.1", f"{SSL} 1.4",
    ),
    "alexnet": (DENSE, "2-4-8 simplex even", "2-4-8 random", "2x5 simplex even", "2x5 random"),
    "resnet18x2": (DENSE, "1-1-2 simplex", "2-2-2 simplex even", "2-2-2 random", "2-2-4 simplex even"),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    groups, whole_inputs: as `split_points` gives them for `setting`; empty for the dense network and for SSL, which has
    a strength. simplex: the reduced gradient instead of softmax. overlap: assignments freeze, and fuzzy nodes are
    duplicated. even: groups of equal size. random: groups are dealt out, not learned.
    """

    name: str
    setting: str = ""
    groups: Mapping[str, int] = field(default_factory=dict)
    whole_inputs: tuple[str, ...] = ()
    simplex: bool = False
    overlap: bool = False
    even: bool = False
    random: bool = False
    strength: float = 0.0

    @property
    def slug(self) -> str:
        """The name as a part of a file's."""
        return self.name.lower().replace(" ", "-")

    @property
    def learned(self) -> bool:
        return bool(self.groups) and not self.random

    @property
    def most(self) -> int:
        """The number of groups of the layer that has most."""
        return max(self.groups.values(), default=0)


def variants(model: str, names: Sequence[str] | None = None) -> list[Variant]:
    """The variants of a registered network by name; without names, those of the supplement.

    A name is "dense", "SSL STRENGTH", or a setting of `split_points`, followed by "random", or by any of "simplex" and
    either "overlap" or "even". Raises DecompkError.
    """
    if model not in DEFAULT:
        raise DecompkError(f"{model!r} is no network of SplitNet's: choose one of {', '.join(DEFAULT)}.")
    return [_variant(model, " ".join(name.split())) for name in names or DEFAULT[model]]


def _variant(model: str, name: str) -> Variant:
    words = name.split()
    if words == [DENSE]:
        return Variant(name)
    if words[:1] == [SSL]:
        try:
            (strength,) = map(float, words[1:])
        except ValueError:
            strength = 0.0
        if not 0 < strength < float("inf"):
            raise DecompkError(f"{name!r} has no strength: give a positive number, such as '{SSL} 1.1'.")
        return Variant(name, strength=strength)
    options: dict[str, bool] = {}
    while words and words[-1] in ("simplex", "overlap", "even", "random") and words[-1] not in options:
        options[words.pop()] = True
    if "random" in options and len(options) > 1:
        raise DecompkError(f"{name!r} learns nothing that could overlap or have a parametrisation: leave one out.")
    if "overlap" in options and "even" in options:
        raise DecompkError(f"{name!r}: groups with overlap are not of equal size: leave one out.")
    setting = " ".join(words)
    groups, whole_inputs = split_points(model, setting)
    return Variant(name, setting, groups, whole_inputs, **options)
