"""`decompk split`: a network trained whole, split in every way the supplement tells of, and all of them compared."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import shutil
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models
from ..cost.walk import layers
from ..divide.blockdiag import layer_by_layer
from ..errors import DecompkError
from ..kernels.cache import processor
from ..report.figure import new_figure
from ..report.progress import bar
from ..report.table import Table
from ..train.augment import Augment, normalise
from ..train.checkpoint import Checkpoints, dump, load, write_atomically
from ..train.data import Dataset, epoch_order, open_data, seed_of
from ..train.loop import Interrupted
from ..train.ranks import Ranks, start, stop
from ..train.scores import evaluate
from .assignment import Assignment
from .figures import draw_assignments, draw_weights
from .learner import Gammas, Learner
from .nodes import Nodes
from .parallel import Parallel, must_suffice
from .sparse import Sparsifier, without
from .splitter import Split, split
from .summary import summary
from .variants import Variant, variants

PHASES = ("whole", "learn", "tune")
FRAMES = 60  # instants of a training at which Figure 1 looks at the assignments


@dataclass(frozen=True)
class Settings:
    """What every variant shares.

    width: of the model's first stage, None for its own. pixels: of digits and files. augment: flips and shifts by an
    eighth. epochs: of the whole network, of learning groups, of fine-tuning what is split; dense trains as many. lr: of
    all networks, by Adam; assignment_lr, simplex_lr: of softmax and of the reduced gradient; ssl_lr: of SGD in SSL.
    freeze, overlap: of overlapping splits, as in `Learner` and `split`.
    """

    model: str = "wrn_16_8"
    width: int | None = 2
    data: str = "digits"
    pixels: int | None = 16
    augment: bool = False
    epochs: tuple[int, int, int] = (6, 8, 6)
    batch: int = 64
    lr: float = 1e-3
    assignment_lr: float = 0.1
    simplex_lr: float = 2.0
    ssl_lr: float = 0.1
    gammas: Gammas = Gammas(weights=1e-2, disjoint=1e-2, balance=1e-3)
    freeze: float = 0.2
    overlap: float = 0.1


def run(
    out: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    settings: Settings | None = None,
    names: tuple[str, ...] | None = None,
    device: str | None = None,
) -> Table:
    """Train every variant of `names` (those of `variants` by default) for every seed, and compare all.

    The folder `out` gets result.json, summary.md, the supplement's Figures 1 and 2, and each network's state_dict, for
    `fitted` where nodes were doubled or taken out. What result.json holds already, made by the same settings, is not
    trained again, and what was interrupted goes on behind its last epoch. Under torchrun the groups of a split network
    are fine-tuned on different processes. Raises DecompkError where `out` is of other settings or cannot be written.
    """
    settings = settings or Settings()
    new_figure(1, 1)  # without matplotlib, say so before anything is trained
    ranks = start(device)
    try:
        return _Run(out, seeds, settings, variants(settings.model, names), ranks).all()
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command goes on behind the last epoch.", signal.SIGINT) from None
    finally:
        stop(ranks)


def summary_of(out: Path) -> Table:
    """The table of what `run` left in `out`. Raises DecompkError where there is nothing."""
    try:
        known = json.loads((out / "result.json").read_text())
        return summary(known)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DecompkError(f"{str(out)!r} holds no result of `decompk split`.") from error


class _Run:
    def __init__(self, out: Path, seeds: tuple[int, ...], settings: Settings, chosen: list[Variant], ranks: Ranks):
        self.out, self.seeds, self.settings, self.chosen, self.ranks = out, seeds, settings, chosen, ranks
        self.data: Dataset = open_data(settings.data, settings.pixels)
        must_suffice(min((min(v.groups.values()) for v in chosen if v.groups), default=ranks.size), ranks)
        self.known = ranks.from_rank(0, self._read() if ranks.first else None)
        self.nets: dict[int, nn.Module] = {}  # seed → the network trained whole

    def _read(self) -> dict[str, Any]:
        fresh = {"settings": json.loads(json.dumps(dataclasses.asdict(self.settings))), "runs": {}}
        made = {"torch": str(torch.__version__), "device": processor().name, "threads": torch.get_num_threads()}
        fresh["made_with"] = made | {"processes": self.ranks.size}
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if not (self.out / "result.json").exists():
                return fresh
            before = dict(json.loads((self.out / "result.json").read_text()))
            dict(before["runs"])
        except OSError as error:
            raise DecompkError(f"{str(self.out)!r} cannot be used as a folder ({error.strerror}).") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DecompkError(
                f"{str(self.out / 'result.json')!r} is damaged: remove it or give another folder."
            ) from error
        if before.get("settings") != fresh["settings"]:
            raise DecompkError(f"{str(self.out)!r} holds a result of other settings: give another folder.")
        return before

    def all(self) -> Table:
        for seed in self.seeds:
            for variant in self.chosen:
                key = f"{variant.name} {seed}"
                if key not in self.known["runs"]:
                    found, net = self._one(variant, seed)
                    self.known["runs"][key] = found
                    if self.ranks.first:
                        write_atomically(self.out / f"{variant.slug}-seed{seed}.pt", dump(net.state_dict()))
                        self._write()
                        shutil.rmtree(self._state(variant.slug, seed), ignore_errors=True)
            if self.ranks.first:
                shutil.rmtree(self._state("whole", seed), ignore_errors=True)
            self.nets.pop(seed, None)
        self.known = self.ranks.from_rank(0, self.known)
        table = summary(self.known)
        if self.ranks.first:
            write_atomically(self.out / "summary.md", table.to_markdown().encode())
            self._draw_assignments()
        return table

    def _write(self) -> None:
        write_atomically(self.out / "result.json", json.dumps(self.known, indent=1).encode())

    def _state(self, slug: str, seed: int) -> Path:
        return self.out / "state" / f"{slug}-seed{seed}"

    # ---- one variant ------------------------------------------------------------------------------------------------

    def _one(self, variant: Variant, seed: int) -> tuple[dict[str, Any], nn.Module]:
        """What result.json says of one network, and the network, dense with zeros."""
        if variant.groups:
            return self._split(variant, seed)
        if not self.ranks.first:
            return {}, nn.Identity()
        return self._sparse(variant, seed) if variant.strength else self._dense(variant, seed)

    def _dense(self, variant: Variant, seed: int) -> tuple[dict[str, Any], nn.Module]:
        net = self._whole(seed)
        for phase in PHASES[1:]:
            self._phase(variant, seed, phase, _Plain(net, self.settings.lr))
        return {**self._cost(net, {}), "error": self._error(net)}, net

    def _sparse(self, variant: Variant, seed: int) -> tuple[dict[str, Any], nn.Module]:
        net, s = self._whole(seed), self.settings
        nodes = Nodes(net, self.data.input_size)
        sparsifier = Sparsifier(net, nodes, F.cross_entropy, variant.strength, s.epochs[1] * self._steps(), s.ssl_lr)
        self._phase(variant, seed, "learn", sparsifier)
        found = {"before": self._error(net)}
        left = without(net, nodes, sparsifier.filters.gone)
        found["split"] = self._error(left)
        self._phase(variant, seed, "tune", _Plain(left, s.lr))
        return {**found, **self._cost(left, {}), "error": self._error(left)}, left

    def _split(self, variant: Variant, seed: int) -> tuple[dict[str, Any], nn.Module]:
        s, kind = self.settings, "simplex" if variant.simplex else "softmax"
        net = self._whole(seed) if self.ranks.first else self._new(seed)
        nodes = Nodes(net, self.data.input_size)
        assignment = Assignment(nodes, variant.groups, variant.whole_inputs, kind, seed).to(self.ranks.device)
        found: dict[str, Any] = {}
        if self.ranks.first:
            if variant.random:
                self._phase(variant, seed, "learn", _Plain(net, s.lr))
                deal(assignment, seed)
            else:
                rate = s.simplex_lr if variant.simplex else s.assignment_lr
                freeze = s.freeze if variant.overlap else None
                learner = Learner(net, assignment, F.cross_entropy, s.gammas, s.lr, rate, freeze)
                history = _History(learner, max(1, s.epochs[1] * self._steps() // FRAMES))
                self._phase(variant, seed, "learn", history)
                found["settled"] = learner.settled or None
                self._keep(variant, seed, net, assignment, history)
            found |= {"before": self._error(net), "fuzzy": assignment.fuzzy()}
        for part in (net, assignment):
            part.load_state_dict(self.ranks.from_rank(0, part.state_dict()))
        result: Split = split(net, assignment, s.overlap if variant.overlap else None, variant.even)
        found["split"] = self._error(result.dense)
        fast = Parallel(result, self.ranks) if self.ranks.size > 1 else result.fast()
        self._phase(variant, seed, "tune", _Plain(fast, s.lr), together=True)
        found["error"] = self._error(fast)
        dense = fast.gathered() if isinstance(fast, Parallel) else result.dense
        return {**found, **self._cost(dense, result.masks)}, dense

    # ---- training ---------------------------------------------------------------------------------------------------

    def _new(self, seed: int) -> nn.Module:
        s, size = self.settings, self.data.input_size
        known = inspect.signature(models.spec(s.model).factory).parameters
        own: dict[str, Any] = {"input_size": size} if "input_size" in known else {}
        own |= {"width": s.width} if s.width else {}
        torch.manual_seed(seed)
        return models.build(s.model, num_classes=len(self.data.classes), **own).to(self.ranks.device)

    def _whole(self, seed: int) -> nn.Module:
        """A copy of the network that every variant of a seed begins with."""
        if seed not in self.nets:
            net = self._new(seed)
            self._phase(None, seed, "whole", _Plain(net, self.settings.lr))
            self.nets[seed] = net
        return copy.deepcopy(self.nets[seed])

    def _phase(self, variant: Variant | None, seed: int, phase: str, trainer: Any, together: bool = False) -> None:
        """Train by `trainer`, which has step, state_dict and load_state_dict, from behind the last epoch that is saved.

        together: all processes train, each its own part; otherwise the first alone is here.
        """
        number, slug = PHASES.index(phase), variant.slug if variant else "whole"
        identity = {**self.known["settings"], "variant": slug, "seed": seed, "phase": phase}
        ranks = self.ranks if together else Ranks(self.ranks.device)
        folder = self._state(slug, seed) / phase
        checkpoints = Checkpoints(folder, {**identity, "processes": ranks.size}, keep=1)
        saved = ranks.from_rank(0, checkpoints.latest()[0] if ranks.first else None)
        epochs, done = self.settings.epochs[number], 0
        torch.manual_seed(seed_of(seed, number, ranks.rank))  # dropout draws other numbers on other processes
        if saved is not None:
            done = saved["epoch"]
            trainer.load_state_dict(saved["trainers"][ranks.rank])
            _set_random(saved["random"][ranks.rank], ranks.device)
        what = f"seed {seed}, {variant.name if variant else 'whole network'}: {phase}"
        for epoch in bar(range(done, epochs), what, total=epochs, done=done) if ranks.first else range(done, epochs):
            for x, y in self._batches(seed + 1000 * number, epoch):
                trainer.step(x, y)
            trainers, random = ranks.from_all(trainer.state_dict()), ranks.from_all(_random(ranks.device))
            if ranks.first:
                checkpoints.save(epoch + 1, {"trainers": trainers, "epoch": epoch + 1, "random": random})

    def _order(self, seed: int, epoch: int) -> list[Tensor]:
        return epoch_order(len(self.data.train), self.settings.batch, seed, epoch)

    def _steps(self) -> int:
        """Of an epoch."""
        return len(self._order(0, 0))

    def _batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        change = Augment(flip=True, shift=0.125) if self.settings.augment else Augment()
        for i, (x, y) in enumerate(self.data.train.batches(self._order(seed, epoch), self.ranks.device)):
            whole = x.dtype == torch.uint8
            yield normalise(change(x, seed_of(seed, epoch, i)), self.data.mean, scale=whole), y

    def _error(self, net: nn.Module) -> float:
        return 100 - evaluate(net, self.data, self.ranks.device).accuracy[0]

    def _cost(self, net: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, float]:
        """Parameters, and FLOPs of one image at 2 per multiply-accumulate, without what `masks` leaves out; and `done`,
        the FLOPs that the block engine does, which skips whole blocks alone.
        """
        zeros = sum(int((~mask).sum()) for mask in masks.values())
        kept = {name.removesuffix(".weight"): mask.double().mean().item() for name, mask in masks.items()}
        found = {decision.path: decision.kept for decision in layer_by_layer(net, masks=masks).decisions}
        costs = layers(net, self.data.input_size)
        flops, done = (sum(2 * layer.macs * of.get(layer.name, 1) for layer in costs) for of in (kept, found))
        return {"params": sum(p.numel() for p in net.parameters()) - zeros, "flops": flops, "done": done}

    # ---- figures ----------------------------------------------------------------------------------------------------

    def _keep(self, variant: Variant, seed: int, net: nn.Module, assignment: Assignment, history: _History) -> None:
        """Of the first seed: what Figure 1 shows, for when all variants are there, and Figure 2 of the widest split."""
        if seed != self.seeds[0]:
            return
        write_atomically(self._history(variant), dump(history.frames()))
        most = max((v for v in self.chosen if v.learned), key=lambda v: (len(v.groups), -v.most))
        if variant is most:
            draw_weights(_sorted_weights(net, assignment), self.out / "weights.png")

    def _history(self, variant: Variant) -> Path:
        return self.out / "history" / f"{variant.slug}.pt"

    def _frames(self, variant: Variant) -> tuple[list[int], Tensor]:
        """What `_keep` kept of a variant."""
        try:
            steps, values = load(self._history(variant).read_bytes())
            return steps, values.float()
        except Exception as error:  # torch.load refuses what is damaged in many classes
            raise DecompkError(
                f"{str(self._history(variant))!r} is damaged: remove it to draw the others without it."
            ) from error

    def _draw_assignments(self) -> None:
        found = {}
        for variant in self.chosen:
            if variant.learned and self._history(variant).exists():
                steps, values = self._frames(variant)
                kind = "reduced gradient" if variant.simplex else "softmax"
                title = f"{variant.setting}, {kind}{', frozen' if variant.overlap else ''}"
                found[title] = steps, values.numpy()
        if found:
            draw_assignments(found, self.out / "assignments.png")


def _random(device: torch.device) -> list[Tensor]:
    """The states of torch's random numbers: the CPU's, and a GPU's where one trains."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


