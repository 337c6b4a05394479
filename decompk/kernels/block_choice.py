"""Who computes with a weight of R × S blocks, of which a mask says which are kept: from shapes alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DecompkError

Mask = tuple[tuple[bool, ...], ...]
BlockMask = str | Tensor | Sequence[Sequence[int]]


def mask_text(block_mask: BlockMask) -> str:
    """The mask as the operators take it: rows of 1 (kept) and 0 (skipped) with a slash between them, "10/01"."""
    if isinstance(block_mask, Tensor):
        if block_mask.device.type != "cpu":
            raise DecompkError(
                f"block_mask is on {block_mask.device}, where reading it would synchronise: give it on the CPU, as a "
                "tensor or as tuples of bools."
            )
        if torch.compiler.is_compiling():
            raise DecompkError("in compiled code block_mask is text or tuples of bools: give mask_text(block_mask).")
        block_mask = block_mask.tolist()
    if not isinstance(block_mask, str):
        try:
            to_text = _text if torch.compiler.is_compiling() else _text_cached  # compiled code knows no cache
            block_mask = to_text(tuple(map(tuple, block_mask)))
        except (TypeError, ValueError):
            raise DecompkError("block_mask has two dimensions: give rows of bools, one for each block.") from None
    rows = block_mask.split("/")
    if not rows[0] or block_mask.strip("01/") or any(len(row) != len(rows[0]) for row in rows):
        raise DecompkError(f"block_mask {block_mask!r} is not a rectangle of blocks that are kept (1) or skipped (0).")
    return block_mask


def _text(mask: Mask) -> str:
    return "/".join("".join(str(int(block)) if block in (0, 1) else "?" for block in row) for row in mask)


_text_cached = functools.lru_cache(maxsize=1024)(_text)


class Group(NamedTuple):
    """Output blocks that read the same input blocks."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class BlockChoice:
    """Who computes a mask, and why; one object a question, so that what hangs on it is found by identity.

    `form`: "grouped" (the kept blocks are the diagonal: `grouped_conv2d`), "dense" (torch's operator on the masked
    weight), "rows" (torch's operator once for all block rows that keep the same columns), "blocks" (one Triton launch).
    `mask` is the given one in the largest blocks that say the same, of `out_block` × `in_block` channels; `kept` is the
    share of its blocks that is kept.
    """

    form: str
    reason: str
    mask: Mask
    out_block: int
    in_block: int
    kept: float

    @functools.cached_property
    def by_rows(self) -> tuple[Group, ...]:
        """Every block row once, grouped by the columns that it keeps."""
        return grouped(self.mask)

    @functools.cached_property
    def by_columns(self) -> tuple[Group, ...]:
        """Every block column once, grouped by the rows that keep it."""
        return tuple(Group(rows, columns) for columns, rows in grouped(transpose(self.mask)))

    @property
    def blocks(self) -> int:
        """How many blocks are kept."""
        return sum(map(sum, self.mask))

    def __str__(self) -> str:
        size = f"{len(self.mask)}×{len(self.mask[0])} blocks of {self.out_block}×{self.in_block} channels"
        return f"{self.form}: {self.kept:.0%} of {size} kept, {self.reason}"


def choose_blocks(
    block_mask: BlockMask,
    out_channels: int,
    in_channels: int,
    backend: str = "torch",
    taps: int = 1,
    positions: int | None = None,
) -> BlockChoice:
    """The BlockChoice for a weight of out_channels × in_channels × taps on `backend`, "torch" or "triton".

    `positions`: samples · output pixels; without it they are taken to be plenty. Raises DecompkError for channels that
    do not divide into the blocks.
    """
    found = _choice(mask_text(block_mask), out_channels, in_channels, backend)
    if found.form == "rows" and found.blocks and positions is not None:
        call, copy = CALL_MACS[backend], COPY_MACS[backend][taps > 1]
        moved = out_channels + found.in_block * sum(len(group.columns) for group in found.by_rows)
        saved = (1 - found.kept) * positions * out_channels * in_channels * taps
        if saved < call * len(found.by_rows) + copy * positions * moved:
            return with_form(found, "dense", "skipping saves less than a call for every set of columns costs")
    return found


# Shares of kept blocks from which the dense operator is taken. For Triton a guess, not measured.
DENSE_FROM = {"torch": 0.75, "triton": 0.5}
# What the form "rows" costs, in multiply-accumulates: a call, and a value copied for it, in products and convolutions.
# On a CPU fitted to dense / rows in ms: 128→128, 3×3 at 28², N=8, 16² blocks, 24 % kept: 115 / 96, 51 %: 101 / 142;
# 512→512 on 2048 rows: 59 / 35 and 66 / 64. On a GPU derived from launch time and bandwidth, not measured.
CALL_MACS = {"torch": 2**22, "triton": 2**30}
COPY_MACS = {"torch": (40, 100), "triton": (500, 500)}
LEAST_BLOCK = 8  # channels of a block that Triton takes unasked: of fewer most lanes of its products would idle


@functools.lru_cache(maxsize=4096)
def _choice(text: str, out_channels: int, in_channels: int, backend: str) -> BlockChoice:
    check_division(text, out_channels, in_channels)
    given = tuple(tuple(block == "1" for block in row) for row in text.split("/"))
    mask = transpose(_merged(transpose(_merged(given))))
    R, S = len(mask), len(mask[0])
    blocks = out_channels // R, in_channels // S
    kept = sum(map(sum, mask)) / (R * S)
    sets = len(grouped(mask))
    if R > 1 and is_diagonal(mask):
        form, reason = "grouped", f"{R} independent groups"
    elif kept >= DENSE_FROM[backend]:
        form, reason = "dense", "nothing to skip" if kept == 1 else "too little to skip"
    elif backend == "triton" and min(blocks) >= LEAST_BLOCK:
        form, reason = "blocks", "one launch over the kept blocks"
    else:
        form, reason = "rows", f"{sets} set{'s' * (sets > 1)} of columns"
    return BlockChoice(form, reason, mask, *blocks, kept)


def check_division(text: str, out_channels: int, in_channels: int) -> None:
    rows = text.split("/")
    for channels, blocks, kind, where in (
        (out_channels, len(rows), "output", "rows"),
        (in_channels, len(rows[0]), "input", "columns"),
    ):
        if channels % blocks:
            raise DecompkError(f"{channels} {kind} channels do not divide into the {blocks} {where} of block_mask.")


@functools.lru_cache(maxsize=1024)
def with_form(found: BlockChoice, form: str, reason: str) -> BlockChoice:
    return replace(found, form=form, reason=reason)


def is_diagonal(mask: Mask) -> bool:
    """Whether each block row keeps the block of its own number alone."""
    return len(mask) == len(mask[0]) and all(
        keep == (r == s) for r, row in enumerate(mask) for s, keep in enumerate(row)
    )


def transpose(mask: Mask) -> Mask:
    return tuple(zip(*mask, strict=True))


def _merged(mask: Mask) -> Mask:
    """The fewest rows that, each repeated equally often, are the mask."""
    for height in range(len(mask), 0, -1):
        if len(mask) % height == 0 and all(row == mask[r - r % height] for r, row in enumerate(mask)):
            return mask[::height]
    raise AssertionError("every mask is its own rows repeated once")


def grouped(mask: Mask) -> tuple[Group, ...]:
    groups: dict[tuple[bool, ...], list[int]] = {}
    for r, row in enumerate(mask):
        groups.setdefault(row, []).append(r)
    return tuple(Group(tuple(rows), tuple(s for s, keep in enumerate(row) if keep)) for row, rows in groups.items())
