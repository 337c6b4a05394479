"""What a form of a convolution is: how K convolutions may be computed, when, at what price, and the doing of it.

A form works on NHWC views: x (K, N, H, W, C), weight dense (K, O, kh, kw, C), y (K, N, H', W', O); `call.Call` makes
them. A new form is one file with a class, and one line in `kernels.conv.FORMS`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from ...cost.formulas import OpCost, conv_bytes, conv_flops
from .. import device as devices
from ..device import Device
from ..launch import GRID_LIMIT
from ..problem import PLAIN, Config, Epilogue, Offsets, Problem, Prologue, cdiv
from ..resources import MOST, Resources, compiled
from .model import LATENCY_MS, LAUNCH_MS, Work

C = TypeVar("C", bound="Config | None")
Terms = tuple[tuple[str, float], ...]  # what a prediction is made of, and its milliseconds


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one pass on a GPU, by a model, not measured; what binds it; its cost where that is modelled."""

    ms: float
    reason: str
    cost: OpCost | None = None
    terms: Terms = ()


class Form(Protocol[C]):
    """One way to compute K convolutions, all passes or some: `why_not` says which. C: Config, or None."""

    name: str
    backend: str  # one of `backend.BACKENDS`
    devices: tuple[str, ...]  # torch device types whose tensors it takes where no backend is asked for
    configurable: bool  # whether it takes a Config; else its config is None
    one_image: bool  # whether it takes a pointwise convolution's pixels as one image: `Problem.one_image`
    gradient_epilogue: bool  # whether its dgrad takes a GradientEpilogue behind dx, whose tensors lie as dx does

    def missing(self) -> str | None:
        """Why it is not installed, built or buildable here; None if it is there."""

    def why_not(self, problem: Problem, config: C, device: Device) -> str | None:
        """Why it may not run `problem` with `config`; None if it may. Asked by choice, tuner, tables and tests."""

    def configs(self, problem: Problem) -> Sequence[C]:
        """Candidates from shapes alone, best guess first; [None] without Configs."""

    def predict(self, problem: Problem, config: C, device: Device) -> Prediction:
        """What a legal (problem, config) takes on a GPU; infinite where it is not worth trying."""

    def moments_pieces(self, problem: Problem, config: C) -> int:
        """S of Epilogue.moments, or of GradientEpilogue.sums."""

    def sums(self, config: C) -> int:
        """How many float32 partial sums (S, K, O, kh, kw, C) wgrad writes; 0 where it writes dw itself."""

    def fprop(
        self,
        problem: Problem,
        config: C,
        x: Tensor,
        weight: Tensor,
        y: Tensor,
        epilogue: Epilogue = PLAIN,
        prologue: Prologue | None = None,
        offsets: Offsets | None = None,
    ) -> Tensor:
        """y = epilogue(conv(prologue(x), weight)): y itself, or another tensor of its shape where that saves a copy.

        With `offsets`, of crops, x is the shared image (1, N, H_image, W_image, C).
        """

    def dgrad(self, problem: Problem, config: C, dy: Tensor, weight: Tensor, dx: Tensor) -> Tensor:
        """dx from dy (K, N, H', W', O) and weight: dx itself, or another tensor of its shape."""

    def wgrad(
        self,
        problem: Problem,
        config: C,
        dy: Tensor,
        x: Tensor,
        out: Tensor,
        offsets: Offsets | None = None,
    ) -> Tensor:
        """dw from dy, and x as in `fprop`: into `out`, dw (K, O, kh, kw, C) or its partial sums; or another dw."""


@dataclass(frozen=True)
class Choice:
    """Who runs a Problem: a form with its Config; `ms` is predicted or measured."""

    form: Form[Any]
    config: Config | None
    ms: float
    reason: str
    cost: OpCost | None = None
    terms: Terms = ()

    @property
    def backend(self) -> str:
        return self.form.backend

    @functools.cached_property
    def sums(self) -> int:
        """`Form.sums` of the config."""
        return self.form.sums(self.config)


RATES = {"float32": 0.06, "tf32": 0.5}  # of the dense 16-bit rate: exact float32 has no tensor cores


def matrix_rate(problem: Problem, device: Device) -> float:
    """TFLOP/s of matrix products in the problem's dtype."""
    return device.tensor_tflops * RATES.get(problem.dtype, 1)


