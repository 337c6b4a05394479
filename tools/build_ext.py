"""Build the C++ extension into decompk/kernels/lib, on any machine with a compiler, GPU or not.

    python tools/build_ext.py [--arch 80,90a,100] [--emulation] [--into DIR]

--arch: the architectures to compile for, as in sm_90a; --emulation: the same kernels for the host, with g++ alone, for
tests. Beside the library stands what it was built from and for, and its digest; while none changes, nothing is built
again.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc"
LIBRARIES = ROOT / "decompk" / "kernels" / "lib"
ARCHITECTURES = ("80", "90a", "100")
# The oldest torch whose stable ABI is used, 2.11: one library serves all later ones.
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000")
EMULATION_FLAGS = ("-O1", "-U_FORTIFY_SOURCE", "-DHALO_EMULATION")  # fibers jump between stacks
NVCC_FLAGS = ("-std=c++17", "-O3", "--split-compile=0", "-Xcompiler", "-fPIC")  # on all cores: the same machine code


class BuildError(Exception):
    """One sentence: what is missing, or what the compiler said."""


def generate_code(architectures: tuple[str, ...]) -> list[str]:
    """nvcc's options for machine code of exactly these architectures."""
    return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]


def compiler(name: str) -> str:
    """The path of `name`; raises BuildError where there is none."""
    home = os.environ.get("CUDA_HOME")
    places = os.pathsep.join(filter(None, [home and f"{home}/bin", os.environ.get("PATH"), "/usr/local/cuda/bin"]))
    path = shutil.which(name, path=places)
    if path is None:
        raise BuildError(f"{name} is not installed: there is none in CUDA_HOME, PATH or /usr/local/cuda.")
    return path


def run(*commands: list[str]) -> None:
    """All at once; raises BuildError with the first complaint."""
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    said = [process.communicate()[0] for process in running]
    for command, process, text in zip(commands, running, said, strict=True):
        if process.returncode:
            raise BuildError(f"{' '.join(command)} failed:\n{text}")


def build(emulation: bool = False, architectures: tuple[str, ...] = ARCHITECTURES, into: Path = LIBRARIES) -> Path:
    """The library, built now unless one of the same sources, flags and architectures is there."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch is not installed: its headers are needed.")
    torch = Path(spec.submodule_search_locations[0])
    architectures = () if emulation else tuple(architectures)
    flags = (*FLAGS, *EMULATION_FLAGS) if emulation else (*FLAGS, "-DUSE_CUDA", *NVCC_FLAGS)
    contents = hashlib.sha256(repr(flags).encode())
    for source in sorted(SOURCES.iterdir()):
        contents.update(source.name.encode() + source.read_bytes())
    made = {"sources": contents.hexdigest(), "architectures": list(architectures)}

    library = into / f"halo_{'emulation' if emulation else 'cuda'}.so"
    beside = library.with_suffix(".json")
    into.mkdir(parents=True, exist_ok=True)
    with open(into / ".lock", "w") as lock, tempfile.TemporaryDirectory(dir=into) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the second of two processes finds what the first has built
        if _is_built(library, beside, made):
            return library
        kernel, bindings, linked = (Path(scratch) / name for name in ("halo.o", "bindings.o", library.name))
        binding = ["-isystem", f"{torch}/include", "-c", f"{SOURCES}/bindings.cpp", "-o", str(bindings)]
        gxx = compiler("g++")
        if emulation:
            cpp = [gxx, *FLAGS, *EMULATION_FLAGS]
            run([*cpp, "-x", "c++", "-c", f"{SOURCES}/halo.cu", "-o", str(kernel)], [*cpp, *binding])
            link = [gxx, "-Wl,--no-as-needed"]
        else:
            nvcc = compiler("nvcc")
            cuda = [nvcc, *NVCC_FLAGS, *generate_code(architectures), "-t", str(os.cpu_count() or 1)]
            run([*cuda, "-c", f"{SOURCES}/halo.cu", "-o", str(kernel)], [gxx, *FLAGS, "-DUSE_CUDA", *binding])
            link = [nvcc, "-Xlinker", "--no-as-needed"]
        objects = [str(kernel), str(bindings)]
        run([*link, "-shared", *objects, "-o", str(linked), f"-L{torch}/lib", "-ltorch", "-ltorch_cpu"])
        described = Path(scratch) / beside.name
        described.write_text(json.dumps({**made, "sha256": digest(linked)}) + "\n")
        linked.replace(library)
        described.replace(beside)  # between the two, the digest says that they do not belong together
    return library


def digest(path: Path) -> str:
    """Of a file's content, as the package checks it before it loads the library."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_built(library: Path, beside: Path, made: dict) -> bool:
    try:
        return json.loads(beside.read_text()) == {**made, "sha256": digest(library)}
    except (OSError, ValueError, RecursionError):
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="architectures, as in sm_90a")
    parser.add_argument("--emulation", action="store_true", help="for the host, with g++ alone")
    parser.add_argument("--into", type=Path, default=LIBRARIES, metavar="DIR", help="in place of decompk/kernels/lib")
    args = parser.parse_args()
    try:
        print(build(args.emulation, tuple(args.arch.split(",")), args.into))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
