"""The cost of a decomposition: the global network beside one member and all K, layer by layer and in total."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..cost.figures import ROLES, Cost, Exponents, LayerCost, Shape, total
from ..cost.walk import layers
from ..crops import by
from .table import Column, Table, decimals, known

FIGURES = tuple(Cost().figures())
SIDES = ("global", "member", "all", "ratio", "paper")
# The figures whose ratio the paper gives, and the field of Exponents that holds its power of 1/K.
PAPER = {
    "macs": "flops",
    "flops_2mac": "flops",
    "flops_eq2.10": "flops",
    "backward_flops": "flops",
    "params": "weights",
    "activations": "activations",
}
WHOLE = ROLES["conv"]  # convolutions hold nearly all of a network, so the paper gives their powers for the whole of it

Sides = dict[str, dict[str, float | Any]]  # None where a side has no such layer or figure


@dataclass(frozen=True)
class Pair:
    """One layer of the global network and the member's layer of the same name; None where there is no such layer."""

    name: str
    whole: LayerCost | None
    member: LayerCost | None

    @property
    def either(self) -> LayerCost:
        layer = self.whole or self.member
        assert layer is not None
        return layer

    @property
    def exponents(self) -> Exponents | None:
        """The paper's powers of 1/K. A last layer whose outputs are divided too (auto-encoders) is like any other."""
        divided = self.whole and self.member and self.whole.out_shape != self.member.out_shape
        return ROLES.get("fc" if self.either.role == "last fc" and divided else self.either.role)

    def useful_macs(self, K: int) -> int:
        """MACs of the nonzero blocks in the composed network: K members' kernels at every pixel of the full image.

        A fully connected layer has one position, and the first one's kernel keeps the size of its crop. Products of
        activations have no zero blocks.
        """
        if self.whole is None or self.member is None or not self.member.macs:
            return 0
        if not self.member.kernel_weights:
            return self.whole.macs
        return K * self.member.macs * self.whole.positions // self.member.positions


