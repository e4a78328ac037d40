"""Selectors: which blocks of keys every block of queries reads, decided from the content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from polyhead.attend.masks import (
    Chosen,
    Mask,
    Padding,
    TileMap,
    chosen,
    runs_of_last,
    terms_of,
    tile_map,
    visible_tiles,
)
from polyhead.attend.normalizers import Normalizer
from polyhead.attend.precision import exact
from polyhead.attend.scores import Score
from polyhead.attend.selectors.budgets import Budget, ordered_all
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.scorers import Scorer, Scores
from polyhead.attend.selectors.summaries import Summaries
from polyhead.checks import given, whole
from polyhead.description import Part
from polyhead.errors import ConfigError
from polyhead.shapes import broadcast_shape

__all__ = [
    "Correcting",
    "Either",
    "Listing",
    "Ranked",
    "Selector",
    "choose",
    "chosen_blocks",
    "kept_by",
    "select",
]

Kept = Callable[[int, int, Tensor], Tensor]
_Tiles = TypeVar("_Tiles")

_HELD = 1 << 22  # scores of one band of blocks of queries


class Selector(Part):
    """Which blocks of keys every block of queries of every head reads."""

    @property
    def rows(self) -> int:
        """Queries that choose together."""
        raise NotImplementedError

    @property
    def cols(self) -> int:
        """Keys that are chosen together."""
        raise NotImplementedError

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Kept:
        """What does not depend on the block of queries, worked out once.

        Returns:
            A function of `start, stop, visible`: which blocks those of queries from start to stop - 1 read,
            bool `(B, H, stop - start, N)`, of the `visible` ones, bool of the same shape.
        """
        raise NotImplementedError

    def single(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Tensor | None:
        """The blocks that a single query reads, distinct integers `(B, H, 1, K)`, as many in every head.

        For the step of decoding, where a table of all blocks, and the search in it, take longer than the
        choice itself. None: only `prepare` can tell.
        """
        return None

    def check(self, heads: int) -> None:
        """Raise a `ShapeError` if the selector holds numbers for another number of heads."""

    def flops(self, grid: Grid, width: int) -> int:
        """Operations of the matrix products of a choice, heads so wide; 0 where nothing is said."""
        return 0

    @property
    def remembers(self) -> bool:
        """Whether it goes by queries of the past, so that calls that go on need what `begin` gives."""
        return False

    def begin(self) -> Selector:
        """The selector of one layer for a text that is read call by call, from its start."""
        return self

    def see(self, q: Tensor, k: Tensor, mask: Mask | None, scale: float) -> None:
        """Take notice of a call that chooses nothing."""

    def __or__(self, other: Selector) -> Selector:
        return Either((self, other))


class Listing(Selector):
    """A selector that lists the blocks that are read, and needs no table of all blocks to find them."""

    def places(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Tensor:
        """The blocks that blocks of queries read, integers `(B, H, M, K)`, -1 where there are fewer than K.

        H may be 1: all heads read the same. A block may be listed once, and may be one that is not visible:
        the mask hides it.
        """
        raise NotImplementedError

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Kept:
        places = self.places(q, k, mask, grid)

        def kept(start: int, stop: int, visible: Tensor) -> Tensor:
            return listed(places[:, :, start:stop], grid.col_blocks) & visible

        return kept


class Correcting(Selector):
    """A selector behind which the output is corrected for what was not read."""

    def correct(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, found: Chosen, scale: float
    ) -> Tensor:
        """The output `(B, H, L, Dv)`, corrected.

        Args:
            out: what plain softmax over the chosen keys gave.
            q, k, v, mask, scale: of the call.
            found: what was chosen in it.
        """
        raise NotImplementedError


def places_of(table: Tensor) -> Tensor:
    """The blocks that are marked in `(..., blocks)`, ascending, as `(..., K)`, -1 where there are fewer."""
    count = table.cumsum(-1, dtype=torch.int32)
    width = int(count[..., -1].amax()) if table.numel() else 0
    index = torch.full((*table.shape[:-1], width), -1, dtype=torch.int64, device=table.device)
    at = table.nonzero(as_tuple=True)
    index[(*at[:-1], count[at].long() - 1)] = at[-1]
    return index


def listed(index: Tensor, blocks: int) -> Tensor:
    """Blocks listed in `(..., K)`, -1 for none, as a table `(..., blocks)` of those that are."""
    table = torch.zeros(*index.shape[:-1], blocks + 1, dtype=torch.bool, device=index.device)
    return table.scatter_(-1, index.masked_fill(index < 0, blocks), True)[..., :-1]


class Ranked(Selector):
    """A scorer ranks the blocks, a budget keeps the best. See `select`."""

    scorer: Scorer
    budget: Budget
    rows: int = 64
    cols: int = 64
    always: Mask | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, Scorer):
            raise ConfigError(f"select: scorer must be one such as mean_keys(); got {given(self.scorer)}")
        if not isinstance(self.budget, Budget):
            raise ConfigError(f"select: budget must be one such as keep_share(0.1); got {given(self.budget)}")
        for name in ("rows", "cols"):
            whole(f"select: {name}", getattr(self, name), 1)
        if self.always is not None and not isinstance(self.always, Mask):
            raise ConfigError(f"select: always must be a mask such as sink(4); got {given(self.always)}")

    def check(self, heads: int) -> None:
        self.budget.check(heads)

    def flops(self, grid: Grid, width: int) -> int:
        return self.scorer.flops(grid, width)

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Kept:
        scores = self.scorer.prepare(q, k, grid)
        budget = self.budget.prepare(q, k, mask, grid)

        def always(start: int, stop: int) -> Tensor:
            if self.always is None:
                return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=q.device)
            return seen(self.always, grid, start, stop, q.device)

        def forced(start: int, stop: int, visible: Tensor) -> Tensor:
            return visible & always(start, stop)

        each = kept_by(budget, scores, forced, lambda: tiles(mask, grid, 0, grid.row_blocks, q.device))
        alike = self.scorer.alike(grid)
        if alike == 1 or not budget.row_by_row or budget.by_head:
            return each

        def kept(start: int, stop: int, visible: Tensor) -> Tensor:
            some = always(start, stop)
            if visible.stride(1) or some.shape[1] > 1:  # heads do not see the same
                return each(start, stop, visible)
            one = visible[:, ::alike]
            found = budget.kept(scores(start, stop)[:, ::alike], one, one & some)
            return found.repeat_interleave(alike, 1)

        return kept

    def single(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Tensor | None:
        if runs_of_last(mask, grid.keys) != [(0, grid.keys)]:
            return None
        best = self.budget.best(grid.col_blocks)
        always = [] if self.always is None else runs_of_last(self.always, grid.keys)
        if best is None or always is None:
            return None
        forced = [(start // grid.cols, (stop - 1) // grid.cols + 1) for start, stop in always]
        count = len({block for run in forced for block in range(*run)})
        return ordered_all(self.scorer.prepare(q, k, grid)(0, 1), forced)[..., : max(best, count)]


def kept_by(budget: Budget, scores: Scores, forced: Kept, seen_by_all: Callable[[], Tensor]) -> Kept:
    """What a budget keeps, band by band, or where it compares rows, of one table of all rows.

    Args:
        budget: the rule, prepared for the call.
        scores: of blocks of queries from start to stop - 1.
        forced: which of the visible blocks they read in any case.
        seen_by_all: the visible blocks of all blocks of queries.
    """
    if budget.row_by_row:
        return lambda start, stop, visible: budget.kept(
            scores(start, stop), visible, forced(start, stop, visible)
        )
    visible = seen_by_all()
    rows = visible.shape[2]
    table = budget.kept(scores(0, rows), visible, forced(0, rows, visible))
    return lambda start, stop, visible: table[:, :, start:stop]


class Either(Selector):
    """What any of several selectors reads. Made by `a | b`."""

    terms: tuple[Selector, ...]

    def __post_init__(self) -> None:
        if not all(isinstance(term, Selector) for term in self.terms) or not self.terms:
            raise ConfigError(f"|: both sides must be selectors; got {given(self.terms)}")
        if any(isinstance(term, Correcting) for term in self.terms):
            raise ConfigError(
                "|: a selector that corrects the output goes around the others, rectified(a | b); got "
                f"{given(self.terms)}"
            )
        flat = tuple(
            one for term in self.terms for one in (term.terms if isinstance(term, Either) else (term,))
        )
        object.__setattr__(self, "terms", flat)
        if len({(term.rows, term.cols) for term in flat}) > 1:
            said = ", ".join(f"{term.rows} × {term.cols}" for term in flat)
            raise ConfigError(f"|: selectors must have blocks of one size; they have {said}")

    @property
    def rows(self) -> int:
        return self.terms[0].rows

    @property
    def cols(self) -> int:
        return self.terms[0].cols

    def check(self, heads: int) -> None:
        for term in self.terms:
            term.check(heads)

    def flops(self, grid: Grid, width: int) -> int:
        return sum(term.flops(grid, width) for term in self.terms)

    @property
    def remembers(self) -> bool:
        return any(term.remembers for term in self.terms)

    def begin(self) -> Selector:
        return Either(tuple(term.begin() for term in self.terms))

    def see(self, q: Tensor, k: Tensor, mask: Mask | None, scale: float) -> None:
        for term in self.terms:
            term.see(q, k, mask, scale)

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Kept:
        each = [term.prepare(q, k, mask, grid) for term in self.terms]

        def kept(start: int, stop: int, visible: Tensor) -> Tensor:
            found = each[0](start, stop, visible)
            for one in each[1:]:
                found = found | one(start, stop, visible)
            return found

        return kept


def select(
    scorer: Scorer, budget: Budget, *, rows: int = 64, cols: int = 64, always: Mask | None = None
) -> Selector:
    """Blocks of keys ranked by `scorer`, as many as `budget` keeps.

    With `cols=1` single keys are chosen: then a score is worked out, and ranked, for every pair of a block of
    queries and a key, and each of them is gathered for itself, which is slower than larger blocks are. The
    choice holds 8 bytes for each key that a block of queries reads.

    With `rows` above 1 a query may see nothing of what its block chose, and gives zeros: under `causal()`
    where only later keys were chosen. `always=window(0)`, every query's own key, prevents it.

    Args:
        scorer: what a block may be worth, such as `mean_keys()`.
        budget: how many are read, such as `keep_share(0.1)` or `keep_mass(0.95)`.
        rows: queries that choose together; with 1 every query chooses for itself.
        cols: keys that are chosen together. Neither has to divide the length of the call.
        always: blocks of which this mask lets something be seen are read in any case, and count as kept:
            `sink(1) | window(64)` for the first and the nearest ones.
    """
    return Ranked(scorer, budget, rows, cols, always)


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
