"""Any network in any loop: what belongs to the batch, what sees across it, what comes back is found out by itself."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from helpers import assert_packed_equals_separate, double, members_of
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import decompk
from decompk import errors, pack
from decompk.fx.pytree import leaves as all_leaves
from decompk.packed.rehearsal import Rehearsal

K = 3
pytestmark = pytest.mark.filterwarnings("ignore:.*member by member")


def assert_as_alone(members, *args, packed=None, own=None, **kwargs):
    """Packed outputs and gradients are the members' alone; `own(k, leaf)` is what member k gets of an argument."""
    packed = pack(members) if packed is None else packed
    for training in (True, False):
        packed.train(training)
        packed.zero_grad()
        out = packed(*args, **kwargs)
        outputs = [leaf for leaf in all_leaves(out) if isinstance(leaf, torch.Tensor)]
        sum(leaf.square().sum() for leaf in outputs if leaf.is_floating_point()).backward()
        for k, member in enumerate(members):
            member.train(training).zero_grad()
            a, kw = (args, kwargs) if own is None else own(k)
            single = [leaf for leaf in all_leaves(member(*a, **kw)) if isinstance(leaf, torch.Tensor)]
            sum(leaf.square().sum() for leaf in single if leaf.is_floating_point()).backward()
            assert len(single) == len(outputs) > 0
            for ours, theirs in zip(outputs, single, strict=True):
                torch.testing.assert_close(ours[k], theirs, rtol=1e-10, atol=1e-12)
            for name, parameter in member.named_parameters():
                grad = packed.get_parameter(name).grad
                if parameter.grad is None:
                    assert grad is None or not grad[k].any(), name
                else:
                    torch.testing.assert_close(grad[k], parameter.grad, rtol=1e-9, atol=1e-11, msg=name)
    return packed


# ---- what belongs to the batch --------------------------------------------------------------------------------------


class Prototypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x, prototypes, scale=None):
        distances = torch.cdist(self.fc(x), prototypes)
        return distances if scale is None else distances / scale.sum()


@pytest.mark.parametrize("N", [1, 2, K, 5, 6, 15])
def test_an_argument_that_is_no_batch_is_the_same_for_all_whatever_its_length(N):
    members, prototypes, scale = members_of(Prototypes), double(5, 4), torch.rand(5, dtype=torch.float64)
    packed = assert_as_alone(members, double(N, 6), prototypes, scale)
    assert "member by member" not in packed.describe()
    assert_as_alone(members, double(N, 6), packed=packed, scale=scale, prototypes=prototypes)
    x = double(K, N, 6)
    packed = pack(members, input_dims=2)
    assert_as_alone(members, x, prototypes, packed=packed, own=lambda k: ((x[k], prototypes), {}))


