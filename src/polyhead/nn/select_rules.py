"""What a selector asks of the layer that has it: all keys so far, and queries that stand at their end."""

from __future__ import annotations

from collections.abc import Iterable

from polyhead.attend.selectors import Grid, Selector
from polyhead.checks import given
from polyhead.errors import ConfigError
from polyhead.nn.kv_cache import Kept

__all__ = ["check_own_ways", "check_present", "choosing_flops", "cut"]


def check_own_ways(select: Selector, kind: type, plain: type, ways: Iterable[str]) -> None:
    """Refuse a selector in a layer whose class attends in a way of its own, not in one of `plain`."""
    if any(getattr(kind, way) is not getattr(plain, way) for way in ways):
        raise ConfigError(
            f"select must be None in {kind.__name__}, which attends in a way of its own; got {given(select)}"
        )


def check_present(select: Selector, kept: Kept, shift: int) -> None:
    """Refuse a call that lacks keys, or whose queries stand `-shift` before the end of them."""
    if kept.positions is not None:
        raise cut(select, "a cache that drops some")
    if shift:
        raise cut(select, f"queries that stand {-shift} before their end")


def cut(select: Selector, what: str) -> ConfigError:
    """The error that a selector gives where it would choose among some of the keys."""
    return ConfigError(
        f"a selector chooses among all keys up to the last query, and cannot serve {what}; got "
        f"{given(select)}"
    )


def choosing_flops(
    select: Selector, head_dim: int, *, batch: int, heads: int, kv_heads: int, queries: int, keys: int
) -> int:
    """Operations of the choice itself, where the selector's scorer says how many they are."""
    if not queries or not keys:
        return 0
    return select.flops(Grid(batch, heads, kv_heads, queries, keys, select.rows, select.cols, 1.0), head_dim)
