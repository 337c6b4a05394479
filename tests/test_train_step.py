"""One training step as one call: what it computes, and what it says when it cannot be compiled or captured."""

import copy

import pytest
import torch
from helpers import HostValues
from torch import nn

import decompk
from decompk import losses, optim, train
from decompk.errors import DecompkError
from decompk.train import step as steps
from decompk.train.capture import Capturable


def packed(seed=0, dtype=torch.float32):
    torch.manual_seed(0)
    net = decompk.models.vgg8(input_size=(1, 16, 16), width=8, fc=16).to(dtype)
    return decompk.grouped_subnets(net, (1, 16, 16), seed=seed)


def batches(count, size=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 16, 16, generator=generator).to(dtype), torch.randint(10, (size,), generator=generator))
        for _ in range(count)
    ]


def assert_same(one, other):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_step_is_forward_loss_backward_clip_and_optimizer(clip):
    ours, plain = packed(), packed()
    step = train.Step(ours, optim.Adam(ours, lr=1e-2), clip=clip)
    optimizer = optim.Adam(plain, lr=1e-2)
    found = []
    for x, y in batches(4):
        step(x, y)
        optimizer.zero_grad()
        logits = plain(x)
        losses.cross_entropy(logits, y).backward()
        if clip:
            optim.clip_grad_norm_(plain, clip)
        optimizer.step()
        each = [nn.functional.cross_entropy(member, y).item() for member in logits]
        found.append((each, (logits.argmax(-1) == y).float().mean(1).mul(100).tolist()))
    assert_same(ours, plain)
    sums = step.read()
    assert sums.images == 24
    for k in range(4):
        assert sums.loss[k] == pytest.approx(sum(each[k] for each, _ in found) / 4, rel=1e-6)
        assert sums.accuracy[k] == pytest.approx(sum(right[k] for _, right in found) / 4)
    assert step.read() == sums  # reading changes nothing
    step.reset()
    assert step.read().images == 0


def test_an_ordinary_network_and_optimizer_train_by_the_same_step():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    other = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    other.load_state_dict(net.state_dict())
    step, optimizer = train.Step(net, torch.optim.SGD(net.parameters(), 0.1)), torch.optim.SGD(other.parameters(), 0.1)
    for x, y in batches(3):
        step(x, y)
        optimizer.zero_grad()
        nn.functional.cross_entropy(other(x), y).backward()
        optimizer.step()
    assert torch.allclose(net[1].weight, other[1].weight, rtol=1e-6, atol=1e-8)
    assert len(step.read().loss) == 1


def test_bf16_runs_the_forward_pass_in_it_and_keeps_weights_and_loss_in_float32():
    net, seen = packed(), []
    net.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    step = train.Step(net, optim.Adam(net, lr=1e-3), precision="bf16")
    for x, y in batches(2):
        step(x, y)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(loss < 4 for loss in step.read().loss)
    with pytest.raises(DecompkError, match=r"precision 'int8' is none of"):
        train.Step(net, optim.Adam(net), precision="int8")(*batches(1)[0])


def test_sums_carried_over_go_on_as_if_never_read():
    ours, other = packed(), packed()
    whole, halves = (train.Step(net, optim.SGD(net, lr=0.01)) for net in (ours, other))
    data = batches(4)
    for x, y in data:
        whole(x, y)
    for x, y in data[:2]:
        halves(x, y)
    resumed = train.Step(other, halves.optimizer)
    resumed.set_sums(halves.sums())
    for x, y in data[2:]:
        resumed(x, y)
    assert resumed.read() == whole.read()


def test_a_compiled_step_trains_as_the_eager_one():
    ours, plain = packed(), packed()
    compiled = train.Step(ours, optim.SGD(ours, lr=0.01), compile=True)
    eager = train.Step(plain, optim.SGD(plain, lr=0.01))
    for x, y in batches(2):
        compiled(x, y)
        eager(x, y)
    assert "compile" not in compiled.reasons
    for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), name
    assert torch.equal(ours.features[1].num_batches_tracked, plain.features[1].num_batches_tracked)


def test_where_compiling_fails_the_step_runs_without_says_why_and_has_lost_nothing(monkeypatch):
    def broken(net):
        def run(x):
            net(x)  # moves the statistics before it fails
            raise RuntimeError("no compiler here.\nmore lines")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    ours, plain = packed(), packed()
    step = train.Step(ours, optim.Adam(ours), compile=True)
    monkeypatch.undo()
    other = train.Step(plain, optim.Adam(plain))
    for x, y in batches(2):
        step(x, y)
        other(x, y)
    assert step.reasons["compile"] == "no compile: no compiler here"
    assert_same(ours, plain)