class Conditioned(nn.Module):
    """Samples of two kinds, a mask for each, all of one batch, and a table for everybody."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)

    def forward(self, batch, table, *, flag=False):
        y = self.image(batch["image"]).mean((2, 3)) + self.text(batch["text"]) * batch["mask"][:, None]
        return {"y": y @ table, "parts": [y, {"flag": flag}]}


@pytest.mark.parametrize("N", [1, 4, 5])
def test_dicts_of_tensors_follow_the_batch(N):
    members, table = members_of(Conditioned), double(4, 4)
    batch = {"image": double(N, 3, 8, 8), "text": double(N, 5), "mask": torch.rand(N, dtype=torch.float64)}
    packed = assert_as_alone(members, batch, table, flag=True)
    assert "member by member" not in packed.describe()
    mine = {"image": double(K, N, 3, 8, 8), "text": double(K, N, 5), "mask": torch.rand(N, dtype=torch.float64)}
    assert_as_alone(
        members,
        mine,
        table,
        packed=packed,
        own=lambda k: (({n: t[k] if n != "mask" else t for n, t in mine.items()}, table), {}),
    )


@pytest.mark.parametrize("N", [2, 4, 5])
def test_a_table_given_to_a_module_that_runs_member_by_member_stays_whole_whatever_its_length(N):
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(6))

        def forward(self, x, table):
            return (x * self.scale) @ table.T

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.looks, self.b = nn.Linear(6, 6), Looks(), nn.Linear(12, 2)

        def forward(self, x):
            return self.b(self.looks(self.a(x), torch.linspace(0, 1, 72, dtype=x.dtype).view(12, 6)))

    packed = pack(members_of(Net))  # 12 rows are K · N of four samples
    packed(double(5, 6))
    assert_as_alone(members_of(Net), double(N, 6), packed=packed)
    assert packed.describe().count("member by member") == 1


def test_labels_may_be_each_members_own():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x, labels):
            logits = self.fc(x)
            return F.cross_entropy(logits, labels), logits

    members, x = members_of(Loss), double(5, 6)
    packed = pack(members)
    assert_as_alone(members, x, torch.arange(5) % 4, packed=packed)
    assert packed(x, torch.arange(5) % 4)[0].shape == (K,)
    labels = torch.randint(4, (K, 5))
    assert_as_alone(members, x, labels, packed=packed, own=lambda k: ((x, labels[k]), {}))
    assert_as_alone(members, x=x, labels=labels, packed=packed, own=lambda k: ((x, labels[k]), {}))


def test_shared_names_what_is_no_batch_and_unknown_names_are_refused():
    members, x = members_of(Prototypes), double(5, 6)
    packed = pack(members, shared=["prototypes"], rehearse=False)
    assert torch.equal(packed(x, double(5, 4)).new_zeros(1), double(1) * 0)
    prototypes = double(5, 4)
    for out, member in zip(packed(x, prototypes), members, strict=True):
        torch.testing.assert_close(out, member(x, prototypes))
    with pytest.raises(errors.PackError, match="shared names 'protos', which is no argument of Prototypes.forward"):
        pack(members, shared=["protos"])


@pytest.mark.parametrize("N", [4, 5, 7])
def test_what_cannot_be_known_is_refused_at_every_size_alike_and_the_remedy_works(N):
    class Fixed(Prototypes):
        def forward(self, x, prototypes):
            assert len(x) == N, "another number of samples"
            return super().forward(x, prototypes)

    members, x, prototypes = members_of(Fixed), double(K, N, 6), double(5, 4)
    with pytest.raises(errors.PackError, match="cannot be told which of these arguments .* shared="):
        pack(members, input_dims=2)(x, prototypes)
    assert_as_alone(members, x[0], prototypes)  # each member can have what all share as it is


def test_arguments_that_no_member_takes_are_refused_with_its_reason():
    packed = pack(members_of(Prototypes))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'prototypes'"):
        packed(x=double(4, 6))  # as a member alone raises
    for args in ((), (torch.tensor(1.0),), ([], "text")):
        with pytest.raises(errors.PackError, match="a member alone does not take these arguments"):
            packed(*args)
    assert "member by member" not in packed.describe()
    assert packed(double(4, 6), double(5, 4)).shape == (K, 4, 5)


def test_networks_are_called_by_their_own_argument_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(2, 4)

        def forward(self, image, x=None, self_=None):
            y = self.conv(image).mean((2, 3))
            return y if x is None else y + self.fc(x)

    members, image, x = members_of(Named), double(4, 3, 8, 8), double(4, 2)
    packed = assert_as_alone(members, image=image)
    for args, kwargs in (((image, x), {}), ((image,), {"x": x}), ((), {"x": x, "image": image})):
        assert_as_alone(members, *args, packed=packed, **kwargs)
    assert "member by member" not in packed.describe()


def test_lists_of_crops_are_refused_with_the_right_call():
    model = decompk.models.cifar_resnet8()
    packed = decompk.grouped_subnets(model, (3, 32, 32), 4)
    x = torch.randn(2, 3, 32, 32)
    crops = packed.decomposition.split(x)
    with pytest.raises(errors.PackError, match=r"crops as one tensor .*torch.stack\(crops\)"):
        packed(crops)
    assert torch.allclose(packed.eval()(torch.stack(crops)), packed(x), atol=1e-6)


# ---- recurrent networks and bags ------------------------------------------------------------------------------------


class States(nn.Module):
    """Samples in dimension 1 of the states, in and out."""

    def __init__(self, kind=nn.LSTM, first=True):
        super().__init__()
        self.rnn, self.head = kind(3, 4, 2, batch_first=first), nn.Linear(4, 2)

    def forward(self, x, state=None):
        y, state = self.rnn(x, state)
        return self.head(y), state


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("N", [2, 4])
def test_states_of_recurrent_layers_go_in_and_out(kind, first, N):
    members = members_of(lambda: States(kind, first))
    x = double(N, 5, 3) if first else double(5, N, 3)
    packed = assert_as_alone(members, x)
    state = (double(2, N, 4), double(2, N, 4)) if kind is nn.LSTM else double(2, N, 4)
    assert_as_alone(members, x, state, packed=packed)
    _, state = packed(x)
    out = packed(x, state)[0]  # each member's own states, as they came back
    for k, member in enumerate(members):
        mine = tuple(s[k] for s in state) if kind is nn.LSTM else state[k]
        torch.testing.assert_close(out[k], member.eval()(x, mine)[0])


@pytest.mark.parametrize("texts", [6, 4])
def test_embedding_bags_take_offsets(texts):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.fc = nn.EmbeddingBag(10, 4, mode="mean"), nn.Linear(4, 2)

        def forward(self, text, offsets):
            return self.fc(self.bag(text, offsets))

    offsets = torch.tensor([0, 2, 3, 5])
    assert_as_alone(members_of(Bag), torch.randint(10, (texts,)), offsets.clamp(max=texts))


def test_packed_sequences_go_in_and_out():
    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, sequence):
            y, _ = self.rnn(sequence)
            return self.fc(pad_packed_sequence(y, batch_first=True)[0]), y

    members = members_of(Sequences)
    sequence = pack_padded_sequence(double(4, 5, 3), [5, 4, 2, 1], batch_first=True)
    packed = pack(members)
    y, sequences = packed(sequence)
    for k, member in enumerate(members):
        alone, inside = member(sequence)
        torch.testing.assert_close(y[k], alone)
        assert isinstance(sequences[k], PackedSequence) and torch.allclose(sequences[k].data, inside.data)


# ---- what comes back ------------------------------------------------------------------------------------------------


def test_scalars_beside_the_outputs_are_one_value_per_member():
    class Vae(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.d = nn.Linear(6, 4), nn.Linear(2, 6)

        def forward(self, x):
            mean, log = self.e(x).chunk(2, -1)
            divergence = -0.5 * (1 + log - mean**2 - log.exp()).sum(-1).mean()
            return self.d(mean), divergence, len(x), divergence.item()

    members, x = members_of(Vae), double(5, 6)
    packed = pack(members)
    out, divergence, count, number = packed(x)
    assert out.shape == (K, 5, 6) and divergence.shape == number.shape == (K,) and count == 5
    (out.square().sum() + divergence.sum()).backward()
    for k, member in enumerate(members):
        single = member(x)
        torch.testing.assert_close(out[k], single[0])
        torch.testing.assert_close(divergence[k], single[1])
        assert abs(number[k] - single[3]) < 1e-6
        (single[0].square().sum() + single[1]).backward()
        torch.testing.assert_close(packed.get_parameter("e.weight").grad[k], member.e.weight.grad)
    assert "makes numbers of all its samples" in packed.describe()


def test_outputs_with_several_rows_a_sample_or_samples_elsewhere_keep_their_shapes():
    class Shapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 8)

        def forward(self, x):
            y = self.fc(x)
            return y.reshape(-1, 4), y.T, y[:, 0], torch.arange(7)

    members, x = members_of(Shapes), double(5, 6)
    packed = assert_as_alone(members, x)
    assert [tuple(t.shape) for t in packed(x)] == [(K, 10, 4), (K, 8, 5), (K, 5), (K, 7)]
    assert "member by member" not in packed.describe()


# ---- code that looks across the batch -------------------------------------------------------------------------------

ACROSS = {
    "softmax": lambda x: F.softmax(x, 0),
    "mean": lambda x: x - x.mean(0),
    "keyword": lambda x: x - x.mean(dim=0, keepdim=True),
    "std": lambda x: x / x.std(0),
    "norm": lambda x: x / x.norm(),
    "flip": lambda x: x + x.flip(0),
    "roll": lambda x: x + 0.01 * x.roll(1, 0),
    "similarity": lambda x: (x @ x.T) @ x,
    "count": lambda x: x / x.shape[0],
    "first": lambda x: x - x[:1],
    "cumsum": lambda x: x.cumsum(0),
    "sort": lambda x: x.sort(0).values,
    "tiny": lambda x: x + 1e-5 * x.mean(),
}


class Across(nn.Module):
    def __init__(self, how, inside):
        super().__init__()
        self.a, self.b, self.how, self.inside = nn.Linear(6, 6), nn.Linear(6, 4), how, inside

    def forward(self, x):
        return self.b(self.inside(ACROSS[self.how](self.a(x))))


class Inside(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.c, self.how = nn.Linear(6, 6), how

    def forward(self, x):
        return self.c(ACROSS[self.how](x))


@pytest.mark.parametrize("how", ACROSS)
def test_code_that_looks_across_the_batch_sees_its_own_members_only(how):
    packed = assert_as_alone(members_of(lambda: Across(how, nn.Identity())), double(4, 6))
    assert "member by member: its samples see each other" in packed.describe()


@pytest.mark.parametrize("how", ["softmax", "mean", "count"])
def test_only_the_module_that_looks_across_the_batch_runs_member_by_member(how):
    make = lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), Inside(how), nn.Linear(6, 3))  # noqa: E731
    lines = assert_as_alone(members_of(make), double(4, 6)).describe().splitlines()
    assert [line.split(maxsplit=2)[::2] for line in lines[1:]] == [
        ["0", "twin"],
        ["2", "member by member: its samples see each other"],
        ["3", "twin"],
    ]


def test_members_that_start_alike_are_told_apart_all_the_same():
    member = Across("mean", nn.Identity()).double()
    packed = pack([member] * K)
    packed(double(4, 6))
    with torch.no_grad():
        for p in packed.parameters():
            p += torch.randn_like(p)
    x = double(4, 6)
    for out, alone in zip(packed(x), packed.unpack(), strict=True):
        torch.testing.assert_close(out, alone(x))


def test_dropout_does_not_hide_what_looks_across_the_batch():
    class Drops(Across):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    for inside in (nn.Identity(), nn.Dropout(0.5)):
        packed = pack(members_of(lambda inside=inside: Drops("mean", copy.deepcopy(inside))))
        packed(double(4, 6))
        assert "its samples see each other" in packed.describe()


def test_networks_that_do_not_look_across_the_batch_stay_packed():
    nets = [
        lambda: decompk.models.cifar_resnet8(),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(1)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ]
    for make in nets:
        for N in (1, 2, 7):
            packed = pack([make() for _ in range(K)])
            x = torch.randn(N, 3, 32, 32)
            packed(x), packed.eval()(x), packed(x.expand(K, *x.shape))
            assert "member by member" not in packed.describe()


def test_a_rehearsal_leaves_no_trace():
    seen = []

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            x = self.bn(self.conv(x)).mean((2, 3)) + self.calls
            return self.fc(F.dropout(x, 0.5, self.training))

    members = members_of(Counts)
    for member in members:
        member.fc.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    packed, again = pack(members), pack(members, rehearse=False)
    x = double(4, 3, 8, 8)
    torch.manual_seed(7)
    out = packed(x)
    torch.manual_seed(7)
    torch.testing.assert_close(out, again(x))
    assert seen == [4] * 2 * K
    for ours, theirs in zip(packed.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert [m.calls for m in packed.unpack()] == [1] * K
    assert all(p.grad is None for p in packed.parameters())


# ---- a view behind packed layers ------------------------------------------------------------------------------------


class LeNet(nn.Module):
    def __init__(self, norm=False, skip=False):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.fc, self.skip = nn.Linear(6 * 49, 5), skip

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        y = torch.relu(self.norm(self.conv2(x)))
        y = x + y if self.skip else y
        return self.fc(y.view(y.size(0), -1))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [None, "torch", "loop"])
@pytest.mark.parametrize("options", [{}, {"norm": True}, {"skip": True}, {"norm": True, "skip": True}], ids=str)
def test_a_view_of_activations_sees_them_as_a_member_alone_lays_them_out(options, name, fused):
    members = [m.float() for m in members_of(lambda: LeNet(**options))]
    x = torch.randn(4, 1, 14, 14)
    packed = decompk.fuse(pack(members)) if fused else pack(members)
    for training in (True, False):
        packed.train(training)
        with decompk.backend(name) if name else torch.enable_grad():
            out = packed(x)
        for k, member in enumerate(members):
            torch.testing.assert_close(out[k], member.train(training)(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), out, rtol=1e-4, atol=1e-5)
    assert "member by member" not in packed.describe()
    assert "laid out for a view" in packed.describe()


def test_code_that_reads_strides_runs_as_alone():
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 16, 2)

        def forward(self, x):
            y = self.conv(x)
            return self.fc(torch.as_strided(y, (y.shape[0], 64), (y.stride(0), 1)) if y.is_contiguous() else y * 0)

    assert_as_alone(members_of(Strided), double(4, 3, 6, 6))


# ---- values kept between calls, checkpoints -------------------------------------------------------------------------


class Caches(nn.Module):
    """Derived values in a dict, a list, an attribute of a helper, and a memoised method; training drops them."""

    def __init__(self):
        super().__init__()
        self.fc, self.bias = nn.Linear(6, 6), nn.Parameter(torch.rand(6))
        self.table, self.items, self.calls = {}, [], 0

    def train(self, mode=True):
        super().train(mode)
        self.table = {}
        self.items.clear()
        return self

    def forward(self, x):
        if self.training:
            return self.fc(x) + self.bias.flip(0)
        self.calls += 1
        if x.dtype not in self.table:
            self.table[x.dtype] = self.bias.flip(0)
            self.items.append(self.fc.weight.sum())
        return self.fc(x) + self.table[x.dtype] * self.items[0]


def test_values_kept_between_calls_are_each_members_own_and_follow_the_mode():
    members, x = members_of(lambda: nn.Sequential(nn.Linear(6, 6), Caches())), double(4, 6)
    packed = pack(members)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (packed, *members)]
    for _ in range(3):
        for training in (True, False):
            for net in (packed, *members):
                net.train(training)
            out, alone = packed(x), torch.stack([m(x) for m in members])
            torch.testing.assert_close(out, alone)
            if training:
                for loss in (out.square().sum(), alone.square().sum()):
                    loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
    assert [len(m[1].items) for m in packed.unpack()] == [1] * K


def test_state_survives_copies_and_files(tmp_path):
    packed, x = pack(members_of(Caches)).eval(), double(4, 6)
    out = packed(x)
    twin = copy.deepcopy(packed)
    torch.save(packed, tmp_path / "packed.pt")
    for other in (twin, torch.load(tmp_path / "packed.pt", weights_only=False)):
        torch.testing.assert_close(other(x), out)
        assert [m.calls for m in other.unpack()] == [2] * K
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    torch.testing.assert_close(packed(x), out)


class FillsABuffer(nn.Module):
    """A buffer that is None until the first call, and has a row for every sample of the last."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("rows", None)
        self.register_buffer("other", torch.zeros(1))

    def forward(self, x):
        self.rows = x.detach().mean(1)
        return self.linear(x)


