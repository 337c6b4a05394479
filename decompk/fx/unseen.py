"""Running a network beside the user's own calls: when that may be, and how nobody notices."""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C import _autograd
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..threads import one_at_a_time


def possible(tensors: Sequence[Tensor]) -> bool:
    """Whether a network may be run here on a few samples: nothing traces or transforms the call."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(type(t) not in (Tensor, nn.Parameter) or t.is_meta for t in tensors)
        or (torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Whatever runs inside is seen by no mode that counts or records, nor by hooks of all modules or saved tensors.

    Hooks of all modules are the process's: one thread at a time goes without them.
    """
    with one_at_a_time(), _unseen():
        yield


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    hooks = [getattr(nn.modules.module, name) for name in _GLOBAL_HOOKS]
    known = [dict(h) for h in hooks]
    functions, grad = _get_current_function_mode_stack(), torch.is_grad_enabled()
    with contextlib.ExitStack() as stack:
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        for _ in functions:
            _pop_mode()
        try:
            for mode in functions:
                if isinstance(mode, DeviceContext):  # where new tensors are made
                    stack.enter_context(DeviceContext(mode.device))
            for h in hooks:
                h.clear()
            # parameters that are made anew must not be inference tensors: nobody could train them
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(grad))
            stack.enter_context(_no_saved_tensors_hooks())
            yield
        finally:
            stack.close()
            for h, before in zip(hooks, known, strict=True):
                h.update(before)
            for mode in functions:
                _push_mode(mode)


_GLOBAL_HOOKS = [f"_global_{when}_hooks" for when in ("backward_pre", "backward", "forward_pre", "forward")]


@contextlib.contextmanager
def _no_saved_tensors_hooks() -> Iterator[None]:
    """Take hooks away, for hooks on top that give a tensor itself would tie a graph to what it saves, never freed."""
    hooks = []
    while (top := _autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        _autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            _autograd._push_saved_tensors_default_hooks(pack, unpack)


@contextlib.contextmanager
def seeded(seed: int, devices: Collection[torch.device]) -> Iterator[None]:
    """Whatever runs inside draws from `seed`, of torch, Python and NumPy, and leaves their random states alone.

    These are the process's: what another thread draws meanwhile comes from `seed`, too, and not from its place.
    """
    state, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpys)  # noqa: NPY002


class OwnDraws(TorchDispatchMode):
    """What its thread draws of torch on a CPU comes from a generator of its own, seeded with 0, and is noted.

    It takes a second to load what modes need, and a fifth of the time from there on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn, self._generator = False, torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            self.drawn = True
            if not _takes_generator(func):
                func = getattr(func.overloadpacket, "generator", func)
            if _takes_generator(func) and _device(args, kwargs).type == "cpu":
                kwargs = {**kwargs, "generator": self._generator}
        return func(*args, **kwargs)


def _takes_generator(func: Any) -> bool:
    return any(argument.name == "generator" for argument in func._schema.arguments)


def _device(args: tuple, kwargs: dict[str, Any]) -> torch.device:
    """Where an operator computes."""
    tensor = next((arg for arg in args if isinstance(arg, Tensor)), None)
    return torch.device(kwargs.get("device") or "cpu") if tensor is None else tensor.device


def undrawn(run: Callable[[], Any]) -> tuple[Any, bool]:
    """(what `run` returns, whether it draws from Python's or torch's random states, which are then as before).

    Another thread may have drawn while it ran. So it runs again, where what its own thread draws can be told apart; and
    where Python's numbers are drawn and this thread is not seen to, a few times more, for longer: others hardly draw as
    many each time.
    """
    pythons, torchs = random.getstate(), torch.get_rng_state()
    pythons_drawn = torchs_drawn = True
    try:
        out = run()
        if random.getstate() == pythons and torch.equal(torch.get_rng_state(), torchs):
            pythons_drawn = torchs_drawn = False
            return out, False
        watch, taken = OwnDraws(), set()
        for i in range(6):
            before = random.getstate()
            with watch, _own_calls() as calls:
                out = run()
            time.sleep(1e-3 * i)  # in which others draw more, and it draws no more
            after = random.getstate()
            pythons_drawn, torchs_drawn = before != after, watch.drawn
            if calls() or not pythons_drawn:
                break
            taken.add((after[1][-1] - before[1][-1]) % 624)  # how many numbers of 32 bits
            if len(taken) > 1:
                pythons_drawn = False
                break
        return out, pythons_drawn or torchs_drawn
    finally:
        if pythons_drawn:
            random.setstate(pythons)
        if torchs_drawn:
            torch.set_rng_state(torchs)


@contextlib.contextmanager
def _own_calls() -> Iterator[Callable[[], int]]:
    """How often this thread's Python code has called Python's own generator meanwhile; nothing of a profiler's is lost.

    What calls it by way of C, as functools.partial does, or in a thread of its own, is not seen.
    """
    calls = 0

    def note(frame: Any, event: str, function: Any) -> None:
        nonlocal calls
        if event == "c_call" and function.__name__ != "getstate":
            calls += getattr(function, "__self__", None) is random._inst
        elif event == "call" and frame.f_code.co_filename == random.__file__ and frame.f_code.co_name != "getstate":
            calls += frame.f_locals.get("self") is random._inst  # gauss may draw nothing, and give what it kept

    if sys.getprofile() is not None:
        yield lambda: calls
        return
    sys.setprofile(note)
    try:
        yield lambda: calls
    finally:
        sys.setprofile(None)
