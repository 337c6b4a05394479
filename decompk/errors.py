"""What a user's mistake raises: one sentence that says what, where and what to do."""

from __future__ import annotations

import functools
from collections.abc import Callable


class DecompkError(Exception):
    """Base of every error a user can cause; the command line prints it and exits with 2."""


class UnsupportedOperation(DecompkError):
    """An operation whose channels cannot be divided among members; names the node and its source line."""


class PartitionError(DecompkError):
    """A cut that does not fit: channels that do not divide, crops outside the input or of unequal size."""


class MisfitError(PartitionError):
    """A member cannot run on its crop: with other crops, or at another size of the input, it may."""


class PackError(DecompkError):
    """Networks that cannot share one packed module; names the tensor that differs."""


class CheckpointError(DecompkError):
    """A checkpoint that is truncated, foreign or of another configuration."""


class BackendError(DecompkError):
    """A backend that was asked for by name cannot run here, or cannot run this operation."""


# What torch raises where shapes do not fit; the meta kernels of some versions assert.
MISFITS = (RuntimeError, AssertionError, IndexError, ValueError)


def name_of(function: Callable) -> str:
    """What a user calls a function, of whatever kind."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def brief(error: BaseException | None) -> str:
    """The first line that `error` says, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
