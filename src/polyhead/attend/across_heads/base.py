"""What a map across the heads of a pair is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from polyhead.attend.scores.base import Chain, Score
from polyhead.attend.tile import Tile
from polyhead.attend.weight_maps import WeightChain, WeightMap
from polyhead.errors import ShapeError

__all__ = ["AcrossHeads", "mixing_flops"]


class AcrossHeads(Score, WeightMap):
    """A linear map of the H numbers that the query heads have at a pair, with its gradient in closed form.

    As a score it sees the logits of all pairs, before the mask; a map that puts -inf goes behind it.
    """

    whole_heads: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True

    def apply(self, x: Tensor, tile: Tile) -> Tensor:
        """The new numbers of `tile`, `(B, H, r, c)`, under autograd."""
        raise NotImplementedError(f"{type(self).__name__} does not define apply()")

    def mapped(self, x: Tensor, tile: Tile, out: Tensor) -> Tensor:
        """What `apply` gives, without autograd, written to `out`; both are contiguous."""
        return out.copy_(self.apply(x, tile))

    def vjp(
        self, x: Tensor, grad: Tensor, tile: Tile, out: Tensor, totals: Sequence[Tensor | None]
    ) -> Tensor:
        """The gradient for `x`, written to `out`; those for the own tensors are added to `totals`.

        Args:
            x: what `mapped` was given.
            grad: the gradient for what it returned; may be overwritten.
            tile: where the numbers stand.
            out: contiguous, in the shape of `x`.
            totals: for each of `tensors()` the whole gradient so far, None where none is wanted.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define vjp()")

    def flops(self, pairs: int) -> int:
        """Operations of the matrix products of `mapped` at so many pairs (b, i, j)."""
        raise NotImplementedError(f"{type(self).__name__} does not define flops()")

    def check_heads(self, heads: int, tile: Tile) -> None:
        """Raise a `ShapeError` unless the tile holds all heads of the call, as many as this part has."""
        total = tile.total_heads or tile.heads
        if heads != total:
            raise ShapeError(
                f"{type(self).__name__} mixes {heads} heads, but the call has {total} query heads"
            )
        if tile.heads != total:
            raise ShapeError(
                f"{type(self).__name__} needs a tile of all {total} heads, got {tile.heads} of them"
            )


def mixing_flops(part: Score | WeightMap | None, pairs: int) -> int:
    """Operations of the maps across heads among the maps of a call, at so many pairs (b, i, j)."""
    parts = (
        part.scores if isinstance(part, Chain) else part.maps if isinstance(part, WeightChain) else (part,)
    )
    return sum(one.flops(pairs) for one in parts if isinstance(one, AcrossHeads))
