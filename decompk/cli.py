"""The `decompk` command.

Exit codes: 0 done, 1 a check failed, 2 the arguments or the input are wrong, 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import demos, models
from .divide.decompose import Decomposition, decompose
from .errors import DecompkError
from .profile import draw_roofline, measure, write_trace
from .report.bench import fill_readme, read, write_page
from .report.crowd import crowded
from .report.info import info
from .report.paper import paper_report
from .report.splitnet import splitnet_report
from .report.table import FORMATS
from .splitnet.run import Settings
from .splitnet.run import run as run_split
from .train.recipe import toml_value
from .train.run import run as run_training

NETWORKS = ("cnn", *demos.DEMOS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake ends in one sentence on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except DecompkError as error:
        print(f"decompk: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("decompk", description="Train K networks for little more than the price of one.")
    commands = parser.add_subparsers(required=True, metavar="command")

    report = commands.add_parser("report", help="what a decomposition saves, layer by layer, beside the paper's ratios")
    _add_decomposition(report)
    instead = report.add_mutually_exclusive_group()
    instead.add_argument(
        "--paper", action="store_true", help="every analytic table of the papers: printed, ours, verdict"
    )
    instead.add_argument(
        "--splitnet",
        nargs="?",
        type=Path,
        const=True,
        metavar="FOLDER",
        help="SplitNet's tables: printed, ours, verdict; and what `decompk split` has learnt in FOLDER",
    )
    report.set_defaults(run=_report)

    check = commands.add_parser("check", help="that analysis held against measurement here: exit code 1 if it fails")
    _add_decomposition(check)
    check.add_argument("--batch", type=int, default=4, help="samples of a training step (default 4)")
    check.add_argument("--time", action=argparse.BooleanOptionalAction, default=True, help="also time it (default)")
    check.add_argument("--plot", type=Path, metavar="FILE.png", help="draw every layer under the device's roofs")
    check.add_argument("--trace", type=Path, metavar="FILE.json", help="a Chrome trace of one packed training step")
    check.set_defaults(run=_check)

    demo = commands.add_parser("demo", help="Algorithm 1 on real digits, from start to figures: two minutes")
    demo.add_argument(
        "--network",
        choices=NETWORKS,
        default=NETWORKS[0],
        help="cnn (default), or another kind of section 2.4 on data that fits it: ten seconds to two minutes",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="folder for all that is made (default %(default)s)"
    )
    demo.add_argument("--epochs", type=_epochs, help="members,global (default: those of the preset quick)")
    demo.add_argument("--seed", type=int, default=0, help="of the one training (default 0)")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="Algorithm 1 from data to the composed, trained network")
    train.add_argument(
        "--data", help="digits (default), FILE.npz, a folder of images, cifar10:ROOT, cifar100:ROOT, food101:ROOT"
    )
    train.add_argument("--preset", help="quick, cifar or food101 (default: what fits the data)")
    train.add_argument("--config", type=Path, help="a recipe in TOML: what it says goes before the preset")
    train.add_argument("--model", help=f"{', '.join(models.names())}, or module:callable (default: the recipe's)")
    train.add_argument("--seeds", help="one training for each, such as 0,1,2 (default: the recipe's)")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any value of the recipe: members.epochs=3"
    )
    train.add_argument(
        "--out", type=Path, default=Path("train-out"), help="folder for all that is made (default %(default)s)"
    )
    train.add_argument("--resume", action="store_true", help="go on where the training in --out was stopped or killed")
    train.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
    train.add_argument("--workers", type=int, default=0, help="processes that decode images (default 0)")
    train.add_argument("--tensorboard", action="store_true", help="write TensorBoard's events, too")
    train.set_defaults(run=_train)

    split = commands.add_parser("split", help="SplitNet: learn groups of channels, split, fine-tune, compare")
    split.add_argument("--model", default="wrn_16_8", help="wrn_16_8 (default), alexnet or resnet18x2")
    split.add_argument("--data", default="digits", help="digits (default), or what `decompk train` takes")
    split.add_argument("--pixels", type=int, help="of digits and files (default 16 for wrn_16_8 on digits)")
    split.add_argument(
        "--width", type=int, help="of the first stage (default 2 for wrn_16_8 on digits, or the model's)"
    )
    split.add_argument("--augment", action="store_true", help="flip and shift the training images")
    split.add_argument("--variants", help='such as "dense,Deep,Deep random,Deep overlap,SSL 1.1" (default: all)')
    split.add_argument("--epochs", help="whole, learning groups, fine-tuning (default 6,8,6)")
    split.add_argument("--seeds", default="0,1,2", help="one training of every variant for each (default 0,1,2)")
    split.add_argument(
        "--out",
        type=Path,
        default=Path("split-out"),
        help="folder for all that is made; a run goes on (default %(default)s)",
    )
    split.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
    split.set_defaults(run=_split)

    bench = commands.add_parser("bench-report", help="results of `pytest bench --benchmark-only` as a page with plots")
    bench.add_argument("results", nargs="+", type=Path, metavar="FILE_OR_DIR", help="or every bench.json below")
    bench.add_argument(
        "--out",
        type=Path,
        default=Path("bench/results/README.md"),
        help="the page; pictures beside it (default %(default)s)",
    )
    bench.add_argument("--readme", type=Path, help="a file whose part between the bench marks is written anew")
    bench.set_defaults(run=_bench_report)

    info = commands.add_parser("info", help="what is available here, and why the rest is not")
    info.set_defaults(run=_info)
    for command in (report, check, info):
        command.add_argument("--format", choices=FORMATS, default="table", help="what is printed (default table)")
    return parser


def _add_decomposition(command: argparse.ArgumentParser) -> None:
    """The arguments that _decomposition reads."""
    command.add_argument(
        "--model", default="resnet50", help=f"{', '.join(models.names())}, or module:callable (default resnet50)"
    )
    command.add_argument("--partitions", default="4", help="a number, or rows and columns such as 2x4 (default 4)")
    command.add_argument("--input", help="pixels: 224, or 224x160 (default: what the model is meant for)")
    command.add_argument("--channels", type=int, default=3, help="input channels of your own model (default 3)")
    command.add_argument(
        "--size", help="the whole input of your own model: 64 (a vector), 8x12 (a sequence), 1x20x20x20 (a volume)"
    )
    command.add_argument("--crop", help="pixels of a crop, 140 or 140x96 (default: no overlap)")
    command.add_argument("--margin", type=int, default=0, help="pixels cut off every border first (default 0)")


def _decomposition(arguments: argparse.Namespace, device: str) -> Decomposition:
    """The decomposition that the arguments name, a registered model on `device`, your own on the CPU."""
    if arguments.size and (":" not in arguments.model or arguments.input):
        raise DecompkError("--size is for a model of your own, in place of --input and --channels.")
    if ":" in arguments.model:
        size = (arguments.channels, *_sizes(arguments.input or "224", "--input", repeat=2))
        size = _sizes(arguments.size, "--size", repeat=1) if arguments.size else size
        with torch.device("cpu"):
            model = models.build(arguments.model)
    else:
        known = models.spec(arguments.model)
        size = (known.input_size[0], *_sizes(arguments.input, "--input", 2)) if arguments.input else known.input_size
        takes_size = "input_size" in inspect.signature(known.factory).parameters
        with torch.device(device):
            model = models.build(arguments.model, **({"input_size": size} if takes_size else {}))
    parts = _sizes(arguments.partitions, "--partitions", repeat=1)
    crop = _sizes(arguments.crop, "--crop", repeat=len(size[1:] or size)) if arguments.crop else None
    return decompose(model, size, parts[0] if len(parts) == 1 else parts, crop, arguments.margin)


def _report(arguments: argparse.Namespace) -> int:
    if arguments.paper:
        print(paper_report(arguments.format).rstrip("\n"))
        return 0
    if arguments.splitnet:
        folder = None if arguments.splitnet is True else arguments.splitnet
        print(splitnet_report(arguments.format, folder).rstrip("\n"))
        return 0
    d = _decomposition(arguments, "meta")  # only shapes matter here
    print(d.report().render(arguments.format).rstrip("\n"))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """0 where every claim holds, 1 where one fails. The files are written in either case."""
    for option, path in (("--plot", arguments.plot), ("--trace", arguments.trace)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise DecompkError(f"{option} {str(path)!r} is no file in a folder that exists.")
    if arguments.plot and not arguments.time:
        raise DecompkError("--plot draws times: leave out --no-time.")
    d = _decomposition(arguments, "cpu")
    profile = measure(d, arguments.batch, time=arguments.time, progress=True)
    if arguments.plot:
        draw_roofline(profile, arguments.plot)
    if arguments.trace:
        write_trace(d, arguments.trace, arguments.batch)
    print(profile.render(arguments.format).rstrip("\n"))
    return 1 if profile.failed else 0


def _sizes(text: str, option: str, repeat: int) -> tuple[int, ...]:
    """'224' → (224,) * repeat; '2x4' or '2,4' → (2, 4)."""
    numbers = re.split(r"[x×,]", text)
    if not all(number.strip().isdigit() for number in numbers):
        raise DecompkError(f"{option} {text!r} is not a number or a pair such as 2x4.")
    return tuple(map(int, numbers)) * (repeat if len(numbers) == 1 else 1)


def _epochs(text: str) -> tuple[int, int]:
    numbers = text.split(",")
    if len(numbers) != 2 or not all(n.isdigit() and int(n) > 0 for n in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not two positive numbers such as 16,6")
    return int(numbers[0]), int(numbers[1])


def _demo(arguments: argparse.Namespace) -> int:
    """`train` with the preset quick and one seed; what is there already is not trained again. Or another network."""
    _advise(None)
    if arguments.network != NETWORKS[0]:
        result = demos.run(arguments.network, arguments.out, arguments.seed, arguments.epochs)
        print(result.table.render().rstrip("\n"))
        print(f"The figure, the weights and this table: {arguments.out}/{arguments.network}*")
        return 1 if result.failed else 0
    changes: dict[str, Any] = {"seeds": [arguments.seed]}
    if arguments.epochs:
        members, others = arguments.epochs
        changes |= {"members.epochs": members, "global.epochs": others, "random.epochs": members + others}
    run_training(arguments.out, "digits", "quick", changes=changes, resume=True)
    return 0


def _advise(device: str | None) -> None:
    """Say on stderr, before a training on a CPU, that its threads will get in the way of other work."""
    on_cpu = device == "cpu" if device else not torch.cuda.is_available()
    advice = crowded() if on_cpu else None
    if advice:
        print(f"decompk: {advice}", file=sys.stderr)


def _train(arguments: argparse.Namespace) -> int:
    _advise(arguments.device)
    changes = dict(_setting(text) for text in arguments.set)
    if arguments.model:
        changes["model"] = arguments.model
    if arguments.seeds:
        changes["seeds"] = list(_sizes(arguments.seeds, "--seeds", repeat=1))
    run_training(
        arguments.out,
        data=arguments.data,
        preset=arguments.preset,
        config=arguments.config,
        changes=changes,
        resume=arguments.resume,
        device=arguments.device,
        workers=arguments.workers,
        tensorboard=arguments.tensorboard,
    )
    return 0


def _split(arguments: argparse.Namespace) -> int:
    epochs = _sizes(arguments.epochs, "--epochs", repeat=3) if arguments.epochs else Settings.epochs
    if len(epochs) != 3 or min(epochs) < 1:
        raise DecompkError("--epochs are three positive numbers such as 6,8,6.")
    small = (arguments.model, arguments.data) == ("wrn_16_8", "digits")  # what two cores train in minutes
    settings = Settings(
        model=arguments.model,
        width=_positive(arguments.width, "--width") or (Settings.width if small else None),
        data=arguments.data,
        pixels=_positive(arguments.pixels, "--pixels") or (Settings.pixels if small else None),
        augment=arguments.augment,
        epochs=epochs,
    )
    names = tuple(arguments.variants.split(",")) if arguments.variants else None
    table = run_split(arguments.out, _sizes(arguments.seeds, "--seeds", 1), settings, names, arguments.device)
    if os.environ.get("RANK", "0") == "0":
        print(table.render().rstrip("\n"))
        print(f"Weights, figures, result.json and this table: {arguments.out}")
    return 0


def _positive(number: int | None, option: str) -> int | None:
    if number is not None and number < 1:
        raise DecompkError(f"{option} {number} is not a positive number.")
    return number


def _setting(text: str) -> tuple[str, Any]:
    """'members.epochs=3' → ("members.epochs", 3)."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise DecompkError(f"--set {text!r} is not KEY=VALUE, such as members.epochs=3.")
    return key.strip(), toml_value(value.strip())


def _bench_report(arguments: argparse.Namespace) -> int:
    runs = read(arguments.results)
    print(*write_page(runs, arguments.out), sep="\n")
    if arguments.readme:
        fill_readme(runs, arguments.readme, arguments.out)
    return 0


def _info(arguments: argparse.Namespace) -> int:
    print(info().render(arguments.format).rstrip("\n"))
    return 0
