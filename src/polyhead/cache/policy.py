"""Which tokens each key/value head keeps: the whole context, or sinks and a recent window."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polyhead.checks import given, several
from polyhead.errors import ConfigError
from polyhead.head_scores import Heads, HeadScores
from polyhead.hf import LayerInfo

__all__ = ["Keep", "full_heads", "head_windows", "keeps"]


@dataclass(frozen=True)
class Keep:
    """What a head keeps. With `window` None everything, else the first `sink` tokens and the last `window`.

    Attributes:
        sink: first tokens of the sequence that stay.
        window: recent tokens that stay, the current one among them.
        horizon: the model's own sliding window: no token further back is ever seen, sinks included.
    """

    sink: int = 0
    window: int | None = None
    horizon: int | None = None

    @property
    def size(self) -> int | None:
        """The most tokens that are kept; None: all."""
        return None if self.window is None else self.sink + self.window


def keeps(
    full: Sequence[bool], sink: int, windows: Sequence[int], horizon: int | None
) -> list[tuple[Keep, tuple[int, ...]]]:
    """The different rules of one layer's key/value heads, each with its heads in ascending order.

    In a layer with a sliding window of the model's own no head keeps more than that window.
    """
    whole = Keep() if horizon is None else Keep(0, horizon, horizon)
    groups: dict[Keep, list[int]] = {}
    for head, (kept, window) in enumerate(zip(full, windows, strict=True)):
        if kept or (horizon is not None and window >= horizon):
            keep = whole
        else:
            keep = Keep(sink, window, horizon)
        groups.setdefault(keep, []).append(head)
    return [(keep, tuple(heads)) for keep, heads in groups.items()]


def head_windows(window: Any, layers: Sequence[LayerInfo]) -> list[tuple[int, ...]]:
    """For each of `layers`, the window of each of its key/value heads.

    Args:
        window: see `polyhead.cache.per_head`.
        layers: the layers that a cache serves.

    Raises:
        ConfigError: `window` is no number of tokens, nor one for each head.
    """
    if _is_number(window):
        size = _tokens(window)
        return [(size,) * layer.kv_heads for layer in layers]
    rows: list[Any] = [_plain(row) for row in window] if several(window) else [None]
    if not all(several(row) for row in rows):
        raise ConfigError(
            "window must be a whole number of tokens, at least 1, or such a number for each KV head of each "
            f"layer, [[256, 1024], [256, 256], ...]; got {given(window)}"
        )
    rows = [list(row) for row in rows]
    _fits("window", "number", rows, layers)
    return [tuple(_tokens(size) for size in row) for row in rows]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _tokens(value: Any) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"window must be a whole number of tokens, at least 1; got {value!r}")
    return int(value)


def full_heads(
    full: Any, layers: Sequence[LayerInfo], scores: HeadScores | None = None
) -> list[tuple[bool, ...]]:
    """For each of `layers`, whether each of its key/value heads keeps the whole context.

    Args:
        full: see `polyhead.cache.per_head`.
        layers: the layers that a cache serves.
        scores: what a number as `full` is a share or a count of.

    Raises:
        ConfigError: `full` names heads that are not there, or is nothing of the kind.
    """
    if scores is not None and not _is_number(full):
        raise ConfigError(
            f"scores= goes with a number as full= (a share or a count of heads); got full={full!r}"
        )
    if isinstance(full, str):
        if full not in ("all", "none"):
            raise ConfigError(
                f"full must be 'all', 'none', heads, or a share of heads with scores=; got {full!r}"
            )
        return [(full == "all",) * layer.kv_heads for layer in layers]
    if _is_number(full):
        if scores is None:
            raise ConfigError(
                f"full={full!r} is a number of heads and does not say which; pass scores= as well, for "
                "example full=0.2, scores=profile['retrieval'], or the heads themselves: "
                "full=profile['retrieval'].by_kv_head().top(0.2)"
            )
        grouped = scores
        if scores.level == "query":
            if scores.kv_groups is None:
                scores = replace(scores, kv_groups=_groups(scores, layers))
            grouped = scores.by_kv_head("max")
        return _of_pairs(grouped.top(full), "kv", layers)
    if isinstance(full, HeadScores):
        raise ConfigError(f"full={full!r} are scores; choose heads from them, for example scores.top(0.2)")
    if isinstance(full, Heads):
        return _of_pairs(full, full.level, layers)
    rows = list(full) if isinstance(full, Iterable) else None
    if rows is not None and all(_is_row(row) for row in rows) and (rows or not layers):
        return _of_rows(rows, layers)
    if rows is not None and all(_is_pair(pair) for pair in rows):
        return _of_pairs([tuple(pair) for pair in rows], getattr(full, "level", "kv"), layers)
    raise ConfigError(
        "full must be Heads (scores.top(0.2)), pairs (layer, KV head), a bool for each KV head of each "
        f"layer, a number with scores=, 'all' or 'none'; got {full!r}"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _is_row(row: Any) -> bool:
    return isinstance(row, Iterable) and not isinstance(row, str) and all(_is_bool(x) for x in row)


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(x, numbers.Integral) for x in pair)
    )


def _groups(scores: HeadScores, layers: Sequence[LayerInfo]) -> tuple[int, ...]:
    sizes = {layer.index: layer.heads // layer.kv_heads for layer in layers}
    return tuple(sizes.get(index, 1) for index in range(len(scores.values)))


def _of_rows(rows: list[Any], layers: Sequence[LayerInfo]) -> list[tuple[bool, ...]]:
    _fits("full", "bool", rows, layers)
    return [tuple(bool(x) for x in row) for row in rows]


def _fits(name: str, what: str, rows: list[Any], layers: Sequence[LayerInfo]) -> None:
    if len(rows) != len(layers):
        raise ConfigError(
            f"{name} must have a row of {what}s for each of the model's {len(layers)} layers; got "
            f"{len(rows)} rows"
        )
    for row, layer in zip(rows, layers, strict=True):
        if len(row) != layer.kv_heads:
            raise ConfigError(
                f"{name} must have one {what} for each KV head: {layer.name!r} has {layer.kv_heads} of them; "
                f"got {len(row)}"
            )


def _of_pairs(
    pairs: Iterable[tuple[int, int]], level: str, layers: Sequence[LayerInfo]
) -> list[tuple[bool, ...]]:
    by_index = {layer.index: layer for layer in layers}
    chosen: dict[int, set[int]] = {layer.index: set() for layer in layers}
    for index, head in pairs:
        layer = by_index.get(index)
        if layer is None:
            raise ConfigError(
                f"full names head {head} of layer {index}, but the layers with a cache are "
                f"{_span(sorted(by_index))}"
            )
        count = layer.heads if level == "query" else layer.kv_heads
        if not 0 <= head < count:
            kind = "query" if level == "query" else "KV"
            raise ConfigError(f"full names {kind} head {head} of layer {index}, which has {count} of them")
        chosen[index].add(head * layer.kv_heads // layer.heads if level == "query" else head)
    return [tuple(head in chosen[layer.index] for head in range(layer.kv_heads)) for layer in layers]


def _span(indices: list[int]) -> str:
    if indices == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]} to {indices[-1]}"
    return ", ".join(map(str, indices))
