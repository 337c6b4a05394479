"""Whether packed networks that nobody chose train slower than others train them: timm's, drawn by a seed, here.

    python tools/survey_speed.py [--seed N] [--networks 20] [--members 4] [--batch 8] [--pixels 64] [--threads N]
                                 [--out FILE]

A training step of K members on one batch, ours after ten steps beside members in turn, on threads and as channel
groups, interleaved; each is checked first. Writes a table in Markdown to --out, else to the terminal.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests"), str(ROOT / "tools")]

from arguments import between
from zoo import torchvision  # noqa: F401  before timm, which imports it too

# isort: split
import timm
from contestants import OWN, TRAINING, Job, Setting, members_alone, packed, side
from race import Contestant, Work, race
from survey_timm import made

from decompk.kernels.cache import processor
from decompk.packed.module import Packed

PEERS = (*OWN, "members on threads", "grouped, channels_last")
STEPS = 10  # of ours before it is timed
ROUNDS, LEAST, MOST = 9, 0.1, 3.0  # seconds of a round, and of a contestant's rounds
PARAMETERS = 8e6  # larger networks take long, and fill the memory


def drawn(seed: int) -> list[str]:
    """timm's networks in an order that the seed decides."""
    names = sorted(timm.list_models())
    random.Random(seed).shuffle(names)
    return names


def fits(name: str, pixels: int) -> bool:
    """Whether a network is small enough, and takes such images."""
    try:
        with torch.device("meta"):
            net = made(name, pixels)()
        if sum(p.numel() for p in net.parameters()) > PARAMETERS:
            return False
        made(name, pixels)()(torch.randn(2, 3, pixels, pixels))
    except Exception:  # whatever a network raises that wants other images
        return False
    return True


def survey(name: str, args: argparse.Namespace) -> str:
    """A row of the table."""
    torch.manual_seed(0)
    members = [made(name, args.pixels)().train() for _ in range(args.members)]
    images, labels = torch.randn(args.batch, 3, args.pixels, args.pixels), torch.randint(10, (args.batch,))
    job = Job(Setting(torch.device("cpu"), torch.float32), members, None, images, labels, Work(0, 0))
    nets: list[Packed] = []

    def ours() -> Contestant:
        found = packed(job, keep=nets.append)
        for _ in range(STEPS):
            found.run()
        return found

    builds: dict[str, Callable[[], Contestant]] = {"ours": ours}
    builds.update({peer: partial(TRAINING[peer], job) for peer in PEERS})
    try:
        found = race(builds, members_alone(job), list(OWN), typical=True, rounds=ROUNDS, least=LEAST, most=MOST)
    except RuntimeError as error:  # no reference: its forward draws random numbers, or rounding decides all
        return f"| {name} | not timed: {error} | | | |"
    if "ours" not in found.seconds:
        return f"| {name} | {found.wrong.get('ours') or found.failed.get('ours')} | | | |"
    middle = {one: statistics.median(seconds) for one, seconds in found.seconds.items()}
    best = min((one for one in middle if side(one) == "peer"), key=middle.__getitem__)
    pairs = [peer / own for peer, own in zip(found.seconds[best], found.seconds["ours"], strict=False)]
    low, _, high = statistics.quantiles(pairs, n=4)
    schedule = next(iter(nets[0].schedules.values()), "together") if nets else ""
    ratio = middle[best] / middle["ours"]
    return f"| {name} | {schedule} | {best} | {1e3 * middle['ours']:.3g} | {ratio:.2f} ({low:.2f} to {high:.2f}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=between(int, 0), default=0)
    for name, default in (("networks", 20), ("members", 4), ("batch", 8), ("pixels", 64)):
        parser.add_argument(f"--{name}", type=between(int, 1), default=default)
    parser.add_argument("--threads", type=between(int, 1), default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    size = f"K={args.members}, {args.batch} images of {args.pixels}×{args.pixels}, {args.threads} threads, float32"
    rows = [
        f"Training steps of timm's networks, drawn by seed {args.seed}: {size}.",
        f"`python tools/survey_speed.py {' '.join(sys.argv[1:])}`; {processor().name}; torch {torch.__version__}, "
        f"timm {timm.__version__}. Ratio: best peer's time ÷ ours, medians, and quartiles of pairs.",
        "",
        "| network | our schedule | best peer | ours, ms | ratio |",
        "|---|---|---|---|---|",
    ]
    print(*rows, sep="\n", flush=True)
    names, done = iter(drawn(args.seed)), 0
    while done < args.networks and (name := next(names, None)):
        if fits(name, args.pixels):
            began = time.perf_counter()
            rows.append(survey(name, args))
            done += 1
            print(rows[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
    if args.out:
        args.out.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
