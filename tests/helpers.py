"""The first property of everything here: a packed module trains each member as if it were alone."""

import math

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from decompk.kernels import conv
from decompk.kernels.call import dgrad_call, fprop_call, wgrad_call
from decompk.kernels.conv.form import Choice
from decompk.kernels.layout import in_layout
from decompk.kernels.problem import Epilogue
from decompk.ops import conv as conv_op
from decompk.ops import conv_norm as conv_norm_op
from decompk.ops import fused as fused_op
from decompk.packed.fused_pool import run_pool
from decompk.packed.pack import pack
from decompk.packed.twin import deep_copy
from decompk.train import open_data

OUTPUT, GRADIENT, TRAINED = 1e-10, 1e-9, 1e-8  # float64


class HostValues(TorchDispatchMode):
    """Names what makes tensors of Python's numbers: on a GPU that copy, of pageable memory, ends a capture."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in ("aten::lift_fresh", "aten::lift_fresh_copy", "aten::scalar_tensor"):
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def members_of(make, count=3):
    """`count` float64 networks of one architecture, each from its own seed."""
    members = []
    for seed in range(count):
        torch.manual_seed(seed)
        members.append(make().double())
    return members


def by_form(form, p, x, weight, dy, bias=None):
    """What p.kind computes by the form of that name, on tensors laid as packed ones are."""
    choice = Choice(conv.named(form), None, math.nan, "asked for")
    x, dy = (None if t is None else in_layout(t, "member") for t in (x, dy))
    call = fprop_call(x, weight, bias, (p.stride, p.padding, p.dilation))
    if p.kind == "fprop":
        return call.fprop(choice, x, weight, Epilogue(bias))
    if p.kind == "dgrad":
        return dgrad_call(call, dy).dgrad(choice, dy, weight)
    return wgrad_call(call, dy).wgrad(choice, dy, x)


def asked_by_operators(monkeypatch):
    """Receives (Problem, Choice) of every convolution that runs from now on."""
    found, chosen = [], conv_op.chosen

    def seen(call, asked, *fused):
        choice = chosen(call, asked, *fused)
        found.append((call.problem, choice))
        return choice

    for module in (conv_op, conv_norm_op, fused_op):
        monkeypatch.setattr(module, "chosen", seen)
    return found


def assert_right(found, wanted, torchs, what):
    """At most twice torch's own error in the same dtype, plus 1e-6, relative to the norm."""
    found = found.cpu()
    assert not found.isnan().any(), f"{what}: NaN"
    norm = wanted.norm().clamp_min(1e-30)
    error, theirs = ((t.double() - wanted).norm() / norm for t in (found, torchs))
    assert error <= 2 * theirs + 1e-6, f"{what}: {error:.1e}, torch's own {theirs:.1e}"


def surroundings(t):
    """What lies around t in its storage, as bits."""
    whole = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0).clone()
    whole.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(0)
    return whole.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


def leaves(tree):
    """The tensors of a nested output, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif hasattr(tree, "__dataclass_fields__"):
        tree = vars(tree).values()
    elif not isinstance(tree, tuple | list):
        return []
    return [leaf for part in tree for leaf in leaves(part)]


def loss_of(outputs):
    """A scalar with O(1), non-constant gradients in every output; the same for packed and single members."""
    total = 0
    for i, leaf in enumerate(outputs):
        phases = torch.arange(leaf.numel(), dtype=leaf.dtype).view(leaf.shape) + i
        total = total + ((leaf * torch.cos(phases)).sum() + (leaf**2).sum()) / leaf.shape[0]
    return total


def assert_close(packed, single, tolerance, what):
    assert packed.shape == single.shape, f"{what}: {tuple(packed.shape)} packed, {tuple(single.shape)} alone"
    if single.numel():
        error = (packed.double() - single.double()).abs().max().item()
        assert error <= tolerance, f"{what}: error {error:.2e} > {tolerance:.0e}"


def assert_same_tensors(packed, members, tolerance):
    """Every parameter and statistic of member k is the packed one's slice k, under the same name."""
    stacked = packed.state_dict()
    assert stacked.keys() == members[0].state_dict().keys()
    for k, member in enumerate(members):
        for name, tensor in member.state_dict().items():
            assert_close(stacked[name][k], tensor, tolerance, f"{name} of member {k}")


