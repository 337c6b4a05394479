"""Whatever a network's code does, keeps or hooks: it packs to what its members compute alone, or is refused by name."""

import functools
import weakref

import pytest
import torch
from helpers import assert_packed_equals_separate, double, members_of
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import decompk
from decompk import errors, pack
from decompk.divide.zero_skipping import CroppedLinear, HeadConv2d, HeadLinear
from decompk.packed.twin import deep_copy
from decompk.packed.twins import TWINS

K, N = 3, 4
pytestmark = pytest.mark.filterwarnings("ignore:.*member by member")


# ---- names ----------------------------------------------------------------------------------------------------------


class Named(nn.Conv2d):
    """A convolution whose author uses the names that a twin might like to have."""

    def __init__(self):
        super().__init__(3, 4, 3)
        self.K, self.path, self.member_class, self.input_dims, self.columns = 7, "here", "mine", 2, [1, 2]
        self.check = self.fits = self.adopt = self.release = self.each_member = self.function = self.laid_out = "own"


class ReadsNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Named()

    def forward(self, x):
        conv = self.conv
        return conv(x) * conv.K * conv.input_dims + len(conv.path + conv.check + conv.member_class) + conv.columns[1]


def test_a_twin_has_no_name_that_a_users_layer_may_have():
    for twin in (*TWINS.values(), HeadConv2d, HeadLinear, CroppedLinear):
        torch_names = {name for kind in twin.__mro__ if kind.__module__.startswith("torch") for name in vars(kind)}
        added = {name for kind in twin.__mro__ for name in vars(kind)} - torch_names - {"bias"}
        assert not [name for name in added if not name.startswith(("__", "_twin_"))]
    members = members_of(ReadsNames)
    packed = assert_packed_equals_separate(members, double(N, 3, 6, 6), steps=2)
    assert packed.describe().count("twin") == 1
    for net in (packed, *packed.unpack()):
        assert net.conv.K == 7 and net.conv.path == "here" and net.conv.check == net.conv.fits == "own"
        assert vars(net.conv).keys() >= {"K", "path", "member_class", "input_dims", "columns"}
    decompk.explain(packed.float(), torch.randn(N, 3, 6, 6))


# ---- weights that hooks make ----------------------------------------------------------------------------------------


def normed(make, norm, name="weight", **options):
    return lambda: norm(make(), name, **options)


HOOKED = {
    "weight_norm": lambda: weight_norm(nn.Linear(6, 6)),
    "weight_norm of a convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (6, 1)), weight_norm(nn.Conv1d(6, 4, 1)), nn.Flatten(1), nn.Linear(4, 6)
    ),
    "weight_norm of an LSTM": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), weight_norm(nn.LSTM(3, 4, batch_first=True), "weight_hh_l0"), First()
    ),
    "spectral_norm": lambda: spectral_norm(nn.Linear(6, 6)),
    "pruning": lambda: prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.5),
    "pruning twice": lambda: prune.random_unstructured(
        prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.5), "weight", 2
    ),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    "a hook of one's own": lambda: Hooked(),
}


class First(nn.Module):
    def forward(self, x):
        return x[0]


class Hooked(nn.Module):
    """A forward pre-hook that makes the weight anew, a method of the module."""

    def __init__(self):
        super().__init__()
        self.fc, self.scale = nn.Linear(6, 6), nn.Parameter(torch.rand(6))
        self.scaled = self.scale.detach() * 2
        self.register_forward_pre_hook(self.remake)

    @staticmethod
    def remake(module, args):
        module.scaled = module.scale * 2

    def forward(self, x):
        return self.fc(x) * self.scaled


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", HOOKED)
@pytest.mark.parametrize("whole", [(), ("",)])
def test_weights_that_hooks_make_are_each_members_own(kind, whole):
    def make():
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), HOOKED[kind]())

    for members in (members_of(make), [members_of(make, 1)[0]] * 2):
        packed = pack(members, member_by_member=whole)
        assert_packed_equals_separate(members, double(N, 6), steps=3, packed=packed)
        for member in packed.unpack():  # its hooks still make the weights
            member(double(N, 6)).sum().backward()
            assert all(p.grad is not None for p in member.parameters())


