"""Selectors of a scorer, which ranks the blocks, and a budget, which keeps the best."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polyhead.attend.masks import Mask, runs_of_last
from polyhead.attend.selectors.budgets import Budget, ordered_all
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.scorers import Scorer, Scores
from polyhead.attend.selectors.selector import Kept, Selector
from polyhead.attend.selectors.visible import seen, tiles
from polyhead.checks import given, whole
from polyhead.errors import ConfigError

__all__ = ["Ranked", "kept_by", "select"]


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

        alike = self.scorer.alike(grid)
        if alike == 1 or not budget.row_by_row or budget.by_head:
            return kept_by(budget, scores, forced, lambda: tiles(mask, grid, 0, grid.row_blocks, q.device))

        def kept(start: int, stop: int, visible: Tensor) -> Tensor:
            some = always(start, stop)
            each = 1 if visible.stride(1) or some.shape[1] > 1 else alike  # or heads see unlike things
            one = visible[:, ::each]
            found = budget.kept(scores(start, stop)[:, ::each], one, one & some)
            return found.repeat_interleave(each, 1)

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
