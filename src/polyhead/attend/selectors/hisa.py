"""An indexer that first looks for blocks, and scores single keys in the best of them alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.selectors.budgets import ordered
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.indexer import (
    Indexer,
    SeparateIndexer,
    checked,
    features_of,
    index_products,
    mean_indexer,
)
from polyhead.attend.selectors.selector import Listing, Selector
from polyhead.attend.selectors.visible import seen, seen_pairs
from polyhead.checks import whole
from polyhead.errors import ConfigError
from polyhead.shapes import broadcast_shape

__all__ = ["Hisa", "hisa"]

_HELD = 1 << 22  # features of keys that are gathered at a time


class Hisa(Listing):
    """The best keys of the best blocks, by one indexer. See `hisa`."""

    keep: int
    blocks: int
    size: int
    indexer: Indexer

    def __post_init__(self) -> None:
        whole("hisa: keep", self.keep, 1)
        whole("hisa: blocks", self.blocks, 2)
        whole("hisa: size", self.size, 1)
        checked("hisa", self.indexer)
        if self.blocks * self.size < self.keep:
            raise ConfigError(
                f"hisa: {self.blocks} blocks of {self.size} keys hold fewer than the {self.keep} to be kept; "
                "give more blocks or larger ones"
            )

    @property
    def rows(self) -> int:
        return 1

    @property
    def cols(self) -> int:
        return 1

    def flops(self, grid: Grid, width: int) -> int:
        heads, wide = self.indexer.sizes(grid.heads, width)
        coarse = replace(grid, rows=1, cols=self.size).col_blocks
        scored = grid.keys if coarse <= self.blocks else coarse + self.blocks * self.size
        pairs = grid.batch * grid.queries * scored
        return self.indexer.flops(grid, width) + 2 * pairs * heads * wide

    def places(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Tensor:
        queries, weights, keys = features_of(self.indexer, q, k, grid)
        coarse = replace(grid, cols=self.size)
        every = coarse.col_blocks <= self.blocks
        means = keys if every else self._means(keys, k, coarse)

        def band(start: int, stop: int) -> Tensor:
            own = queries[:, :, start:stop], weights[:, :, start:stop]
            if every:  # all blocks would be taken: nothing to be gathered
                j = torch.arange(grid.keys, device=q.device)
                scores, there = index_products(*own, keys)[:, None], seen_pairs(mask, grid, start, stop, j)
                return _best(scores, there, j, self.keep)
            visible = seen(mask, coarse, start, stop, q.device)
            found, taken = _taken(index_products(*own, means)[:, None], visible, self.blocks)
            j = (found[..., None] * self.size + torch.arange(self.size, device=q.device)).flatten(-2)
            taken = taken.repeat_interleave(self.size, -1) & (j < grid.keys)
            j = j.clamp(max=grid.keys - 1)
            there = seen_pairs(mask, grid, start, stop, j) & taken
            return _best(_scores(*own, keys, j), there, j, self.keep)

        across = grid.keys if every else self.blocks * self.size
        step = max(1, _HELD // max(1, grid.batch * across * (keys.shape[-1] + queries.shape[1])))
        found = [band(at, min(at + step, grid.queries)) for at in range(0, grid.queries, step)]
        return torch.cat(found, 2)

    def _means(self, keys: Tensor, k: Tensor, coarse: Grid) -> Tensor:
        """The mean key of every block, `(B, N, D_I)`, of an indexer's `keys`."""

        def make(_: Tensor, part: Grid) -> Tensor:
            return part.mean_keys(keys[:, None, coarse.keys - part.keys :])

        if not isinstance(self.indexer, SeparateIndexer):
            return make(k, coarse)[:, 0]
        return coarse.summarised(("means", self.indexer.name()), make, k)[:, 0]


def hisa(keep: int = 2048, blocks: int = 64, size: int = 128, indexer: Indexer | None = None) -> Selector:
    """HISA: the `keep` keys that an indexer scores best, among the keys of the blocks that it scores best.

        J[t, n] = Σ_j w[t, j] · ReLU(q_I[t, j] · mean over s in n of k_I[s] / √D_I)      blocks of `size` keys
        C[t]    = keys of the `blocks` best blocks, the first and the last visible one among them
        read    = the `keep` keys of C[t] with the largest I[t, s]                        for all heads alike

    With blocks enough for all keys it reads what `token_indexer(keep, indexer)` reads; otherwise a key
    that stands out in a block of others may be missed. A query scores N + blocks · size keys and means in
    place of S. Here scores of candidates are gathered query by query, in strips, which on a CPU costs more
    than the products that are saved unless the context is long; what is chosen is read as single keys.

    Our readings: means are of all keys of a block that are no padding. Of a block of the past none of them is
    yet to come; of the own block some are, but it is taken whatever its score. So a step of decoding chooses
    as the whole call does. Under masks that hide the past, first and last mean the first and the last block
    of which the query sees something.

    "HISA: Efficient Hierarchical Indexing for Fine-Grained Sparse Attention" (paper 150, arXiv 2603.28458).

    Args:
        keep: keys that a query reads.
        blocks: blocks that are searched, at least 2.
        size: keys of a block; `blocks · size` must be at least `keep`.
        indexer: `learned_indexer(...)`, `computed_indexer(...)`; by default `mean_indexer()`.
    """
    return Hisa(keep, blocks, size, mean_indexer() if indexer is None else indexer)


def _taken(scores: Tensor, visible: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The best blocks, ascending, with the first and the last visible one; and which of them are visible."""
    shape = broadcast_shape(scores.shape, visible.shape)
    scores, visible = scores.expand(shape), visible.expand(shape)
    count = visible.cumsum(-1)
    edges = visible & ((count == 1) | (count == count[..., -1:]))
    found = ordered(scores, visible, edges)[..., :blocks].sort(-1).values
    return found, visible.gather(-1, found)


def _scores(queries: Tensor, weights: Tensor, keys: Tensor, j: Tensor) -> Tensor:
    """I of every query with the keys j `(B, h, m, n)` that are its own."""
    batch = torch.arange(len(keys), device=keys.device).view(-1, 1, 1, 1)
    products = queries.transpose(1, 2)[:, None] @ keys[batch, j].mT  # (B, h, m, H_I, n)
    products = products.relu() * queries.shape[-1] ** -0.5
    return (products * weights.transpose(1, 2)[:, None, ..., None]).sum(-2)


def _best(scores: Tensor, there: Tensor, j: Tensor, keep: int) -> Tensor:
    """The keys with the best scores, of those that are there; -1 where there are no more."""
    shape = broadcast_shape(scores.shape, there.shape)
    scores, there = scores.expand(shape), there.expand(shape)
    found = ordered(scores, there, torch.zeros_like(there))[..., :keep]
    return j.expand(shape).gather(-1, found).masked_fill(~there.gather(-1, found), -1)