# ---- what forward keeps ---------------------------------------------------------------------------------------------


class Keeps(nn.Module):
    """Keeps what it makes of its child's weight or of its input, in a way that `keep` and `kept` say."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.cache, self.seen = {}, []

    def forward(self, x):
        x = self.fc(x)
        self.keep(x.detach().mean())
        return x - self.kept()

    def keep(self, value):
        self.seen.append(value)

    def kept(self):
        return sum(self.seen) / len(self.seen)


class ByKey(Keeps):
    def keep(self, value):
        self.cache[len(self.cache)] = value

    def kept(self):
        return sum(self.cache.values())


class ByAlias(ByKey):
    def keep(self, value):
        cache = self.cache
        cache.setdefault("all", []).append(value)

    def kept(self):
        return sum(self.cache["all"])


class ByName(Keeps):
    def keep(self, value):
        self.total = value + getattr(self, "total", 0.0)

    def kept(self):
        return self.total


class ByDict(ByName):
    def keep(self, value):
        self.__dict__["total"] = value + vars(self).get("total", 0.0)


class Store:
    def __init__(self):
        self.table = {}

    def put(self, value):
        self.table[len(self.table)] = value


class ByHelper(Keeps):
    def __init__(self):
        super().__init__()
        self.store = Store()

    def keep(self, value):
        self.store.put(value)

    def kept(self):
        return sum(self.store.table.values())


def push(values, value):
    values.append(value)


class ByFunction(Keeps):
    def keep(self, value):
        push(self.seen, value)


class InPlace(Keeps):
    def __init__(self):
        super().__init__()
        self.total = torch.zeros((), dtype=torch.float64)

    def keep(self, value):
        self.total.add_(value)

    def kept(self):
        return self.total


class BySubmodule(nn.Module):
    """Two parts share one list, which the first fills and the second reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Keeps(), Reads()
        self.second.seen = self.first.seen

    def forward(self, x):
        return self.second(self.first(x))


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.shift = nn.Linear(6, 6), nn.Parameter(torch.rand(6))

    def forward(self, x):
        return self.fc(x) * self.shift + self.seen[-1]


@pytest.mark.parametrize(
    "make",
    [Keeps, ByKey, ByAlias, ByName, ByDict, ByHelper, ByFunction, InPlace, BySubmodule],
    ids=lambda m: m.__name__,
)
def test_what_forward_keeps_is_each_members_own(make):
    members = members_of(make)
    packed = assert_packed_equals_separate(
        members, double(K, N, 6), steps=3, packed=pack(members, input_dims=2, rehearse=False)
    )
    assert "keeps" in packed.describe() or "share" in packed.describe()
    packed = assert_packed_equals_separate(members, double(K, N, 6), steps=3, packed=pack(members, input_dims=2))
    for member in members[:2]:
        member(double(N, 6))  # what a member holds when it is packed is its own
    assert_packed_equals_separate(members, double(K, N, 6), steps=2, packed=pack(members, input_dims=2))


class CachesWeights(nn.Module):
    """As LeViT's attention: in eval mode a table of the weights is made once, and train() forgets it."""

    def __init__(self):
        super().__init__()
        self.fc, self.bias, self.cache = nn.Linear(6, 6), nn.Parameter(torch.rand(6)), {}

    def train(self, mode=True):
        super().train(mode)
        if mode and self.cache:
            self.cache = {}
        return self

    def forward(self, x):
        if self.training:
            return self.fc(x) * self.bias.flip(0)
        if x.device not in self.cache:
            self.cache[x.device] = self.bias.flip(0)
        return self.fc(x) * self.cache[x.device]


class LazyTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    @functools.cached_property
    def table(self):
        return self.fc.weight.detach().flip(0)

    @functools.lru_cache  # noqa: B019
    def norm(self):
        return self.fc.bias.detach().norm()

    def forward(self, x):
        return self.fc(x) @ self.table + self.norm()


