"""Neighbourhoods on grids of one to three dimensions, flattened row by row.

Papers: Neighborhood Attention (arXiv 2204.07143), its dilated form (arXiv 2209.15001), causal axes (arXiv
2403.04690), strides (arXiv 2504.16922). The window rule is NATTEN's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from polyhead.attend.masks.algebra import Bounds, Mask
from polyhead.attend.masks.checks import per_axis
from polyhead.checks import whole
from polyhead.errors import ConfigError, ShapeError

__all__ = ["Axis", "Neighborhood", "neighborhood"]

Interval = tuple[Tensor, Tensor]
Box = tuple[tuple[Interval, ...], Tensor]  # an interval on each axis, and whether the box holds anything


@dataclass(frozen=True)
class Axis:
    """The rule on one axis. Places of the same remainder by `dilation` form a group; p counts within it."""

    length: int
    window: int
    dilation: int
    causal: bool
    stride: int

    def keys(self, p: Tensor, remainder: Tensor) -> Interval:
        """First and last key of query p within its group; both never decrease as p grows."""
        end = (self.length - 1 - remainder) // self.dilation
        if self.causal:
            leader = torch.minimum(p // self.stride * self.stride + self.stride - 1, end)
            return (leader - self.window + 1).clamp(min=0), p
        leader = torch.minimum(p // self.stride * self.stride + self.stride // 2, end)
        first = torch.minimum((leader - self.window // 2).clamp(min=0), end - self.window + 1)
        return first, first + self.window - 1

    def allowed(self, x: Tensor, y: Tensor) -> Tensor:
        """Whether place x may look at place y."""
        remainder = x % self.dilation
        first, last = self.keys(x // self.dilation, remainder)
        at = y // self.dilation
        return (y % self.dilation == remainder) & (at >= first) & (at <= last)

    def bounds(self, queries: Interval, keys: Interval) -> Bounds:
        """Whether some and whether all of `queries` (places a..b) and `keys` (c..d) are neighbours."""
        (a, b), (c, d) = queries, keys
        some = torch.zeros((), dtype=torch.bool, device=a.device)
        every = ~some
        for remainder in self._remainders(a, b, c, d):
            # the members of this group in the two intervals
            p0, p1, q0, q1 = (
                (edge - remainder) // self.dilation
                for edge in (a + self.dilation - 1, b, c + self.dilation - 1, d)
            )
            first0, last0 = self.keys(p0, remainder)
            first1, last1 = self.keys(p1, remainder)
            # the windows of p0..p1 follow one another without a gap
            some = some | ((p0 <= p1) & (q0 <= q1) & (first0 <= q1) & (last1 >= q0))
            every = (first1 <= q0) & (last0 >= q1)
        if self.dilation > 1:
            every = (a == b) & (c == d) & self.allowed(a, c)
        return some, every

    def _remainders(self, *edges: Tensor) -> list[Tensor]:
        """One remainder of every kind: what matters changes only where one of these begins."""
        if self.dilation <= 6:
            return [torch.full_like(edges[0], r) for r in range(self.dilation)]
        a, b, c, d = edges
        starts = [a, b + 1, c, d + 1, torch.zeros_like(a), torch.full_like(a, self.length)]
        return [start % self.dilation for start in starts]


class Neighborhood(Mask):
    """Each query sees the `window` nearest places around it on every axis of a grid. See `neighborhood`."""

    exact: ClassVar[tuple[bool, bool]] = (True, True)
    grid: tuple[int, ...]
    window: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        grid = tuple(self.grid) if isinstance(self.grid, tuple | list) else (self.grid,)
        if not 1 <= len(grid) <= 3:
            raise ConfigError(f"neighborhood: grid must have 1 to 3 axes; got {self.grid!r}")
        axes = len(grid)
        found = {"grid": tuple(whole(f"neighborhood: grid[{a}]", n, 1) for a, n in enumerate(grid))}
        for name in ("window", "dilation", "stride"):
            found[name] = per_axis("neighborhood", name, getattr(self, name), axes, int)
        found["causal"] = per_axis("neighborhood", "causal", self.causal, axes, bool)
        for a in range(axes):
            length, size, dilation, stride = (found[n][a] for n in ("grid", "window", "dilation", "stride"))
            if size * dilation > length:
                raise ConfigError(
                    f"neighborhood: window {size} at dilation {dilation} does not fit axis {a};"
                    f" window * dilation may be at most its length, {length}"
                )
            if stride > size:
                raise ConfigError(
                    f"neighborhood: stride {stride} on axis {a} leaves places between windows of {size};"
                    f" stride may be at most {size}"
                )
        for name, values in found.items():
            object.__setattr__(self, name, values)

    def __repr__(self) -> str:
        grid = self.grid if len(self.grid) > 1 else self.grid[0]
        shown = [repr(grid), repr(_short(self.window))]
        for name, default in (("dilation", 1), ("causal", False), ("stride", 1)):
            value = _short(getattr(self, name))
            if value is not default and value != default:
                shown.append(f"{name}={value!r}")
        return f"neighborhood({', '.join(shown)})"

    @property
    def places(self) -> int:
        """Number of places on the grid."""
        return math.prod(self.grid)

    def axes(self) -> list[Axis]:
        """The rule on each axis."""
        settings = zip(self.grid, self.window, self.dilation, self.causal, self.stride, strict=True)
        return [Axis(*setting) for setting in settings]

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found = (i >= 0) & (i < self.places) & (j < self.places)
        for axis, x, y in zip(self.axes(), self._places(i), self._places(j), strict=True):
            found = found & axis.allowed(x, y)
        return found

    def _places(self, position: Tensor) -> list[Tensor]:
        position = position.clamp(0, self.places - 1)
        found = []
        for length in reversed(self.grid):
            found.append(position % length)
            position = position // length
        return found[::-1]

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        # A run of positions is a few boxes of the grid, and for boxes the axes are independent.
        outside = (i0 < 0) | (i1 >= self.places) | (j1 >= self.places)
        beside = (i1 < 0) | (i0 >= self.places) | (j0 >= self.places)
        i0, i1, j0, j1 = (edge.clamp(0, self.places - 1) for edge in (i0, i1, j0, j1))
        known: dict[tuple[int, int, int], Bounds] = {}
        some, every = torch.zeros_like(beside), torch.ones_like(outside)
        axes = self.axes()
        boxes = [[box for box in boxes_of(*run, self.grid) if box[1].any()] for run in ((i0, i1), (j0, j1))]
        for queries, filled in boxes[0]:
            for keys, taken in boxes[1]:
                any_here = all_here = filled & taken
                for a, axis in enumerate(axes):
                    at = (a, id(queries[a]), id(keys[a]))
                    if at not in known:
                        known[at] = axis.bounds(queries[a], keys[a])
                    any_here, all_here = any_here & known[at][0], all_here & known[at][1]
                some, every = some | any_here, every & (all_here | ~(filled & taken))
        return some & ~beside, every & ~outside

    def check(self, *, batch: int, heads: int, queries: int, keys: int, offset: int) -> None:
        if keys > self.places or offset < 0 or offset + queries > self.places:
            grid = "×".join(map(str, self.grid))
            raise ShapeError(
                f"neighborhood: the grid {grid} has {self.places} places but the call has {keys} keys,"
                f" and queries at positions {offset} to {offset + queries - 1}"
            )


def _short(values: tuple[int, ...]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else values


def boxes_of(start: Tensor, stop: Tensor, grid: Sequence[int]) -> list[Box]:
    """The positions start..stop of a flattened grid as boxes: the first plane, those between, the last."""
    if len(grid) == 1:
        return [(((start, stop),), start <= stop)]
    size = math.prod(grid[1:])
    top, bottom = start // size, stop // size
    one = top == bottom
    first, last = (top, top), (bottom, bottom)
    found: list[Box] = []
    for box, filled in boxes_of(start % size, torch.where(one, stop % size, size - 1), grid[1:]):
        found.append(((first, *box), filled))
    whole_planes = tuple((torch.zeros_like(start), torch.full_like(start, n - 1)) for n in grid[1:])
    found.append((((top + 1, bottom - 1), *whole_planes), bottom - top > 1))
    for box, filled in boxes_of(torch.zeros_like(start), stop % size, grid[1:]):
        found.append(((last, *box), filled & ~one))
    return found


def neighborhood(
    grid: int | Sequence[int],
    window: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    stride: int | Sequence[int] = 1,
) -> Mask:
    """The places around the query on a grid; a position is a place of the grid, flattened row by row.

    On every axis a query sees exactly `window` keys: w // 2 before it, itself, and the others after it. Near
    the border the window moves inwards instead of shrinking. A setting is one value, or one for each axis.

    Args:
        grid: lengths of one to three axes.
        window: keys on each axis.
        dilation: only every `dilation`-th place counts; window * dilation must fit the axis.
        causal: on such an axis the window ends at the query, and shrinks at the start.
        stride: queries in groups of `stride` share the window of the group's middle (on a causal axis that of
            its last, still without looking ahead); stride = window gives separate blocks.

    Raises:
        ConfigError: a setting that does not fit the grid.
        ShapeError: at use, if the call has positions outside the grid.
    """
    return Neighborhood(grid, window, dilation, causal, stride)  # type: ignore[arg-type]
