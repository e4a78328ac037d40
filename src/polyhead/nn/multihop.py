"""Attention that goes on from the tokens that it looks at to those that they look at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.checks import whole
from polyhead.errors import ConfigError
from polyhead.nn.cost import CallShape, Cost
from polyhead.nn.kv_cache import Kept, KeyValueCache, Standing
from polyhead.nn.kv_cache.base import Streams
from polyhead.nn.kv_cache.levels import LevelCache
from polyhead.nn.projections import FanInLinear, Projection
from polyhead.nn.self_only import SelfOnlyAttention

__all__ = ["HopCache", "MultihopAttention", "MultihopProjection"]


class MultihopProjection(Projection):
    """A projection with a value map for every hop: `value` for the first, `value_2`, `value_3`, ... after it.

    Args:
        args, options: those of `Projection`.
        hops: n.
    """

    def __init__(self, *args: Any, hops: int = 2, **options: Any) -> None:
        super().__init__(*args, **options)
        self.hops = whole("hops", hops, 1)
        first = self.value
        kind: dict[str, Any] = {"device": first.weight.device, "dtype": first.weight.dtype}
        for n in range(2, self.hops + 1):
            bias = first.bias is not None
            setattr(self, f"value_{n}", FanInLinear(first.in_features, first.out_features, bias=bias, **kind))

    def further_values(self, context: Float[Tensor, "B S dc"]) -> list[Float[Tensor, "B G S Dv"]]:
        """The values of the hops after the first."""
        found = []
        for n in range(2, self.hops + 1):
            v = getattr(self, f"value_{n}")(context).unflatten(-1, (self.kv_heads, self.value_dim))
            found.append(v.transpose(1, 2))
        return found

    def flops(self, queries: int, keys: int) -> int:
        more = (self.hops - 1) * self.value.in_features * self.value.out_features
        return super().flops(queries, keys) + 2 * keys * more


class HopCache(LevelCache):
    """Keys with the values of the last hop, then the sums of every hop before it, from the last to the first.

    `append` takes keys and the values of all hops, from the last to the first. The values of the new tokens
    that are not kept as they are go with what is kept; `append_to` takes the sums that are made of them.
    """

    def append(self, *rows: Tensor, padding: Tensor | None = None, positions: Tensor | None = None) -> Kept:
        kept = super().append(*rows[:2], padding=padding, positions=positions)
        return replace(kept, rows=kept.rows + rows[2:])


class MultihopAttention(SelfOnlyAttention):
    """`MultiHeadAttention` over n hops; the equations are in `mechanisms/multihop_attention.py`.

    From the last hop to the first, every hop is a call of `attend` with the same queries and keys, for values
    U^(n) = V_n, then U^(m) = V_m + A U^(m+1), which are sums of every query head's own. A cache holds them:
    what a token has summed when it comes stays what it is.

    Args:
        args, options: those of `MultiHeadAttention`; the projection is a `MultihopProjection`.
    """

    projection: MultihopProjection
    called = "multihop_attention"
    within = "reads what the tokens that are looked at look at in turn,"
    instead = "hops=1"

    @property
    def streams(self) -> Streams:
        return tuple(stream for level in self._levels for stream in level)

    @property
    def _levels(self) -> tuple[Streams, ...]:
        """What is kept of a token: keys and the values of the last hop, then the sums of each before it."""
        sums: Streams = ((self.heads, self.value_dim),)
        return self.projection.streams, *(sums,) * (self.projection.hops - 1)

    def forward(self, x: Tensor, context: Tensor | None = None, **call: Any) -> Tensor:
        cache = call.get("cache")
        self._check_self(x, context, cache)
        if isinstance(cache, KeyValueCache):
            levels = len(cache.levels) if isinstance(cache, HopCache) else 0
            if levels != self.projection.hops:
                raise ConfigError(
                    f"cache must hold the sums of {self.projection.hops} hops: make it with new_cache of "
                    f"this module; got a {type(cache).__name__}{f' of {levels}' if levels else ''}"
                )
        return super().forward(x, **call)

    def _rows(self, source: Tensor, places: int | Tensor) -> tuple[Tensor, ...]:
        k, v = super()._rows(source, places)
        return k, *reversed((v, *self.projection.further_values(source)))

    def _options(self, queries: int, kept: Kept, mask: Mask | None, at: Standing) -> dict[str, Any]:
        return super()._options(queries, kept, mask, at) | {"cache": getattr(kept, "cache", None)}

    def _mix(
        self, q: Tensor, rows: tuple[Tensor, ...], *, cache: HopCache | None = None, **options: Any
    ) -> Tensor:
        k, sums, *values = rows
        for level, v in enumerate(values, 1):
            sums = _by_head(v, self.heads) + super()._mix(q, (k, sums), **options)
            k = _by_head(k, self.heads)  # heads that share keys look at other things, and sum up others
            if cache is not None:
                (sums,) = cache.append_to(level, sums).rows
        return super()._mix(q, (k, sums), **options)

    def _weights(
        self, q: Tensor, rows: tuple[Tensor, ...], *, cache: HopCache | None = None, **options: Any
    ) -> Tensor:
        return super()._weights(q, rows, **options)  # those of a hop, which are the same in all

    def new_cache(
        self,
        batch: int = 1,
        *,
        max_length: int | None = None,
        window: int | None = None,
        sinks: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> KeyValueCache:
        return HopCache(
            [self._cache_of(level, batch, max_length, window, sinks, device, dtype) for level in self._levels]
        )

    def _cost(self, call: CallShape) -> Cost:
        found, hops = super()._cost(call), self.projection.hops
        return replace(found, scores=hops * found.scores, values=hops * found.values)


def _by_head(rows: Float[Tensor, "B G S n"], heads: int) -> Float[Tensor, "B H S n"]:
    """The rows of G heads, for each of the H query heads that read them."""
    shared = heads // rows.shape[1]
    return rows if shared == 1 else rows[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2)