PIECES = 512  # that the kernel which merges moments reads at once
# Found by compiling for sm_90. Instructions of a warp for moments: so many, and for each sum of a thread; registers of
# a thread where no table has the kernel: so many, for each sum, and for each sum whose moments are taken.
MOMENTS, MOMENTS_A_SUM = 150, 17
BASE, A_SUM, A_FUSED_SUM = 40, 1.2, 1.0


def merge_ms(problem: Problem, pieces: int, device: Device) -> float:
    """Milliseconds to write pieces of what is fused and to read them again; the launch that does it runs anyway."""
    values = problem.K * (3 * problem.O if problem.kind == "fprop" else 2 * problem.C)
    return 8 * pieces * values / device.l2_gbps / 1e6 + (cdiv(pieces, PIECES) - 1) * LATENCY_MS


class _Listed:
    """Forms are the same by name and backend: a Choice may have been pickled or copied."""

    name: str
    backend: str

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), self.name, self.backend))


class PlainForm(_Listed):
    """What the forms without Configs share."""

    configurable = False
    one_image = False
    gradient_epilogue = False

    def missing(self) -> str | None:
        return None

    def configs(self, problem: Problem) -> list[None]:
        return [None]

    def moments_pieces(self, problem: Problem, config: None) -> int:
        return 1

    def sums(self, config: None) -> int:
        return 0


