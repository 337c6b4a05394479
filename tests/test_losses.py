"""The packed loss is the sum of the members' own losses, so every member gets its own gradient."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import decompk
from decompk import losses
from decompk.errors import PackError, name_of
from decompk.losses import cross_entropy, each

K, N, C = 3, 5, 4


def cases():
    spatial = (2, 3)
    for extra in ((), spatial):
        logits = torch.randn(K, N, C, *extra, dtype=torch.float64)
        shared = torch.randint(C, (N, *extra))
        own = torch.randint(C, (K, N, *extra))
        probabilities = torch.softmax(torch.randn(K, N, C, *extra, dtype=torch.float64), 2)
        yield logits, shared
        yield logits, own
        yield logits, probabilities
        yield logits, probabilities[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_sum_of_the_members_losses_and_so_are_its_gradients(smoothing, weighted):
    weight = torch.rand(C, dtype=torch.float64) + 0.1 if weighted else None
    for logits, target in cases():
        if not target.is_floating_point():
            target = target.clone()
            target.view(-1)[0] = -100
        packed, single = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        own = (
            target
            if target.dim() == logits.dim() - (not target.is_floating_point())
            else target.expand(K, *target.shape)
        )
        expected = sum(F.cross_entropy(single[k], own[k], weight, label_smoothing=smoothing) for k in range(K))
        loss = cross_entropy(packed, target, weight, label_smoothing=smoothing)
        assert loss.shape == () and torch.allclose(loss, expected, rtol=0, atol=1e-12)
        loss.backward()
        expected.backward()
        assert torch.allclose(packed.grad, single.grad, rtol=0, atol=1e-12)
        assert packed.grad.abs().max() > 1e-3


def test_another_class_can_be_ignored():
    logits, target = torch.randn(K, N, C, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    weight = torch.rand(C, dtype=torch.float64)
    for w in (None, weight):
        expected = sum(F.cross_entropy(one, target, w, ignore_index=0) for one in logits)
        assert torch.allclose(cross_entropy(logits, target, w, ignore_index=0), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ignored", [255, 2])
def test_the_weight_of_a_class_that_nobody_counts_may_be_infinite(ignored):
    logits, weight = torch.randn(2, 6, 3, requires_grad=True), torch.tensor([1.0, 2.0, torch.inf])
    target = torch.tensor([0, 1, 0, 1, 0, ignored])
    losses.cross_entropy(logits, target, weight, ignore_index=ignored).backward()
    alone = logits.detach().clone().requires_grad_()
    sum(F.cross_entropy(own, target, weight, ignore_index=ignored) for own in alone).backward()
    torch.testing.assert_close(logits.grad, alone.grad)


@pytest.mark.parametrize("loss, theirs", [(losses.mse, F.mse_loss), (losses.l1, F.l1_loss)])
def test_large_half_precision_errors_overflow_no_sum(loss, theirs):
    predictions, target = torch.randn(2, 16, 3, 64, 64).half(), torch.randn(16, 3, 64, 64).half()
    expected = sum(theirs(own.float(), target.float()) for own in predictions)
    torch.testing.assert_close(loss(predictions, target).float(), expected, rtol=2e-3, atol=0)


def test_as_many_samples_as_members_is_not_ambiguous():
    logits = torch.randn(K, K, C, dtype=torch.float64)
    shared = torch.tensor([0, 1, 2])
    expected = sum(F.cross_entropy(one, shared) for one in logits)
    assert torch.allclose(cross_entropy(logits, shared), expected)
    assert torch.allclose(cross_entropy(logits, shared.expand(K, K)), expected)


@pytest.mark.parametrize(
    ("logits", "target", "sentence"),
    [
        ((N, C), (N,), r"logits of \(5, 4\) are not \(K, N, C, …\)"),
        ((K, N, C), (N + 1,), r"target of \(6,\) does not fit logits of \(3, 5, 4\): give \(5,\), .* or \(3, 5\)"),
        ((K, N, C), (K + 1, N), r"target of \(4, 5\) does not fit logits of \(3, 5, 4\)"),
        ((K, N, C, 2, 2), (N, 2, 3), r"target of \(5, 2, 3\) does not fit .*: give \(5, 2, 2\), .* or \(3, 5, 2, 2\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(logits, target, sentence):
    with pytest.raises(PackError, match=sentence) as caught:
        cross_entropy(torch.randn(logits), torch.zeros(target, dtype=torch.long))
    assert str(caught.value).endswith(".")


def test_it_works_in_half_precision_and_in_one_compiled_graph():
    logits, target = torch.randn(K, N, C), torch.randint(C, (N,))
    expected = cross_entropy(logits, target)
    assert torch.allclose(cross_entropy(logits.bfloat16(), target).float(), expected, rtol=0.02)
    compiled = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(logits, target, None, 0.1), cross_entropy(logits, target, None, 0.1))


# ---- each: any criterion --------------------------------------------------------------------------------------------


def members_alone(criterion, out, *targets, **further):
    """Each member's loss and gradient from its own call, one after the other, by the values that `own` gives it."""
    out = out.clone().requires_grad_()
    losses = [
        criterion(out[k], *(t(k) for t in targets), **{n: t(k) for n, t in further.items()}) for k in range(len(out))
    ]
    sum(losses).backward()
    return sum(losses).detach(), out.grad


