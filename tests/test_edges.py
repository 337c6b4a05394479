"""NaN, infinity, and numbers that are tiny, huge or far from zero: as in torch, element by element."""

import itertools
from dataclasses import replace

import by_config
import pytest
import torch
import torch.nn.functional as F
from helpers import by_form
from torch import nn

import decompk
from decompk import ops
from decompk.kernels import conv, cpu
from decompk.kernels import device as devices
from decompk.kernels.device import KNOWN
from decompk.kernels.problem import PASSES, Problem
from decompk.ops.norm import batch_norm_rows

NAN, INF = float("nan"), float("inf")
BAD = [NAN, INF, -INF]

FORMS = [form.name for form in conv.FORMS if form.backend == "cpu"]
needs_cpu = pytest.mark.skipif(cpu.why_not() is not None, reason=f"no C++ kernels: {cpu.why_not()}")
needs_interpreter = pytest.mark.skipif(not devices.interpreted(), reason="runs in Triton's interpreter")


def problem(K, N, C, O, H, W, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)):
    return Problem("fprop", "float32", K, N, C, O, H, W, kernel, stride, padding, dilation)


PROBLEMS = {
    "3×3": problem(2, 2, 8, 8, 6, 5),
    "strided": problem(2, 2, 8, 4, 7, 6, stride=(2, 2)),
    "images": problem(2, 1, 3, 8, 9, 9, (5, 5), (2, 2), (2, 2)),
    "1×1": problem(2, 2, 16, 16, 4, 5, (1, 1), padding=(0, 0)),
    "wide": problem(2, 1, 16, 24, 5, 9),
    "more padding than kernel": problem(2, 2, 8, 8, 4, 3, padding=(3, 4)),
    "one pixel": problem(2, 2, 8, 8, 1, 1),
}
# Member 1's, NHWC: of the first pixel, whose taps reach over the edge, of one inside, and of the last.
PLACES = {"corner": (0, 0), "inside": (2, 3), "last": (-1, -1)}


def operands(p):
    """x, weight and dy of `p`, members first: (K, N, C, H, W), (K, O, C, kh, kw), (K, N, O, H', W')."""
    return [
        torch.randn(p.K, p.N, p.C, p.H, p.W),
        torch.randn(p.K, p.O, p.C, *p.kernel),
        torch.randn(p.K, p.N, p.O, *p.out_size),
    ]


def exact(p, x, weight, dy):
    """What p.kind computes, tap by tap: padding adds nothing, where torch's own now and then multiplies its zeros."""
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    y = torch.zeros_like(dy)
    for tap in itertools.product(*map(range, p.kernel)):
        reads, writes = [], []
        for size, out, at, stride, pad, dilation in zip(
            (p.H, p.W), p.out_size, tap, p.stride, p.padding, p.dilation, strict=True
        ):
            inside = [o for o in range(out) if 0 <= o * stride + at * dilation - pad < size]
            reads.append([o * stride + at * dilation - pad for o in inside])
            writes.append(inside)
        part = torch.einsum("knchw,koc->knohw", x[:, :, :, reads[0]][..., reads[1]], weight[..., tap[0], tap[1]])
        rows = torch.zeros((*y.shape[:3], p.out_size[0], len(writes[1]))).index_add(
            3, torch.tensor(writes[0], dtype=torch.long), part
        )
        y = y.index_add(4, torch.tensor(writes[1], dtype=torch.long), rows)
    if p.kind == "fprop":
        return y.detach()
    return torch.autograd.grad(y, x if p.kind == "dgrad" else weight, dy)[0]


def placed(tensors, victim, place, value):
    """The operands with `value` at a place of member 1's first sample or filter and second channel."""
    tensors = [t.clone() for t in tensors]
    t = tensors[victim]
    row, column = (min(at, size - 1) for at, size in zip(place, t.shape[3:], strict=True))
    t[1, 0, 1, row, column] = value
    return tensors