def test_off_a_gpu_and_with_an_optimizer_that_cannot_be_captured_there_is_no_graph_and_a_reason():
    net = packed()
    step = decompk.Step(net, optim.Adam(net))
    assert not step.graph and step.reasons == {"graph": "no CUDA graph: the network is not on a GPU"}
    assert train.Step(net, optim.Adam(net), graph=False).reasons == {}
    plain = list(net.parameters())
    for refused in (
        torch.optim.Adagrad(plain),
        torch.optim.LBFGS(plain),
        optim.each(net, lambda m: torch.optim.SGD(m.parameters())),
    ):
        with pytest.raises(DecompkError, match=f"^{type(refused).__name__} is not capturable$"):
            Capturable(refused, torch.device("cpu"))


class FakeGraph:
    made = []

    def __init__(self, step, x, y, weight, version):
        if FakeGraph.made and FakeGraph.made[-1] == "fail":
            raise RuntimeError("operation not permitted when stream is capturing")
        self.step, self.weight, self.version = step, weight, version
        FakeGraph.made.append((tuple(x.shape), version))

    def replay(self, x, y):
        return self.step._train(x, y, self.weight)


def capturing(step):
    """The step as it would be on a GPU."""
    step.graph, step._capturable = True, Capturable(step.optimizer, torch.device("cpu"))
    step.reasons.clear()
    return step


@pytest.fixture
def captured(monkeypatch):
    """A step that captures, with a stand-in that runs where a graph would be replayed."""
    FakeGraph.made = []
    monkeypatch.setattr(steps, "_Graph", FakeGraph)
    net = packed()
    step = train.Step(net, optim.Adam(net, lr=1e-2, capturable=True))
    return capturing(step)


def test_each_shape_is_captured_once_after_eager_steps_and_again_when_members_stop_not_when_rates_change(captured):
    full, tail = batches(8), batches(8, size=3)
    for (x, y), (a, b) in zip(full, tail, strict=True):
        captured(x, y)
        captured(a, b)
    assert [shape[0] for shape, _ in FakeGraph.made] == [6, 3]
    for group in captured.optimizer.param_groups:
        group["lr"] *= 0.1
    captured(*full[0])
    assert len(FakeGraph.made) == 2
    captured.optimizer.stop(1)
    captured(*full[0])
    captured(*tail[0])
    captured(*full[1])
    assert [shape[0] for shape, _ in FakeGraph.made] == [6, 3, 6, 3]
    assert captured.read().images == 8 * 9 + 6 * 3 + 3


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW])
def test_nothing_of_the_host_is_in_a_graph_with_unequal_clipping_and_new_norms_are_captured_anew(kind, monkeypatch):
    made = HostValues()

    class Watched(FakeGraph):
        def replay(self, x, y):
            with made:
                return super().replay(x, y)

    FakeGraph.made = []
    monkeypatch.setattr(steps, "_Graph", Watched)
    net = packed()
    captured = capturing(train.Step(net, kind(net, [0.1, 0.2, 0.3, 0.4])))  # which makes it capturable
    for clip, data in (([0.1, 0.5, 2.0, 9.0], batches(5)), ([0.2, 0.7, 3.0, 1.0], batches(2)), (0.5, batches(2))):
        captured.clip = clip
        for x, y in data:
            captured(x, y)
    assert len(FakeGraph.made) == 3 and made.names == []
    captured.set_sums(None)
    captured(*batches(1)[0])
    assert len(FakeGraph.made) == 3 and captured.read().images == 6  # the sums are made outside of a graph


def test_where_capturing_fails_the_step_goes_on_eagerly_and_says_why(captured):
    data = batches(6)
    FakeGraph.made = ["fail"]
    for x, y in data:
        captured(x, y)
    assert not captured.graph
    assert captured.reasons == {"graph": "no graph: operation not permitted when stream is capturing"}
    assert captured.read().images == 36
    other = packed()
    eager = train.Step(other, optim.Adam(other, lr=1e-2, capturable=True))
    for x, y in data:
        eager(x, y)
    assert_same(captured.net, other)


def test_a_loop_of_ones_own_gets_its_loss_any_criterion_and_every_kind_of_target():
    net, other = packed(), packed()
    criterion = losses.each(nn.CrossEntropyLoss(label_smoothing=0.1))
    step = decompk.Step(net, optim.SGD(net, lr=0.1), criterion)
    optimizer = optim.SGD(other, lr=0.1)
    for x, y in batches(2):
        found = step(x, y)
        expected = criterion(other(x), y)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert torch.equal(found, expected) and not found.requires_grad
    assert_same(net, other)
    step = decompk.Step(net, optim.SGD(net, lr=1e-3), losses.mse)  # its targets are no classes
    assert step(batches(1)[0][0], torch.zeros(6, 10)).dim() == 0
    assert step.read() == steps.Sums([], [], 6)
    step = decompk.Step(net, optim.SGD(net), lambda logits, y: logits.mean((1, 2)))
    with pytest.raises(DecompkError, match=r"the loss is \(4,\), not a scalar: let it return the sum"):
        step(*batches(1)[0])