@pytest.mark.parametrize("make", [CachesWeights, LazyTable])
def test_caches_of_weights_are_each_members_own_and_follow_its_modes(make):
    members = members_of(lambda: nn.Sequential(nn.Linear(6, 6), make()))
    packed, x = pack(members), double(N, 6)
    alone = [torch.optim.SGD(m.parameters(), 0.1) for m in members]
    together = torch.optim.SGD(packed.parameters(), 0.1)
    for training in (False, True, True, False, False):
        packed.train(training)
        y = packed(x)
        for k, member in enumerate(members):
            torch.testing.assert_close(y[k], member.train(training)(x), rtol=1e-12, atol=1e-12)
        if training:
            for optimizer, outputs in ((together, y), *((o, m(x)) for o, m in zip(alone, members, strict=True))):
                optimizer.zero_grad()
                outputs.square().sum().backward()
                optimizer.step()
    for member, own in zip(packed.unpack(), members, strict=True):
        torch.testing.assert_close(member(x), deep_copy(own, {})(x), rtol=1e-12, atol=1e-12)


class Merges(nn.Linear):
    """As loralib's Linear: eval() adds a product to the weight's data and train() takes it away."""

    def __init__(self, replaces=False):
        super().__init__(6, 6)
        self.A, self.B = nn.Parameter(torch.rand(2, 6)), nn.Parameter(torch.rand(6, 2))
        self.merged, self.replaces = False, replaces

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            change = self.B @ self.A * (-1 if mode else 1)
            if self.replaces:
                self.weight.data = self.weight.data + change
            else:
                self.weight.data += change
            self.merged = not mode
        return self

    def forward(self, x):
        y = super().forward(x)
        return y if self.merged else y + x @ (self.B @ self.A).T


