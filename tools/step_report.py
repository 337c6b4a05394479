"""What one training step of K packed members launches and moves: counted on any machine, measured beside it on a GPU.

python tools/step_report.py --model resnet50 --partitions 4 --crop 140 --fused [--every] [--format json]
python tools/step_report.py --table [--before FILE]

Without a GPU the step takes the GPU's way on CPU tensors, its launches noted and not made. Times called "model" are
2.5 µs a launch, as in a captured graph, and bytes at 2.8 TB/s, at 4.5 TB/s where a launch moves less than 25 MB: they
are not measured. PYTHONPATH may name another checkout, whose step is then reported.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(ROOT), str(ROOT / "tools")]

import torch

if not torch.cuda.is_available():
    os.environ |= {"TRITON_INTERPRET": "1", "DECOMPK_MEASURE": "0"}  # the first is read when a kernel is first used

import steps
from arguments import between
from launched import MEMORY, Row, rows_of
from layers import BATCH, CASES, Case, costs
from timing import Timer

import decompk
import decompk.optim
from decompk.errors import DecompkError
from decompk.kernels.launch import recording
from decompk.train.step import EAGER_STEPS, Step

PRECISIONS = {"bf16": 2, "float32": 4}  # bytes an element
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(decompk.optim.SGD, lr=0.1, momentum=0.9, capturable=True),
    "adam": partial(decompk.optim.Adam, lr=1e-3, capturable=True),
}
STATES = {"sgd": 1, "adam": 2}  # tensors beside each parameter
HOST_BATCH, HOST_RUNS = 2, 10
TABLE = tuple(case for case in CASES if case != Case("resnet32", 4, 20))


@dataclass(frozen=True)
class Setting:
    """Of which step is reported."""

    case: Case
    batch: int = BATCH
    dtype: str = "bf16"
    fused: bool = False
    optimizer: str = "sgd"

    @property
    def title(self) -> str:
        return f"{self.case.title}, {'fused' if self.fused else 'packed'}, {self.batch} images, {self.dtype}"


# ---- what a step has to move ----------------------------------------------------------------------------------------

COUNTED = ("conv", "conv_transpose", "linear", "matmul", "add", "pool", "cat")


def ideal_bytes(setting: Setting) -> int:
    """Compulsory bytes of forward and backward, of K members, each tensor once an operation that has to touch it.

    Counted are all three passes of a convolution (no dgrad where it reads the image), and adds, pools and linears,
    forward and backward, all in the step's dtype. Batch norms and activations add nothing: they can ride along with
    the convolution before or behind them. The optimizer is apart: `optimizer_bytes`.
    """
    size, batch = PRECISIONS[setting.dtype], setting.batch
    found = [one for one in costs(setting.case) if one.kind in COUNTED]
    return setting.case.K * sum(one.forward_bytes(size, batch) + one.backward_bytes(size, batch) for one in found)


def optimizer_bytes(net: torch.nn.Module, optimizer: str) -> int:
    """A gradient is read; its parameter and each state of it are read and written."""
    return sum((1 + 2 * (1 + STATES[optimizer])) * p.numel() * p.element_size() for p in net.parameters())


# ---- the step -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def gpus_way(device: torch.device) -> Iterator[None]:
    """Operations and optimizers as on a GPU, wherever the tensors are."""
    if device.type == "cuda":
        yield
        return
    vector, decompk.optim.VECTOR = decompk.optim.VECTOR, 1  # torch's fused loops on a CPU want members cut
    try:
        with decompk.backend("triton"):
            yield
    finally:
        decompk.optim.VECTOR = vector


class Subject:
    """The members of a setting, packed, and the step that trains them."""

    def __init__(self, setting: Setting, device: torch.device):
        self.setting, self.device = setting, device
        torch.manual_seed(0)
        d = setting.case.decomposition()
        self.input_size = d.input_size
        net = decompk.pack(d.subnets(seed=0), crops=d.crops, rehearse=False).to(device).train()
        self.net = decompk.fuse(net) if setting.fused else net
        self.optimizer = OPTIMIZERS[setting.optimizer](self.net)
        self.step = self.trained_by()

    def trained_by(self, graph: bool = False) -> Step:
        return Step(self.net, self.optimizer, precision=self.setting.dtype, graph=graph)

    def images(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(batch, *self.input_size, device=self.device).contiguous(memory_format=torch.channels_last)
        return x, torch.zeros(batch, dtype=torch.long, device=self.device)

    def rows(self) -> list[Row]:
        """What the second step launches; the first makes the optimizer's state, and on a GPU runs."""
        once = partial(self.step, *self.images(self.setting.batch))
        if self.device.type == "cuda":
            once()
        else:
            rows_of(once)
        return rows_of(once)

    def host_ms(self) -> float:
        """The host's part of a step: the least of ten of 2 images, on one thread, their kernels not launched.

        The host's work does not depend on the batch. The time of torch's own operators at that batch is in it. CPU
        time of the thread, which others that use the machine do not lengthen.
        """
        once, threads = partial(self.step, *self.images(HOST_BATCH)), torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with recording(_Forgetful()):
                return 1e3 * min(_thread_seconds(once) for _ in range(1 + HOST_RUNS))
        finally:
            torch.set_num_threads(threads)

    def measured(self) -> dict[str, Any]:
        """Of real steps on the GPU: what CUPTI sees of one, the host's time, and milliseconds eager and as a graph."""
        once = partial(self.step, *self.images(self.setting.batch))
        once()
        seen = {"device": torch.cuda.get_device_name(self.device), **steps.launches(once)}
        seen["host_ms"] = steps.host_ms(once, self.device, HOST_RUNS)
        captured = self.trained_by(graph=True)
        replay = partial(captured, *self.images(self.setting.batch))
        for _ in range(EAGER_STEPS + 1):
            replay()
        calls: dict[str, Callable[[], Any]] = {"eager": once}
        if not captured.reasons:
            calls["graph"] = replay
        times = Timer(self.device)(calls, cold=False, seconds=1.0, runs=200, least=20)
        return {**seen, **{f"{name}_ms": found.ms for name, found in times.items()}, "not_done": captured.reasons}


