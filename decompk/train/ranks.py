"""The processes of a training: who holds which members, and what they tell each other."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DecompkError
from .checkpoint import dump, load

PATIENCE = datetime.timedelta(days=7)  # a rank may wait that long for another's members


class Ranks:
    """This process among the others; one alone has rank 0 of 1.

    Members are dealt out in runs, so that rank order is member order; a rank may have none. While members train no
    rank talks to another.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1):
        self.device, self.rank, self.size = device, rank, size

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> range:
        """A rank's part of `count` members or samples, a run of them; the first ranks get one more of what is left."""
        rank = self.rank if rank is None else rank
        least, rest = divmod(count, self.size)
        start = rank * least + min(rank, rest)
        return range(start, start + least + (rank < rest))

    def sum(self, values: Tensor) -> Tensor:
        """Element by element over all ranks, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(values)
        return values

    def any(self, flags: list[bool]) -> list[bool]:
        """For each flag whether any rank raises it; all ranks must ask."""
        if self.size == 1:
            return flags
        return (self.sum(torch.tensor(flags, dtype=torch.float32, device=self.device)) > 0).tolist()

    def from_rank(self, source: int, value: Any) -> Any:
        """Rank `source`'s value (tensors, which come on the CPU, and plain values), on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        content = dump(value) if self.rank == source else b""
        size = torch.tensor(len(content), device=self.device)
        dist.broadcast(size, source)
        data = torch.empty(int(size), dtype=torch.uint8)
        if self.rank == source:
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        data = data.to(self.device)
        dist.broadcast(data, source)
        return load(data.cpu().numpy().tobytes())

    def from_all(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        return [self.from_rank(rank, value) for rank in range(self.size)]


def start(device: str | None = None) -> Ranks:
    """Join the processes that torchrun started; without torchrun, be the only one.

    device: "cpu", "cuda" or "cuda:1"; the GPU where there is one by default. Raises DecompkError.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:  # torch knows no device of that name
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise DecompkError(f"'{device}' is none of the devices that are trained on: give cpu, cuda or cuda:1.")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise DecompkError("there is no GPU that torch can use here; leave --device out, or give cpu.")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks(chosen)
    import torch.distributed as dist

    if chosen.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise DecompkError(
                f"process {local} of this machine has no GPU of its own: start {torch.cuda.device_count()} with "
                "--nproc-per-node, or train with --device cpu."
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    return Ranks(chosen, dist.get_rank(), dist.get_world_size())


def stop(ranks: Ranks) -> None:
    """Leave the process group that `start` joined."""
    if ranks.size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


class Sum(torch.autograd.Function):
    """Σ over ranks, of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        import torch.distributed as dist

        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Sum.forward(ctx, grad)


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm whose statistics are those of the whole batch that ranks share; torch's own needs a GPU.

    (N, c, …) → (N, c, …); a rank may have any number of samples, none too.
    """

    num_batches_tracked: Tensor

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        count = torch.tensor([x.numel() / x.shape[1]], dtype=x.dtype, device=x.device)
        total = Sum.apply(torch.cat([x.sum(axes), count]))
        mean, count = total[:-1] / total[-1], total[-1].detach()
        centred = x - mean.view(shape)
        var = Sum.apply((centred * centred).sum(axes)) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                factor = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.to(x.dtype)
                self.running_mean += factor * (mean - self.running_mean)
                self.running_var += factor * (var * count / (count - 1) - self.running_var)
        y = centred * torch.rsqrt(var + self.eps).view(shape)
        return y if self.weight is None else y * self.weight.view(shape) + self.bias.view(shape)


def synced(net: nn.Module, ranks: Ranks) -> nn.Module:
    """`net` with batch norms that see the whole batch, in place; parameters and names stay as they are."""
    if ranks.size == 1:
        return net
    if ranks.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for norm in net.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.__class__ = SyncedBatchNorm
    return net


class Replicas:
    """One network trained by all ranks, each on its share of every batch: its states are those of a single process.

    how: "ddp" keeps a copy on every rank, "fsdp" (FSDP2) a share of every parameter. `net` runs and trains.
    """

    def __init__(self, net: nn.Module, ranks: Ranks, how: str = "ddp"):
        self.ranks, self.how = ranks, how if ranks.size > 1 else "alone"
        self._plain = self.net = synced(net, ranks)
        if self.how == "ddp":
            self.net = nn.parallel.DistributedDataParallel(
                net, device_ids=[ranks.device] if ranks.device.type == "cuda" else None
            )
        elif self.how == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(ranks.device.type, (ranks.size,))
            for child in net.children():
                if any(True for _ in child.parameters()):
                    fully_shard(child, mesh=mesh)
            fully_shard(net, mesh=mesh)

    def state(self) -> dict[str, Any]:
        """The whole network's state_dict; every rank must ask where it is sharded."""
        if self.how != "fsdp":
            return self._plain.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(self._plain, options=StateDictOptions(full_state_dict=True))

    def load_state(self, state: dict[str, Any]) -> None:
        """What `state` gave, on every rank."""
        if self.how != "fsdp":
            self._plain.load_state_dict(state)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(self._plain, state, options=StateDictOptions(full_state_dict=True))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict:
        """The whole optimizer's state; every rank must ask where it is sharded."""
        if self.how != "fsdp":
            return optimizer.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        return get_optimizer_state_dict(self._plain, optimizer, options=StateDictOptions(full_state_dict=True))

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """What `optimizer_state` gave, on every rank."""
        if self.how != "fsdp":
            optimizer.load_state_dict(state)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self._plain, optimizer, state, options=options)