class MergesBelow(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.low = nn.Linear(6, 6), nn.Linear(6, 6)
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.base.weight.data = self.base.weight.data + self.low.weight @ self.low.weight * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        return self.base(x) + (0 if self.merged else self.low(self.low(x)) - self.low(torch.zeros_like(x)))


@pytest.mark.parametrize("make", [Merges, lambda: Merges(True), MergesBelow], ids=["+=", "=", "of parts"])
def test_weights_that_train_and_eval_write_are_written_once_in_every_member(make):
    members = members_of(lambda: nn.Sequential(nn.Linear(6, 6), make()))
    packed, x = pack(members), double(N, 6)
    for training in (True, False, False, True, False):
        packed.train(training)
        y = packed(x)
        for k, member in enumerate(members):
            torch.testing.assert_close(y[k], member.train(training)(x), rtol=1e-12, atol=1e-12)
            for name, p in member.named_parameters():
                torch.testing.assert_close(packed.get_parameter(name)[k], p, rtol=1e-12, atol=1e-12, msg=name)


# ---- what members hold ----------------------------------------------------------------------------------------------


class Projects(nn.Module):
    """A random projection that is no buffer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.projection = torch.randn(6, 6, dtype=torch.float64)

    def forward(self, x):
        return self.fc(x) @ self.projection


class HiddenLayers(nn.Module):
    """Layers in a plain list, which nn.Module does not see."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.frozen = [nn.Linear(6, 6).double()]

    def forward(self, x):
        return self.fc(self.frozen[0](x))


class TiedByTuple(nn.Module):
    """A decoder that reads the encoder's weight, held in a tuple so that it is registered once."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(6, 6)
        self.decode = Decoder(self.encode)

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x)))


class Decoder(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.tied, self.shift = (encoder,), nn.Parameter(torch.rand(6))

    def forward(self, x):
        return nn.functional.linear(x, self.tied[0].weight.T) + self.shift


class TiedWithoutTensors(TiedByTuple):
    """The decoder has no tensor of its own."""

    def __init__(self):
        super().__init__()
        self.decode = Multiplies(self.encode)


class Multiplies(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.tied = (encoder,)

    def forward(self, x):
        return x * self.tied[0].bias


class Centres(nn.Module):
    """Calls a layer that is registered elsewhere, and lets the samples see each other: found at the first call."""

    def __init__(self, encoder):
        super().__init__()
        self.tied = (encoder,)

    def forward(self, x):
        y = self.tied[0](x)
        return y - y.mean(0)


class TiedByCall(TiedByTuple):
    def __init__(self):
        super().__init__()
        self.decode = Centres(self.encode)


class Scaler:
    def __init__(self):
        self.factor = torch.rand(()).item()


class HoldsObject(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.scaler = nn.Linear(6, 6), Scaler()

    def forward(self, x):
        return self.fc(x) * self.scaler.factor


@pytest.mark.parametrize(
    "make", [Projects, HiddenLayers, TiedByTuple, TiedWithoutTensors, HoldsObject], ids=lambda m: m.__name__
)
def test_what_members_hold_beside_registered_tensors_is_their_own(make):
    members = members_of(lambda: nn.Sequential(nn.Linear(6, 6), make()))
    for rehearse in (True, False):
        packed = pack(members, rehearse=rehearse)
        assert_packed_equals_separate(members, double(N, 6), steps=3, packed=packed)
        assert packed.describe().count("member by member") == 1 and packed.describe().count("twin") == 1


def test_a_module_that_calls_another_ones_layer_does_so_with_the_members_own_after_the_first_call():
    members = members_of(lambda: nn.Sequential(nn.Linear(6, 6), TiedByCall()))
    packed = assert_packed_equals_separate(members, double(N, 6), steps=3)
    assert packed.describe().count("member by member") == 1 and packed.describe().count("twin") == 1


class HoldsLambda(nn.Module):
    def __init__(self, how="closure"):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        if how == "closure":
            self.act = lambda x: x * self.fc.weight.mean()
        elif how == "hook":
            self.fc.register_forward_hook(lambda module, args, y: y + self.fc.bias)
        elif how == "weak reference":
            self.fc.parent = weakref.ref(self)
        else:
            self.fc.weight.register_hook(lambda gradient: gradient * self.fc.bias[0])

    def forward(self, x):
        return self.fc(x)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("closure", r"'act' in member 0 closes over the network.* make it a method"),
        ("hook", r"a hook of 'fc' in member 0 closes over the network.* hand that over"),
        ("weak reference", r"'fc.parent' in member 0 closes over the network"),
        ("gradient", r"a gradient hook of 'fc.weight' in member 0 uses the network.* copies of the tensors"),
    ],
)
def test_functions_that_close_over_the_members_own_parts_are_refused(how, what):
    with pytest.raises(errors.PackError, match=what):
        pack(members_of(lambda: HoldsLambda(how)))


# ---- hooks of parameters --------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Gradients masked by hooks: by a tensor, by a second hook, in place behind the accumulation."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        mask, factor = (torch.rand(6, 6) < 0.5).double(), torch.rand(()).item()
        self.a.weight.register_hook(lambda gradient: gradient * mask)
        self.a.weight.register_hook(lambda gradient: gradient * factor)
        self.b.bias.register_post_accumulate_grad_hook(functools.partial(scale_gradient, factor))
        self.c.weight.register_post_accumulate_grad_hook(halve)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def scale_gradient(factor, parameter):
    parameter.grad.mul_(factor)


def halve(parameter):
    parameter.grad = parameter.grad / 2


@pytest.mark.parametrize("whole", [(), ("a", "c"), ("",)])
def test_gradient_hooks_act_on_each_members_gradient(whole):
    members, hooked = members_of(Masked), members_of(Masked)
    packed = pack(hooked, member_by_member=whole)
    x, together = double(N, 6), torch.optim.SGD(packed.parameters(), 0.1)
    alone = [torch.optim.SGD(m.parameters(), 0.1) for m in members]
    for _ in range(3):
        for optimizer, outputs in ((together, packed(x)), *((o, m(x)) for o, m in zip(alone, members, strict=True))):
            optimizer.zero_grad()
            outputs.square().sum().backward()
            optimizer.step()
        for k, member in enumerate(members):
            for name, p in member.named_parameters():
                torch.testing.assert_close(packed.get_parameter(name).grad[k], p.grad, rtol=1e-10, atol=1e-12)
                torch.testing.assert_close(packed.get_parameter(name)[k], p, rtol=1e-10, atol=1e-12)
    for member, own in zip(members, packed.unpack(), strict=True):
        for net in (member, own):
            net.zero_grad()
            net(x).square().sum().backward()
        for p, q in zip(member.parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-12)


def test_a_hook_of_some_members_alone_leaves_the_others_gradients_and_a_dropped_gradient_is_none():
    members = members_of(lambda: nn.Linear(6, 2))
    members[1].weight.register_hook(torch.zeros_like)
    for member in members:
        member.bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    packed = pack(members)
    packed(double(N, 6)).square().sum().backward()
    assert [bool(g.any()) for g in packed.weight.grad] == [True, False, True] and packed.bias.grad is None


def test_what_is_set_on_a_parameter_stays_with_it():
    members = members_of(lambda: nn.Linear(6, 2))
    for member in members:
        member.bias.no_weight_decay = True
    packed = pack(members)
    assert packed.bias.no_weight_decay and packed.unpack()[1].bias.no_weight_decay
    assert not hasattr(packed.weight, "no_weight_decay")


class Special(nn.Parameter):
    pass


def test_a_parameter_of_a_class_of_its_own_is_refused():
    def make():
        layer = nn.Linear(6, 2)
        layer.weight = Special(layer.weight.detach())
        return layer

    with pytest.raises(errors.PackError, match="'weight' is a Special.* make it one"):
        pack([make() for _ in range(K)])


# ---- hooks of modules -----------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """Module hooks of every kind that change what is computed, with and without keywords."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.a.register_forward_pre_hook(double_kwargs, with_kwargs=True)
        self.a.register_forward_hook(lambda module, args, kwargs, y: y * 3, with_kwargs=True, always_call=True)
        self.b.register_full_backward_hook(lambda module, gradients, _: (gradients[0] / gradients[0].norm(),))
        self.b.register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * module.weight.norm(),))

    def forward(self, x):
        return self.b(torch.tanh(self.a(input=x)))


