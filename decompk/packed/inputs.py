"""Whether an input is one batch for all members or one per member, and what is wrong with it if neither."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..crops import Part, by
from ..errors import PackError, PartitionError
from ..fx.pytree import tree_map
from ..fx.unseen import possible, unseen
from .roles import takes
from .trial import Trial

if TYPE_CHECKING:
    from ..divide.decompose import Decomposition


def fits(net: nn.Module, K: int, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> bool | None:
    """Whether a member takes x as one batch for all (True), or as one per member (False); None if nobody can tell.

    Raises PackError where it takes both.
    """
    if not x.numel() or not possible([x]):
        return None

    def each(leaf: Any) -> Any:
        alike = isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[0] == x.shape[0]
        return leaf[:1].expand(K, *leaf.shape[1:]) if alike else leaf

    with unseen():
        one = takes(Trial(net, K, args, kwargs, True, x.shape[0]))
        args, kwargs = tree_map(each, (args, kwargs))
        own = takes(Trial(net, K, args, kwargs, False, x.shape[1]))
    if one and own and not (x.dim() > 3 and x.shape[1] == 1):  # images of one channel, not members' of one sample
        raise PackError(
            f"an input of {tuple(x.shape)} may be one batch for all members or one per member: tell pack with "
            f"input_dims={x.dim()} or input_dims={x.dim() - 1}, the number of dimensions of one member's batch."
        )
    return one if one or own else None


def check_image(spatial: tuple[int, ...], crops: tuple[Part, ...], decomposition: Decomposition | Any) -> None:
    """Raise PartitionError where an image of these many pixels cannot be cut."""
    whole = getattr(decomposition, "input_size", spatial)[-len(spatial) :]
    if tuple(whole) != spatial:
        raise PartitionError(
            f"an image of {by(spatial)} pixels does not fit this packed module, which was "
            f"decomposed for {by(whole)}{decomposition.origin}; resize it, or decompose for its input_size=."
        )
    for crop in crops:
        if any(stop > pixels for stop, pixels in zip(crop.stop, spatial, strict=True)):
            raise PartitionError(f"{crop} does not fit an image of {by(spatial)} pixels.")


def misfit(shape: tuple[int, ...], dims: int, K: int, cuts: bool, decomposition: Decomposition | Any) -> Exception:
    """The error of an input that is neither one batch of `dims` dimensions nor one per member."""
    if cuts:
        whole = getattr(decomposition, "input_size", None)
        vectors = whole is not None and len(whole) == 1 and math.prod(shape[1:]) == whole[0]
        if vectors:
            return PartitionError(
                f"an input of {shape} is no batch of vectors, which the members divide: give it x.flatten(1)."
            )
        return PartitionError(
            f"an input of {shape} is neither a global batch of {dims} dimensions nor ({K}, N, C, …) crops."
        )
    return PackError(
        f"an input of {shape} is neither one batch of {dims} dimensions for all members nor ({K}, N, …) of "
        f"{dims + 1}; if the members' batches have another number of dimensions, tell pack with input_dims=."
    )
