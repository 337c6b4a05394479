"""Running a network beside the user's own calls: when that may be, and how nobody notices."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch._C import _autograd
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes


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
    """Whatever runs inside is seen by no mode that counts or records, nor by hooks of all modules or saved tensors."""
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
    """Whatever runs inside draws from `seed`, of torch, Python and NumPy, and leaves their random states alone."""
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