def assert_each(criterion, out, shared, own, **how):
    """With one target for all and with one each, the sum and every member's gradient are those of members alone."""
    for target, of in ((shared, lambda k: shared), (own, lambda k: own[k])):
        loss, grad = members_alone(criterion, out, of)
        packed = out.clone().requires_grad_()
        got = each(criterion, **how)(packed, target)
        got.backward()
        assert got.shape == () and torch.allclose(got, loss, rtol=0, atol=1e-12)
        assert torch.allclose(packed.grad, grad, rtol=0, atol=1e-12) and grad.abs().max() > 1e-4


class Smoothed(nn.CrossEntropyLoss):
    """A known criterion under another name."""

    def __init__(self):
        super().__init__(label_smoothing=0.3)


INDEXED = {
    "smoothing": lambda c: nn.CrossEntropyLoss(label_smoothing=0.1),
    "class weights": lambda c: nn.CrossEntropyLoss(torch.linspace(0.5, 2, c).double()),
    "summed": lambda c: nn.CrossEntropyLoss(reduction="sum"),
    "function": lambda c: F.cross_entropy,
    "partial": lambda c: functools.partial(F.cross_entropy, label_smoothing=0.2),
    "subclass": lambda c: Smoothed(),
    "nll": lambda c: nn.NLLLoss(),
    "margin": lambda c: nn.MultiMarginLoss(),
}


@pytest.mark.parametrize("sizes", [(3, 5, 4), (4, 4, 4), (1, 5, 4), (1, 1, 2), (2, 2, 7), (3, 5, 3)])
@pytest.mark.parametrize("name", INDEXED)
def test_each_sums_what_members_alone_would_get_of_class_indices_at_any_sizes(name, sizes):
    K, N, C = sizes
    criterion = INDEXED[name](C)
    out = torch.randn(K, N, C, dtype=torch.float64)
    assert_each(criterion, out, torch.randint(C, (N,)), torch.randint(C, (K, N)))
    if name != "margin":
        out = torch.randn(K, N, C, N, dtype=torch.float64)
        assert_each(criterion, out, torch.randint(C, (N, N)), torch.randint(C, (K, N, N)))
    if name == "smoothing":
        shared, own = (torch.rand(*shape, dtype=torch.float64) for shape in ((N, C), (K, N, C)))
        assert_each(criterion, out[..., 0], shared, own)


@pytest.mark.parametrize("shape", [(3, 5, 4), (4, 4, 4), (1, 5, 1), (3, 3), (2, 3, 2, 2)])
@pytest.mark.parametrize(
    "criterion",
    [
        nn.MSELoss(),
        nn.MSELoss(reduction="sum"),
        nn.L1Loss(),
        nn.SmoothL1Loss(),
        nn.HuberLoss(),
        nn.BCEWithLogitsLoss(),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0).double()),
        nn.PoissonNLLLoss(),
        F.binary_cross_entropy_with_logits,
        F.mse_loss,
    ],
    ids=name_of,
)
def test_each_sums_what_members_alone_would_get_of_targets_like_the_outputs(criterion, shape):
    out = torch.randn(shape, dtype=torch.float64)
    assert_each(criterion, out, torch.rand(shape[1:], dtype=torch.float64), torch.rand(shape, dtype=torch.float64))


def focal(out, target):
    """A criterion that nobody knows."""
    p = out.softmax(-1).gather(-1, target.unsqueeze(-1))
    return ((1 - p) ** 2 * -p.log()).mean()


