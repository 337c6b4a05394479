import pytest
import torch
import torch.nn.functional as F
from nets import Branching
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from decompk import models
from decompk.cost import formulas, walk
from decompk.cost.figures import ROLES, Cost, total
from decompk.errors import DecompkError, UnsupportedOperation


class Functional(nn.Module):
    """conv → relu → pool → linear as functions and methods, with the module form's parameters."""

    def __init__(self, modules: nn.Sequential):
        super().__init__()
        self.conv_weight, self.conv_bias = modules[0].weight, modules[0].bias
        self.fc_weight, self.fc_bias = modules[4].weight, modules[4].bias

    def forward(self, x):
        x = F.conv2d(x, self.conv_weight, self.conv_bias, padding=1)
        x = F.max_pool2d(x.relu(), 2).flatten(1)
        return F.linear(x, self.fc_weight, self.fc_bias)


class Gated(nn.Module):
    """A squeeze-and-excitation block between two convolutions, a skip, a concatenation and a convolution head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.squeeze = nn.Linear(8, 4)
        self.excite = nn.Conv2d(4, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))[:, :, None, None]))
        y = self.depthwise(x * gate) + x
        return self.head(torch.cat([x, y], 1)).mean((2, 3))


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def by_name(model, size, **options):
    return {layer.name: layer for layer in walk.layers(model, size, **options)}


def counted_by_torch(model, size):
    """(forward, backward) FLOPs per torch's own counter."""
    x = torch.empty(1, *size, device="meta")
    with FlopCounterMode(display=False) as forward:
        model(x)
    with FlopCounterMode(display=False) as both:
        model(x).sum().backward()
    return forward.get_total_flops(), both.get_total_flops() - forward.get_total_flops()


def counted_by_fvcore(model, size):
    fvcore = pytest.importorskip("fvcore.nn")
    count = fvcore.FlopCountAnalysis(model.eval(), torch.zeros(1, *size))
    count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return sum(macs for op, macs in count.by_operator().items() if op in ("conv", "linear", "matmul", "addmm"))


CONVOLUTIONS = {
    "plain": (nn.Conv2d(4, 6, 3, padding=1), (4, 9, 7)),
    "strided": (nn.Conv2d(4, 6, (3, 5), stride=(2, 3)), (4, 9, 11)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2, bias=False), (4, 9, 9)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (4, 9, 9)),
    "reflecting": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 9, 9)),
    "of signals": (nn.Conv1d(4, 6, 5, stride=2, padding=2), (4, 20)),
    "of volumes": (nn.Conv3d(2, 4, 3, groups=2), (2, 5, 6, 7)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (4, 5, 6)),
    "transposed and grouped": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (4, 7)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_has_the_macs_and_parameters_fvcore_and_torch_count(name):
    conv, size = CONVOLUTIONS[name]
    net = nn.Sequential(conv)
    (layer,) = walk.layers(net, size)
    assert layer.macs == counted_by_fvcore(net, size)
    assert layer.params == sum(p.numel() for p in net.parameters())
    assert layer.flops() == counted_by_torch(net.to("meta"), size)[0]
    assert (layer.kernel, layer.groups) == (conv.kernel_size, conv.groups)
    assert layer.kind == ("conv_transpose" if conv.transposed else "conv")


@pytest.mark.parametrize("name", ["vgg16", "resnet50", "resnet50_food101", "resnet32", "wrn_16_8", "resnet18x2"])
def test_the_papers_networks_have_the_macs_and_parameters_of_independent_counters(name):
    size = (3, 64, 64) if name in ("vgg16", "resnet50", "resnet18x2") else (3, 32, 32)
    narrow = models.build(name, width=8, input_size=size)
    whole = total(walk.layers(narrow, size))
    assert whole.macs == counted_by_fvcore(narrow, size)
    assert whole.params == sum(p.numel() for p in narrow.parameters())
    running = [b for name, b in narrow.named_buffers() if "running" in name]
    assert whole.statistics == sum(b.numel() for b in running)


