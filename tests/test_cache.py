"""What decompk keeps on disk: loaded if it is whole, else made again, whatever has become of it, whoever was killed."""

import ctypes
import errno
import fcntl
import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from decompk.kernels import cache, cpu, measure
from decompk.report import info

if sys.platform != "linux":
    pytest.skip("the library is built on Linux alone", allow_module_level=True)

KILLS = int(os.environ.get("DECOMPK_KILLS", "6"))  # how many processes die while they write
FORKS = multiprocessing.get_context("fork")  # children have what is patched here; they build and load, no more


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Of a library with all functions that does nothing: it is built in a moment."""
    if cpu.why_not():
        pytest.skip(cpu.why_not())
    folder = tmp_path_factory.mktemp("sources")
    for name in cpu._SIGNATURES:
        (folder / f"{name}.cpp").write_text(f'extern "C" void {name}() {{}}\n')
    return folder


@pytest.fixture
def place(sources, tmp_path, monkeypatch):
    """An empty cache for the small library."""
    monkeypatch.setattr(cpu, "SOURCES", sources)
    monkeypatch.setattr(cpu, "FLAGS", ("-O0", "-fPIC"))
    monkeypatch.setenv("DECOMPK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def builds(place, tmp_path, monkeypatch):
    """A list that grows by each build, in whatever process."""
    log, build = tmp_path / "builds", cpu.build

    def counted(library, *more):
        with open(log, "a") as file:
            file.write(f"{library}\n")
        build(library, *more)

    monkeypatch.setattr(cpu, "build", counted)
    log.touch()
    return lambda: log.read_text().splitlines()


def in_another_process(function, *arguments):
    """What `function` returns in a process of its own, which must end well."""
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=lambda: theirs.send(function(*arguments)))
    process.start()
    process.join(60)
    assert process.exitcode == 0, f"exit {process.exitcode}"
    return ours.recv()


def opened():
    """What a new process says of the library: in words where it is, or why there is none."""

    def open_it():
        try:
            return cpu._opened.__wrapped__()[1]
        except (OSError, subprocess.SubprocessError) as error:
            return f"none: {error}"

    return in_another_process(open_it)


def library(place):
    (found,) = place.glob("cpu-*.so")
    return found


# ---- the library ----------------------------------------------------------------------------------------------------


def test_the_real_one_is_built_once_and_again_for_another_processor(tmp_path, monkeypatch):
    if cpu.why_not():
        pytest.skip(cpu.why_not())
    monkeypatch.setenv("DECOMPK_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "FLAGS", ("-std=c++17", "-O0", "-march=native", "-fPIC", "-fopenmp", "-Wno-psabi"))
    found, where = cpu._opened.__wrapped__()
    assert where == f"in {library(tmp_path)}" and found.winograd_wgrad.argtypes
    monkeypatch.setattr(cpu, "_run", None)  # would raise
    assert cpu._opened.__wrapped__()[1] == where
    monkeypatch.setattr(cache, "processor", lambda: cache.Processor("another", "", ()))
    with pytest.raises(TypeError):
        cpu._opened.__wrapped__()


def test_the_sources_are_built_with_other_flags_into_a_given_file(place, tmp_path):
    cpu.build(tmp_path / "other.so", ("-O1", "-g", "-fPIC"), ("-Wl,--build-id=none",))
    assert hasattr(ctypes.CDLL(str(tmp_path / "other.so")), "winograd_wgrad") and not place.exists()


def damage_cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_shorter(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_empty(path):
    path.write_bytes(b"")


def damage_changed(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def damage_longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def damage_other_name(path):
    """One that is whole, of other sources, with this one's name."""
    cache.write_code(path.with_name("cpu-0123456789abcdef.so"), path.read_bytes()[: -cache.DIGEST])
    path.with_name("cpu-0123456789abcdef.so").replace(path)


