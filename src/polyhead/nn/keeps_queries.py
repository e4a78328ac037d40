"""Attention that reads the queries of earlier tokens too: a cache gets queries, keys and values."""

from __future__ import annotations

from torch import Tensor

from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.kv_cache import KeyValueCache

__all__ = ["KeepsQueries"]


class KeepsQueries(MultiHeadAttention):
    """`MultiHeadAttention` whose queries are handed to the cache, before keys and values."""

    def _project(
        self,
        x: Tensor,
        source: Tensor,
        where: int | Tensor,
        places: int | Tensor,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q = self._queries(x, where)
        return q, (q, *self._rows(source, places))