class AssignsData(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x):
        self.weight.data = self.weight.data.clamp(0, 1)
        return x * self.weight


@pytest.mark.parametrize("how", [{}, {"member_by_member": [""]}])
@pytest.mark.parametrize("make", [FillsABuffer, AssignsData])
def test_what_forward_writes_is_in_the_packed_module(make, how):
    members = members_of(lambda: nn.Sequential(nn.Linear(6, 6), make()))
    packed = pack(members, **how)
    for N in (4, 5):
        x = double(N, 6)
        torch.testing.assert_close(packed(x), torch.stack([m(x) for m in members]))
    assert packed.state_dict().keys() == members[0].state_dict().keys()
    for k, member in enumerate(members):
        for name, tensor in member.state_dict().items():
            torch.testing.assert_close(packed.state_dict()[name][k], tensor)
            torch.testing.assert_close(packed.unpack()[k].state_dict()[name], tensor)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.a, self.shift, self.reentrant = nn.Linear(6, 6), nn.Parameter(torch.randn(6)), reentrant

    def body(self, x):
        return torch.tanh(torch.tanh(x + self.shift) * 2)

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.body, self.a(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("N", [1, K, 5])
def test_checkpoints_inside_modules_that_run_member_by_member_compute_again_with_the_members_own(N, reentrant):
    members = members_of(lambda: nn.Sequential(nn.Linear(6, 6), Checkpointed(reentrant)))
    assert_packed_equals_separate(members, double(N, 6), 2)
    packed = pack(members)
    x, other = double(N, 6), double(N, 6)
    first, second = packed(x), packed(other)  # two graphs under way at once
    second.square().sum().backward()
    first.square().sum().backward()
    for k, member in enumerate(members):
        member.zero_grad()
        (member(x).square().sum() + member(other).square().sum()).backward()
        torch.testing.assert_close(packed.get_parameter("1.shift").grad[k], member[1].shift.grad)


def test_changes_of_a_packed_networks_modules_reach_every_member():
    class Owns(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.factor = nn.Parameter(torch.rand(6)), 1.0
            self.drop, self.act, self.shifts = nn.Dropout(0.5), nn.Tanh(), []

        def forward(self, x):
            return self.act(self.drop(x * self.scale)) * self.factor + sum(self.shifts)

    members, x = members_of(lambda: nn.Sequential(nn.Linear(6, 6), Owns())), double(4, 6)
    packed, seen = pack(members), []
    packed(x)
    inner = packed.get_submodule("1")
    for net in (inner, *(m[1] for m in members)):
        net.factor, net.drop.p, net.act = 3.0, 0.0, nn.Sigmoid()
        net.shifts.append(2.0)
    torch.testing.assert_close(packed(x), torch.stack([m(x) for m in members]))
    handle = inner.act.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    packed(x)
    handle.remove()
    packed(x)
    assert seen == [(4, 6)] * K


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_loops_over_modules_find_norms_that_run_member_by_member():
    members = members_of(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4)))
    packed, batches = pack(members), [double(5, 3, 8, 8) for _ in range(2)]
    for net in (packed, *members):
        torch.optim.swa_utils.update_bn(batches, net)
    for k, member in enumerate(members):
        for name, buffer in member.named_buffers():
            torch.testing.assert_close(packed.get_buffer(name)[k], buffer)
    for m in packed.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    before = packed.get_buffer("1.running_mean").clone()
    packed(batches[0])
    assert torch.equal(packed.get_buffer("1.running_mean"), before)