def damage_other_architecture(path):
    """Whole, but of a machine that this one is not."""
    content = bytearray(path.read_bytes()[: -cache.DIGEST])
    content[18:20] = (22).to_bytes(2, "little")  # e_machine: IBM S/390
    cache.write_code(path, bytes(content))


def damage_no_library(path):
    cache.write_code(path, b"no machine code at all")


def damage_no_function(path):
    source = path.with_suffix(".c")
    source.write_text("void another(void) {}\n")
    subprocess.run([*cpu._compiler(), "-shared", "-fPIC", "-x", "c", source, "-o", path], check=True)
    source.unlink()
    cache.write_code(path, path.read_bytes())


def damage_folder(path):
    path.unlink()
    path.mkdir()


def damage_pipe(path):
    path.unlink()
    os.mkfifo(path)


def damage_link(path):
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def damage_group_writable(path):
    path.chmod(0o664)


def damage_writable_by_all(path):
    path.chmod(0o646)


def damage_of_another_user(path):
    if os.geteuid():
        pytest.skip("root alone gives files away")
    os.chown(path, 12345, -1)


DAMAGES = {name.removeprefix("damage_"): f for name, f in globals().items() if name.startswith("damage_")}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_not_whole_and_ours_is_built_again_once(place, builds, damage):
    assert opened() == f"in {library(place)}"
    path = library(place)
    damage(path)
    assert opened().startswith(f"in {path}, built again: ")
    assert opened() == f"in {path}" and len(builds()) == 2
    found = path.lstat()
    assert stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o644


def test_what_loads_nowhere_is_told_in_a_sentence(place, builds, monkeypatch):
    def build_nonsense(path, *more):
        path.write_bytes(b"nonsense")

    monkeypatch.setattr(cpu, "build", build_nonsense)
    for _ in range(2):
        assert opened().startswith("none: the library does not load: ") and "file too short" in opened()


def test_a_compiler_that_fails_is_quoted(place, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)
    assert "failed: " in opened() and opened().startswith(f"none: {sys.executable}")
    assert not list(place.glob("*.so"))
    monkeypatch.setenv("CXX", "false")
    assert opened() == "none: false failed: exit status 1"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in opened()


