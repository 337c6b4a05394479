"""What must hold between measurement and analysis, and whether it does."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from ..cost.figures import ROLES, LayerCost, Saved
from ..report.decomposition import Pair
from .counters import Figures
from .law import Field, Part, Ratio, expected, flops_parts, parameter_parts, role_of, saved_parts
from .sides import Layer, Side
from .timing import Times

HOLDS, FAILS, UNCHECKED = "holds", "FAILS", "not checked"
EXACT = 1e-9  # relative: what is counted in integers has to agree, but ratios of them are rounded
SAVED = 0.05  # what autograd keeps

NAMES = {
    "forward_flops": "forward FLOPs",
    "backward_flops": "backward FLOPs",
    "parameters": "parameter bytes",
    "gradients": "gradient bytes",
    "optimizer_state": "Adam's state, bytes",
    "saved": "saved activations, bytes",
    "image": "saved image, bytes",
}
WHERE = {
    "forward_flops": "conv_macs and the graph's shapes in decompk/cost",
    "backward_flops": "backward_macs in decompk/cost/walk.py",
    "parameters": "parameters outside the traced graph, or LayerCost.params",
    "gradients": "parameters without a gradient, or LayerCost.params",
    "optimizer_state": "adam_bytes in decompk/cost/formulas.py",
    "saved": "an operation that keeps something else than decompk/cost/walk.py's rules say",
    "image": "an operation that keeps something else than decompk/cost/walk.py's rules say",
}


@dataclass(frozen=True)
class Claim:
    """One figure measured and analysed. `deviation` is relative, `tolerance` its limit; None where it cannot be."""

    what: str
    measured: float | None
    analysed: float | None
    tolerance: float | None
    deviation: float | None
    verdict: str
    explanation: str


def claim(what: str, measured: float, analysed: float, tolerance: float, good: str, bad: str) -> Claim:
    """A Claim that holds where |measured / analysed − 1| ≤ tolerance; what to say in either case."""
    deviation = measured / analysed - 1 if analysed else float(measured != analysed)
    holds = abs(deviation) <= tolerance
    verdict, explanation = (HOLDS, good) if holds else (FAILS, bad)
    return Claim(what, measured, analysed, tolerance, deviation, verdict, explanation)


def unchecked(what: str, analysed: float | None, why: str) -> Claim:
    return Claim(what, None, analysed, None, None, UNCHECKED, why)


def figure_claims(side: str, measured: Figures, analysed: Figures) -> list[Claim]:
    """Every figure of one network: FLOPs, parameters, gradients and state exactly, what autograd keeps within 5 %."""
    claims = []
    for f in fields(Figures):
        if side == "packed" and f.name == "image":
            continue
        tolerance = SAVED if f.name in ("saved", "image") else EXACT
        good = "torch's counter" if "flops" in f.name else ""
        values = getattr(measured, f.name), getattr(analysed, f.name)
        claims.append(claim(f"{side}: {NAMES[f.name]}", *values, tolerance, good, f"look at {WHERE[f.name]}"))
    return claims


def packed_claims(member: Figures, packed: Figures, K: int) -> list[Claim]:
    """The packed module is K members: it computes and holds K times what was measured of one."""
    claims = []
    for f in fields(Figures):
        if f.name == "image":  # packed, every layer that reads the crops keeps a copy of its own
            continue
        tolerance = SAVED if f.name == "saved" else EXACT
        values = getattr(packed, f.name), K * getattr(member, f.name)
        bad = "the packed module's own operators do or keep something else than its members'"
        claims.append(claim(f"packed = {K} × member: {NAMES[f.name]}", *values, tolerance, "", bad))
    return claims


def fvcore_claim(side: str, counted: int | str, macs: int) -> Claim:
    """fvcore's MACs; a string says why it counted none."""
    what = f"{side}: forward MACs"
    if isinstance(counted, str):
        return unchecked(what, macs, counted)
    return claim(what, counted, macs, EXACT, "fvcore, which calls them flops", f"look at {WHERE['forward_flops']}")


def layers_claim(side: str, layers: Sequence[Layer]) -> Claim:
    """The FLOPs of every layer alone as one claim: about their sum, and no layer may differ."""
    what = f"{side}: FLOPs of each layer alone"
    found = {layer.name: layer.sides[side] for layer in layers if side in layer.sides and sum(layer.sides[side].flops)}
    counted = {name: s for name, s in found.items() if s.counted is not None}
    if not counted:
        return unchecked(what, None, "no layer with MACs is a module")
    wrong = [f"{name}: {s.counted} counted, {s.flops} analysed" for name, s in counted.items() if s.counted != s.flops]
    sums = sum(sum(s.counted) for s in counted.values()), sum(sum(s.flops) for s in counted.values())
    good = f"torch's counter, {len(counted)} of {len(found)} layers"
    if not wrong:
        return claim(what, *sums, EXACT, good, "")
    deviation = sums[0] / sums[1] - 1
    return Claim(what, *sums, EXACT, deviation, FAILS, f"{len(wrong)} layers differ, such as {wrong[0]}")


