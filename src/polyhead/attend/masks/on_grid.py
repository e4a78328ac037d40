"""Blocks with a halo, and lattices: patterns of the places of a grid, each axis by itself.

Papers: blocks with a halo are HaloNet's (arXiv 2103.12731), blocks and lattices MaxViT's (arXiv 2204.01697).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from polyhead.attend.masks.algebra import Bounds, Mask
from polyhead.attend.masks.checks import per_axis
from polyhead.attend.masks.neighborhood import Interval, boxes_of
from polyhead.attend.masks.positional import _has_multiple, _only_multiples
from polyhead.checks import given, several, whole
from polyhead.errors import ConfigError, ShapeError

__all__ = ["Halo", "Lattice", "OnGrid", "halo", "lattice"]


class OnGrid(Mask):
    """A query sees a key where both lie on the grid and every axis allows it.

    Attributes:
        grid: lengths of one to three axes, flattened row by row; None: a sequence of any length.
    """

    exact: ClassVar[tuple[bool, bool]] = (True, True)
    grid: tuple[int, ...] | None

    @property
    def axes(self) -> int:
        """Number of axes."""
        return 1 if self.grid is None else len(self.grid)

    @property
    def places(self) -> int | None:
        """Number of places on the grid; None where there is no end."""
        return None if self.grid is None else math.prod(self.grid)

    def along(self, axis: int, x: Tensor, y: Tensor) -> Tensor:
        """Whether place x of an axis may look at place y of it."""
        raise NotImplementedError

    def between(self, axis: int, queries: Interval, keys: Interval) -> Bounds:
        """Whether some and whether every place of `queries` may look at some or every one of `keys`."""
        raise NotImplementedError

    def groups(self, axis: int, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` places of an axis in groups that look at the same, and what these look at.

        Returns:
            int64 `(n, r)` and `(n, c)`, ascending in every row; -1 where there is no such place.
        """
        raise NotImplementedError

    def _grid(self, owner: str) -> None:
        grid = self.grid
        if grid is None:
            return
        grid = tuple(grid) if several(grid) else (grid,)  # type: ignore[assignment]
        if not 1 <= len(grid) <= 3:
            raise ConfigError(f"{owner}: grid must have 1 to 3 axes; got {given(self.grid)}")
        lengths = tuple(whole(f"{owner}: grid[{a}]", n, 1) for a, n in enumerate(grid))
        object.__setattr__(self, "grid", lengths)

    def _shown(self) -> str:
        return repr(self.grid[0] if self.grid is not None and len(self.grid) == 1 else self.grid)

    def split(self, position: Tensor) -> list[Tensor]:
        """The place on every axis."""
        if self.grid is None:
            return [position]
        position = position.clamp(0, math.prod(self.grid) - 1)
        found = []
        for length in reversed(self.grid):
            found.append(position % length)
            position = position // length
        return found[::-1]

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found = i >= 0
        if self.places is not None:
            found = found & (i < self.places) & (j < self.places)
        for axis, (x, y) in enumerate(zip(self.split(i), self.split(j), strict=True)):
            found = found & self.along(axis, x, y)
        return found

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        if self.grid is None:
            some, every = self.between(0, (i0.clamp(min=0), i1), (j0, j1))
            return some & (i1 >= 0), every & (i0 >= 0)
        # a run of positions is a few boxes of the grid, and for boxes the axes are independent
        places = math.prod(self.grid)
        outside = (i0 < 0) | (i1 >= places) | (j1 >= places)
        beside = (i1 < 0) | (i0 >= places) | (j0 >= places)
        i0, i1, j0, j1 = (edge.clamp(0, places - 1) for edge in (i0, i1, j0, j1))
        some, every = torch.zeros_like(beside), torch.ones_like(outside)
        boxes = [[box for box in boxes_of(*run, self.grid) if box[1].any()] for run in ((i0, i1), (j0, j1))]
        for queries, filled in boxes[0]:
            for keys, taken in boxes[1]:
                any_here = all_here = filled & taken
                for axis in range(self.axes):
                    known = self.between(axis, queries[axis], keys[axis])
                    any_here, all_here = any_here & known[0], all_here & known[1]
                some, every = some | any_here, every & (all_here | ~(filled & taken))
        return some & ~beside, every & ~outside

    def check(self, *, batch: int, heads: int, queries: int, keys: int, offset: int) -> None:
        if self.grid is not None and (keys > math.prod(self.grid) or offset < 0):
            raise ShapeError(
                f"{type(self).__name__.lower()}: the grid {'×'.join(map(str, self.grid))} has "
                f"{math.prod(self.grid)} places but the call has {keys} keys, and queries at positions "
                f"{offset} to {offset + queries - 1}"
            )


