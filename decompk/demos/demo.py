"""One demo: members, composed, trained, and the same epochs from random weights, with the theorem and bound checked."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses, theory
from ..divide.decompose import Decomposition, decompose
from ..errors import DecompkError
from ..packed.pack import Packed, pack
from ..packed.schedule import settle
from ..report.progress import bar
from ..report.table import Column, Table, decimals
from ..train.data import epoch_order
from .data import Samples
from .figure import draw
from .kinds import DEMOS, Demo

MEASURES = {"accuracy": "accuracy %", "mse": "mse", "reconstruction": "mse"}
BATCH = 32
CHECKED = 16  # test samples on which the theorem is checked, in float64


@dataclass(frozen=True)
class Result:
    """What a demo came to: a table with a row for each network, the theorem's largest violation, the task's bound."""

    table: Table
    theorem: float
    bound: theory.Bound

    @property
    def failed(self) -> bool:
        """Whether a theorem or a bound does not hold, beyond rounding in float64 and float32."""
        return self.theorem > 1e-9 or self.bound.violation > 1e-5


def run(name: str, out: Path, seed: int = 0, epochs: tuple[int, int] | None = None) -> Result:
    """Run the demo called `name`; its figure, table and weights go into the folder `out`.

    epochs: of the members, and of the composed network. Raises DecompkError on an unknown name, or a folder that cannot
    be written.
    """
    if name not in DEMOS:
        raise DecompkError(f"no demo is called {name!r}; choose one of {', '.join(DEMOS)}.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DecompkError(f"{str(out)!r} cannot be made a folder ({error.strerror}).") from error
    demo = DEMOS[name]
    member_epochs, global_epochs = epochs or demo.epochs
    both = member_epochs + global_epochs
    samples = demo.samples()
    torch.manual_seed(seed)
    d = decompose(demo.model(), samples.x_train.shape[1:], demo.partitions, demo.crop_size, head=demo.head)
    packed = pack(d.subnets(seed), d.crops, input_dims=samples.x_train.dim())

    begin = time.perf_counter()
    settle(packed, samples.x_train[epoch_order(len(samples.x_train), BATCH, seed, 0)[0]])
    once = time.perf_counter() - begin
    seconds = _train(packed, demo, d, samples, member_epochs, seed, f"{d.K} members together")
    composed = d.compose(packed.unpack(), demo.head)
    trained, random = copy.deepcopy(composed), copy.deepcopy(d.model)
    with torch.no_grad():
        outputs = packed.eval()(samples.x_test)
    pairs = zip(outputs, _targets(demo, d, samples.y_test), strict=True)
    scores = [_score(demo, output, target) for output, target in pairs]
    rows: list[list[Any]] = [[f"member {k}", member_epochs, score, None] for k, score in enumerate(scores)]
    rows.append([f"all {d.K} members", member_epochs, sum(scores) / d.K, seconds])
    for title, net, count in (
        ("composed", composed, 0),
        ("composed, trained", trained, global_epochs),
        ("from random weights", random, both),
    ):
        seconds = _train(net, demo, d, samples, count, seed, title)
        with torch.no_grad():
            rows.append([title, count, _score(demo, net.eval()(samples.x_test), samples.y_test), seconds])

    check, bound = _theorem(demo, d, packed, samples), _bound(demo, d, outputs, composed, samples)
    score = Column(f"test\n{MEASURES[demo.measure]}", decimals(2 if demo.higher_is_better else 4))
    columns = [Column("network"), Column("epochs"), score, Column("training\nseconds", decimals(1))]
    notes = [
        _describe(check),
        f"The composed network's loss is bounded by its members': {bound.loss:.4f} ≤ {bound.bound:.4f}; the largest "
        f"excess of a sample over its own bound is {bound.violation:.1g}.",
        f"One-time, before the members' first step: compiling and measuring, {once:.1f} s.",
    ]
    table = Table(f"{name}: {demo.what}", columns, rows, notes)
    (out / f"{name}.md").write_text(table.to_markdown(), encoding="utf-8")
    for title, net in (("members", packed), ("composed", composed), ("trained", trained), ("random", random)):
        torch.save(net.state_dict(), out / f"{name}-{title}.pt")
    draw(name, demo, d, rows, samples, composed, trained, out / f"{name}.png")
    return Result(table, check.violation, bound)


def _train(net: nn.Module, demo: Demo, d: Decomposition, samples: Samples, epochs: int, seed: int, what: str) -> float:
    """Adam for so many epochs, with a bar on a terminal; returns seconds."""
    optimizer = torch.optim.Adam(net.parameters(), demo.lr)
    loss = losses.cross_entropy if demo.measure == "accuracy" else losses.mse
    together = isinstance(net, Packed)
    net.train()
    begin = time.perf_counter()
    for epoch in bar(range(epochs), what):
        for batch in epoch_order(len(samples.x_train), BATCH, seed, epoch):
            x, y = samples.x_train[batch], samples.y_train[batch]
            optimizer.zero_grad()
            if together:
                loss(net(x), torch.stack(_targets(demo, d, y))).backward()
            else:
                loss(net(x)[None], y).backward()
            optimizer.step()
    return time.perf_counter() - begin


def _targets(demo: Demo, d: Decomposition, y: Tensor) -> list[Tensor]:
    """What each member has to give."""
    return d.split(y) if demo.head == "concat" else [y] * d.K


def _score(demo: Demo, output: Tensor, target: Tensor) -> float:
    if demo.measure == "accuracy":
        return 100 * (output.argmax(-1) == target).double().mean().item()
    return (output - target).double().square().mean().item()


def _theorem(demo: Demo, d: Decomposition, packed: Packed, samples: Samples) -> theory.FeatureCheck:
    """Theorem 2.1 of the trained members, in float64."""
    members = [member.double() for member in packed.unpack()]
    composed = d.compose(members, demo.head)
    return theory.theorem_2_1(d, members, composed, samples.x_test[:CHECKED].double(), demo.head)


def _bound(demo: Demo, d: Decomposition, outputs: Tensor, composed: nn.Module, samples: Samples) -> theory.Bound:
    """The bound that the paper gives for this kind of task."""
    with torch.no_grad():
        output = composed.eval()(samples.x_test)
    if demo.measure == "mse":
        return theory.regression_bound(outputs, samples.y_test, output)
    if demo.measure == "reconstruction":
        return theory.reconstruction_bound(d, list(outputs), samples.x_test, output)
    check = theory.theorem_2_2(outputs.double(), samples.y_test, outputs.double().sum(0))
    count = len(samples.y_test)
    return theory.Bound(check.loss / count, check.bound / count, check.violation)


def _describe(check: theory.FeatureCheck) -> str:
    inside = sum(layer.field is not None for layer in check.layers)
    compared = f"{inside} of {len(check.layers)} maps compared, layer by layer and member by member"
    output = "the last layers read past the crops' fields, so outputs are not compared"
    if check.output is not None:
        output = f"the output deviates by {check.output:.0e}"
    return f"Theorem 2.1 in float64: {compared}; largest deviation {check.violation:.0e}; {output}."
