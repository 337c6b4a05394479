"""A GPU on paper: libcuda of a few lines, so that Triton compiles, loads and launches in earnest, and nothing runs.

What Triton hands to the CUDA driver can be read back, byte by byte, and the host's time is Triton's and ours alone.
A process has to be started for it, since libcuda is found by the environment: subprocess.run(…, env=environment(…)).
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path
from typing import Any

SOURCE = r"""
#include <stdint.h>
#include <string.h>

typedef struct { unsigned grid[3], block[3], shared; void *stream; void *attributes; unsigned count; } Config;

int paper_sizes[512], paper_count;            // of the kernel's parameters, to be set before a launch
unsigned char paper_bytes[1 << 16];           // of the last launch, as Launched.read describes it
int paper_length;

static void put(const void *from, int size) {
  memcpy(paper_bytes + paper_length, from, size);
  paper_length += size;
}

int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  paper_length = 0;
  put(config->grid, 12), put(config->block, 12), put(&config->shared, 4);
  put(&config->stream, 8), put(&function, 8);
  for (int i = 0; i < paper_count; ++i) put(parameters[i], paper_sizes[i]);
  return 0;
}

// A descriptor holds what it was made of, as far as Triton varies it.
int cuTensorMapEncodeTiled(unsigned char *map, int dtype, unsigned rank, void *address, const uint64_t *sizes,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                           int swizzle, int promotion, int fill) {
  memset(map, 0, 128);
  memcpy(map, &address, 8), memcpy(map + 8, sizes, 8 * rank), memcpy(map + 48, strides, 8 * (rank - 1));
  memcpy(map + 80, box, 4 * rank), memcpy(map + 100, steps, 4 * rank);
  unsigned char rest[] = {dtype, rank, interleave, swizzle, promotion, fill};
  memcpy(map + 120, rest, sizeof rest);
  return 0;
}

int cuCtxGetCurrent(void **context) { return *context = paper_bytes, 0; }
int cuPointerGetAttribute(void *to, int what, uint64_t address) { return memcpy(to, &address, 8), 0; }
int cuPointerGetAttributes(unsigned n, int *what, void **to, uint64_t address) { return memcpy(to[0], &address, 8), 0; }
int cuDeviceGetAttribute(int *value, int what, int device) { return *value = 232448, 0; }
int cuFuncGetAttribute(int *value, int what, void *function) { return *value = what ? 32 : 1024, 0; }
int cuModuleLoadData(void **module, const void *image) { static long loaded; return *module = (void *)++loaded, 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { return *function = module, 0; }
int cuGetErrorString(int code, const char **text) { return *text = "on paper", 0; }
"""


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that finds the GPU on paper; its library is built in `folder`."""
    import triton

    backend = Path(triton.__file__).parent / "backends" / "nvidia"
    called = {name for path in backend.glob("driver.*") for name in re.findall(r"\bcu[A-Z]\w+", path.read_text())}
    others = sorted(name for name in called if not re.search(rf"\b{name}\(", SOURCE))
    (folder / "cuda.c").write_text(SOURCE + "".join(f"int {name}() {{ return 0; }}\n" for name in others))
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-w", str(folder / "cuda.c"), "-o", str(library)], check=True)
    (folder / "libcuda.so").symlink_to(library)
    found = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "LD_LIBRARY_PATH")}
    return {**found, "LD_LIBRARY_PATH": str(folder), "TRITON_LIBCUDA_PATH": str(folder)}


def activate(arch: int = 90) -> Any:
    """Make the GPU on paper Triton's; returns its driver, whose current `device` and `stream` may be set."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class Paper(CudaDriver):
        device, stream = 0, 0

        def __init__(self):
            super().__init__()
            self.get_current_device = lambda: self.device
            self.get_current_stream = lambda device: self.stream

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", self.device)

    triton.runtime.driver.set_active(paper := Paper())
    return paper


class Launched:
    """What libcuda was told by the last launch."""

    def __init__(self):
        library = ctypes.CDLL("libcuda.so.1")
        self.sizes, self.count = (ctypes.c_int * 512).in_dll(library, "paper_sizes"), _number(library, "paper_count")
        self.bytes = (ctypes.c_ubyte * (1 << 16)).in_dll(library, "paper_bytes")
        self.length = _number(library, "paper_length")

    def expect(self, sizes: list[int]) -> None:
        """The bytes of each parameter of the kernels that are launched from now on."""
        self.sizes[: len(sizes)], self.count.value, self.length.value = sizes, len(sizes), 0

    def read(self) -> bytes:
        """Grid, block, shared memory, stream, function and parameters; empty where nothing was launched."""
        found = bytes(self.bytes[: self.length.value])
        self.length.value = 0
        return found


def _number(library: ctypes.CDLL, name: str) -> ctypes.c_int:
    return ctypes.c_int.in_dll(library, name)
