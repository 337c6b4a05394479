"""What `measure` returns: figures, layers, times and claims, shown as tables."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from ..report.table import Table, known
from . import tables
from .claims import FAILS, Claim
from .roofs import Roofs
from .sides import Layer, Side
from .timing import Times


@dataclass(frozen=True)
class Profile:
    """Measurement beside analysis. FLOPs and bytes are those of `batch` samples, times are seconds.

    `layers`: all that compute; those without MACs are only analysed. `times`: "global", "members in turn" and "packed"
    → Times; `bounds`: what the roofs allow them, (forward, backward). Both are empty, and roofs None, where no time was
    measured. `claims`: all that must hold; `failed`: what does not.
    """

    title: str
    K: int
    batch: int
    dtype: str
    sides: dict[str, Side]
    layers: tuple[Layer, ...]
    claims: tuple[Claim, ...]
    times: dict[str, Times] = field(default_factory=dict)
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    roofs: Roofs | None = None

    @property
    def failed(self) -> list[Claim]:
        """The claims that do not hold."""
        return [c for c in self.claims if c.verdict == FAILS]

    def tables(self) -> dict[str, Table]:
        """By name: layers, totals, time and roofs (where measured), claims."""
        found = {"layers": tables.layer_table(self), "totals": tables.total_table(self)}
        if self.roofs:
            found |= {"time": tables.time_table(self), "roofs": tables.roof_table(self)}
        return found | {"claims": tables.claim_table(self)}

    def render(self, format: str = "table") -> str:
        """The profile in one of FORMATS: text and Markdown with a brief table of layers; JSON, one object: how many
        claims failed, and every table; CSV, the claims. Raises DecompkError on another format."""
        found = self.tables()
        if known(format) == "csv":
            return found["claims"].to_csv()
        if format == "json":
            objects = {name: table.as_object() for name, table in found.items()}
            roofs = {"roofs": asdict(self.roofs)} if self.roofs else {}
            return json.dumps({"failed": len(self.failed), **objects, **roofs}, indent=1, ensure_ascii=False)
        return "\n".join(t.render(format) for t in (found | {"layers": tables.brief_layer_table(self)}).values())

    def __str__(self) -> str:
        return self.render()