class _Plain:
    """Trains a network by Adam for the cross-entropy."""

    def __init__(self, net: nn.Module, lr: float):
        self.net, self.optimizer = net, torch.optim.Adam(net.parameters(), lr)
        net.train()

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(x), y).backward()
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


class _History:
    """A Learner, and all its assignments at every `every`-th step."""

    def __init__(self, learner: Learner, every: int):
        self.learner, self.every = learner, every
        self.steps: list[int] = []
        self.values: list[Tensor] = []
        learner.net.train()
        self._look()

    def _look(self) -> None:
        self.steps.append(self.learner.steps)
        self.values.append(torch.from_numpy(self.learner.assignment.values()).half())

    def step(self, x: Tensor, y: Tensor) -> None:
        self.learner.step(x, y)
        if self.learner.steps % self.every == 0:
            self._look()

    def frames(self) -> list[Any]:
        """The steps and, (T, n), the assignments then."""
        return [self.steps, torch.stack(self.values)]

    def state_dict(self) -> dict[str, Any]:
        return {"learner": self.learner.state_dict(), "steps": self.steps, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.steps, self.values = state["steps"], state["values"]


def deal(assignment: Assignment, seed: int) -> None:
    """Hard, random, even groups: of the nodes that share all their axes each group gets as many, or one more."""
    rng = np.random.default_rng(seed)
    for level, mine in assignment.sets():
        assignment.put(level, mine, rng.permutation(len(mine)) % level)


def _sorted_weights(
    net: nn.Module, assignment: Assignment
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Of the last four layers of a split: magnitudes as they are and sorted by group, and the sorted groups."""
    found: dict[str, Any] = {}
    members = assignment.members()
    for path in list(assignment.groups)[-4:]:
        sides, weight = assignment.nodes.sides(path), net.get_parameter(f"{path}.weight").detach()
        if sides.inputs is None:
            continue
        before = (weight.abs() if weight.dim() == 2 else weight.flatten(2).norm(dim=2)).cpu().numpy()
        groups = []
        for axis in (sides.outputs.of_each, sides.inputs.of_each):
            of_each = assignment.coarser(members[axis], assignment.level[axis], assignment.groups[path])
            groups.append(np.where(of_each.any(1), of_each.argmax(1), -1))
        rows, columns = (np.argsort(side, kind="stable") for side in groups)
        found[path] = before, before[rows][:, columns], groups[0][rows], groups[1][columns]
    return found
