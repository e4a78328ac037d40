"""A cache that remembers the latest queries besides its rows, for maps that read the pairs of these."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.nn.kv_cache.base import Kept, KeyValueCache
from polyhead.nn.kv_cache.context import ContextCache
from polyhead.nn.kv_cache.recent import RecentInputs

__all__ = ["RecentQueries"]


class RecentQueries(RecentInputs):
    """Another cache, and the latest queries: those whose pairs the next token's weights depend on.

    Args:
        rows: the cache of rows, or a context.
        batch: number of sequences B.
        heads, width: of a query.
        reach: queries before a query that its weights depend on.
        mask: what a query may see of `rows`, where these hold more for the sake of the queries before.
        device, dtype: of the queries.
    """

    def __init__(
        self,
        rows: KeyValueCache,
        batch: int,
        heads: int,
        width: int,
        reach: int,
        *,
        mask: Mask | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(rows, batch, heads * width, reach, device=device, dtype=dtype)
        self.mask = mask
        self._start = rows.length  # a context's first query stands anywhere

    def recall(self, q: Tensor) -> Tensor:
        """The queries `(B, H, n + L, D)` that end with q `(B, H, L, D)`: n is `reach`, if there are so many.

        Takes note of q for the next call; to be called before the rows of the same tokens are appended.
        """
        before = min(self.reach, self.length - self._start)
        found, _ = self.remember(q.transpose(1, 2).flatten(2))
        found = found[:, self.reach - before :]
        return found.unflatten(-1, (q.shape[1], q.shape[3])).transpose(1, 2)

    def append(self, *rows: Tensor, padding: Tensor | None = None, positions: Tensor | None = None) -> Kept:
        kept = super().append(*rows, padding=padding, positions=positions)
        return kept if self.mask is None else replace(kept, mask=self.mask)

    def read(self, queries: int) -> Kept:
        """The context, for the next `queries` queries."""
        assert isinstance(self.rows, ContextCache)
        return self.rows.read(queries)
