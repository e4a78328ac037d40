"""Sets of whole numbers made of intervals, and what a boolean mix of windows and prefixes comes down to.

A window is an interval of the distance j - i, a prefix is a half line of j. Cut the key axis at the ends of
the prefixes: inside a piece, any boolean mix of windows and prefixes is a set of distances alone. The
distances that occur in a tile are an interval without gaps, so comparing it with the set tells exactly
whether some or every pair of the tile is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

__all__ = ["EMPTY", "FAR", "FULL", "Intervals", "Piece", "Threshold", "cut", "key_of", "tile_bounds"]

FAR = 1 << 60  # stands for infinity; beyond any position, and sums of two still fit in int64
Threshold = int | Tensor  # a prefix: j < n, with n a number or one number per batch item
MOST_TENSORS = 3  # thresholds of unknown order double the pieces


@dataclass(frozen=True)
class Intervals:
    """Disjoint intervals `(low, high)` of whole numbers, ends included, ascending, never adjacent."""

    parts: tuple[tuple[int, int], ...]

    @staticmethod
    def of(low: int | None, high: int | None) -> Intervals:
        """The interval from `low` to `high`; None is unbounded."""
        return Intervals(((-FAR if low is None else low, FAR if high is None else high),))

    def __invert__(self) -> Intervals:
        ends = [-FAR - 1, *(end for part in self.parts for end in part), FAR + 1]
        gaps = ((a + 1, b - 1) for a, b in zip(ends[::2], ends[1::2], strict=True))
        return Intervals(tuple((low, high) for low, high in gaps if low <= high))

    def __and__(self, other: Intervals) -> Intervals:
        common = [(max(a, c), min(b, d)) for a, b in self.parts for c, d in other.parts]
        return Intervals(tuple(sorted((low, high) for low, high in common if low <= high)))

    def __or__(self, other: Intervals) -> Intervals:
        return ~(~self & ~other)


FULL = Intervals.of(None, None)
EMPTY = Intervals(())


@dataclass(frozen=True)
class Piece:
    """Keys `low <= j <= high`, within or beyond some thresholds, that may be seen at some distances j - i."""

    low: int
    high: int
    within: tuple[Tensor, ...]
    beyond: tuple[Tensor, ...]
    distances: Intervals


def key_of(threshold: Threshold) -> object:
    """What tells thresholds apart without looking into tensors."""
    return ("tensor", id(threshold)) if isinstance(threshold, Tensor) else threshold


def cut(thresholds: Sequence[Threshold]) -> list[tuple[Piece, dict[object, bool]]] | None:
    """The key axis in pieces, each with the truth of every threshold there; None if there are too many."""
    numbers = sorted({n for n in thresholds if not isinstance(n, Tensor)})
    ends = [0, *(n for n in numbers if n > 0), FAR]  # keys start at 0
    tensors = list({id(n): n for n in thresholds if isinstance(n, Tensor)}.values())
    if len(tensors) > MOST_TENSORS:
        return None
    found = []
    for sides in product((True, False), repeat=len(tensors)):
        within = tuple(n for n, side in zip(tensors, sides, strict=True) if side)
        beyond = tuple(n for n, side in zip(tensors, sides, strict=True) if not side)
        for low, high in pairwise(ends):
            truth: dict[object, bool] = {key_of(n): low < n for n in numbers}
            truth |= {key_of(n): side for n, side in zip(tensors, sides, strict=True)}
            found.append((Piece(low, high - 1, within, beyond, EMPTY), truth))
    return found


def tile_bounds(
    pieces: Sequence[Piece], b: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor
) -> tuple[Tensor, Tensor]:
    """Exactly whether some and whether every pair of each tile is allowed."""
    some = torch.zeros((), dtype=torch.bool, device=j0.device)
    every = torch.ones((), dtype=torch.bool, device=j0.device)
    for piece in pieces:
        first, last = j0.clamp(min=piece.low), j1.clamp(max=piece.high)
        for n in piece.within:
            last = torch.minimum(last, n.to(j0)[b] - 1)
        for n in piece.beyond:
            first = torch.maximum(first, n.to(j0)[b])
        occurs = first <= last
        nearest, farthest = first - i1, last - i0
        any_here = all_here = torch.zeros((), dtype=torch.bool, device=j0.device)
        for low, high in piece.distances.parts:
            any_here = any_here | ((farthest >= low) & (nearest <= high))
            all_here = all_here | ((nearest >= low) & (farthest <= high))
        some = some | (occurs & any_here)
        every = every & (~occurs | all_here)
    return some, every