def test_traced_networks_pack_too():
    class Traced(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.s = nn.Linear(6, 6), nn.Parameter(torch.rand(6))

        def forward(self, x):
            return self.a(x) * self.s

    traced = torch.fx.symbolic_trace(members_of(Traced)[0])
    members = [copy.deepcopy(traced) for _ in range(K)]
    with torch.no_grad():
        for member in members:
            member.s.uniform_()
    kinds = {type(member) for member in members}
    assert_as_alone(members if len(kinds) == 1 else [traced] * K, double(4, 6))


# ---- modes ----------------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Its own forward reads `training`, as torch's functional dropout makes people do."""

    def __init__(self, owns):
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.ones(5)) if owns else 1

    def forward(self, x):
        return F.dropout(self.fc(x) * self.scale, 0.5, self.training)


@pytest.mark.parametrize("owns", [False, True])
@pytest.mark.parametrize("below", [False, True])
def test_modes_set_by_attribute_reach_the_network(owns, below):
    make = lambda: nn.Sequential(Functional(owns)) if below else Functional(owns)  # noqa: E731
    packed, x = pack(members_of(make)), double(4, 6)
    modes = {name: m.training for name, m in packed.named_modules()}
    packed.eval()
    assert torch.equal(packed(x), packed(x))
    for name, m in packed.named_modules():
        m.training = modes[name]
    assert packed.training and not torch.equal(packed(x), packed(x))
    for m in packed.modules():
        m.training = False
    assert torch.equal(packed(x), packed(x)) and not any(m.training for m in packed.unpack()[0].modules())


