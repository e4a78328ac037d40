"""A mask for calls whose queries and keys were both picked out of a larger call."""

from __future__ import annotations

from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.masks.algebra import Bounds
from polyhead.shapes import broadcast_shape

__all__ = ["LaneMask"]


class LaneMask(Mask):
    """`mask` where row r and key n of item b are row `rows[b, r]` and key `keys[b, n]` of a larger call.

    Rows and keys must not descend: a tile is then known by its first and last, and what holds for all that
    lies between them holds for those that were picked.

    Attributes:
        mask: the mask of the larger call.
        rows: int64 `(B, L)`, positions of the queries there.
        keys: int64 `(B, S)`, positions of the keys there.
        items: int64 `(B,)`, the batch item there.
        heads: int64 `(B,)`, the head there that is head 0 of the item here; the next ones follow it.
    """

    mask: Mask
    rows: Tensor
    keys: Tensor
    items: Tensor
    heads: Tensor

    def _origin(self, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.items.to(b.device)[b], self.heads.to(b.device)[b] + h

    def _row(self, b: Tensor, i: Tensor) -> Tensor:
        first = self.keys.shape[1] - self.rows.shape[1]  # the position of row 0 here
        return self.rows.to(i.device)[b, i - first]

    def _key(self, b: Tensor, j: Tensor) -> Tensor:
        return self.keys.to(j.device)[b, j]

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.mask.allowed(*self._origin(b, h), self._row(b, i), self._key(b, j))

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        rows = self._row(b, i0), self._row(b, i1)
        some, every = self.mask.bounds(*self._origin(b, h), *rows, self._key(b, j0), self._key(b, j1))
        shape = broadcast_shape(b.shape, h.shape, i0.shape, j0.shape)
        return some.expand(shape), every.expand(shape)
