"""What acts on a network beside its forward code, and what the division of its channels would not see."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..errors import UnsupportedOperation
from ..packed.twin import HOOKS

# By the class of a pre-hook of torch.nn.utils: what hung it up, and what takes it off again.
_TORCHS = {
    "WeightNorm": ("weight_norm", "torch.nn.utils.remove_weight_norm(module, '{}')"),
    "SpectralNorm": ("spectral_norm", "torch.nn.utils.remove_spectral_norm(module, '{}')"),
    "BasePruningMethod": ("prune", "torch.nn.utils.prune.remove(module, '{}')"),
}


def refuse_hooks(model: nn.Module) -> None:
    """Raise UnsupportedOperation, naming the module, where a network does more than its classes' forward says."""
    for path, module in model.named_modules():
        what = f"'{path}'" if path else "the network"
        if any(is_lazy(tensor) for store in (module._parameters, module._buffers) for tensor in store.values()):
            raise UnsupportedOperation(f"{what} is lazy and has no shape yet: run a batch through the network first.")
        for store in HOOKS:
            for hook in getattr(module, store).values():
                raise UnsupportedOperation(f"{what} {_of_torch(hook) or _plain(store)}.")
        if is_parametrized(module):
            name = next(iter(module.parametrizations))
            raise UnsupportedOperation(
                f"{what} computes its '{name}' by a parametrization, which the division of channels does not see: "
                f"call torch.nn.utils.parametrize.remove_parametrizations(module, '{name}') first."
            )
        if hasattr(module, "_orig_mod"):
            raise UnsupportedOperation(f"{what} is compiled: decompose the plain module, and compile what comes of it.")
        if "forward" in vars(module):
            raise UnsupportedOperation(
                f"{what} has a forward of its own beside its class's, which the division of channels does not see: "
                "delete it (del module.forward), or write a class with that forward."
            )


def refuse_parameter_hooks(model: nn.Module) -> None:
    """Raise UnsupportedOperation where a parameter has hooks: they are made for gradients of the whole network."""
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UnsupportedOperation(
                f"'{name}' has a hook on its gradient, which has another shape in a member: remove it "
                "(handle.remove()), and register one on the members' parameters."
            )


def _of_torch(hook: Any) -> str | None:
    """What a hook of torch.nn.utils does, and how it is taken off."""
    for klass in type(hook).__mro__:
        if klass.__name__ in _TORCHS and klass.__module__.startswith("torch.nn.utils"):
            name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", "weight")
            kind, remedy = _TORCHS[klass.__name__]
            return (
                f"computes its '{name}' in a hook of torch.nn.utils.{kind}, which the division of channels does not "
                f"see: call {remedy.format(name)} first"
            )
    return None


def _plain(store: str) -> str:
    kind = store.strip("_").removesuffix("s").replace("_", " ").replace("pre hook", "pre-hook")
    return (
        f"has a {kind}, which the division of channels does not see: remove it (handle.remove()), and register it on "
        "the members"
    )