def test_a_machine_without_a_compiler_trains_on_torchs_operators(tmp_path):
    script = (
        "import torch, decompk\n"
        "from decompk.kernels import cpu\n"
        "print(cpu.why_not())\n"
        "packed = decompk.pack([torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(3, 8, 3)])\n"
        "packed(torch.randn(2, 3, 8, 8)).sum().backward()\n"
        "try:\n"
        "    decompk.backend('cpu').__enter__()\n"
        "except decompk.DecompkError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "PATH": "", "DECOMPK_CACHE": str(tmp_path)}
    environment.pop("CXX", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("there is no C++ compiler") == 2


# ---- the processor --------------------------------------------------------------------------------------------------


def x86(family, model, stepping, flags, name="Intel(R) Xeon(R) Processor @ 2.10GHz", vendor="GenuineIntel"):
    one = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: {name}\n"
    return 2 * f"{one}stepping\t: {stepping}\nmicrocode\t: 0x1\ncpu MHz\t\t: 2100.0\nflags\t\t: fpu smep {flags}\n\n"


SKYLAKE = x86(6, 85, 4, "fma avx2 avx512f avx512bw avx512vl")
SAPPHIRE = x86(6, 143, 8, "fma avx2 avx512f avx512bw avx512vl avx512_bf16 avx512_fp16 amx_tile amx_bf16 avx512_vnni")
MILAN = x86(25, 1, 1, "fma avx2", "AMD EPYC 7763 64-Core Processor", "AuthenticAMD")
GRAVITON = (
    "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd asimdhp sve i8mm bf16\nCPU implementer\t: 0x41\n"
    "CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: 0xd40\nCPU revision\t: 1\n"
)


@pytest.fixture
def path_on(tmp_path, monkeypatch):
    """The file of choices on a machine whose /proc/cpuinfo holds a text; None: that has none."""

    def path(text):
        monkeypatch.setattr(cache, "CPUINFO", tmp_path / "cpuinfo")
        cache.CPUINFO.unlink(missing_ok=True)
        if text is not None:
            cache.CPUINFO.write_text(text)
        cache.processor.cache_clear()
        return measure.path()

    yield path
    monkeypatch.undo()
    cache.processor.cache_clear()


def test_generations_of_one_name_have_names_of_their_own():
    names = [cache.processor_of(text).name for text in (SKYLAKE, SAPPHIRE, MILAN, GRAVITON)]
    assert names == [
        "Intel Xeon, family 6 model 85 (AVX-512)",
        "Intel Xeon, family 6 model 143 (AVX-512, AMX)",
        "AMD EPYC 7763 64-Core, family 25 model 1 (AVX2)",
        "ARM, implementer 0x41 part 0xd40 (SVE)",
    ]


def test_choices_are_those_of_one_generation_its_vector_units_cores_threads_and_code(path_on, monkeypatch):
    others = [
        *(SAPPHIRE, MILAN, GRAVITON, None),
        *(SKYLAKE.replace(*change) for change in (("stepping\t: 4", "stepping\t: 7"), ("fma", ""), ("85", "106"))),
        *(
            GRAVITON.replace(*change)
            for change in ((" sve", ""), ("0xd40", "0xd4f"), ("revision\t: 1", "revision\t: 2"))
        ),
    ]
    threads, paths = torch.get_num_threads(), [path_on(text) for text in (SKYLAKE, *others)]
    monkeypatch.setattr(cache, "cores", lambda: 77)
    paths.append(path_on(SKYLAKE))
    monkeypatch.setattr(measure, "_code", lambda: "of another version")
    paths.append(path_on(SKYLAKE))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 33)
    paths.append(path_on(SKYLAKE))
    assert len(set(paths)) == len(paths)
    assert paths[0].name.startswith(f"choices-intel-xeon-family-6-model-85-avx-512-{threads}-threads-")


def test_what_says_nothing_of_speed_moves_no_choices(path_on):
    same = [SKYLAKE.replace("0x1", "0x2b").replace("2100.0", "3500.0"), SKYLAKE.replace("fpu", "fpu ibpb")]
    assert {path_on(text) for text in same} == {path_on(SKYLAKE)}


def test_cores_of_two_kinds_are_another_machine(path_on):
    both = SKYLAKE.replace("85", "151", 1)
    assert len({path_on(text) for text in (both, SKYLAKE, SKYLAKE.replace("85", "151"))}) == 3
    assert cache.processor_of(both).name == "Intel Xeon, family 6 model 151 + 85 (AVX-512)"


def test_a_machine_that_says_nothing_has_pythons_name():
    assert cache.processor_of("").name and cache.processor_of("junk\n:\n\x00").model == (cache.processor_of("").name,)


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 9})
    assert cache.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cache.cores() == os.cpu_count()


# ---- the folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a file", "a file/below", "/proc/decompk", "x" * 300, "closed", "another's"])
def test_where_the_folder_cannot_be_used_the_library_is_the_processs_own(place, tmp_path, builds, monkeypatch, name):
    (tmp_path / "a file").touch()
    (tmp_path / "closed").mkdir(mode=0o500)
    (tmp_path / "another's").mkdir()
    if os.geteuid() == 0:
        os.chown(tmp_path / "another's", 12345, -1)
    if name == "another's" and os.geteuid() or name == "closed" and os.geteuid() == 0:
        pytest.skip("root alone gives folders away, and nothing is closed to it")
    before = set(tmp_path.iterdir())
    monkeypatch.setenv("DECOMPK_CACHE", str(tmp_path / name))
    assert opened().startswith(f"built for this process alone: {tmp_path / name} cannot be used (")
    assert len(builds()) == 1
    assert not Path(builds()[0]).parent.exists() and set(tmp_path.iterdir()) - before <= {tmp_path / "builds"}


