"""What a member alone computes on a few samples, and whether its part of what all compute packed is that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..fx.pytree import tensors_of
from ..fx.wrapper import Shell
from .surgery import member_alone
from .trial import Trial
from .watch import Narrowest

# A ReLU's kink or a norm of few samples turns rounding into some of a gradient; what mixes members changes most.
COARSE, SMALL = 0.2, 0.02  # of a parameter's gradient, which counts as that share of all gradients at least


class TooPrecise(Exception):
    """What fails in higher precision than the user's, and not in the user's."""


class Figure(NamedTuple):
    """A tensor of the last member, and what rounding may do to it as a whole: see `Figures.close`."""

    value: Tensor
    share: float | None = None
    least: float = 0.0


class Figures:
    """What a trial's last member is compared by: (kind, path, name) → a tensor.

    Of kind "output"; "kept" in a buffer or an attribute; or "gradient". expected: those of the member alone.
    """

    def __init__(self, trial: Trial):
        self.trial = trial
        self.expected: dict[tuple, Figure] = {}

    def alone(self, out: Any) -> dict[tuple, Figure]:
        """Of the member that has run alone and returned `out`."""
        net, outputs = self.trial.member, tensors_of(out)
        gradients = self._gradients([outputs], net, stacked=False)
        figures = {("output", "", i): Figure(t.detach()) for i, t in enumerate(outputs)}
        figures |= {("kept", path, name): Figure(t.detach()) for path, name, t in _kept(net)}
        self.trial.member = None  # which may be large
        least = SMALL * sum(float(torch.linalg.vector_norm(g)) ** 2 for g in gradients) ** 0.5
        return figures | {("gradient", "", i): Figure(g, COARSE, least) for i, g in enumerate(gradients)}

    def together(self, out: Any, outs: Sequence[int | None]) -> dict[tuple, Tensor]:
        """Of the last of the members that have run packed and returned `out`, with samples in dimensions `outs`."""
        net, K = self.trial.packed, self.trial.K
        apart = [
            [packed] * K if place is None else packed.unflatten(place, (K, -1)).unbind(place)
            for packed, place in zip(tensors_of(out), outs, strict=True)
        ]
        gradients = self._gradients(list(zip(*apart, strict=True)), net, stacked=True)
        figures = {("output", "", i): parts[-1].detach() for i, parts in enumerate(apart)}
        figures |= self.kept_together()
        self.trial.packed = None
        return figures | {("gradient", "", i): g for i, g in enumerate(gradients)}

    def kept_together(self) -> dict[tuple, Tensor]:
        figures = {}
        for path, name, t in _kept(member_alone(self.trial.packed, self.trial.K - 1, copies=False)):
            known = self.expected.get(("kept", path, name))
            place = self.trial.place(t.shape, known.value.shape) if known else "nowhere"
            if place != "nowhere":  # an attribute may hold all members' rows
                figures["kept", path, name] = self.trial.mine(t, place).detach()
        return figures

    def wrong(self, found: dict[tuple, Tensor], eps: float = 0.0) -> list[tuple]:
        """Which of the expected are not found."""
        return [name for name, figure in self.expected.items() if not self.close(found.get(name), *figure, eps)]

    def by_chance(self) -> bool:
        """Whether the network draws random numbers."""
        again = {name: figure.value for name, figure in self.alone(self.trial.alone(seed=1)).items()}
        return any(name in again for name in self.wrong(again))

    def by_rounding(self, found: dict[tuple, Tensor]) -> bool:
        """Whether `found` is the last member's figures but for rounding, of which a network may make much.

        How much is seen where its parameters are off by a few roundings of the narrowest dtype that it computes in.
        """
        narrow = Narrowest()
        try:
            self.trial.alone(watch=lambda net: narrow)
        except Exception:  # whatever code raises that does not run in a mode
            narrow.eps = max(narrow.eps, torch.finfo(torch.float32).eps)
        eps = narrow.eps
        wrong = self.wrong(found, eps)
        nudged = self.alone(self.trial.alone(nudge=8 * eps)) if wrong else {}
        for name in wrong:
            expected = self.expected[name]
            mine, single, moved = found.get(name), expected.value, nudged.get(name, expected).value
            if mine is None or not mine.shape == single.shape == moved.shape or not single.is_floating_point():
                return False
            error, response = ((t - single).abs().nan_to_num().max() for t in (mine, moved))
            if error > min(100, 0.125 / eps) / 8 * response:  # deep networks came to 22 roundings
                return False
        return True

    def close(
        self, ours: Tensor | None, theirs: Tensor, share: float | None = None, least: float = 0.0, eps: float = 0.0
    ) -> bool:
        """Whether only rounding parts two tensors: by the root of an epsilon, of the largest value.

        eps: the least epsilon, of which their dtype's may be larger. share: allowed instead, of the vector's length,
        which counts as `least` if it is shorter.
        """
        if ours is None or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return False
        if not theirs.is_floating_point() and not theirs.is_complex():
            return theirs.numel() == 0 or bool((ours != theirs).double().mean() < 0.05)
        finite = theirs.isfinite() & ours.isfinite()
        error, size = (torch.where(finite, t, 0).abs() for t in (ours - theirs, theirs))
        if share is not None:
            return bool(error.double().norm() <= share * max(float(size.double().norm()), least))
        eps = max(eps, torch.finfo(self.trial.computed(ours)).eps)
        return theirs.numel() == 0 or bool(error.max() <= eps**0.5 * size.max())

    def _gradients(self, members: Sequence[Sequence[Tensor]], net: nn.Module, stacked: bool) -> list[Tensor]:
        """The last member's gradients of one number made of all outputs; none where they are not asked for.

        members: each member's outputs. stacked: whether net's parameters are all members', else they are its own.
        """
        parameters = [p for p in net.parameters() if p.requires_grad]
        if not self.trial.grad or not parameters:
            return []
        try:
            with self.trial.conditions(0):
                loss = sum(
                    (t * torch.cos(torch.arange(t.numel(), device=t.device, dtype=t.dtype) + i).view(t.shape)).sum()
                    for outputs in members
                    for i, t in enumerate(outputs)
                    if t.requires_grad and t.is_floating_point()
                )
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
        except torch.OutOfMemoryError as error:
            raise TooPrecise if self.trial.dtype else error from None
        except Exception:  # whatever a backward raises, also where no output follows a parameter
            return []
        whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        own = [g[self.trial.K - 1] for g in whole] if stacked else whole
        return [g.float() if g.dtype == self.trial.dtype else g for g in own]  # which holds less


def _kept(net: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(path, name, tensor) of the buffers, and of what forward leaves in attributes."""
    for path, module in net.named_modules():
        held = {} if isinstance(module, Shell) else vars(module)
        for name, value in (*module._buffers.items(), *held.items()):
            if isinstance(value, Tensor):
                yield path, name, value