def test_explaining_a_network_leaves_its_modes_alone(capsys):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            return F.dropout(self.fc(F.relu(self.conv(x)).mean((2, 3))), 0.5, self.training)

    packed, x = pack([Net() for _ in range(K)]), torch.randn(4, 3, 8, 8)
    decompk.explain(packed, x)
    assert packed.training and not torch.equal(packed(x), packed(x))


# ---- names ----------------------------------------------------------------------------------------------------------


class Names(nn.Module):
    """Submodules, parameters and attributes under names of ours."""

    def __init__(self):
        super().__init__()
        self.Q, self.K, self.V = (nn.Linear(6, 6) for _ in range(3))
        self.compose, self.describe, self.crops = nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()
        self.ensemble, self.path, self.decomposition = 2.0, "of its own", "spatial"

    def forward(self, x):
        y = (self.Q(x) @ self.K(x).mT).softmax(-1) @ self.V(x)
        assert self.path == "of its own" and self.decomposition == "spatial"
        return self.crops(self.describe(self.compose(y))) * self.ensemble


def test_a_networks_own_names_are_not_hidden_by_ours():
    members = members_of(Names)
    packed = pack(members, input_dims=3)
    x = double(4, 5, 6)
    torch.testing.assert_close(packed(x), torch.stack([m(x) for m in members]))
    for name in ("K", "compose", "describe", "crops"):
        assert packed.get_submodule(name) is getattr(packed, name) and isinstance(getattr(packed, name), nn.Module)
    packed.K.requires_grad_(False)
    assert not packed.get_parameter("K.weight").requires_grad
    assert packed.decomposition == "spatial" and packed.path == "of its own"
    twin = copy.deepcopy(packed)
    assert twin.K is twin.get_submodule("K") and twin.K is not packed.K
    assert [m.path for m in packed.unpack()] == ["of its own"] * K
    packed.path = "of its own"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        packed.nothing  # noqa: B018


