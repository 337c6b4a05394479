"""The papers' networks by name, and a user's own by "module:callable"."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..errors import DecompkError
from ..fx.imports import imported, what_failed, why_torchvision
from .basic import cifar_resnet8, cifar_resnet32, cifar_resnet56, cifar_resnet110, resnet18x2
from .kinds import Elman, ElmanBlock, Recurrent, autoencoder, conv_autoencoder, mlp, signal_cnn, volume_cnn
from .one_tower import alexnet
from .resnet import resnet50, resnet101
from .vgg import vgg8, vgg16
from .wide import wrn_16_8

__all__ = [
    "Elman",
    "ElmanBlock",
    "Recurrent",
    "Spec",
    "alexnet",
    "autoencoder",
    "build",
    "cifar_resnet8",
    "cifar_resnet32",
    "cifar_resnet56",
    "cifar_resnet110",
    "conv_autoencoder",
    "mlp",
    "names",
    "resnet18x2",
    "resnet50",
    "resnet101",
    "signal_cnn",
    "spec",
    "vgg8",
    "vgg16",
    "volume_cnn",
    "wrn_16_8",
]


@dataclass(frozen=True)
class Spec:
    """A registered network: what builds it, the (C, H, W) it is meant for and its number of classes."""

    factory: Callable[..., nn.Module]
    input_size: tuple[int, int, int]
    num_classes: int


IMAGE, SMALL = (3, 224, 224), (3, 32, 32)
MODELS = {
    "vgg16": Spec(vgg16, IMAGE, 1000),
    "resnet50": Spec(resnet50, IMAGE, 1000),
    "resnet101": Spec(resnet101, IMAGE, 1000),
    "resnet50_food101": Spec(partial(resnet50, variant="table3.4"), IMAGE, 101),
    "resnet101_food101": Spec(partial(resnet101, variant="table3.4"), IMAGE, 101),
    "vgg8": Spec(vgg8, SMALL, 10),
    "resnet8": Spec(cifar_resnet8, SMALL, 10),
    "resnet32": Spec(cifar_resnet32, SMALL, 10),
    "resnet56": Spec(cifar_resnet56, SMALL, 10),
    "resnet110": Spec(cifar_resnet110, SMALL, 10),
    "wrn_16_8": Spec(wrn_16_8, SMALL, 100),
    "resnet18x2": Spec(resnet18x2, IMAGE, 1000),
    "alexnet": Spec(alexnet, IMAGE, 1000),
}


def names() -> tuple[str, ...]:
    """The registered networks' names."""
    return tuple(MODELS)


def spec(name: str) -> Spec:
    """What is known of a registered network. Raises DecompkError on an unknown name."""
    if name not in MODELS:
        raise DecompkError(
            f"no model is called {name!r}; give one of {', '.join(MODELS)}, or your own as module:callable."
        )
    return MODELS[name]


def build(name: str, **options: Any) -> nn.Module:
    """A new network: a registered one, or what the zero-argument callable of "module:callable" returns.

    `options` (num_classes, input_size, width, …) go to the registered network's constructor. The module is looked for
    in the current directory first. Raises DecompkError where the name, an option or the user's callable is wrong.
    """
    if ":" in name:
        return _users_own(name, options)
    factory = spec(name).factory
    known = inspect.signature(factory).parameters
    for option in options:
        if option not in known:
            raise DecompkError(f"{name} has no option {option!r}; it takes {', '.join(known)}.")
    return factory(**options)


def _users_own(name: str, options: dict[str, Any]) -> nn.Module:
    if options:
        raise DecompkError(f"'{name}' is called without arguments, so {', '.join(options)} must be set inside it.")
    path, attribute = name.split(":", 1)
    here = os.getcwd()
    sys.path.insert(0, here)  # a console script, unlike python -m, does not look there
    try:
        target = _attribute(path, attribute)
        if isinstance(target, nn.Module):
            return target
        if not callable(target):
            raise DecompkError(f"'{name}' is a {type(target).__name__}; name a function or class that makes a network.")
        try:
            model = target()
        except Exception as error:
            wrong = f"'{name}' cannot be called without arguments: {what_failed(error)}; repair it"
            raise DecompkError(f"{why_torchvision(error) or wrong}.") from error
    finally:
        sys.path.remove(here)
    if not isinstance(model, nn.Module):
        raise DecompkError(f"'{name}' returns a {type(model).__name__}; let it return a torch.nn.Module.")
    return model


def _attribute(path: str, attribute: str) -> Any:
    module = imported(path, f"no module '{path}' is found; check its name, and its path from {os.getcwd()}")
    if not hasattr(module, attribute):
        raise DecompkError(f"the module '{path}' has no '{attribute}'; name a function or class that it defines.")
    return getattr(module, attribute)