def assert_as_in_torch(found, wanted, clean):
    """The same elements are NaN and infinite, the others right, and member 0 has not changed a bit."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.equal(found[0], clean[0])


def read_by(kind):
    """Which of x, weight and dy a pass reads."""
    return {"fprop": (0, 1), "dgrad": (2, 1), "wgrad": (0, 2)}[kind]


def on_cpu_kernels():
    """(form, problem) of every pass that the C++ kernels compute of `PROBLEMS`."""
    for (name, p), kind, form in itertools.product(PROBLEMS.items(), PASSES, FORMS):
        if conv.named(form).why_not(p.of(kind), None, KNOWN[90]) is None:
            yield pytest.param(form, p.of(kind), id=f"{kind}-{form}-{name}")


@needs_cpu
@pytest.mark.parametrize("form, p", on_cpu_kernels())
def test_the_processors_convolutions_have_nan_and_infinity_where_torchs_have_them(form, p):
    tensors = operands(p)
    clean = by_form(form, p, *tensors)
    for victim, place, value in itertools.product(read_by(p.kind), PLACES.values(), BAD):
        hurt = placed(tensors, victim, place, value)
        assert_as_in_torch(by_form(form, p, *hurt), exact(p, *hurt), clean)


@needs_cpu
@pytest.mark.parametrize("form, p", on_cpu_kernels())
def test_a_member_that_has_diverged_is_nan_where_torchs_is(form, p):
    """Its operands are NaN throughout, or here and there, as behind a pooling: neither is computed tap by tap."""
    tensors = operands(p)
    clean = by_form(form, p, *tensors)
    for victim, share in itertools.product(read_by(p.kind), (1.0, 0.3)):
        hurt = [t.clone() for t in tensors]
        hurt[victim][1].masked_fill_(torch.rand(hurt[victim][1].shape) < share, NAN)
        assert_as_in_torch(by_form(form, p, *hurt), exact(p, *hurt), clean)


def smallest(form, p):
    """The candidate of the form with the fewest programs: the interpreter is slow."""
    found = min(form.configs(p), key=lambda c: (form.programs(p, replace(c, splits=1)), c.atomic), default=None)
    return found and replace(found, splits=1, atomic=False)


@needs_interpreter
@pytest.mark.parametrize("name", ["3×3", "strided"])
@pytest.mark.parametrize("form", map(conv.named, ("tile", "pointer", "band")), ids=lambda form: form.name)
@pytest.mark.parametrize("kind", PASSES)
def test_tritons_convolutions_lose_no_nan_and_show_none_to_another_member(kind, form, name):
    """To more elements than torch's they may give it: they multiply the zeros of padding and of a band, too."""
    p = PROBLEMS[name].of(kind)
    config = smallest(form, p)
    if config is None or (reason := form.fits(p, config)):
        pytest.skip("no candidates" if config is None else reason)

    def run(x, weight, dy):
        x, weight, dy = (t.movedim(2, -1).contiguous() for t in (x, weight, dy))
        out = torch.full_like({"fprop": dy, "dgrad": x, "wgrad": weight}[kind], NAN)
        read = {"fprop": (x, weight), "dgrad": (dy, weight), "wgrad": (dy, x)}[kind]
        getattr(by_config, kind)(p, config, *read, out)
        return out.movedim(-1, 2)

    tensors = operands(p)
    clean = run(*tensors)
    for victim, (where, value) in itertools.product(read_by(kind), [("corner", NAN), ("inside", INF)]):
        hurt = placed(tensors, victim, PLACES[where], value)
        found, wanted = run(*hurt), exact(p, *hurt)
        assert torch.equal(found[0], clean[0])
        assert not (found[1].isfinite() & ~wanted[1].isfinite()).any(), f"{value} at the {where} is lost"
        both = found.isfinite()
        torch.testing.assert_close(found[both], wanted[both], rtol=1e-4, atol=1e-4)
        if form.name != "band" and kind != "wgrad" and victim != 1:  # one pixel meets its own taps alone
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


# ---- batch norm -----------------------------------------------------------------------------------------------------


def norm_inputs(K=3, N=4, C=6, H=5, W=4):
    shape = (K * N, C, H, W)
    inputs = dict(x=torch.randn(shape), residual=torch.randn(shape), dy=torch.randn(shape))
    inputs |= dict(weight=torch.rand(K, C) + 0.5, bias=torch.randn(K, C), mean=torch.randn(K, C), var=torch.rand(K, C))
    for name in ("x", "residual", "dy"):
        inputs[name] = inputs[name].contiguous(memory_format=torch.channels_last)
    return inputs


def norm_by(normalise, inputs, training, added, relu, momentum=0.1, eps=1e-5):
    """y, the gradients and the running statistics of a batch norm: everything of (K, …)."""
    t = {name: value.clone() for name, value in inputs.items()}
    K = t["weight"].shape[0]
    leaves = {name: t[name].requires_grad_() for name in ("x", "weight", "bias", *(["residual"] if added else []))}
    y = normalise(t, K, training, momentum, eps, t["residual"] if added else None, relu)
    found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), t["dy"]), strict=True))
    found = {f"d{name}": gradient for name, gradient in found.items()} | {"y": y.detach()}
    found = {name: value.unflatten(0, (K, -1)) if value.dim() == 4 else value for name, value in found.items()}
    return found | {name: t[name] for name in ("mean", "var")}


