"""Networks of timm, transformers and peft, packed, are their members alone, as their own users call them."""

import contextlib
import copy

import pytest
import torch
from alone import errors_of, members_of
from torch import nn
from zoo import torchvision

from decompk.packed.pack import pack

K, N = 3, 4


@pytest.fixture(autouse=True)
def _double():
    """What a library makes while it runs is float64 too: masks, rotary tables."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def zoo(name):
    """The library of this name, or a skip; all of them import torchvision where it is there."""
    assert torchvision is None or torchvision.models
    return pytest.importorskip(name)


def assert_alone(members, call, again=None, packed=None):
    errors = errors_of(members, call, again, packed)
    assert max(errors.values()) < 1e-9, {stage: f"{error:.0e}" for stage, error in errors.items()}


# ---- timm -----------------------------------------------------------------------------------------------------------

TINY = dict(depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2))
TIMM = {  # networks of several habits: (pixels, options)
    "convnext_atto": (32, dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))),
    "convit_tiny": (32, dict(img_size=32, patch_size=8, embed_dim=24, num_heads=2, depth=3, local_up_to_layer=2)),
    "levit_128s": (64, dict(img_size=64, embed_dim=(16, 24, 32), key_dim=4, num_heads=(2, 3, 4), depth=(1, 1, 1))),
    "test_byobnet": (32, {}),
    "test_efficientnet": (32, {}),
    "test_efficientnet_evos": (32, {}),
    "test_mambaout": (32, {}),
    "test_nfnet": (32, {}),
    "test_resnet": (64, {}),
    "test_vit_relpos": (64, dict(img_size=64)),
    "swin_tiny_patch4_window7_224": (
        32,
        dict(img_size=32, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2)),
    ),
    "tiny_vit_5m_224": (64, dict(embed_dims=(8, 16, 16, 24), window_sizes=(4, 4, 4, 2), **TINY)),
    "vit_tiny_patch16_224": (32, dict(img_size=32, patch_size=8, embed_dim=24, num_heads=2, depth=2)),
}


def timm_members(name):
    pixels, options = TIMM[name]
    timm = zoo("timm")
    return members_of(lambda: timm.create_model(name, num_classes=5, **options), K), pixels


@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm_train_and_evaluate_as_alone(name):
    members, pixels = timm_members(name)
    own, shared = torch.randn(K, N, 3, pixels, pixels), torch.randn(2, 3, pixels, pixels)
    assert_alone(members, lambda net, k: net(own if k is None else own[k]), lambda net, k: net(shared))


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224"])
def test_timms_gradient_checkpoints_recompute_each_member(name):
    members, pixels = timm_members(name)
    for member in members:
        member.set_grad_checkpointing()
    x = torch.randn(N, 3, pixels, pixels)
    assert_alone(members, lambda net, k: net(x))


def test_members_reparameterised_for_inference_pack_and_so_do_unpacked_ones():
    timm = zoo("timm")
    reparameterize = zoo("timm.utils").reparameterize_model
    members = members_of(lambda: timm.create_model("repghostnet_050", num_classes=5), K)
    members = [reparameterize(member.eval()) for member in members]
    x = torch.randn(N, 3, 32, 32)
    packed = pack(members)
    with torch.no_grad():
        alone = torch.stack([member(x) for member in members])
        torch.testing.assert_close(packed(x), alone)
        torch.testing.assert_close(torch.stack([reparameterize(m)(x) for m in packed.unpack()]), alone)


def trained(net, average, x, steps=2):
    """`net` after some steps of SGD, `average` of it after each."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        net.train()((step + 1) * x).square().mean((-2, -1)).sum().backward()
        optimizer.step()
        average(net)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "vit_tiny_patch16_224"])
def test_averages_of_a_packed_network_are_the_averages_of_its_members(name):
    members, pixels = timm_members(name)
    x, ema = torch.randn(N, 3, pixels, pixels), zoo("timm.utils").ModelEmaV2
    nets, averages = [pack(members), *copy.deepcopy(members)], []
    for net in nets:
        averages.append((ema(net), torch.optim.swa_utils.AveragedModel(net, use_buffers=False)))
        trained(net, lambda net: (averages[-1][0].update(net), averages[-1][1].update_parameters(net)), x)
        torch.optim.swa_utils.update_bn([x, 2 * x], averages[-1][1])
    for kind in range(2):
        packed, *alone = (average[kind].module.eval() for average in averages)
        with torch.no_grad():
            torch.testing.assert_close(packed(x), torch.stack([net(x) for net in alone]))


