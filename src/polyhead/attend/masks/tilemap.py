"""Where the visible tiles are: a mask over tiles instead of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from polyhead.attend.masks.algebra import Mask
from polyhead.checks import FARTHEST, given, whole
from polyhead.errors import ConfigError
from polyhead.shapes import broadcast_shape

__all__ = ["TileMap", "densify", "tile_map", "visible_tiles"]

_HELD = 1 << 22  # pairs that are asked at a time


@dataclass(frozen=True, eq=False)
class TileMap:
    """What a mask lets be seen, tile by tile.

    Attributes:
        some: bool `(B or 1, H or 1, row tiles, column tiles)`; False: nothing of the tile is allowed.
        every: bool of the same shape; True: all of the tile is allowed.
        queries, keys: lengths of the call.
        rows, cols: height and width of a tile; the last ones may be smaller.
    """

    some: Tensor
    every: Tensor
    queries: int
    keys: int
    rows: int
    cols: int

    @cached_property
    def _joint(self) -> tuple[list[list[bool]], list[list[bool]]]:
        """Of all batch items and heads together: tiles that any of them sees, that all see whole."""
        some = self.some.flatten(0, 1).any(0)
        every = self.every.flatten(0, 1).all(0) & some
        return some.tolist(), every.tolist()

    def columns(self, tile: int) -> list[tuple[int, int, bool]]:
        """The key columns that any head of any batch item sees from row tile `tile`.

        Returns:
            Runs `(start, stop, every)` of key indices, ascending, as long as possible; `every` says that
            all heads of all batch items see the whole run, so that no mask is needed there.
        """
        some, every = (part[tile] for part in self._joint)
        runs = []
        start = 0
        for (seen, full), run in groupby(zip(some, every, strict=True)):
            stop = start + len(list(run))
            if seen:
                runs.append((start * self.cols, min(stop * self.cols, self.keys), full))
            start = stop
        return runs

    def density(self) -> float:
        """The part of all pairs that lies in tiles of which something is seen, over batch and heads."""
        heights = _sizes(self.queries, self.rows, self.some.device)
        widths = _sizes(self.keys, self.cols, self.some.device)
        pairs = self.queries * self.keys * self.some.shape[0] * self.some.shape[1]
        if pairs == 0:
            return 0.0
        area = heights[:, None] * widths
        return float((self.some * area).sum() / pairs)

    def picture(self, batch: int | None = None, head: int | None = None) -> str:
        """The tiles as text, a line for each row of tiles: █ whole, ▒ in part, · nothing.

        Without `batch` and `head` it shows all of them together, as `columns` sees them.
        """
        if batch is None and head is None:
            some, every = self._joint
        else:
            at = tuple(min(n or 0, size - 1) for n, size in zip((batch, head), self.some.shape, strict=False))
            some, every = self.some[at].tolist(), self.every[at].tolist()
        lines = (
            "".join("█" if full else "▒" if seen else "·" for seen, full in zip(*line, strict=True))
            for line in zip(some, every, strict=True)
        )
        return "\n".join(lines)


def _sizes(length: int, step: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, length, step, device=device)
    return (length - starts).clamp(max=step)


def tile_map(
    mask: Mask,
    *,
    batch: int = 1,
    heads: int = 1,
    queries: int,
    keys: int,
    offset: int | None = None,
    rows: int,
    cols: int,
    device: torch.device | str | None = None,
) -> TileMap:
    """The tiles of a call that `mask` lets be seen, in O(L/rows * S/cols) time and memory.

    Args:
        mask: the mask.
        batch, heads, queries, keys: B, H, L and S of the call.
        offset: position of the first query; by default the queries are the last positions, keys - queries.
        rows, cols: height and width of a tile.
        device: where to work it out. Control flow reads the result, so the CPU is often best.

    Raises:
        ShapeError: the mask holds data for another batch, length or number of heads.
    """
    for name, size in (("rows", rows), ("cols", cols)):
        whole(f"tile_map: {name}", size, 1)
    offset = _checked("tile_map", mask, batch, heads, queries, keys, offset)
    mask = mask.to(device) if device is not None else mask
    b, h = _batch_and_head(batch, heads, device)
    top = torch.arange(0, queries, rows, device=device)
    left = torch.arange(0, keys, cols, device=device)
    bottom, right = (top + rows).clamp(max=queries) - 1, (left + cols).clamp(max=keys) - 1
    i0, i1 = top[:, None] + offset, bottom[:, None] + offset
    some, every = (_spread(t, len(top), len(left)) for t in mask.bounds(b, h, i0, i1, left, right))
    some, every = torch.broadcast_tensors(some, every)
    return TileMap(some, every, queries, keys, rows, cols)


def visible_tiles(
    mask: Mask,
    *,
    batch: int = 1,
    heads: int = 1,
    queries: int,
    keys: int,
    offset: int | None = None,
    rows: int,
    cols: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Of which tiles something is seen, bool `(B or 1, H or 1, row tiles, column tiles)`, for every mask.

    `some` of `tile_map` where that is exact. Elsewhere the tiles that it leaves open are asked pair by pair:
    under `causal() & padding(p)` those of the diagonal and at the borders of the padding.

    Args, Raises: those of `tile_map`.
    """
    offset = keys - queries if offset is None else offset
    found = tile_map(
        mask,
        batch=batch,
        heads=heads,
        queries=queries,
        keys=keys,
        offset=offset,
        rows=rows,
        cols=cols,
        device=device,
    )
    some, open_ones = found.some, found.some & ~found.every
    if mask.exact[0] or not bool(open_ones.any()):
        return some
    mask = mask.to(device) if device is not None else mask
    b, h = _batch_and_head(batch, heads, device)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    # tiles of which nothing is known in advance may be alike for items and heads whose pairs are not
    alike = mask.allowed(b, h, first[:, None] + offset, first)
    sizes = broadcast_shape(alike.shape, (*some.shape[:2], 1, 1))[:2]
    some = some.expand(*sizes, -1, -1).clone()
    down, right = torch.arange(rows, device=device)[:, None], torch.arange(cols, device=device)
    for part in open_ones.expand_as(some).nonzero().split(max(1, _HELD // (rows * cols))):
        item, head, row, col = part[..., None, None].unbind(1)
        i = (row * rows + down).clamp(max=queries - 1) + offset
        j = (col * cols + right).clamp(max=keys - 1)
        seen = mask.allowed(item, head, i, j).expand(len(part), rows, cols)
        some[tuple(part.T)] = seen.flatten(1).any(1)
    return some


def densify(
    mask: Mask,
    *,
    batch: int = 1,
    heads: int = 1,
    queries: int,
    keys: int,
    offset: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask pair by pair, bool `(B or 1, H or 1, L, S)`: for tests and for the dense backend."""
    offset = _checked("densify", mask, batch, heads, queries, keys, offset)
    mask = mask.to(device) if device is not None else mask
    b, h = _batch_and_head(batch, heads, device)
    i = torch.arange(queries, device=device)[:, None] + offset
    j = torch.arange(keys, device=device)
    return _spread(mask.allowed(b, h, i, j), queries, keys)


def _checked(
    owner: str, mask: Mask, batch: int, heads: int, queries: int, keys: int, offset: int | None
) -> int:
    """The position of the first query, once everything has been looked at."""
    if not isinstance(mask, Mask):
        raise ConfigError(f"{owner}: mask must be a mask such as causal(); got {given(mask)}")
    for name, size in (("batch", batch), ("heads", heads), ("queries", queries), ("keys", keys)):
        whole(f"{owner}: {name}", size, 0)
    offset = keys - queries if offset is None else whole(f"{owner}: offset", offset, -FARTHEST)
    mask.check(batch=batch, heads=heads, queries=queries, keys=keys, offset=offset)
    return offset


def _batch_and_head(batch: int, heads: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    return b, torch.arange(heads, device=device).view(-1, 1, 1)


def _spread(found: Tensor, rows: int, cols: int) -> Tensor:
    found = found[(None,) * (4 - found.ndim)]
    return found.expand(found.shape[0], found.shape[1], rows, cols)
