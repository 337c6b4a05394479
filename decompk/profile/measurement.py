"""`measure`: the global network, one member and the packed members of a decomposition, counted, timed and analysed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import optim
from ..cost.figures import LayerCost, total
from ..cost.walk import layers
from ..crops import by
from ..divide.decompose import Decomposition
from ..errors import MISFITS, DecompkError, brief
from ..packed.pack import pack
from ..report.decomposition import Pair
from ..report.progress import naming
from .claims import Claim, figure_claims, fvcore_claim, layers_claim, packed_claims, ratio_claims, time_claim
from .counters import LayerCall, analysed, backward, fvcore_macs, layer_calls, layer_flops, measured, peak_memory
from .law import Field, role_of
from .profile import Profile
from .roofs import DTYPES, measure_roofs, name_of_device
from .sides import SIDES, Layer, LayerSide, Side
from .timing import interleaved, layer_times

SEED, RATE = 0, 1e-5
TURNS = "members in turn"


@dataclass(frozen=True)
class Network:
    """What is run: (network in training mode, input, optimizer), for the members all of them, and what it sees of it.

    `layers`: the analysis of one network; `members`: how many of these the first network is.
    """

    job: list[tuple[nn.Module, Tensor, torch.optim.Optimizer]]
    pixels: Tensor
    layers: tuple[LayerCost, ...]
    members: int

    @property
    def mask_size(self) -> int:
        """Bytes of each number that dropout draws: a GPU keeps whether, a CPU the factor."""
        return 1 if self.pixels.is_cuda else self.pixels.element_size()


def measure(
    d: Decomposition,
    batch: int = 4,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    time: bool = True,
    seconds: float = 6.0,
    progress: bool = False,
) -> Profile:
    """Train the global network, one member and the packed members of `d` for a step, beside what the analysis says.

    batch: samples of the global batch. device: by default the GPU where there is one. dtype: float32 or bfloat16.
    time: also time training steps, for about `seconds` and at least three rounds, and every layer with MACs alone; on a
    GPU in channels_last, which is faster there. progress: a bar on stderr, where that is a terminal and tqdm is
    installed. `d.model` and the random state stay as they are. Raises DecompkError where the networks cannot run so.
    """
    if batch < 1:
        raise DecompkError(f"a batch of {batch} samples cannot be measured; give at least 1.")
    if dtype not in DTYPES:
        raise DecompkError(f"{dtype} has no measured roof; choose float32 or bfloat16.")
    if any(tensor.is_meta for tensor in (*d.model.parameters(), *d.model.buffers())):
        raise DecompkError(f"{type(d.model).__name__} is on the meta device, where nothing can be measured.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), naming(progress) as tell:
        torch.manual_seed(SEED)
        tell("building the networks")
        networks = build(d, batch, device, dtype)
        try:
            return _measured(d, networks, batch, seconds if time else None, tell)
        except MISFITS as error:  # whatever the network's own operations raise
            raise DecompkError(
                f"a training step on {batch} samples fails: {brief(error)}; try another batch."
            ) from error


def build(d: Decomposition, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Network]:
    """The networks of SIDES, all in training mode, with random input."""
    whole = copy.deepcopy(d.model).to(device, dtype).train()
    subnets = [net.to(device, dtype).train() for net in d.subnets(SEED)]
    packed = pack(subnets, d.crops)
    of_whole = tuple(layers(whole, d.input_size, training=True))
    of_member = tuple(layers(subnets[0], d.member_size, training=True))
    x = torch.randn((batch, *d.input_size), device=device, dtype=dtype)
    crops = torch.stack(d.split(x))

    def adam(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(net.parameters(), RATE)

    return {
        "global": Network([(whole, x, adam(whole))], x, of_whole, 1),
        "member": Network([(n, part, adam(n)) for n, part in zip(subnets, crops, strict=True)], crops[0], of_member, 1),
        "packed": Network([(packed, x, optim.Adam(packed, RATE))], crops, of_member, d.K),
    }


def _measured(
    d: Decomposition, networks: dict[str, Network], batch: int, seconds: float | None, tell: Callable[[str], None]
) -> Profile:
    x = networks["global"].pixels
    dtype = str(x.dtype).removeprefix("torch.")
    sides, claims = {}, []
    for name, network in networks.items():
        tell(f"counting {name}")
        sides[name], found = _counted(name, network, batch)
        claims += found
    claims += packed_claims(sides["member"].measured, sides["packed"].measured, d.K)
    calls = {name: _calls(network) for name, network in networks.items()}
    # What runs once per member has its slice of the weights only while it runs.
    many = {name.partition("#")[0] for name in calls["packed"].keys() - calls["member"].keys()}
    calls["packed"] = {n: call for n, call in calls["packed"].items() if n.partition("#")[0] not in many}
    flops = {name: {n: layer_flops(call) for n, call in found.items()} for name, found in calls.items()}
    times, taken, bounds, roofs = {}, {}, {}, None
    if seconds is not None:
        tell("measuring the roofs")
        roofs = measure_roofs(x.device)
        jobs = {TURNS if name == "member" else name: network.job for name, network in networks.items()}
        times = interleaved(jobs, x.device, seconds, tell)
        taken = {name: layer_times(found, x.device, tell) for name, found in calls.items()}
    listed = tuple(_listed(networks, flops, taken, batch))
    if roofs:
        sums = {
            name: [layer.sides[name].bound(roofs, dtype) for layer in listed if name in layer.sides]
            for name in ("global", "packed")
        }
        bounds = {name: (sum(f for f, _ in passes), sum(b for _, b in passes)) for name, passes in sums.items()}
        bounds[TURNS] = bounds["packed"]
        claims.append(time_claim(times["global"], times["packed"]))
    claims += [layers_claim(name, listed) for name in SIDES]
    field = Field.of(d.crops, d.input_size[1:])
    claims += ratio_claims(
        _pairs(networks), d.K, field, sides, listed, batch, x.element_size(), networks["global"].mask_size
    )
    title = f"{type(d.model).__name__} at {by(d.input_size[1:])} in {d.K} members at {by(d.crops[0].size)}"
    title += f", batch {batch}, {dtype}, {name_of_device(x.device)}"
    return Profile(title, d.K, batch, dtype, sides, listed, tuple(claims), times, bounds, roofs)


def _counted(name: str, network: Network, batch: int) -> tuple[Side, list[Claim]]:
    """One network's figures, and the claims about it alone."""
    net, x, optimizer = network.job[0]
    cost, size = total(network.layers), x.element_size()
    side = Side(
        measured(net, x, network.pixels, optimizer),
        analysed(cost, network.members, batch, size, network.mask_size),
        network.members * cost.forward_bytes(size, batch),
        network.members * cost.backward_bytes(size, batch),
        peak_memory(net, x),
    )
    claims = figure_claims(name, side.measured, side.analysed)
    if name != "packed":  # its tracer takes K times as long there
        claims.append(fvcore_claim(name, fvcore_macs(net, x), batch * cost.macs))
    return side, claims