def _thread_seconds(run: Callable[[], Any]) -> float:
    began = time.thread_time()
    run()
    return time.thread_time() - began


class _Forgetful(contextlib.nullcontext[None]):
    """For `recording`: launches are not kept, as none is in a step that runs; a gradient that is kept is copied."""

    class _Nowhere(list[Any]):
        def append(self, one: Any) -> None:
            pass

    def __init__(self) -> None:
        super().__init__()
        self.launches = self._Nowhere()


# ---- the report -----------------------------------------------------------------------------------------------------


def report(setting: Setting, every: bool = False) -> dict[str, Any]:
    """All that is said of a step, as JSON has it. Raises DecompkError for a network that is not known or not so cut."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with gpus_way(device):
        subject = Subject(setting, device)
        rows = subject.rows()
        measured = subject.measured() if device.type == "cuda" else None
        host = measured["host_ms"] if measured else subject.host_ms()
    ideal = ideal_bytes(setting)
    largest = sorted(grouped(rows, lambda r: (r.name, r.tensors)), key=lambda r: -r["model_ms"])[:10]
    return {
        "title": setting.title,
        **asdict(setting),
        "commit": commit(),
        "torch": torch.__version__,
        "launches": sum(r.launches for r in rows),
        "bytes": sum(r.bytes for r in rows),
        "ideal_bytes": ideal,
        "optimizer_bytes": optimizer_bytes(subject.net, setting.optimizer),
        "host_ms": host,
        "model_ms": sum(r.ms for r in rows),
        "ideal_ms": ideal / MEMORY,
        "rows": sorted(grouped(rows, lambda r: (r.name,)), key=lambda r: -r["model_ms"]),
        "largest": largest,
        **({"every": [{**asdict(r), "model_ms": r.ms, "tensors": said(r.tensors)} for r in rows]} if every else {}),
        "measured": measured,
    }


def grouped(rows: Iterable[Row], key: Callable[[Row], tuple]) -> list[dict[str, Any]]:
    """Rows of one key as one: what of it is launched and moved, and modelled milliseconds."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        tensors = said(row.tensors)
        first = {"name": row.name, "launches": 0, "bytes": 0, "model_ms": 0.0, "tensors": tensors}
        one = found.setdefault(key(row), first)
        one["launches"] += row.launches
        one["bytes"] += row.bytes
        one["model_ms"] += row.ms
        if one["tensors"] != tensors:
            one["tensors"] = ""  # of several shapes
    return list(found.values())


