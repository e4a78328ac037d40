"""Caches of keys and values for decoding."""

from polyhead.nn.kv_cache.base import Kept, KeyValueCache
from polyhead.nn.kv_cache.context import ContextCache
from polyhead.nn.kv_cache.growing import FixedCache, GrowingCache
from polyhead.nn.kv_cache.window import WindowCache

__all__ = ["ContextCache", "FixedCache", "GrowingCache", "Kept", "KeyValueCache", "WindowCache"]
