"""A learned bias for every offset within a neighbourhood of a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from polyhead.attend.masks.checks import per_axis
from polyhead.attend.scores.base import Score, heads_of
from polyhead.attend.tile import Tile
from polyhead.checks import floating, given, several, whole
from polyhead.errors import ConfigError

__all__ = ["NeighborhoodBias", "neighborhood_bias"]


class NeighborhoodBias(Score):
    """score + table[h, index of the offsets (j_a - i_a) / dilation_a], clipped at ±(window_a - 1)."""

    table: Tensor
    grid: tuple[int, ...]
    window: tuple[int, ...]
    dilation: tuple[int, ...]

    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not several(self.grid) or not 1 <= len(self.grid) <= 3:
            raise ConfigError(f"neighborhood_bias: grid must have 1 to 3 axes; got {given(self.grid)}")
        axes = len(self.grid)
        found = {"grid": tuple(whole(f"neighborhood_bias: grid[{a}]", n, 1) for a, n in enumerate(self.grid))}
        for name in ("window", "dilation"):
            found[name] = per_axis("neighborhood_bias", name, getattr(self, name), axes, int)
        for name, value in found.items():
            object.__setattr__(self, name, value)
        columns = math.prod(2 * w - 1 for w in self.window)
        shape = f"(H, {columns}), a column for every offset"
        floating("table", self.table, 2, shape)
        if self.table.shape[1] != columns:
            raise ConfigError(f"table must be a floating-point tensor {shape}; got {given(self.table)}")

    def bias(self, tile: Tile, dtype: torch.dtype | None = None) -> Tensor:
        i, j = tile.i, tile.j
        index: Tensor | int = 0
        step = 1
        for axis in reversed(range(len(self.grid))):
            x, y = (i, j) if axis == 0 else (i % self.grid[axis], j % self.grid[axis])
            i, j = i // self.grid[axis], j // self.grid[axis]
            reach = self.window[axis] - 1
            offset = (y - x).div(self.dilation[axis], rounding_mode="floor").clamp(-reach, reach)
            index = index + (offset + reach) * step
            step *= 2 * reach + 1
        assert isinstance(index, Tensor)
        return heads_of(self, self.table, tile)[:, index].to(dtype)


def neighborhood_bias(
    table: Tensor, grid: Sequence[int], window: int | Sequence[int], dilation: int | Sequence[int] = 1
) -> NeighborhoodBias:
    """A learned bias for each head and offset between the places of a `neighborhood`, row by row.

    Args:
        table: `(H, product of 2·window - 1)`; the offsets, in steps of `dilation`, count from -(window - 1).
        grid: lengths of the axes. The first may be any number: a line needs none.
        window, dilation: those of the neighbourhood, on every axis alike or one for each.
    """
    return NeighborhoodBias(table, grid, window, dilation)  # type: ignore[arg-type]