def assert_packed_equals_separate(members, inputs, steps=5, packed=None, lr=1e-2):
    """Train `members` with one Adam each, and packed with one Adam: outputs, gradients, weights, statistics agree.

    inputs: (N, …), shared by all members, or (K, N, …), float64 like the members. In train mode, `steps` times; then
    the outputs in eval mode, packed and unpacked. Returns the packed module.
    """
    members = [deep_copy(member, {}).train() for member in members]
    packed = pack(members) if packed is None else packed
    packed.train()
    shared = inputs.dim() == (packed.input_dims or 2)
    own = [inputs if shared else inputs[k] for k in range(len(members))]

    together = torch.optim.Adam(packed.parameters(), lr)
    alone = [torch.optim.Adam(member.parameters(), lr) for member in members]
    for step in range(steps):
        together.zero_grad()
        outputs = leaves(packed(inputs))
        sum(loss_of([leaf[k] for leaf in outputs]) for k in range(len(members))).backward()
        gradients = {name: p.grad for name, p in packed.named_parameters()}
        for k, member in enumerate(members):
            alone[k].zero_grad()
            single = leaves(member(own[k]))
            loss_of(single).backward()
            assert len(outputs) == len(single) > 0
            for leaf, one in zip(outputs, single, strict=True):
                assert_close(leaf[k], one, OUTPUT if step == 0 else TRAINED, f"output of member {k} in step {step}")
            for name, p in member.named_parameters():
                if p.grad is None:
                    assert gradients[name] is None or not gradients[name][k].any(), f"gradient of {name}"
                elif step == 0:
                    assert_close(gradients[name][k], p.grad, GRADIENT, f"gradient of {name} of member {k}")
            alone[k].step()
        together.step()
    assert_same_tensors(packed, members, TRAINED)

    packed.eval()
    unpacked = packed.unpack()
    with torch.no_grad():
        outputs = leaves(packed(inputs))
        for k, member in enumerate(members):
            single, again = leaves(member.eval()(own[k])), leaves(unpacked[k](own[k]))
            for leaf, one, two in zip(outputs, single, again, strict=True):
                assert_close(leaf[k], one, TRAINED, f"output of member {k} in eval mode")
                assert_close(two, leaf[k], OUTPUT, f"output of unpacked member {k}")
    return packed.train()


def save_digits(path, train, test):
    """So many of scikit-learn's digits, 16×16, as the .npz file that `decompk train` takes; returns its name."""
    data, images = open_data("digits", size=16), {}
    for name, split, count in (("train", data.train, train), ("test", data.test, test)):
        images[f"x_{name}"], images[f"y_{name}"] = split.pixels[:count, 0].numpy(), split.labels[:count].numpy()
    np.savez(path, **images)
    return str(path)


def used_members(make, count, dtype=None):
    """`count` members whose running statistics and affine parameters are not those of the start."""
    members = []
    for seed in range(count):
        torch.manual_seed(seed)
        members.append(make().to(dtype))
        for name, tensor in members[-1].named_parameters():
            if tensor.dim() == 1:
                torch.nn.init.normal_(tensor, 1.0 if name.endswith("weight") else 0.0, 0.3)
        for name, tensor in members[-1].named_buffers():
            if "running" in name:
                tensor.uniform_(0.5, 1.5)
    return members


def assert_pools_as_torch(pool, channels):
    """What runs `pool` here is not torch's, and gives its values and gradients, which can be differentiated again."""
    x = torch.randn(4, channels, 7, 9).mul(2).round()  # with equal values
    x[0, 0, 2, 3], x[1] = float("nan"), float("-inf")
    x = x.contiguous(memory_format=torch.channels_last)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = run_pool(a, pool), pool(b)
    assert type(y.grad_fn) is not type(z.grad_fn)
    dy = torch.randn_like(z).requires_grad_()
    (found,) = torch.autograd.grad(y, a, dy, retain_graph=True)
    (followed,) = torch.autograd.grad(y, a, dy, create_graph=True)
    (wanted,) = torch.autograd.grad(z, b, dy.detach())
    torch.testing.assert_close(y, z, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(followed, wanted)
    assert torch.autograd.grad(followed.sum(), dy)[0].unique().tolist() == [1.0]
