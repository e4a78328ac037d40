"""The choice of a selector in a call: the call as a grid of blocks, what is read as a mask."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from polyhead.attend.masks import Chosen, Mask, chosen
from polyhead.attend.normalizers import Normalizer
from polyhead.attend.precision import exact
from polyhead.attend.scores import Score
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.lists import places_of
from polyhead.attend.selectors.selector import Listing, Selector
from polyhead.attend.selectors.summaries import Summaries
from polyhead.attend.selectors.visible import real_keys, tiles

__all__ = ["choose", "chosen_blocks", "grid_of"]

_HELD = 1 << 22  # scores of one band of blocks of queries


def grid_of(selector: Selector, q: Tensor, k: Tensor, mask: Mask | None, scale: float) -> Grid:
    """A call as the grid of a selector's blocks."""
    (batch, heads, queries, _), (kv_heads, keys) = q.shape, k.shape[1:3]
    real = real_keys(mask, q.device)
    return Grid(batch, heads, kv_heads, queries, keys, selector.rows, selector.cols, scale, real)


@torch.no_grad()
def choose(
    selector: Selector,
    q: Tensor,
    k: Tensor,
    mask: Mask | None,
    scale: float,
    summaries: Summaries | None = None,
    score: Score | None = None,
    normalizer: Normalizer | None = None,
) -> Chosen:
    """The blocks that a selector reads in a call, as a mask; band by band, no L × S table is held.

    Autocast ends here: what is ranked is worked out in float32 or better. `summaries` keep what is derived
    of the keys for the next call, if they are those that it was told of. `score` and `normalizer` are those
    of the call, for selectors that measure what it gives to keys.
    """
    rows, cols = selector.rows, selector.cols
    grid = replace(grid_of(selector, q, k, mask, scale), score=score, normalizer=normalizer)
    if summaries is not None:
        grid = replace(grid, summaries=summaries.serve(k, grid.real))
    selector.check(grid.heads)
    if not grid.keys or not grid.queries:
        nothing = torch.empty(grid.batch, grid.heads, grid.row_blocks, 0, dtype=torch.int64, device=q.device)
        return chosen(nothing, rows=rows, cols=cols, first=grid.offset)
    with exact(q.device):
        return chosen_blocks(selector, q.detach(), k.detach(), mask, grid)


def chosen_blocks(selector: Selector, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Chosen:
    """`choose` for a call whose grid is there already, that has keys and queries."""
    rows, cols = grid.rows, grid.cols
    if isinstance(selector, Listing):
        return chosen(selector.places(q, k, mask, grid), rows=rows, cols=cols, first=grid.offset)
    if grid.queries == 1:
        places = selector.single(q, k, mask, grid)
        if places is not None:
            return chosen(places, rows=rows, cols=cols, first=grid.offset)
    kept = selector.prepare(q, k, mask, grid)
    band = max(1, _HELD // max(1, grid.batch * grid.heads * grid.col_blocks * (1 if grid.rows > 1 else 2)))
    found = []
    for start in range(0, grid.row_blocks, band):
        stop = min(start + band, grid.row_blocks)
        visible = tiles(mask, grid, start, stop, q.device)
        found.append(places_of(kept(start, stop, visible) & visible))
    if len(found) == 1:
        return chosen(found[0], rows=grid.rows, cols=grid.cols, first=grid.offset)
    width = max((part.shape[-1] for part in found), default=0)
    index = q.new_full((grid.batch, grid.heads, grid.row_blocks, width), -1, dtype=torch.int64)
    row = 0
    for part in found:
        index[:, :, row : row + part.shape[2], : part.shape[3]] = part
        row += part.shape[2]
    return chosen(index, rows=grid.rows, cols=grid.cols, first=grid.offset)