def test_a_folder_that_all_can_write_is_not_used(place, builds):
    place.mkdir()
    place.chmod(0o777)
    assert "alone" in opened() and "every user can write it" in opened() and not list(place.iterdir())
    place.chmod(0o1777)  # as /tmp: nobody removes what is another's
    assert [opened(), opened()] == [f"in {library(place)}"] * 2 and len(builds()) == 3


def test_in_a_folder_that_its_group_can_write_nothing_is_compiled_and_its_mode_stays(place, builds):
    place.mkdir()
    place.chmod(0o2775)
    assert [opened(), opened()] == [f"in {library(place)}"] * 2
    assert len(builds()) == 1 and place not in Path(builds()[0]).parents
    assert stat.S_IMODE(place.stat().st_mode) == 0o2775


def test_what_was_checked_is_loaded_even_if_it_is_exchanged_behind_the_check(place, builds, monkeypatch):
    assert opened() == f"in {library(place)}"
    read = cache.read_code

    def exchanged(path):
        content = read(path)
        path.write_bytes(b"another user's")
        return content

    monkeypatch.setattr(cache, "read_code", exchanged)
    assert opened() == f"in {library(place)}" and len(builds()) == 1


def test_where_memory_runs_no_code_a_copy_is_loaded(place, builds, monkeypatch):
    monkeypatch.setattr(os, "memfd_create", lambda name: full())
    assert [opened(), opened()] == [f"in {library(place)}"] * 2 and len(builds()) == 1


def test_a_compiler_may_be_given_with_its_arguments(place, builds, monkeypatch):
    monkeypatch.setenv("CXX", f"env LC_ALL=C {cpu._compiler()[0]}")
    assert opened() == f"in {library(place)}"


def test_a_lock_is_let_go_though_a_child_forked_meanwhile_goes_on(place):
    place.mkdir()
    child = FORKS.Process(target=time.sleep, args=(60,))
    with cache.lock(place / "any"):
        child.start()
    begin = time.monotonic()
    with cache.lock(place / "any"):
        assert time.monotonic() - begin < 30
    child.kill()
    child.join(60)


def test_odd_umasks_cost_nobody_the_cache(place, builds, tmp_path, monkeypatch):
    for number, umask in enumerate((0o002, 0o000, 0o077)):
        monkeypatch.setenv("DECOMPK_CACHE", str(tmp_path / str(number) / "cache"))
        before = os.umask(umask)
        found = [opened(), opened()]
        os.umask(before)
        assert found == [f"in {library(cache.folder())}"] * 2
        assert not stat.S_IMODE(cache.folder().stat().st_mode) & 0o022
    assert len(builds()) == 3


