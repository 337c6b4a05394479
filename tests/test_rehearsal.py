"""What the first call of a kind finds out: code that samples, numbers, sizes, chance or watchers would hide from it."""

import contextlib
import gc
import itertools
import random
import types
import warnings

import numpy as np
import pytest
import torch
from helpers import double, members_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import decompk
from decompk import errors, models, pack

K = 3
pytestmark = pytest.mark.filterwarnings("ignore:.*member by member")


class Base(nn.Module):
    """Two layers; `code(net, x, …)` is its forward."""

    def __init__(self, code):
        super().__init__()
        self.inner, self.outer, self.code = nn.Linear(5, 8), nn.Linear(8, 2), code
        self.config, self.options = types.SimpleNamespace(mix=False, scale=1.0), {"mix": False}
        self.share = None

    def forward(self, *args):
        return self.code(self, *args)


def nets(code):
    members = members_of(lambda: Base(code))
    return members, pack(members)


def assert_alone(members, packed, *args):
    torch.testing.assert_close(packed(*args), torch.stack([m(*args) for m in members]), rtol=1e-9, atol=1e-11)


def mixed(h):
    return h - h.mean(0)


def mixing(net, x):
    return net.outer(mixed(net.inner(x)))


# ---- watchers -------------------------------------------------------------------------------------------------------


def flops(packed, x):
    with FlopCounterMode(display=False) as counter:
        packed(x)
    assert counter.get_total_flops() > 0


def hooked(packed, x):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    packed(x)
    handle.remove()
    assert {type(m).__name__ for m in seen} >= {"Packed"} and len(seen) < 30


def on_device(packed, x):
    with torch.device("cpu"):
        packed(x)


def inference(packed, x):
    with torch.inference_mode():
        packed(x)


@pytest.mark.parametrize("first", [flops, hooked, on_device, inference])
def test_who_watches_the_first_call_neither_sees_nor_hinders_the_rehearsal(first):
    members, packed = nets(mixing)
    x = double(6, 5)
    first(packed, x)
    assert "member by member" in packed.describe()
    assert_alone(members, packed, x)
    packed(x).sum().backward()


# ---- chance ---------------------------------------------------------------------------------------------------------


def by_python(net, x):
    h = net.inner(x)
    return net.outer(mixed(h) if random.random() < 0.5 else h)


def by_numpy(net, x):
    h = net.inner(x)
    return net.outer(mixed(h) if np.random.rand() < 0.5 else h)  # noqa: NPY002


def by_torch(net, x):
    h = net.inner(x)
    return net.outer(mixed(h) if torch.rand(1).item() < 0.5 else h)


def seeded(run):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    return run()


@pytest.mark.parametrize("code", [by_python, by_numpy, by_torch])
def test_a_number_that_is_drawn_is_drawn_for_each_member(code):
    members, packed = nets(code)
    x = double(6, 5)
    for _ in range(5):
        ours = seeded(lambda: packed(x))
        torch.testing.assert_close(ours, seeded(lambda: torch.stack([m(x) for m in members])))
    assert "its code draws one number" in packed.describe()


def test_what_a_network_that_draws_leaves_in_an_attribute_is_one_for_each_member():
    def variational(net, x):
        mean = net.inner(x)
        net.divergence = mean.square().sum(1).mean()
        return net.outer(mean + torch.randn_like(mean))

    members, packed = nets(variational)
    x = double(6, 5)
    packed(x)
    torch.testing.assert_close(packed.divergence, torch.stack([m.inner(x).square().sum(1).mean() for m in members]))


# ---- what these samples do not show ---------------------------------------------------------------------------------


def by_sum(net, x):
    return net.outer(net.inner(x)) * (2 if x.square().sum() > 50 else 1)


def by_array(net, x):
    h = net.inner(x)
    return net.outer(h) * (2 if h.abs().max().detach().numpy() > 3 else 1)


def by_list(net, x):
    h = net.inner(x)
    return net.outer(h) * (2 if max(h.detach().amax(0).tolist()) > 3 else 1)


def clamped(net, x):
    h = net.inner(x)
    return net.outer(h * (20 / h.norm()).clamp(max=1))


@pytest.mark.parametrize("code", [by_sum, by_array, by_list, clamped])
def test_large_samples_may_follow_small_ones(code):
    members, packed = nets(code)
    for scale in (0.1, 1, 2, 10):
        assert_alone(members, packed, scale * torch.ones(6, 5, dtype=torch.float64))


