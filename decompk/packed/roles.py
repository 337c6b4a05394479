"""Which arguments of a call belong to the batch, found by what one member does with other numbers of samples."""

from __future__ import annotations

import itertools

from torch import Tensor

from .trial import SAME, Role, Rows, Trial


class Unknown(Exception):
    """The members alone do not run on other numbers of samples, so nothing can be told."""


def find_roles(trial: Trial) -> tuple[Role, ...]:
    """The role of every tensor argument, found by what one member does with other numbers of samples.

    Raises Unknown.
    """
    options = [_options(trial, i, t) for i, t in enumerate(trial.tensors)]
    if all(len(o) == 1 for o in options):
        return tuple(o[0] for o in options)
    for choice in itertools.islice(itertools.product(*options), 32):
        if trial.runs(choice):
            break
    else:
        raise Unknown
    found = list(choice)
    for i, role in enumerate(choice):
        if role is not SAME and i != trial.anchor and SAME in options[i]:
            free = trial.runs(found, left=i)
            alone = [*found[:i], SAME, *found[i + 1 :]]
            if free and trial.runs(alone):
                found[i] = SAME
    return tuple(found)


def takes(trial: Trial) -> bool:
    """Whether a member alone takes its parts of the arguments, whatever their roles."""
    options = [_options(trial, i, t) for i, t in enumerate(trial.tensors)]
    return any(trial.runs(choice) for choice in itertools.islice(itertools.product(*options), 32))


def _options(trial: Trial, i: int, t: Tensor) -> list[Role]:
    """What a tensor may be, by its shape alone, the likeliest first."""
    if i == trial.anchor:
        return [Rows(0, not trial.shared)]
    K, N, shape = trial.K, trial.N, tuple(t.shape)
    own = [Rows(d, True) for d in (0, 1) if shape[:1] == (K,) and shape[1 + d : 2 + d] == (N,)]
    shared = [Rows(d, False) for d in (0, 1) if shape[d : d + 1] == (N,)]
    return [*(shared + own if trial.shared else own + shared), SAME]


def find_roles_apart(trial: Trial) -> tuple[Role, ...]:
    """Which tensors are the members' own, where members run one by one: only what no member takes whole.

    Raises Unknown where a member takes them in no way.
    """
    options: list[list[Role]] = []
    for i, t in enumerate(trial.tensors):
        own = i == trial.anchor and not trial.shared
        batch = not trial.shared and t.shape[:2] == (trial.K, trial.N)
        choice = [SAME, Rows(None, True)] if t.shape[:1] == (trial.K,) and i != trial.anchor else [SAME]
        options.append([Rows(None, True)] if own else choice[::-1] if batch else choice)
    reasons = []
    for roles in itertools.islice(itertools.product(*options), 32):
        try:
            with trial.under(roles=roles):
                trial.alone()
        except Exception as error:  # whatever a network raises at arguments that do not fit each other
            reasons.append(error)
        else:
            trial.refuse_changes()
            return roles
    raise Unknown from reasons[0]