@pytest.mark.parametrize("name", ["vgg16", "resnet50", "wrn_16_8"])
def test_forward_and_backward_flops_of_ungrouped_networks_are_those_of_torchs_counter(name):
    size = models.spec(name).input_size
    with torch.device("meta"):
        model = models.build(name)
    whole = total(walk.layers(model, size))
    assert (whole.flops(), whole.backward_flops) == counted_by_torch(model, size)


def test_grouped_and_gated_networks_agree_with_fvcore_and_the_backward_pass_does_twice_the_work_but_for_the_stem():
    layers = by_name(Gated(), (3, 6, 6))
    assert sum(layer.macs for layer in layers.values()) == counted_by_fvcore(Gated(), (3, 6, 6))
    assert layers["stem"].backward_flops == layers["stem"].flops()
    assert layers["depthwise"].backward_flops == 2 * layers["depthwise"].flops()


def test_linear_layers_on_tokens_and_products_of_activations_are_counted_per_token():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return (q @ k.transpose(1, 2)).softmax(-1) @ v

    layers = walk.layers(Attention(), (5, 8))
    assert total(layers).macs == counted_by_fvcore(Attention(), (5, 8))
    assert [layer.kind for layer in layers] == ["linear", "matmul", "activation", "matmul"]
    assert layers[1].backward_macs == 2 * layers[1].macs
    assert layers[0].backward_macs == layers[0].macs


def test_modules_functions_and_methods_cost_the_same():
    modules = small()
    as_modules, as_functions = walk.layers(modules, (3, 8, 8)), walk.layers(Functional(modules), (3, 8, 8))
    assert [layer.name for layer in as_modules] == ["0", "1", "2", "4"]
    for module, function in zip(as_modules, as_functions, strict=True):
        assert module.figures() == function.figures()
        assert (module.kind, module.role, module.out_shape) == (function.kind, function.role, function.out_shape)


def test_a_module_called_twice_has_two_names_and_one_set_of_parameters():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(4, 4, 1), nn.ReLU()

        def forward(self, x):
            return self.act(self.conv(self.act(self.conv(x))))

    layers = by_name(Twice(), (4, 5, 5))
    assert list(layers) == ["conv", "act", "conv#2", "act#2"]
    assert (layers["conv"].params, layers["conv#2"].params) == (20, 0)
    assert layers["conv#2"].forward_bytes() == layers["conv"].forward_bytes()


def test_parameters_used_by_plain_arithmetic_are_counted():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.scale.view(1, -1, 1, 1) + x

    layers = walk.layers(Scaled(), (4, 5, 5))
    assert [(layer.kind, layer.params, layer.elementwise_flops) for layer in layers] == [
        ("mul", 4, 100),
        ("add", 0, 100),
    ]


def test_conventions_follow_their_formulas_on_one_convolution():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    (layer,) = walk.layers(conv, (4, 5, 7))
    positions, weights = 35, 4 * 9 * 6
    assert layer.flops("2mac") == 2 * positions * weights
    assert layer.flops("eq2.10") == positions * (2 * 4 * 3 * 3 - 1) * 6
    assert layer.flops("paper-profiler w=5") == layer.flops("2mac") + 5 * weights + positions * 6
    assert layer.flops("paper-profiler w=2") == layer.flops("2mac") + 2 * weights + positions * 6


def test_equation_2_10_counts_a_group_by_its_own_inputs_and_a_linear_layer_as_one_position():
    grouped, linear = nn.Conv2d(8, 6, 3, groups=2), nn.Linear(10, 7)
    assert walk.layers(grouped, (8, 5, 5))[0].flops("eq2.10") == 9 * (2 * 4 * 9 - 1) * 6
    assert walk.layers(linear, (10,))[0].flops("eq2.10") == (2 * 10 - 1) * 7
    assert formulas.conv_macs(1, 10, 7, (1,)) == walk.layers(linear, (10,))[0].macs


def test_the_profiler_counts_residual_adds_and_pooling_but_no_activations_or_norms():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.pool = nn.BatchNorm2d(4), nn.AvgPool2d(2)

        def forward(self, x):
            return self.pool(F.relu(self.bn(x)) + x)

    whole = total(walk.layers(Joined(), (4, 6, 6)))
    assert whole.flops("paper-profiler w=5") == 4 * 36 + 4 * 9 * 4
    assert whole.elementwise_flops == 2 * 144 + 144 + 144 + 144


