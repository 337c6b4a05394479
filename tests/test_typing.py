"""The public API as a user's type checker sees it: mypy reads this file in `make lint`, pytest runs it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import decompk
from decompk.divide.blockdiag import Decision, ZeroSkipping
from decompk.models.resnet import ResNet
from decompk.packed.fuse import Fused
from decompk.report.decomposition import Report
from decompk.report.table import Table
from decompk.splitnet import Assignment, Gammas, Nodes, Split, learn, split, split_points

Part = decompk.Crop | decompk.Indices


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip


def test_a_decomposition_goes_there_and_back() -> None:
    model = small()
    d = assert_type(decompk.decompose(model, (3, 16, 16), partitions=(2, 2), crop_size=10), decompk.Decomposition)
    assert_type(d.K, int)
    assert_type(d.crops, tuple[Part, ...])
    assert_type(d.notes, list[str])
    assert_type(d.adapted, list[str])
    members = assert_type(d.subnets(seed=[0, 1, 2, 3]), list[nn.Module])
    composed = assert_type(d.compose(members, head="mean"), nn.Module)
    assert_type(d.extract(composed), list[nn.Module])
    assert_type(d.split(torch.randn(2, 3, 16, 16)), list[Tensor])
    report = assert_type(d.report(), Report)
    assert report.totals["global"]["macs"] / report.totals["member"]["macs"] > 1
    assert_type(report.total_table(), Table)
    crop = decompk.Crop(0, 0, 8, 8)
    assert_type(crop.cut(torch.randn(2, 3, 16, 16)), Tensor)
    assert_type(crop.height, int)
    decompk.decompose(model, [3, 16, 16], partitions=[crop, decompk.Crop(8, 8, 8, 8)])
    decompk.decompose(decompk.models.mlp(4, 2), (4,), partitions=[[0, 2], [1, 3]])


def test_a_packed_network_is_a_module_that_knows_its_members() -> None:
    packed = assert_type(decompk.grouped_subnets(small(), (3, 16, 16), seed=0), decompk.Packed)
    assert_type(packed.K, int)
    assert len(packed.decomposition.notes) >= 0 and packed.crops[0].size == (8, 8)
    assert_type(packed.compose(), nn.Module)
    packed = assert_type(decompk.pack([small() for _ in range(2)], input_dims=4), decompk.Packed)
    x = torch.randn(2, 3, 16, 16)
    out = assert_type(packed(x), Any)  # whatever a member returns, stacked
    assert out.shape == (2, 2, 5)
    assert_type(packed.ensemble(x), Any)
    assert_type(packed.unpack(), list[nn.Module])
    assert_type(packed.describe(), str)
    assert_type(packed.train().eval().to("cpu").requires_grad_(), decompk.Packed)
    fused = assert_type(decompk.fuse(packed), Fused)
    assert_type(fused.train().unfuse(), decompk.Packed)
    decompk.initialise(packed, lambda net: [nn.init.ones_(p) for p in net.parameters()])
    assert_type(decompk.compile_ahead(packed, x), int)


def test_losses_are_tensors_and_optimizers_torchs() -> None:
    packed, x, y = decompk.pack([small() for _ in range(2)]), torch.randn(4, 3, 16, 16), torch.randint(5, (4,))
    criterion: Callable[[Tensor, Tensor], Tensor] = decompk.losses.each(nn.CrossEntropyLoss(label_smoothing=0.1))
    assert_type(decompk.losses.each([nn.MSELoss(), nn.L1Loss()])(packed(x), torch.rand(4, 5)), Tensor)
    assert_type(decompk.losses.cross_entropy(packed(x), y), Tensor)
    assert_type(decompk.losses.mse(packed(x), torch.rand(4, 5)), Tensor)
    assert_type(decompk.losses.l1(packed(x), torch.rand(4, 5)), Tensor)
    optimizer: torch.optim.Optimizer = decompk.optim.SGD(packed, lr=[0.1, 0.2], momentum=0.9)
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    adam = decompk.optim.AdamW(decompk.optim.decay_groups(packed, [0.05, 0.1]), betas=[(0.9, 0.99), (0.8, 0.9)])
    torch.optim.AdamW(decompk.optim.decay_groups(packed, 0.05))
    criterion(packed(x), y).backward()
    assert_type(decompk.optim.clip_grad_norm_(packed, [1.0, 2.0]), Tensor)
    adam.step()
    adam.stop(1)
    assert_type(adam.stopped, tuple[int, ...])
    each = decompk.optim.each(packed, lambda net: torch.optim.Adagrad(net.parameters()))
    assert_type(each.optimizers, list[list[torch.optim.Optimizer]])


def test_operators_return_tensors() -> None:
    x, weight = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 6, 4, 3, 3)
    y = assert_type(decompk.ops.grouped_conv2d(x, weight, None, (1, 1), "same"), Tensor)
    assert_type(decompk.ops.conv2d(torch.randn(3, 4, 8, 8), torch.randn(4, 2, 3, 3), groups=2), Tensor)
    assert_type(decompk.ops.fused_conv2d(x, weight, padding=1, residual=y, relu=True), Tensor)
    assert_type(decompk.ops.conv2d_moments(x, weight), tuple[Tensor, Tensor])
    assert_type(decompk.ops.batch_norm(y, torch.ones(2, 6), torch.zeros(2, 6), relu=True), Tensor)
    assert_type(decompk.ops.block_linear(torch.randn(3, 32), torch.randn(16, 32), [[1, 0], [0, 1]]), Tensor)
    assert_type(decompk.ops.block_conv2d(torch.randn(1, 32, 8, 8), torch.randn(16, 32, 3, 3), [[1, 0], [0, 1]]), Tensor)
    with decompk.backend("torch") as nothing:
        assert_type(nothing, None)


def test_a_composed_network_runs_without_its_zero_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    packed = decompk.grouped_subnets(small(), (3, 16, 16))
    fast = assert_type(decompk.block_diagonal(packed.compose()), ZeroSkipping)
    assert_type(fast(torch.randn(2, 3, 16, 16)), Any)
    torch.optim.SGD(fast.parameters(), lr=0.1)
    assert_type(fast.decisions, tuple[Decision, ...])
    assert_type(fast.skipped((3, 16, 16)), Table)
    assert_type(decompk.densify(fast), nn.Module)
    explain: Callable[[nn.Module, Tensor], None] = decompk.explain
    explain(packed, torch.randn(2, 3, 16, 16))
    assert "convolutions" in capsys.readouterr().out


def test_models_theorems_and_training_say_what_they_return(tmp_path: Path) -> None:
    assert_type(decompk.models.resnet50(num_classes=10, width=8), ResNet)
    assert_type(decompk.models.signal_cnn(width=4), nn.Sequential)
    assert_type(decompk.models.build("resnet8"), nn.Module)
    assert_type(decompk.models.spec("resnet8").input_size, tuple[int, int, int])
    logits, y = torch.randn(2, 4, 5), torch.randint(5, (4,))
    assert_type(decompk.theory.theorem_2_2(logits, y).violation, float)
    assert_type(decompk.theory.regression_bound(logits, torch.randn(4, 5)), decompk.theory.Bound)
    packed = decompk.pack([small() for _ in range(2)])
    step = decompk.Step(packed, decompk.optim.Adam(packed, lr=[1e-3, 2e-3]), clip=[1.0, 2.0])
    assert_type(step(torch.randn(4, 3, 16, 16), y), Tensor)
    assert_type(step.read().accuracy, list[float])
    assert_type(decompk.train.normalise(decompk.train.Augment(flip=True)(torch.rand(4, 3, 8, 8), 0), [0.5] * 3), Tensor)
    assert_type(decompk.train.Checkpoints(tmp_path, {}).files(), list[Path])
    assert_type(decompk.train.presets(), tuple[str, ...])
    assert_type(decompk.train.epoch_order(8, 4, 0, 0), list[Tensor])
    with pytest.raises(decompk.DecompkError):
        decompk.train.open_data("nowhere")


def test_a_network_is_split_where_it_was_learned() -> None:
    net = decompk.models.wrn_16_8(width=2)
    groups, whole = assert_type(split_points("wrn_16_8", "Deep"), tuple[dict[str, int], tuple[str, ...]])
    assignment = Assignment(Nodes(net, (3, 32, 32)), groups, whole)
    batches = [(torch.randn(2, 3, 32, 32), torch.randint(100, (2,)))]
    assert_type(learn(net, assignment, batches, nn.functional.cross_entropy, Gammas(weights=1e-2)), int)
    result = assert_type(split(net, assignment), Split)
    assert_type(result.dense, nn.Module)
    assert isinstance(result.fast(), ZeroSkipping)