class Halo(OnGrid):
    """Keys in the block of the query and up to `halo` places around it. See `halo`."""

    grid: tuple[int, ...] | None
    block: tuple[int, ...]
    halo: tuple[int, ...]

    def __post_init__(self) -> None:
        self._grid("halo")
        object.__setattr__(self, "block", per_axis("halo", "block", self.block, self.axes, int))
        around = tuple(self.halo) if several(self.halo) else (self.halo,) * self.axes
        if len(around) != self.axes:
            raise ConfigError(
                f"halo: halo needs one value, or one for each of the {self.axes} axes; got {given(self.halo)}"
            )
        object.__setattr__(self, "halo", tuple(whole("halo: halo", n, 0) for n in around))

    def __repr__(self) -> str:
        return f"halo({self._shown()}, {_short(self.block)!r}, {_short(self.halo)!r})"

    def _edges(self, axis: int, x: Tensor) -> Interval:
        size, around = self.block[axis], self.halo[axis]
        start = x // size * size
        return start - around, start + size - 1 + around

    def along(self, axis: int, x: Tensor, y: Tensor) -> Tensor:
        first, last = self._edges(axis, x)
        return (y >= first) & (y <= last)

    def between(self, axis: int, queries: Interval, keys: Interval) -> Bounds:
        (a, b), (c, d) = queries, keys
        first0, last0 = self._edges(axis, a)
        first1, last1 = self._edges(axis, b)
        # what successive blocks look at follows without a gap
        return (first0 <= d) & (last1 >= c), (first1 <= c) & (last0 >= d)

    def groups(self, axis: int, length: int) -> tuple[Tensor, Tensor]:
        size, around = self.block[axis], self.halo[axis]
        start = torch.arange(0, length, size)[:, None]
        rows, cols = start + torch.arange(size), start - around + torch.arange(size + 2 * around)
        return rows.masked_fill(rows >= length, -1), cols.masked_fill((cols < 0) | (cols >= length), -1)


class Lattice(OnGrid):
    """Keys that are a multiple of `step` away on every axis. See `lattice`."""

    grid: tuple[int, ...] | None
    step: tuple[int, ...]

    def __post_init__(self) -> None:
        self._grid("lattice")
        object.__setattr__(self, "step", per_axis("lattice", "step", self.step, self.axes, int))

    def __repr__(self) -> str:
        return f"lattice({self._shown()}, {_short(self.step)!r})"

    def along(self, axis: int, x: Tensor, y: Tensor) -> Tensor:
        return (x - y) % self.step[axis] == 0

    def between(self, axis: int, queries: Interval, keys: Interval) -> Bounds:
        low, high = queries[0] - keys[1], queries[1] - keys[0]  # all distances between occur
        return _has_multiple(low, high, self.step[axis]), _only_multiples(low, high, self.step[axis])

    def groups(self, axis: int, length: int) -> tuple[Tensor, Tensor]:
        step = min(self.step[axis], length)
        rows = torch.arange(step)[:, None] + step * torch.arange(-(-length // step))
        rows = rows.masked_fill(rows >= length, -1)
        return rows, rows


def _short(values: tuple[int, ...]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else values


def halo(grid: int | Sequence[int] | None, block: int | Sequence[int], halo: int | Sequence[int] = 0) -> Mask:
    """Keys in the block of the query, and up to `halo` places around the block on every axis of a grid.

    Blocks are counted from the first place; the last may be smaller, and what lies beyond the border is not
    there. Unlike `neighborhood` the region does not move inwards there. With `halo=0` it is a partition in
    blocks, with `block=1` a window of `halo` places around every query.

    Args:
        grid: lengths of one to three axes, flattened row by row; None: a sequence of any length.
        block: length of a block, for all axes or for each.
        halo: places on either side of it.
    """
    return Halo(grid, block, halo)  # type: ignore[arg-type]


def lattice(grid: int | Sequence[int] | None, step: int | Sequence[int]) -> Mask:
    """Keys that are a multiple of `step` places away from the query on every axis of a grid.

    It parts the grid into step × step lattices that stretch over all of it; in one dimension it is
    `strided(step)`.

    Args:
        grid: lengths of one to three axes, flattened row by row; None: a sequence of any length.
        step: for all axes or for each.
    """
    return Lattice(grid, step)  # type: ignore[arg-type]