@pytest.mark.parametrize(
    "classes,loss,targets",
    [
        (1, lambda o, t: losses.each(nn.BCEWithLogitsLoss())(o.squeeze(-1), t.float()), torch.arange(6) % 2),
        (1, lambda o, t: losses.each(nn.BCEWithLogitsLoss())(o.squeeze(-1), t.float()), torch.arange(6) % 2 == 0),
        (1, lambda o, t: losses.mse(o.squeeze(-1), t.float()), torch.arange(6)),
        (5, lambda o, t: losses.cross_entropy(o, t["labels"]), {"labels": torch.arange(6) % 5}),
        (5, lambda o, t: o.pow(2).mean((1, 2)).sum(), None),
    ],
)
def test_targets_that_are_no_classes_are_trained_on_and_counted(classes, loss, targets):
    net = decompk.pack([nn.Sequential(nn.Flatten(), nn.Linear(256, classes)) for _ in range(2)])
    step = capturing(decompk.Step(net, torch.optim.SGD(net.parameters(), lr=0.1), loss))
    if isinstance(targets, torch.Tensor):
        step.graph = False  # else it would be captured
    for x, _ in batches(5):
        assert step(x, targets).isfinite()
    assert step.read() == steps.Sums([], [], 30) and step.reasons == {}
    step.graph = False
    step(torch.randn(2, 6, 1, 16, 16), targets)  # images of their own
    assert step.read().images == 36


@pytest.mark.parametrize(
    "absent,dtype", [(-100, torch.int64), (255, torch.int64), (255, torch.uint8), (-1, torch.int32)]
)
@pytest.mark.parametrize("own", [False, True])
def test_labels_of_no_class_count_for_nothing(absent, dtype, own):
    net = decompk.pack([nn.Sequential(nn.Flatten(), nn.Linear(256, 5)) for _ in range(2)])
    criterion = losses.each(nn.CrossEntropyLoss(ignore_index=absent))
    step = decompk.Step(net, torch.optim.SGD(net.parameters(), lr=0.0), lambda o, t: criterion(o, t.long()))
    (x, _), labels = batches(1)[0], torch.tensor([0, 1, absent, 4, absent, absent])
    labels = torch.stack([labels, labels.flip(0)]) if own else labels
    logits = net(x).detach()
    loss, sums = step(x, labels.to(dtype)), step.read()
    each = [
        nn.functional.cross_entropy(o, t, ignore_index=absent) for o, t in zip(logits, labels.expand(2, 6), strict=True)
    ]
    right = [(o.argmax(-1) == t)[t != absent].float().mean() for o, t in zip(logits, labels.expand(2, 6), strict=True)]
    assert sums.loss == pytest.approx([float(one) for one in each]) and sum(sums.loss) == pytest.approx(float(loss))
    assert sums.accuracy == pytest.approx([100 * float(one) for one in right]) and sums.images == 6
    resumed = decompk.Step(net, step.optimizer)
    resumed.set_sums(step.sums())
    assert resumed.read() == sums


