"""Several threads or processes at once: what torch and a process have but one of stays what it was for the others."""

import functools
import io
import multiprocessing
import os
import pickle
import random
import sys
import threading
import time
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import decompk
from decompk.fx.unseen import undrawn
from decompk.kernels import backend
from decompk.packed.rehearsal import Rehearsal
from decompk.threads import Turn, one_at_a_time

SECONDS = 60  # until whoever waits is taken to wait for ever


class Net(nn.Module):
    def __init__(self, drop=0.0):
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(drop)
        self.more, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(self.drop((x + self.more(x)).mean((2, 3))))


class Scale(nn.Module):
    """Runs member by member: it owns a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return (x * self.scale).relu() * self.scale.norm()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.scale, self.fc = nn.Conv2d(3, 8, 3), Scale(), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.scale(self.conv(x).mean((2, 3))))


def members_of(make, seed=0):
    generator = torch.Generator().manual_seed(seed)
    members = [make() for _ in range(3)]
    for parameter in (p for member in members for p in member.parameters()):
        nn.init.normal_(parameter, 0, 0.3, generator=generator)
    return members


def images(seed, count=2):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _hasty():
    """Threads change over after every few instructions; a network that seems to mix its members is an error."""
    interval, call = sys.getswitchinterval(), nn.Module.__call__
    sys.setswitchinterval(1e-4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*member by member")
        yield
    sys.setswitchinterval(interval)
    assert nn.Module.__call__ is call
    assert backend._traced.name is None


def at_once(*works):
    """What each function returns, all of them called at once, each in a thread of its own; raises what one raised."""
    results, start = [None] * len(works), threading.Barrier(len(works))

    def run(i, work):
        torch.set_num_threads(1)
        start.wait(SECONDS)
        try:
            results[i] = work(), None
        except Exception as error:
            results[i] = None, error

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert None not in results, "a thread waits for ever"
    for _, error in results:
        if error is not None:
            raise error
    return [value for value, _ in results]


class Beside:
    """`work(i)`, i = 0, 1, …, again and again in another thread while the body runs; raises what it raised."""

    def __init__(self, work):
        self._work, self._error, self._done, self._begun = work, None, False, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        torch.set_num_threads(1)
        i = 0
        try:
            while not self._done:
                self._work(i)
                i += 1
                self._begun.set()
        except Exception as error:
            self._error = error
            self._begun.set()

    def __enter__(self):
        self._thread.start()
        assert self._begun.wait(SECONDS)

    def __exit__(self, *error):
        self._done = True
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "the other thread waits for ever"
        if self._error is not None:
            raise self._error


def fused(seed):
    return decompk.fuse(decompk.pack(members_of(Net, seed)))(images(seed))


def cut(seed):
    net = members_of(Net, seed)[0]
    decomposition = decompk.decompose(net, (3, 8, 8), (1, 2))
    parts = decomposition.split(images(seed))
    return torch.stack([member(x) for member, x in zip(decomposition.extract(net), parts, strict=True)])


def grouped(seed, size=(3, 8, 8)):
    """Its members are drawn from numbers that all threads draw: they have to be as each is alone."""
    packed = decompk.grouped_subnets(members_of(Net, seed)[0], size, (1, 2))
    members, y = packed.unpack(), packed(images(seed))
    for member, x, own in zip(members, packed.decomposition.split(images(seed)), y, strict=True):
        torch.testing.assert_close(own, member(x), atol=1e-4, rtol=1e-4)
    return torch.tensor(y.shape)


def waiting(seed):
    """Its crops are laid by the first batch."""
    return grouped(seed, None)


def skipping(seed):
    net = members_of(Net, seed)[0]
    whole = decompk.decompose(net, (3, 8, 8), [decompk.Crop(0, 0, 8, 8)] * 2)
    return decompk.block_diagonal(whole.compose(whole.extract(net)).eval(), (3, 8, 8))(images(seed))


def by_member(seed):
    return decompk.pack(members_of(Scaled, seed))(images(seed))


MAKERS = (fused, cut, grouped, waiting, skipping, by_member)


def test_networks_that_are_read_and_first_called_at_once_are_what_each_is_alone():
    seeds = range(3)
    alone = [[make(seed) for seed in seeds] for make in MAKERS]
    found = at_once(*(lambda make=make: [make(seed) for seed in seeds] for make in MAKERS))
    for make, one, other in zip(MAKERS, alone, found, strict=True):
        assert all(map(torch.equal, one, other)), make.__name__


def test_what_other_threads_call_while_a_network_is_read_runs_as_it_is():
    net, packed = Net(), decompk.pack(members_of(Net))
    x = images(1)
    alone = net(x), packed(x)

    def call(_):
        assert torch.equal(net(x), alone[0])
        assert torch.equal(packed(x), alone[1])

    with Beside(call):
        for seed in range(4):
            fused(seed)
            cut(seed)


def test_what_another_thread_draws_is_not_taken_for_the_networks():
    """torch's numbers all the time, Python's now and then; nor do members seem to see each other by it."""

    def draw(i):
        torch.rand(3)
        if i % 100 == 0:
            random.random()
        time.sleep(1e-5)

    with Beside(draw):
        for seed in range(3):
            packed = decompk.pack(members_of(lambda: Net(drop=0.5), seed))
            packed(images(seed))
            decompk.fuse(packed)(images(seed))
            assert "member by member" not in packed.describe()


@pytest.mark.parametrize(
    "read",
    [
        lambda members: decompk.fuse(decompk.pack(members, rehearse=False)),
        lambda members: decompk.decompose(members[0], (3, 8, 8), (1, 2)),
    ],
    ids=["fuse", "decompose"],
)
def test_reading_a_network_leaves_what_another_thread_draws_alone(read):
    members, found = members_of(Net), []
    torch.manual_seed(1)
    with Beside(lambda _: found.append(torch.rand(1))):
        for _ in range(3):
            read(members)
    torch.manual_seed(1)
    assert torch.equal(torch.cat(found), torch.rand(len(found)))


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), random.random, lambda: random.randint(0, 1)])
def test_numbers_that_the_network_draws_itself_are_still_refused(draw):
    class Deep(Net):
        def forward(self, x):
            return super().forward(x) if draw() < 2 else x

    packed = decompk.pack(members_of(Deep), member_by_member=["fc"])
    state, pythons = torch.get_rng_state(), random.getstate()
    with pytest.raises(decompk.DecompkError, match="draws a random number"):
        decompk.fuse(packed)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == pythons


def test_numbers_that_another_thread_draws_all_the_time_are_told_from_its_own():
    with Beside(lambda _: random.random() and torch.rand(3)):
        assert not any(undrawn(lambda: sum(range(30_000)))[1] for _ in range(40))


def _in_a_thread():
    one = threading.Thread(target=random.random)
    one.start()
    one.join()


@pytest.mark.parametrize(
    "draw",
    [random.random, lambda: random.gauss(0, 1), functools.partial(random.random), _in_a_thread, lambda: torch.rand(3)],
)
def test_whatever_way_numbers_are_drawn_they_are_drawn_and_the_state_is_as_before(draw):
    for _ in range(4):  # gauss keeps every second number
        states = random.getstate(), torch.get_rng_state()
        assert undrawn(draw)[1]
        assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.parametrize("make", [Net, Scaled])
@pytest.mark.parametrize("shared", [True, False])
def test_packed_networks_train_at_once_to_the_bit_as_alone(make, shared):
    """One network that all call, or one each."""
    packed = [decompk.pack(members_of(make, 0 if shared else i)) for i in range(4)]
    if shared:
        packed = packed[:1] * 4
    for net in packed:  # which moves no statistics then
        net.eval()

    def gradients(i):
        outputs = packed[i](images(i, 5))
        return outputs, *torch.autograd.grad(outputs.square().sum(), [*packed[i].parameters()])

    alone = [gradients(i) for i in range(4)]
    found = at_once(*(lambda i=i: [gradients(i) for _ in range(8)] for i in range(4)))
    for one, others in zip(alone, found, strict=True):
        for other in others:
            assert all(map(torch.equal, one, other))


def test_modes_may_change_while_another_thread_calls():
    packed, x = decompk.pack(members_of(Scaled)), images(0)

    def gradients():
        return torch.autograd.grad(packed(x).sum(), list(packed.parameters()))

    wanted = gradients()

    @torch.no_grad()
    def change(_):
        packed.eval()
        packed.train()

    with Beside(change):
        for _ in range(60):
            assert all(map(torch.equal, gradients(), wanted))


def test_a_first_call_by_many_threads_is_rehearsed_once(monkeypatch):
    runs, run = [], Rehearsal.run
    monkeypatch.setattr(Rehearsal, "run", lambda self: (runs.append(1), run(self))[1])
    members = members_of(Net)
    packed = decompk.pack(members).eval()
    hooks = nn.modules.module._global_forward_hooks
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        found = at_once(*[lambda: packed(images(0))] * 4)
        assert len(runs) == 1
        assert len(hooks) == 1
    finally:
        hook.remove()
    for y in found:
        assert torch.equal(y, packed(images(0)))


def test_backends_asked_for_in_threads_that_overlap_are_left_behind():
    """Compiled code reads the one of whoever asked last: it shall not keep a thread's that has gone."""
    inside, outside = threading.Event(), threading.Event()

    def first():
        with decompk.backend("loop"):
            assert inside.wait(SECONDS)
        outside.set()

    def second():
        with decompk.backend("torch"):
            inside.set()
            assert outside.wait(SECONDS)

    at_once(first, second)
    assert backend._traced.name is None


