"""Attention that knows when a token is read for the last time, and a cache that forgets it then."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from polyhead.checks import flag
from polyhead.errors import ConfigError
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.kv_cache import ForgettingCache, ForgettingKept, Kept, KeyValueCache

__all__ = ["Forgetful"]


class Forgetful(MultiHeadAttention):
    """Makes a `ForgettingCache` where one is asked for."""

    def new_cache(self, batch: int = 1, *, forget: bool = False, **options: Any) -> KeyValueCache:
        """An empty cache; see `AttentionModule.new_cache`.

        Args:
            batch: number of sequences B.
            forget: drop every row that no later token reads. It gives what a cache that keeps all of them
                gives; tokens can be taken back only as long as nothing is forgotten.
            options: those of any cache; `device` and `dtype` alone with `forget`.
        """
        flag("forget", forget)
        if not forget:
            return super().new_cache(batch, **options)
        told = [name for name in ("max_length", "window") if options.get(name) is not None]
        if told or options.get("sinks"):
            raise ConfigError(
                f"forget=True does not go with {(*told, 'sinks')[0]}: what is kept follows from the tokens"
            )
        if self._score() is not None:
            raise ConfigError(
                "forget=True needs attention without score maps and biases by position, which go by the "
                f"places of keys that are the same in all heads; got {self._score()}"
            )
        plain = super().new_cache(batch, **options)
        return ForgettingCache(batch, self.streams, device=plain.device, dtype=plain.dtype)

    def _forget(self, kept: Kept, done: Tensor) -> None:
        """Tell the cache of a call, if it is one that forgets, which rows are `done` `(B, G, S)`."""
        if isinstance(kept, ForgettingKept) and kept.cache is not None:
            kept.cache.forget(done)