@pytest.mark.parametrize("sizes", [(3, 5, 4), (4, 4, 4), (1, 4, 4)])
def test_a_criterion_of_ones_own_takes_vectors_as_they_are_and_asks_of_others_at_every_size(sizes):
    K, N, C = sizes
    out, one, own = torch.randn(K, N, C, dtype=torch.float64), torch.randint(C, (N,)), torch.randint(C, (K, N))
    loss, _ = members_alone(focal, out, lambda k: one)
    assert torch.allclose(each(focal)(out, one), loss, rtol=0, atol=1e-12)
    loss, _ = members_alone(focal, out, lambda k: own[k])
    assert torch.allclose(each(focal, shared=False)(out, own), loss, rtol=0, atol=1e-12)
    distance = lambda out, target: (out - target).square().mean()  # noqa: E731
    for target in (own, torch.randn(N, C), torch.randn(K, N, C)):
        with pytest.raises(PackError, match=r"argument 2 of .* may be \(N, …\), .* or \(K, N, …\): say which with"):
            each(distance)(out, target)
    dense = torch.randn(N, C, dtype=torch.float64)
    loss, _ = members_alone(distance, out, lambda k: dense)
    assert torch.allclose(each(distance, shared=True)(out, dense), loss, rtol=0, atol=1e-12)


@pytest.mark.parametrize("K", [1, 3, 5])
def test_a_criterion_with_further_arguments_is_told_of_each(K):
    N, T, C, S = 5, 9, 4, 3
    out = torch.randn(K, N, T, C, dtype=torch.float64)
    lengths = torch.tensor([3, 2, 1, 3, 2])

    def ctc(out, target, lengths, blank=0):
        steps = torch.full((len(out),), out.shape[1])
        return F.ctc_loss(out.transpose(0, 1).log_softmax(-1), target, steps, lengths, blank)

    for own, how in ((False, True), (True, (False, None)), (True, (False, True, None))):
        target = torch.randint(1, C, (K, N, S) if own else (N, S))
        loss, grad = members_alone(ctc, out, lambda k: target[k] if own else target, lambda k: lengths)  # noqa: B023
        packed = out.clone().requires_grad_()
        further = {"blank": 0} if how == (False, True, None) else {}
        got = each(ctc, shared=how)(packed, target, lengths, **further)
        got.backward()
        assert torch.allclose(got, loss, rtol=0, atol=1e-12)
        assert torch.allclose(packed.grad, grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [(3, 5, 9, 3), (4, 4, 9, 4), (1, 5, 9, 3), (3, 9, 9, 3)])
def test_ctc_tells_its_targets_and_lengths_by_their_dimensions(sizes):
    K, N, T, S = sizes
    out = torch.randn(K, T, N, 5, dtype=torch.float64).log_softmax(-1)
    steps = torch.full((N,), T)
    for own in (False, True):
        target, lengths = (torch.randint(1, 4, (*[K] * own, *shape)) for shape in ((N, S), (N,)))
        lengths = lengths.clamp(max=S)
        pick = lambda t: lambda k: t[k] if own else t  # noqa: B023, E731
        loss, grad = members_alone(nn.CTCLoss(), out, pick(target), lambda k: steps, pick(lengths))
        for criterion, how in ((nn.CTCLoss(), None), (F.ctc_loss, None), (nn.CTCLoss(), (not own, True, not own))):
            packed = out.clone().requires_grad_()
            got = each(criterion, shared=how)(packed, target, steps, target_lengths=lengths)
            got.backward()
            assert torch.allclose(got, loss, rtol=0, atol=1e-12)
            assert torch.allclose(packed.grad, grad, rtol=0, atol=1e-12)


def test_targets_and_weights_go_by_keyword_as_well():
    out = torch.randn(K, N, C, dtype=torch.float64)
    own, weight = torch.randint(C, (K, N)), torch.rand(C, dtype=torch.float64)
    loss, _ = members_alone(lambda o, t: F.cross_entropy(o, t, weight, reduction="sum"), out, lambda k: own[k])
    got = each(F.cross_entropy)(out, weight=weight, target=own, reduction="sum")
    assert torch.allclose(got, loss, rtol=0, atol=1e-12)
    variance = torch.rand(K, N, C, dtype=torch.float64) + 1
    target = torch.randn(N, C, dtype=torch.float64)
    loss, _ = members_alone(F.gaussian_nll_loss, out, lambda k: target, lambda k: variance[k])
    assert torch.allclose(each(nn.GaussianNLLLoss())(out, target, variance), loss, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [(3, 5, 4), (4, 4, 4), (5, 5, 1), (1, 4, 4)])
