"""Attention in a latent whose rows depend on the tokens just before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.compressed_projection import CompressedProjection
from polyhead.nn.cost import Cost
from polyhead.nn.kv_cache import ContextCache, KeyValueCache
from polyhead.nn.kv_cache.recent import RecentInputs

__all__ = ["CompressedAttention"]


class CompressedAttention(MultiHeadAttention):
    """`MultiHeadAttention` whose projection is a `CompressedProjection`."""

    projection: CompressedProjection  # type: ignore[assignment]

    def forward(self, x: Tensor, context: Tensor | None = None, **call: Any) -> Tensor:
        if context is not None or getattr(call.get("cache"), "holds_context", False):
            raise _no_context()
        return super().forward(x, **call)

    def _project(
        self,
        x: Tensor,
        source: Tensor,
        where: int | Tensor,
        places: int | Tensor,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        begun = cache is not None and self.projection.reach > 0
        if begun:
            if not isinstance(cache, RecentInputs):
                raise ConfigError(
                    "cache must hold the latest inputs besides keys and values: make it with new_cache of "
                    f"this module; got a {type(cache).__name__}"
                )
            x, _ = cache.remember(x)
        q, k, v = self.projection(x, begun)
        return self.position.turn(q, where), (self.position.turn(k, places), v)

    def new_cache(self, batch: int = 1, **options: Any) -> KeyValueCache:
        rows = super().new_cache(batch, **options)
        own = self.projection
        if not own.reach:
            return rows
        return RecentInputs(rows, batch, own.dim, own.reach)

    def new_context_cache(self, context: Tensor, **options: Any) -> ContextCache:
        raise _no_context()

    def cost(
        self,
        length: int,
        batch: int = 1,
        context_length: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Cost:
        plain = super().cost(length, batch, context_length, dtype=dtype)
        own, kind = self.projection, self.projection.key.weight.dtype if dtype is None else dtype
        state = RecentInputs.state_bytes(own.dim, own.reach, kind.itemsize) if own.reach else 0
        return replace(plain, cache_bytes=plain.cache_bytes + batch * state, state_bytes=state)


def _no_context() -> UnsupportedPattern:
    return UnsupportedPattern(
        "compressed_convolutional makes queries and keys of the same tokens; it does not support cross: call "
        "it without context, and take grouped_query for cross-attention"
    )
