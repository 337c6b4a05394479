"""A fused layer at each call: convolution, batch norm, residual and ReLU in as few launches as the call allows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..crops import Crop
from ..kernels.backend import asked_for
from ..kernels.call import cpu_takes, runs_cpu, settle, unwatched
from ..kernels.handles import TENSORS
from ..kernels.layout import output_shape
from ..kernels.problem import Geometry
from ..ops.conv import arguments, autocast, autocast_now, convolve_now
from ..ops.conv_norm import Norm, conv_norm
from ..ops.cpu_layer import How, call_of, cpu_layer
from ..ops.fused import fused_rows, window_of
from .conv import PackedConv2d
from .norm import PackedBatchNorm2d
from .norm_then import PackedBatchNormThen2d
from .twin import HOOKS, batch_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run_layer(*arguments: Any) -> Tensor:
    """The result of `run_shared_layer`."""
    return run_shared_layer(False, *arguments)[0]


def run_shared_layer(
    passes: bool,
    private: bool,
    x: Tensor,
    crops: Sequence[Crop] | None,
    conv: PackedConv2d,
    norm: PackedBatchNorm2d | None,
    *further: Any,
) -> tuple[Tensor, Tensor]:
    """`_run_layer`, laid out as its last twin is to be, and x for others that read it.

    passes: whether their gradient is added where this one's is written. private: whether the result is for such layers
    alone, none of which has hooks.
    """
    y, x = _run_layer(passes, private, x, crops, conv, norm, *further)
    return y.contiguous() if (conv if norm is None else norm)._twin_contiguous else y, x


def _run_layer(
    passes: bool,
    private: bool,
    x: Tensor,
    crops: Sequence[Crop] | None,
    conv: PackedConv2d,
    norm: PackedBatchNorm2d | None,
    affine: tuple[Tensor, Tensor] | None,
    residual: Any,
    add_in_place: bool,
    relu: nn.Module | str | None,
) -> tuple[Tensor, Tensor]:
    """relu(norm(conv(x)) + residual) and x: x (K·N, C, H, W), or with crops the image (N, C, H, W) → (K·N, O, H', W').

    In as few launches as arguments, modes and hooks allow; else as the network's own code does it. affine: scale and
    shift (K, O) of a norm by its running statistics. relu: a module, or the name of a function: see `relu_of`.
    """
    known, code = is_known(conv, norm, relu), relu_of(relu)
    on_cpu = runs_cpu(x)
    joins = known and norm is not None and on_cpu  # the norm takes what follows it
    if crops is not None and on_cpu:  # whose kernels read no windows
        x, crops = torch.cat([crop.cut(x) for crop in crops]), None
    call = _call(x, crops, conv) if known else None
    if call is not None and residual is not None and not _fits(residual, call):
        call = None
    folds = norm is None or affine is not None
    if call is not None and torch.is_grad_enabled():
        folds = folds and not any(map(_needs_gradient, (x, conv.weight, conv.bias, residual)))
    if call is not None and on_cpu and not folds and (way := _on_cpu(x, call, conv, norm, residual)) is not None:
        return cpu_layer(*way, residual, code), x
    if code > 1:  # what is below knows ReLU alone
        y, x = _run_layer(passes, False, x, crops, conv, norm, affine, residual, add_in_place, None)
        return activate(y, relu), x
    if call is not None and conv.groups == 1:
        if folds:
            return fused_rows(*call[:-1], affine or (None, None), residual, relu is not None), x
        around = _by_batch(norm, call) if norm is not None and on_kernels(x) else None
        if around is not None:
            if call[-1] and all(t is None or type(t) in TENSORS for t in (around.weight, around.bias, residual)):
                return _conv_norm(call, x, around, residual, relu is not None, passes, private)
            return _by_moments(call, crops, around, residual, relu is not None), x

    if crops is None:
        y = conv(x)
    elif call is not None and conv.groups == 1 and on_kernels(x):
        image, weight, bias, geometry, window, here = call
        if here:
            y = convolve_now(image, weight, bias, geometry, window)
        else:
            y, _ = ops.conv2d_moments(image, weight, bias, *geometry, crops=crops, moments=False)
        y = y.flatten(0, 1)
    else:
        y = conv(torch.cat([crop.cut(x) for crop in crops]))
    if joins and (residual is None or (isinstance(residual, Tensor) and residual.shape == y.shape)):
        assert norm is not None
        return norm(y, residual, relu is not None), x
    if norm is not None:
        y = norm(y)
    if add_in_place:
        y += residual
    elif residual is not None:
        y = y + residual
    return activate(y, relu), x


def on_kernels(x: Tensor) -> bool:
    """Whether Triton runs here: torch's own operators need a pass of their own for what the kernels do on the way."""
    return asked_for("triton") or (x.is_cuda and not asked_for("torch"))


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The numbers and words among a module's attributes, which its code may read."""
    kinds = (bool, int, float, str, type(None))
    at_each_call = nn.BatchNorm2d.__constants__ if isinstance(module, PackedBatchNormThen2d) else ()
    read = {"training", *at_each_call}
    return {name: value for name, value in vars(module).items() if type(value) in kinds and name not in read}


