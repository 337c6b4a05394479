"""Layer norms of K members on a CPU, by one kernel each way."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import decompk
from decompk.kernels import cpu
from decompk.kernels.call import settle
from decompk.ops.layer_norm import layer_norm_rows

if reason := cpu.why_not():
    pytest.skip(f"no C++ kernels: {reason}", allow_module_level=True)


@pytest.fixture
def called(monkeypatch):
    """Receives the name of every pass that a kernel runs."""
    found = []
    for name in ("layer_norm", "layer_norm_backward"):
        run = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, name=name, run=run: found.append(name) or run(*a))
    return found


@pytest.fixture(autouse=True)
def one_thread_afterwards():
    yield
    torch.set_num_threads(1)


def tensors(K, R, D, affine=(True, True), mean=0.0, deviation=1.0):
    """x, weight, bias and dy; rows of x around `mean`, members one after the other."""
    made = [torch.randn(K, D) + 1 if given else None for given in affine]
    return mean + deviation * torch.randn(K * R, D), *made, torch.randn(K * R, D)


def by_kernel(x, weight, bias, dy, K, eps=1e-5):
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    y = layer_norm_rows(*leaves, K, x.shape[1:], eps)
    y.backward(dy)
    return {"y": y.detach(), **{f"d{i}": t.grad for i, t in enumerate(leaves) if t is not None}}


def by_torch(x, weight, bias, dy, K, eps=1e-5, dtype=torch.float32):
    leaves = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in (x, weight, bias)]
    vectors = ([None] * K if t is None else t for t in leaves[1:])
    rows = zip(leaves[0].chunk(K), *vectors, strict=True)
    y = torch.cat([F.layer_norm(x, x.shape[1:], w, b, eps) for x, w, b in rows])
    y.backward(dy.to(dtype))
    return {"y": y.detach(), **{f"d{i}": t.grad for i, t in enumerate(leaves) if t is not None}}


def assert_as_exact_as_torch(given, K, eps=1e-5):
    """Twice torch's own error at most, plus 1e-6, relative to the norm; rows of one value have none in dx."""
    x, *_, dy = given
    found, alone = by_kernel(*given, K, eps), by_torch(*given, K, eps)
    for name, exact in by_torch(*given, K, eps, torch.float64).items():
        size = exact.norm().clamp_min(1e-2 if x.shape[1] > 1 else dy.norm() * eps**-0.5)
        error, theirs = ((t[name].double() - exact).norm() / size for t in (found, alone))
        assert error <= 2 * theirs + 1e-6, f"{name}: {error:.1e}, torch's own {theirs:.1e}"


@pytest.mark.parametrize("D", [1, 3, 8, 17, 64, 100, 768])
@pytest.mark.parametrize("R", [1, 5, 64, 1000])
@pytest.mark.parametrize("K", [1, 3])
def test_all_is_as_exact_as_torchs(K, R, D):
    assert_as_exact_as_torch(tensors(K, R, D), K)


@pytest.mark.parametrize("affine", list(itertools.product((True, False), repeat=2)))
def test_weight_and_bias_may_be_absent(affine):
    assert_as_exact_as_torch(tensors(2, 13, 20, affine), 2)


@pytest.mark.parametrize(
    "mean, deviation", [(1e3, 1.0), (-1e5, 1.0), (100.0, 1e-3), (0.0, 1e-6), (1e6, 1e-2), (1.0, 0.0)]
)
@pytest.mark.parametrize("D", [5, 64, 300])
def test_a_large_mean_costs_no_digits(mean, deviation, D):
    assert_as_exact_as_torch(tensors(2, 40, D, mean=mean, deviation=deviation), 2)


def test_a_mean_of_any_size_costs_less_than_the_bits_of_x():
    given = tensors(2, 40, 64, mean=1e4)
    found = by_kernel(*given, 2)
    for name, exact in by_torch(*given, 2, dtype=torch.float64).items():
        assert (found[name].double() - exact).norm() <= 1e-6 * exact.norm(), name


@pytest.mark.parametrize("D", [4097, 20_000])
def test_long_rows(D):
    assert_as_exact_as_torch(tensors(2, 3, D), 2)
    assert_as_exact_as_torch(tensors(1, 40, D, mean=30.0), 1)


@pytest.mark.parametrize("size", [1e19, 1e25, 3e37, 1e-30])
def test_squares_of_large_numbers_do_not_overflow(size):
    x, *_ = tensors(2, 6, 40)
    found = layer_norm_rows(x * size, None, None, 2, (40,), 1e-5)
    exact = F.layer_norm((x * size).double(), (40,), eps=1e-5)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "weight", "bias", "dy"])
