"""Several processes that find each other: forked in milliseconds, or started as users start them."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import torch

# Each is forked from one process that has the modules, which take 7 s to import.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed", "sklearn.datasets", "decompk.cli"])


def _rank(environment, log, function, arguments):
    os.environ.update(environment)
    with open(log, "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(1)
    torch.seed()  # what is not seeded differs from rank to rank
    raise SystemExit(function(*arguments))


@contextmanager
def running_ranks(size, folder, function, *arguments):
    """`function(*arguments)` in `size` processes that find each other as torchrun's do; at the end they are killed.

    function: of a module's top level; what it returns is the process's exit status. What rank r prints is in
    folder/rank<r>.txt.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    processes = []
    try:
        for rank in range(size):
            environment = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = str(folder / f"rank{rank}.txt")
            process = FORKS.Process(target=_rank, args=(environment, log, function, arguments), daemon=True)
            process.start()
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_ranks(size, folder, function, *arguments, seconds=300):
    """The same, to the end: returns what each printed, in rank order. Once one fails the others are killed."""
    codes, end = [None] * size, time.monotonic() + seconds
    with running_ranks(size, folder, function, *arguments) as processes:
        while None in codes and not any(codes) and time.monotonic() < end:
            time.sleep(0.01)
            codes = [process.exitcode for process in processes]
    printed = [(folder / f"rank{rank}.txt").read_text() for rank in range(size)]
    assert codes == [0] * size, "\n".join(f"exit {c}: {text[-3000:]}" for c, text in zip(codes, printed, strict=True))
    return printed


def torchrun(size, *command):
    """`decompk` with these words on `size` processes, started as users start them; what subprocess.run returns."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", "-m", "decompk"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launch, *command], capture_output=True, text=True, env=environment, timeout=300
    )