def by_cpu(t, K, training, momentum, eps, residual, relu):
    vectors = t["weight"], t["bias"], t["mean"], t["var"]
    return batch_norm_rows(t["x"], *vectors, K, training, momentum, eps, residual, relu)


def by_triton(t, K, training, momentum, eps, residual, relu):
    vectors = t["weight"], t["bias"], t["mean"], t["var"]
    x, residual = (None if v is None else v.unflatten(0, (K, -1)) for v in (t["x"], residual))
    with decompk.backend("triton"):
        return ops.batch_norm(x, *vectors, training, momentum, eps, residual, relu).flatten(0, 1)


def by_torch(t, K, training, momentum, eps, residual, relu):
    """On NCHW, where torch's own is the more exact one."""
    members = [
        F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
        for x, mean, var, weight, bias in zip(
            t["x"].contiguous().unflatten(0, (K, -1)), *(t[n] for n in ("mean", "var", "weight", "bias")), strict=True
        )
    ]
    y = torch.cat(members)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


BY = [
    pytest.param(by_cpu, marks=needs_cpu, id="C++"),
    pytest.param(by_triton, marks=needs_interpreter, id="Triton"),
]


@pytest.mark.parametrize("normalise", BY)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("added, relu", [(False, False), (False, True), (True, True)])
def test_batch_norms_have_nan_and_infinity_where_torchs_have_them(normalise, training, added, relu):
    inputs = norm_inputs()
    clean = norm_by(normalise, inputs, training, added, relu)
    for name, value in itertools.product(("x", "dy", *(["residual"] if added else []), "mean", "bias"), BAD):
        hurt = {n: t.clone() for n, t in inputs.items()}
        if hurt[name].dim() == 4:
            hurt[name].unflatten(0, (3, -1))[1, 1, 1, 2, 3] = value
        else:
            hurt[name][1, 2] = value
        found, wanted = (norm_by(by, hurt, training, added, relu) for by in (normalise, by_torch))
        for what, expected in wanted.items():
            case = f"{what} of {value} in {name}"
            assert torch.equal(found[what][[0, 2]], clean[what][[0, 2]]), f"{case}: another member has changed"
            mine, theirs = found[what][1], expected[1]
            if what in ("mean", "var"):  # which of both a statistic is differs between torch's own devices
                assert torch.equal(mine.isfinite(), theirs.isfinite()), case
            else:
                assert torch.equal(mine.isnan(), theirs.isnan()), case
                assert torch.equal(mine.isinf(), theirs.isinf()), case
            both = theirs.isfinite()
            torch.testing.assert_close(mine[both], theirs[both], rtol=1e-4, atol=1e-4)


HARD = {
    "far from zero": lambda shape: torch.randn(shape) + 1000,
    "farther": lambda shape: 0.1 * torch.randn(shape) + 3000,
    "constant": lambda shape: torch.full(shape, 3.3),
    "a first row far away": lambda shape: torch.randn(shape).index_fill_(2, torch.tensor([0]), 1e4),
    "members far apart": lambda shape: torch.randn(shape) + 1e4 * (torch.arange(shape[0]) % 4)[:, None, None, None],
    "tiny": lambda shape: 1e-15 * torch.randn(shape),
    "huge": lambda shape: 1e15 * torch.randn(shape),
    "tiniest": lambda shape: 1e-30 * torch.randn(shape),
    "hugest": lambda shape: 1e30 * torch.randn(shape),
    "denormal": lambda shape: 1e-40 * torch.randn(shape),
    "minus zero": lambda shape: -torch.zeros(shape),
}


@pytest.mark.parametrize("normalise", BY)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("values", HARD)
def test_batch_norms_are_as_exact_as_torchs_on_hard_numbers(normalise, training, values):
    if normalise is by_triton and training and values == "hugest":
        pytest.skip("float32 sums of squares overflow, as in torch's own kernels on a GPU")
    inputs = norm_inputs(H=13, W=12)
    inputs["x"] = HARD[values](inputs["x"].shape).contiguous(memory_format=torch.channels_last)
    if values in ("tiniest", "denormal", "hugest") and not training:
        inputs["mean"], inputs["var"] = inputs["x"].unflatten(0, (3, 4)).mean((1, 3, 4)), torch.ones(3, 6)
    options = training, True, False, 1.0
    found, own = (norm_by(by, inputs, *options) for by in (normalise, by_torch))
    exact = norm_by(by_torch, {name: t.double() for name, t in inputs.items()}, *options)
    size = inputs["x"].abs().max().item()
    for what, right in exact.items():
        if what == "var" and right.max() > 1e38:
            continue  # no float32
        least = right.numel() ** 0.5 * {"mean": size, "var": size * size}.get(what, 0)  # a mean may be near zero
        scale = max(right.norm().item(), least, 1e-38)
        error, theirs = ((t[what].double() - right).norm().item() / scale for t in (found, own))
        assert error <= 2 * theirs + 1e-6, f"{what}: {error:.1e}, torch's own {theirs:.1e}"