@pytest.mark.parametrize(
    ("norm", "running"),
    [
        (nn.BatchNorm2d(4), True),
        (nn.GroupNorm(2, 4), False),
        (nn.InstanceNorm2d(4), False),
        (nn.LayerNorm([4, 6, 6]), False),
    ],
)
def test_a_norm_costs_two_operations_an_element_and_three_more_where_it_computes_statistics(norm, running):
    net = nn.Sequential(norm)
    (evaluated,), (trained,) = (walk.layers(net, (4, 6, 6), training=training) for training in (False, True))
    assert evaluated.elementwise_flops == (2 if running else 5) * 144
    assert trained.elementwise_flops == 5 * 144
    assert evaluated.kind == "norm"


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(6), nn.AdaptiveMaxPool2d(1), nn.MaxPool2d(6)])
def test_every_form_of_global_pooling_costs_the_pixels_it_reads(pool):
    (layer,) = walk.layers(pool, (4, 6, 6))
    assert (layer.kind, layer.kernel, layer.elementwise_flops) == ("pool", (6, 6), 144)


def test_dropout_counts_in_training_only_and_the_models_mode_is_restored():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout()).eval()
    assert len(walk.layers(model, (6,))) == 1
    assert len(walk.layers(model, (6,), training=True)) == 2
    assert not any(module.training for module in model.modules())


def test_reshapes_cost_nothing_and_copies_move_bytes_without_flops():
    class Shuffle(nn.Module):
        def forward(self, x):
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            return torch.cat(x.chunk(2, 1)[::-1], 1)

    layers = walk.layers(Shuffle(), (4, 3, 3))
    assert [layer.kind for layer in layers] == ["copy", "cat"]
    assert all(layer.elementwise_flops == 0 and layer.forward_bytes() == 4 * 2 * 36 for layer in layers)


def test_each_pass_over_a_convolution_moves_its_three_tensors_once():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, bias=False))
    first, second = walk.layers(net, (3, 8, 8))
    image, hidden, out = 3 * 64, 4 * 64, 6 * 36
    one_pass = formulas.pass_bytes(hidden, 216, out, element_size=2)
    assert second.forward_bytes(element_size=2) == one_pass
    assert second.backward_bytes(element_size=2) == 2 * one_pass
    assert first.backward_bytes() == formulas.pass_bytes(image, 16, hidden)
    assert second.forward_bytes(batch=8) == 4 * (8 * (hidden + out) + 216)


def test_layers_before_the_first_parameter_have_no_backward_pass():
    layers = by_name(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 1), nn.ReLU()), (3, 8, 8))
    assert layers["0"].backward_bytes() == 0
    assert layers["1"].backward_macs == layers["1"].macs
    assert layers["2"].backward_bytes() == 4 * 3 * 64


def test_roles_follow_the_graph():
    vgg = by_name(models.vgg16(width=8, fc=32, input_size=(3, 64, 64)), (3, 64, 64))
    roles = {name: layer.role for name, layer in vgg.items() if layer.macs}
    assert roles.pop("features.0") == "first conv"
    assert [roles.pop(f"classifier.{i}") for i in (0, 3, 6)] == ["first fc", "fc", "last fc"]
    assert set(roles.values()) == {"conv"}
    gated = by_name(Gated(), (3, 6, 6))
    assert {name: layer.role for name, layer in gated.items() if layer.macs} == {
        "stem": "first conv",
        "squeeze": "fc",
        "excite": "fc",
        "depthwise": "grouped conv",
        "head": "last conv",
    }
    assert by_name(models.build("resnet50", width=8), (3, 64, 64))["fc"].role == "last fc"
    food = by_name(models.build("resnet50_food101", width=8), (3, 64, 64))
    assert (food["fc.0"].role, food["fc.2"].role) == ("fc", "last fc")
    perceptron = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 2))
    assert [layer.role for layer in walk.layers(perceptron, (3, 4, 4)) if layer.macs] == ["fc", "last fc"]
    assert [layer.role for layer in walk.layers(small(), (3, 8, 8)) if layer.macs] == ["first conv", "only fc"]