@pytest.mark.parametrize("D", [3, 40])
def test_infinite_and_missing_numbers_stay_where_torch_has_them(where, value, D):
    given = dict(zip(("x", "weight", "bias", "dy"), tensors(2, 11, D), strict=True))
    given[where][1, 2] = value
    found, expected = by_kernel(**given, K=2), by_torch(**given, K=2)
    for name, theirs in expected.items():
        assert torch.equal(found[name].isfinite(), theirs.isfinite()), name


@pytest.mark.parametrize("D, R", [(1, 2000), (20, 700), (64, 1030), (768, 100), (3000, 40)])
def test_results_do_not_depend_on_the_number_of_threads(D, R):
    given, found = tensors(3, R, D), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found.append(by_kernel(*given, 3))
    for other in found[1:]:
        assert all(torch.equal(other[name], t) for name, t in found[0].items())


def test_a_member_has_the_bits_that_it_has_alone_in_the_kernel():
    x, weight, bias, dy = tensors(3, 50, 24)
    together = by_kernel(x, weight, bias, dy, 3)
    for k, (rows, g) in enumerate(zip(x.chunk(3), dy.chunk(3), strict=True)):
        alone = by_kernel(rows, weight[k : k + 1], bias[k : k + 1], g, 1)
        for name, t in together.items():
            assert torch.equal(t.chunk(3)[k], alone[name]), name


@pytest.mark.parametrize("wanted", list(itertools.product((True, False), repeat=3)))
def test_only_what_is_wanted_is_computed(wanted, monkeypatch):
    x, weight, bias, dy = tensors(2, 9, 20)
    given = [t.requires_grad_(wants) for t, wants in zip((x, weight, bias), wanted, strict=True)]
    seen, run = [], cpu.layer_norm_backward
    monkeypatch.setattr(cpu, "layer_norm_backward", lambda *a: seen.append([t is not None for t in a[4:]]) or run(*a))
    y = layer_norm_rows(*given, 2, (20,), 1e-5)
    if not any(wanted):
        assert not y.requires_grad
        return
    y.backward(dy)
    assert seen == [list(wanted)]
    expected = by_torch(*(t.detach() for t in given), dy, 2)
    for i, t in enumerate(given):
        if t.requires_grad:
            torch.testing.assert_close(t.grad, expected[f"d{i}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False)])  # torch's own fails of a bias alone
def test_what_follows_a_backward_follows_the_norm(affine, called):
    given = tensors(2, 4, 6, affine)

    def penalty(norm):
        leaves = [t.clone().requires_grad_() for t in given[:3] if t is not None]
        vectors = iter(leaves[1:])
        y = norm(leaves[0], *(next(vectors) if given_one else None for given_one in affine))
        dy = given[3].clone().requires_grad_()
        first = torch.autograd.grad(y, leaves, dy * y.detach().cos(), create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.pow(3).sum() for g in first), [leaves[0], dy])]

    def plainly(x, weight, bias):
        vectors = ([None] * 2 if t is None else t for t in (weight, bias))
        return torch.cat([F.layer_norm(x, (6,), *v) for x, *v in zip(x.chunk(2), *vectors, strict=True)])

    expected = penalty(plainly)
    found = penalty(lambda *leaves: layer_norm_rows(*leaves, 2, (6,), 1e-5))
    assert called == ["layer_norm"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_a_batch_of_backwards_runs_at_once():
    x, weight, bias, dy = tensors(2, 4, 6)
    x.requires_grad_()
    several = torch.stack([dy, 2 * dy])
    (found,) = torch.autograd.grad(layer_norm_rows(x, weight, bias, 2, (6,), 1e-5), x, several, is_grads_batched=True)
    expected = by_torch(x.detach(), weight, bias, dy, 2)["d0"]
    torch.testing.assert_close(found, torch.stack([expected, 2 * expected]), rtol=1e-4, atol=1e-5)


def test_hooks_of_saved_tensors_may_lay_them_out_otherwise():
    x, weight, bias, dy = tensors(2, 8, 12)

    def turned(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    with torch.autograd.graph.saved_tensors_hooks(turned, turned):
        found = by_kernel(x, weight, bias, dy, 2)
    for name, t in by_kernel(x, weight, bias, dy, 2).items():
        assert torch.equal(found[name], t), name


# ---- packed ---------------------------------------------------------------------------------------------------------

SHAPES = {
    "tokens": (lambda: nn.LayerNorm(24), (5, 7, 24)),
    "two axes": (lambda: nn.LayerNorm((3, 6)), (4, 3, 6)),
    "one dimension": (lambda: nn.LayerNorm(10, eps=1e-2), (6, 10)),
    "images": (lambda: nn.LayerNorm((3, 4, 5)), (4, 3, 4, 5)),
    "no bias": (lambda: nn.LayerNorm(24, bias=False), (5, 7, 24)),
}


def packed_of(make, count=3):
    members = [nn.Sequential(make()) for _ in range(count)]
    for p in (p for m in members for p in m.parameters()):
        nn.init.normal_(p)
    return members, decompk.pack(members)[0]


def steps(norm, x, dy):
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in norm.parameters())]


