import pytest
import torch
from torch import nn

from decompk import models
from decompk.errors import DecompkError


def parameters(model):
    """(trainable numbers, running statistics)"""
    running = (b.numel() for name, b in model.named_buffers() if "running" in name)
    return sum(p.numel() for p in model.parameters()), sum(running)


NARROW = {"vgg16": {"fc": 16}, "alexnet": {"width": 6, "fc": 16}}  # 3 divides the width of an AlexNet


def test_every_registered_network_maps_its_own_input_to_its_own_classes():
    for name in models.names():
        known = models.spec(name)
        narrow = models.build(name, **{"width": 4} | NARROW.get(name, {})).eval()
        assert narrow(torch.rand(1, *known.input_size)).shape == (1, known.num_classes)


@pytest.mark.parametrize("name", models.names())
def test_a_narrow_network_of_another_input_and_class_count_computes_finite_logits(name):
    model = models.build(name, num_classes=7, input_size=(1, 64, 64), **{"width": 4} | NARROW.get(name, {}))
    logits = model(torch.rand(2, 1, 64, 64))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "trainable", "running"),
    [
        ("vgg16", 138_357_544, 0),
        ("resnet50", 25_557_032, 53_120),
        ("resnet101", 44_549_160, 105_344),
        ("resnet50_food101", 25_736_293, 53_120),
        ("resnet101_food101", 44_754_533, 105_344),
        ("resnet32", 7_432_074, 9_088),
        ("resnet56", 13_635_978, 16_256),
        ("resnet110", 27_594_762, 32_384),
        ("wrn_16_8", 11_007_540, 7_200),
        ("alexnet", 62_378_344, 0),
    ],
)
def test_parameter_counts_are_those_behind_the_papers_tables(name, trainable, running):
    with torch.device("meta"):
        assert parameters(models.build(name)) == (trainable, running)


def test_vgg16_reads_its_last_map_without_pooling_it():
    assert models.vgg16(width=8, fc=32, input_size=(3, 112, 112)).classifier[0].in_features == 64 * 3 * 3
    assert models.vgg16(num_classes=10, input_size=(3, 32, 32), width=8, fc=32).classifier[0].in_features == 64
    with pytest.raises(DecompkError, match=r"^vgg16 halves its input five times.*give at least 32×32\.$"):
        models.vgg16(input_size=(3, 31, 40))


@pytest.mark.parametrize(("pixels", "first", "last"), [(224, 55, 6), (227, 56, 6), (63, 15, 1)])
def test_alexnet_is_one_tower_whose_maps_shrink_by_4_and_three_poolings(pixels, first, last):
    net = models.alexnet(num_classes=5, input_size=(3, pixels, pixels), width=6, fc=20)
    assert net.conv1(torch.rand(1, 3, pixels, pixels)).shape == (1, 6, first, first)
    assert net.fc6.in_features == 16 * last * last and net(torch.rand(2, 3, pixels, pixels)).shape == (2, 5)
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert [(conv.out_channels, conv.groups) for conv in convolutions] == [(n, 1) for n in (6, 16, 24, 24, 16)]


def test_what_alexnet_cannot_be_is_said_in_one_sentence():
    with pytest.raises(DecompkError, match=r"^alexnet strides by 4 .* nothing of 62×80 pixels; give at least 63×63\.$"):
        models.alexnet(input_size=(3, 62, 80), width=3, fc=8)
    with pytest.raises(DecompkError, match=r"^conv2 of alexnet is 8/3 as wide .* that 3 divides, not 4\.$"):
        models.alexnet(width=4)


def test_table_2_2_strides_in_the_3x3_of_the_last_unit_and_subsamples_its_shortcut():
    net = models.resnet50(width=8)
    assert net.layer1[0].conv1.bias is None
    assert [unit.conv2.stride[0] for unit in net.layer1] == [1, 1, 2]
    assert [unit.conv2.stride[0] for unit in net.layer4] == [1, 1, 1]
    assert isinstance(net.layer1[0].downsample, nn.Sequential)
    x = torch.rand(1, 32, 7, 7)
    assert torch.equal(net.layer1[2].downsample(x), x[:, :, ::2, ::2])
    assert isinstance(net.fc, nn.Linear)


