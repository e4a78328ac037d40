"""A score for queries that were picked out of a larger call."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from polyhead.attend.scores.base import Score
from polyhead.attend.tile import Tile
from polyhead.checks import given, is_integer_tensor, whole
from polyhead.errors import ConfigError

__all__ = ["GatheredScore"]


class GatheredScore(Score):
    """`score` where row r is the query at `positions[r]`, and head m is head `head + m` of `total_heads`.

    All heads of the call stand at the same positions, which the mask `gathered` does not ask for: biases by
    distance are made for all heads of a tile at once.

    Attributes:
        score: the score of the larger call.
        positions: integer `(L,)`, strictly ascending; None: rows stand where the call puts them.
        head: the first head of the call among those of the larger one.
        total_heads: heads of the larger call.
        item: the first batch item of the call among those of the larger one.
    """

    score: Score
    positions: Tensor | None
    head: int
    total_heads: int
    item: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.score, Score):
            raise ConfigError(f"score must be a Score; got {given(self.score)}")
        if self.positions is not None and not (
            is_integer_tensor(self.positions) and self.positions.ndim == 1
        ):
            raise ConfigError(f"positions must be an integer tensor (L,); got {given(self.positions)}")
        whole("head", self.head, 0)
        whole("item", self.item, 0)
        whole("total_heads", self.total_heads, 1)

    @property
    def positional(self) -> bool:  # type: ignore[override]
        return self.score.positional

    def _origin(self, tile: Tile) -> Tile:
        rows, consecutive = tile.rows, tile.consecutive
        if self.positions is not None:
            rows, consecutive = self.positions.to(rows.device, torch.int64)[tile.row_slice], False
        return dataclasses.replace(
            tile,
            rows=rows,
            consecutive=consecutive,
            head_start=self.head + tile.head_start,
            batch_start=self.item + tile.batch_start,
            total_heads=self.total_heads,
        )

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        return self.score.apply(scores, self._origin(tile))

    def bias(self, tile: Tile, dtype: torch.dtype | None = None) -> Tensor | None:
        return self.score.bias(self._origin(tile), dtype)
