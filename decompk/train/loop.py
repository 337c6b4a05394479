"""One phase of a training, from wherever its last checkpoint left it to its end."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import optim
from ..errors import DecompkError, UnsupportedOperation
from ..kernels.backend import backend
from ..packed.fuse import fuse
from ..packed.pack import Packed
from ..packed.schedule import settle
from .augment import normalise
from .checkpoint import Checkpoints
from .data import Dataset, epoch_order, seed_of
from .log import Log
from .ranks import Ranks, Replicas
from .recipe import PHASES, Phase, Recipe
from .schedule import Schedule
from .scores import evaluate
from .step import Step, Sums, autocast, means, prepared

TOGETHER = 20  # steps between two questions that all ranks must answer alike


class Interrupted(DecompkError):
    """A signal ended the training behind a checkpoint."""

    def __init__(self, sentence: str, signal_number: int):
        super().__init__(sentence)
        self.exit_code = 128 + signal_number


@dataclass
class Curve:
    """What a phase came to, epoch by epoch, a number per member: accuracies in %, losses in nats.

    `loss` and `train_accuracy` are of the training images as they were trained on, the others of the test images;
    `seconds` and `images` of training are added up; `once_seconds` went before it into compiling and measuring.
    """

    epoch: list[int] = field(default_factory=list)
    loss: list[list[float]] = field(default_factory=list)
    train_accuracy: list[list[float]] = field(default_factory=list)
    test_loss: list[list[float]] = field(default_factory=list)
    accuracy: list[list[float]] = field(default_factory=list)
    top5: list[list[float] | None] = field(default_factory=list)
    lr: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    once_seconds: list[float] = field(default_factory=list)

    def add(self, **values: Any) -> None:
        """One epoch more."""
        for name, value in values.items():
            getattr(self, name).append(value)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Fit:
    """Trains `net` by one Phase; `run` does it.

    members: the numbers of the members that `net` packs, or one number for a global network. shared: all ranks train
    the same network, each by its share of every batch; otherwise each trains its own by the whole of it.
    """

    def __init__(
        self,
        name: str,
        net: nn.Module,
        data: Dataset,
        recipe: Recipe,
        seed: int,
        ranks: Ranks,
        checkpoints: Checkpoints,
        log: Log,
        members: Sequence[int] = (0,),
        shared: bool = False,
    ):
        self.name, self.data, self.recipe, self.seed, self.ranks = name, data, recipe, seed, ranks
        self.phase: Phase = recipe.phase(name)
        self.checkpoints, self.log, self.members = checkpoints, log, tuple(members)
        self.shared = shared and ranks.size > 1
        sharded = self.shared and recipe.parallel == "fsdp"  # which wants its parameters contiguous
        layout = torch.contiguous_format if sharded else torch.channels_last
        net.to(ranks.device, memory_format=layout)  # type: ignore[call-overload]  # torch's stub takes one of them
        if isinstance(net, Packed) and recipe.fuse and not recipe.exact:  # exact: each layer as alone
            net = self._fused(net)
        self.replicas = Replicas(net, ranks if self.shared else Ranks(ranks.device), recipe.parallel)
        self.net = self.replicas.net
        graph = recipe.graph and ranks.device.type == "cuda" and not self.shared
        self.optimizer = _optimizer(self.phase, self.net, self.members, graph, fused=not sharded)
        self.step = Step(
            self.net,
            self.optimizer,
            **({"loss": _summed} if self.shared else {}),
            precision=recipe.precision,
            clip=self.phase.clip,
            compile=recipe.compile,
            graph=graph,
        )
        self.schedule = Schedule(self.phase, self.members)
        self.curve = Curve()
        self.epoch, self.batch, self.steps, self.seconds, self.images = 0, 0, 0, 0.0, 0
        self.once_seconds, self._settled = 0.0, False
        self._told: set[str] = set()

    def _fused(self, net: Packed) -> Packed:
        """`net` on the fused operators, with the same parameters, buffers and names; as it is where that cannot be."""
        try:
            return fuse(net)
        except UnsupportedOperation as error:
            self.log.say(f"{self.name}: not fused: {error}")
            return net

    def run(self) -> Curve:
        """Train what is left of the phase. Raises Interrupted behind a checkpoint, DecompkError on a NaN loss."""
        torch.manual_seed(seed_of(self.seed, PHASES.index(self.name), 0 if self.shared else self.members[0]))
        self._resume()
        total = self.phase.epochs * self._images_an_epoch()
        self.log.begin(f"seed {self.seed} {self.name}", total, self.images)
        self._last_save = self._last_read = self._mark = time.monotonic()
        exact = backend("loop") if self.recipe.exact else contextlib.nullcontext()
        with exact, _signals() as self._signal:
            while self.epoch < self.phase.epochs and len(self._stopped()) < len(self.members):
                self._one_epoch()
            self._save()
            if self.ranks.any([bool(self._signal)])[0] if self.shared else self._signal:
                self._interrupt()
        self.log.end()
        return self.curve

    def _one_epoch(self) -> None:
        order = self._order(self.epoch)
        rates = self.schedule.rates(self.epoch)
        _set_rates(self.optimizer, rates)
        self.net.train()
        if self.batch == 0:
            self.step.reset()
        self._mark = time.monotonic()
        images = self.data.train.batches([self._mine(rows) for rows in order[self.batch :]], self.ranks.device)
        with contextlib.closing(images):
            for rows, (x, y) in zip(order[self.batch :], images, strict=True):
                self._train_on(x, y, len(rows))
        sums = self._read()
        self._stop_clock()
        scores = evaluate(
            self.net,
            self.data,
            self.ranks.device,
            precision=self.recipe.precision,
            ranks=self.ranks if self.shared else None,
        )
        self.curve.add(epoch=self.epoch + 1, loss=sums.loss, train_accuracy=sums.accuracy, test_loss=scores.loss)
        self.curve.add(accuracy=scores.accuracy, top5=scores.top5, lr=rates, seconds=self.seconds, images=self.images)
        self.curve.add(once_seconds=self.once_seconds)
        self.epoch, self.batch = self.epoch + 1, 0
        for position in self.schedule.observe(scores.accuracy):
            if hasattr(self.optimizer, "stop"):
                self.optimizer.stop(position)
                self.log.say(f"member {self.members[position]} stops: no gain in {self.phase.patience} epochs.")
        last = {name: values[-1] for name, values in self.curve.as_dict().items()}
        self.log.write({**self._where(), **last, "seconds": round(self.seconds, 3)})
        self.log.tell(self.epoch, self.phase.epochs, sums.loss, scores.accuracy, self.epoch == self.phase.epochs)

    def _train_on(self, x: Tensor, y: Tensor, of: int) -> None:
        seed = seed_of(self.seed, PHASES.index(self.name), self.epoch, self.batch)
        share = self.ranks.share(of) if self.shared else range(of)
        whole = x.dtype == torch.uint8
        x = self.recipe.augment(x, seed, slice(share.start, share.stop), of)
        x = prepared(normalise(x, self.data.mean, scale=whole), self.recipe.precision)
        if not self._settled:
            self._settle(x)
        self.step(x, y, self.ranks.size / of if self.shared else 1.0)
        self.batch, self.steps, self.images = self.batch + 1, self.steps + 1, self.images + of
        self.log.advance(of)
        for what, reason in self.step.reasons.items():
            if what not in self._told:
                self._told.add(what)
                self.log.say(f"{self.name}: {reason}.")
        read, save, interrupted = self._due()
        if read:
            sums = self._read()
            self._last_read = time.monotonic()
            self.log.write({**self._where(), "loss": sums.loss, "train_accuracy": sums.accuracy})
            self.log.tell(self.epoch + 1, self.phase.epochs, sums.loss, sums.accuracy, False)
        every = self.recipe.save_steps
        if save or interrupted or (every and self.steps % every == 0):
            self._save()
        if interrupted:
            self._interrupt()

    def _settle(self, x: Tensor) -> None:
        """Before the first step: choose how a packed network runs on a CPU, which also compiles its kernels."""
        self._settled = True
        if not isinstance(self.net, Packed) or self.ranks.device.type != "cpu" or self.recipe.compile:
            return
        self._stop_clock()
        with autocast(self.ranks.device, self.recipe.precision):
            settle(self.net, x)
            with torch.no_grad():
                settle(self.net.eval(), x)
        self.net.train()
        now = time.monotonic()
        self.once_seconds += now - self._mark
        self._mark = now

    def _due(self) -> list[bool]:
        """Whether it is time to read the metrics, to save by the clock, and to stop; the same on ranks that share."""
        now, recipe = time.monotonic(), self.recipe
        save = bool(recipe.save_seconds) and now - self._last_save >= recipe.save_seconds
        flags = [now - self._last_read >= recipe.log_seconds, save, bool(self._signal)]
        if not self.shared:
            return flags
        return self.ranks.any(flags) if self.steps % TOGETHER == 0 else [False] * len(flags)

    def _interrupt(self) -> NoReturn:
        number = self._signal[0] if self._signal else signal.SIGTERM
        self.log.end()
        raise Interrupted(
            f"stopped by {signal.Signals(number).name} in the phase '{self.name}', a checkpoint is written: go on with "
            "--resume.",
            number,
        )

    def _save(self) -> None:
        """Write a checkpoint, of finite values only."""
        self._read()
        self._stop_clock()
        state: dict[str, Any] = {
            "model": self.replicas.state(),
            "optimizer": self.replicas.optimizer_state(self.optimizer),
            "schedule": self.schedule.state_dict(),
            "curve": self.curve.as_dict(),
            "sums": self._whole_sums(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.ranks.device) if self.ranks.device.type == "cuda" else None,
            "position": [self.epoch, self.batch, self.steps, self.images],
            "seconds": self.seconds,
            "once_seconds": self.once_seconds,
            "schedules": self.net.schedules if isinstance(self.net, Packed) else {},
            "log": self.log.position(),
        }
        bad = [n for n, t in state["model"].items() if t.is_floating_point() and not bool(t.isfinite().all())]
        if bad:
            raise DecompkError(f"'{bad[0]}' is no longer finite in the phase '{self.name}': {self._remedy()}")
        if not self.shared or self.ranks.first:
            self.checkpoints.save(self.steps, state)
        self._last_save = self._mark = time.monotonic()

    def _resume(self) -> None:
        state = None
        if not self.shared or self.ranks.first:
            state, refused = self.checkpoints.latest()
            for sentence in refused:
                self.log.say(f"checkpoint refused: {sentence} The one before it is used.")
        if self.shared:
            state = self.ranks.from_rank(0, state)
        if state is None:
            return
        self.replicas.load_state(state["model"])
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.replicas.load_optimizer_state(self.optimizer, state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # a captured graph reads it on the device; its value comes with the epoch
        self.schedule.load_state_dict(state["schedule"])
        self.curve = Curve(**state["curve"])
        if not self.shared or self.ranks.first:
            self.step.set_sums(state["sums"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.ranks.device)
        self.epoch, self.batch, self.steps, self.images = state["position"]
        self.seconds, self.once_seconds = state["seconds"], state["once_seconds"]
        if isinstance(self.net, Packed):
            self.net.schedules = state["schedules"]  # which decide how its sums are rounded
        self.log.rewind(state["log"])
        if self.epoch < self.phase.epochs:
            self.log.say(f"seed {self.seed}, {self.name}: going on in epoch {self.epoch + 1}, batch {self.batch + 1}.")

    def _read(self) -> Sums:
        """The epoch's sums so far, over all ranks that share the network; refuses a loss that is not finite."""
        sums = means(self._whole_sums())
        for member, loss in zip(self.members, sums.loss, strict=False):
            if not abs(loss) < float("inf"):
                who = f"member {member}" if len(self.members) > 1 else "the network"
                raise DecompkError(
                    f"the loss of {who} became {loss} in epoch {self.epoch + 1} of the phase '{self.name}': "
                    f"{self._remedy()}"
                )
        return sums

    def _whole_sums(self) -> Tensor:
        """The step's sums (4, members), over all ranks that share the network; a new tensor."""
        own = self.step.sums()
        if own is None:
            own = torch.zeros(4, len(self.members), dtype=torch.float64, device=self.ranks.device)
        return self.ranks.sum(own.clone()) if self.shared else own.clone()

    def _remedy(self) -> str:
        return "lower its lr or set clip; the last checkpoint is whole."

    def _stop_clock(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._mark
        self._mark = now

    def _order(self, epoch: int) -> list[Tensor]:
        return epoch_order(len(self.data.train), self.recipe.batch, self.seed, epoch, self.recipe.iterations or None)

    def _images_an_epoch(self) -> int:
        return sum(map(len, self._order(0)))

    def _mine(self, rows: Tensor) -> Tensor:
        if not self.shared:
            return rows
        share = self.ranks.share(len(rows))
        return rows[share.start : share.stop]

    def _stopped(self) -> tuple[int, ...]:
        return getattr(self.optimizer, "stopped", ())

    def _where(self) -> dict[str, Any]:
        return {"seed": self.seed, "phase": self.name, "step": self.steps, "time": round(time.time(), 3)}


def _optimizer(phase: Phase, net: nn.Module, members: Sequence[int], graph: bool, fused: bool) -> torch.optim.Optimizer:
    lr = [phase.of_member("lr", m) for m in members]
    decay = [phase.of_member("weight_decay", m) for m in members]
    own: dict[str, Any] = {"momentum": phase.momentum} if phase.optimizer == "sgd" else {}
    if hasattr(net, "K"):
        kind: Any = {"sgd": optim.SGD, "adam": optim.Adam, "adamw": optim.AdamW}[phase.optimizer]
        return kind(net, lr=lr, weight_decay=decay, capturable=graph, **own)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[phase.optimizer]
    device = next(net.parameters()).device
    rate = torch.tensor(lr[0], device=device) if graph else lr[0]
    capturable: dict[str, Any] = {"capturable": graph} if phase.optimizer != "sgd" else {}
    return kind(net.parameters(), lr=rate, weight_decay=decay[0], fused=fused, **capturable, **own)


def _set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _summed(logits: Tensor, target: Tensor) -> Tensor:
    """Σ over a rank's share of a batch, which may be empty; the step's weight makes it a mean over the whole batch."""
    return nn.functional.cross_entropy(logits, target, reduction="sum")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and the first SIGINT instead of dying of them; a second Ctrl-C interrupts at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
