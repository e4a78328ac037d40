"""Blocks of a picture's or a video's tokens that queries choose."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.masks.checks import per_axis
from polyhead.attend.selectors.budgets import Budget, keep_similarity
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.partition import Partition
from polyhead.attend.selectors.ranked import kept_by
from polyhead.attend.selectors.scorers import Scorer, mean_keys
from polyhead.attend.selectors.selector import Kept, Selector
from polyhead.attend.selectors.together import together
from polyhead.attend.selectors.visible import tiles
from polyhead.checks import given, several, whole
from polyhead.errors import ConfigError, ShapeError, unknown_name

__all__ = ["GridBlocks", "grid_blocks", "vmoba"]


class GridBlocks(Selector):
    """A scorer ranks the blocks of a grid for every query, a budget keeps the best. See `grid_blocks`."""

    scorer: Scorer
    budget: Budget
    block: tuple[int, ...]
    grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, Scorer):
            raise ConfigError(
                f"grid_blocks: scorer must be one such as mean_keys(); got {given(self.scorer)}"
            )
        if not isinstance(self.budget, Budget):
            raise ConfigError(
                f"grid_blocks: budget must be one such as keep_share(0.1); got {given(self.budget)}"
            )
        if self.grid is not None:
            grid = tuple(self.grid) if several(self.grid) else (self.grid,)
            if not 1 <= len(grid) <= 3:
                raise ConfigError(f"grid_blocks: grid must have 1 to 3 axes; got {given(self.grid)}")
            lengths = tuple(whole(f"grid_blocks: grid[{a}]", n, 1) for a, n in enumerate(grid))
            object.__setattr__(self, "grid", lengths)
        axes = 1 if self.grid is None else len(self.grid)
        object.__setattr__(self, "block", per_axis("grid_blocks", "block", self.block, axes, int))
        if self.grid is not None:
            self.partition(0).check("grid_blocks")

    @property
    def rows(self) -> int:
        return 1

    @property
    def cols(self) -> int:
        return self.block[0] if self.grid is None else self.partition(0).run

    def partition(self, tokens: int) -> Partition:
        """The blocks of a call on so many tokens, which a grid says itself."""
        return Partition((tokens,) if self.grid is None else self.grid, self.block)

    def check(self, heads: int) -> None:
        self.budget.check(heads)

    def flops(self, grid: Grid, width: int) -> int:
        return self.scorer.flops(self._blocks(grid, None)[1], width)

    def _blocks(self, grid: Grid, tokens: Tensor | None) -> tuple[Partition, Grid]:
        """The partition, and the call as one on blocks that are filled up to the largest."""
        partition = self.partition(grid.keys)
        places, size = math.prod(partition.grid), math.prod(partition.sizes)
        if grid.queries != grid.keys or grid.keys != places:
            wanted = "as many queries as keys" if self.grid is None else f"the {places} tokens of its grid"
            raise ShapeError(
                f"grid_blocks takes {wanted}; the call has {grid.queries} queries and {grid.keys} keys"
            )
        real = None
        if tokens is not None:
            held = tokens.clamp(min=0).view(-1)
            real = (tokens >= 0).view(1, -1)
            real = real if grid.real is None else real & grid.real[:, held]
        return partition, Grid(
            batch=grid.batch,
            heads=grid.heads,
            kv_heads=grid.kv_heads,
            queries=grid.queries,
            keys=partition.blocks * size,
            rows=1,
            cols=size,
            scale=grid.scale,
            real=real,
        )

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Kept:
        tokens = self.partition(grid.keys).tokens(q.device)
        partition, inner = self._blocks(grid, tokens)
        runs, of_runs = partition.runs(q.device), partition.of_runs(q.device)
        own = partition.of_tokens(q.device)[:, None] == torch.arange(partition.blocks, device=q.device)
        scores = self.scorer.prepare(q, k[:, :, tokens.clamp(min=0).view(-1)], inner)
        budget = self.budget.prepare(q, k, mask, grid)

        def blocks_of(visible: Tensor) -> Tensor:
            return (visible[..., runs.clamp(min=0)] & (runs >= 0)).any(-1)

        def forced(start: int, stop: int, visible: Tensor) -> Tensor:
            return own[start:stop] & visible

        found = kept_by(
            budget, scores, forced, lambda: blocks_of(tiles(mask, grid, 0, grid.row_blocks, q.device))
        )
        return lambda start, stop, visible: found(start, stop, blocks_of(visible))[..., of_runs] & visible


def grid_blocks(
    scorer: Scorer,
    budget: Budget,
    block: int | tuple[int, ...],
    grid: int | tuple[int, ...] | None = None,
) -> GridBlocks:
    """Every query reads its own block of a grid and those that it ranks best.

    As `select(scorer, budget, rows=1, always=window(0))`, for blocks that are boxes of a picture or a video.
    Queries and keys are those of the same tokens. A query's own block counts as kept. Blocks at the far
    border may be smaller, but along the last axis that is cut, unless it is the first, they must fit: so that
    a block is so many runs of tokens, which is what is chosen.

    Args:
        scorer: what a block may be worth to a query, such as `mean_keys()`.
        budget: how many are read, such as `keep_blocks(3)` or `together(keep_share(0.1))`.
        block: lengths of a block, for all axes or for each.
        grid: lengths of one to three axes, flattened row by row; None: a sequence of any length.
    """
    return GridBlocks(scorer, budget, block, grid)  # type: ignore[arg-type]


def vmoba(
    block: int | tuple[int, ...],
    grid: int | tuple[int, ...] | None = None,
    *,
    share: float = 0.25,
    over: Literal["query", "head", "block", "call"] = "head",
) -> GridBlocks:
    """VMoBA: of all blocks of a video, each query of a head reads its own and those of like mean keys.

        grid_blocks(mean_keys(), together(keep_similarity(share), over), block, grid)

    Queries of a head compete: pairs of a query and a block are kept by q·k̄ until their scores, between 0 and
    1, make up `share` of those of all pairs. Blocks of a video are whole frames in one layer, columns through
    all frames in the next, cubes in the third: `(2, 16, 16)`, `(8, 4, 4)` and `(2, 4, 4)` on `(8, 16, 16)`.

    "VMoBA: Mixture-of-Block Attention for Video Diffusion Models" (paper 190, arXiv 2506.23858). Besides its
    own block the head reads at least one pair more, as in the official code; where that is told to keep one
    block, it reads everything, and `grid_blocks(mean_keys(), keep_blocks(1), ...)` the own block.

    Args:
        block, grid: see `grid_blocks`.
        share: the threshold; from 1 on everything is read.
        over: who competes: see `together`; "query": each query has its own threshold.
    """
    if not isinstance(over, str) or over not in ("query", "head", "block", "call"):
        raise unknown_name("vmoba: over", over, ("query", "head", "block", "call"))
    budget = keep_similarity(share)
    return grid_blocks(mean_keys(), budget if over == "query" else together(budget, over), block, grid)
