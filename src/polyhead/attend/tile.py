"""A rectangle of (query, key) pairs: the unit in which masks, scores and consumers are asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Tile"]


@dataclass(frozen=True, eq=False)
class Tile:
    """The pairs (i, j) of some query rows and some key columns, for some batch items and heads.

    Attributes:
        batch: number of batch items b in the tile.
        heads: number of query heads h in the tile.
        rows: absolute positions of the queries, int64 `(r,)`, consecutive.
        cols: absolute positions of the keys, int64 `(c,)`, ascending; not always consecutive.
        row_start: index of the first row among the call's queries.
        batch_start: index of the tile's first batch item among the call's.
        head_start: index of the tile's first head among the call's.
        total_heads: number of query heads H of the call; None when the tile holds all of them.
        consecutive: whether `cols` has no gap.
        columns: index of the keys among the call's, where they do not stand at their index; None: `cols`.
    """

    batch: int
    heads: int
    rows: Tensor
    cols: Tensor
    row_start: int = 0
    batch_start: int = 0
    head_start: int = 0
    total_heads: int | None = None
    consecutive: bool = False
    columns: Tensor | None = None

    @cached_property
    def b(self) -> Tensor:
        """Batch index, `(b, 1, 1, 1)`: broadcasts against h, i and j to `(b, h, r, c)`."""
        start = self.batch_start
        return torch.arange(start, start + self.batch, device=self.rows.device).view(-1, 1, 1, 1)

    @cached_property
    def h(self) -> Tensor:
        """Head index, `(h, 1, 1)`."""
        start = self.head_start
        return torch.arange(start, start + self.heads, device=self.rows.device).view(-1, 1, 1)

    @cached_property
    def i(self) -> Tensor:
        """Query position, `(r, 1)`."""
        return self.rows.view(-1, 1)

    @cached_property
    def j(self) -> Tensor:
        """Key position, `(c,)`."""
        return self.cols

    @property
    def head_slice(self) -> slice:
        """The tile's heads as a slice of the call's."""
        return slice(self.head_start, self.head_start + self.heads)

    @property
    def batch_slice(self) -> slice:
        """The tile's batch items as a slice of the call's."""
        return slice(self.batch_start, self.batch_start + self.batch)

    @property
    def row_slice(self) -> slice:
        """The tile's rows as a slice of the call's queries."""
        return slice(self.row_start, self.row_start + self.rows.shape[0])

    @cached_property
    def key_index(self) -> slice | Tensor:
        """The tile's keys among the call's: a slice where they have no gap."""
        columns = self.cols if self.columns is None else self.columns
        if not self.consecutive or not columns.shape[0]:
            return columns
        start = int(columns[0])
        return slice(start, start + columns.shape[0])

    def per_head(self, values: Tensor) -> Tensor:
        """The tile's share of per-head values `(H,)`, as `(h, 1, 1)`."""
        return values[self.head_slice].view(-1, 1, 1)