def test_a_linear_layer_on_pixels_is_a_convolution_and_a_convolution_over_the_whole_map_the_first_fc():
    class Pixelwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mix = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8)
            self.whole, self.head = nn.Conv2d(8, 16, 6), nn.Conv2d(16, 5, 1)

        def forward(self, x):
            x = self.mix(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.head(self.whole(x)).flatten(1)

    layers = by_name(Pixelwise(), (3, 6, 6))
    assert [layers[name].role for name in ("stem", "mix", "whole", "head")] == [
        "first conv",
        "conv",
        "first fc",
        "last fc",
    ]
    assert layers["mix"].positions == 36


def test_a_uniform_split_has_exactly_the_papers_ratios_in_every_role():
    K = 4
    whole = by_name(models.vgg16(width=16, fc=64, input_size=(3, 128, 128)), (3, 128, 128))
    member = by_name(models.vgg16(width=4, fc=16, input_size=(3, 64, 64)), (3, 64, 64))
    seen = set()
    for name, layer in whole.items():
        if layer.macs:
            seen.add(layer.role)
            powers = ROLES[layer.role]
            assert layer.macs == member[name].macs * K**powers.flops
            assert layer.kernel_weights == member[name].kernel_weights * K**powers.weights
            assert layer.activations == member[name].activations * K**powers.activations
    assert seen == set(ROLES)


def test_sizes_passed_as_numbers_are_no_inputs():
    class Resized(nn.Module):
        def forward(self, x):
            pooled = F.avg_pool2d(x, x.size(2))
            return F.interpolate(pooled, size=x.shape[2:]) + x

    pool, resize, add = walk.layers(Resized(), (4, 6, 6))
    assert (pool.in_shapes, resize.in_shapes) == (((4, 6, 6),), ((4, 1, 1),))
    assert (resize.kind, resize.elementwise_flops, add.in_shapes) == ("copy", 0, ((4, 6, 6), (4, 6, 6)))


def test_an_operator_that_registered_its_flops_is_counted_by_its_own_formula():
    @torch.library.custom_op("decompk_test_cost::product", mutates_args=())
    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight

    product.register_fake(lambda x, weight: x.new_empty(x.shape[0], weight.shape[1]))
    operator = torch.ops.decompk_test_cost.product
    register_flop_formula(operator)(lambda x, weight, **_: 2 * x[0] * x[1] * weight[1])

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 5))

        def forward(self, x):
            return operator(x, self.weight)

    (layer,) = walk.layers(Product(), (6,))
    assert (layer.kind, layer.macs, layer.params) == ("matmul", 30, 30)


def test_attention_counts_its_projections_and_both_products():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    (layer,) = walk.layers(Attention(), (5, 8))
    assert layer.macs == 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8
    assert layer.params == 4 * (8 * 8 + 8)


def test_figures_add_and_scale():
    layers = walk.layers(small(), (3, 8, 8))
    whole = total(layers)
    assert whole.macs == sum(layer.macs for layer in layers)
    assert (whole * 3).figures() == {name: 3 * value for name, value in whole.figures().items()}
    assert total([]).figures() == Cost().figures()


def test_a_large_network_on_the_meta_device_is_walked_without_data():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 2**16, 7), nn.Conv2d(2**16, 2**16, 7))
    assert walk.layers(model, (3, 1024, 1024))[1].params == 2**32 * 49 + 2**16


def test_an_input_the_network_cannot_take_is_named_in_one_sentence():
    with pytest.raises(DecompkError, match=r"^Sequential cannot run on an input of 3×5×5: .*; give the input size"):
        walk.layers(small(), (3, 5, 5))


def test_a_network_that_branches_on_values_is_refused():
    with pytest.raises(UnsupportedOperation, match="cannot trace Branching"):
        walk.layers(Branching(), (3, 4, 4))
