"""Attention made small enough to travel inside a page: pictures of heads, and where tokens look.

A page of 10 MB has no room for what 2,000 heads do on 8,192 tokens. Here it is decided what is kept: the side
of the pictures falls with the number of heads, and of a long text only some passages can be pointed at.
Everything is packed head by head (zlib, base64), so that a reader unpacks one head when it is asked for.

Layout of a head's lookups, before compression: for each of the k slots in turn, three runs of one byte per
query: the position's low byte, its high byte, and the weight w as round(255 √w). Slots are ordered by
position. The first slot holds the position itself, the others the query's position minus theirs (modulo
65536): what repeats most, the sinks and the neighbours, then repeats as bytes too. A weight of 0 marks an
empty slot.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyhead.errors import ConfigError, ShapeError
from polyhead.report.data import Lookups, Pictures

__all__ = [
    "LOOKUP_BYTES",
    "PICTURE_BYTES",
    "limit_lookups",
    "lookup_queries",
    "pack_lookups",
    "pack_pictures",
    "picture_side",
    "unpack_lookups",
    "unpack_picture",
]

PICTURE_BYTES = 2_900_000  # what all pictures together may take in the page
LOOKUP_BYTES = 5_800_000

_SIDES = (96, 80, 64, 56, 48, 40, 32, 24, 16, 12, 8)
_LEVELS = 127  # shades of a cell
_FLOOR = 999.0  # a cell of 1/1000 is about one tenth of the scale
_RATIO = 0.6  # what zlib makes of lookups; measured on a real model: 0.55


def _squeeze(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw, 9)).decode("ascii")


def _stretch(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)


def picture_side(heads: int, *, causal: bool, tokens: int | None = None) -> int:
    """The side of the pictures for so many heads: at most one cell a token, and `PICTURE_BYTES` together."""
    for side in _SIDES:
        cells = side * (side + 1) // 2 if causal else side * side
        fits = heads * cells * 0.9 * 4 / 3 <= PICTURE_BYTES  # 127 shades are 7 bits of 8; base64 adds a third
        if fits and (tokens is None or side <= tokens):
            return side
    return min(_SIDES[-1], tokens or _SIDES[-1])


def pack_pictures(mass: Sequence[Any], *, causal: bool) -> Pictures:
    """Pictures from the attention mass between stretches of the text.

    Args:
        mass: one array `(heads, side, side)` per layer, as defined in `Pictures`; values in 0..1.
        causal: keep only the cells on and below the diagonal.
    """
    layers = [np.asarray(layer, dtype=np.float64) for layer in mass]
    side = layers[0].shape[-1] if layers else 0
    for i, layer in enumerate(layers):
        if layer.ndim != 3 or layer.shape[1:] != (side, side):
            raise ShapeError(f"mass[{i}] has shape {layer.shape}; expected (heads, {side}, {side})")
    rows, cols = np.tril_indices(side) if causal else np.indices((side, side)).reshape(2, -1)
    packed = []
    for layer in layers:
        shades = np.log1p(_FLOOR * np.clip(np.nan_to_num(layer), 0, 1)) / math.log1p(_FLOOR)
        cells = np.round(shades * _LEVELS).astype(np.uint8)[:, rows, cols]
        packed.append(tuple(_squeeze(head.tobytes()) for head in cells))
    return Pictures(side=side, causal=causal, packed=tuple(packed))


def unpack_picture(pictures: Pictures, layer: int, head: int) -> NDArray[np.float64]:
    """The mass `(side, side)` of one head, to about 5 % of each value."""
    side = pictures.side
    shades = _stretch(pictures.packed[layer][head]).astype(np.float64) / _LEVELS
    mass = np.expm1(shades * math.log1p(_FLOOR)) / _FLOOR
    if not pictures.causal:
        return mass.reshape(side, side)
    picture = np.zeros((side, side))
    picture[np.tril_indices(side)] = mass
    return picture


def lookup_queries(heads: int, tokens: int, *, k: int = 4) -> NDArray[np.int64]:
    """The tokens whose lookups to record: all, or else passages spread over the text from start to end.

    Passages rather than every n-th token, because a head is understood by going along a sentence.
    """
    affordable = int(LOOKUP_BYTES * 3 / 4 / (heads * k * 3 * _RATIO))
    if affordable >= tokens:
        return np.arange(tokens)
    passages = max(2, affordable // 64)
    length = max(8, affordable // passages)
    starts = np.linspace(0, max(0, tokens - length), passages).round().astype(np.int64)
    positions: NDArray[np.int64] = np.unique(starts[:, None] + np.arange(length))
    return positions[positions < tokens]


def pack_lookups(
    queries: Any,
    positions: Sequence[Any],
    weights: Sequence[Any],
    *,
    limit: int = LOOKUP_BYTES,
) -> Lookups:
    """Lookups from the most attended positions of each query.

    Args:
        queries: positions of the queries, ascending `(q,)`; `lookup_queries` proposes them.
        positions: one array `(heads, q, k)` of attended positions per layer.
        weights: one array `(heads, q, k)` of attention weights per layer; 0 marks an empty slot, whatever
            position it has (-1, say).
        limit: bytes that the result may take. Where compression falls short of it, passages are left out.
    """
    queries = np.asarray(queries, dtype=np.int64)
    k = int(np.asarray(positions[0]).shape[-1])
    if queries.size and not 0 <= queries.max() < 65536:
        raise ConfigError(f"queries must lie in 0..65535, got {queries.max()}")
    packed = []
    for i, (p, w) in enumerate(zip(positions, weights, strict=True)):
        p, w = np.asarray(p), np.asarray(w)
        if p.shape != w.shape or p.shape[1:] != (queries.size, k):
            raise ShapeError(
                f"positions[{i}] has shape {p.shape} and weights[{i}] {w.shape}; "
                f"expected (heads, {queries.size}, {k}) for both"
            )
        packed.append(tuple(_pack_head(queries, hp, hw) for hp, hw in zip(p, w, strict=True)))
    return limit_lookups(Lookups(k, tuple(queries.tolist()), tuple(packed)), limit)


def _pack_head(queries: NDArray[Any], positions: NDArray[Any], weights: NDArray[Any]) -> str:
    order = np.argsort(positions, axis=1, kind="stable")
    positions = np.maximum(np.take_along_axis(positions, order, axis=1).astype(np.int64), 0)
    weights = np.clip(np.nan_to_num(np.take_along_axis(weights, order, axis=1).astype(np.float64)), 0, 1)
    stored = queries[:, None] - positions
    stored[:, 0] = positions[:, 0]
    shade = np.round(255 * np.sqrt(weights)).astype(np.uint8)
    planes = np.stack([stored & 255, (stored >> 8) & 255, shade]).astype(np.uint8)  # (3, q, k)
    return _squeeze(planes.transpose(2, 0, 1).tobytes())


def unpack_lookups(lookups: Lookups, layer: int, head: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Positions and weights `(q, k)` of one head, ordered by position."""
    queries = np.asarray(lookups.queries, dtype=np.int64)
    planes = _stretch(lookups.packed[layer][head]).reshape(lookups.k, 3, queries.size).astype(np.int64)
    stored = planes[:, 0] | planes[:, 1] << 8
    positions = (queries - stored) & 65535
    positions[0] = stored[0]
    return positions.T, (planes[:, 2] / 255.0).T ** 2


