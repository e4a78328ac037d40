"""Masks and scores over the keys that are held, where these are not the keys 0..S-1 of the sequence."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.scores import Chain, Score, SoftCap, Temperature
from polyhead.attend.tile import Tile
from polyhead.description import Part

__all__ = ["Held", "HeldScore", "of_heads", "pointwise"]

Bounds = tuple[Tensor, Tensor]
P = TypeVar("P", bound=Part)


class Held(Mask):
    """`mask` for a choice of the sequence's keys and of the call's heads.

    Attributes:
        mask: who may look at whom in the whole sequence; None: all at all.
        index: which token of the sequence key j is, `(B or 1, n)`; -1: none.
        ahead: how far a query stands behind its place in the sequence, S - n.
        heads: which head of the call head h is, `(h,)`; None: the same.
        ranks: the place of each token of the sequence among its batch item's real ones, `(B, S)`; None: the
            same as its index.
        sink, window: if given, a query sees only the first `sink` tokens and the last `window`, by rank.
    """

    mask: Mask | None
    index: Tensor
    ahead: int = 0
    heads: Tensor | None = None
    ranks: Tensor | None = None
    sink: int = 0
    window: int | None = None

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        i = i + self.ahead
        token = self.index[b, j] if len(self.index) > 1 else self.index[0][j]
        found = token >= 0
        token = token.clamp(min=0)
        if self.mask is not None:
            found = found & self.mask.allowed(b, h if self.heads is None else self.heads[h], i, token)
        if self.window is not None:
            own, other = (i, token) if self.ranks is None else (self.ranks[b, i], self.ranks[b, token])
            found = found & ((other < self.sink) | (own - other < self.window))
        return found

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        no = torch.zeros((), dtype=torch.bool, device=j0.device)
        return ~no, no  # nothing is known in advance: the keys stand in any order


class HeldScore(Score):
    """`score` for a choice of the sequence's keys and of the call's heads; attributes as in `Held`."""

    score: Score
    index: Tensor
    ahead: int = 0
    heads: Tensor | None = None
    total: int = 0

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        if self.heads is not None:
            every = scores.new_zeros(scores.shape[0], self.total, *scores.shape[2:])
            scores = every.index_copy(1, self.heads, scores)
        heads = scores.shape[1]
        if len(self.index) == 1:
            found = self.score.apply(
                scores, self._tile(tile, self.index[0], heads, tile.batch_start, tile.batch)
            )
        else:
            start = tile.batch_start
            items = [
                self.score.apply(
                    scores[n : n + 1], self._tile(tile, self.index[start + n], heads, start + n, 1)
                )
                for n in range(tile.batch)
            ]
            found = torch.cat(items) if items else scores
        return found if self.heads is None else found.index_select(1, self.heads)

    def _tile(self, tile: Tile, index: Tensor, heads: int, batch_start: int, batch: int) -> Tile:
        return Tile(
            batch=batch,
            heads=heads,
            rows=tile.rows + self.ahead,
            cols=index[tile.cols].clamp(min=0),
            row_start=tile.row_start,
            batch_start=batch_start,
        )


def pointwise(score: Score | None) -> bool:
    """Whether a score looks at the logit alone, not at head or positions."""
    if isinstance(score, Chain):
        return all(map(pointwise, score.scores))
    return (
        score is None
        or isinstance(score, SoftCap)
        or (isinstance(score, Temperature) and not isinstance(score.t, Tensor))
    )


def of_heads(part: P, heads: Tensor, total: int) -> P:
    """`part` for some of the call's `total` heads: its per-head tensors `(total,)` cut."""
    return part._map(lambda t: t[heads.to(t.device)] if t.ndim == 1 and t.shape[0] == total else t)
