"""A learned bias for every offset between two patches of an image, with a class token of its own."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from polyhead.attend.scores.base import Score, heads_of
from polyhead.attend.tile import Tile
from polyhead.checks import flag, floating, given, whole
from polyhead.errors import ConfigError, ShapeError

__all__ = ["GridBias", "grid_bias"]


class GridBias(Score):
    """score + table[h, (dy + height - 1) (2 width - 1) + (dx + width - 1)], dy and dx from key to query."""

    table: Tensor
    height: int
    width: int
    class_token: bool = True

    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        height, width = whole("height", self.height, 1), whole("width", self.width, 1)
        flag("class_token", self.class_token)
        columns = (2 * height - 1) * (2 * width - 1) + 3 * self.class_token
        shape = f"(H, {columns}), a column for every offset" + ", then three" * self.class_token
        floating("table", self.table, 2, shape)
        if self.table.shape[1] != columns:
            raise ConfigError(f"table must be a floating-point tensor {shape}; got {given(self.table)}")

    def bias(self, tile: Tile, dtype: torch.dtype | None = None) -> Tensor:
        first = int(self.class_token)  # the first patch
        tokens = self.height * self.width + first
        last = max(int(x[-1]) if len(x) else -1 for x in (tile.rows, tile.cols))
        if last >= tokens:
            raise ShapeError(
                f"grid_bias is for the {tokens} tokens of a grid of {self.height} x {self.width}"
                f"{' and its class token' * self.class_token}; the call reaches token {last}"
            )
        i, j = tile.i - first, tile.j - first
        dy, dx = i // self.width - j // self.width, i % self.width - j % self.width
        index = (dy + self.height - 1) * (2 * self.width - 1) + dx + self.width - 1
        if self.class_token:
            own = self.table.shape[1] - 3  # class → token, token → class, class → class
            index = torch.where(i < 0, own, index)
            index = torch.where(j < 0, torch.where(i < 0, own + 2, own + 1), index)
        return heads_of(self, self.table, tile)[:, index].to(dtype)


def grid_bias(table: Tensor, height: int, width: int, *, class_token: bool = True) -> GridBias:
    """A learned bias for each head and offset between the patches of a grid, row by row.

    Args:
        table: `(H, (2 height - 1)(2 width - 1))`; with a class token three columns more: from it to a
            patch, from a patch to it, from it to itself.
        height, width: patches of the grid.
        class_token: whether a class token stands before the patches.
    """
    return GridBias(table, height, width, class_token)