def test_table_3_4_strides_in_the_first_1x1_and_the_projection_and_has_a_hidden_layer():
    net = models.resnet50(variant="table3.4", width=8)
    assert net.layer1[0].conv1.stride == (1, 1)
    assert net.layer2[0].conv1.stride == net.layer2[0].downsample[0].stride == (2, 2)
    assert all(conv.bias is not None for conv in net.modules() if isinstance(conv, nn.Conv2d))
    assert (net.fc[0].out_features, net.fc[2].out_features) == (128, 101)


@pytest.mark.parametrize("pixels", [224, 140, 112, 96, 70])
def test_imagenet_resnets_have_the_map_sizes_of_same_padding(pixels):
    for variant in ("table2.2", "table3.4"):
        with torch.device("meta"):
            net = models.resnet50(variant=variant, width=8)
        x = torch.empty(1, 3, pixels, pixels, device="meta")
        for layer, stride in [(net.conv1, 2), (net.maxpool, 4), (net.layer1, 4), (net.layer2, 8), (net.layer3, 16)]:
            x = layer(x)
            assert variant == "table2.2" or x.shape[-1] == -(-pixels // stride)
        assert net.layer4(x).shape[-1] == -(-pixels // 32)


def test_cifar_projections_have_a_bias_and_no_batch_norm():
    net = models.cifar_resnet32(width=8)
    projections = [block.downsample for block in net.modules() if hasattr(block, "downsample")]
    projections = [p for p in projections if not isinstance(p, nn.Identity)]
    assert [(p.kernel_size, p.stride, p.bias is not None) for p in projections] == [((1, 1), (2, 2), True)] * 2


def test_convolutions_start_from_hes_initialisation():
    conv = models.wrn_16_8().layer2[0].conv2
    assert conv.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)


def test_unknown_names_options_and_variants_are_refused_in_one_sentence():
    with pytest.raises(DecompkError, match=r"^no model is called 'resnet51'; give one of vgg16, .*module:callable\.$"):
        models.build("resnet51")
    with pytest.raises(DecompkError, match=r"^vgg16 has no option 'depth'; it takes num_classes, input_size, "):
        models.build("vgg16", depth=3)
    with pytest.raises(DecompkError, match=r"^ResNet variant 'v3' is not one of 'table2.2', 'table3.4'; choose one\.$"):
        models.resnet50(variant="v3")


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module into the current directory and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(code):
        name = f"own_{abs(hash((code, tmp_path)))}"
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return write


def test_a_users_own_callable_in_the_current_directory_is_imported_and_called(own_module):
    name = own_module("from torch import nn\nmake = lambda: nn.Conv2d(3, 4, 1)\nnet = nn.ReLU()\n")
    assert isinstance(models.build(f"{name}:make"), nn.Conv2d)
    assert isinstance(models.build(f"{name}:net"), nn.ReLU)
    assert isinstance(models.build("torch.nn:ReLU"), nn.ReLU)


def test_what_is_wrong_with_a_users_own_callable_is_said_in_one_sentence(own_module):
    name = own_module("number = 3\ndef other(): return 3\ndef needy(x): return x\n")
    broken = own_module("import no_such_module\n")
    for target, sentence in {
        "no_such_module:f": "no module 'no_such_module' is found; check its name, and its path from",
        f"{broken}:f": f"the module '{broken}' cannot be imported: .* 'no_such_module' .*line 1.; repair it",
        ":f": "no module '' is found",
        f"{name}:missing": f"the module '{name}' has no 'missing'; name a function",
        f"{name}:number": f"'{name}:number' is a int; name a function or class",
        f"{name}:other": f"'{name}:other' returns a int; let it return a torch.nn.Module",
        f"{name}:needy": f"'{name}:needy' cannot be called without arguments: .*; repair it",
    }.items():
        with pytest.raises(DecompkError, match=f"^{sentence}") as caught:
            models.build(target)
        assert "\n" not in str(caught.value)
    with pytest.raises(DecompkError, match="is called without arguments, so width must be set inside it"):
        models.build("torch.nn:ReLU", width=3)