def said(tensors: Sequence[str]) -> str:
    """Each once where several alike stand side by side."""
    alike = [(name, len(list(group))) for name, group in itertools.groupby(tensors)]
    return ", ".join(f"{count} of {name}" if count > 1 else name for name, count in alike)


def commit() -> str:
    """The last that changed the decompk that runs; with a "+" where its files are not as they were committed."""
    git = ["git", "-C", str(Path(decompk.__file__).parent)]
    last, changed = (
        subprocess.run([*git, *command, "."], capture_output=True, text=True).stdout.strip()
        for command in (("log", "-1", "--format=%h", "--abbrev=12", "--"), ("status", "--porcelain"))
    )
    return (last or "unknown") + ("+" if changed else "")


LINE = "{:<38} {:>8} {:>10} {:>9}  {}"


def lines_of(rows: Iterable[dict[str, Any]], tensors: bool = True) -> Iterator[str]:
    yield LINE.format("", "launches", "MB", "model ms", "").rstrip()
    for r in rows:
        size, ms = f"{r['bytes'] / 1e6:,.2f}", f"{r['model_ms']:.4f}"
        yield LINE.format(r["name"][:38], r["launches"], size, ms, r["tensors"] if tensors else "").rstrip()


def text(found: dict[str, Any]) -> str:
    """A report as it is read."""
    gb = {name: found[name] / 1e9 for name in ("bytes", "ideal_bytes", "optimizer_bytes")}
    lines = [f"{found['title']}, {found['optimizer']}; decompk {found['commit']}, torch {found['torch']}", ""]
    if "every" in found:
        lines += ["every launch, in order", *lines_of(found["every"]), ""]
    lines += ["launches by name", *lines_of(found["rows"], tensors=False), ""]
    lines += ["the ten largest costs", *lines_of(found["largest"]), ""]
    lines += [
        f"launches  {found['launches']}",
        f"bytes     {gb['bytes']:.3f} GB, {found['bytes'] / found['ideal_bytes']:.2f} times the compulsory "
        f"{gb['ideal_bytes']:.3f} GB; an optimizer's {gb['optimizer_bytes']:.3f} GB come on top of those",
        f"model     {found['model_ms']:.3f} ms, {found['ideal_ms']:.3f} ms for compulsory bytes alone; not measured",
    ]
    if not found["measured"]:
        host = f"CPU time of {HOST_RUNS} steps of {HOST_BATCH} images on one thread, torch's operators in it"
        return "\n".join([*lines, f"host      {found['host_ms']:.2f} ms, the least {host}"])
    m = found["measured"]
    lines += ["", f"measured on {m['device']}"]
    lines += [f"launches  {m['launches']}: {m['kernels']} kernels, {m['copies']} copies, {m['fills']} fills"]
    lines += [f"busy      {m['busy_ms']:.3f} ms of one eager step", f"host      {m['host_ms']:.2f} ms, median"]
    lines += [f"{name:<9} {m[f'{name}_ms']:.3f} ms a step" for name in ("eager", "graph") if f"{name}_ms" in m]
    lines += list(m["not_done"].values())
    lines += [f"  {count:>5} {ms:>9.4f} ms  {name}" for name, count, ms in m["top"]]
    return "\n".join(lines)


# ---- the table ------------------------------------------------------------------------------------------------------

SAID = ("title", "launches", "bytes", "ideal_bytes", "optimizer_bytes", "host_ms", "model_ms", "ideal_ms", "measured")
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "launches": lambda r: f"{r['launches']}",
    "GB": lambda r: f"{r['bytes'] / 1e9:.2f}",
    "÷ ideal": lambda r: f"{r['bytes'] / r['ideal_bytes']:.2f}",
    "model ms": lambda r: f"{r['model_ms']:.2f}",
    "host ms": lambda r: f"{r['host_ms']:.1f}",
}


def table() -> dict[str, Any]:
    """Reports of the papers' networks, packed and fused."""
    settings = [Setting(case, fused=fused) for case in TABLE for fused in (False, True)]
    found = [{name: value for name, value in report(one).items() if name in SAID} for one in settings]
    return {"commit": commit(), "torch": torch.__version__, "steps": found}