@pytest.mark.parametrize("name", SHAPES)
def test_packed_norms_run_the_kernel_and_train_as_alone(name, called):
    make, shape = SHAPES[name]
    members, packed = packed_of(make)
    x, dy = torch.randn(3 * shape[0], *shape[1:]), torch.randn(3 * shape[0], *shape[1:])
    found = steps(packed, x, dy)
    assert called == ["layer_norm", "layer_norm_backward"]
    for k, member in enumerate(members):
        alone = steps(member, x.chunk(3)[k], dy.chunk(3)[k])
        for a, b in zip(found[:2], alone[:2], strict=True):
            torch.testing.assert_close(a.chunk(3)[k], b, rtol=1e-5, atol=1e-5)
        for a, b in zip(found[2:], alone[2:], strict=True):
            torch.testing.assert_close(a[k], b, rtol=1e-5, atol=1e-5)


def test_members_in_turn_have_the_bits_that_they_have_alone(called):
    members, packed = packed_of(lambda: nn.LayerNorm(24))
    x, dy = torch.randn(15, 7, 24), torch.randn(15, 7, 24)
    with decompk.backend("loop"):
        found = steps(packed, x, dy)
    assert not called
    for k, member in enumerate(members):
        alone = steps(member, x.chunk(3)[k], dy.chunk(3)[k])
        assert all(torch.equal(a.chunk(3)[k].view_as(b), b) for a, b in zip(found, alone, strict=True))


def test_without_gradients_and_in_eval_mode_it_runs_too(called):
    members, packed = packed_of(lambda: nn.LayerNorm(24))
    x = torch.randn(15, 7, 24)
    expected = torch.cat([m(rows) for m, rows in zip(members, x.chunk(3), strict=True)])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = packed.eval()(x)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert called == ["layer_norm"] * 2


LAYOUTS = {
    "a transposed view": lambda: torch.randn(6, 24, 7).transpose(1, 2),
    "a slice": lambda: torch.randn(6, 7, 30)[..., 3:27],
    "the same sample": lambda: torch.randn(1, 7, 24).expand(6, 7, 24),
    "images with channels inside": lambda: settle(torch.randn(6, 3, 7, 24)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_inputs_and_gradients_may_lie_anyhow(name, called):
    x = LAYOUTS[name]()
    members, packed = packed_of(lambda: nn.LayerNorm(24))
    y = packed(x.requires_grad_())
    assert y.is_contiguous()
    dy = torch.randn(*y.shape[:-2], 24, y.shape[-2]).transpose(-1, -2)
    (found,) = torch.autograd.grad(y, x, dy)
    assert called == ["layer_norm", "layer_norm_backward"]
    alone = torch.cat([m(rows) for m, rows in zip(members, x.chunk(3), strict=True)])
    (expected,) = torch.autograd.grad(alone, x, dy)
    torch.testing.assert_close(y, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_whoever_looks_on_sees_torchs_own_operators(called):
    _, packed = packed_of(lambda: nn.LayerNorm(8), count=2)
    x = torch.randn(6, 8)
    expected = packed(x)
    assert called.pop() == "layer_norm"
    watched = [
        torch.func.vmap(packed, in_dims=0)(torch.stack([x, x]))[1],
        torch.func.jvp(packed, (x,), (x,))[0],
        copy.deepcopy(packed).double()(x.double()).float(),
    ]
    with decompk.backend("torch"):
        watched.append(packed(x))
    with torch.autocast("cpu", torch.bfloat16):
        watched.append(packed(x))
    assert not called
    for y in watched:
        torch.testing.assert_close(y.float(), expected, rtol=1e-5, atol=1e-5)
    assert packed(x[:0]).shape == (0, 8) and not called


def test_an_input_of_another_shape_ends_as_torchs_own_does():
    _, packed = packed_of(lambda: nn.LayerNorm(8), count=2)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        packed(torch.randn(6, 4))