@needs_cpu
@pytest.mark.parametrize("values", ["far from zero", "members far apart", "tiniest", "hugest", "denormal"])
@pytest.mark.parametrize("form", FORMS)
def test_the_processors_convolutions_are_as_exact_as_torchs_on_hard_numbers(form, values):
    for kind in PASSES:
        p = problem(4, 4, 16, 8, 9, 8).of(kind)
        x, weight, dy = operands(p)
        weight -= weight.mean((3, 4), keepdim=True)  # what is left of large means is small
        read = dy if kind == "dgrad" else x
        read.copy_(HARD[values](read.flatten(0, 1).shape).view_as(read))

        found, own = (by_form(f, p, x, weight, dy) for f in (form, "loop"))
        right = by_form("loop", p, x.double(), weight.double(), dy.double())
        error, theirs = ((t.double() - right).norm() / right.norm() for t in (found, own))
        assert error <= 2 * theirs + 1e-6, f"{kind}: {error:.1e}, torch's own {theirs:.1e}"


@pytest.mark.parametrize("momentum", [1.0, None])
def test_a_plain_average_starts_from_nothing_of_the_old_statistics(momentum):
    members = [nn.BatchNorm2d(4, momentum=momentum) for _ in range(3)]
    x = 1e-4 * torch.randn(8, 4, 6, 6)
    packed = decompk.pack(members)
    for _ in range(2 if momentum is None else 1):
        packed(x)
        for member in members:
            member(x)
    for k, member in enumerate(members):
        torch.testing.assert_close(packed.running_var[k], member.running_var, rtol=1e-6, atol=0)
        torch.testing.assert_close(packed.running_mean[k], member.running_mean, rtol=1e-5, atol=1e-12)


# ---- networks -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.again, self.last = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.last(self.again(x)) + x)
        return self.head(F.max_pool2d(x, 2).mean((2, 3)))


BACKENDS = [
    pytest.param("torch"),
    pytest.param("loop"),
    pytest.param("cpu", marks=needs_cpu),
    pytest.param("triton", marks=needs_interpreter),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [lambda net: net, decompk.fuse], ids=["packed", "fused"])
def test_a_diverged_member_looks_diverged_and_its_neighbours_do_not(make, training, backend):
    members = [Net().train(training) for _ in range(3)]
    packed = make(decompk.pack(members)).train(training)
    x, target = torch.randn(3, 2, 4, 4, 4), torch.randint(3, (2,))
    x[1, 1, 1, 2, 2] = NAN
    with decompk.backend(backend):
        losses = F.cross_entropy(packed(x).flatten(0, 1), target.repeat(3), reduction="none").unflatten(0, (3, -1))
        if training:
            losses.sum().backward()
    for k, member in enumerate(members):
        single = F.cross_entropy(member(x[k]), target, reduction="none")
        assert torch.equal(losses[k].isnan(), single.isnan())
        if training:
            single.sum().backward()
            for name, p in member.named_parameters():
                found = packed.get_parameter(name).grad[k]
                assert bool(found.isfinite().all()) == (k != 1) == bool(p.grad.isfinite().all()), name


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("channels", [(3, 4), (4, 3)])
def test_a_nan_stays_in_its_member_in_bfloat16_too(channels, layer, mode):
    """torch's grouped convolution, channels_last, multiplies the next group's first channel by zero."""
    packed = decompk.pack([layer(*channels, 3, padding=1) for _ in range(3)], rehearse=False)
    x = torch.randn(3, 2, channels[0], *[6] * (1 if layer is nn.Conv1d else 2))
    if mode == "bfloat16":
        packed, x = packed.bfloat16(), x.bfloat16()
    with torch.no_grad():
        packed.weight[1], x[1] = NAN, NAN
    x.requires_grad_()
    with decompk.backend("torch"), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        y = packed(x)
    dy = torch.randn_like(y)
    dy[1] = NAN
    for found in (y, *torch.autograd.grad(y, (x, packed.weight), dy)):
        assert found[[0, 2]].isfinite().all() and found[1].isnan().all()