def double_kwargs(module, args, kwargs):
    return args, {"input": kwargs["input"] * 2}


def test_module_hooks_act_on_each_member():
    packed = assert_packed_equals_separate(members_of(Watched), double(N, 6), steps=3)
    assert packed.describe().count("it has hooks") == 2
    root = members_of(lambda: nn.Linear(6, 6))
    for member in root:
        member.register_forward_hook(lambda module, args, y: y * module.weight.norm())
    assert_packed_equals_separate(root, double(N, 6), steps=3)


class Renames(nn.Module):
    """Its checkpoints say `kernel` for `weight`, in both directions, by hooks."""

    def __init__(self):
        super().__init__()
        self.fc, self.scale = nn.Linear(6, 6), nn.Parameter(torch.rand(6))
        self.register_state_dict_post_hook(to_kernel)
        self.register_load_state_dict_pre_hook(from_kernel)

    def forward(self, x):
        return self.fc(x) * self.scale


class RenamesBare(Renames):
    def __init__(self):
        super().__init__()
        del self.scale

    def forward(self, x):
        return self.fc(x)


def to_kernel(module, state, prefix, metadata):
    state[f"{prefix}kernel"] = state.pop(f"{prefix}fc.weight")


def from_kernel(module, state, prefix, *_):
    state[f"{prefix}fc.weight"] = state.pop(f"{prefix}kernel")


@pytest.mark.parametrize("make", [Renames, RenamesBare, lambda: nn.Sequential(Renames(), RenamesBare())])
def test_state_dict_hooks_run_as_for_a_member(make):
    members, others = members_of(make), members_of(make)[::-1]
    packed, other = pack(members), pack(others)
    state = packed.state_dict()
    assert state.keys() == members[0].state_dict().keys() and any("kernel" in key for key in state)
    for key, value in state.items():
        assert torch.equal(value[1], members[1].state_dict()[key])
    other.load_state_dict(state)
    x = double(N, 6)
    torch.testing.assert_close(other(x), packed(x))


# ---- layers along the samples, complex tensors ----------------------------------------------------------------------


ALONG = {
    "Softmax": lambda: nn.Softmax(dim=0),
    "Softmax without a dimension": lambda: nn.Softmax(dim=None),
    "LogSoftmax": lambda: nn.LogSoftmax(dim=0),
    "Softmin": lambda: nn.Softmin(dim=0),
}


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("name", ALONG)
def test_layers_that_work_along_the_samples_do_so_in_each_member(name):
    members = members_of(lambda: nn.Sequential(nn.Linear(6, 6), ALONG[name](), nn.Linear(6, 6)))
    packed = pack(members, input_dims=3, rehearse=False)
    assert_packed_equals_separate(members, double(N, 5, 6), steps=2, packed=packed)
    assert packed.describe().count("it works along the samples") == 1 and packed.describe().count("twin") == 2


