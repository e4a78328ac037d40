"""What tiles can gain on a mask: how many of them are visited, against how many pairs are seen.

A kernel that works on tiles reads a tile as soon as one of its pairs is seen. On a grid a tile is a box of
places on every axis, which lie side by side once tokens are put in that order. For a neighbourhood the
visited tiles of an axis are those between the first and the last key that any query of the tile sees; those
of several axes multiply.

Paper 188: Generalized Neighborhood Attention, arXiv 2504.16922. Its simulator is not published; this is our
reading. Tiles of a dilated neighbourhood lie within one group of places of equal remainder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from polyhead.attend.grid_tiles import runs
from polyhead.attend.masks import Mask, Neighborhood, tile_map
from polyhead.attend.masks.checks import per_axis
from polyhead.attend.masks.neighborhood import Axis
from polyhead.checks import given, whole
from polyhead.errors import ConfigError

__all__ = ["Simulation", "simulate"]


@dataclass(frozen=True)
class Simulation:
    """Tiles and pairs of a mask, over all batch items and heads.

    Attributes:
        mask: the mask.
        tile, key_tile: queries and keys of a tile, on every axis.
        tiles: all tiles.
        visited: tiles of which something is seen.
        full: tiles that are seen whole.
        pairs: all pairs.
        read: pairs in visited tiles.
        allowed: pairs that are seen.
    """

    mask: Mask
    tile: tuple[int, ...]
    key_tile: tuple[int, ...]
    tiles: int
    visited: int
    full: int
    pairs: int
    read: int
    allowed: int

    @property
    def share(self) -> float:
        """The part of all tiles that is visited."""
        return self.visited / self.tiles if self.tiles else 0.0

    @property
    def speedup(self) -> float:
        """How many times fewer tiles are visited than there are: what a kernel on tiles gains at most."""
        return self.tiles / self.visited if self.visited else math.inf

    @property
    def flop_bound(self) -> float:
        """How many times fewer pairs are seen than there are: what could be gained without tiles."""
        return self.pairs / self.allowed if self.allowed else math.inf

    @property
    def block_sparse(self) -> bool:
        """Whether every visited tile is seen whole: no mask is needed, and nothing is computed in vain."""
        return self.read == self.allowed

    def __str__(self) -> str:
        shape = " by ".join("×".join(map(str, side)) for side in (self.tile, self.key_tile))
        vain = 1 - self.allowed / self.read if self.read else 0.0
        last = "all of them whole" if self.block_sparse else f"{self.full:,} of them whole"
        return "\n".join(
            (
                f"{self.mask}, tiles of {shape}",
                f"visited   {self.visited:,} of {self.tiles:,} tiles ({self.share:.1%}), {last}",
                f"speed-up  at most {self.speedup:.2f} x; pairs alone would give {self.flop_bound:.2f} x",
                f"in vain   {vain:.1%} of the pairs that are read",
            )
        )


def simulate(
    mask: Mask,
    tile: int | Sequence[int],
    key_tile: int | Sequence[int] | None = None,
    *,
    queries: int | None = None,
    keys: int | None = None,
    batch: int = 1,
    heads: int = 1,
) -> Simulation:
    """What a kernel on tiles visits of a mask, in numbers.

    Args:
        mask: a `neighborhood` alone, whose tiles are boxes of its grid; or any mask, whose tiles are runs of
            positions.
        tile: queries of a tile; for a neighbourhood one number, or one for every axis.
        key_tile: keys of a tile; default as `tile`.
        queries, keys: L and S for a mask that is no neighbourhood alone; default of L is S.
        batch, heads: B and H; a neighbourhood is the same for all of them, and counted once.

    Raises:
        ConfigError: a value does not fit.
        ShapeError: the mask holds data for another shape of call.
    """
    if not isinstance(mask, Mask):
        raise ConfigError(f"simulate: mask must be a mask such as neighborhood((8, 8), 3); got {given(mask)}")
    if not isinstance(mask, Neighborhood):
        return _flat(mask, tile, key_tile, queries, keys, batch, heads)
    for name, value in (("queries", queries), ("keys", keys)):
        if value is not None:
            raise ConfigError(f"simulate: {name} must be left out, the grid says it; got {given(value)}")
    count = len(mask.grid)
    own = per_axis("simulate", "tile", tile, count, int)
    other = own if key_tile is None else per_axis("simulate", "key_tile", key_tile, count, int)
    totals = [_of_axis(*axis) for axis in zip(mask.axes(), own, other, strict=True)]
    return Simulation(mask, own, other, *map(math.prod, zip(*totals, strict=True)))


def _of_axis(axis: Axis, tile: int, key_tile: int) -> tuple[int, int, int, int, int, int]:
    """Tiles, visited, full, pairs, read and allowed of one axis."""
    visited = full = read = allowed = 0
    places = [len(range(r, axis.length, axis.dilation)) for r in range(axis.dilation)]
    found = runs(axis, tile)
    for run in found:
        group, rows = places[run.keys.start % axis.dilation], len(run.queries)
        start, stop = (at // axis.dilation for at in (run.keys[0], run.keys[-1]))
        least, most = start + run.first[-1], start + run.last[0]  # what all of the queries see
        for at in range(start // key_tile, stop // key_tile + 1):
            low, high = at * key_tile, min((at + 1) * key_tile, group) - 1
            visited += 1
            read += rows * (high - low + 1)
            full += least <= low and high <= most
        allowed += sum(last - first + 1 for first, last in zip(run.first, run.last, strict=True))
    tiles = len(found) * sum(-(-count // key_tile) for count in places)
    return tiles, visited, full, axis.length**2, read, allowed


def _flat(
    mask: Mask,
    tile: int | Sequence[int],
    key_tile: int | Sequence[int] | None,
    queries: int | None,
    keys: int | None,
    batch: int,
    heads: int,
) -> Simulation:
    for name, value in (("tile", tile), ("key_tile", key_tile)):
        if isinstance(value, tuple | list) and len(value) != 1:
            raise ConfigError(
                f"simulate: {name} must be one number unless the mask is a neighborhood alone; got "
                f"{given(value)} with {mask}"
            )
    (own,) = per_axis("simulate", "tile", tile, 1, int)
    (other,) = (own,) if key_tile is None else per_axis("simulate", "key_tile", key_tile, 1, int)
    if keys is None:
        raise ConfigError(f"simulate: keys must be given, the number of keys that {mask} is asked about")
    keys = whole("simulate: keys", keys, 1)
    queries = keys if queries is None else whole("simulate: queries", queries, 1)
    found = tile_map(mask, batch=batch, heads=heads, queries=queries, keys=keys, rows=own, cols=other)
    heights, widths = (
        (length - torch.arange(0, length, step)).clamp(max=step)
        for length, step in ((queries, own), (keys, other))
    )
    visited = full = read = allowed = 0
    b, h = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(heads).view(-1, 1, 1)
    for row, height in enumerate(heights.tolist()):
        i = torch.arange(height)[:, None] + row * own + keys - queries
        for start, stop, all_of_it in found.columns(row):
            sizes = height * widths[start // other : -(-stop // other)]
            seen = sizes.expand(batch, heads, -1)  # pairs of every tile
            if not all_of_it:
                pairs = mask.allowed(b, h, i, torch.arange(start, stop))
                pairs = pairs.expand(batch, heads, height, stop - start).sum(2)
                seen = F.pad(pairs, (0, -(stop - start) % other)).unflatten(-1, (-1, other)).sum(-1)
            visited += int((seen > 0).sum())
            full += int((seen == sizes).sum())
            read += int(((seen > 0) * sizes).sum())
            allowed += int(seen.sum())
    return Simulation(
        mask,
        (own,),
        (other,),
        tiles=batch * heads * len(heights) * len(widths),
        visited=visited,
        full=full,
        pairs=batch * heads * queries * keys,
        read=read,
        allowed=allowed,
    )