def test_variances_and_weights_may_broadcast_as_for_a_member_alone(sizes):
    k, n, c = sizes
    out, target = torch.randn(sizes, dtype=torch.float64), torch.rand(n, c, dtype=torch.float64)
    for shape in [(n, 1), (n, c), (n,), (k, n, 1), (k, n, c)]:
        values, own = torch.rand(shape, dtype=torch.float64) + 1, len(shape) == 3
        pick = lambda i: values[i] if own else values  # noqa: B023, E731
        loss, _ = members_alone(nn.GaussianNLLLoss(), out, lambda i: target, pick)  # noqa: B023
        assert torch.allclose(each(nn.GaussianNLLLoss())(out, target, values), loss, rtol=0, atol=1e-12), shape
        if shape != (n,):
            weighted = F.binary_cross_entropy_with_logits
            loss, _ = members_alone(lambda o, t, w: weighted(o, t, weight=w), out, lambda i: target, pick)  # noqa: B023
            assert torch.allclose(each(weighted)(out, target, weight=values), loss, rtol=0, atol=1e-12), shape
    maps = torch.randn(3, 5, 4, 2, dtype=torch.float64)
    target, variance = torch.randn(5, 4, 2, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64) + 1
    loss, _ = members_alone(nn.GaussianNLLLoss(), maps, lambda i: target, lambda i: variance)
    assert torch.allclose(each(nn.GaussianNLLLoss())(maps, target, variance), loss, rtol=0, atol=1e-12)
    with pytest.raises(PackError, match=r"argument 3 of GaussianNLLLoss is \(5, 3\), .* or what broadcasts to them\.$"):
        each(nn.GaussianNLLLoss())(maps, target, variance[:, :3])
    with pytest.raises(PackError, match=r"argument 2 of MSELoss is \(5, 1, 2\), .* or \(3, 5, 4, 2\)\.$"):
        each(nn.MSELoss())(maps, target[:, :1])


@dataclasses.dataclass
class Sharpened:
    """A callable that has no hash."""

    power: float

    def __call__(self, out, target):
        return F.cross_entropy(out * self.power, target)


def test_any_callable_is_a_criterion():
    out, target = torch.randn(K, N, C, dtype=torch.float64), torch.randint(C, (N,))
    expected = cross_entropy(2 * out, target)
    assert torch.allclose(each(Sharpened(2.0))(out, target), expected, rtol=0, atol=1e-12)


def test_unreduced_losses_come_stacked():
    out, target = torch.randn(K, N, C, dtype=torch.float64), torch.randint(C, (N,))
    loss = each(nn.CrossEntropyLoss())
    loss.criteria[0].reduction = "none"
    got = loss(out, target)
    assert got.shape == (K, N)
    assert torch.allclose(got.mean(1).sum(), cross_entropy(out, target), rtol=0, atol=1e-12)


@dataclasses.dataclass
class Heads:
    classes: torch.Tensor
    box: torch.Tensor


@pytest.mark.parametrize("kind", [tuple, list, "dict", Heads])
def test_outputs_may_be_nested(kind):
    classes, boxes = torch.randn(K, N, C, dtype=torch.float64), torch.randn(K, N, 4, dtype=torch.float64)
    y, place = torch.randint(C, (N,)), torch.randn(K, N, 4, dtype=torch.float64)
    build = {"dict": lambda c, b: {"classes": c, "box": b}, Heads: Heads}.get(kind, lambda c, b: kind((c, b)))

    def criterion(out, y, place):
        c, b = (out.classes, out.box) if kind is Heads else out.values() if kind == "dict" else out
        assert type(out) is (dict if kind == "dict" else kind)
        return F.cross_entropy(c, y) + F.l1_loss(b, place)

    expected = sum(criterion(build(classes[k], boxes[k]), y, place[k]) for k in range(K))
    got = each(criterion, shared=(True, False))(build(classes, boxes), y, place)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)


class Scaled(nn.Module):
    """A criterion with a parameter to train."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, out, target):
        return F.cross_entropy(self.scale * out, target)


def test_parameters_of_a_criterion_are_one_for_all_or_one_each():
    out, y = torch.randn(K, N, C, dtype=torch.float64), torch.randint(C, (N,))
    alone = [Scaled(2.0) for _ in range(K)]
    _, grad = members_alone(alone[0], out, lambda k: y)
    for one, o in zip(alone, out, strict=True):
        one.zero_grad()
        one(o, y).backward()
    for given in (Scaled(2.0), [Scaled(2.0) for _ in range(K)]):
        packed, loss = out.clone().requires_grad_(), each(given)
        loss(packed, y).backward()
        assert torch.allclose(packed.grad, grad, rtol=0, atol=1e-12)
        grads = torch.stack([p.grad for p in loss.parameters()])
        own = torch.stack([one.scale.grad for one in alone])
        assert torch.allclose(grads, own if len(grads) > 1 else own.sum(), rtol=0, atol=1e-12)


class Centred(nn.Module):
    """A criterion that changes as it runs."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.register_buffer("centre", torch.zeros(C))

    def forward(self, out, target):
        self.inner.centre += 0.5 * (out.detach().mean(0) - self.inner.centre)
        return F.cross_entropy(out - self.inner.centre, target)