def test_experts_that_get_the_rows_of_a_mask_get_their_own_members_only():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.experts = nn.Linear(5, 2), nn.ModuleList(nn.Linear(5, 3) for _ in range(2))

        def forward(self, x):
            chosen, y = self.router(x).argmax(1), x.new_zeros(len(x), 3)
            for i, expert in enumerate(self.experts):
                y[chosen == i] = expert(x[chosen == i])
            return y

    members = members_of(Experts)
    packed = pack(members)
    for _ in range(20):
        assert_alone(members, packed, double(8, 5))


def test_zeros_that_a_last_layer_starts_with_hide_nothing():
    members, packed = nets(lambda net, x: net.outer(torch.relu(net.inner(x)) / (1 + net.inner(x).std(0))))
    for net in (packed, *members):
        nn.init.zeros_(net.outer.weight)
        nn.init.zeros_(net.outer.bias)
    x = double(6, 5)
    for net in (packed, *members):
        net(x).sum().backward()
    torch.testing.assert_close(packed.outer.weight.grad, torch.stack([m.outer.weight.grad for m in members]))
    assert not packed.outer.weight.any()


@pytest.mark.parametrize("threshold", [4, 12, 40])
def test_code_may_ask_how_many_samples_there_are(threshold):
    members, packed = nets(lambda net, x: net.outer(mixed(net.inner(x)) if len(x) > threshold else net.inner(x)))
    for N in (8, 16, 3, 50):
        assert_alone(members, packed, double(N, 5))


