"""What has to be right on a GPU before anything is timed: every kernel that ships against float64, and the operators.

`tools/gpu_suite.py` and `tests/test_gpu.py` run the same list, the most telling first. A check is a sentence or None.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from layers import BATCH, CASES, Case, Layer, layers, problem
from steps import Captured, Field, Training, packed
from timing import Gate, Trial, describe, errors, precision
from torch import Tensor

import decompk
from decompk import ops
from decompk.kernels import conv, extension, tables
from decompk.kernels import device as devices
from decompk.kernels.choose import candidates
from decompk.kernels.conv.form import Choice
from decompk.kernels.conv.steps import moments_of
from decompk.kernels.layout import ORDERS, strides_of
from decompk.kernels.problem import PASSES, Config, Epilogue, GradientEpilogue, Problem, Prologue, key_of
from decompk.models.basic import BasicResNet

PADDED, STRIDED = dict(padding=(1, 1)), dict(padding=(1, 1), stride=(2, 2))
FIRST = (2, 3, 16, 16, 9, 8)  # what every form computes
ODD = [  # (K, N, C, O, H, W), kernel, layout, the rest
    ((2, 5, 16, 32, 9, 11), (3, 3), "member", PADDED),
    ((3, 2, 4, 4, 17, 6), (1, 3), "member", dict(padding=(0, 1))),
    ((3, 5, 3, 5, 13, 9), (7, 7), "member", dict(stride=(2, 2), padding=(3, 3))),
    ((2, 3, 24, 40, 9, 11), (3, 3), "member", PADDED),
    ((1, 1, 100, 12, 7, 7), (1, 1), "member", {}),
    ((4, 2, 16, 32, 15, 10), (3, 3), "member", STRIDED),
    ((2, 3, 32, 16, 9, 9), (1, 1), "member", dict(stride=(2, 2))),
    ((2, 3, 8, 8, 8, 8), (3, 3), "member", dict(padding=(2, 2), dilation=(2, 2))),
    ((2, 2, 16, 16, 12, 12), (3, 3), "member", dict(stride=(3, 3))),
    ((2, 3, 16, 16, 9, 8), (3, 3), "member", dict(stride=(2, 1), padding=(1, 0))),
    ((2, 2, 16, 8, 1, 1), (1, 1), "member", {}),
    ((2, 2, 130, 70, 5, 5), (3, 3), "member", PADDED),
    ((3, 2, 64, 64, 8, 8), (3, 3), "channel-grouped", PADDED),
    ((3, 2, 4, 4, 9, 9), (3, 3), "channel-grouped", STRIDED),
    ((2, 2, 32, 16, 9, 9), (3, 3), "strided", PADDED),
    ((4, 3, 3, 16, 20, 20), (3, 3), "crops", PADDED),
    ((4, 3, 3, 8, 21, 15), (7, 7), "crops", dict(stride=(2, 2), padding=(3, 3))),
]
FUSED = [
    {"bias"},
    {"affine", "relu"},
    {"residual", "relu"},
    {"bias", "affine", "residual", "relu"},
    {"prologue"},
    {"prologue", "in_relu", "bias", "affine", "residual", "relu"},
]
NORMED = [(4, 6, 16, 35, 35), (16, 6, 4, 18, 18), (4, 6, 512, 5, 5), (2, 3, 3, 9, 5)]
BLOCKS = list(itertools.product(("1100/0110/0001/1001", "110/000/011", "10/01"), (64, 24, 8), (1, 3), (2, 1)))
OTHERS = ("float16", "tf32", "float32")  # the last compiles slowest
MOST_WANTED = (CASES[0], CASES[1], CASES[5])  # those whose steps are measured
LATER = CASES[2:5]
SEVERAL = 5  # images a member that fill no tile evenly


@dataclass(frozen=True)
class Check:
    """`run` says in a sentence what is wrong, or None. `needs`: "extension", "graph", "compile", "opcheck"."""

    kind: str
    name: str
    run: Callable[[], str | None]
    marks: tuple[str, ...] = ()
    needs: str = ""
    dry: Callable[[], object] | None = None  # launches the same on tensors without memory: for compiling it ahead


class Checks:
    """The list for one device; `dtype` comes before all others."""

    def __init__(
        self,
        device: torch.device,
        dtype: str = "bfloat16",
        others: tuple[str, ...] = OTHERS,
        cases: Sequence[Case] = MOST_WANTED,
        later: Sequence[Case] = LATER,
        first: tuple[int, ...] = FIRST,
        batch: int = BATCH,
    ):
        self.device, self.dtype, self.others, self.cases = device, dtype, others, cases
        self.later, self.first, self.batch = later, first, batch
        self.networks = functools.cache(self._networks)
        self.here = devices.of(device)
        self.trial = functools.lru_cache(maxsize=4)(self._trial)

    # ---- the lists --------------------------------------------------------------------------------------------------

    def firsts(self) -> list[Check]:
        """One of each kind: every form's first config in every pass, what is fused, moments, norms, blocks, steps."""
        found = []
        for rest, kind in itertools.product((PADDED, STRIDED), PASSES):
            one = problem(kind, self.dtype, self.first, (3, 3), **rest)
            found += [self.config(one, config) for config in self.configs(one)[0]]
        found.sort(key=lambda check: check.needs)  # the extension may still be compiling
        one = problem("fprop", self.dtype, self.first, (3, 3), **PADDED)
        found += [self.fused(one, flags) for flags in FUSED[-3:]] + [self.moments(one), self.sums(one.of("dgrad"))]
        found += [self.norm(NORMED[-1], self.dtype, True, True, layout) for layout in ORDERS]
        found += [self.block(*BLOCKS[-1], self.dtype)]
        return [*found, *(self.operator(one.of(kind)) for kind in PASSES)]

    def steps(self) -> list[Check]:
        """Whole training steps of a small network, captured and compiled."""
        return [
            Check("step", "captured", self.captured, needs="graph"),
            Check("step", "compiled", self.compiled, needs="compile"),
            Check("operator", "opcheck", self.accepted, needs="opcheck"),
        ]

    def marked(self) -> list[Check]:
        """What has a public history of silent errors: 8 warps, which are often chosen, and tf32."""
        first = (
            [problem(kind, "tf32", self.first, (3, 3), **PADDED) for kind in PASSES] if "tf32" in self.others else []
        )
        eight = [check for check in self.networks(self.dtype) if "8 warps" in check.marks]
        return eight + [self.config(one, config) for one in first for config in self.configs(one)[0]]

    def rest(self) -> list[Check]:
        """What else there is in the first dtype: what is chosen for the papers' networks, then odd shapes."""
        found = [check for check in self.networks(self.dtype) if "8 warps" not in check.marks]
        found += [self.config(one, config) for one in self.odd(self.dtype) for config in self.configs(one)[0]]
        found += [self.moments(one) for one in self.odd(self.dtype, "fprop")]
        found += [self.sums(one) for one in self.odd(self.dtype, "dgrad")]
        found += [self.fused(one, FUSED[-1]) for one in self.odd(self.dtype, "fprop")]
        found += [self.norm(shape, self.dtype, *how) for shape, how in itertools.product(NORMED, self._norms())]
        found += [self.block(*how, self.dtype) for how in BLOCKS]
        return found + [self.repeated(one) for one in self.odd(self.dtype, "wgrad")]

    def more(self) -> list[Check]:
        """The other dtypes, every flag, every config, and what the tuned table holds."""
        found = alternating([self._of(dtype) for dtype in self.others]) + self.networks(self.dtype, later=True)
        found += self.tuned() + [self.operator(one) for one in self.odd(self.dtype)]
        found += [self.config(one, config) for one in self.odd(self.dtype) for config in self.configs(one)[1]]
        for dtype in self.others:
            found += self.networks(dtype)
        return found

    def _of(self, dtype: str) -> list[Check]:
        configs = [self.config(one, config) for one in self.odd(dtype) for config in self.configs(one)[0]]
        around = [self.fused(one, flags) for flags in reversed(FUSED) for one in [*self.odd(dtype, "fprop")][:4]]
        norms = [self.norm(NORMED[0], dtype, *how) for how in (self._norms() if dtype != "tf32" else ())]
        found = alternating([configs, around, norms, [self.block(*how, dtype) for how in reversed(BLOCKS)][:12]])
        return found + [self.repeated(one) for one in [*self.odd(dtype, "wgrad")][:4]]

    def every(self) -> list[Check]:
        """All, each name once."""
        found = self.firsts() + self.steps() + self.marked() + self.rest() + self.more()
        return list({(check.kind, check.name): check for check in found}.values())

    # ---- problems and configs ---------------------------------------------------------------------------------------

    def odd(self, dtype: str, *kinds: str) -> Iterator[Problem]:
        for (sides, kernel, layout, rest), kind in itertools.product(ODD, kinds or PASSES):
            if (layout, kind) != ("crops", "dgrad"):
                yield problem(kind, dtype, sides, kernel, layout, **rest)

    def configs(self, one: Problem) -> tuple[list[Config], list[Config]]:
        """What the choice could choose, here and for a full batch: the first guess of each form, and the others."""
        first, rest = [], []
        asked = [Trial(replace(one, N=n), "meta").asked for n in (self.batch, one.N)]
        guesses = [replace(each, deterministic=d) for each in asked for d in (False, True)]
        for form in (form for form in conv.FORMS if form.configurable and "cuda" in form.devices):
            legal = [
                config
                for config in dict.fromkeys(c for each in guesses for c in form.configs(each))
                if form.why_not(asked[1], config, self.here) is None
            ]
            first, rest = first + legal[:1], rest + legal[1:]
        return first, rest

    def _networks(self, dtype: str, later: bool = False) -> list[Check]:
        """What would be chosen among kernels for each layer of the papers' networks, on few images."""
        found = {}
        for case in self.later if later else self.cases:
            for layer in layers(case, dtype, self.batch):
                for asked in layer.passes():
                    chosen = next((c for c in candidates(asked, self.here) if c.config), None)
                    small = replace(layer.problem, N=min(SEVERAL, self.batch)).of(asked.kind)
                    one = Trial(small, "meta", layer.image).asked
                    if chosen and chosen.form.why_not(one, chosen.config, self.here) is None:
                        check = self.config(small, chosen.config, layer.image)
                        found.setdefault(check.name, check)
        return list(found.values())

    def tuned(self) -> list[Check]:
        entries = tables.table(self.here)
        cases = (*self.cases, *self.later) if entries else ()
        work = [(layer, one) for case in cases for layer in layers(case) for one in layer.passes()]
        known = {one: layer for layer, one in work if key_of(one) in entries}
        return [Check("tuned", key_of(one), partial(self._tuned, layer, one)) for one, layer in known.items()]

    def _trial(self, one: Problem, image: tuple[int, int] | None = None) -> tuple[Trial, Gate]:
        trial = Trial(one, self.device, image)
        return trial, trial.gate()

    # ---- one check each ---------------------------------------------------------------------------------------------

    def config(self, one: Problem, config: Config, image: tuple[int, int] | None = None) -> Check:
        choice = Choice(conv.named(config.form), config, 0.0, "")

        def run() -> str | None:
            trial, gate = self.trial(one, image)
            trial.poison()
            return gate(trial.by_config(config))[1]

        marks = ("8 warps",) * (config.warps >= 8) + ("tf32",) * (one.dtype == "tf32")
        name = f"{config.form} {key_of(one)} {describe(choice).partition(' ')[2]}"
        needs = "extension" if config.form == "halo" else ""
        return Check(one.kind, name, run, marks, needs, lambda: Trial(one, "meta", image).by_config(config))

    def _tuned(self, layer: Layer, one: Problem) -> str | None:
        choice = tables.lookup(one, self.here)
        if choice is None:
            return "it is in the table, but not legal"
        trial, gate = self.trial(layer.problem.of(one.kind), layer.image)
        trial.poison()
        return gate(trial.by_choice(choice))[1]

    def operator(self, one: Problem) -> Check:
        def run() -> str | None:
            trial, gate = self.trial(one)
            trial.poison()
            return gate(trial.by_op())[1]

        return Check("operator", key_of(one), run)

    def fused(self, one: Problem, flags: set[str]) -> Check:
        """The first config of every form but the extension's, with what is around it."""
        marks = ("tf32",) * (one.dtype == "tf32")
        return Check("fused", f"{'-'.join(sorted(flags))} {key_of(one)}", partial(self._fused, one, flags), marks)

    def _fused(self, one: Problem, flags: set[str]) -> str | None:
        trial = Trial(one, self.device)
        vectors = [torch.randn(one.K, size, device=self.device) for size in (one.O, one.O, one.O, one.C, one.C)]
        residual = torch.randn_like(trial.call.empty()) if "residual" in flags else None
        affine = vectors[:2] if "affine" in flags else (None, None)
        bias = vectors[2].to(trial.dtype) if "bias" in flags else None
        prologue = Prologue(*vectors[3:], "in_relu" in flags) if "prologue" in flags else None

        def by_torch(dtype: torch.dtype) -> Tensor:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            own = [None if t is None else t.to(dtype) for t in (bias, residual)]
            around = [None if t is None else t.to(wide) for t in affine]
            epilogue = Epilogue(own[0], *around, own[1], "relu" in flags)
            before = prologue and Prologue(prologue.scale.to(wide), prologue.shift.to(wide), prologue.relu)
            operands = trial.members().to(dtype), trial.weight.to(dtype)
            with precision(one.dtype):
                geometry = (one.stride, one.padding, one.dilation)
                return conv.named("loop").around(*operands, geometry, epilogue, before)

        gate = Gate(by_torch(torch.float64), by_torch(trial.dtype))
        for config in self._runnable(one):
            trial.poison()
            _, fault = gate(trial.by_config(config, Epilogue(bias, *affine, residual, "relu" in flags), prologue))
            if fault:
                return f"{config.form}, {config.warps} warps: {fault}"
        return None

    def _runnable(self, one: Problem) -> list[Config]:
        built = self.device.type == "cuda" and extension.why_not("cuda") is None
        return [config for config in self.configs(one)[0] if built or config.form != "halo"]

    def moments(self, one: Problem) -> Check:
        return Check("moments", key_of(one), partial(self._moments, one))

    def _moments(self, one: Problem) -> str | None:
        trial = Trial(one, self.device)
        for config in self._runnable(one):
            pieces = conv.named(config.form).moments_pieces(trial.asked, config)
            found = torch.full((one.K, pieces, 3, one.O), torch.nan, device=self.device)
            y = trial.by_config(config, Epilogue(moments=found)).double()
            count, means, m2 = found.double().unbind(2)
            total = count.sum(1)
            mean = (count * means).sum(1) / total
            m2 = (m2 + count * (means - mean[:, None]) ** 2).sum(1)
            wanted = moments_of(y)[:, 0].unbind(1)
            for name, own, exact in zip(("count", "mean", "m2"), (total, mean, m2), wanted, strict=True):
                if not torch.allclose(own, exact, rtol=1e-4, atol=1e-5):
                    return f"{config.form}, {config.warps} warps: {name} is off by {(own - exact).abs().max():.1e}"
        return None

    def sums(self, one: Problem) -> Check:
        """What dgrad does to its result for the batch norm below: of both ways to know what a ReLU let pass."""
        return Check("sums", key_of(one), partial(self._sums, one))

    def _sums(self, one: Problem) -> str | None:
        trial = Trial(one, self.device)
        added, raw, joined = (torch.randn_like(trial.call.empty()) for _ in range(3))
        mean, rstd, gamma, beta = (torch.randn(one.K, one.C, device=self.device) for _ in range(4))
        away = raw.double() - mean.double()[:, None, :, None, None]
        z = away * (rstd * gamma).double()[:, None, :, None, None] + beta.double()[:, None, :, None, None]
        known = z.abs() > 1e-2  # else rounding decides
        passes = {True: joined > 0, False: z > 0}

        for config, by_value in itertools.product(self._runnable(one), passes):
            form = conv.named(config.form)
            if not form.gradient_epilogue:
                continue
            found = torch.full(
                (one.K, form.moments_pieces(trial.asked, config), 2, one.C), torch.nan, device=self.device
            )
            around = added, raw, joined if by_value else None, mean, rstd, gamma, beta, True, found
            trial.poison()
            dx = trial.by_config(config, GradientEpilogue(*around))
            exact, own = (
                (trial.by_torch(dtype) + added.to(dtype)).where(passes[by_value], 0)
                for dtype in (torch.float64, trial.dtype)
            )
            compared = torch.ones_like(known) if by_value else known
            what = f"{config.form}, {config.warps} warps: "
            if fault := Gate(exact.where(compared, 0), own.where(compared, 0))(dx.where(compared, 0))[1]:
                return what + fault
            x = away * rstd.double()[:, None, :, None, None]
            for name, total, value in zip(("Σg", "Σg·x̂"), found.double().sum(1).unbind(1), (1, x), strict=True):
                wanted = (dx.double() * value).sum((1, 3, 4))
                if not (total - wanted).norm() <= 1e-4 * ((dx.double() * value).abs().sum((1, 3, 4))).norm():
                    return f"{what}{name} is off by {(total - wanted).abs().max():.1e}"
        return None

    def repeated(self, one: Problem) -> Check:
        """A weight gradient without atomics has the same bits twice."""

        def run() -> str | None:
            trial = Trial(one, self.device)
            for config in self._runnable(one) + self.configs(one)[1][:4]:
                if not config.atomic and config.form != "halo":
                    first, second = (trial.by_config(config).clone() for _ in range(2))
                    if not torch.equal(first, second):
                        return f"{config} gives other bits the second time"
            return None

        return Check("repeated", key_of(one), run)

    def norm(self, shape: tuple[int, ...], dtype: str, relu: bool, residual: bool, layout: str) -> Check:
        flags = f"{dtype} {layout}{' relu' if relu else ''}{' residual' if residual else ''}"
        how = partial(batch_norm, shape, getattr(torch, dtype), relu, residual, layout, self.device)
        return Check("batch norm", f"{shape} {flags}", how)

    def _norms(self) -> Iterator[tuple[bool, bool, str]]:
        for (relu, residual), layout in itertools.product([(False, False), (True, False), (True, True)], ORDERS):
            yield relu, residual, layout

    def block(self, mask: str, size: int, kernel: int, stride: int, dtype: str) -> Check:
        name = f"{mask} {size} channels {kernel}×{kernel}/{stride} {dtype}"
        marks = ("tf32",) * (dtype == "tf32")
        return Check(
            "block", name, partial(blocks, mask, size, kernel, stride, dtype, min(3, self.batch), self.device), marks
        )

    # ---- whole steps ------------------------------------------------------------------------------------------------

    def field(self) -> Field:
        """Four members of a small network."""
        stem = torch.nn.Conv2d(3, 32, 3, padding=1)
        net = BasicResNet(stem, torch.nn.Identity(), (1, 1, 1), 10, bias=False, norm_projection=True)
        d = decompk.decompose(net, (3, 32, 32), 4, crop_size=20)
        image = torch.randn(8, 3, 32, 32, device=self.device).contiguous(memory_format=torch.channels_last)
        return Field(d.subnets(seed=0), d.crops, image, torch.randint(10, (8,), device=self.device), net)

    def captured(self) -> str | None:
        field = self.field()
        eager, other = (Training(packed(field), field.target, 4) for _ in range(2))
        torch.use_deterministic_algorithms(True, warn_only=True)  # it asks for more than is compared
        try:
            wanted = [float(eager()) for _ in range(Captured.warm + 3)][Captured.warm :]
            step = Captured(other)
            found = [float(step()) for _ in range(3)]
        finally:
            torch.use_deterministic_algorithms(False)
        close = all(abs(a - b) <= 1e-2 * abs(b) for a, b in zip(found, wanted, strict=True))
        return None if close else f"losses {found}, eager {wanted}"

    def compiled(self) -> str | None:
        field = self.field()
        net = packed(field)[0][0]
        losses, parameters = trained(copy.deepcopy(net), field)
        again, others = trained(torch.compile(net, fullgraph=True), field)
        off = errors(torch.cat(others), torch.cat(parameters).double())[0]
        if not torch.allclose(again, losses, rtol=1e-2, atol=1e-2):
            return f"losses {again.tolist()}, eager {losses.tolist()}"
        return None if off < 1e-2 else f"parameters are off by {off:.1e}"

    def accepted(self) -> str | None:
        """torch.library.opcheck of the operators; raises what it has to say."""

        def values(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device).movedim(-1, 2)

        check, operators = partial(torch.library.opcheck, rtol=1e-3, atol=1e-3), torch.ops.decompk
        x, weight = values(2, 3, 9, 8, 16).requires_grad_(), values(2, 32, 3, 3, 16).requires_grad_()
        bias, dy = torch.randn(2, 32, device=self.device), values(2, 3, 9, 8, 32)
        geometry = ([1, 1], [1, 1], [1, 1])
        check(operators.grouped_conv2d, (x, weight, bias, *geometry))
        check(operators.grouped_conv2d_backward, (dy, x.detach(), weight.detach(), *geometry, [True, True, True]))
        mean, rstd = torch.randn(2, 16, device=self.device), torch.rand(2, 16, device=self.device)
        moments = operators.batch_norm_moments(x.detach())
        check(operators.batch_norm_moments, (x.detach(),))
        check(operators.batch_norm_finalise, (moments, mean.clone(), rstd.clone(), 0.1, 1e-5))
        check(operators.batch_norm_apply, (x, mean, rstd, mean, rstd, None, True, True))
        return None


