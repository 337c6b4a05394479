"""The networks of the bench, and everybody who can train K of them at once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from layers import Case as Cut
from race import Build, Contestant, Result, Work
from steps import Captured, grouped_network
from torch import Tensor, nn

import decompk
from decompk.cost import walk
from decompk.cost.figures import total
from decompk.crops import by
from decompk.losses import cross_entropy
from decompk.packed.schedule import CALLS

NCHW, CL = torch.contiguous_format, torch.channels_last


@dataclass(frozen=True)
class Case(Cut):
    """A registered network and how it is cut; `width` is that of its first stage where it is not the usual one."""

    crop: int | tuple[int, int]
    margin: int = 0
    width: int | None = None

    @property
    def title(self) -> str:
        return f"{self.model} K={self.K}@{self.crop if isinstance(self.crop, int) else by(self.crop)}"

    def decomposition(self) -> decompk.Decomposition:
        net = decompk.models.build(self.model, **({"width": self.width} if self.width else {}))
        size = decompk.models.spec(self.model).input_size
        return decompk.decompose(net, size, self.partitions, self.crop, self.margin)


PAPERS = (  # the papers' networks, as they cut them
    Case("resnet50", 4, 140),
    Case("resnet50", (2, 4), 96),
    Case("resnet50", 16, 70, margin=24),
    Case("vgg16", 4, 112),
    Case("resnet32", 4, 16),
)


@dataclass(frozen=True)
class Setting:
    """Where and in which dtype is computed; bfloat16 means autocast."""

    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def here(dtype: torch.dtype | None = None) -> Setting:
        """The GPU in bfloat16 where there is one, otherwise the CPU in float32."""
        gpu = torch.cuda.is_available()
        return Setting(torch.device("cuda" if gpu else "cpu"), dtype or (torch.bfloat16 if gpu else torch.float32))

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


# ---- a training step ------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """K members and a batch: inputs (N, …), whole or as each member's crop, and labels (N,)."""

    setting: Setting
    members: list[nn.Module]
    crops: tuple[decompk.Crop, ...] | None  # None: all read the whole of it
    inputs: Tensor
    labels: Tensor
    work: Work  # of one step of all members
    net: nn.Module | None = None  # the global network
    global_work: Work | None = None

    @property
    def K(self) -> int:
        return len(self.members)

    def cuts(self, format: torch.memory_format) -> list[Tensor]:
        """A contiguous input for every member, one for all where they share it. They are made before the race."""
        if self.crops is None:
            return [laid(self.inputs, format)] * self.K
        return [laid(crop.cut(self.inputs), format) for crop in self.crops]

    def copies(self, format: torch.memory_format) -> list[nn.Module]:
        return [copy.deepcopy(member).to(memory_format=format) for member in self.members]

    def loss(self, logits: Tensor) -> Tensor:
        """(K, N, classes) → Σ_k of the member's mean cross-entropy."""
        return cross_entropy(logits, self.labels)

    def result(self, gradient: Callable[[str], Tensor], logits: Tensor) -> Result:
        """What a step came to: logits (K, N, classes), and gradients in the members' shapes."""
        shapes = {name: p.shape for name, p in self.members[0].named_parameters()}
        gradients = {f"gradient of {name}": gradient(name).reshape(self.K, *shape) for name, shape in shapes.items()}
        return {"output": logits, **gradients}


def laid(x: Tensor, format: torch.memory_format) -> Tensor:
    """`x`, contiguous; images in `format`."""
    return x.contiguous(memory_format=format if x.dim() == 4 else NCHW)


