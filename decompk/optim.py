"""Optimizers of packed networks: K members in one step, each with its own hyperparameters, each free to stop.

Code for one network sees stacks (K, …) in a packed one. What it does to them over `packed.parameters()`:

- torch's SGD, Adam, AdamW, Adamax, NAdam, RAdam, Adagrad, Adadelta, RMSprop, Rprop and ASGD: what they do to each
  member alone. `SGD`, `Adam` and `AdamW` here give every member hyperparameters of its own.
- Adafactor, Muon, LARS, LAMB, whatever reads a tensor's norm, rows or columns: couples the members, or refuses the
  stacks' shapes; `each(packed, build)` runs one such optimizer a member.
- LBFGS, which searches along one line: couples the members; train those of `packed.unpack()`.
- SparseAdam: refuses the gradients, which are dense; Adam does not.
- nn.utils.clip_grad_norm_, one norm for all: couples the members; `clip_grad_norm_` here is each member's own.
- torch.amp.GradScaler: an inf of one member skips the step of all; bfloat16 needs no scaler.
- "no weight decay where p.ndim <= 1": decays biases and norms, which are (K, c); `decay_groups` counts a member's
  dimensions.
- A layer that some members do not run in a step: the others' gradient is of the whole stack, so theirs is zero, not
  None, and decay and momentum move what they would leave alone; train those of `packed.unpack()` where that matters.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from .errors import CheckpointError, DecompkError, PackError
from .packed.pack import Packed

VECTOR = 64  # elements, a multiple of every CPU's vector; torch's fused loops round the tail behind the last otherwise

Number = float | Sequence[float]
Pair = tuple[float, float]
Groups = nn.Module | Iterable[dict[str, Any]]


class _Stack(NamedTuple):
    """Views of a parameter (K, …) and its state, cut where the runs begin and end."""

    state: dict[str, Tensor]
    sizes: list[int]  # members in each part of the stack
    rows: list[list[tuple]]  # for each run its parts: (index, parameter, *state, step of the first member)
    steps: list[Tensor]  # the step counts of all active members


class _Division(NamedTuple):
    """How the members of one set of stacks are updated."""

    runs: list[tuple[int, int]]  # [a, b) of members that are updated together
    names: tuple[str, ...]  # of the state beside the step count
    moving: list[tuple[int, int]]  # the runs whose state moves


class _Call(NamedTuple):
    """One fused call: what of a run lies on one device in one dtype."""

    member: int  # the run's first
    first: bool  # whether this is the first step that moves their state
    parts: list[int]  # of the gradients
    columns: list[list[Tensor]]  # parameters, each state, steps


class _Plan(NamedTuple):
    """A step of the stacks that have a gradient; the same as the last one, most of the time."""

    live: list[int]  # their ids
    strides: list[tuple[int, ...]]  # a gradient that has its parameter's is taken as it is
    sizes: list[list[int]]
    steps: list[Tensor]
    calls: list[_Call]


class _MemberOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose param group j·K + k holds member k's hyperparameters in the user's group j.

    Every hyperparameter is a plain float there, for any lr_scheduler or hand to change. The stacks themselves are
    listed in group j·K, their state is (K, …) like them, with a step count (K,).
    """

    _numbers: tuple[str, ...]  # the hyperparameters that each member has its own of, lr first
    _flags: tuple[str, ...]  # those that all members share
    _age: type = float  # what an update depends on of the step count

    _stacks: dict[Tensor, _Stack]
    _plans: dict[int, _Plan]
    _division: list[_Division] | Any  # None before the first step
    _fresh: list[set[int]]  # of each member the stacks, by id, whose state has not moved yet
    _pointers: list[int] | None
    _lr: Tensor | Any  # None before the first step
    _storage: int

    def __init__(self, params: Groups, packed: nn.Module | None, numbers: tuple, flags: tuple, capturable: bool):
        if packed is None and isinstance(params, list | tuple) and any(isinstance(group, dict) for group in params):
            packed = getattr(params, "packed", None)
            if packed is None:
                name = type(self).__name__
                raise PackError(f"param groups do not say whose they are: write {name}(groups, packed=packed).")
        self.packed = inside(params if packed is None else packed)
        self._saved: dict[int, dict[str, Tensor]] = {}
        if isinstance(params, nn.Module):
            params = [{"params": list(params.parameters())}]
        defaults = dict(zip((*self._numbers, *self._flags), (*numbers, *flags), strict=True))
        super().__init__(params, {**defaults, "capturable": capturable, "fused": True})
        self._forget()

    @property
    def K(self) -> int:
        return self.packed._K

    @property
    def stopped(self) -> tuple[int, ...]:
        """The members that `stop` has stopped."""
        return tuple(sorted(self._saved))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add K groups, one a member, for stacks (K, …) and their hyperparameters, one value or K values each.

        Stacks that require no gradient rest until they do. Raises PackError, DecompkError.
        """
        given = {**self.defaults, **param_group}
        stacks = given.pop("params")
        stacks = [stacks] if isinstance(stacks, Tensor) else list(stacks)
        for p in stacks:
            self._check(p)
        members = self._members(given)
        for k, member in enumerate(members):
            super().add_param_group({**given, **member, "params": stacks if k == 0 else []})

    def _check(self, p: Tensor) -> None:
        if p.shape[:1] != (self.K,):
            raise PackError(f"{self._name(p)} of {tuple(p.shape)} is not a stack of {self.K} members.")
        dense = torch.empty_like(p, device="meta").stride() == p.stride()
        if p.numel() and not (dense and (self.K == 1 or p.stride(0) * self.K == p.numel())):
            raise PackError(f"{self._name(p)} has strides {p.stride()}: each member's weights must lie in one piece.")

    def _name(self, p: Tensor) -> str:
        return next((f"'{name}'" for name, own in self.packed.named_parameters() if own is p), "a parameter")

    def _members(self, given: dict[str, Any]) -> list[dict[str, Any]]:
        for flag in self._flags:
            if not isinstance(given[flag], bool):
                raise DecompkError(f"{flag} is one bool for all members, not {given[flag]!r}.")
        columns = [_per_member(name, given[name], self.K) for name in self._numbers]
        return [dict(zip(self._numbers, row, strict=True)) for row in zip(*columns, strict=True)]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every member that is not stopped, each by its own hyperparameters; returns the closure's loss.

        Adjacent members with equal hyperparameters and step counts are one run, and a run is one fused call. Each
        member gets the bits that torch's fused optimizer would give it alone, in the same memory format (for SGD in
        half precision on a CPU: the plain one). Never waits for a GPU.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not _capturing():
            self.prepare()
        elif not self.defaults["capturable"] or self._division is None:
            raise DecompkError("a CUDA graph can capture step() with capturable=True, after one step outside it.")
        for j, how in enumerate(self._division):
            live = [p for p in self.param_groups[j * self.K]["params"] if p.grad is not None]
            plan = self._plan(j, live)
            whole = self._gradients(live, plan.strides)
            grads = [part for grad, sizes in zip(whole, plan.sizes, strict=True) for part in _cut(grad, sizes)]
            if plan.steps:
                torch._foreach_add_(plan.steps, 1)
            for call in plan.calls:
                i = j * self.K + call.member
                lr = self._lr[i] if self.defaults["capturable"] else self.param_groups[i]["lr"]
                self._update(self.param_groups[i], lr, call.first, [grads[n] for n in call.parts], *call.columns)
            for a, b in how.moving:
                for fresh in filter(None, self._fresh[a:b]):
                    fresh.difference_update(plan.live)
        self._put_back()
        return loss

    @torch.no_grad()
    def prepare(self) -> Hashable:
        """Bring learning rates and the division into runs up to date with param_groups; `step` does so itself.

        With capturable=True call it before every replay of a CUDA graph of `step`. What it returns changes whenever
        that graph must be captured again: other runs, stopped members, constants or storage, but not learning rates.
        """
        pointers = [p.data_ptr() for p in self._in_order()]
        if pointers != self._pointers or any(s.state is not self.state.get(p) for p, s in self._stacks.items()):
            self._pointers, self._storage = pointers, self._storage + 1
            self._stacks, self._plans = {}, {}
        names = (*self._numbers, *self._flags)
        constants = [tuple(group[name] for name in names) for group in self.param_groups]
        sets = range(0, len(constants), self.K)
        division = [self._divided(self.param_groups[j : j + self.K], constants[j : j + self.K]) for j in sets]
        if division != self._division:
            self._division = division
            self._stacks, self._plans = {}, {}
        if len(self._stacks) < len(self.state):
            for j, how in zip(sets, division, strict=True):
                for p in self.param_groups[j]["params"]:
                    if self.state.get(p):
                        self._stack(p, how)
        if self.defaults["capturable"]:
            self._upload()
        runs = [[(a, b, *constants[j + a][1:]) for a, b in how.runs] for j, how in zip(sets, division, strict=True)]
        return self._storage, tuple(map(tuple, runs))

    def _divided(self, groups: list[dict[str, Any]], constants: list[tuple]) -> _Division:
        runs = self._runs(constants)
        return _Division(runs, self._state_names(groups), [run for run in runs if self._moves_state(groups[run[0]])])

    def _runs(self, constants: list[tuple]) -> list[tuple[int, int]]:
        """[a, b) of adjacent active members whose constants and step counts are equal."""
        kind = list(zip(constants, self._ages, self._fresh, strict=True))
        runs: list[tuple[int, int]] = []
        for k in range(self.K):
            if k in self._saved:
                continue
            if runs and runs[-1][1] == k and kind[k] == kind[k - 1]:
                runs[-1] = (runs[-1][0], k + 1)
            else:
                runs.append((k, k + 1))
        return runs

    def _upload(self) -> None:
        """Learning rates to the device: the addresses stay, so that a captured graph reads the new values."""
        rates = [float(group["lr"]) for group in self.param_groups]
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        if self._lr is None or self._lr.shape != (len(rates),) or self._lr.device != device:
            dtype = torch.float64 if device.type == "cpu" else torch.float32  # what torch's fused functions read
            self._lr, self._rates = torch.empty(len(rates), dtype=dtype, device=device), None
        if rates != self._rates:
            self._lr.copy_(torch.tensor(rates, dtype=self._lr.dtype), non_blocking=True)
            self._rates = rates

    def _stack(self, p: Tensor, how: _Division) -> _Stack:
        """The views of a parameter and its state, which is made or brought into the parameter's layout if need be."""
        if p in self._stacks:
            return self._stacks[p]
        self._check(p)
        if _capturing():
            raise DecompkError(f"{self._name(p)} has no state yet: take one step() before capturing one.")
        state, (runs, names, _) = self.state[p], how
        if not state.keys() >= {*names}:
            for fresh in self._fresh:
                fresh.add(id(p))
        if "step" not in state:
            state["step"] = torch.zeros(self.K, dtype=torch.float32, device=p.device)
        state["step"] = state["step"].to(p.device)
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            elif _layout(state[name]) != _layout(p):
                state[name] = torch.empty_like(p).copy_(state[name])
        member = p.numel() // self.K
        cuts: Sequence[int] = range(self.K + 1)
        if p.device.type != "cpu" or member % VECTOR == 0:  # else the division into runs would show in the last bits
            cuts = sorted({0, self.K, *(end for run in runs for end in run)})
        sizes = [b - a for a, b in pairwise(cuts)]
        columns = [_cut(t, sizes) for t in (p.detach(), *(state[name] for name in names))]
        step = [state["step"][a] for a in cuts[:-1]]
        parts = list(zip(range(len(sizes)), *columns, step, strict=True))
        rows = [[part for part, start in zip(parts, cuts[:-1], strict=True) if a <= start < b] for a, b in runs]
        starts, ends = zip(*runs, strict=True) if runs else ((), ())
        active = zip(sorted({*starts} - {*ends}), sorted({*ends} - {*starts}), strict=True)
        self._stacks[p] = _Stack(state, sizes, rows, [state["step"][a:b] for a, b in active])
        return self._stacks[p]

    def _gradients(self, live: list[Tensor], strides: list[tuple[int, ...]]) -> list[Tensor]:
        """Gradients in their parameters' layout: the fused functions go through memory, not through indices."""
        grads: list[Any] = [p.grad for p in live]
        if all(grad.layout is torch.strided for grad in grads) and [*map(Tensor.stride, grads)] == strides:
            return grads
        return [*map(self._gradient, live)]

    def _gradient(self, p: Tensor) -> Tensor:
        grad: Any = p.grad
        if grad.layout is not torch.strided:
            raise DecompkError(f"the gradient of {self._name(p)} is sparse: the packed optimizers take dense ones.")
        if grad.stride() == p.stride():
            return grad
        if all(n == 1 or a == b for n, a, b in zip(p.shape, grad.stride(), p.stride(), strict=True)):
            return grad.as_strided(p.shape, p.stride())
        return torch.empty_like(p).copy_(grad)

    def _plan(self, j: int, live: list[Tensor]) -> _Plan:
        """What a step of these stacks of the user's group j does."""
        ids = [*map(id, live)]
        if j in self._plans and self._plans[j].live == ids:
            return self._plans[j]
        how = self._division[j]
        stacks = [self._stack(p, how) for p in live]
        found: dict[tuple, tuple[list, list]] = {}
        offset = 0
        for p, stack in zip(live, stacks, strict=True):
            for run, parts in zip(how.runs, stack.rows, strict=True):
                first = run in how.moving and id(p) in self._fresh[run[0]]
                indices, rows = found.setdefault((run[0], first, p.device, p.dtype), ([], []))
                indices += [offset + part[0] for part in parts]
                rows += [part[1:] for part in parts]
            offset += len(stack.sizes)
        calls = [
            _Call(a, first, indices, list(map(list, zip(*rows, strict=True))))
            for (a, first, *_), (indices, rows) in found.items()
        ]
        steps = [step for stack in stacks for step in stack.steps]
        plan = _Plan(ids, [p.stride() for p in live], [stack.sizes for stack in stacks], steps, calls)
        if not any(call.first for call in calls):
            self._plans[j] = plan
        return plan

    def _state_names(self, groups: list[dict[str, Any]]) -> tuple[str, ...]:
        """The state of a stack besides its step count."""
        raise NotImplementedError

    def _moves_state(self, group: dict[str, Any]) -> bool:
        """Whether a step by these hyperparameters does."""
        return True

    def _update(self, group: dict[str, Any], lr: float | Tensor, first: bool, *columns: list[Tensor]) -> None:
        """The fused call for a part of one run: its gradients, parameters, state by name, and steps, counting this."""
        raise NotImplementedError

    def stop(self, k: int) -> None:
        """From now on no bit of member k's weights, state and running statistics moves, whatever its gradient is.

        Its statistics are its slices of the packed module's buffers (K, …); each `step` puts them back.
        """
        self._check_member(k)
        if k not in self._saved:
            self._saved[k] = {name: buffer[k].clone() for name, buffer in self._statistics().items()}
            self._storage += 1

    def resume(self, k: int) -> None:
        """Member k, as it was when it stopped, moves again, from its own step count. Waits for the device."""
        self._check_member(k)
        if k in self._saved:
            self._put_back()
            del self._saved[k]
            self._compare_steps()

    def _check_member(self, k: int) -> None:
        if k not in range(self.K):
            raise DecompkError(f"there is no member {k}: members are 0 to {self.K - 1}.")

    def _statistics(self) -> dict[str, Tensor]:
        return {name: b for name, b in self.packed.named_buffers() if b.shape[:1] == (self.K,)}

    @torch.no_grad()
    def _put_back(self) -> None:
        buffers = self._statistics() if self._saved else {}
        pairs = [(buffers[name][k], t) for k, saved in self._saved.items() for name, t in saved.items()]
        if pairs:
            now, saved = zip(*pairs, strict=True)
            torch._foreach_copy_(now, saved)

    def _compare_steps(self) -> None:
        """Read which members have taken equally many steps: they go on doing so until one of them stops."""
        counts = {id(p): state["step"].tolist() for p, state in self.state.items() if "step" in state}
        self._ages = [tuple(self._age(steps[k]) for steps in counts.values()) for k in range(self.K)]

    def _forget(self) -> None:
        """Drop all that is derived from param_groups and state."""
        self._stacks, self._plans = {}, {}
        self._pointers = self._division = self._lr = None
        self._storage = getattr(self, "_storage", 0) + 1
        self._compare_steps()
        counts = {id(p): state["step"].tolist() for p, state in self.state.items() if "step" in state}
        self._fresh = [{p for p, steps in counts.items() if steps[k] == 0} for k in range(self.K)]

    def _in_order(self) -> list[Tensor]:
        """All stacks, as param_groups have them."""
        return [p for group in self.param_groups for p in group["params"]]

    def _fresh_by_place(self) -> list[tuple[int, int]]:
        """(place in param_groups, member) of all `_fresh`: ids change."""
        stacks = self._in_order()
        return [(i, k) for i, p in enumerate(stacks) for k in range(self.K) if id(p) in self._fresh[k]]

    def _add_fresh(self, places: Iterable[tuple[int, int]]) -> None:
        stacks = self._in_order()
        for i, k in places:
            self._fresh[k].add(id(stacks[i]))

    def state_dict(self) -> dict[str, Any]:
        """torch's, with "stopped": member number → its saved buffers by name, and "fresh": (parameter, member) that
        have not moved their state yet."""
        stopped = {k: dict(saved) for k, saved in self._saved.items()}
        return {**super().state_dict(), "stopped": stopped, "fresh": self._fresh_by_place()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, to the bit; without "stopped" no member is. Raises CheckpointError."""
        saved_groups, needed = state_dict["param_groups"], {*self._numbers, *self._flags}
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in saved_groups if group.keys() >= needed] != sizes:
            raise CheckpointError("the checkpoint is of another optimizer, other members or other parameter groups.")
        ids = [i for group in saved_groups for i in group["params"]]
        stacks = self._in_order()
        for i, p in zip(ids, stacks, strict=True):
            for name, t in state_dict["state"].get(i, {}).items():
                _check_shape(f"{name} of {self._name(p)}", t, p.shape[:1] if name == "step" else p.shape)
        buffers, stopped = self._statistics(), state_dict.get("stopped", {})
        for k, saved in stopped.items():
            self._check_member(k)
            if saved.keys() != buffers.keys():
                raise CheckpointError(f"member {k} was stopped with other buffers than this packed module has.")
            for name, t in saved.items():
                _check_shape(f"'{name}' of member {k}", t, buffers[name].shape[1:])
        super().load_state_dict({**state_dict, "state": copy.deepcopy(state_dict["state"])})
        self._saved = {k: {n: t.to(buffers[n]) for n, t in saved.items()} for k, saved in stopped.items()}
        self._add_fresh(state_dict.get("fresh", ()))

    def __getstate__(self) -> dict[str, Any]:
        kept = {"packed": self.packed, "_saved": self._saved, "fresh": self._fresh_by_place()}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fresh = state.get("fresh", ())
        super().__setstate__({name: value for name, value in state.items() if name != "fresh"})
        self._forget()
        self._add_fresh(fresh)


class SGD(_MemberOptimizer):
    """torch.optim.SGD for each member of a packed module, all in one step.

    params: the packed module, `decay_groups` of it, or torch's param groups with packed= naming it. lr, momentum,
    dampening, weight_decay: one number, or a list of K. Raises DecompkError; PackError for parameters that are no
    stacks.
    """

    _numbers = ("lr", "momentum", "dampening", "weight_decay")
    _flags = ("nesterov", "maximize")
    _age = bool  # only the first step differs from the others

    def __init__(
        self,
        params: Groups,
        lr: Number = 1e-3,
        momentum: Number = 0.0,
        dampening: Number = 0.0,
        weight_decay: Number = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        packed: nn.Module | None = None,
    ):
        numbers = (lr, momentum, dampening, weight_decay)
        super().__init__(params, packed, numbers, (nesterov, maximize), capturable)

    def _members(self, given: dict[str, Any]) -> list[dict[str, Any]]:
        members = super()._members(given)
        if given["nesterov"] and any(not m["momentum"] or m["dampening"] for m in members):
            raise DecompkError("nesterov needs a momentum above 0 and no dampening for every member.")
        return members

    def _state_names(self, groups: list[dict[str, Any]]) -> tuple[str, ...]:
        return ("momentum_buffer",) if any(group["momentum"] for group in groups) else ()

    def _moves_state(self, group: dict[str, Any]) -> bool:
        return group["momentum"] != 0

    def _update(self, group: dict[str, Any], lr: float | Tensor, first: bool, *columns: list[Tensor]) -> None:
        grads, params, *state = columns
        if first and _capturing():
            raise DecompkError("the first step with momentum differs from the others: take it before capturing one.")
        constants = {name: group[name] for name in (*self._numbers[1:], *self._flags)}
        buffers = state[0] if group["momentum"] else []
        if params[0].device.type == "cpu" and params[0].itemsize == 2:  # torch's fused loop skips them: pytorch#191763
            made: list[Any] = [None] * len(params) if first or not buffers else buffers
            sgd(params, grads, made, foreach=False, lr=float(lr), **constants)
            if first:
                torch._foreach_copy_(buffers, made)
        else:
            torch._fused_sgd_(params, grads, buffers, lr=lr, is_first_step=first, **constants)


class Adam(_MemberOptimizer):
    """torch.optim.Adam for each member of a packed module, all in one step.

    params: the packed module, `decay_groups` of it, or torch's param groups with packed= naming it. lr, eps,
    weight_decay: one number, or a list of K; betas: one pair, or a list of K. Raises DecompkError; PackError for
    parameters that are no stacks.
    """

    _numbers = ("lr", "betas", "eps", "weight_decay")
    _flags = ("amsgrad", "maximize")
    _fused = "_fused_adam_"

    def __init__(
        self,
        params: Groups,
        lr: Number = 1e-3,
        betas: Pair | Sequence[Pair] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        packed: nn.Module | None = None,
    ):
        super().__init__(params, packed, (lr, betas, eps, weight_decay), (amsgrad, maximize), capturable)

    def _state_names(self, groups: list[dict[str, Any]]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * any(group["amsgrad"] for group in groups))

    def _update(self, group: dict[str, Any], lr: float | Tensor, first: bool, *columns: list[Tensor]) -> None:
        grads, params, exp_avgs, exp_avg_sqs, *maxima, steps = columns
        state = (exp_avgs, exp_avg_sqs, *(maxima or [[]]), steps)
        constants = {name: group[name] for name in ("eps", "weight_decay", *self._flags)}
        beta1, beta2 = group["betas"]
        getattr(torch, self._fused)(params, grads, *state, lr=lr, beta1=beta1, beta2=beta2, **constants)


class AdamW(Adam):
    """torch.optim.AdamW for each member of a packed module: Adam with decoupled weight decay, 0.01 unless given."""

    _fused = "_fused_adamw_"

    def __init__(
        self,
        params: Groups,
        lr: Number = 1e-3,
        betas: Pair | Sequence[Pair] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        packed: nn.Module | None = None,
    ):
        how: dict[str, Any] = {"amsgrad": amsgrad, "maximize": maximize, "capturable": capturable, "packed": packed}
        super().__init__(params, lr, betas, eps, weight_decay, **how)


@torch.no_grad()
def clip_grad_norm_(packed: nn.Module, max_norm: Number | Tensor, norm_type: float = 2.0) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ for each member alone; returns their norms before clipping, (K,), on the device.

    max_norm: one value, K values, or a tensor of () or (K,). A member whose norm is not finite touches no other.
    A CUDA graph captures one value, K values after one call with them outside it, and tensors on the device.
    Raises DecompkError.
    """
    packed = inside(packed)
    K = packed._K
    grads = [p.grad for p in packed.parameters() if p.grad is not None]
    max_norm = limits(packed, max_norm, grads[0].device if grads else torch.device("cpu"))
    if not grads:
        return torch.zeros(K)
    members = torch.cat([_rows(grad) for grad in grads], 1)  # one norm for all of it: a launch a stack takes longer
    total = torch.linalg.vector_norm(members, norm_type, dim=1)
    if isinstance(max_norm, Tensor):
        max_norm = max_norm.to(total, non_blocking=True)
    factors = (max_norm / (total + 1e-6)).clamp(max=1.0)
    if total.device.type == "cpu":
        torch._foreach_mul_(grads, [factors.view(K, *[1] * (grad.dim() - 1)) for grad in grads])
    else:
        _scale(grads, factors)
    return total


def _scale(grads: Sequence[Tensor], factors: Tensor) -> None:
    """Stacks (K, …) times factors (K,) in place, in K calls that each launch few kernels; a factor that broadcasts
    would be a launch a stack."""
    for factor, own in zip(factors.unbind(), zip(*map(Tensor.unbind, grads), strict=True), strict=True):
        torch._foreach_mul_(own, factor)


def _rows(grad: Tensor) -> Tensor:
    """A stack (K, …) as (K, n), each member's numbers in the order in which they lie in memory."""
    return grad.permute(_order(grad.stride())).flatten(1) if grad.dim() > 1 else grad.unsqueeze(1)


@functools.lru_cache(maxsize=1024)
def _order(strides: tuple[int, ...]) -> tuple[int, ...]:
    return 0, *sorted(range(1, len(strides)), key=lambda i: -strides[i])


def limits(packed: nn.Module, max_norm: Number | Tensor, device: torch.device) -> float | Tensor:
    """`max_norm` as a CUDA graph can read it: a number, or unequal values on the device, put there once."""
    K = inside(packed)._K
    if isinstance(max_norm, Tensor):
        if max_norm.shape not in ((), (K,)):
            raise DecompkError(
                f"max_norm of {tuple(max_norm.shape)} is neither one value nor one for each of {K} members."
            )
        return max_norm
    values = _per_member("max_norm", max_norm, K)
    return values[0] if len(set(values)) == 1 else _on_device(tuple(values), device)


@functools.lru_cache(maxsize=1024)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The values on the device; kept, so that a captured graph copies nothing from the host."""
    if _capturing():
        raise DecompkError("a CUDA graph can capture clipping by unequal norms after one call with them outside it.")
    return torch.tensor(values, dtype=torch.float64, device=device)


class ParamGroups(list[dict[str, Any]]):
    """What `decay_groups` returns: a list of param groups that knows the packed module of which they are."""

    packed: nn.Module


def decay_groups(packed: nn.Module, weight_decay: Number, least_dims: int = 2) -> ParamGroups:
    """Two param groups: parameters that have `least_dims` dimensions in a member, and the rest, which do not decay.

    For any optimizer over stacks, torch's or one of this module, where weight_decay may be K values:
    `AdamW(decay_groups(packed, 0.05), lr=1e-3)`. Raises PackError.
    """
    packed = inside(packed)
    stacks: tuple[list[Tensor], list[Tensor]] = ([], [])
    for p in packed.parameters():
        stacks[p.dim() <= least_dims].append(p)
    groups = ParamGroups({"params": ps, "weight_decay": d} for ps, d in zip(stacks, (weight_decay, 0.0), strict=True))
    groups.packed = packed
    return groups


class Each:
    """What `each` returns: `optimizers` holds those of member k at [k], for schedulers and hyperparameters."""

    def __init__(self, packed: nn.Module, build: Callable[[nn.Module], Any]):
        self.packed = inside(packed)
        stacks = dict(self.packed.named_parameters())
        self._views: list[dict[str, nn.Parameter]] = []
        self.optimizers: list[list[torch.optim.Optimizer]] = []
        for k, member in enumerate(self.packed.unpack()):
            own = dict(member.named_parameters())
            for name, p in own.items():
                if name not in stacks or stacks[name].shape[1:] != p.shape:
                    raise PackError(
                        f"'{name}' of a member is not a slice of the packed module's: train packed.unpack()."
                    )
                p.data = stacks[name].detach()[k]
            built = _built(build, member)
            self._views.append(own)
            self.optimizers.append(built)

    @torch.no_grad()
    def step(self) -> None:
        """One step of every member's optimizers, in turn."""
        stacks = dict(self.packed.named_parameters())
        for k, (own, optimizers) in enumerate(zip(self._views, self.optimizers, strict=True)):
            for name, p in own.items():
                p.data = stacks[name].detach()[k]  # where the packed module has moved, so do these
                grad = stacks[name].grad
                p.grad = None if grad is None else grad[k]
            for optimizer in optimizers:
                optimizer.step()
            for p in own.values():
                p.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.packed.parameters():
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"members": [[optimizer.state_dict() for optimizer in own] for own in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Raises CheckpointError."""
        saved = state_dict["members"]
        if [len(states) for states in saved] != [len(own) for own in self.optimizers]:
            raise CheckpointError("the checkpoint is of other members or other optimizers.")
        for own, states in zip(self.optimizers, saved, strict=True):
            for optimizer, state in zip(own, states, strict=True):
                optimizer.load_state_dict(copy.deepcopy(state))  # torch's would share the tensors


def each(packed: nn.Module, build: Callable[[nn.Module], Any]) -> Each:
    """Optimizers of any kind, for each member its own, on views of the packed module's parameters.

    `build` gets a member, an ordinary network, and returns its optimizer or a list of them: whatever it counts or
    measures (dimensions, norms, rows and columns, decay groups) is that member's own. K steps instead of one: an
    optimizer that works number by number does the same on the stacks. Not for LBFGS, which must call the network.
    Raises PackError.
    """
    return Each(packed, build)


def _built(build: Callable[[nn.Module], Any], member: nn.Module) -> list[torch.optim.Optimizer]:
    try:
        built = build(member)
    except TypeError as error:
        if not (isinstance(build, type) and issubclass(build, torch.optim.Optimizer)):
            raise
        raise PackError(
            f"each calls build with a member, a network: write lambda net: {build.__name__}(net.parameters()), not "
            f"{build.__name__}."
        ) from error
    found = list(built) if isinstance(built, list | tuple) else [built]
    if not found or not all(callable(getattr(optimizer, "step", None)) for optimizer in found):
        raise PackError(f"build returns {type(built).__name__}: let it return a member's optimizer, or a list of them.")
    return found


def inside(module: Any) -> Packed:
    """The packed module itself, of which torch.compile's and DistributedDataParallel's wrappers prefix the names."""
    found = module
    while isinstance(found, nn.Module) and not isinstance(found, Packed):
        if isinstance(found, nn.DataParallel) and len(found.device_ids) > 1 and found.dim == 0:
            raise PackError("DataParallel joins outputs along the members' dimension: use DistributedDataParallel.")
        found = found._modules.get("_orig_mod", found._modules.get("module"))
    if not isinstance(found, Packed):
        if isinstance(module, nn.Module):
            raise PackError(f"{type(module).__name__} has no members: give the packed module.")
        raise PackError(
            f"{type(module).__name__} has no members: give the packed module itself, not packed.parameters()."
        )
    return found


def _per_member(name: str, value: Any, K: int) -> list[Any]:
    """K values of the hyperparameter `name`: floats, or pairs of them where it is betas."""
    several = isinstance(value, list | tuple)
    if name == "betas":
        several = several and any(isinstance(v, list | tuple) for v in value)
    values = list(value) if several else [value] * K
    if len(values) != K:
        raise DecompkError(f"{name} has {len(values)} values for {K} members: give one for all, or {K}.")
    return [_checked(name, v) for v in values]


def _checked(name: str, value: Any) -> float | Pair:
    try:
        if name == "betas":
            first, second = map(float, value)
            if 0 <= first < 1 and 0 <= second < 1:
                return first, second
        elif float(value) >= 0:
            return float(value)
    except (TypeError, ValueError):
        pass  # neither numbers nor a pair
    what = "a pair of numbers from 0 to below 1" if name == "betas" else "a number from 0 on"
    raise DecompkError(f"{name} {value!r} is not {what}.")


def _cut(t: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """A stack in parts of so many members; single members without their dimension, which costs the host less."""
    if len(sizes) == 1:
        return (t,)
    return t.unbind() if len(sizes) == len(t) else torch.split_with_sizes(t, sizes)


def _check_shape(what: str, t: Tensor, shape: torch.Size) -> None:
    if t.shape != shape:
        raise CheckpointError(f"{what} is {tuple(t.shape)} in the checkpoint and {tuple(shape)} here.")


def _layout(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.dtype, t.device


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
