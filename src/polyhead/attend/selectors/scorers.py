"""Block scorers: what reading a block of keys may be worth to a block of queries.

A scorer is asked once for a call (`prepare`), and then for one band of blocks of queries after another, so
that no more than a band of scores is ever held. Its scores are like logits: larger is better, and where a
budget speaks of mass, their softmax over the visible blocks is the share of the mass that each is taken for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from polyhead.attend.selectors.grid import Grid, by_blocks
from polyhead.checks import given
from polyhead.description import Part
from polyhead.errors import ConfigError, unknown_name

__all__ = [
    "KeyBounds",
    "MeanKeys",
    "Scorer",
    "Shared",
    "key_bounds",
    "mean_keys",
    "shared",
]

Scores = Callable[[int, int], Tensor]


class Scorer(Part):
    """How much every block of queries of every head should like to read every block of keys."""

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Scores:
        """What does not depend on the block of queries, worked out once.

        Args:
            q, k: `(B, H, L, D)` and `(B, G, S, D)`.
            grid: their blocks, and which keys are real: what stands at padding must not count.

        Returns:
            A function of `start, stop` that gives the scores `(B, H, stop - start, N)` of the blocks of
            queries from start to stop - 1, in float32 or float64. Blocks that the call's mask hides are
            scored like all others.
        """
        raise NotImplementedError

    def flops(self, grid: Grid, width: int) -> int:
        """Operations of the matrix products that score a call with heads so wide; 0 where nothing is said."""
        return 0

    def alike(self, grid: Grid) -> int:
        """So many heads that follow each other have the same scores, so that they are ranked once."""
        return 1


class MeanKeys(Scorer):
    """scale · mean(q of the block) · mean(k of the block)."""

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Scores:
        keys = mean_of_blocks(k, grid)

        def scores(start: int, stop: int) -> Tensor:
            return grid.products(grid.mean_queries(q, start, stop).to(keys.dtype), keys) * grid.scale

        return scores

    def flops(self, grid: Grid, width: int) -> int:
        return 2 * grid.batch * grid.heads * grid.row_blocks * grid.col_blocks * width


def mean_of_blocks(k: Tensor, grid: Grid) -> Tensor:
    """`grid.mean_keys`, kept where somebody keeps it."""
    return grid.summarised("means", lambda keys, part: part.mean_keys(keys), k)


def mean_keys() -> Scorer:
    """A block of keys is worth the product of its mean key and the mean query: scale · q̄·k̄.

    Means are over real keys: padding does not count. With blocks of one query it is the gate of MoBA (paper
    063, arXiv 2502.13189), up to the scale, which changes no ranking. O(N·D) a block of queries.
    """
    return MeanKeys()


class KeyBounds(Scorer):
    """The largest product that a key within the bounds of the block could have with the mean query."""

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Scores:
        # most and least side by side: each feature takes the bound of its query's sign
        bounds = grid.summarised("bounds", _bounds, k)

        def scores(start: int, stop: int) -> Tensor:
            queries = grid.mean_queries(q, start, stop).to(bounds.dtype)
            signs = torch.cat([queries.clamp(min=0), queries.clamp(max=0)], -1)
            return grid.products(signs, bounds) * grid.scale

        return scores

    def flops(self, grid: Grid, width: int) -> int:
        return 4 * grid.batch * grid.heads * grid.row_blocks * grid.col_blocks * width


def _bounds(k: Tensor, grid: Grid) -> Tensor:
    """Largest and smallest features of every block, `(B, G, N, 2·D)`; 0 where there is no real key."""
    if grid.real is None:
        bounds = by_blocks(k, grid.cols, lambda part: torch.cat([part.amax(3), part.amin(3)], -1))
        return bounds.to(torch.promote_types(k.dtype, torch.float32))
    wide = k.float() if k.dtype in (torch.float16, torch.bfloat16) else k
    most = grid.blocks_of_keys(wide, -math.inf).amax(3)
    least = grid.blocks_of_keys(wide, math.inf).amin(3)
    return torch.cat([most, least], -1).masked_fill((most < least).repeat(1, 1, 1, 2), 0.0)


def key_bounds() -> Scorer:
    """A block is worth the most that a key between its smallest and largest features could score.

        scale · Σ_d max(q̄_d · min_j k_jd, q̄_d · max_j k_jd)

    For one query (decoding) it bounds the scores of the block from above: no key of the block scores more.
    Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774.
    """
    return KeyBounds()


class Shared(Scorer):
    """The scores of another scorer, joined over heads."""

    scorer: Scorer
    over: Literal["group", "all"] = "group"
    by: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, Scorer):
            raise ConfigError(f"shared: scorer must be one such as mean_keys(); got {given(self.scorer)}")
        for name, allowed in (("over", ("group", "all")), ("by", ("mean", "max"))):
            if getattr(self, name) not in allowed:
                raise unknown_name(f"shared: {name}", getattr(self, name), allowed)

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Scores:
        each = self.scorer.prepare(q, k, grid)
        size = self.alike(grid)

        def scores(start: int, stop: int) -> Tensor:
            own = each(start, stop).unflatten(1, (-1, size))
            joined = own.mean(2, keepdim=True) if self.by == "mean" else own.amax(2, keepdim=True)
            return joined.expand_as(own).flatten(1, 2)

        return scores

    def flops(self, grid: Grid, width: int) -> int:
        return self.scorer.flops(grid, width)

    def alike(self, grid: Grid) -> int:
        return grid.repeat if self.over == "group" else grid.heads


def shared(
    scorer: Scorer, over: Literal["group", "all"] = "group", by: Literal["mean", "max"] = "mean"
) -> Scorer:
    """Heads score together: the query heads of a key/value head, or all heads of a layer, get one ranking.

    A group that reads the same blocks gathers them once, and multiplies them once for all its queries. Heads
    can be compared where scores are those of masses, such as `mean_queries()`: products of one head may be
    larger than those of another throughout.

    Args:
        scorer: whose scores are joined, such as `mean_keys()`.
        over: "group": the query heads of a key/value head, the default; "all": all heads.
        by: the "mean" of their scores, the default, or the "max".

    Raises:
        ConfigError: `scorer` is none.
        UnknownName: another `over` or `by`.
    """
    return Shared(scorer, over, by)