# ---- processes ------------------------------------------------------------------------------------------------------


class Computed(Dataset):
    """Samples that a packed network computes, in a DataLoader's workers."""

    def __init__(self, packed):
        self.packed = packed

    def __len__(self):
        return 4

    @torch.no_grad()
    def __getitem__(self, i):
        return self.packed(images(i))


def first_and_later(packed, x):
    """In another process: a packed network called, its gradients, and a network read there for the first time."""
    torch.set_num_threads(1)
    y = packed(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), [packed.conv.weight])
    return y.detach(), gradient, fused(0).detach()


def in_process(method, *arguments):
    """`first_and_later` in one process; as bytes, for tensors would travel as files."""
    with multiprocessing.get_context(method).Pool(1) as pool:
        return pickle.loads(pool.apply_async(_pickled, arguments).get(SECONDS))


def _pickled(packed, x):
    return pickle.dumps(first_and_later(pickle.loads(packed), pickle.loads(x)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_packed_network_works_in_another_process(method):
    packed = decompk.pack(members_of(Scaled))
    x = images(0)
    wanted = first_and_later(packed, x)  # warm before it is handed over
    found = in_process(method, pickle.dumps(packed), pickle.dumps(x))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_data_loaders_workers_use_packed_networks():
    packed = decompk.pack(members_of(Net)).eval()
    wanted = [packed(images(i)) for i in range(4)]
    loader = DataLoader(
        Computed(packed), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=SECONDS
    )
    for found, y in zip(loader, wanted, strict=True):
        assert torch.equal(found, y)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_rehearses_leaves_no_lock_behind():
    held, turn = threading.Event(), Turn()

    def hold():
        with turn, one_at_a_time():
            held.set()
            time.sleep(0.2)
        with turn:
            time.sleep(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(SECONDS)
    child = multiprocessing.get_context("fork").Process(target=_enter, args=(turn,), daemon=True)
    child.start()  # when the rehearsal is over
    child.join(SECONDS)
    assert child.exitcode == 0
    thread.join()


def _enter(turn):
    with turn, one_at_a_time():
        assert fused(0) is not None


class Forking(Scale):
    forks = False

    def forward(self, x):
        if Forking.forks:
            Forking.forks, Forking.child = False, os.fork()
        return super().forward(x)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_child_forked_inside_a_members_forward_goes_on(monkeypatch):
    packed, x = decompk.pack([Forking() for _ in range(3)], member_by_member=[""], rehearse=False), torch.randn(2, 8)
    wanted = packed(x)
    monkeypatch.setattr(Forking, "forks", True)
    right = False
    try:
        right = torch.equal(packed(x), wanted) and torch.equal(packed(x), wanted)
    finally:
        if Forking.child == 0:
            os._exit(0 if right else 1)
    assert right and os.waitstatus_to_exitcode(os.waitpid(Forking.child, 0)[1]) == 0


@pytest.mark.parametrize("make", [Net, Scaled])
@pytest.mark.parametrize("fuses", [False, True])
def test_packed_networks_are_pickled_and_saved(make, fuses):
    packed = decompk.pack(members_of(make)).eval()
    if fuses:
        packed = decompk.fuse(packed)
    wanted, file = packed(images(0)), io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(packed)), torch.load(file, weights_only=False)):
        assert torch.equal(again(images(0)), wanted)