@dataclass(frozen=True)
class Report:
    """The figures of a decomposition as numbers, and the same as tables; str() is the text format.

    FLOPs, MACs and activations are those of one sample, bytes those of `batch` samples of `element_size`-byte values.
    """

    title: str
    K: int
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]
    element_size: int
    batch: int

    @property
    def layers(self) -> dict[str, Sides]:
        """Layer name → "global", "member", "all" (K members), "ratio" (member/global), "paper" → figure → number."""
        return {pair.name: self._sides(pair.whole, pair.member, pair.exponents) for pair in self.pairs}

    @property
    def totals(self) -> Sides:
        """The sums over all layers, under a layer's keys: totals["global"]["macs"]."""
        whole = total(pair.whole for pair in self.pairs if pair.whole)
        member = total(pair.member for pair in self.pairs if pair.member)
        return self._sides(whole, member, WHOLE)

    @property
    def composed(self) -> dict[str, int]:
        """The composed network's dense_flops, useful_flops and zero_block_flops, 2 per MAC."""
        dense = sum(2 * pair.whole.macs for pair in self.pairs if pair.whole)
        useful = sum(2 * pair.useful_macs(self.K) for pair in self.pairs)
        return {"dense_flops": dense, "useful_flops": useful, "zero_block_flops": dense - useful}

    def _sides(self, whole: Cost | None, member: Cost | None, exponents: Exponents | None) -> Sides:
        one: dict[str, Any] = whole.figures(self.element_size, self.batch) if whole else dict.fromkeys(FIGURES)
        part: dict[str, Any] = member.figures(self.element_size, self.batch) if member else dict.fromkeys(FIGURES)
        return {
            "global": one,
            "member": part,
            "all": {f: None if value is None else self.K * value for f, value in part.items()},
            "ratio": {f: part[f] / one[f] if one[f] and part[f] is not None else None for f in FIGURES},
            "paper": {
                f: self.K ** -getattr(exponents, PAPER[f]) if exponents and f in PAPER else None for f in FIGURES
            },
        }

    def layer_table(self) -> Table:
        """Every layer with every figure; for programs."""
        heads = ["layer", "kind", "role", "groups", "kernel", "global output", "member output"]
        rows: list[list[Any]] = []
        for pair, sides in zip(self.pairs, self.layers.values(), strict=True):
            layer = pair.either
            shapes = [by(layer.kernel), *(by(side.out_shape) if side else None for side in (pair.whole, pair.member))]
            figures = [sides[side][figure] for figure in FIGURES for side in SIDES]
            rows.append([pair.name, layer.kind, layer.role, layer.groups, *shapes, *figures])
        columns = [Column(head) for head in (*heads, *(f"{side} {f}" for f in FIGURES for side in SIDES))]
        return Table(f"{self.title}: layers", columns, rows, self.notes)

    def brief_table(self) -> Table:
        """The layers with MACs and the figures the paper speaks of; for readers."""
        columns = [
            Column("layer"),
            Column("output\nglobal → member"),
            Column("MFLOPs\nglobal", decimals(2)),
            Column("MFLOPs\nmember", decimals(2)),
            Column("FLOPs\nratio", reciprocal),
            Column("FLOPs\npaper"),
            Column("params k\nglobal", decimals(1)),
            Column("params k\nmember", decimals(1)),
            Column("params\nratio", reciprocal),
            Column("params\npaper"),
            Column("activ.\nratio", reciprocal),
        ]
        rows = []
        for pair in self.pairs:
            if pair.whole is None or pair.member is None or not pair.whole.macs:
                continue
            powers = pair.exponents
            sides = self._sides(pair.whole, pair.member, powers)
            one, part, ratio = sides["global"], sides["member"], sides["ratio"]
            rows.append(
                [
                    pair.name,
                    f"{_map(pair.whole.out_shape)} → {_map(pair.member.out_shape)}",
                    one["flops_2mac"] / 1e6,
                    part["flops_2mac"] / 1e6,
                    ratio["flops_2mac"],
                    self._power(powers.flops if powers else None),
                    one["params"] / 1e3,
                    part["params"] / 1e3,
                    ratio["params"],
                    self._power(powers.weights if powers else None),
                    ratio["activations"],
                ]
            )
        others = len(self.pairs) - len(rows)
        notes = [
            f"FLOPs: 2 per multiply-accumulate, one sample, forward. {others} further layers without MACs or without a "
            "partner (norms, activations, pooling, adds) count in the totals; --format json and csv list them.",
            "ratio: member / global. paper: what 2.1.2 expects of a uniform split without overlap; its 1/K⁴ for the "
            "FLOPs of the first FC is 1/K³ here, which is what (2.10) gives at output positions.",
        ]
        return Table(self.title, columns, rows, [*notes, *self.notes])

    def total_table(self) -> Table:
        """Every figure's sum."""
        columns = [
            Column("figure"),
            Column("global", decimals(0)),
            Column("member", decimals(0)),
            Column(f"all {self.K}", decimals(0)),
            Column("member/global", reciprocal),
            Column("paper", reciprocal),
        ]
        sides = self.totals
        rows = [[figure, *(sides[side][figure] for side in SIDES)] for figure in FIGURES]
        notes = [
            "FLOPs, MACs and activations: one sample. Bytes: compulsory traffic (each tensor moved once per use) of a "
            f"batch of {self.batch} in {self.element_size}-byte numbers."
        ]
        return Table(f"{self.title}: totals", columns, rows, notes)

    def composed_table(self) -> Table:
        """What the composed network computes, and how much of it is multiplication by zero blocks."""
        dense = self.composed["dense_flops"]
        columns = [Column("figure"), Column("FLOPs", decimals(0)), Column("% of dense", decimals(1))]
        rows = [[name, value, 100 * value / dense if dense else None] for name, value in self.composed.items()]
        notes = ["One sample, 2 per multiply-accumulate. useful: the members' blocks at every pixel of the full image."]
        return Table(f"{self.title}: composed network", columns, rows, notes)

    def render(self, format: str = "table") -> str:
        """The report in one of FORMATS: text and Markdown for readers, JSON (one object: layers, totals, composed) and
        CSV (the layers, then a row of totals) with every layer and figure. Raises DecompkError on another format."""
        if known(format) == "csv":
            layer_table, sides = self.layer_table(), self.totals
            row = ["total", *[None] * 6, *(sides[side][figure] for figure in FIGURES for side in SIDES)]
            return Table(layer_table.title, layer_table.columns, [*layer_table.rows, row]).to_csv()
        if format == "json":
            tables = {"layers": self.layer_table(), "totals": self.total_table(), "composed": self.composed_table()}
            return json.dumps({name: table.as_object() for name, table in tables.items()}, indent=1, ensure_ascii=False)
        return "\n".join(t.render(format) for t in (self.brief_table(), self.total_table(), self.composed_table()))

    def __str__(self) -> str:
        return self.render()

    def _power(self, exponent: int | None) -> str | None:
        if exponent is None:
            return None
        power = "1/K" + ("", "²", "³")[exponent - 1] if exponent else "1"
        return f"{power}=1/{self.K**exponent}" if exponent else power


def report(decomposition: Any, element_size: int = 4, batch: int = 1) -> Report:
    """The cost of a decompk decomposition.

    `decomposition` has `model`, `input_size` and `member_size` of one sample, `crops`, `K`, `notes` and
    member_skeleton(), which returns one member. Layers are matched by name. `element_size` (bytes of a number) and
    `batch` (samples) shape the bytes alone. Raises UnsupportedOperation where torch.fx cannot follow the model.
    """
    crop = decomposition.crops[0].size
    spatial = decomposition.input_size[-len(crop) :]
    whole = {layer.name: layer for layer in layers(decomposition.model, decomposition.input_size)}
    member = {layer.name: layer for layer in layers(decomposition.member_skeleton(), decomposition.member_size)}
    names = [*whole, *(name for name in member if name not in whole)]
    title = f"{type(decomposition.model).__name__} at {by(spatial)} in {decomposition.K} members at {by(crop)}"
    pairs = tuple(Pair(name, whole.get(name), member.get(name)) for name in names)
    return Report(title, decomposition.K, pairs, tuple(decomposition.notes), element_size, batch)


def reciprocal(ratio: float) -> str:
    """0.0158 as "1/63.1"."""
    return f"1/{1 / ratio:.4g}" if 0 < ratio < 1 else f"{ratio:.4g}"


def _map(shape: Shape) -> str:
    """A feature map's shape, a square one as 64×56²."""
    return f"{shape[0]}×{shape[1]}²" if len(shape) == 3 and shape[1] == shape[2] else by(shape)