def test_the_folder_is_the_same_wherever_the_process_goes(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    given = {".": "", "": "home/.cache/decompk", "~/kept": "home/kept", "a/../b": "b", "./a": "a", "a b/ü": "a b/ü"}
    for _ in range(2):
        for name, expected in given.items():
            monkeypatch.setenv("DECOMPK_CACHE", name)
            assert cache.folder() == tmp_path / expected
        monkeypatch.chdir("/")
    for name, expected in given.items():
        monkeypatch.setenv("DECOMPK_CACHE", name)
        if name != "":
            assert opened() == f"in {library(tmp_path / expected)}"


def test_a_user_without_home_or_current_folder_has_a_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("DECOMPK_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # whom no list of users knows
    assert cache.folder() == Path("/tmp/decompk-54321")

    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("DECOMPK_CACHE", "kept")
    assert cache.folder() == Path("/tmp/decompk-54321")


def test_a_home_that_cannot_be_written_costs_nobody_the_kernels(place, monkeypatch):
    monkeypatch.delenv("DECOMPK_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    assert opened().startswith("built for this process alone: /proc/decompk cannot be used (")


# ---- what fails on the way ------------------------------------------------------------------------------------------


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_on_a_full_disk_the_library_is_the_processs_own(place, builds, monkeypatch):
    monkeypatch.setattr(os, "replace", full)
    alone = f"built for this process alone: {place} cannot be used (No space left on device)"
    assert opened() == alone and len(builds()) == 1, "what was built once is not built again"
    assert [path.suffix for path in place.iterdir()] == [".lock"]


def test_a_compiler_without_room_in_the_cache_works_elsewhere(place, monkeypatch):
    run = cpu._run
    monkeypatch.setattr(cpu, "_run", lambda command, at: full() if place in at.parents else run(command, at))
    assert opened() == f"built for this process alone: {place} cannot be used (No space left on device)"
    assert [path.suffix for path in place.iterdir()] == [".lock"]


def test_without_room_anywhere_torchs_operators_run(place):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        cpu.why_not.cache_clear()
        cpu._opened.cache_clear()
        rows = {row[0]: row for row in info.info().rows}
        y = torch.nn.functional.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3))
        measure.keep(measure.path(), "x" * 1000, {"direct": 1.0})
        return cpu.why_not(), rows["backend cpu"], y.item(), list(place.glob("*.so"))

    why, row, y, left = in_another_process(limited)
    assert "failed: " in why and row[1:] == ("absent", why) and y == 9 and not left


def test_a_folder_that_vanishes_during_the_build_costs_nobody_the_kernels(place, builds, monkeypatch):
    build = cpu.build

    def vanish(path, *more):
        build(path, *more)
        shutil.rmtree(place, ignore_errors=True)

    monkeypatch.setattr(cpu, "build", vanish)
    assert opened().startswith(f"built for this process alone: {place} cannot be used (No such file or directory")
    assert not place.exists()


def test_without_locks_and_with_one_that_is_never_let_go_the_cache_is_used(place, builds, monkeypatch):
    place.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *a: full())
        assert [opened(), opened()] == [f"in {library(place)}"] * 2
    monkeypatch.setattr(cache, "WAIT", 0.05)
    with open(library(place).with_suffix(".lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert opened() == f"in {library(place)}" and len(builds()) == 1


def test_four_threads_on_an_empty_cache_build_once(place, builds):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cpu._opened.__wrapped__()[1], range(4)))
    assert set(found) == {f"in {library(place)}"} and len(builds()) == 1


def test_four_processes_on_an_empty_cache_build_once(place, builds):
    def use():
        sys.exit(cpu._opened.__wrapped__()[1] != f"in {library(place)}")

    processes = [FORKS.Process(target=use) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4 and len(builds()) == 1


def killed(function, seconds):
    """Run `function` in a process of its own; kill it after so long, and all that it has started."""
    begun = FORKS.Event()

    def run():
        os.setpgrp()
        begun.set()
        function()

    process = FORKS.Process(target=run)
    process.start()
    assert begun.wait(60)
    time.sleep(seconds)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join(60)
    assert not process.is_alive()


def test_who_is_killed_while_building_leaves_a_cache_that_serves(place, builds):
    begin = time.monotonic()
    assert opened() == f"in {library(place)}"
    whole, path = time.monotonic() - begin, library(place)
    for number in range(KILLS):
        if number % 2:
            damage_cut(path)
        else:
            path.unlink()
        killed(cpu._opened.__wrapped__, whole * (number + random.random()) / KILLS)
        assert opened().startswith(f"in {path}")
        assert opened() == f"in {path}", "what was built was not whole"
        assert set(place.iterdir()) == {path, path.with_suffix(".lock")}


def test_who_is_killed_while_writing_choices_loses_none(place):
    file = place / "choices.json"
    place.mkdir()

    def keep():
        for number in range(before, 10**6):
            measure.keep(file, f"problem {number}", {"direct": 1.0})

    before = 0
    for _ in range(KILLS):
        killed(keep, 0.02 + random.random() / 20)
        known = measure._table(file)
        assert len(known) >= before and set(known) == {f"problem {number}" for number in range(len(known))}
        before = len(known)
    measure.keep(file, "last", {"direct": 1.0})
    assert before and len(measure._table(file)) == before + 1
    assert set(place.iterdir()) == {file, file.with_suffix(".lock")}
