"""A learned bias for every offset within the windows of the heads, which may differ from head to head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from polyhead.attend.scores.base import Score
from polyhead.attend.tile import Tile
from polyhead.checks import floating, given, several, whole
from polyhead.errors import ConfigError, ShapeError
from polyhead.shapes import broadcast_shape

__all__ = ["WindowBias", "window_bias", "window_offsets"]

Sizes = tuple[tuple[int, ...], ...]


class WindowBias(Score):
    """score + table[the offset from i to j in the window of head h]. See `window_bias`."""

    table: Tensor
    windows: Sizes
    steps: Sizes
    grid: tuple[int, int] | None = None

    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        axes = 1 if self.grid is None else 2
        if self.grid is not None and (not several(self.grid) or len(self.grid) != 2):
            raise ConfigError(f"window_bias: grid must be (height, width); got {given(self.grid)}")
        if self.grid is not None:
            object.__setattr__(self, "grid", tuple(whole("window_bias: grid", n, 1) for n in self.grid))
        for name in ("windows", "steps"):
            sizes = getattr(self, name)
            if not several(sizes) or not all(several(own) and len(own) in (0, axes) for own in sizes):
                raise ConfigError(
                    f"window_bias: {name} must have {axes} numbers for every head, or none for a head "
                    f"without a bias; got {given(sizes)}"
                )
            found = tuple(tuple(whole(f"window_bias: {name}", n, 1) for n in own) for own in sizes)
            object.__setattr__(self, name, found)
        if [len(own) for own in self.windows] != [len(own) for own in self.steps]:
            raise ConfigError(
                "window_bias: windows and steps must be of the same heads; got "
                f"{self.windows} and {self.steps}"
            )
        count = sum(map(window_offsets, self.windows))
        floating("table", self.table, 1, f"({count},), a number for every offset of every head")
        if self.table.shape[0] != count:
            raise ConfigError(
                f"table must be a floating-point tensor ({count},), a number for every offset of every head; "
                f"got {given(self.table)}"
            )

    def between(self, i: Tensor, j: Tensor, first: int, last: int) -> Tensor:
        """The bias of heads `first` to `last` - 1 for pairs, `(heads, *shape of i and j together)`."""
        starts = [0, *accumulate(map(window_offsets, self.windows))]
        table = self.table.to(i.device)
        known: dict[object, Tensor] = {}
        found = []
        shape = broadcast_shape(i.shape, j.shape)
        for h in range(first, last):
            kind = (self.windows[h], self.steps[h])
            if not self.windows[h]:
                found.append(table.new_zeros(shape))
                continue
            if kind not in known:
                known[kind] = self._offset(i, j, *kind).expand(shape)
            found.append(table[known[kind] + starts[h]])
        return torch.stack(found)

    def _offset(self, i: Tensor, j: Tensor, windows: tuple[int, ...], steps: tuple[int, ...]) -> Tensor:
        axes = [(i, j)]
        if self.grid is not None:
            width = self.grid[1]
            axes = [(i // width, j // width), (i % width, j % width)]
        index = torch.zeros((), dtype=torch.int64, device=i.device)
        for (x, y), window, step in zip(axes, windows, steps, strict=True):
            offset = torch.div(y - x, step, rounding_mode="floor").clamp(1 - window, window - 1)
            index = index * (2 * window - 1) + offset + window - 1
        return index

    def bias(self, tile: Tile, dtype: torch.dtype | None = None) -> Tensor:
        heads = tile.total_heads or tile.heads
        if heads != len(self.windows):
            raise ShapeError(
                f"window_bias holds the windows of {len(self.windows)} heads, but the call has {heads}"
            )
        return self.between(tile.i, tile.j, tile.head_slice.start, tile.head_slice.stop).to(dtype)


def window_offsets(window: Sequence[int]) -> int:
    """How many offsets there are within a window; none where there is no window."""
    return math.prod(2 * n - 1 for n in window) if window else 0


def window_bias(
    table: Tensor,
    windows: Sequence[Sequence[int]],
    steps: Sequence[Sequence[int]] | None = None,
    grid: Sequence[int] | None = None,
) -> WindowBias:
    """A learned bias for every head and offset from the query to the key, within the head's own window.

    Beyond a window the offset is clipped: a mask hides what lies there. The bias of a head without a window
    is zero.

    Args:
        table: `(n,)`, head after head the 2 w - 1 offsets of its window, in a grid (2 h - 1)(2 w - 1) row by
            row, from the most negative one.
        windows: of every head the length of its window on each axis; `()` for a head without a bias.
        steps: of every head how many places make an offset of one, such as those of a lattice; default 1.
        grid: height and width of a grid that is flattened row by row; None: a sequence.
    """
    found = tuple(tuple(own) for own in windows)
    ones = tuple((1,) * len(own) for own in found)
    return WindowBias(table, found, ones if steps is None else steps, grid)  # type: ignore[arg-type]