def test_what_was_found_out_at_the_size_of_the_call_is_tried_before_it_runs():
    class Loops(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
                if len(x) > 20:
                    x = mixed(x)
            return x

    members = members_of(Loops)
    assert_alone(members, pack(members), double(16, 5))


def test_a_network_that_draws_may_return_more_in_training():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.drop, self.last, self.aux = (
                nn.Linear(5, 8),
                nn.Dropout(0.5),
                nn.Linear(8, 2),
                nn.Linear(8, 2),
            )

        def forward(self, x):
            x = self.drop(self.first(x))
            return (self.last(x), self.aux(x)) if self.training else self.last(x)

    members = members_of(Auxiliary)
    packed = pack(members).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [tuple(t.shape) for t in packed(double(16, 5))] == [(K, 16, 2)] * 2
    for net in (*members, packed.eval()):
        net.eval()
    assert_alone(members, packed, double(16, 5))


def guarded(net, x):
    h = net.inner(x)
    return net.outer(mixed(h) if len(x) > 1 else h)


def squeezed(net, x):
    return net.outer(net.inner(x)).sum(1, keepdim=True).squeeze()


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(5, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        h = self.inner(x)
        return self.norm(h) if len(h) > 1 else h


def test_a_last_batch_of_one_runs_by_members_alone_where_it_must_and_the_others_do_not():
    for members in (members_of(Norm), members_of(lambda: Base(squeezed))):
        packed = pack(members)
        for N in (6, 1, 6, 1):
            assert_alone(members, packed, double(N, 5))
        assert "member by member" not in packed.describe()
        x = double(1, 5)
        packed.zero_grad()
        packed(x).sum().backward()
        for k, member in enumerate(members):
            member.zero_grad()
            member(x).sum().backward()
            torch.testing.assert_close(packed.inner.weight.grad[k], member.inner.weight.grad)
        for name, buffer in packed.named_buffers():
            torch.testing.assert_close(buffer, torch.stack([m.get_buffer(name) for m in members]))


# ---- what is set later ----------------------------------------------------------------------------------------------


def set_config(net):
    net.config.mix = True


def set_dict(net):
    net.options["mix"] = True


def set_none(net):
    net.share = 0.5


@pytest.mark.parametrize("change", [set_config, set_dict, set_none])
def test_configurations_that_change_are_rehearsed_again(change):
    def code(net, x):
        mixes = net.config.mix or net.options["mix"] or net.share is not None
        return net.outer(mixed(net.inner(x)) if mixes else net.inner(x))

    members, packed = nets(code)
    x = double(6, 5)
    assert_alone(members, packed, x)
    assert "member by member" not in packed.describe()
    for net in (packed, *members):
        change(net)
    assert_alone(members, packed, x)


def test_configurations_of_what_runs_by_members_reach_every_member():
    members, packed = nets(lambda net, x: mixing(net, x) * net.config.scale)
    x = double(6, 5)
    packed(x)
    for net in (packed, *members):
        net.config.scale = 2.0
    assert_alone(members, packed, x)


def test_numbers_that_come_later_are_rehearsed_after_a_while():
    members, packed = nets(lambda net, x, epoch: net.outer(mixed(net.inner(x)) if epoch > 30 else net.inner(x)))
    x = double(6, 5)
    for epoch in (0, *range(20, 34)):
        for _ in range(70 if epoch > 22 else 1):
            packed(x, epoch)
        assert_alone(members, packed, x, epoch)
    share = lambda net, x, s: net.outer(s * net.inner(x) + (1 - s) * net.inner(x).flip(0) if s < 1 else net.inner(x))  # noqa: E731
    members, packed = nets(share)
    for value in (1.0, 0.3):
        assert_alone(members, packed, x, torch.tensor(value, dtype=torch.float64))


def test_loops_over_modules_find_those_that_run_by_members():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.times = nn.Parameter(torch.rand(5)), 1.0

        def forward(self, x):
            return x * self.gain * self.times

    members = members_of(lambda: nn.Sequential(Gain(), nn.Linear(5, 2)))
    packed, x = pack(members), double(6, 5)
    packed(x)
    for net in (packed, *members):
        for module in net.modules():
            if isinstance(module, Gain):
                module.times = 4.0
    assert_alone(members, packed, x)


def test_a_hook_that_is_a_method_writes_into_its_own_member():
    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer, self.seen = nn.Linear(5, 8), nn.Linear(8, 2), None
            self.inner.register_forward_hook(self.keep)

        def keep(self, module, args, out):
            self.seen = out

        def forward(self, x):
            self.inner(x)
            return self.outer(self.seen)

    members = members_of(Tapped)
    assert_alone(members, pack(members), double(6, 5))


# ---- arguments and outputs ------------------------------------------------------------------------------------------


def into_object(net, x, store):
    store.seen = net.inner(x)
    return net.outer(store.seen)


def into_list(net, x, store):
    store.append(net.inner(x))
    return net.outer(store[-1])


def into_tensor(net, x, store):
    store.mul_(0.5)
    return net.outer(net.inner(x)) * store.sum()


@pytest.mark.parametrize(
    ("code", "make", "untouched"),
    [
        (into_object, lambda: types.SimpleNamespace(seen=None), lambda store: store.seen is None),
        (into_list, list, lambda store: store == []),
        (into_tensor, lambda: torch.ones(4, dtype=torch.float64), lambda store: bool((store == 1).all())),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_an_argument_that_forward_changes_is_refused_and_left_as_it_was(code, make, untouched, whole):
    members = members_of(lambda: Base(code))
    packed, store = pack(members, member_by_member=[""] if whole else []), make()
    with pytest.raises(errors.PackError, match="changes its argument number 2, which all of them would share"):
        packed(double(6, 5), store)
    assert untouched(store)


def test_objects_with_tensors_come_back_as_one_for_each_member():
    members, packed = nets(lambda net, x: torch.distributions.Categorical(logits=net.outer(net.inner(x))))
    x = double(6, 5)
    ours = packed(x)
    assert [d.batch_shape for d in ours] == [(6,)] * K
    for own, member in zip(ours, members, strict=True):
        torch.testing.assert_close(own.logits, member(x).logits)


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 4)

    def forward(self, x, edges):
        h = self.fc(x)
        return h.index_add(0, edges[1], h[edges[0]])


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)

    def forward(self, ids, targets):
        count, length = ids.shape
        scores = self.head(self.table(ids))
        return nn.functional.cross_entropy(scores.view(count * length, -1), targets.view(-1))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(7, 1)

    def forward(self, state, action):
        return self.fc(torch.cat([state, action], -1))


def test_several_arguments_are_one_batch_or_one_per_member_as_members_take_them():
    edges = torch.randint(6, (2, 9))
    ids = torch.randint(9, (K, 4, 6))
    x = double(K, 6, 5)
    for members, args, own in (
        (members_of(Graph), (x, edges), lambda k: (x[k], edges)),
        (members_of(Text), (ids, ids), lambda k: (ids[k], ids[k])),
    ):
        ours = pack(members)(*args)
        torch.testing.assert_close(ours, torch.stack([m(*own(k)) for k, m in enumerate(members)]))
    members, (state, action) = members_of(Pair), (double(K, 6, 5), double(K, 6, 2))
    with pytest.raises(errors.PackError, match="input_dims=3 or input_dims=2"):
        pack(members)(state, action)
    ours = pack(members, input_dims=2)(state, action)
    torch.testing.assert_close(ours, torch.stack([m(state[k], action[k]) for k, m in enumerate(members)]))


# ---- what is said ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("always:.*member by member")
def test_every_network_that_runs_by_members_is_named_at_the_users_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pack(members_of(lambda: Base(mixing)))(double(6, 5))
        owner = members_of(lambda: Base(mixing))
        for member in owner:
            member.token = nn.Parameter(torch.zeros(5))
        pack(owner)
    said = [warning for warning in caught if "member by member" in str(warning.message)]
    assert [str(w.message).partition(":")[0] for w in said] == ["Base", "Base"]
    assert {w.filename for w in said} == {__file__}


def test_a_rehearsal_costs_little_once_the_kinds_of_calls_are_known(monkeypatch):
    runs = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: runs.append(self) or forward(self, x))
    packed = decompk.pack([nn.Sequential(nn.Linear(5, 5)) for _ in range(K)])
    for N in (6, 7, 6, 7):
        packed(torch.randn(N, 5))
    known = len(runs)
    for N in (6, 7, 6, 7):
        packed(torch.randn(N, 5))
    assert len(runs) == known > 0  # members run alone, as they do in a rehearsal, no more


def test_a_buffer_that_forward_changes_and_then_uses_trains_as_alone():
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 2)
            self.register_buffer("spread", torch.ones(2))

        def forward(self, x):
            y = self.fc(x)
            self.spread.mul_(0.9).add_(0.1 * y.detach().std(0))
            return y / self.spread

    members, x = members_of(Averaged), double(6, 5)
    packed = pack(members)
    for _ in range(3):
        packed(x).sum().backward()
        for member in members:
            member(x).sum().backward()
    for k, member in enumerate(members):
        torch.testing.assert_close(packed.fc.weight.grad[k], member.fc.weight.grad)
        torch.testing.assert_close(packed.spread[k], member.spread)


