"""A budget over several rows: queries of a head compete for what they may read."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.selectors.budgets import Budget, ranks
from polyhead.attend.selectors.grid import Grid
from polyhead.checks import given
from polyhead.errors import ConfigError, unknown_name

__all__ = ["Together", "together"]

_OVER = ("head", "block", "call")


class Together(Budget):
    """Another budget, with several rows for one. See `together`."""

    row_by_row: ClassVar[bool] = False
    budget: Budget
    over: Literal["head", "block", "call"] = "head"

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget) or not self.budget.row_by_row:
            raise ConfigError(
                "together: budget must be one of single rows, such as keep_share(0.1); got "
                f"{given(self.budget)}"
            )
        if type(self.budget).prepare is not Budget.prepare:
            raise ConfigError(
                "together: budget must say how much many rows share, as keep_share(0.1) does; "
                f"{given(self.budget)} works out of each call how much a single row keeps"
            )
        if not isinstance(self.over, str) or self.over not in _OVER:
            raise unknown_name("together: over", self.over, _OVER)
        if self.over != "head" and self.budget.by_head:
            raise ConfigError(
                f"together: all heads share one budget over a {self.over}, which must hold one number; got "
                f"{given(self.budget)}. Numbers by head go with over='head'"
            )

    def check(self, heads: int) -> None:
        self.budget.check(heads)

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Budget:
        return _Competing(self.budget.prepare(q, k, mask, grid), self.over, _asking(grid))

    def kept(self, scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
        return _Competing(self.budget, self.over, None).kept(scores, visible, forced)


class _Competing(Budget):
    """`Together` in a call; `asking` says which blocks of queries `(B or 1, M)` are no padding, None all."""

    row_by_row: ClassVar[bool] = False
    budget: Budget
    over: str
    asking: Tensor | None

    def kept(self, scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
        best = (ranks(scores, visible, forced) == 0) & visible
        # no row reads nothing
        first = forced & visible | best & ~forced.any(-1, keepdim=True)
        counted = visible if self.asking is None else visible & self.asking[:, None, :, None]
        found = self.budget.kept(*(self._flat(x) for x in (scores, counted, first & counted)))
        return self._back(found, visible.shape) | first

    def _flat(self, x: Tensor) -> Tensor:
        """What competes in one row: `(B, H, 1, M·N)`, `(B, 1, N, H·M)` or `(B, 1, 1, H·M·N)`."""
        if self.over == "head":
            return x.flatten(2)[:, :, None]
        if self.over == "block":
            return x.flatten(1, 2).mT[:, None]
        return x.flatten(1)[:, None, None]

    def _back(self, x: Tensor, shape: torch.Size) -> Tensor:
        if self.over == "block":
            x = x[:, 0].mT
        return x.reshape(shape)


def _asking(grid: Grid) -> Tensor | None:
    """Which blocks of queries, which stand at the end of the keys, hold a token that is no padding."""
    real = grid.real_queries
    if real is None:
        return None
    rows = F.pad(real, (0, -grid.queries % grid.rows))
    return rows.unflatten(1, (-1, grid.rows)).any(-1)


def together(budget: Budget, over: Literal["head", "block", "call"] = "head") -> Budget:
    """A budget that many rows share: one query may read many blocks, because others read few.

    `budget` ranks all of what `over` says as if it were one row, and keeps of that. So `keep_share(0.1)` is a
    tenth of all pairs of a query and a block, and `keep_blocks(n)` n pairs in all. What is always read
    counts, and a row without that reads its best block in any case. Queries are taken to be the last tokens
    of the keys, as everywhere: those at padding do not compete.

    Which rows others leave something to depends on all of them: it is for calls that are not causal, such as
    those on pictures and videos, or for prompts. All scores of a call are held at once. "VMoBA:
    Mixture-of-Block Attention for Video Diffusion Models" (paper 190, arXiv 2506.23858).

    Args:
        budget: a rule for single rows, such as `keep_similarity(0.25)`.
        over: "head", all queries of a head and all blocks; "block", all queries of all heads for a block;
            "call", everything. Items of a batch never compete.
    """
    return Together(budget, over)
