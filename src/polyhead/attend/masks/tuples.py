"""A mask for calls whose rows are a query and a key together: both must be visible to the query."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend.masks.algebra import Bounds, Mask

__all__ = ["TupleRows"]


class TupleRows(Mask):
    """Row i·S + n is query i with key n; it may look at key j if i may look at n and at j.

    Attributes:
        mask: of the call whose queries these are.
        keys: S, int64 scalar tensor.
        first: what the call of such rows takes its first row to stand at.
        start: where `mask` has the first query.
    """

    mask: Mask
    keys: Tensor
    first: Tensor
    start: Tensor

    def _origin(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Where the query of a row stands, and its key."""
        keys, first, start = (t.to(row.device) for t in (self.keys, self.first, self.start))
        index = row - first
        return torch.div(index, keys, rounding_mode="floor") + start, torch.remainder(index, keys)

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        query, key = self._origin(i)
        return self.mask.allowed(b, h, query, j) & self.mask.allowed(b, h, query, key)

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        (q0, n0), (q1, n1) = self._origin(i0), self._origin(i1)
        several = q0 != q1  # rows of several queries: any key may be among theirs
        n0 = torch.where(several, 0, n0)
        n1 = torch.where(several, self.keys.to(n1.device) - 1, n1)
        some, every = self.mask.bounds(b, h, q0, q1, j0, j1)
        own_some, own_every = self.mask.bounds(b, h, q0, q1, n0, n1)
        return some & own_some, every & own_every