def earlier(path: Path) -> dict[str, Any]:
    """A table as `--table --format json` wrote it. Raises DecompkError for any other file."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise DecompkError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        found = None
    try:
        if all(r.keys() >= {*SAID} for r in found["steps"]) and found["commit"]:
            return found
    except (KeyError, TypeError, AttributeError):
        pass
    raise DecompkError(f"{path} is no table of steps; write one by --table --format json.")


def markdown(now: dict[str, Any], before: dict[str, Any] | None) -> str:
    """The table as a page; what was before stands before an arrow."""
    was = {r["title"]: r for r in before["steps"]} if before else {}
    of = f"commit {before['commit']} → {now['commit']}" if before else f"commit {now['commit']}"
    command = "python tools/step_report.py --table" + (" --before …" if before else "")
    lines = [
        "# What a training step launches and moves",
        "",
        f"Written by `{command}`, {of}, torch {now['torch']}: one step with `decompk.optim.SGD`, momentum, bf16.",
        "Launches and bytes are counted: without a GPU, its way of everything is taken on CPU tensors. Ideal are the",
        "compulsory bytes of convolutions, linears, adds and pools, forward and backward, each tensor once; what the",
        "optimizer moves is not in them. Model: 2.5 µs a launch in a captured graph, bytes at 2.8 TB/s, or at 4.5 TB/s",
        "where a launch moves less than 25 MB; not measured. Host: the least of ten steps of 2 images on one thread,",
        "kernels not launched; without a GPU that thread's CPU time, torch's own operators on the CPU in it.",
        "",
        f"| step | {' | '.join(COLUMNS)} | ideal GB | ideal ms |",
        f"| --- |{' ---: |' * (len(COLUMNS) + 2)}",
    ]
    for r in now["steps"]:
        old = was.get(r["title"])
        cells = [f"{show(old)} → {show(r)}" if old else show(r) for show in COLUMNS.values()]
        cells += [f"{r['ideal_bytes'] / 1e9:.2f}", f"{r['ideal_ms']:.2f}"]
        lines.append(f"| {r['title']} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- the command ----------------------------------------------------------------------------------------------------


def partitions(text: str) -> int | tuple[int, int]:
    """A type for argparse: K, or rows,columns."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of partitions nor rows,columns, as 2,4")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a registered network, as resnet50, or your own as module:callable")
    parser.add_argument("--partitions", type=partitions, help="K, or rows,columns")
    parser.add_argument("--crop", type=between(int, 1), help="side of a member's crop")
    parser.add_argument(
        "--image", type=between(int, 1), default=224, help="side of a network of your own's images; 224"
    )
    parser.add_argument("--batch", type=between(int, 1), default=BATCH, help=f"images; {BATCH} by default")
    parser.add_argument("--dtype", choices=PRECISIONS, default="bf16", help="of the forward pass; bf16 by default")
    parser.add_argument("--fused", action="store_true", help="of the network that decompk.fuse makes")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="of decompk.optim; sgd by default")
    parser.add_argument("--every", action="store_true", help="every launch, too, in order and with its tensors")
    parser.add_argument("--table", action="store_true", help="of the papers' networks, packed and fused, as Markdown")
    parser.add_argument("--before", type=Path, help="what --table --format json said of another commit")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="to be read, by default, or JSON")
    given = parser.parse_args(argv)
    if given.before and not given.table:
        parser.error("--before is of a --table")
    if given.table and (given.model or given.partitions or given.crop or given.every):
        parser.error("--table has its own steps: leave the other options out")
    try:
        if given.table:
            before = earlier(given.before) if given.before else None
            now = table()
            print(json.dumps(now, indent=1) if given.format == "json" else markdown(now, before))
            return 0
        if None in (given.model, given.partitions, given.crop):
            parser.error("--model, --partitions and --crop say which step, or --table several of them")
        case = Case(given.model, given.partitions, given.crop, given.image)
        found = report(Setting(case, given.batch, given.dtype, given.fused, given.optimizer), given.every)
    except DecompkError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if given.format == "json" else text(found))
    return 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except BrokenPipeError:  # the reader of a pipe, as head, has seen enough
        sys.stderr.close()
        code = 0
    sys.exit(code)