def job(case: Case, batch: int, setting: Setting) -> Job:
    """Fresh members of `case` and random images. Dropout is off: everybody has to compute the same."""
    torch.manual_seed(0)
    d = case.decomposition()
    members = d.subnets(seed=0)
    for module in [module for net in (d.model, *members) for module in net.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images, labels = torch.randn(batch, *d.input_size), torch.randint(10, (batch,))
    size = 2 if setting.dtype == torch.bfloat16 else 4
    one = training_work(d.member_skeleton(), d.member_size, batch, size)
    return Job(
        setting,
        [member.to(setting.device).train() for member in members],
        d.crops,
        images.to(setting.device),
        labels.to(setting.device),
        Work(d.K * one.bytes, d.K * one.flops),
        d.model.to(setting.device).train(),
        training_work(d.model, d.input_size, batch, size),
    )


def ensemble(make: Callable[[], nn.Module], K: int, size: tuple[int, ...], batch: int, setting: Setting) -> Job:
    """K networks that `make` makes, all on one random batch (N, *size) of ten classes."""
    torch.manual_seed(0)
    members = [make().to(setting.device).train() for _ in range(K)]
    inputs, labels = torch.randn(batch, *size), torch.randint(10, (batch,))
    one = training_work(members[0], size, batch, 2 if setting.dtype == torch.bfloat16 else 4)
    work = Work(K * one.bytes, K * one.flops)
    return Job(setting, members, None, inputs.to(setting.device), labels.to(setting.device), work)


def training_work(net: nn.Module, size: tuple[int, ...], batch: int, element_size: int) -> Work:
    """Of forward and backward pass of `batch` samples of `size` (C, H, W)."""
    whole = total(walk.layers(net, size, training=True))
    moved = whole.forward_bytes(element_size, batch) + whole.backward_bytes(element_size, batch)
    return Work(moved, batch * (whole.flops() + whole.backward_flops))


def members_alone(job: Job) -> Result:
    """The reference: every member by itself, in float64."""
    logits, gradients = [], []
    for member, x in zip(job.members, job.cuts(NCHW), strict=True):
        net = copy.deepcopy(member).double()
        logits.append(net(x.double()))
        F.cross_entropy(logits[-1], job.labels).backward()
        logits[-1] = logits[-1].detach()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    return job.result(lambda name: torch.stack([one[name] for one in gradients]), torch.stack(logits))


def train(job: Job, net: nn.Module, forward: Callable[[], Tensor], captured: bool = False) -> Contestant:
    """One network that holds all members; `forward` returns logits (K, N, classes)."""

    def run() -> Tensor:
        net.zero_grad()
        with job.setting.autocast():
            logits = forward()
            loss = job.loss(logits)
        loss.backward()
        return logits.detach()

    parameters = dict(net.named_parameters())
    run = Captured(run) if captured else run
    return Contestant(run, partial(job.result, lambda name: parameters[name].grad), job.work)


def packed(
    job: Job,
    fused: bool = False,
    compiled: bool = False,
    captured: bool = False,
    keep: Callable[[decompk.Packed], object] | None = None,
) -> Contestant:
    """Ours: one module, on crops (K, N, …) cut before the race as everybody's are, or on the inputs that all share.

    keep: called with the module.
    """
    net = decompk.pack(job.members, input_dims=job.inputs.dim()).train()
    net = decompk.fuse(net) if fused else net
    if keep is not None:
        keep(net)
    call = torch.compile(net, dynamic=False) if compiled else net
    cuts = job.cuts(CL)
    x = cuts[0] if job.crops is None else laid(torch.cat(cuts), CL).unflatten(0, (job.K, -1))
    contestant = train(job, net, lambda: call(x), captured)
    for _ in range(0 if compiled or captured else CALLS):  # until it has chosen its schedule
        contestant.run()
    return contestant


def grouped(job: Job, format: torch.memory_format, compiled: bool = False, captured: bool = False) -> Contestant:
    """The members' channels side by side, with torch's grouped convolutions and one batch norm over all."""
    net = grouped_network(job.members).to(job.setting.device, memory_format=format).train()
    x = laid(torch.cat(job.cuts(format), 1), format)
    call = torch.compile(net, dynamic=False) if compiled else net
    return train(job, net, lambda: call(x).unflatten(1, (job.K, -1)).transpose(0, 1), captured)


def vmapped(job: Job) -> Contestant:
    """torch.func.vmap over stacked members; running statistics are stacked too, or vmap could not update them."""
    parameters, buffers = torch.func.stack_module_state(job.members)
    shell, cuts = copy.deepcopy(job.members[0]).to("meta"), job.cuts(NCHW)
    x = cuts[0] if job.crops is None else torch.stack(cuts)
    stepped = torch.func.vmap(
        lambda parameters, buffers, x: torch.func.functional_call(shell, (parameters, buffers), (x,)),
        in_dims=(0, 0, None if job.crops is None else 0),
        randomness="different",
    )

    def run() -> Tensor:
        for parameter in parameters.values():
            parameter.grad = None
        with job.setting.autocast():
            logits = stepped(parameters, buffers, x)
            loss = job.loss(logits)
        loss.backward()
        return logits.detach()

    return Contestant(run, partial(job.result, lambda name: parameters[name].grad), job.work)


def in_turn(
    job: Job, format: torch.memory_format, spread: Callable[[Job], Callable[[Callable[[int], Tensor]], list]]
) -> Contestant:
    """Every member by itself: one after the other, or as `spread` deals them out."""
    members, cuts = job.copies(format), job.cuts(format)

    def step(k: int) -> Tensor:
        members[k].zero_grad()
        with job.setting.autocast():
            logits = members[k](cuts[k])
            loss = F.cross_entropy(logits, job.labels)
        loss.backward()
        return logits.detach()

    parameters = [dict(member.named_parameters()) for member in members]
    everybody = spread(job)
    return Contestant(
        lambda: everybody(step),
        lambda logits: job.result(lambda name: torch.stack([p[name].grad for p in parameters]), torch.stack(logits)),
        job.work,
    )


def one_by_one(job: Job) -> Callable[[Callable[[int], Tensor]], list]:
    return lambda step: [step(k) for k in range(job.K)]


def on_threads(job: Job) -> Callable[[Callable[[int], Tensor]], list]:
    """As many members at a time as torch has threads, each on one of them: more would only get in their way."""
    threads = torch.get_num_threads()
    started = threading.Barrier(count := min(job.K, threads))

    def alone() -> None:
        torch.set_num_threads(1)  # counts for this thread, and for those that come after
        torch.get_num_threads()  # else the first operator sets it anew
        started.wait()

    pool = ThreadPoolExecutor(count, initializer=alone)
    list(pool.map(lambda _: None, range(count)))
    torch.set_num_threads(threads)
    return lambda step: list(pool.map(step, range(job.K)))


def on_streams(job: Job) -> Callable[[Callable[[int], Tensor]], list]:
    """One CUDA stream a member."""
    streams = [torch.cuda.Stream() for _ in range(job.K)]

    def everybody(step: Callable[[int], Tensor]) -> list[Tensor]:
        current, logits = torch.cuda.current_stream(), []
        for k, stream in enumerate(streams):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                logits.append(step(k))
        for stream in streams:
            current.wait_stream(stream)
        return logits

    return everybody


def whole(job: Job, compiled: bool = False) -> Contestant:
    """The global network on the same images: the time that decomposition is meant to save."""
    net, images = copy.deepcopy(job.net).to(memory_format=CL), laid(job.inputs, CL)
    call = torch.compile(net, dynamic=False) if compiled else net

    def run() -> None:
        net.zero_grad()
        with job.setting.autocast():
            loss = F.cross_entropy(call(images), job.labels)
        loss.backward()

    return Contestant(run, None, job.global_work)


TRAINING: dict[str, Callable[[Job], Contestant]] = {
    "ours": packed,
    "ours, fused": partial(packed, fused=True),
    "ours, compiled": partial(packed, compiled=True),
    "ours, CUDA graph": partial(packed, fused=True, captured=True),
    "members in turn": partial(in_turn, format=NCHW, spread=one_by_one),
    "members in turn, channels_last": partial(in_turn, format=CL, spread=one_by_one),
    "members on threads": partial(in_turn, format=CL, spread=on_threads),
    "members on streams": partial(in_turn, format=CL, spread=on_streams),
    "vmap": vmapped,
    "grouped": partial(grouped, format=NCHW),
    "grouped, channels_last": partial(grouped, format=CL),
    "grouped, compiled": partial(grouped, format=CL, compiled=True),
    "grouped, CUDA graph": partial(grouped, format=CL, captured=True),
    "global": whole,
    "global, compiled": partial(whole, compiled=True),
}
OWN = ("members in turn", "members in turn, channels_last")  # torch's own layers, by which rounding is judged


def side(name: str) -> str:
    """Whose contestant it is: "ours", "peer" or "global"."""
    first = name.partition(",")[0]
    return first if first in ("ours", "global") else "peer"


def who_trains(setting: Setting, compiled: bool, deep: bool = False, few: bool = False) -> list[str]:
    """Who competes here: on a CPU not what torch.compile takes a minute to build, nor the global network, unless asked.

    Nothing compiled in a `deep` network; on a GPU the global network compiled alone, unless all are asked for. `few`:
    without three peers that were not the fastest on any large network.
    """
    out = {"members on threads", "global, compiled"} if setting.gpu else {"members on streams", "global"}
    if compiled:
        out -= {"global", "global, compiled"}
    if deep or not (setting.gpu or compiled):
        out |= {name for name in TRAINING if "compiled" in name}
    if not setting.gpu:
        out |= {name for name in TRAINING if "CUDA" in name}
    if few:
        out |= {"members in turn", "vmap", "grouped"}
    return [name for name in TRAINING if name not in out]


def builds(job: Job, names: list[str]) -> dict[str, Build]:
    return {name: partial(TRAINING[name], job) for name in names}