def test_attributes_of_the_network_are_read_and_written_through_the_packed_module():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.temperature = nn.Linear(6, 3), 1.0

        def forward(self, x):
            return self.fc(x) / self.temperature

    members, x = members_of(Scaled), double(4, 6)
    packed = pack(members)
    assert packed.temperature == 1.0
    for net in (packed, *members):
        net.temperature = 2.0
    torch.testing.assert_close(packed(x), torch.stack([m(x) for m in members]))


# ---- freezing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.Adam, decompk.optim.Adam, torch.optim.SGD, decompk.optim.SGD])
def test_parameters_are_frozen_and_unfrozen_after_the_optimizer_was_made(kind):
    make = lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))  # noqa: E731
    members, x = members_of(make), double(4, 6)
    packed = pack(members)
    packed.get_submodule("0").requires_grad_(False)
    of_packed = kind(packed if kind.__module__.startswith("decompk") else packed.parameters(), lr=0.1)
    reference = torch.optim.Adam if kind.__name__ == "Adam" else torch.optim.SGD
    for member in members:
        member[0].requires_grad_(False)
    alone = [reference(member.parameters(), lr=0.1) for member in members]
    for frozen in (True, False, True):
        for net in (packed.get_submodule("0"), *(m[0] for m in members)):
            net.requires_grad_(not frozen)
        for _ in range(2):
            for optimizer in (of_packed, *alone):
                optimizer.zero_grad()
            packed(x).square().sum().backward()
            sum(m(x).square().sum() for m in members).backward()
            for optimizer in (of_packed, *alone):
                optimizer.step()
    for k, member in enumerate(members):
        for name, p in member.named_parameters():
            torch.testing.assert_close(packed.get_parameter(name)[k], p, msg=name)