def limit_lookups(lookups: Lookups, limit: int) -> Lookups:
    """`lookups` with as many of its passages left out, evenly, as it takes to need `limit` bytes at most."""
    size = sum(len(head) + 3 for layer in lookups.packed for head in layer)
    if size <= limit or not lookups.queries:
        return lookups
    queries = np.asarray(lookups.queries)
    # stretches of at most 64 tokens that follow one another, of which an even selection stays
    breaks = np.flatnonzero(np.diff(queries) != 1) + 1
    passages = [
        part[i : i + 64]
        for part in np.split(np.arange(queries.size), breaks)
        for i in range(0, part.size, 64)
    ]
    share = 0.95 * limit / size
    keep = int(len(passages) * share)
    if keep >= 2:
        chosen = np.linspace(0, len(passages) - 1, keep).round().astype(int)
        rows = np.concatenate([passages[i] for i in np.unique(chosen)])
    else:  # fewer than two passages: the start of the text and its end
        half = max(1, int(queries.size * share / 2))
        rows = np.unique(np.concatenate([np.arange(half), np.arange(queries.size - half, queries.size)]))
    if rows.size >= queries.size:
        rows = np.arange(queries.size // 2)
    packed = tuple(
        tuple(
            _pack_head(queries[rows], *(part[rows] for part in unpack_lookups(lookups, i, h)))
            for h in range(len(layer))
        )
        for i, layer in enumerate(lookups.packed)
    )
    return limit_lookups(Lookups(lookups.k, tuple(queries[rows].tolist()), packed), limit)
