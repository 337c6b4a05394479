"""Members on worker threads, forward and backward: each member on one thread, through its whole network."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _autograd

from ..fx.pytree import tree_map
from .apart import Call

Result = TypeVar("Result")

# Where torch does not say whether a graph is needed again, it is kept for as long as its output is.
_keeps_graph: Callable[[], bool] = getattr(_autograd, "_get_current_graph_task_keep_graph", lambda: True)


class OnThreads:
    """Members dealt to min(K, torch's threads) workers, each of which computes on one thread."""

    name = "on threads"

    def why_not(self, call: Call) -> str | None:
        if _workers(call.packed._K) == 1:
            return "there is one member, or one thread to run on"
        if call.standing.is_sparse:
            return "it has sparse gradients"
        return call.standing.why_not_for(call)

    def run(self, call: Call) -> Any:
        packed, x = call.packed, call.x
        members, gradients = call.standing.members(packed), torch.is_grad_enabled()
        read = x.detach().requires_grad_() if gradients and x.requires_grad else x
        own = call.parts(read)
        with members._turn:  # they hold the slices of one call
            members._bring_over()
            laid = members._lay_in(call.standing.leaves if gradients else None)
            deal = Deal(packed._K)
            outputs = each(packed._K, lambda k: members._members[k](own[k]), deal)
            written = [members._write_back(laid, k) for k in range(packed._K)]
            if any(written) or len(laid) < len(members._places):
                members._renew()
        columns: list[tuple] = []
        tree_map(lambda *leaves: columns.append(leaves) if _needs_gradient(leaves) else None, *outputs)
        if not columns:
            return tree_map(packed._stack, *outputs)
        inputs = [_Input(x, [read] * packed._K if call.shared else own)] if x.requires_grad else []
        inputs += {id(one.stack): _Input(one.stack, one.parts) for one in laid if one.stack.requires_grad}.values()
        graph = _Graph([_Output(column, packed._stack) for column in columns], inputs, deal)
        stacked = iter(graph.joined())
        return tree_map(lambda *leaves: next(stacked) if _needs_gradient(leaves) else packed._stack(*leaves), *outputs)


def _needs_gradient(leaves: Sequence[Any]) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)


@dataclass
class _Input:
    """A tensor that gets a gradient, and what each member reads of it: a slice of a stack (K, …), or all of it."""

    whole: Tensor
    own: Sequence[Tensor]

    @property
    def is_stack(self) -> bool:
        return self.own[0].shape != self.whole.shape

    def join(self, *parts: Tensor) -> Tensor:
        """The gradient of the whole, of those of what the members read."""
        return torch.stack(parts) if self.is_stack else functools.reduce(torch.add, parts)


@dataclass
class _Output:
    """What the K members return in one place, and how that is made one tensor."""

    own: Sequence[Tensor]
    join: Callable[..., Tensor]