def ratio_claims(
    pairs: Sequence[Pair],
    K: int,
    field: Field,
    sides: Mapping[str, Side],
    layers: Sequence[Layer],
    batch: int,
    element_size: int,
    mask_size: int,
) -> list[Claim]:
    """member / global of FLOPs (in all and by role), parameters and what autograd keeps: the law times its factors."""
    law, found = ROLES["conv"], []  # convolutions hold nearly all of a network
    whole, member = sides["global"].measured, sides["member"].measured
    sizes = {"index": 8, "mask": mask_size}

    def size(saved: Saved) -> int:
        return (1 if saved.content == "vector" else batch) * saved.elements * sizes.get(saved.content, element_size)

    def add(what: str, measured: float | None, parts: Sequence[Part], power: int, tolerance: float = EXACT) -> None:
        ratio = expected(parts, K, power)
        explanation = explained(ratio)
        if measured is None:
            reason = f"{explanation}; not all of these layers are modules"
            found.append(unchecked(f"member/global: {what}", ratio.expected, reason))
        else:
            bad = f"no named factor explains it: {explanation}"
            found.append(claim(f"member/global: {what}", measured, ratio.expected, tolerance, explanation, bad))

    for i, name in enumerate(("forward", "backward")):
        figure = f"{name}_flops"
        amount = LayerCost.flops if name == "forward" else LayerCost.backward_flops.fget
        measured = getattr(member, figure) / getattr(whole, figure)
        add(f"{name} FLOPs", measured, flops_parts(pairs, K, field, amount), law.flops)
        for role in ROLES:
            own = [pair for pair in pairs if role_of(pair) == role and pair.whole and pair.member]
            sums = _counted(layers, role, i)
            if own and (sums is None or sums[0]):
                parts = flops_parts(own, K, field, amount)
                add(f"{name} FLOPs, {role}", sums and sums[1] / sums[0], parts, ROLES[role].flops)
    measured = member.parameters / whole.parameters
    add("parameters", measured, parameter_parts(pairs, K, field), law.weights)
    if whole.saved:
        parts = saved_parts(pairs, K, field, size)
        add("saved activations", member.saved / whole.saved, parts, law.activations, SAVED)
    return found


def _counted(layers: Sequence[Layer], role: str, i: int) -> tuple[int, int] | None:
    """(global, member): the FLOPs counted of pass i of all layers of a role; None where one was not counted alone."""
    own = [layer.sides for layer in layers if layer.role == role and {"global", "member"} <= layer.sides.keys()]
    if any(s[name].counted is None for s in own for name in ("global", "member")):
        return None
    whole, member = (sum(s[name].counted[i] for s in own) for name in ("global", "member"))
    return whole, member


def explained(ratio: Ratio) -> str:
    """'1/K³ × first layer 1.03 × overlap of crops 1.56'."""
    power = "1/K" + ("", "", "²", "³")[ratio.power] if 0 < ratio.power < 4 else f"K^-{ratio.power}"
    law = power if ratio.power else "1"
    return " × ".join(
        [law, *(f"{name} {factor:.5g}" for name, factor in ratio.factors.items() if abs(factor - 1) >= 5e-5)]
    )


def time_claim(whole: Times, packed: Times) -> Claim:
    """All K members' training step takes no longer than the global network's, up to the spread of its middle half."""
    middle, limit = statistics.median(packed.step), statistics.median(whole.step)
    low, _, high = statistics.quantiles(whole.step, method="inclusive")
    deviation, spread = middle / limit - 1, (high - low) / limit
    explanation = f"packed {span(packed.step)}, global {span(whole.step)}"
    if deviation > spread:
        explanation += "; layers this small are bound by launches, not by bytes or FLOPs"
    what = "packed training step ≤ global's, s"
    return Claim(what, middle, limit, spread, deviation, HOLDS if deviation <= spread else FAILS, explanation)


def span(seconds: list[float]) -> str:
    """'12.3 ms (12.1–13.0)'."""
    ms = [1e3 * s for s in seconds]
    return f"{statistics.median(ms):.4g} ms ({min(ms):.4g}–{max(ms):.4g})"
