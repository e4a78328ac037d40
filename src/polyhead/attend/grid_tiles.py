"""A grid cut into tiles: the queries of a box, and the box of all keys that they see.

A window begins and ends no earlier for a later query. So the windows of a run of queries on an axis cover a
run of keys, and on several axes boxes cover boxes. Runs that see their keys in the same pattern are of one
kind: away from the borders there is one kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from polyhead.attend.masks.neighborhood import Axis

__all__ = ["Kind", "Run", "kinds", "runs", "sizes"]

_OVERHEAD = 40  # reading a key costs a tile as much as so many queries of it
_KIND = 40_000  # what a kind of tiles costs, in pairs
_PAIRS = 1 << 21  # of a tile that needs a table of who sees what


@dataclass(frozen=True)
class Run:
    """Some queries of one dilation group on an axis, and the keys that they see.

    Attributes:
        queries, keys: places on the axis.
        first, last: for each query the first and the last key that it sees, counted from the first of `keys`.
    """

    queries: range
    keys: range
    first: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def full(self) -> bool:
        """Whether every query sees every key."""
        return not any(self.first) and all(last == len(self.keys) - 1 for last in self.last)

    def table(self) -> Tensor:
        """Who sees what, bool `(queries, keys)`."""
        key = torch.arange(len(self.keys))
        first, last = torch.tensor(self.first), torch.tensor(self.last)
        return (key >= first[:, None]) & (key <= last[:, None])


@lru_cache(maxsize=256)
def runs(axis: Axis, size: int) -> tuple[Run, ...]:
    """All queries of an axis in runs of `size`, group by group; the last run of a group may be shorter."""
    found = []
    step = axis.dilation
    for remainder in range(min(step, axis.length)):
        count = len(range(remainder, axis.length, step))
        p = torch.arange(count)
        first, last = (edge.tolist() for edge in axis.keys(p, torch.full_like(p, remainder)))
        for start in range(0, count, size):
            stop = min(start + size, count)
            low, high = first[start], last[stop - 1]
            queries = range(remainder + step * start, remainder + step * (stop - 1) + 1, step)
            keys = range(remainder + step * low, remainder + step * high + 1, step)
            begins, ends = (tuple(edge - low for edge in side[start:stop]) for side in (first, last))
            found.append(Run(queries, keys, begins, ends))
    return tuple(found)


@lru_cache(maxsize=256)
def _patterns(axis: Axis, size: int) -> tuple[tuple[Run, ...], ...]:
    """The runs of an axis, those that see their keys in the same pattern together."""
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Run]] = {}
    for run in runs(axis, size):
        found.setdefault((run.first, run.last), []).append(run)
    return tuple(map(tuple, found.values()))


@lru_cache(maxsize=256)
def sizes(axes: tuple[Axis, ...], heads: int) -> tuple[int, ...]:
    """How many queries of every axis a tile should have, if `heads` heads are computed at once."""
    best = math.inf
    least: tuple[int, ...] = ()
    for choice in product(*(_candidates(axis, len(axes) == 1) for axis in axes)):
        ways = [_patterns(axis, size) for axis, size in zip(axes, choice, strict=True)]
        largest = [max(way, key=lambda own: len(own[0].first) * len(own[0].keys))[0] for way in ways]
        rows, cols = (math.prod(len(getattr(run, name)) for run in largest) for name in ("queries", "keys"))
        pairs = math.prod(sum(len(own) * len(own[0].keys) for own in way) for way in ways)
        # the kernel works on 32 queries at once
        cost = pairs * (-(-rows // 32) * 32 + _OVERHEAD) + _KIND / heads * math.prod(map(len, ways))
        if not all(run.full for run in largest):
            cost *= max(1.0, rows * cols / _PAIRS)
        if cost < best:
            best, least = cost, choice
    return least


def _candidates(axis: Axis, alone: bool) -> list[int]:
    """Lengths of runs that fit the stride: whatever shares a window is not cut oddly."""
    most = -(-axis.length // axis.dilation)
    odd = axis.stride // (axis.stride & -axis.stride)
    found = [odd << n for n in range(13) if (16 if alone else 1) <= odd << n < most]
    return [*found, most] if most <= 4096 or not found else found


@dataclass(frozen=True)
class Kind:
    """Tiles in which the same queries see the same keys, counted from the tile's first.

    Attributes:
        axes: for every axis its runs; the tiles are all their combinations.
    """

    axes: tuple[tuple[Run, ...], ...]

    def queries(self, grid: Sequence[int]) -> Tensor:
        """Positions `(tiles, r)`."""
        return _positions([[run.queries for run in own] for own in self.axes], grid)

    def keys(self, grid: Sequence[int]) -> Tensor:
        """Positions `(tiles, n)`."""
        return _positions([[run.keys for run in own] for own in self.axes], grid)

    def table(self) -> Tensor | None:
        """Who sees what, bool `(r, n)`; None: everybody everything."""
        if all(own[0].full for own in self.axes):
            return None
        found = torch.ones(1, 1, dtype=torch.bool)
        for own in self.axes:
            table = own[0].table()
            both = found[:, None, :, None] & table[None, :, None, :]
            found = both.reshape(found.shape[0] * table.shape[0], -1)
        return found

    def boxes(self, which: str) -> list[tuple[slice, ...]]:
        """The "queries" or "keys" of each tile as slices of the grid."""
        sides = [[_slice(getattr(run, which)) for run in own] for own in self.axes]
        return list(product(*sides))


def kinds(axes: Sequence[Axis], size: Sequence[int]) -> Iterator[Kind]:
    """A grid cut into tiles of `size` queries: every query is in exactly one, with all keys that it sees."""
    for found in product(*(_patterns(axis, n) for axis, n in zip(axes, size, strict=True))):
        yield Kind(found)


def _slice(places: range) -> slice:
    return slice(places.start, places.stop, places.step)


def _positions(places: list[list[range]], grid: Sequence[int]) -> Tensor:
    found = torch.zeros(1, 1, dtype=torch.int64)
    for own, length in zip(places, grid, strict=True):
        first = torch.tensor([at.start for at in own])
        at = first[:, None] + torch.arange(len(own[0])) * own[0].step
        both = (found * length)[:, None, :, None] + at[None, :, None, :]
        found = both.reshape(found.shape[0] * at.shape[0], -1)
    return found