def alternating(lists: Sequence[list[Check]]) -> list[Check]:
    """The first of each list, then the second of each, and so on: time may end anywhere."""
    return [check for row in itertools.zip_longest(*lists) for check in row if check is not None]


def trained(net: torch.nn.Module, field: Field, steps: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Losses and parameters after some steps in float32."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(decompk.losses.cross_entropy(net(field.image), field.target))
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach(), [p.detach().flatten() for p in net.parameters()]


def batch_norm(
    shape: tuple[int, ...], dtype: torch.dtype, relu: bool, residual: bool, layout: str, device: torch.device
) -> str | None:
    """y and every gradient of ops.batch_norm, as exact as torch's."""

    def by_torch(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor) -> Tensor:
        each = zip(x, weight, bias, strict=True)
        z = torch.stack([F.batch_norm(a, None, None, b, c, True) for a, b, c in each])
        z = z + other if residual else z
        return z.relu() if relu else z

    def by_op(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor) -> Tensor:
        return ops.batch_norm(x, weight, bias, relu=relu, residual=other if residual else None)

    def gradients(how: Callable[..., Tensor], dy: Tensor, exact: bool = False) -> list[Tensor]:
        own = [(t.double() if exact else t).detach().requires_grad_() for t in leaves]
        y = how(*own)
        return [y.detach(), *torch.autograd.grad(y, own if residual else own[:3], dy.to(y.dtype))]

    x, other, dy = (
        torch.empty_strided(shape, strides_of(layout, shape), dtype=dtype, device=device).normal_() for _ in range(3)
    )
    leaves = [x, *(torch.randn(shape[0], shape[2], device=device) for _ in range(2)), other]
    z = gradients(by_torch, dy, exact=True)[0]
    dy = dy.where(z.abs() > 1e-2, 0)  # where rounding decides what ReLU lets pass there is nothing to compare
    exact, own, ours = gradients(by_torch, dy, exact=True), gradients(by_torch, dy), gradients(by_op, dy)
    for name, wanted, torchs, found in zip(
        ("y", "dx", "dweight", "dbias", "dresidual"), exact, own, ours, strict=False
    ):
        _, fault = Gate(wanted, torchs)(found)
        if fault:
            return f"{name} {fault}"
    return None


def blocks(mask: str, size: int, kernel: int, stride: int, dtype: str, N: int, device: torch.device) -> str | None:
    """y, dx and dw of ops.block_conv2d; the blocks that it must not read are NaN."""
    R = mask.count("/") + 1
    values = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    x, weight = torch.randn(N, R * size, 13, 9, device=device), torch.randn(R * size, R * size, kernel, kernel)
    keep = torch.tensor([[block == "1" for block in row] for row in mask.split("/")])
    keep = keep.repeat_interleave(size, 0).repeat_interleave(size, 1)[:, :, None, None].to(device)
    x, weight = x.to(values), (weight.to(device) / (size * kernel)).to(values)
    geometry = dict(stride=stride, padding=kernel // 2)

    def passes(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = function(x, weight)
        dy = torch.cos(torch.arange(y.numel(), device=device)).view(y.shape).to(y)
        return y.detach(), *torch.autograd.grad(y, (x, weight), dy)

    def dense(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight.where(keep, 0), **geometry)

    with precision(dtype):
        found = passes(lambda x, w: ops.block_conv2d(x, w, mask, **geometry), x, weight.where(keep, float("nan")))
        theirs = passes(dense, x, weight)
    exact = passes(dense, x.double(), weight.double())
    for what, ours, torchs, wanted in zip(("y", "dx", "dw"), found, theirs, exact, strict=True):
        own, others = ((t.double() - wanted).norm() / wanted.norm() for t in (ours, torchs))
        if not own <= 2 * others + 1e-6:
            return f"wrong: {what} {own:.1e}, torch {others:.1e}"
    return None
