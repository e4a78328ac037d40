"""Keys by the score of an indexer: of all keys, or of those in the best blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["hisa", "token_indexer"]


def score(queries: Tensor, weights: Tensor, key: Tensor) -> float:
    """Σ_j w_j · ReLU(q_j · k / √D) of one query and one key."""
    total = 0.0
    for own, weight in zip(queries, weights, strict=True):
        total += float(weight) * max(0.0, float(own @ key) / math.sqrt(len(key)))
    return total


def nearest_best(scores: dict[int, float], count: int) -> list[int]:
    """The places with the largest scores, of equal ones the last."""
    return sorted(scores, key=lambda place: (-scores[place], -place))[:count]


@twin("token_indexer")
def token_indexer(
    queries: Tensor, weights: Tensor, keys: Tensor, *, keep: int, visible: Tensor | None = None
) -> Tensor:
    """Which keys are read: bool `(B, L, S)`.

    The queries are `(B, H_I, L, D)`, weights `(B, H_I, L)`, keys `(B, S, D)`.
    visible: bool `(B, L, S)`; None: the past.
    """
    return hisa(queries, weights, keys, keep=keep, blocks=keys.shape[1], size=1, visible=visible)


@twin("hisa")
def hisa(
    queries: Tensor,
    weights: Tensor,
    keys: Tensor,
    *,
    keep: int,
    blocks: int,
    size: int,
    visible: Tensor | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """The same, among the keys of the best blocks by the mean of their real keys: bool `(B, L, S)`.

    The first and the last block in which a query sees something are among its `blocks`. real: bool `(B, S)`.
    """
    queries, weights, keys = queries.double(), weights.double(), keys.double()
    batch, _, length, _ = queries.shape
    count = keys.shape[1]
    if visible is None:
        past = torch.arange(count) <= torch.arange(count - length, count)[:, None]
        visible = past.expand(batch, -1, -1)
    read = torch.zeros(batch, length, count, dtype=torch.bool)
    for b in range(batch):
        own = [j for j in range(count) if real is None or bool(real[b, j])]
        means = {}
        for n in range(-(-count // size)):
            here = [keys[b, j] for j in own if j // size == n]
            means[n] = sum(here, torch.zeros_like(keys[b, 0])) / max(1, len(here))
        for t in range(length):
            asked = queries[b, :, t], weights[b, :, t]
            seen = [j for j in range(count) if bool(visible[b, t, j])]
            if not seen:
                continue
            worth = {n: score(*asked, means[n]) for n in {j // size for j in seen}}
            worth[seen[0] // size] = worth[seen[-1] // size] = math.inf
            taken = nearest_best(worth, blocks)
            exact = {j: score(*asked, keys[b, j]) for j in seen if j // size in taken}
            read[b, t, nearest_best(exact, keep)] = True
    return read