# ---- rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_rounding_is_no_sample_that_sees_others(seed):
    torch.manual_seed(seed)
    packed = pack([models.resnet50(num_classes=5, width=8) for _ in range(2)])
    for precision in (torch.bfloat16, torch.float32):
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            warnings.simplefilter("error")
            packed(torch.randn(4, 3, 32, 32))


class InFloat32(nn.Module):
    """A norm of every pixel that computes in single precision, whatever the network does."""

    def forward(self, x):
        h = x.float()
        return torch.relu((h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-6)).to(x.dtype))


@pytest.mark.parametrize(("members", "N", "norm"), [(3, 16, nn.ReLU), (3, 16, InFloat32), (2, 2, InFloat32)])
def test_what_few_samples_make_of_rounding_is_rounding(members, N, norm):
    def make():
        net = models.resnet50(num_classes=5, width=16)
        for module in [*net.modules()]:
            for name, child in module._modules.items():
                if isinstance(child, nn.ReLU):
                    module._modules[name] = norm()
        return net

    torch.manual_seed(0)
    packed = pack([make() for _ in range(members)], input_dims=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed(torch.randn(N, 3, 32, 32))


def quantised(x):
    scale = x.detach().abs().amax() / 127
    return x + ((x / scale).round().clamp(-128, 127) * scale - x).detach()


def standardised(x):
    return (x - x.mean()) / x.std()


def attentive(x):
    return x + 1e-3 * torch.softmax(x @ x.T, -1) @ x


def nearly_mixed(x):
    return x - 1e-4 * x.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weak", [quantised, standardised, attentive, nearly_mixed])
def test_what_mixes_little_is_seen_in_every_precision_and_stays_so_in_others(weak, dtype):
    members, packed = nets(lambda net, x: net.outer(weak(net.inner(x))))
    for net in (*members, packed):
        net.float()
    x = torch.randn(8, 5)
    if dtype == torch.float16:  # parameters as well
        for net in (*members, packed):
            net.half()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16), pytest.warns(match="member by member"):
        packed(x.to(dtype) if dtype is torch.float16 else x)
    for net in (*members, packed):
        net.float()
    torch.testing.assert_close(packed(x), torch.stack([m(x) for m in members]))


