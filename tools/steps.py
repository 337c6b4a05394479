"""Training steps of K members at once, by everybody who can: decompk, torch's grouped convolutions, each alone."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import decompk
from decompk.kernels.timer import Clock, synchronize


class GroupedLinear(nn.Module):
    """K linear layers on features side by side: (N, K·in) → (N, K·out)."""

    def __init__(self, members: list[nn.Linear]):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([m.weight.detach() for m in members]))
        self.bias = nn.Parameter(torch.cat([m.bias.detach() for m in members]))

    def forward(self, x: Tensor) -> Tensor:
        K, _, features = self.weight.shape
        y = x.view(-1, K, features).transpose(0, 1) @ self.weight.mT.to(x.dtype)
        return y.transpose(0, 1).flatten(1) + self.bias


def grouped_network(members: list[nn.Module]) -> nn.Module:
    """The members as channel groups of one network, as one writes it without decompk: (N, K·C, H, W) → (N, K·O).

    Raises NotImplementedError on a layer with parameters that torch cannot group.
    """
    net = copy.deepcopy(members[0])
    for path, leaf in list(net.named_modules()):
        leaves = [member.get_submodule(path) for member in members]
        if isinstance(leaf, nn.Conv2d):
            wide = nn.Conv2d(
                len(members) * leaf.in_channels,
                len(members) * leaf.out_channels,
                leaf.kernel_size,
                leaf.stride,
                leaf.padding,
                leaf.dilation,
                len(members) * leaf.groups,
                leaf.bias is not None,
            )
        elif isinstance(leaf, nn.BatchNorm2d):
            wide = nn.BatchNorm2d(len(members) * leaf.num_features)
        elif isinstance(leaf, nn.Linear):
            net.set_submodule(path, GroupedLinear(leaves))
            continue
        elif next(leaf.parameters(recurse=False), None) is None:
            continue
        else:
            raise NotImplementedError(f"torch groups no {type(leaf).__name__}")
        states = [one.state_dict() for one in leaves]
        wide.load_state_dict({k: torch.cat([s[k] for s in states]) if v.dim() else v for k, v in states[0].items()})
        net.set_submodule(path, wide)
    return net


class Stacked(nn.Module):
    """The members under torch.func.vmap: their crops (K, N, C, h, w) → (K, N, classes)."""

    def __init__(self, members: list[nn.Module]):
        super().__init__()
        parameters, buffers = torch.func.stack_module_state(members)
        self.names, self.shell = list(parameters), [copy.deepcopy(members[0]).to("meta")]  # no submodule
        self.values = nn.ParameterList(parameters.values())
        self.statistics = buffers

    def forward(self, x: Tensor) -> Tensor:
        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(self.shell[0], (parameters, buffers), (x,))

        parameters = dict(zip(self.names, self.values, strict=True))
        return torch.func.vmap(one, randomness="different")(parameters, self.statistics, x)


# ---- who trains -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """What everybody is given: members, their crops of `image` (N, C, H, W), `target` (N,), and the global network."""

    members: list[nn.Module]
    crops: Sequence[decompk.Crop]
    image: Tensor
    target: Tensor
    net: nn.Module

    def ready(self, net: nn.Module) -> nn.Module:
        return net.to(self.image.device, memory_format=torch.channels_last).train()

    def cut(self, crop: decompk.Crop) -> Tensor:
        return crop.cut(self.image).contiguous(memory_format=torch.channels_last)


Job = tuple[nn.Module, Callable[[], Tensor]]  # a network and what makes its input


def packed(field: Field) -> list[Job]:
    net = decompk.pack(field.members, crops=field.crops).to(field.image.device).train()
    return [(net, lambda: field.image)]


def fused(field: Field) -> list[Job]:
    ((net, images),) = packed(field)
    return [(decompk.fuse(net), images)]


def grouped(field: Field) -> list[Job]:
    net = field.ready(grouped_network(field.members))
    return [(net, lambda: torch.cat([field.cut(crop) for crop in field.crops], 1))]


def alone(field: Field) -> list[Job]:
    pairs = zip(field.members, field.crops, strict=True)
    return [(field.ready(copy.deepcopy(member)), partial(field.cut, crop)) for member, crop in pairs]


def whole(field: Field) -> list[Job]:
    image = field.image.contiguous(memory_format=torch.channels_last)
    return [(field.ready(copy.deepcopy(field.net)), lambda: image)]


def vmapped(field: Field) -> list[Job]:
    members = [copy.deepcopy(member).to(field.image.device).train() for member in field.members]
    return [(Stacked(members), lambda: torch.stack([field.cut(crop) for crop in field.crops]))]


def compiled(jobs: list[Job]) -> list[Job]:
    return [(torch.compile(net, dynamic=False), make) for net, make in jobs]


class Training:
    """Forward under autocast to `dtype`, loss, backward and SGD of every job, in turn or each on a stream of its own.

    K is the number of members in all jobs. A call returns the sum of their losses, of before it learned.
    """

    def __init__(
        self,
        jobs: list[Job],
        target: Tensor,
        K: int,
        dtype: torch.dtype | None = torch.bfloat16,
        streams: bool = False,
    ):
        self.jobs, self.target, self.each, self.dtype = jobs, target, K // len(jobs), dtype
        self.optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, foreach=True) for net, _ in jobs]
        self.streams = [torch.cuda.Stream() for _ in jobs] if streams else []

    def __call__(self) -> Tensor:
        return self._run(learn=True)

    def gradients(self) -> Tensor:
        """A step that learns nothing: for whoever asks what is launched."""
        return self._run(learn=False)

    def _run(self, learn: bool) -> Tensor:
        if not self.streams:
            return torch.stack([self._step(k, learn) for k in range(len(self.jobs))]).sum()
        here, losses = torch.cuda.current_stream(), []
        for k, stream in enumerate(self.streams):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                losses.append(self._step(k, learn))
        for stream in self.streams:
            here.wait_stream(stream)
        return torch.stack(losses).sum()

    def _step(self, k: int, learn: bool) -> Tensor:
        net, make = self.jobs[k]
        self.optimizers[k].zero_grad(set_to_none=True)
        with torch.autocast(self.target.device.type, torch.bfloat16, enabled=self.dtype is not None):
            logits = net(make())
        if logits.dim() == 2:  # of one network, or of members side by side
            logits = logits.unflatten(1, (self.each, -1)).transpose(0, 1)
        loss = decompk.losses.cross_entropy(logits.float(), self.target)
        loss.backward()
        if learn:
            self.optimizers[k].step()
        return loss.detach()


class Captured:
    """A training step as one CUDA graph, captured at its first call, when it has run `warm` times."""

    warm = 3

    def __init__(self, step: Callable[[], Tensor]):
        self.step, self.graph = step, None

    def __call__(self) -> Tensor:
        if self.graph is None:
            self._capture()
        self.graph.replay()
        return self.loss

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.warm):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.step()


# ---- what a step costs beside its time ------------------------------------------------------------------------------


def host_ms(step: Callable[[], object], device: torch.device, runs: int = 5) -> float:
    """Milliseconds until the host has launched a step, each on a GPU that waits for it."""
    times = []
    for _ in range(runs):
        synchronize(device)
        with Clock() as launch:
            step()
        times.append(1e3 * launch.seconds)
    synchronize(device)
    return statistics.median(times)


def launches(step: Callable[[], object]) -> dict[str, object]:
    """What the GPU is given in one step, by CUPTI."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    events = [event for event in seen.events() if event.device_type == DeviceType.CUDA]
    return tally((event.name, event.time_range.elapsed_us()) for event in events)


def tally(events: Iterable[tuple[str, float]]) -> dict[str, object]:
    """(name, µs) of each → how many are kernels, copies and fills, their time, and the 12 that take most of it."""
    counts, busy = {"kernels": 0, "copies": 0, "fills": 0}, 0.0
    names: dict[str, list[float]] = {}
    for name, us in events:
        kind = {"Memcpy": "copies", "Memset": "fills"}.get(name[:6], "kernels")
        counts[kind] += 1
        busy += us / 1e3
        names.setdefault(name[:80], []).append(us / 1e3)
    most = sorted(names.items(), key=lambda item: -sum(item[1]))[:12]
    top = [(name, len(times), round(sum(times), 4)) for name, times in most]
    return {**counts, "launches": sum(counts.values()), "busy_ms": busy, "top": top}
