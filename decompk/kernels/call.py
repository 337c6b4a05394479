"""One call of a convolution: who looks on, how its tensors lie, and the views that its forms read and write.

All of it follows from shapes, strides, alignment and dtypes, so it is worked out once for each of them and kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from ..errors import DecompkError
from . import cpu
from .backend import forced
from .conv.form import Choice, Form
from .handles import TENSORS
from .launch import onlookers
from .layout import aligned, as_one_image, channels_inside, check_alike, check_shapes, layout_of, nhwc, strides_of
from .problem import (
    DTYPES,
    PLAIN,
    Epilogue,
    Geometry,
    GradientEpilogue,
    Offsets,
    Problem,
    Prologue,
    dtype_name,
)

View = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides
About = tuple[tuple[int, ...], tuple[int, ...], bool, torch.dtype, torch.device]  # a tensor: see `about`

HALVES = (torch.float16, torch.bfloat16)
_DEVICES = ("cpu", "cuda")


# ---- who looks on ---------------------------------------------------------------------------------------------------


def watched() -> bool:
    """Whether torch's own operators have to run: forward mode, torch.func, a trace or an export looks on.

    Those follow torch's operators alone: ours are constants to them, or do not run elsewhere.
    """
    return (
        forward_ad._current_level >= 0
        # compiled code takes any other question about the stack for a yes
        or isinstance(_functorch.peek_interpreter_stack(), _functorch.CInterpreter)
        or torch._C._get_tracing_state() is not None
        or torch.compiler._is_exporting_flag  # is_exporting() is true of all that torch 2.11 compiles
    )


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether plain tensors are computed here and now: no mode, transform, trace or compiler looks on.

    Then torch's dispatcher, which operators pass and which takes as long as a small layer does, is not needed. It is
    for tensors that are negated in name alone, as the imaginary part of a conjugate is.
    """
    if _looked_on():
        return False
    for t in tensors:  # a loop: a generator takes twice as long
        if t is None:
            continue
        if type(t) not in TENSORS or t.is_neg() or t.device.type not in _DEVICES:
            return False
    return True


def _looked_on() -> bool:
    if torch.compiler.is_compiling() or watched():
        return True
    if (modes := torch._C._len_torch_dispatch_stack()) and modes != onlookers.get():
        return True
    return torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)


_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def runs_cpu(*tensors: Tensor | None) -> bool:
    """Whether the C++ kernels for processors take these: float32, on the CPU, and nobody looks on."""
    if torch.compiler.is_compiling() or forced.get() not in (None, "cpu") or _looked_on():
        return False
    return cpu_takes(*tensors) and cpu.why_not() is None and not torch.is_autocast_enabled("cpu")


def cpu_takes(*tensors: Tensor | None) -> bool:
    """Whether these, too, may be given to kernels that take another tensor here and now: see `runs_cpu`."""
    for t in tensors:
        if t is None:
            continue
        if t.dtype is not torch.float32 or not t.is_cpu or type(t) not in TENSORS or t.is_neg():
            return False
    return True


def follows(*grads: Tensor | None) -> bool:
    """Whether something follows the backward of `grads`: a graph is made of it, or a batch of them runs at once."""
    return (
        torch.is_grad_enabled()
        or watched()
        or any(g is not None and _functorch.is_legacy_batchedtensor(g) for g in grads)
    )


# ---- calls ----------------------------------------------------------------------------------------------------------


def about(t: Tensor) -> About:
    """What a call depends on of a tensor: shape, strides, whether it starts at 16 bytes, dtype and device."""
    start = t.storage_offset() * t.element_size() if isinstance(t, FakeTensor) else t.data_ptr()
    return t.shape, t.stride(), start % 16 == 0, t.dtype, t.device