def test_a_class_that_is_ruled_out_costs_nothing_where_no_label_names_one():
    class Ruled(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return torch.cat([torch.full_like(y[..., :1], -torch.inf), y], -1)

    net = decompk.pack([Ruled(nn.Flatten(), nn.Linear(256, 4)) for _ in range(2)])
    step = decompk.Step(net, torch.optim.SGD(net.parameters(), lr=0.0))
    step(batches(1)[0][0], torch.tensor([1, 2, -100, 4, -100, 3]))
    assert all(0 < loss < 4 for loss in step.read().loss)


def test_the_loss_reads_every_output_in_float32():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(256, 5)

        def forward(self, x):
            y = self.layer(x.flatten(1))
            return {"logits": y, "further": (y, y.argmax(-1))}

    net, seen = decompk.pack([Two() for _ in range(2)]), []

    def loss(out, y):
        seen.extend([out["logits"].dtype, out["further"][0].dtype, out["further"][1].dtype])
        return losses.cross_entropy(out["logits"], y % 5)

    decompk.Step(net, torch.optim.SGD(net.parameters(), lr=0.1), loss, precision="bf16")(*batches(1)[0])
    assert seen == [torch.float32, torch.float32, torch.int64]


def test_clipping_reads_no_gradients_of_steps_before():
    """Those of parameters that the optimizer does not train, and so does not clear."""
    net, other = packed(), packed()
    head = list(net.classifier.parameters())
    step = decompk.Step(net, torch.optim.SGD(head, lr=0.1), clip=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert step.clip == pytest.approx([0.1, 0.2, 0.3, 0.4])
    optimizer = torch.optim.SGD(other.classifier.parameters(), lr=0.1)
    for x, y in batches(3):
        step(x, y)
        other.zero_grad()
        losses.cross_entropy(other(x), y).backward()
        optim.clip_grad_norm_(other, step.clip)
        optimizer.step()
    assert_same(net, other)


NET, PLAIN = packed(), nn.Linear(4, 2)
SGD = torch.optim.SGD(NET.parameters(), lr=0.1)


@pytest.mark.parametrize(
    "arguments,how,sentence",
    [
        ((None, SGD), {}, r"^Step trains a network, not NoneType"),
        (([PLAIN], SGD), {}, r"^Step trains a network, not list: decompk.pack\(members\) makes one of many"),
        ((nn.Flatten(), SGD), {}, r"^Flatten has no parameters"),
        ((NET, None), {}, r"^Step takes \(net, optimizer, loss\); NoneType is no optimizer"),
        ((NET, losses.cross_entropy, SGD), {}, r"; cross_entropy is no optimizer"),
        ((NET, torch.optim.SGD), {}, r"; SGD is no optimizer"),
        ((NET, torch.optim.LBFGS(NET.parameters())), {}, r"^LBFGS calls the network"),
        ((NET, torch.optim.SGD(PLAIN.parameters())), {}, r"^the optimizer has none of this network's parameters"),
        ((NET, optim.Adam(packed())), {}, r"^the optimizer has none of this network's parameters"),
        ((NET, SGD, "cross_entropy"), {}, r"^loss is a function \(output, target\) → scalar, not str"),
        ((NET, SGD, nn.CrossEntropyLoss), {}, r"^loss is a function .* not CrossEntropyLoss"),
        ((NET, SGD, nn.CrossEntropyLoss()), {}, r"^CrossEntropyLoss reads the outputs of one network: .*losses.each"),
        ((NET, SGD, nn.functional.mse_loss), {}, r"^mse_loss reads the outputs of one network"),
        ((NET, SGD), {"precision": "fp16"}, r"^precision 'fp16' is none of"),
        ((PLAIN, torch.optim.SGD(PLAIN.parameters())), {"clip": [1.0]}, r"^clip is one number"),
    ],
)
def test_what_no_step_can_train_is_refused_in_a_sentence_before_anything_is_trained(arguments, how, sentence):
    with pytest.raises(DecompkError, match=sentence):
        decompk.Step(*arguments, **how)


def test_torchs_optimizers_and_schedulers_are_followed_by_a_captured_step(monkeypatch):
    FakeGraph.made = []
    monkeypatch.setattr(steps, "_Graph", FakeGraph)
    net, other = packed(), packed()
    rates = []
    for one, how in ((net, {"foreach": True}), (other, {"fused": True})):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9, **how)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        step = train.Step(one, optimizer)
        step = capturing(step) if one is net else step
        for i, (x, y) in enumerate(batches(8)):
            step(x, y)
            scheduler.step()
            if i == 5:
                optimizer.param_groups[0]["lr"] = 0.02  # by hand, in the tensor's place
        rates.append(float(optimizer.param_groups[0]["lr"]))
        if one is net:
            assert len(FakeGraph.made) == 1 and isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
            optimizer.param_groups[0]["momentum"] = 0.5
            step(x, y)
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            step(x, y)
            assert len(FakeGraph.made) == 3
            assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert rates[0] == pytest.approx(rates[1]) and rates[1] == pytest.approx(0.005)


def test_modes_and_frozen_parameters_are_captured_anew_and_unlike_steps_without_end_are_not(captured):
    data = batches(20)
    for i, (x, y) in enumerate(data[:12]):
        captured.net.train(i % 2 == 0)
        captured(x, y)
    assert len(FakeGraph.made) == 2 and captured.graph
    captured.net.train()
    captured.net.classifier.requires_grad_(False)
    for x, y in data[:4]:
        captured(x, y)
    assert len(FakeGraph.made) == 3  # after steps that make state and choices
    for x, y in data:
        captured.optimizer.param_groups[0]["eps"] *= 2
        captured(x, y)
    assert not captured.graph and "hyperparameters other than the learning rate" in captured.reasons["graph"]
    assert captured.read().images == 6 * 36


def test_a_step_that_is_the_first_of_its_kind_runs_and_the_next_one_is_captured(captured, monkeypatch):
    class Refusing(FakeGraph):
        def __init__(self, *given):
            if not refused:
                refused.append(1)
                raise DecompkError("the first step with momentum differs from the others")
            super().__init__(*given)

    refused = []
    monkeypatch.setattr(steps, "_Graph", Refusing)
    for x, y in batches(6):
        captured(x, y)
    assert captured.graph and captured.reasons == {} and len(FakeGraph.made) == 1
    assert captured.read().images == 36
