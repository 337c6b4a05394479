"""The packed loss is the sum of the members' own losses, so every member gets its own gradient."""

import pytest
import torch
import torch.nn.functional as F

from decompk.errors import PackError
from decompk.losses import cross_entropy

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