def test_flattened_and_unflattened_samples_stay_each_members():
    def make(sizes):
        return nn.Sequential(
            nn.Linear(6, 6), nn.Flatten(0, 1), nn.Linear(6, 6), nn.Unflatten(0, sizes), nn.Linear(6, 2)
        )

    for sizes in ((-1, 5), (N, 5)):
        members = members_of(lambda sizes=sizes: make(sizes))
        assert_packed_equals_separate(members, double(N, 5, 6), steps=2, packed=pack(members, input_dims=3))


COMPLEX = {
    "Linear": (lambda: nn.Linear(6, 4), (N, 6)),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 3), (N, 3, 8)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (N, 3, 8, 8)),
    "grouped Conv2d": (lambda: nn.Conv2d(4, 4, 3, groups=2), (N, 4, 8, 8)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 3), (N, 3, 8, 8)),
}


@pytest.mark.parametrize("name", COMPLEX)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_layers_compute_what_the_members_do(name, dtype):
    make, shape = COMPLEX[name]
    members, x = [make().to(dtype) for _ in range(K)], torch.randn(shape, dtype=dtype)
    packed = pack(members)
    y = packed(x)
    y.abs().square().sum().backward()
    for k, member in enumerate(members):
        single = member(x)
        single.abs().square().sum().backward()
        torch.testing.assert_close(y[k], single)
        torch.testing.assert_close(packed.weight.grad[k], member.weight.grad)


def test_the_operator_says_that_complex_tensors_are_none_of_its_dtypes():
    x, weight = torch.randn(2, N, 3, 8, 8, dtype=torch.complex64), torch.randn(2, 4, 3, 3, 3, dtype=torch.complex64)
    with pytest.raises(errors.DecompkError, match=r"takes real floating dtypes, and x is torch\.complex64"):
        decompk.ops.grouped_conv2d(x, weight)


# ---- refusals -------------------------------------------------------------------------------------------------------


def anew():
    class Net(nn.Linear):
        pass

    return Net(6, 2)


def linear():
    return nn.Linear(6, 2)


@pytest.mark.parametrize(
    ("members", "what"),
    [
        (lambda: linear(), r"not one Linear: build each member, pack\(\[make\(\) for _ in range\(K\)\]\)"),
        (lambda: nn.Sequential(linear(), linear()), "not one Sequential: build each member"),
        (lambda: {"a": linear(), "b": linear()}, r"not in a dict: pack\(list\(members.values\(\)\)\)"),
        (lambda: nn.ModuleDict({"a": linear()}), r"not in a dict: pack\(list\(members.values\(\)\)\)"),
        (lambda: [nn.ReLU, nn.ReLU], "member 0 is the class ReLU, not a network: call it"),
        (lambda: [linear, linear], "member 0 is the function linear, not a network: call it"),
        (lambda: linear, r"pack takes a list of networks, pack\(\[m1, m2, …\]\), not the function linear"),
        (lambda: None, "pack takes a list of networks.* not NoneType"),
        (list, "at least one member"),
        (lambda: [linear().state_dict()] * 2, "member 0 is not an nn.Module but OrderedDict"),
        (lambda: [anew(), anew()], r"two classes named .*anew.<locals>.Net in members 0 and 1: define the class once"),
    ],
)
def test_what_is_no_list_of_networks_is_refused_with_the_right_call(members, what):
    with pytest.raises(errors.PackError, match=what):
        pack(members())


def test_any_iterable_of_networks_packs():
    layers, x = members_of(linear), double(N, 6)
    for members in (
        tuple(layers),
        nn.ModuleList(layers),
        (layer for layer in layers),
        dict(enumerate(layers)).values(),
    ):
        torch.testing.assert_close(pack(members)(x), torch.stack([layer(x) for layer in layers]))