class Call:
    """One pass of K convolutions on tensors that lie as these do: activations (K, N, c, H, W) or rows (K·N, c, H, W).

    problem: what `choose` is asked for; the pixels of a pointwise one are one image there where no gaps part them.
    as_given: the same with the images as they are. settled: whether the activations may be read as they lie; else they
    are copied by `settle` first. choices: who runs it, by backend asked for, determinism and what is fused.
    """

    def __init__(
        self,
        ends: _Ends,
        problem: Problem,
        activations: Sequence[Tensor],
        result: View,
        aligned_starts: bool,
        settled: bool,
        offsets: Offsets | None,
    ):
        """ends: of the convolution. activations: on the meta device, (K, N, c, H, W), as a form takes them in turn.

        result: of what the pass makes. aligned_starts: whether all that comes in starts at 16 bytes.
        """
        self.ends, self.settled, self.offsets = ends, settled, offsets
        self.shape, self.strides = result
        self.dtype, self.device = ends.weight[3] if problem.kind == "wgrad" else ends.x[3], ends.x[4]
        self.choices: dict[tuple[str | None, bool, str], Choice] = {}
        self._pieces: dict[Any, int] = {}
        K, O, C, *kernel = ends.weight[0]
        given = torch.empty_strided(*ends.weight[:2], device="meta").movedim(2, -1)
        dense = torch.empty((K, O, *kernel, C), dtype=ends.x[3], device="meta")
        self._weight_is_dense, self._weight_view = given.is_contiguous(), _view(dense)
        views = [nhwc(t) for t in activations]
        one_image = problem.one_image()
        found = views if one_image == problem else [as_one_image(t, one_image.H, one_image.W) for t in views]
        streams = [t for t in found if t is not None]
        if len(streams) < len(found):
            streams, one_image = views, problem
        self.problem, self.as_given = (
            replace(p, aligned=p.dtype in DTYPES and aligned_starts and aligned([*seen, dense]))
            for p, seen in ((one_image, streams), (problem, views))
        )
        self._one_image, self._views = (list(map(_view, seen)) for seen in (streams, views))

    def _seen_by(self, form: Form[Any]) -> tuple[Problem, list[View]]:
        return (self.problem, self._one_image) if form.one_image else (self.as_given, self._views)

    def weight(self, weight: Tensor) -> Tensor:
        """(K, O, C, kh, kw) → dense (K, O, kh, kw, C): a view where the memory is so already, else a copy.

        Hooks of saved tensors may have given it back in another layout than the forward had it in.
        """
        if not self._weight_is_dense or weight.stride() != self.ends.weight[1]:
            weight = weight.movedim(2, -1).contiguous()
        return weight.as_strided(*self._weight_view)

    def empty(self) -> Tensor:
        """What the pass makes, not written yet."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)

    def moments_pieces(self, choice: Choice) -> int:
        """S of Epilogue.moments, or of GradientEpilogue.sums."""
        key = choice.form, choice.config
        found = self._pieces.get(key)
        if found is None:
            found = self._pieces[key] = choice.form.moments_pieces(self._seen_by(choice.form)[0], choice.config)
        return found

    def fprop(
        self,
        choice: Choice,
        x: Tensor,
        weight: Tensor,
        epilogue: Epilogue = PLAIN,
        prologue: Prologue | None = None,
    ) -> Tensor:
        """y; the epilogue's residual lies as y does, its moments are (K, S, 3, O) for the S of the form."""
        y = self.empty()
        if not y.numel():
            return y
        form = choice.form
        problem, (into, out) = self._seen_by(form)
        view = y.as_strided(*out)
        if epilogue.residual is not None:
            epilogue = replace(epilogue, residual=epilogue.residual.as_strided(*out))
        weight = self.weight(weight)
        found = form.fprop(problem, choice.config, x.as_strided(*into), weight, view, epilogue, prologue, self.offsets)
        return y if found is view else _kept(found, view, y)

    def dgrad(self, choice: Choice, dy: Tensor, weight: Tensor, epilogue: GradientEpilogue | None = None) -> Tensor:
        """dx; an epilogue is for forms that take one: it reads what lies as x does, its sums are (K, S, 2, C)."""
        dx = self.empty()
        if not dy.numel():
            return dx.zero_()
        problem, (into, out) = self._seen_by(choice.form)
        view = dx.as_strided(*out)
        behind: list[GradientEpilogue] = []
        if epilogue is not None:
            e = epilogue
            added, raw, joined = (None if t is None else t.as_strided(*out) for t in (e.added, e.raw, e.joined))
            behind = [GradientEpilogue(added, raw, joined, e.mean, e.rstd, e.gamma, e.beta, e.gated, e.sums)]
        form: Any = choice.form
        found = form.dgrad(problem, choice.config, dy.as_strided(*into), self.weight(weight), view, *behind)
        return dx if found is view else _kept(found, view, dx)

    def wgrad(self, choice: Choice, dy: Tensor, x: Tensor, dw: Tensor | None = None) -> Tensor:
        """dweight, OHWI in memory; dw: `empty`, and zero where `adds_to_zero`."""
        zero = dw is not None
        dw = self.empty() if dw is None else dw
        if not dy.numel():
            return dw.zero_()
        problem, (first, second) = self._seen_by(choice.form)
        view = dw.as_strided(*self._weight_view)
        dy, x = dy.as_strided(*first), x.as_strided(*second)
        found = wgrad(choice, problem, dy, x, view, self.offsets, zero)
        return dw if found is view else _kept(found, view, dw)