# ---- what only gradients, draws, attributes and flags show ----------------------------------------------------------


class Energy(nn.Module):
    """Forces: the gradient of a mean over the batch, which is taken inside."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.net(x).mean(), x, create_graph=True)[0]


class NormalisesGradients(Across):
    def forward(self, x):
        y = self.a(x)
        if y.requires_grad:
            y.register_hook(lambda g: g / g.norm())
        return self.b(torch.tanh(y))


@pytest.mark.parametrize("make", [Energy, lambda: NormalisesGradients("mean", nn.Identity())])
def test_gradients_that_look_across_the_batch_see_their_own_member_only(make):
    members, x = members_of(make), double(5, 6)
    packed = pack(members)
    packed(x).square().sum().backward()
    for k, member in enumerate(members):
        member(x).square().sum().backward()
        for name, p in member.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(packed.get_parameter(name).grad[k], p.grad)
    assert "its samples see each other" in packed.describe()


def test_samples_that_are_mixed_at_random_in_training_are_a_members_own():
    class Mixes(Across):
        def forward(self, x):
            y = self.a(x)
            return self.b(0.7 * y + 0.3 * y[torch.randperm(len(y))] if self.training else y)

    packed = pack(members_of(lambda: Mixes("mean", nn.Identity())))
    packed(double(5, 6))[0].sum().backward()
    assert packed.a.weight.grad[0].any() and not packed.a.weight.grad[1:].any()
    assert "its samples see each other" in packed.describe()


def test_what_forward_leaves_in_an_attribute_is_one_for_each_member():
    class Auxiliary(Across):
        def forward(self, x):
            y = torch.relu(self.a(x))
            self.auxiliary = y.square().mean()
            return self.b(y)

    make = lambda: Auxiliary("mean", nn.Identity())  # noqa: E731
    for make_one, path in ((make, ""), (lambda: nn.Sequential(nn.Linear(6, 6), make()), "1")):
        members, x = members_of(make_one), double(5, 6)
        packed = pack(members)
        (packed(x).sum() + packed.get_submodule(path).auxiliary.sum()).backward()
        for k, member in enumerate(members):
            (member(x).sum() + member.get_submodule(path).auxiliary).backward()
            name = f"{path}.a.weight".lstrip(".")
            torch.testing.assert_close(packed.get_parameter(name).grad[k], member.get_parameter(name).grad)


@pytest.mark.parametrize("path", ["", "1"])
def test_flags_that_are_set_later_are_rehearsed_when_they_matter(path):
    class Centres(Across):
        centre = False

        def __init__(self):
            super().__init__("mean", nn.Identity())
            self.centre = False

        def forward(self, x):
            return super().forward(x) if self.centre else self.b(self.a(x))

    members, x = members_of(Centres if path == "" else lambda: nn.Sequential(nn.Linear(6, 6), Centres())), double(5, 6)
    packed = pack(members)
    packed(x)
    assert "member by member" not in packed.describe()
    for net in (packed, *members):
        net.get_submodule(path).centre = True
    torch.testing.assert_close(packed(x), torch.stack([m(x) for m in members]))


def test_a_network_that_takes_one_number_of_samples_only_runs_as_its_members():
    class Fixed(Across):
        def forward(self, x):
            assert len(x) == 5
            return super().forward(x)

    assert_as_alone(members_of(lambda: Fixed("mean", nn.Identity())), double(5, 6))


# ---- one batch, or one per member -----------------------------------------------------------------------------------


def vectors():
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 2))


@pytest.mark.parametrize("N", [K, 5])
def test_a_batch_of_more_dimensions_than_the_first_layer_tells_is_what_a_member_takes_it_for(N):
    members = members_of(vectors)
    images = double(N, 2, 3, 4)
    packed = assert_as_alone(members, images)
    own = double(K, N, 2, 3, 4)
    assert_as_alone(members, own, packed=packed, own=lambda k: ((own[k],), {}))
    grey = double(N, 1, 4, 6)  # one channel, and no batch of one sample for each member
    assert_as_alone(members, grey, packed=packed)
    linear = members_of(lambda: nn.Linear(6, 2))
    with pytest.raises(errors.PackError, match="input_dims=3 or input_dims=2"):
        pack(linear)(double(N, 5, 6))
    assert_as_alone(linear, double(N, 5, 6), packed=pack(linear, input_dims=3))


class Clips(nn.Module):
    """A network of clips (N, T, C, H, W), whose first layer reads images."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        frames = self.conv(x.flatten(0, 1)).square().mean((2, 3))
        return self.fc(frames.unflatten(0, x.shape[:2]).mean(1))