def _calls(network: Network) -> dict[str, LayerCall]:
    """The calls of its layers with MACs in one training step; from then on, on a GPU, images are channels_last."""
    if network.pixels.is_cuda and network.job[0][1].dim() == 4:
        for net, x, _ in network.job:
            net.to(memory_format=torch.channels_last)
            x.data = x.data.contiguous(memory_format=torch.channels_last)
    net, x, _ = network.job[0]
    with layer_calls(net, network.layers) as calls:
        backward(net(x))
    return calls


def _listed(
    networks: dict[str, Network],
    flops: dict[str, dict[str, tuple[int, int]]],
    taken: dict[str, dict[str, tuple[float, float]]],
    batch: int,
) -> Iterator[Layer]:
    size = networks["global"].pixels.element_size()
    for pair in _pairs(networks):
        found = {}
        for name, network in networks.items():
            layer = pair.whole if name == "global" else pair.member
            if layer is None:
                continue
            cost = layer * network.members
            found[name] = LayerSide(
                (batch * cost.flops(), batch * cost.backward_flops),
                (cost.forward_bytes(size, batch), cost.backward_bytes(size, batch)),
                flops[name].get(pair.name),
                taken.get(name, {}).get(pair.name),
            )
        yield Layer(pair.name, pair.either.kind, role_of(pair), found)


def _pairs(networks: dict[str, Network]) -> list[Pair]:
    """The layers of the global network and of a member, by name."""
    whole, member = ({layer.name: layer for layer in networks[name].layers} for name in ("global", "member"))
    return [Pair(name, whole.get(name), member.get(name)) for name in dict.fromkeys((*whole, *member))]