def test_weight_decay_leaves_out_what_a_member_names():
    members, pixels = timm_members("test_resnet")
    x, factory = torch.randn(N, 3, pixels, pixels), zoo("timm.optim").create_optimizer_v2
    # In a packed network biases have two dimensions, so the members say which tensors are vectors.
    vectors = {name for name, p in members[0].named_parameters() if p.dim() <= 1}
    nets = [pack(members), *copy.deepcopy(members)]
    for net in nets:
        groups = [
            {"params": [p for name, p in net.named_parameters() if (name in vectors) == bare], "weight_decay": decay}
            for bare, decay in ((True, 0.0), (False, 0.1))
        ]
        optimizer = factory(groups, opt="adamw", lr=1e-2)
        net.train()(x).square().mean((-2, -1)).sum().backward()
        optimizer.step()
    for name, p in nets[0].named_parameters():
        torch.testing.assert_close(p, torch.stack([net.get_parameter(name) for net in nets[1:]]), msg=name)


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224"])
def test_state_dicts_go_through_safetensors(name, tmp_path):
    safetensors = zoo("safetensors.torch")
    members, pixels = timm_members(name)
    x, file = torch.randn(N, 3, pixels, pixels), tmp_path / "packed.safetensors"
    packed, other = pack(members).eval(), pack(members[::-1]).eval()
    safetensors.save_file({name: tensor.contiguous() for name, tensor in packed.state_dict().items()}, file)
    other.load_state_dict(safetensors.load_file(file))
    assert torch.equal(other(x), packed(x))
    safetensors.save_model(packed, file)
    safetensors.load_model(again := pack(members[::-1]).eval(), file)
    assert torch.equal(again(x), packed(x))


# ---- transformers ---------------------------------------------------------------------------------------------------

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3)
TOKENS = dict(vocab_size=50, max_position_embeddings=32)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
NO_DROPOUT_GPT2 = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
IDS_GPT2 = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
HF = {  # name: (class, configuration, its options)
    "bert": ("BertForSequenceClassification", "BertConfig", {**SMALL, **TOKENS, **NO_DROPOUT}),
    "bert eager": (
        "BertForSequenceClassification", "BertConfig",
        {**SMALL, **TOKENS, **NO_DROPOUT, "attn_implementation": "eager"},
    ),
    "bert masked": ("BertForMaskedLM", "BertConfig", {**SMALL, **TOKENS, **NO_DROPOUT}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**SMALL, **TOKENS, **NO_DROPOUT}),
    "distilbert": (
        "DistilBertForSequenceClassification", "DistilBertConfig",
        dict(TOKENS, dim=16, n_layers=2, n_heads=2, hidden_dim=32, dropout=0.0, attention_dropout=0.0,
             seq_classif_dropout=0.0, num_labels=3),
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        dict(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, **NO_DROPOUT_GPT2, **IDS_GPT2),
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, **TOKENS, "num_key_value_heads": 1}),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        dict(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
             decoder_start_token_id=0),
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SMALL, **NO_DROPOUT, "image_size": 16, "patch_size": 4}),
}  # fmt: skip
CLASSES = ("bert", "bert eager", "roberta", "distilbert", "vit")  # the others' labels are tokens


def hf_network(name):
    transformers = zoo("transformers")
    model, config, options = HF[name]
    return getattr(transformers, model)(getattr(transformers, config)(**options))


def hf_members(name):
    return members_of(lambda: hf_network(name), K)


def hf_inputs(name, labels=True, **further):
    """What a user gives one of these by keyword: (N, …), padded from some token on."""
    torch.manual_seed(0)
    tokens = torch.randint(5, 50, (N, 7))
    target = torch.randint(0, 3, (N,)) if name in CLASSES else tokens
    mask = (torch.arange(7) < torch.tensor([7, 5, 7, 3])[:, None]).long()
    inputs = {"pixel_values": torch.randn(N, 3, 16, 16)} if name == "vit" else {"input_ids": tokens}
    inputs |= {} if name == "vit" else {"attention_mask": mask}
    return {**inputs, **({"labels": target} if labels else {}), **further}


