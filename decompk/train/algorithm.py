"""Algorithm 1: members → compose → global training, and the same budget from random weights beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..cost.figures import total
from ..cost.walk import layers
from ..divide.decompose import Decomposition, decompose
from ..errors import CheckpointError, DecompkError
from ..kernels.cache import processor
from ..packed.pack import Packed, pack
from ..theory import theorem_2_2
from .augment import normalise
from .checkpoint import Checkpoints, dump, read, write, write_atomically
from .data import Dataset, open_data, seed_of, test_order
from .figures import draw_all
from .log import Log
from .loop import Curve, Fit
from .ranks import Ranks
from .recipe import Recipe
from .scores import evaluate
from .step import prepared
from .summary import summary, tables

TIMES_FORWARD = 3  # a training step costs about three forward passes
PICTURED = 64  # test images that the pictures choose from


def train(
    recipe: Recipe,
    data: str,
    out: Path,
    *,
    resume: bool = False,
    ranks: Ranks | None = None,
    workers: int = 0,
    tensorboard: bool = False,
    report: bool = True,
    command: str = "decompk.train.train",
) -> dict[str, Any]:
    """Train by `recipe` on what `open_data(data)` gives, once a seed; everything it makes lies in the folder `out`.

    Writes result.json (which it returns), summary.md, accuracy.png, times.png, features.png, cam.png, metrics.jsonl,
    run.json, and for each seed the weights as plain state_dicts: members.pt (stacks of K), composed.pt, global.pt,
    random.pt. Without `report` the summary and the pictures are left out. With `resume` it goes on where the run in
    `out` was killed, to the same bits on a CPU. Raises DecompkError: `out` holds another run, the data or the disk
    fail, a loss is no longer finite.
    """
    ranks = ranks or Ranks(torch.device("cpu"))
    dataset = open_data(data, recipe.size, workers)
    _claim(out, recipe, data, dataset, resume, ranks)
    log = Log(out, ranks.rank, tensorboard)
    try:
        runs = []
        for seed in recipe.seeds:
            one = _Run(recipe, dataset, seed, out / f"seed{seed}", ranks, log)
            runs.append(one.run())
        result = _result(recipe, dataset, one.decomposition, runs, ranks, command)
        if ranks.first:
            result["theorem_2_2"] = _theorem(one, dataset, log)
            write_atomically(out / "result.json", json.dumps(result, indent=1).encode())
        if ranks.first and report:
            _report(result, one, dataset, out, log)
    finally:
        log.close()
    return result


class _Run:
    """Algorithm 1 for one seed."""

    def __init__(self, recipe: Recipe, data: Dataset, seed: int, folder: Path, ranks: Ranks, log: Log):
        self.recipe, self.data, self.seed, self.folder, self.ranks, self.log = recipe, data, seed, folder, ranks, log
        self.model = build_model(recipe, data, seed)
        self.decomposition = decompose(self.model, data.input_size, recipe.partitions, recipe.crop, recipe.margin)
        self.K = self.decomposition.K
        for name in ("lr", "weight_decay"):
            values = getattr(recipe.members, name)
            if isinstance(values, tuple) and len(values) != self.K:
                raise DecompkError(f"the recipe's members.{name} has {len(values)} values for {self.K} members.")

    def run(self) -> dict[str, Any]:
        """What result.json says of this seed."""
        packed, members = self._members()
        self.packed = packed
        self.composed = packed.compose()
        self._export("composed", self.composed)
        self.composed.to(self.ranks.device)
        scores = evaluate(
            self.composed, self.data, self.ranks.device, precision=self.recipe.precision, ranks=self.ranks
        )
        composed = {
            "accuracy": scores.accuracy[0],
            "top5": scores.top5 and scores.top5[0],
            "loss": scores.loss[0],
        }
        self.log.say(f"seed {self.seed} composed, not trained further: accuracy {composed['accuracy']:.1f} %")
        self.trained, tuned = self._global("global", packed.compose())
        result = {"seed": self.seed, "members": members, "composed": composed, "global": tuned, "random": None}
        if self.recipe.random is not None:
            result["random"] = self._global("random", build_model(self.recipe, self.data, self.seed))[1]
        return result

    def _members(self) -> tuple[Packed, dict[str, Any]]:
        """All members trained, on every rank; each rank trains its own."""
        d, K, ranks = self.decomposition, self.K, self.ranks
        fresh = d.subnets([seed_of(self.seed, k) for k in range(K)])
        whole = pack(fresh, d.crops)
        whole.decomposition = d
        if (done := self._done("members")) is not None:
            whole.load_state_dict(done["model"])
            return whole, done["curve"]
        mine = ranks.share(K)
        states: list[dict[str, torch.Tensor]] = []
        curves: list[Any] = []
        own: Any = None
        if mine:
            net = pack(fresh[mine.start : mine.stop], d.crops[mine.start : mine.stop])
            part = f"members-{ranks.rank + 1}-of-{ranks.size}" if ranks.size > 1 else "members"
            run = {"members": list(mine), "ranks": ranks.size}
            self._check_parts(part)
            fit = self._fit("members", net, part, run, members=mine)
            own = [fit.run().as_dict(), {name: t.cpu() for name, t in net.state_dict().items()}]
        for found in ranks.from_all(own):
            if found is not None:
                curves.append(found[0])
                states.append(found[1])
        whole.load_state_dict({name: torch.cat([state[name] for state in states]) for name in states[0]})
        curve = joined(curves)
        self._finish("members", whole, curve)
        return whole, curve

    def _global(self, name: str, net: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The global network trained by all ranks together; on every rank."""
        if (done := self._done(name)) is not None:
            net.load_state_dict(done["model"])
            return net, done["curve"]
        template = net.state_dict()
        fit = self._fit(name, net, name, {"ranks": self.ranks.size, "parallel": self.recipe.parallel}, shared=True)
        curve = fit.run().as_dict()
        state = fit.replicas.state()
        trained = build_model(self.recipe, self.data, self.seed) if name == "random" else self.packed.compose()
        trained.load_state_dict({key: state[key].cpu() for key in template})
        self._finish(name, trained, curve)
        return trained, curve

    def _fit(self, name: str, net: nn.Module, folder: str, run: dict[str, Any], **options: Any) -> Fit:
        checkpoints = Checkpoints(self.folder / folder, {**self._identity(name), **run})
        return Fit(name, net, self.data, self.recipe, self.seed, self.ranks, checkpoints, self.log, **options)

    def _identity(self, phase: str) -> dict[str, Any]:
        tensors = [(name, tuple(tensor.shape)) for name, tensor in self.model.state_dict().items()]
        network = hashlib.sha256(repr(tensors).encode()).hexdigest()[:16]  # the code of a user's own may have changed
        return {**identity(self.recipe, self.data), "network": network, "seed": self.seed, "phase": phase}

    def _check_parts(self, part: str) -> None:
        """Refuse to start the members anew where another number of processes has begun them."""
        others = [path.name for path in self.folder.glob("members*") if path.is_dir()]
        if others and part.rpartition("-")[2] not in {name.rpartition("-")[2] for name in others}:
            count = others[0].rpartition("-")[2]
            processes = "one process" if count == "members" else f"{count} processes"
            raise CheckpointError(f"the members in {self.folder} were begun by {processes}: go on with as many.")

    def _done(self, name: str) -> dict[str, Any] | None:
        """What `_finish` kept, on every rank; None where the phase has not ended yet."""
        path, state = self.folder / f"{name}.ckpt", None
        if self.ranks.first and path.exists():
            try:
                state = read(path, self._identity(name))
            except CheckpointError as error:
                self.log.say(f"checkpoint refused: {error} The phase's own checkpoints are used.")
        if state is not None:
            self.log.say(f"seed {self.seed} {name}: trained before.")
        return self.ranks.from_rank(0, state)

    def _finish(self, name: str, net: nn.Module, curve: dict[str, Any]) -> None:
        self._export(name, net)  # first: a run that goes on takes the other for a sign that this has been done
        if self.ranks.first:
            write(self.folder / f"{name}.ckpt", {"model": net.state_dict(), "curve": curve}, self._identity(name))

    def _export(self, name: str, net: nn.Module) -> None:
        """The weights as users load them: torch.load(path, weights_only=True) gives the state_dict."""
        if self.ranks.first:
            state = {key: value.cpu() for key, value in net.state_dict().items()}
            write_atomically(self.folder / f"{name}.pt", dump(state))