def adds_to_zero(choice: Choice, dtype: torch.dtype) -> bool:
    """Whether wgrad of `choice` adds to a dw of `dtype` that has to be zero before."""
    return choice.config is not None and choice.config.atomic and dtype is torch.float32


def wgrad(
    choice: Choice,
    problem: Problem,
    dy: Tensor,
    x: Tensor,
    dw: Tensor,
    offsets: Offsets | None = None,
    zero: bool = False,
) -> Tensor:
    """`Form.wgrad` with its partial sums added up into dw (K, O, kh, kw, C); zero: whether dw is where it has to be."""
    form, config, parts = choice.form, choice.config, choice.sums
    if not parts:
        return form.wgrad(problem, config, dy, x, dw, offsets)
    direct = parts == 1 and dw.dtype is torch.float32
    sums = dw.unsqueeze(0) if direct else dw.new_empty((parts, *dw.shape), dtype=torch.float32)
    if config is not None and config.atomic and not zero:
        sums.zero_()
    form.wgrad(problem, config, dy, x, sums, offsets)
    if direct:
        return dw
    if dw.dtype is torch.float32:
        return torch.sum(sums, 0, out=dw)
    return dw.copy_(sums[0] if parts == 1 else sums.sum(0))


def _kept(found: Tensor, view: Tensor, result: Tensor) -> Tensor:
    """What a form found in memory of its own, as the result: that memory itself where it lies alike, else a copy."""
    if found.stride() != view.stride() or found.dtype != view.dtype:
        view.copy_(found)
        return result
    # Torch lets nobody write into a view that comes out of an autograd function.
    return found.as_strided(result.shape, result.stride()).data


# ---- the call of these tensors --------------------------------------------------------------------------------------


def fprop_call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    window: tuple[int, ...] = (),
    residual: Tensor | None = None,
    dtype: str | None = None,
    master: bool = False,
) -> Call:
    """The Call of y from x and weight (K, O, C, kh, kw). Raises DecompkError for tensors that do not fit each other.

    master: weight and bias may be float32 where x is of 16 bits; then so is the weight's gradient.
    window: of crops, (height, width, top and left of each member); x is then the image (1, N, C, H, W) that all share.
    residual: what is added to y, and lies as y does. dtype: of the Problem, where it is not what runs here.
    """
    biased = None if bias is None else (bias.shape, bias.dtype, bias.device)
    start = residual is None or about(residual)[2]
    return _fprop_call(about(x), about(weight), biased, geometry, window, start, dtype or _dtype_name(x), master)


def dgrad_call(fprop: Call, dy: Tensor) -> Call:
    """The Call of dx from dy, behind `fprop`."""
    return _gradient_call("dgrad", fprop, *about(dy)[1:3])


def wgrad_call(fprop: Call, dy: Tensor) -> Call:
    """The Call of dweight from dy and the x of `fprop`."""
    return _gradient_call("wgrad", fprop, *about(dy)[1:3])


def settle(t: Tensor) -> Tensor:
    """Activations with channels inside and memory of their own: what an NCHW tensor, or a sum's gradient, costs."""
    if t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return channels_inside(t.contiguous() if 0 in t.stride() else t)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Of means, variances and moments of x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dtype_name(x: Tensor) -> str:
    """Problem.dtype of x: products of float32 are "tf32" on a GPU where torch's own would be."""
    if x.dtype is not torch.float32 or (x.device.type == "cpu" and forced.get() != "triton"):
        return dtype_name(x.dtype)
    return dtype_on_a_gpu(x.dtype)


def dtype_on_a_gpu(dtype: torch.dtype) -> str:
    """Problem.dtype there: torch's setting says whether float32 is multiplied as tf32."""
    settings: Any = torch.backends.cudnn
    return dtype_name(dtype, settings.conv.fp32_precision == "tf32")