def test_a_criterion_that_changes_as_it_runs_is_refused_unchanged_and_taken_one_a_member():
    out, y = torch.randn(K, N, C), torch.randint(C, (N,))
    one = Centred()
    with pytest.raises(
        PackError, match=r"Centred changes its buffer 'inner.centre' as it runs: give a list of K of it\."
    ):
        each(one)(out, y)
    assert not one.inner.centre.any()
    expected = sum(Centred()(o, y) for o in out)
    assert torch.allclose(each([Centred() for _ in range(K)])(out, y), expected)


@pytest.mark.parametrize(
    ("criterion", "how", "out", "targets", "sentence"),
    [
        (nn.CrossEntropyLoss(), {}, (N, C), [(N,)], r"logits of \(5, 4\) are not \(K, N, C, …\)"),
        (F.cross_entropy, {}, (K, N, C), [(N + 1,)], r"argument 2 of cross_entropy is \(6,\), which .*\(5,\)"),
        (
            nn.MSELoss(),
            {},
            (K, N, C),
            [(K, N)],
            r"argument 2 of MSELoss is \(3, 5\), .* give \(5, 4\), .* or \(3, 5, 4\)",
        ),
        (nn.MSELoss(), {}, (K, N, 1), [(N,)], r"argument 2 of MSELoss is \(5,\), .* give \(5, 1\)"),
        (
            focal,
            {"shared": False},
            (K, N, C),
            [(N,)],
            r"argument 2 of focal is \(5,\): with shared=False .* \(3, 5, …\)",
        ),
        (focal, {"shared": (True, True)}, (K, N, C), [(N,)], "shared has 2 values for 1 arguments"),
        ([focal] * 2, {}, (K, N, C), [(N,)], "2 criteria do not fit 3 members"),
        (
            lambda out, y: {"loss": focal(out, y)},
            {},
            (K, N, C),
            [(N,)],
            "<lambda> returns a dict: let it return the loss",
        ),
    ],
)
def test_what_each_cannot_read_is_refused(criterion, how, out, targets, sentence):
    with pytest.raises(PackError, match=sentence) as caught:
        each(criterion, **how)(torch.randn(out), *(torch.zeros(t, dtype=torch.long) for t in targets))
    assert str(caught.value).endswith(".")


def test_each_takes_criteria_only_and_packed_outputs_only():
    for given in (nn.CrossEntropyLoss, [nn.CrossEntropyLoss(), nn.CrossEntropyLoss]):
        with pytest.raises(PackError, match=r"give it CrossEntropyLoss\(\), not the class\.$"):
            each(given)
    with pytest.raises(PackError, match="each takes a criterion, or a list of one a member, not str"):
        each("mse")
    with pytest.raises(PackError, match="each takes a criterion"):
        each([])
    with pytest.raises(PackError, match=r"\[\(3, 5\), \(2, 5\)\] is no packed output"):
        each(focal)((torch.ones(3, 5), torch.ones(2, 5)), torch.ones(5))


def test_each_is_shown_with_the_names_of_its_criteria():
    smooth = functools.partial(F.cross_entropy, label_smoothing=0.1)
    assert repr(each([smooth, nn.MSELoss()])) == "Each(cross_entropy, MSELoss)"
    assert repr(each(focal, shared=True)) == "Each(focal, shared=True)"


def test_each_trains_packed_members_as_torchs_criterion_trains_them_alone():
    nets = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, C)).double() for _ in range(K)]
    packed = decompk.pack(nets)
    x, y = torch.randn(N, 6, dtype=torch.float64), torch.randint(C, (N,))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for net in [packed, *nets]:
        optimizer = torch.optim.SGD(net.parameters(), 0.5, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            (each(criterion) if net is packed else criterion)(net(x), y).backward()
            optimizer.step()
    for name, p in packed.named_parameters():
        assert torch.allclose(p, torch.stack([net.get_parameter(name) for net in nets]), rtol=0, atol=1e-12)


def test_each_works_in_one_compiled_graph():
    loss, out, y = each(nn.CrossEntropyLoss(label_smoothing=0.1)), torch.randn(K, N, C), torch.randint(C, (N,))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(out, y), loss(out, y))