def build_model(recipe: Recipe, data: Dataset, seed: int) -> nn.Module:
    """The recipe's network for this data, freshly drawn from `seed`; torch's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed))
        fitting: dict[str, Any] = {}
        if ":" not in recipe.model:
            known = inspect.signature(models.spec(recipe.model).factory).parameters
            fitting = {"num_classes": len(data.classes), "input_size": data.input_size}
            fitting = {key: value for key, value in fitting.items() if key in known}
        model = models.build(recipe.model, **fitting)
        return model.double() if recipe.precision == "float64" else model


def identity(recipe: Recipe, data: Dataset) -> dict[str, Any]:
    """What a run is known by: all of its recipe that its weights depend on, flat, and the data's fingerprint."""
    free = ("save_seconds", "save_steps", "log_seconds", "seeds", "fuse", "compile", "graph", "parallel")
    flat: dict[str, Any] = {"data": data.name, "fingerprint": data.fingerprint}
    for key, value in recipe.as_dict().items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": v for inner, v in value.items()}
        elif key not in free:
            flat[key] = value
    return flat


def joined(curves: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One curve of all members from each rank's: the slowest rank's time; who stopped early keeps the last values."""
    longest = max(curves, key=lambda curve: len(curve["epoch"]))
    epochs = range(len(longest["epoch"]))
    whole = Curve(epoch=longest["epoch"], images=longest["images"]).as_dict()
    for name in ("loss", "train_accuracy", "test_loss", "accuracy", "top5", "lr"):
        for i in epochs:
            rows = [curve[name][min(i, len(curve[name]) - 1)] for curve in curves]
            whole[name].append(None if rows[0] is None else [value for row in rows for value in row])
    for name in ("seconds", "once_seconds"):
        whole[name] = [max(c[name][min(i, len(c[name]) - 1)] for c in curves) for i in epochs]
    return whole


def _claim(out: Path, recipe: Recipe, source: str, data: Dataset, resume: bool, ranks: Ranks) -> None:
    """Make `out` this run's, or check that it is. Raises DecompkError, CheckpointError."""
    path = out / "run.json"
    ours = json.loads(json.dumps(identity(recipe, data)))
    error = ""
    if ranks.first:
        try:
            error = _why_not(out, path, ours, resume)
            if not error:
                content = {"data": source, "recipe": recipe.as_dict(), "identity": ours}
                write_atomically(path, json.dumps(content, indent=1).encode())
        except DecompkError as raised:
            error = str(raised)
    error = ranks.from_rank(0, error)
    if error:
        raise CheckpointError(error)


def _why_not(out: Path, path: Path, ours: dict[str, Any], resume: bool) -> str:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"the folder {out} cannot be made ({error.strerror}); name another with --out."
    if not path.exists() or not any(out.glob("seed*/*")):  # nothing is trained yet
        return ""
    if not resume:
        return f"{out} holds a training already: go on with --resume, or name another folder with --out."
    theirs = begun(out)["identity"]
    other = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    if other:
        key = other[0]
        return (
            f"{out} holds another training: its {key} is {theirs.get(key)}, here it is {ours.get(key)}; resume with "
            "its own settings, or name another folder with --out."
        )
    return ""


def begun(out: Path) -> dict[str, Any]:
    """What run.json in `out` says: "data", "recipe" and "identity". Raises CheckpointError where it is damaged."""
    try:
        found = json.loads((out / "run.json").read_text())
        if [type(found[key]) for key in ("data", "recipe", "identity")] != [str, dict, dict]:
            raise TypeError("values of other types")
        return {key: found[key] for key in ("data", "recipe", "identity")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{out / 'run.json'} cannot be read; nothing there says what to resume.") from error


def _result(
    recipe: Recipe, data: Dataset, d: Decomposition, runs: list[dict[str, Any]], ranks: Ranks, command: str
) -> dict[str, Any]:
    forward = {
        "members": d.K * total(layers(d.subnets(0)[0], d.member_size)).flops(),
        "global": total(layers(d.model, data.input_size)).flops(),
    }
    forward["random"] = forward["global"]
    phases = [name for name in ("members", "global", "random") if recipe.phase(name) is not None]
    flops = {n: TIMES_FORWARD * forward[n] * runs[0][n]["images"][-1] for n in phases if runs[0][n]["images"]}
    return {
        "title": f"{data.name}, {recipe.model}",
        "data": {
            "name": data.name,
            "train": len(data.train),
            "test": len(data.test),
            "classes": len(data.classes),
            "input_size": list(data.input_size),
        },
        "model": recipe.model,
        "K": d.K,
        "crops": [[*crop.start, *crop.size] for crop in d.crops],
        "batch": recipe.batch,
        "epochs": {name: recipe.phase(name).epochs for name in phases},
        "flops": flops,
        "recipe": recipe.as_dict(),
        "made_with": {
            "command": command,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": _device_name(ranks),
            "precision": recipe.precision,
        },
        "runs": runs,
    }


def _device_name(ranks: Ranks) -> str:
    if ranks.device.type == "cuda":
        name = torch.cuda.get_device_name(ranks.device)
    else:
        name = f"{torch.get_num_threads()} threads of {processor()[0]}"
    return name if ranks.size == 1 else f"{ranks.size} processes, each on {name}"


@torch.no_grad()
def _theorem(last: _Run, data: Dataset, log: Log) -> dict[str, Any] | None:
    """Theorem 2.2 on test images, where the composed network is the sum of its members on whole images."""
    if last.K == 1 or last.decomposition.adapted or last.decomposition.notes:
        return None
    members, composed = last.packed.cpu().eval().unpack(), last.composed.cpu().eval()
    logits, sums, labels = [], [], []
    for x, y in data.test.batches(test_order(len(data.test), 256)[:4], torch.device("cpu")):
        x = prepared(normalise(x, data.mean), last.recipe.precision)
        logits.append(torch.stack([member(x) for member in members]).double())
        sums.append(composed(x).double())
        labels.append(y.cpu())
    found = theorem_2_2(torch.cat(logits, 1), torch.cat(labels), torch.cat(sums))
    log.say(
        f"Theorem 2.2, members on whole images: {found.all_right} of {sum(map(len, labels))} test images are right for "
        f"all members, {found.lost} of them wrong when composed; composed loss {found.loss:.1f}, bound (2.19) "
        f"{found.bound:.1f}."
    )
    return dataclasses.asdict(found)


def _report(result: dict[str, Any], last: _Run, data: Dataset, out: Path, log: Log) -> None:
    rows = torch.linspace(0, len(data.test) - 1, min(PICTURED, len(data.test))).long()
    images, labels = next(iter(data.test.batches([rows], torch.device("cpu"))))
    images = normalise(images, data.mean)
    nets = [member.eval() for member in last.packed.cpu().unpack()]
    pictures = draw_all(
        result,
        last.decomposition,
        nets,
        last.composed.cpu().eval(),
        last.trained.cpu().eval(),
        images,
        labels,
        data.classes,
        out,
        data.mean,
    )
    write_atomically(out / "summary.md", summary(result, pictures).encode())
    for table in tables(result):
        log.say(table.to_text())
    log.say(f"Written to {out}: summary.md, result.json, {', '.join(pictures)}.")


__all__ = ["begun", "build_model", "identity", "joined", "train"]
