"""Which channels must share an owner, and how every tensor's channels are then divided into K equal parts.

A *strand* is one channel of a convolution's output followed through everything that only moves or combines it:
`cat`, `chunk`, additions, gates. Every tensor holds its strands in an order of its own. A division is right when it
cuts each of these arrays into K parts of equal length, because then a member's local operation (its half of a
`chunk`, its side of a `cat`) picks exactly the member's strands. Runs of strands that no array tears apart are
*atoms*; cutting every atom into K even pieces, in order, is such a division.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import PartitionError

_UNSET, _TORN = -1, -2


class Strands:
    def __init__(self) -> None:
        self._parent = np.zeros(0, dtype=np.int64)
        self._required: list[tuple[np.ndarray, Callable[[], str]]] = []
        self._given: list[tuple[np.ndarray, np.ndarray]] = []

    def new(self, count: int) -> np.ndarray:
        """`count` strands that nothing ties yet."""
        first = len(self._parent)
        ids = np.arange(first, first + count)
        self._parent = np.concatenate([self._parent, ids])
        return ids

    def roots(self, ids: np.ndarray) -> np.ndarray:
        roots = self._parent[ids]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                return roots
            roots = above

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Strand a[i] and strand b[i] belong to the same member, for every i."""
        a, b = self.roots(a.reshape(-1)), self.roots(b.reshape(-1))
        differ = a != b
        for x, y in zip(a[differ].tolist(), b[differ].tolist(), strict=True):
            while self._parent[x] != x:
                x = int(self._parent[x])
            while self._parent[y] != y:
                y = int(self._parent[y])
            self._parent[max(x, y)] = min(x, y)

    def give(self, ids: np.ndarray, owner: np.ndarray) -> None:
        """Strand ids[i] belongs to member owner[i]: the input's own division."""
        self._given.append((ids.reshape(-1), owner.reshape(-1)))

    def require(self, ids: np.ndarray, where: Callable[[], str]) -> None:
        """The tensor at `where` holds these strands in this order: each member must own 1/K of them."""
        self._required.append((ids, where))

    def owners(self, members: int) -> np.ndarray:
        """The owner of every strand (0 … K−1). Raises PartitionError naming the tensor that cannot be divided."""
        arrays = [self.roots(ids) for ids, _ in self._required]
        following = np.full(len(self._parent) + 1, _UNSET)
        preceding = np.full(len(self._parent) + 1, _UNSET)
        end = len(self._parent)
        for ids in arrays:
            _note(following, ids, np.append(ids[1:], end))
            _note(preceding, ids, np.append(end, ids[:-1]))

        ids = np.unique(np.concatenate(arrays)) if arrays else np.zeros(0, dtype=np.int64)
        linked = following.copy()  # linked[a] = b where b follows a in every array that holds either
        inside = (following[ids] >= 0) & (following[ids] < end)
        linked[ids[~inside]] = end
        chained = ids[inside]
        linked[chained[preceding[following[chained]] != chained]] = end

        heads = np.setdiff1d(ids, linked[ids])
        owner = np.full(len(self._parent), -1)
        known = self._known()
        for head in heads.tolist():
            atom = [head]
            while linked[atom[-1]] != end:
                atom.append(int(linked[atom[-1]]))
            if (known[atom] >= 0).all():
                owner[atom] = known[atom]
                continue
            if len(atom) % members:
                raise PartitionError(self._why_not(atom, arrays, members))
            owner[atom] = np.repeat(np.arange(members), len(atom) // members)
        if self._given:
            self._check_even(owner, arrays, members)
        return owner[self.roots(np.arange(len(self._parent)))] if len(self._parent) else owner

    def _known(self) -> np.ndarray:
        """The owner of every strand that the input's division gives one, else -1."""
        known = np.full(len(self._parent), -1)
        for ids, owner in self._given:
            roots = self.roots(ids)
            known[roots] = owner
            if (known[roots] != owner).any():
                raise PartitionError(
                    "features of different members are added to each other: divide the input so that what is added "
                    "has one owner."
                )
        return known

    def _check_even(self, owner: np.ndarray, arrays: list[np.ndarray], members: int) -> None:
        """Every tensor must hold as many strands of one member as of any other."""
        for ids, (_, where) in zip(arrays, self._required, strict=True):
            counts = np.bincount(owner[ids], minlength=members)
            if counts.min() != counts.max():
                raise PartitionError(
                    f"of the {len(ids)} features at {where()}, the input's division gives the members between "
                    f"{counts.min()} and {counts.max()}; choose index sets that share them equally."
                )

    def _why_not(self, atom: list[int], arrays: list[np.ndarray], members: int) -> str:
        holding = [i for i, ids in enumerate(arrays) if atom[0] in ids]
        smallest = min(holding, key=lambda i: len(arrays[i]))
        return (
            f"the {len(arrays[smallest])} channels at {self._required[smallest][1]()} are used in runs of {len(atom)}, "
            f"which {members} members cannot share equally; choose a number of partitions that divides {len(atom)}."
        )


def _note(neighbour: np.ndarray, ids: np.ndarray, found: np.ndarray) -> None:
    """Remember every strand's neighbour in one array; two different ones tear the strand off."""
    order = np.argsort(ids, kind="stable")
    first = np.searchsorted(ids[order], ids[order])
    occurrence = np.arange(len(ids)) - first  # a strand may stand in an array twice: beside its depthwise image
    for nth in range(occurrence.max() + 1 if len(ids) else 0):
        at = order[occurrence == nth]
        known = neighbour[ids[at]]
        neighbour[ids[at]] = np.where(known == _UNSET, found[at], np.where(known == found[at], known, _TORN))
