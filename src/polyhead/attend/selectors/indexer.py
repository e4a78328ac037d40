"""Indexers: a few narrow heads that say how much each single key matters to a query, for all heads alike.

    I[t, s] = Σ_j w[t, j] · ReLU(q_I[t, j] · k_I[s] / √D_I)

with H_I queries q_I and weights w of every token, and one key k_I that they share. What an indexer computes
them from, it says itself.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.selectors.budgets import keep_blocks
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.ranked import select
from polyhead.attend.selectors.scorers import Scorer, Scores
from polyhead.attend.selectors.selector import Selector
from polyhead.attend.selectors.summaries import Same
from polyhead.attend.selectors.visible import real_keys, seen_pairs
from polyhead.checks import floating, given, whole
from polyhead.description import Part
from polyhead.errors import ConfigError, ShapeError

__all__ = [
    "ComputedIndexer",
    "IndexScores",
    "Indexer",
    "LearnedIndexer",
    "MeanIndexer",
    "SeparateIndexer",
    "computed_indexer",
    "index_products",
    "index_scores",
    "indexer_loss",
    "learned_indexer",
    "mean_indexer",
    "token_indexer",
]

_HELD = 1 << 24  # products that are held at a time

Features = tuple[Tensor, Tensor, Tensor]


class Indexer(Part):
    """Where the queries, the weights and the keys of the scores come from."""

    def features(self, q: Tensor, k: Tensor) -> Features:
        """q_I `(B, H_I, L, D_I)`, w `(B, H_I, L)` and k_I `(B, S, D_I)` of a call, float32 or float64."""
        raise NotImplementedError

    def sizes(self, heads: int, width: int) -> tuple[int, int]:
        """H_I and D_I in a call with so many heads, so wide."""
        raise NotImplementedError

    def flops(self, grid: Grid, width: int) -> int:
        """Operations of the matrix products that make the features of a call."""
        return 0


class SeparateIndexer(Indexer):
    """An indexer whose keys come each of one key of the layer alone: they can be kept in decoding."""

    def of_queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """q_I `(B, H_I, L, D_I)` and w `(B, H_I, L)`."""
        raise NotImplementedError

    def of_keys(self, k: Tensor) -> Tensor:
        """k_I `(B, S, D_I)`."""
        raise NotImplementedError

    def name(self) -> Hashable:
        """Equal only for indexers that make the same of the same key."""
        raise NotImplementedError

    def features(self, q: Tensor, k: Tensor) -> Features:
        return *self.of_queries(q), self.of_keys(k)


class MeanIndexer(SeparateIndexer):
    """Mean queries of groups of heads and the mean key of all. See `mean_indexer`."""

    groups: int = 1

    def __post_init__(self) -> None:
        whole("mean_indexer: groups", self.groups, 1)

    def of_queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        if q.shape[1] % self.groups:
            raise ConfigError(f"mean_indexer: groups must divide the {q.shape[1]} heads; got {self.groups}")
        queries = _wide(q).unflatten(1, (self.groups, -1)).mean(2)
        return queries, queries.new_full(queries.shape[:3], self.groups**-0.5)

    def of_keys(self, k: Tensor) -> Tensor:
        return _wide(k).mean(1)

    def name(self) -> Hashable:
        return "mean indexer"

    def sizes(self, heads: int, width: int) -> tuple[int, int]:
        return self.groups, width


def mean_indexer(groups: int = 1) -> Indexer:
    """Nothing learned: the mean queries of `groups` groups of heads, the mean key of all, w = 1/√groups.

    A stand-in where a model has no indexer.
    """
    return MeanIndexer(groups)


class LearnedIndexer(SeparateIndexer):
    """Linear maps of what all heads of a token hold. See `learned_indexer`."""

    queries: Tensor
    weights: Tensor
    keys: Tensor

    def __post_init__(self) -> None:
        floating("learned_indexer: queries", self.queries, 3, "(H_I, D_I, H·D)")
        floating("learned_indexer: weights", self.weights, 2, "(H_I, H·D)")
        floating("learned_indexer: keys", self.keys, 2, "(D_I, G·D)")
        own = self.queries.shape
        if self.weights.shape != own[::2] or len(self.keys) != own[1]:
            raise ConfigError(
                "learned_indexer: queries (H_I, D_I, H·D), weights (H_I, H·D) and keys (D_I, G·D) must "
                f"agree; got {tuple(own)}, {tuple(self.weights.shape)} and {tuple(self.keys.shape)}"
            )

    def of_queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        token = _token("queries", q, self.queries)
        wq, ww = (x.to(token) for x in (self.queries, self.weights))
        queries = (token @ wq.flatten(0, 1).T).unflatten(-1, wq.shape[:2]).transpose(1, 2)
        return queries, (token @ ww.T).transpose(1, 2) * len(ww) ** -0.5

    def of_keys(self, k: Tensor) -> Tensor:
        token = _token("keys", k, self.keys)
        return token @ self.keys.to(token).T

    def name(self) -> Hashable:
        return "learned indexer", Same(self.keys)

    def sizes(self, heads: int, width: int) -> tuple[int, int]:
        return self.queries.shape[0], self.queries.shape[1]

    def flops(self, grid: Grid, width: int) -> int:
        heads, wide = self.sizes(grid.heads, width)
        of_queries = grid.queries * grid.heads * heads * (wide + 1)
        return 2 * grid.batch * width * (of_queries + grid.keys * grid.kv_heads * wide)


def _token(name: str, x: Tensor, held: Tensor) -> Tensor:
    """What all heads of a token hold, `(B, L, H·D)`, or a `ShapeError` if `held` reads another width."""
    token = _wide(x).transpose(1, 2).flatten(2)
    if token.shape[-1] != held.shape[-1]:
        raise ShapeError(
            f"learned_indexer: {name} reads {held.shape[-1]} features of a token, all its heads "
            f"together; the call has {token.shape[-1]}"
        )
    return token


def learned_indexer(queries: Tensor, weights: Tensor, keys: Tensor) -> Indexer:
    """Linear maps of the queries and keys that the layer hands over, all its heads side by side.

        q_I[t, j] = queries[j] · concat_h q[h, t]      w[t, j] = (weights · concat_h q[h, t])_j / √H_I
        k_I[s]    = keys · concat_g k[g, s]

    Tensors that require a gradient get one from `indexer_loss`. An indexer that reads the token itself is a
    matter of the module that holds the token: see `computed_indexer`.

    Args:
        queries: `(H_I, D_I, H·D)`.
        weights: `(H_I, H·D)`.
        keys: `(D_I, G·D)`.
    """
    return LearnedIndexer(queries, weights, keys)


class ComputedIndexer(Indexer):
    """Features of one call that are there already. See `computed_indexer`."""

    queries: Tensor
    weights: Tensor
    keys: Tensor

    def __post_init__(self) -> None:
        floating("computed_indexer: queries", self.queries, 4, "(B, H_I, L, D_I)")
        floating("computed_indexer: weights", self.weights, 3, "(B, H_I, L)")
        floating("computed_indexer: keys", self.keys, 3, "(B, S, D_I)")
        own = self.queries.shape
        if self.weights.shape != own[:3] or self.keys.shape[::2] != own[::3]:
            raise ConfigError(
                "computed_indexer: queries (B, H_I, L, D_I), weights (B, H_I, L) and keys (B, S, D_I) must "
                f"agree; got {tuple(own)}, {tuple(self.weights.shape)} and {tuple(self.keys.shape)}"
            )

    def features(self, q: Tensor, k: Tensor) -> Features:
        for name, own, call in (
            ("queries", self.queries.shape[::2], q.shape[::2]),
            ("keys", self.keys.shape[:2], k.shape[::2]),
        ):
            if own != call:
                raise ShapeError(
                    f"computed_indexer: {name} are of {own[0]} sequences of {own[1]} tokens, but the call "
                    f"has {call[0]} of {call[1]}"
                )
        return _wide(self.queries), _wide(self.weights), _wide(self.keys)

    def sizes(self, heads: int, width: int) -> tuple[int, int]:
        return self.queries.shape[1], self.queries.shape[3]


def computed_indexer(queries: Tensor, weights: Tensor, keys: Tensor) -> Indexer:
    """Features that a module has computed for this one call, from its tokens and with its positions.

    Args:
        queries: `(B, H_I, L, D_I)`, turned by positions like the keys, if at all.
        weights: `(B, H_I, L)`; in DeepSeek-V3.2 a linear map of the token, times H_I^-1/2.
        keys: `(B, S, D_I)`.
    """
    return ComputedIndexer(queries, weights, keys)


def index_products(queries: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """I `(..., m, n)` of queries `(..., H_I, m, D_I)`, weights `(..., H_I, m)` and keys `(..., n, D_I)`."""
    products = (queries @ keys[..., None, :, :].mT).relu() * queries.shape[-1] ** -0.5
    return (products * weights[..., None]).sum(-3)


def features_of(indexer: Indexer, q: Tensor, k: Tensor, grid: Grid) -> Features:
    """`indexer.features`, with keys that are kept where somebody keeps them."""
    if grid.summaries is None or not isinstance(indexer, SeparateIndexer):
        return indexer.features(q, k)
    found = grid.summarised(indexer.name(), lambda keys, _: indexer.of_keys(keys)[:, None], k, 1)
    return *indexer.of_queries(q), found[:, 0]


def mean_features_of(indexer: Indexer, q: Tensor, k: Tensor, grid: Grid) -> Features:
    """The same with the mean key of every block, `(B, N, D_I)`."""
    if grid.cols == 1:
        return features_of(indexer, q, k, grid)
    if not isinstance(indexer, SeparateIndexer):
        queries, weights, keys = indexer.features(q, k)
        return queries, weights, grid.mean_keys(keys[:, None])[:, 0]

    def means(keys: Tensor, part: Grid) -> Tensor:
        return part.mean_keys(indexer.of_keys(keys)[:, None])

    found = grid.summarised(("means", indexer.name()), means, k)
    return *indexer.of_queries(q), found[:, 0]


class IndexScores(Scorer):
    """The score of an indexer. See `index_scores`."""

    indexer: Indexer

    def __post_init__(self) -> None:
        checked("index_scores", self.indexer)

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Scores:
        if grid.rows != 1:
            raise ConfigError(
                f"index_scores: an indexer scores for single queries; use rows=1, got rows={grid.rows}"
            )
        queries, weights, keys = mean_features_of(self.indexer, q, k, grid)

        def scores(start: int, stop: int) -> Tensor:
            step = max(1, _HELD // max(1, weights[:, :, 0].numel() * keys.shape[1]))
            found = [
                index_products(queries[:, :, at : at + step], weights[:, :, at : at + step], keys)
                for at in range(start, stop - step, step)
            ]
            last = start + len(found) * step
            found.append(index_products(queries[:, :, last:stop], weights[:, :, last:stop], keys))
            return torch.cat(found, 1)[:, None].expand(-1, grid.heads, -1, -1)

        return scores

    def flops(self, grid: Grid, width: int) -> int:
        heads, wide = self.indexer.sizes(grid.heads, width)
        pairs = grid.batch * grid.queries * grid.col_blocks
        return self.indexer.flops(grid, width) + 2 * pairs * heads * wide


def index_scores(indexer: Indexer) -> Scorer:
    """A block is worth what an indexer says of its mean key; with `cols=1` of the key itself.

        I[t, n] = Σ_j w[t, j] · ReLU(q_I[t, j] · mean over s in n of k_I[s] / √D_I)

    Every query chooses for itself, `rows=1`, and all heads alike.

    Args:
        indexer: `learned_indexer(...)`, `computed_indexer(...)` or `mean_indexer()`.
    """
    return IndexScores(indexer)


def token_indexer(keep: int = 2048, indexer: Indexer | None = None) -> Selector:
    """The `keep` keys that an indexer scores best, the same ones for all heads.

        select(index_scores(indexer), keep_blocks(keep), rows=1, cols=1)

    The sparse attention of DeepSeek-V3.2, whose scores `hisa` works out for a part of the
    keys alone. Of keys with equal scores, such as all those to which no head of the indexer gives more than
    0, the nearer one is taken. Every pair is scored, L·S·H_I·D_I products, and ranked.

    Args:
        keep: keys that a query reads.
        indexer: `learned_indexer(...)`, `computed_indexer(...)`; by default `mean_indexer()`.
    """
    return select(index_scores(indexer or mean_indexer()), keep_blocks(keep), rows=1, cols=1)


def indexer_loss(indexer: Indexer, q: Tensor, k: Tensor, mask: Mask | None = None) -> Tensor:
    """How far an indexer is from the attention that it stands for, to be made smaller by training it.

        p[t] = mean over heads of softmax(q_h,t · k_h / √D)      loss = mean over t of KL(p[t] ‖ softmax I[t])

    The attention is taken as given: gradients reach the indexer alone. It holds scores of all pairs.

    Args:
        indexer: such as `learned_indexer`, with tensors that require a gradient.
        q, k: `(B, H, L, D)` and `(B, G, S, D)`.
        mask: who may see whom; queries that see nothing do not count.
    """
    batch, heads, queries, width = q.shape
    grid = Grid(batch, heads, k.shape[1], queries, k.shape[2], 1, 1, width**-0.5, real_keys(mask, q.device))
    own, weights, keys = indexer.features(q.detach(), k.detach())
    everything = torch.arange(grid.keys, device=q.device)
    hidden = ~seen_pairs(mask, grid, 0, queries, everything)
    with torch.no_grad():
        logits = _wide(q) @ grid.spread(_wide(k)).mT / math.sqrt(width)
        p = logits.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0.0).mean(1)
        p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    nothing = hidden.all(1)  # of which no head sees anything
    log_i = index_products(own, weights, keys).masked_fill(nothing, -math.inf).log_softmax(-1)
    lost = torch.where(p > 0, p * (p.clamp(min=torch.finfo(p.dtype).tiny).log() - log_i), 0.0).sum(-1)
    counted = ~nothing.all(-1).expand_as(lost)
    return lost[counted].sum() / counted.sum().clamp(min=1)


def checked(name: str, indexer: Indexer) -> None:
    """Raise a `ConfigError` if something is no indexer."""
    if not isinstance(indexer, Indexer):
        raise ConfigError(f"{name}: indexer must be one such as mean_indexer(); got {given(indexer)}")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