def unhooked(module: nn.Module) -> bool:
    own = vars(module)
    return "forward" not in own and not any(map(own.get, HOOKS))


def unchanged(part: nn.Module | None, kind: type[nn.Module]) -> bool:
    return part is None or (type(part) is kind and unhooked(part))


def is_known(conv: nn.Module, norm: nn.Module | None, relu: nn.Module | str | None) -> bool:
    """Whether a layer's parts are what they are taken for, and nobody looks on at one of them."""
    return is_known_relu(relu) and unchanged(conv, PackedConv2d) and unchanged(norm, PackedBatchNorm2d)


def is_known_relu(relu: nn.Module | str | None) -> bool:
    return relu is None or isinstance(relu, str) or (relu_of(relu) > 0 and unhooked(relu))


def relu_of(relu: nn.Module | str | None) -> int:
    """1 for a ReLU, 6 for a ReLU6, modules or functions by their names; 0 for anything else."""
    if isinstance(relu, nn.ReLU6):
        return 6 if type(relu) is nn.ReLU6 and (relu.min_val, relu.max_val) == (0, 6) else 0
    if isinstance(relu, str):
        return 6 if relu == "relu6" else 1
    return int(type(relu) is nn.ReLU)


def activate(y: Tensor, relu: nn.Module | str | None) -> Tensor:
    """y past a ReLU, a module or a function by its name, if there is one."""
    if relu is None or isinstance(relu, nn.Module):
        return y if relu is None else relu(y)
    return getattr(F if relu == "relu6" else torch, relu)(y)


