"""What a mask lets the blocks of a grid see."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from polyhead.attend.masks import Mask, Padding, TileMap, runs_of_last, terms_of, tile_map, visible_tiles
from polyhead.attend.selectors.grid import Grid
from polyhead.shapes import broadcast_shape

__all__ = ["looked_at", "real_keys", "seen", "seen_pairs", "tiles"]

_Tiles = TypeVar("_Tiles")


def seen(mask: Mask | None, grid: Grid, start: int, stop: int, device: torch.device) -> Tensor:
    """Of which blocks of keys a mask lets something be seen by blocks of queries: bool `(B, H, m, N)`.

    B or H is 1 where all batch items or all heads see the same.
    """
    if mask is None:
        return torch.ones(1, 1, stop - start, grid.col_blocks, dtype=torch.bool, device=device)
    if grid.queries == 1:
        runs = runs_of_last(mask, grid.keys)
        if runs is not None:
            row = torch.zeros(1, 1, 1, grid.col_blocks, dtype=torch.bool, device=device)
            for a, b in runs:
                row[..., a // grid.cols : (b - 1) // grid.cols + 1] = True
            return row
    if grid.rows == grid.cols == 1:  # of a block masks may not know, of a pair they do
        return seen_pairs(mask, grid, start, stop, torch.arange(grid.keys, device=device))
    return _of_band(visible_tiles, mask, grid, start, stop, device)


def looked_at(mask: Mask, grid: Grid, start: int, stop: int, device: torch.device) -> TileMap:
    """What a mask knows in advance of the blocks of keys that blocks of queries see in part or whole."""
    return _of_band(tile_map, mask, grid, start, stop, device)


def _of_band(
    tiles: Callable[..., _Tiles], mask: Mask, grid: Grid, start: int, stop: int, device: torch.device
) -> _Tiles:
    """`tiles` of the blocks of queries from start to stop - 1."""
    first = start * grid.rows
    return tiles(
        mask,
        batch=grid.batch,
        heads=grid.heads,
        queries=min(stop * grid.rows, grid.queries) - first,
        keys=grid.keys,
        offset=grid.offset + first,
        rows=grid.rows,
        cols=grid.cols,
        device=device,
    )


def seen_pairs(mask: Mask | None, grid: Grid, start: int, stop: int, j: Tensor) -> Tensor:
    """Which of the keys j, `(n,)` or `(B or 1, H or 1, m, n)`, the queries start to stop - 1 may see.

    Bool `(B, H, m, n)`; B or H is 1 where all batch items or all heads see the same.
    """
    device = j.device
    shape = (*(1,) * (4 - j.ndim), *j.shape)
    shape = (*shape[:2], stop - start, shape[3])
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    b = torch.arange(grid.batch, device=device).view(-1, 1, 1, 1)
    h = torch.arange(grid.heads, device=device).view(-1, 1, 1)
    i = torch.arange(start, stop, device=device)[:, None] + grid.offset
    found = mask.to(device).allowed(b, h, i, j)
    return found.expand(broadcast_shape(found.shape, shape))


def tiles(mask: Mask | None, grid: Grid, start: int, stop: int, device: torch.device) -> Tensor:
    """`seen` for every batch item and every head."""
    shape = (grid.batch, grid.heads, stop - start, grid.col_blocks)
    return seen(mask, grid, start, stop, device).expand(shape)


def real_keys(mask: Mask | None, device: torch.device) -> Tensor | None:
    """Which keys are no padding `(B or 1, S)`, by the paddings that a mask is a conjunction of; None: all."""
    found = [term.mask.to(device) for term in terms_of(mask) if isinstance(term, Padding)]
    return reduce(torch.logical_and, found) if found else None