@functools.lru_cache(maxsize=4096)
def _fprop_call(
    x: About,
    weight: About,
    bias: tuple[torch.Size, torch.dtype, torch.device] | None,
    geometry: Geometry,
    window: tuple[int, ...],
    residual_aligned: bool,
    dtype: str,
    master: bool,
) -> Call:
    operands = {"x": x[3:], "weight": weight[3:], "bias": bias and bias[1:]}
    if master and x[3] in HALVES:
        operands = {k: t if t is None or t[0] is not torch.float32 else (x[3], t[1]) for k, t in operands.items()}
    check_alike("grouped_conv2d", x[3:], **operands)
    image, members = _activation(x, weight[0][0]), None
    if window:
        K, (h, w) = weight[0][0], window[:2]
        members = image.expand(K, *image.shape[1:])[..., :h, :w]
    ends = _Ends(x, weight, geometry, window, image, image if members is None else members, dtype)
    shape = check_shapes(ends.members.shape, weight[0], bias and bias[0], *geometry)
    y = _empty_like(ends.members, shape)
    return ends.call("fprop", (image, y), y, x[2] and weight[2] and residual_aligned, _is_settled(ends, x))


@functools.lru_cache(maxsize=8192)
def _gradient_call(kind: str, fprop: Call, strides: tuple[int, ...], start: bool) -> Call:
    ends = fprop.ends
    dy = _five(torch.empty_strided(fprop.shape, strides, dtype=ends.image.dtype, device="meta"), ends.weight[0][0])
    about_dy = (fprop.shape, strides, start, *ends.x[3:])
    settled = _is_settled(ends, about_dy) and (0 not in strides or not dy.numel())
    if kind == "dgrad":
        dx = _empty_like(ends.image, ends.image.shape)
        return ends.call(kind, (dy, dx), dx, start and ends.weight[2], settled)
    return ends.call(kind, (dy, ends.image), None, start and ends.x[2], settled)


@dataclass(frozen=True, eq=False)
class _Ends:
    """What the passes of one convolution share; image and members on the meta device, (K, N, C, H, W)."""

    x: About
    weight: About
    geometry: Geometry
    window: tuple[int, ...]
    image: Tensor  # x, or what crops are read from
    members: Tensor  # what each member reads, but for where its crop begins
    dtype: str

    def call(
        self, kind: str, activations: tuple[Tensor, Tensor], result: Tensor | None, aligned_starts: bool, settled: bool
    ) -> Call:
        """result: None for the weight's gradient."""
        (K, N, C, H, W), (_, O, _, kh, kw) = self.members.shape, self.weight[0]
        layouts = {layout_of(t) for t in activations}
        layout = "crops" if self.window else layouts.pop() if len(layouts) == 1 else "strided"
        problem = Problem(kind, self.dtype, K, N, C, O, H, W, (kh, kw), *self.geometry, layout)
        offsets = None
        if self.window:
            corners = list(zip(self.window[2::2], self.window[3::2], strict=True))
            offsets = Offsets.of(corners, self.x[4])
        if result is None:
            K, O, C, *kernel = self.weight[0]
            out = tuple(self.weight[0]), torch.empty((K, O, *kernel, C), device="meta").movedim(-1, 2).stride()
        else:
            rows = len(self.x[0]) == 4
            out = _view(result.flatten(0, 1) if rows else result)
        return Call(self, problem, activations, out, aligned_starts, settled, offsets)


def _view(t: Tensor) -> View:
    return tuple(t.shape), t.stride()


def _activation(x: About, K: int) -> Tensor:
    return _five(torch.empty_strided(x[0], x[1], dtype=x[3], device="meta"), K)


def _five(t: Tensor, K: int) -> Tensor:
    """(K, N, c, H, W) of it, or of rows (K·N, c, H, W)."""
    if t.dim() == 5:
        return t
    if t.shape[0] % K:
        raise DecompkError(f"{t.shape[0]} rows are no batch of {K} members.")
    return t.unflatten(0, (K, t.shape[0] // K))


def _empty_like(x: Tensor, shape: Sequence[int]) -> Tensor:
    layout = "channel-grouped" if layout_of(x) == "channel-grouped" else "member"
    return torch.empty_strided(shape, strides_of(layout, shape), dtype=x.dtype, device="meta")


def _is_settled(ends: _Ends, t: About) -> bool:
    """Whether activations may be read as they lie: channels inside, and rows on a CPU without gaps."""
    shape, strides = t[:2]
    if len(shape) == 4 and t[4].type == "cpu":
        return torch.empty_strided(shape, strides, device="meta").is_contiguous(memory_format=torch.channels_last)
    return shape[-3] == 1 or strides[-3] == 1