@pytest.mark.parametrize("name", HF)
def test_transformers_return_each_members_loss_and_outputs(name):
    members, inputs = hf_members(name), hf_inputs(name)
    packed = pack(members)
    out, alone = packed(**inputs), [member(**inputs) for member in members]
    assert type(out) is type(alone[0]) and out.loss.shape == (K,)
    torch.testing.assert_close(out.loss, torch.stack([own.loss for own in alone]))
    assert_alone(members, lambda net, k: net(**inputs))


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_transformers_take_each_member_its_own_batch_by_keyword(name):
    members, shared = hf_members(name), hf_inputs(name)
    own = {name: torch.stack([value.roll(k, 0) for k in range(K)]) for name, value in shared.items()}
    packed = pack(members, input_dims=next(iter(shared.values())).dim())
    assert_alone(
        members,
        lambda net, k: net(**(own if k is None else {name: value[k] for name, value in own.items()})),
        lambda net, k: net(**shared),
        packed,
    )


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpoints_of_transformers_recompute_each_member(name, reentrant):
    members, inputs = hf_members(name), hf_inputs(name)
    for member in members:
        member.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        with contextlib.suppress(NotImplementedError):
            member.enable_input_require_grads()
    assert_alone(members, lambda net, k: net(**inputs))


@pytest.mark.parametrize("name", ["bert eager", "gpt2"])
def test_hidden_states_and_attention_maps_are_stacked_too(name):
    members = hf_members(name)
    for member in members:
        member.set_attn_implementation("eager")
    inputs = hf_inputs(name, labels=False, output_hidden_states=True, output_attentions=True)
    out = pack(members)(**inputs)
    assert len(out.hidden_states) == 3 and all(t.shape == (K, N, 7, 16) for t in out.hidden_states)
    assert_alone(members, lambda net, k: net(**inputs))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_token_after_token_with_a_cache_is_the_whole_sentence(name):
    members, tokens = [member.eval() for member in hf_members(name)], hf_inputs(name)["input_ids"]
    packed = pack(members)
    with torch.no_grad():
        whole = torch.stack([member(input_ids=tokens).logits for member in members])
        first = packed(input_ids=tokens[:, :5], use_cache=True)
        torch.testing.assert_close(first.logits, whole[:, :, :5])
        # Every member has a cache of its own, so members that were taken apart go on.
        for k, member in enumerate(packed.unpack()):
            rest = member(input_ids=tokens[:, 5:], past_key_values=first.past_key_values[k])
            torch.testing.assert_close(rest.logits, whole[k, :, 5:])


# ---- peft -----------------------------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


ADAPTERS = {
    "lora": ("LoraConfig", dict(r=2, lora_alpha=4)),
    "dora": ("LoraConfig", dict(r=2, use_dora=True)),
    "biases and a head": ("LoraConfig", dict(r=2, bias="all", use_rslora=True, modules_to_save=["c"])),
    "ia3": ("IA3Config", dict(feedforward_modules=[])),
}


def adapted(kind):
    peft = zoo("peft")
    config, options = ADAPTERS[kind]
    return members_of(
        lambda: peft.get_peft_model(Perceptron(), getattr(peft, config)(target_modules=["a", "b"], **options)), K
    )


@pytest.mark.parametrize("kind", ADAPTERS)
def test_only_the_adapters_of_a_packed_network_train(kind):
    members, x = adapted(kind), torch.randn(N, 6)
    packed = pack(members, input_dims=2)
    trained = {name for name, p in members[0].named_parameters() if p.requires_grad}
    assert 0 < len(trained) < len(list(members[0].parameters()))
    assert {name for name, p in packed.named_parameters() if p.requires_grad} == trained
    assert_alone(members, lambda net, k: net(x), packed=packed)


@pytest.mark.parametrize("change", ["disable_adapter_layers", "merge_adapter"])
def test_adapters_switched_off_or_merged_before_packing_and_after_unpacking_stay_so(change):
    members, x = adapted("lora"), torch.randn(N, 6)
    packed = pack(members, input_dims=2).eval()
    unpacked = packed.unpack()
    for member in (*members, *unpacked):
        getattr(member.eval().base_model, change)()
    with torch.no_grad():
        alone = torch.stack([member(x) for member in members])
        torch.testing.assert_close(pack(members, input_dims=2)(x), alone)
        torch.testing.assert_close(torch.stack([member(x) for member in unpacked]), alone)


def test_merged_adapters_leave_plain_networks():
    members, x = adapted("lora"), torch.randn(N, 6)
    packed = pack(members, input_dims=2).eval()
    with torch.no_grad():
        plain = [member.merge_and_unload() for member in packed.unpack()]
        assert all(type(net) is Perceptron for net in plain)
        torch.testing.assert_close(pack(plain)(x), packed(x))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_adapters_of_transformers_train_as_alone(name):
    peft, inputs = zoo("peft"), hf_inputs(name)
    config = {
        "bert": peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2, init_lora_weights=False),
        "gpt2": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], r=2, fan_in_fan_out=True),
    }[name]
    members = members_of(lambda: peft.get_peft_model(hf_network(name), copy.deepcopy(config)), K)
    assert_alone(members, lambda net, k: net(**inputs))
