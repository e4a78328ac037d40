"""Masks, scores and weight maps over a sequence in which every token stands several times.

Row or column n·P + p is pseudo-token p of token n. What is said of pairs of tokens holds for all pairs of
their pseudo-tokens; with `ordered`, a query does not see the later pseudo-tokens of its own token.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from polyhead.attend.across_heads import AcrossHeads
from polyhead.attend.masks import And, Mask, Padding, causal, padding
from polyhead.attend.masks.algebra import Bounds
from polyhead.attend.scores import Chain, Score
from polyhead.attend.tile import Tile
from polyhead.attend.weight_maps import WeightChain, WeightMap
from polyhead.shapes import broadcast_shape

__all__ = [
    "PseudoMask",
    "PseudoScore",
    "PseudoWeightMap",
    "pseudo_mask",
    "pseudo_score",
    "pseudo_weight_map",
]

_CAUSAL = causal()


class PseudoMask(Mask):
    """`mask` of tokens, for the `count` pseudo-tokens of each.

    Attributes:
        mask: who may look at whom, in tokens; None: everybody at everything.
        count: P.
        ordered: whether a query does not see the later pseudo-tokens of its own token.
        shift: int64 scalar tensor, how many columns after its row's place a token's own column lies; None: 0.
    """

    mask: Mask | None
    count: int
    ordered: bool = False
    shift: Tensor | None = None

    def _own(self, j: Tensor) -> Tensor:
        """Columns counted so that a token's own one has the number of its row."""
        return j if self.shift is None else j - self.count * self.shift.to(j.device)

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        count, found = self.count, None
        if self.mask is not None:
            found = self.mask.allowed(b, h, i // count, j // count)
        if self.ordered or found is None:
            own = self._own(j)
            in_order = (own <= i) | (own // count != i // count)
            found = in_order if found is None else found & in_order
        return found

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        count = self.count
        if self.mask is None:
            every = torch.ones(broadcast_shape(i0.shape, j0.shape), dtype=torch.bool, device=i0.device)
            some = every
        else:
            some, every = self.mask.bounds(b, h, i0 // count, i1 // count, j0 // count, j1 // count)
        if self.ordered:
            first, last = self._own(j0), self._own(j1)
            apart = (last // count < i0 // count) | (first // count > i1 // count)
            every = every & ((last <= i0) | apart)
        return some, every

    def check(self, *, batch: int, heads: int, queries: int, keys: int, offset: int) -> None:
        if self.mask is not None:
            count = self.count
            self.mask.check(
                batch=batch, heads=heads, queries=queries // count, keys=keys // count, offset=offset // count
            )


class PseudoScore(Score):
    """`score` of tokens, for the `count` pseudo-tokens of each."""

    score: Score
    count: int

    @property
    def positional(self) -> bool:  # type: ignore[override]
        return self.score.positional

    @property
    def whole_heads(self) -> bool:  # type: ignore[override]
        return self.score.whole_heads

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        return self.score.apply(scores, _of_tokens(tile, self.count))

    def bias(self, tile: Tile, dtype: torch.dtype | None = None) -> Tensor | None:
        return self.score.bias(_of_tokens(tile, self.count), dtype)


class PseudoWeightMap(WeightMap):
    """`weight_map` of tokens, for the `count` pseudo-tokens of each."""

    weight_map: WeightMap
    count: int

    @property
    def whole_heads(self) -> bool:  # type: ignore[override]
        return self.weight_map.whole_heads

    @property
    def keeps_zeros(self) -> bool:  # type: ignore[override]
        return self.weight_map.keeps_zeros

    def apply(self, weights: Tensor, tile: Tile) -> Tensor:
        return self.weight_map.apply(weights, _of_tokens(tile, self.count))


def _of_tokens(tile: Tile, count: int) -> Tile:
    columns = tile.cols if tile.columns is None else tile.columns
    return dataclasses.replace(
        tile, rows=tile.rows // count, cols=tile.cols // count, columns=columns, consecutive=False
    )


def pseudo_mask(
    mask: Mask | None, count: int, *, ordered: bool = False, queries: int, shift: int = 0
) -> Mask | None:
    """`mask` of tokens for their pseudo-tokens; None when it allows everything.

    Args:
        mask: in tokens.
        count: P.
        ordered: see `PseudoMask`.
        queries: number of tokens that ask.
        shift: see `PseudoMask`.
    """
    if count == 1:
        return mask
    if isinstance(mask, And):
        # one term is enough to keep the order, a causal one for nothing
        terms = sorted(mask.terms, key=lambda term: term != _CAUSAL)
        first = pseudo_mask(terms[0], count, ordered=ordered, queries=queries, shift=shift)
        rest = [pseudo_mask(term, count, queries=queries) for term in terms[1:]]
        return And(tuple(term for term in (first, *rest) if term is not None))
    if ordered and not shift and (mask == _CAUSAL or (mask is None and queries == 1)):
        return _CAUSAL  # a single query stands last, so that nothing comes after its own token
    if mask is None and not ordered:
        return None
    if type(mask) is Padding and not ordered:
        return padding(mask.mask.repeat_interleave(count, dim=1))
    return PseudoMask(mask, count, ordered, torch.tensor(shift) if ordered and shift else None)


def pseudo_score(score: Score, count: int) -> Score:
    """`score` of tokens for their pseudo-tokens."""
    if isinstance(score, Chain):
        return Chain(tuple(pseudo_score(one, count) for one in score.scores))
    return score if count == 1 or isinstance(score, AcrossHeads) else PseudoScore(score, count)


def pseudo_weight_map(weight_map: WeightMap, count: int) -> WeightMap:
    """`weight_map` of tokens for their pseudo-tokens."""
    if isinstance(weight_map, WeightChain):
        return WeightChain(tuple(pseudo_weight_map(one, count) for one in weight_map.maps))
    if count == 1 or isinstance(weight_map, AcrossHeads):
        return weight_map
    return PseudoWeightMap(weight_map, count)
