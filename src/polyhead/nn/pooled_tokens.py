"""Self-attention over tokens that are blended with their neighbours first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.cost import Cost
from polyhead.nn.kv_cache import ContextCache, KeyValueCache
from polyhead.nn.kv_cache.recent import RecentInputs
from polyhead.nn.patterns import never_ahead
from polyhead.nn.token_pooling import TokenPooling

__all__ = ["PooledTokensAttention"]


class PooledTokensAttention(MultiHeadAttention):
    """`MultiHeadAttention` whose queries, keys and values are of `pooling(x)`.

    Args:
        pooling: a `TokenPooling`.
        parts: those of `MultiHeadAttention`.
    """

    def __init__(self, *parts: Any, pooling: TokenPooling, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.pooling = pooling

    def forward(self, x: Tensor, context: Tensor | None = None, **call: Any) -> Tensor:
        if context is not None or getattr(call.get("cache"), "holds_context", False):
            raise _no_context()
        return super().forward(x, **call)

    def _inputs(
        self, x: Tensor, *, mask: Mask | None, padding: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        blended = self._blended(x, mask, padding, cache)
        return blended if padding is None else blended.masked_fill(~padding[..., None], 0.0)

    def _blended(
        self, x: Tensor, mask: Mask | None, padding: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        layout = self.pooling.layout
        if layout != "past" and self.pooling.scales > 1:
            batch, length, sizes = x.shape[0], x.shape[1], {"heads": self.heads}
            if cache is not None or (
                mask is not None and never_ahead(mask, 0, length, length, batch=batch, **sizes)
            ):
                raise UnsupportedPattern(
                    f"tap_adl with layout={layout!r} blends tokens with later ones, which neither a causal "
                    'mask nor a cache can know; take layout="past"'
                )
            return self.pooling(x, padding)
        if cache is None or not self.pooling.reach:
            return self.pooling(x, padding)
        if not isinstance(cache, RecentInputs):
            raise ConfigError(
                "cache must hold the latest inputs besides keys and values: make it with new_cache of this "
                f"module; got a {type(cache).__name__}"
            )
        recent, real = cache.remember(x, padding)
        return self.pooling(recent, real)[:, self.pooling.reach :]

    def new_cache(self, batch: int = 1, **options: Any) -> KeyValueCache:
        rows = super().new_cache(batch, **options)
        if not self.pooling.reach or self.pooling.layout != "past":
            return rows
        return RecentInputs(rows, batch, self.pooling.dim, self.pooling.reach)

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
        own = self.projection.key.weight.dtype if dtype is None else dtype
        state = 0
        if self.pooling.reach and self.pooling.layout == "past":
            state = RecentInputs.state_bytes(self.pooling.dim, self.pooling.reach, own.itemsize)
        return replace(
            plain,
            projections=plain.projections + batch * self.pooling.flops(length),
            cache_bytes=plain.cache_bytes + batch * state,
            state_bytes=state,
        )


def _no_context() -> UnsupportedPattern:
    return UnsupportedPattern(
        "tap_adl blends the tokens of one sequence and attends within it; it does not support cross: call it "
        "without context, and take mha for cross-attention"
    )