def _needs_gradient(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad


_Call = tuple[Tensor, Tensor, Tensor | None, Geometry, tuple[int, ...], bool]


def _call(x: Tensor, crops: Sequence[Crop] | None, conv: PackedConv2d) -> _Call | None:
    """x, rows (K·N, C, H, W) or the image, weight, bias, stride, padding and dilation, the window of crops.

    And whether nobody looks on at one operator of all; of an image's own gradient the others know. None where no
    operator takes them.
    """
    compiled = torch.compiler.is_compiling()  # which reads no ContextVar
    if crops is None and (compiled or x.dim() != 4 or x.shape[0] % (batch_rows.get() or conv._twin_K)):
        conv._twin_check(x)
    weight, bias = conv.weight, conv.bias
    if x.device.type not in ("cpu", "cuda") or any(t is not None and t.dtype not in DTYPES for t in (x, weight, bias)):
        return None
    here = unwatched(x, weight, bias) and (crops is None or not (x.requires_grad and torch.is_grad_enabled()))
    x, weight, bias = (autocast_now if here else autocast)(x, weight, bias)
    geometry: Any = conv.stride, conv.padding, conv.dilation
    if isinstance(conv.padding, str):
        geometry = arguments(conv.kernel_size, *geometry)
    window = () if crops is None else window_of(crops, x.shape, weight.shape[0])
    return x, weight, bias, geometry, window, here


def _shape(call: _Call) -> tuple[int, ...]:
    """(K, N, O, H', W') of what a call gives."""
    x, weight, _, geometry, window, _ = call
    K, N = weight.shape[0], x.shape[0] if window else x.shape[0] // weight.shape[0]
    find = output_shape if torch.compiler.is_compiling() else _output_shape  # no cache holds symbols
    return find((K, N, x.shape[1], *(window[:2] or x.shape[2:])), weight.shape, *geometry)


_output_shape = functools.lru_cache(maxsize=1024)(output_shape)


def _fits(residual: Any, call: _Call) -> bool:
    """Whether the operators add it: a tensor of the output's shape, dtype and device."""
    x = call[0]
    if not isinstance(residual, Tensor) or (residual.dtype, residual.device) != (x.dtype, x.device):
        return False
    K, N, *rest = _shape(call)
    return tuple(residual.shape) == (K * N, *rest)


def affines(*norms: Any) -> list[tuple[Tensor, Tensor] | None]:
    """scale and shift (K, C) float32 of every norm that uses its running statistics and needs no gradient."""
    affine = [_is_affine(norm) for norm in norms]
    ready = [norm for norm, is_affine in zip(norms, affine, strict=True) if is_affine]
    if not ready:
        return [None] * len(norms)

    def vectors(name: str, absent: float = 0.0) -> list[Tensor]:
        pairs = [(norm.running_var, getattr(norm, name)) for norm in ready]
        return [torch.full_like(var, absent, dtype=torch.float32) if t is None else t.float() for var, t in pairs]

    with torch.no_grad():  # a few launches for all layers together
        scales = torch._foreach_rsqrt(torch._foreach_add(vectors("running_var"), [norm.eps for norm in ready]))
        scales = torch._foreach_mul(scales, vectors("weight", 1.0))
        shifts = torch._foreach_sub(vectors("bias"), torch._foreach_mul(vectors("running_mean"), scales))
    pairs = iter(zip(scales, shifts, strict=True))
    return [next(pairs) if is_affine else None for is_affine in affine]


def _is_affine(norm: nn.Module) -> bool:
    if type(norm) is not PackedBatchNorm2d or norm.training or norm.running_mean is None or norm.running_var is None:
        return False
    gradient = torch.is_grad_enabled() and any(map(_needs_gradient, (norm.weight, norm.bias)))
    return not gradient and norm.running_var.dtype in DTYPES


def _by_batch(norm: PackedBatchNorm2d, call: _Call) -> Norm | None:
    """It, where it normalises by its batch's statistics, in a way that the operators do, too."""
    mean, var = norm.running_mean, norm.running_var
    if not norm.training and (mean is not None or var is not None):
        return None
    moved = (mean, var, norm.num_batches_tracked) if norm.training and norm.track_running_stats else (None,) * 3
    for t in moved:  # without momentum a step of another size for every batch
        if t is not None and (norm.momentum is None or not t.is_contiguous()):
            return None
    _, N, _, H, W = _shape(call)
    if N * H * W <= 1:
        return None
    return Norm(norm.weight, norm.bias, *moved, 0.0 if norm.momentum is None else norm.momentum, norm.eps)


OnCPU = tuple[Tensor, Tensor, Tensor | None, How, Norm | None]


def _on_cpu(x: Tensor, call: _Call, conv: PackedConv2d, norm: PackedBatchNorm2d | None, residual: Any) -> OnCPU | None:
    """What `cpu_layer` takes of the layer, but for residual and ReLU; None where it has no operator of its own."""
    _, weight, bias, geometry, window, here = call
    around = None if norm is None else _by_batch(norm, call)
    if not here or window or (norm is None) != (around is None) or (norm is None and residual is not None):
        return None
    if not cpu_takes(weight, bias, residual, *(around or ())[:4]):
        return None
    x = settle(x)
    made = call_of(x, weight, bias, geometry, around, x.requires_grad, conv.groups > 1)
    return None if made is None else (x, weight, bias, made, around)


def on_cpu(
    x: Tensor, conv: PackedConv2d, norm: PackedBatchNorm2d | None, residual: Any, relu: nn.Module | str | None
) -> OnCPU | None:
    """The same for rows x (K·N, C, H, W), which the layer's modules are asked about."""
    call = _call(x, None, conv) if is_known(conv, norm, relu) and runs_cpu(x) else None
    if call is None or not (residual is None or _fits(residual, call)):
        return None
    return _on_cpu(x, call, conv, norm, residual)


def _conv_norm(
    call: _Call, given: Tensor, norm: Norm, residual: Tensor | None, relu: bool, passes: bool, private: bool
) -> tuple[Tensor, Tensor]:
    """The layer by one operator each way, and x for others: as it was given, where autocast changed it."""
    x, weight, bias, geometry, window, _ = call
    passes = passes and x is given
    y, passed = conv_norm(x, weight, bias, geometry, norm, residual, relu, window, passes, private)
    return y, passed if passes else given


def _by_moments(call: _Call, crops: Sequence[Crop] | None, norm: Norm, residual: Tensor | None, relu: bool) -> Tensor:
    """A batch norm by its batch's statistics, which the convolution takes while it writes what they are of."""
    x, weight, bias, geometry, *_ = call
    members = (weight.shape[0], -1)
    y, moments = ops.conv2d_moments(x if crops else x.unflatten(0, members), weight, bias, *geometry, crops=crops)
    if norm.counter is not None:
        norm.counter.add_(1)
    added = None if residual is None else residual.unflatten(0, members)
    vectors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    return ops.batch_norm(y, *vectors, True, norm.momentum, norm.eps, added, relu, moments).flatten(0, 1)