class KernelForm(_Listed, ABC):
    """A form that is a kernel of our own on a GPU: it has Configs, and a model of what each of them does.

    thread_bytes: what a thread may add up or load in one step by compute capability, found by compiling: on sm_80 the
    addresses take registers; on sm_100, where sums live in tensor memory, the assembler plans for more programs than
    shared memory holds.
    """

    name: str
    backend = "triton"
    devices: tuple[str, ...] = ("cuda",)
    configurable = True
    one_image = True
    gradient_epilogue = True
    thread_bytes: ClassVar[dict[int, int]] = {}
    wants_copy_engine = True  # for tiles of 4-byte values: without one their addresses spill
    l2_slowdown = 1.0  # of loads of single values instead of blocks

    def missing(self) -> str | None:
        return devices.why_no_triton()

    @abstractmethod
    def fits(self, problem: Problem, config: Config) -> str | None:
        """Why this form cannot run `problem` with `config`, on whatever device; None if it can."""

    @abstractmethod
    def configs(self, problem: Problem) -> list[Config]: ...

    @abstractmethod
    def programs(self, problem: Problem, config: Config) -> int:
        """Programs of the launch that multiplies matrices."""

    @abstractmethod
    def executed_flops(self, problem: Problem, config: Config) -> int:
        """What the matrix products compute, padding of tiles and blocks included."""

    @abstractmethod
    def l2_bytes(self, problem: Problem, config: Config) -> int:
        """What programs load."""

    @abstractmethod
    def step_bytes(self, problem: Problem, config: Config) -> int:
        """What a program loads in one step of its loop."""

    @abstractmethod
    def shared_bytes(self, problem: Problem, config: Config) -> int:
        """An upper bound of a program's shared memory."""

    @abstractmethod
    def thread_sums(self, problem: Problem, config: Config) -> int:
        """Values that a thread adds up."""

    def thread_values(self, problem: Problem, config: Config) -> int:
        """Values that a thread adds up or loads in one step, where `thread_bytes` limits them."""
        raise NotImplementedError

    def thread_limit(self, problem: Problem, capability: int) -> int | None:
        """Bytes of `thread_values`; None where nothing spills."""
        return self.thread_bytes.get(capability)

    @abstractmethod
    def moments_pieces(self, problem: Problem, config: Config) -> int: ...

    def sums(self, config: Config) -> int:
        return 1 if config.atomic else config.splits

    def sum_bytes(self, problem: Problem, config: Config) -> int:
        """float32 sums that all programs of wgrad store, or add to others'."""
        return 4 * 32 * config.warps * self.thread_sums(problem, config) * self.programs(problem, config)

    def launches(self, problem: Problem, config: Config) -> int:
        """Of a pass in training: wgrad's splits are summed up, unless they are added to what another launch cleared."""
        return 1 + (problem.kind == "wgrad" and self.sums(config) > 1)

    def resources(self, problem: Problem, config: Config, device: Device) -> Resources:
        """Of a CTA: as compiled where a table has it, else by a rule of thumb."""
        if found := compiled(problem, config, device.capability):
            return found
        sums = self.thread_sums(problem, config)
        if problem.fused:
            plain = self.resources(replace(problem, fused=""), config, device)
            return Resources(min(MOST, plain.registers + int(A_FUSED_SUM * sums)), plain.shared)
        loaded = self.l2_bytes(problem, config) // self.programs(problem, config)  # no more is kept of one program
        shared = max(loaded, 32 * config.warps * sums * problem.element_size)  # nor of what it writes
        return Resources(min(MOST, BASE + int(A_SUM * sums)), min(shared, self.shared_bytes(problem, config)))

    def ctas(self, problem: Problem, config: Config, device: Device) -> int:
        """That a multiprocessor holds at once."""
        return self.resources(problem, config, device).ctas(config.warps, device)

    def powers(self, config: Config) -> tuple[int, ...]:
        """What of a config has to be powers of two."""
        return *config.tile, config.block_in, config.block_out

    def rate(self, problem: Problem, config: Config, device: Device) -> float:
        """The part of the device's matrix rate that the kernel reaches."""
        return 1.0

    def why_not(self, problem: Problem, config: Config, device: Device) -> str | None:
        if config is None or config.form != self.name:
            return f"{config} is no config of the {self.name} form"
        blocks = self.powers(config)
        if any(b < 1 or b & (b - 1) for b in blocks):
            return f"blocks {blocks} are not powers of two"
        if config.splits < 1 or (config.splits > 1 and problem.kind != "wgrad"):
            return "only wgrad is split"
        if config.atomic and (problem.deterministic or problem.kind != "wgrad"):
            return "atomic sums are for wgrad, where order may vary"
        if reason := self.fits(problem, config):
            return reason
        if self.wants_copy_engine and problem.element_size == 4 and not device.descriptors:
            return "without a copy engine the addresses of 4-byte tiles spill"
        limit = self.thread_limit(problem, max(c for c in devices.KNOWN if c <= max(80, device.capability)))
        if limit and self.thread_values(problem, config) * problem.element_size > limit:
            return f"more than {limit} bytes of sums and operands a thread spill on sm_{device.capability}"
        if self.programs(problem, config) > GRID_LIMIT:
            return f"more than {GRID_LIMIT} programs"
        shared = self.shared_bytes(problem, config)
        if shared > device.shared_bytes:
            return f"{shared} bytes of shared memory are over {device.name}'s {device.shared_bytes}"
        return None

    def predict(self, problem: Problem, config: Config, device: Device) -> Prediction:
        """The launches, the waves of the one that multiplies matrices, and what is fused into it."""
        executed, loaded = self.executed_flops(problem, config), self.l2_bytes(problem, config)
        memory, instructions, merged = conv_bytes(problem), 0.0, 0.0
        if problem.fused:
            sums = self.thread_sums(problem, config)
            instructions = (MOMENTS + MOMENTS_A_SUM * sums) * config.warps
            pieces = self.moments_pieces(problem, config)
            merged = merge_ms(problem, pieces, device)
            if problem.fused == "sums":  # x̂ is read beside dx
                memory += problem.K * problem.N * problem.C * problem.H * problem.W * problem.element_size
        work = Work(
            programs=self.programs(problem, config),
            ctas=self.ctas(problem, config, device),
            memory_bytes=memory,
            l2_bytes=loaded * self.l2_slowdown,
            step_bytes=self.step_bytes(problem, config) * max(1, config.stages - 1),
            flops=executed,
            tflops=matrix_rate(problem, device) * self.rate(problem, config, device),
            sum_bytes=self.sum_bytes(problem, config) if problem.kind == "wgrad" else 0,
            instructions=instructions,
        )
        ms, bounds = work.run(device)
        binding = max(bounds, key=bounds.__getitem__)
        launched = LAUNCH_MS * self.launches(problem, config)
        bounds["moments"] += merged
        waves = f"{work.waves(device):.3g} waves × {work.ctas} CTAs"
        terms = (("launches", launched), *((name, spent) for name, spent in bounds.items() if spent))
        cost = OpCost(conv_bytes(problem), conv_flops(problem), executed, loaded)
        return Prediction(launched + ms + merged, f"bound by {binding}, {waves}", cost, terms)