@dataclass
class _Graph:
    """The members' own graphs, from what they read of `inputs` to their `outputs`; autograd sees one node of it."""

    outputs: list[_Output]
    inputs: list[_Input]
    deal: Deal | None = None  # by whom they were computed
    kept: bool = False  # for gradients of gradients, whose graphs go through this one

    def joined(self) -> tuple[Tensor, ...]:
        return _Joined.apply(self, *(one.whole for one in self.inputs))

    def gradients(self, needed: Sequence[bool], given: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradient of every input that is needed, from those of the joined outputs."""
        inputs = [one for one, need in zip(self.inputs, needed, strict=True) if need]
        pairs = [(output, g) for output, g in zip(self.outputs, given, strict=True) if g is not None]
        outputs = [output for output, _ in pairs]
        if torch.is_grad_enabled():
            found = self._with_graph(outputs, [_of_each(output, g) for output, g in pairs], inputs)
        else:
            found = self._without(outputs, [_of_each(output, g) for output, g in pairs], inputs)
        ours = iter(found)
        return [next(ours) if need else None for need in needed]

    def _without(self, outputs: list[_Output], given: list[_Input], inputs: list[_Input]) -> list[Tensor | None]:
        keeps = self.kept or _keeps_graph()
        wholes = [torch.empty_like(one.whole) if one.is_stack else None for one in inputs]
        places = [None if whole is None else whole.unbind(0) for whole in wholes]

        def of_member(k: int) -> Sequence[Tensor | None]:
            found = _gradients(k, outputs, given, inputs, keeps, creates=False)
            pairs = [(p[k], part) for p, part in zip(places, found, strict=True) if p is not None and part is not None]
            if pairs:
                torch._foreach_copy_(*zip(*pairs, strict=True))
            return [part if p is None or part is None else p[k] for p, part in zip(places, found, strict=True)]

        columns = list(zip(*each(self._K, of_member, Deal(self._K, self.deal)), strict=True))
        return [_whole(one, whole, parts) for one, whole, parts in zip(inputs, wholes, columns, strict=True)]

    def _with_graph(self, outputs: list[_Output], given: list[_Input], inputs: list[_Input]) -> list[Tensor | None]:
        """The same with a graph of its own, from these gradients and all inputs to the gradients that are returned."""
        self.kept = True
        given = [_Input(one.whole, [part.detach().requires_grad_() for part in one.own]) for one in given]
        rows = each(self._K, lambda k: _gradients(k, outputs, given, inputs, keeps=True, creates=True))
        columns = list(zip(*rows, strict=True))
        there = [any(part is not None for part in column) for column in columns]
        results = [
            _Output(
                [torch.zeros_like(own) if p is None else p for p, own in zip(column, one.own, strict=True)], one.join
            )
            for one, column, is_there in zip(inputs, columns, there, strict=True)
            if is_there
        ]
        found = iter(_Graph(results, [*given, *self.inputs], kept=True).joined())
        return [next(found) if is_there else None for is_there in there]

    @property
    def _K(self) -> int:
        return len(self.outputs[0].own)


def _of_each(output: _Output, g: Tensor) -> _Input:
    """The gradient of a joined output as the members' own outputs get it."""
    return _Input(g, g.unbind(0) if g.shape != output.own[0].shape else [g] * len(output.own))


def _gradients(
    k: int, outputs: list[_Output], given: list[_Input], inputs: list[_Input], keeps: bool, creates: bool
) -> Sequence[Tensor | None]:
    """What member k's own graph gives of `inputs`."""
    pairs = [(o.own[k], g.own[k]) for o, g in zip(outputs, given, strict=True) if o.own[k].requires_grad]
    if not pairs:
        return [None] * len(inputs)
    roots, theirs = zip(*pairs, strict=True)
    leaves = [one.own[k] for one in inputs]
    return torch.autograd.grad(roots, leaves, theirs, keeps, create_graph=creates, allow_unused=True)


def _whole(one: _Input, whole: Tensor | None, parts: Sequence[Tensor | None]) -> Tensor | None:
    """The gradient of all members; None where no member has one."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if whole is None:
        return one.join(*present)
    for k, part in enumerate(parts):
        if part is None:
            whole[k].zero_()
    return whole


class _Joined(torch.autograd.Function):
    """(graph, *its inputs) → its outputs, each joined."""

    @staticmethod
    def forward(ctx, graph: _Graph, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.graph = graph
        ctx.set_materialize_grads(False)
        return tuple(output.join(*(t.detach() for t in output.own)) for output in graph.outputs)

    @staticmethod
    def backward(ctx, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.graph.gradients(ctx.needs_input_grad[1:], given)


# ---- workers --------------------------------------------------------------------------------------------------------


class Deal:
    """Members to run, each by whichever worker comes next; or, behind a deal that is over, by the one that ran it.

    There a worker begins with its last, of which most is in its cache, and then takes over others' first ones.
    """

    def __init__(self, K: int, before: Deal | None = None):
        self.ran: dict[int, list[int]] = {}  # by worker, in its order
        self._own = {worker: deque(ran) for worker, ran in (before.ran if before else {}).items()}
        self._rest = deque(sorted({*range(K)}.difference(*self._own.values())))

    def next(self) -> int | None:
        """A member for the calling worker; None where none is left."""
        me = threading.get_ident()
        others = sorted((own for worker, own in self._own.items() if worker != me), key=len, reverse=True)
        for queue, take in ((self._own.get(me), deque.pop), *((one, deque.popleft) for one in (self._rest, *others))):
            with contextlib.suppress(IndexError):  # another has been faster
                if queue:
                    k = take(queue)
                    self.ran.setdefault(me, []).append(k)
                    return k
        return None

    def stop(self) -> None:
        for queue in (self._rest, *self._own.values()):
            queue.clear()


def each(K: int, run: Callable[[int], Result], deal: Deal | None = None) -> list[Result]:
    """[run(0), …, run(K - 1)] on the workers, under this thread's modes; raises what the first to fail raises."""
    count = _workers(K)
    if count == 1:  # a worker itself, too, which must not wait for its own
        return [run(k) for k in range(K)]
    deal, enter = deal or Deal(K), _modes()
    results: dict[int, Result] = {}
    failures: dict[int, BaseException] = {}

    def work() -> None:
        with enter():
            while (k := deal.next()) is not None:
                try:
                    results[k] = run(k)
                except BaseException as error:
                    failures[k] = error

    futures = [_pool(count).submit(contextvars.copy_context().run, work) for _ in range(count)]
    try:
        wait(futures)
    finally:
        deal.stop()
        wait(futures)  # after an interrupt: they use what the caller goes on with
    if failures:
        raise failures[min(failures)]
    for one in futures:
        one.result()
    return [results[k] for k in range(K)]


def _workers(K: int) -> int:
    return min(K, torch.get_num_threads())


def _modes() -> Callable[[], contextlib.AbstractContextManager]:
    """What puts another thread under this one's modes."""
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None

    @contextlib.contextmanager
    def enter() -> Any:
        with contextlib.ExitStack() as stack:
            if inference:
                stack.enter_context(torch.inference_mode())
            if dtype is not None:
                stack.enter_context(torch.autocast("cpu", dtype))
            stack.enter_context(torch.set_grad_enabled(gradients))
            yield

    return enter


_pools: dict[int, ThreadPoolExecutor] = {}
_starting = threading.Lock()


def _pool(count: int) -> ThreadPoolExecutor:
    with _starting:
        if count not in _pools:
            _pools[count] = _started(count)
        return _pools[count]


def _started(count: int) -> ThreadPoolExecutor:
    threads = torch.get_num_threads()
    all_started = threading.Barrier(count)

    def alone() -> None:
        torch.set_num_threads(1)  # counts for this thread, and for those that come after
        torch.get_num_threads()  # else its first operator asks for as many threads as there are by then
        all_started.wait()

    pool = ThreadPoolExecutor(count, "decompk member", alone)
    list(pool.map(lambda _: None, range(count)))
    torch.set_num_threads(threads)
    return pool


def _renew() -> None:
    """In a forked child, where the workers are no more."""
    global _starting
    _pools.clear()
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):  # Windows has none
    os.register_at_fork(after_in_child=_renew)