@pytest.mark.parametrize("N", [K, 5])
def test_clips_are_one_batch_although_the_first_layer_reads_images(N):
    members = members_of(Clips)
    x = double(N, 2, 3, 6, 6)
    packed = assert_as_alone(members, x)
    own = double(K, N, 2, 3, 6, 6)
    assert_as_alone(members, own, packed=packed, own=lambda k: ((own[k],), {}))


# ---- numbers --------------------------------------------------------------------------------------------------------


class Decides(nn.Module):
    """A branch on what comes out of a layer, which only large samples take."""

    def __init__(self, how):
        super().__init__()
        self.fc, self.how = nn.Linear(6, 6), how

    def forward(self, x):
        h = self.fc(x)
        if self.how == "branch" and h.abs().max() > 20:
            return h / h.abs().max()
        if self.how == "number" and (peak := h.detach().max().item()) > 20:
            return h * peak
        if self.how == "index":
            return h * (1 + int(h.max() > 20))
        return h


@pytest.mark.parametrize("how", ["branch", "number", "index"])
def test_code_that_decides_by_values_runs_by_members_before_it_decides_otherwise(how):
    members = members_of(lambda: nn.Sequential(nn.Linear(6, 6), Decides(how), nn.Linear(6, 2)))
    with torch.no_grad():
        for k, member in enumerate(members):
            member[1].fc.weight *= 1 + k  # so that members decide differently
    packed = assert_as_alone(members, double(5, 6))
    assert packed.describe().count("makes numbers of all its samples") == 1 and packed.describe().count("twin") == 2
    for scale in (10, 30, 300):
        assert_as_alone(members, scale * double(5, 6), packed=packed)


def test_code_that_decides_by_what_all_members_share_stays_packed():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 2)

        def forward(self, x, scale):
            if x.max() > 1:
                x = x / 255
            return self.fc(x) / (scale if bool(scale > 0) else 1)

    members = members_of(Normalised)
    packed = assert_as_alone(members, double(5, 6).abs() + 1, torch.tensor(3.0))
    assert "member by member" not in packed.describe()
    own = double(K, 5, 6) * torch.tensor([0.01, 1, 100])[:, None, None]  # each member's own decide by themselves
    packed = pack(members, input_dims=2)
    assert_as_alone(members, own, torch.tensor(3.0), packed=packed, own=lambda k: ((own[k], torch.tensor(3.0)), {}))
    assert "makes numbers of all its samples" in packed.describe()


class Mixes(nn.Module):
    """Samples that are mixed as much as a number says: not at all by its first value."""

    def __init__(self):
        super().__init__()
        self.fc, self.share = nn.Linear(6, 6), 1e-12

    def forward(self, x, share=None):
        share = self.share if share is None else share
        h = self.fc(x)
        return (1 - share) * h + share * h.flip(0)


def test_numbers_are_rehearsed_when_they_change():
    members, x = members_of(Mixes), double(5, 6)
    packed = assert_as_alone(members, x, 1e-12)
    assert_as_alone(members, x, 0.3, packed=packed)
    members = members_of(Mixes)
    packed = assert_as_alone(members, x)
    for net in (packed, *members):
        net.share = 0.3
    assert_as_alone(members, x, packed=packed)
    assert "its samples see each other" in packed.describe()


def test_a_number_that_changes_at_every_step_is_not_rehearsed_forever(monkeypatch):
    class Scales(Mixes):
        def forward(self, x, share=None):
            return self.fc(x) * (self.share if share is None else share)

    rehearsed, run = [], Rehearsal.run
    monkeypatch.setattr(Rehearsal, "run", lambda self: rehearsed.append(self) or run(self))
    packed, x = pack(members_of(Scales)), double(5, 6)
    for step in range(20):
        packed(x, 0.1 + step / 100)
    for step in range(20):
        packed.share = 0.1 + step / 100
        packed(x)
    assert "member by member" not in packed.describe() and 2 < len(rehearsed) < 12


def test_counters_are_read_at_their_members_values_and_random_states_stay():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.calls, self.peak = nn.Linear(6, 6), 0, 0.0

        def forward(self, x):
            self.calls += 1
            h = self.fc(x)
            self.peak = max(self.peak, h.max().item())
            return h * (np.random.rand() > -1)  # noqa: NPY002

    members, x = members_of(Counts), double(5, 6)
    packed = pack(members)
    np.random.seed(0)  # noqa: NPY002
    for _ in range(2):
        packed(x)
    drawn = np.random.rand()  # noqa: NPY002
    assert packed.calls == 2
    torch.testing.assert_close(packed.peak, torch.tensor([max(0, m.fc(x).max().item()) for m in members]))
    packed.calls = 10
    assert packed.calls == 10
    packed(x)
    assert packed.calls == 11
    np.random.seed(0)  # noqa: NPY002
    np.random.rand(2 * K)  # noqa: NPY002
    assert drawn == np.random.rand()  # noqa: NPY002