def test_rounding_is_not_taken_for_what_a_larger_batch_brings():
    class Rounds(nn.Module):
        def forward(self, x):
            return x + 1e4 * torch.finfo(x.dtype).eps * len(x)

    class Stops(nn.Module):
        def forward(self, x):
            return x[:100]

    packed = pack([nn.Sequential(nn.Linear(5, 5), Rounds(), Stops()) for _ in range(K)])
    for N in (3, 50):
        packed(torch.randn(N, 5))
    assert [line.split()[0] for line in packed.describe().splitlines() if "member by member" in line] == ["2"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, TypeError])
def test_what_fails_in_higher_precision_alone_is_rehearsed_in_the_users(error):
    def code(net, x, mixes):
        if x.dtype is torch.float64 and len(x) > 5:
            raise error("not in double precision")
        return mixing(net, x) if mixes else net.outer(net.inner(x))

    for mixes in (False, True):
        packed = pack([Base(lambda net, x, mixes=mixes: code(net, x, mixes)) for _ in range(K)])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            packed(torch.randn(16, 5))
        assert ["its samples see each other" in str(w.message) for w in caught] == [True] * mixes


def test_networks_of_complex_numbers_are_compared_as_such():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4, dtype=torch.cfloat))

        def forward(self, x):
            return torch.fft.irfft(torch.fft.rfft(x) * self.weight[:, :4], n=x.shape[-1])

    members = [nn.Sequential(nn.Conv1d(2, 5, 1), Spectral(), nn.Conv1d(5, 1, 1)) for _ in range(K)]
    packed, x = pack(members, input_dims=3), torch.randn(7, 2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*member by member")
        out = packed(x)
    torch.testing.assert_close(out, torch.stack([m(x) for m in members]))


class Chaotic(nn.Module):
    """Twelve norms of few samples, each of which multiplies rounding; `middle` stands between two of them."""

    def __init__(self, middle, makes=None):
        super().__init__()
        self.layers = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8))])
        self.middle, self.makes = middle, makes

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 11:
                x = self.middle(x)
                x = x @ torch.eye(8, dtype=self.makes) if self.makes else x
        return x


@pytest.mark.parametrize("runs_in_double", [True, False])
@pytest.mark.parametrize(
    ("dtype", "mixed_precision"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_rounding_makes_no_network_run_by_members_and_hides_none_that_mixes(dtype, mixed_precision, runs_in_double):
    for seed, middle in itertools.product(range(3), (torch.tanh, mixed)):
        torch.manual_seed(seed)
        packed = pack([Chaotic(middle, None if runs_in_double else dtype).to(dtype) for _ in range(K)])
        with warnings.catch_warnings(record=True) as caught, torch.autocast("cpu", torch.bfloat16, mixed_precision):
            warnings.simplefilter("always")
            packed(torch.randn(4, 8, dtype=dtype))
        assert ("member by member" in "".join(str(w.message) for w in caught)) == (middle is mixed)


# ---- memory ---------------------------------------------------------------------------------------------------------


def held():
    gc.collect()
    sizes = {}
    for tensor in (o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)):
        with contextlib.suppress(RuntimeError):  # wrappers that other tests left behind have no storage
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def test_a_rehearsal_holds_no_memory():
    before = held()
    packed = pack([nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(K)])
    own = held()
    for N in (32, 20, 9):
        packed(torch.randn(N, 5)).sum().backward()
        packed.zero_grad()
    assert held() == own
    del packed
    assert held() == before


def test_hooks_on_what_is_saved_see_the_call_alone_and_stay_in_their_order():
    packed, seen = pack([nn.Sequential(nn.Linear(5, 8), nn.ReLU()) for _ in range(K)]), []

    def hooks(name):
        return torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.append(("save", name, t.shape)) or t, lambda t: seen.append(("load", name, t.shape)) or t
        )

    counts = []
    for _ in range(2):
        seen.clear()
        with hooks("outer"):
            with hooks("inner"):
                out = packed(torch.randn(4, 5))
            out.sum().backward()
        counts.append([*seen])
    assert counts[0] == counts[1] != [] and {name for _, name, _ in counts[0]} == {"inner"}
