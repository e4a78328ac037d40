"""Keys by the score of their chunk, and how attention tells where chunks begin."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["boundary_ratio", "dhsa"]


@twin("boundary_ratio")
def boundary_ratio(q: Tensor, k: Tensor, *, window: int, real: Tensor | None = None) -> Tensor:
    """What later queries give to the keys left and right of a place, larger by smaller: `(B, S)`.

    real: bool `(B, S)`, which tokens are no padding. 1 at padding and at tokens too near to an end.
    """
    batch, heads, length, width = q.shape
    ratio = torch.ones(batch, length, dtype=torch.float64)
    for b in range(batch):
        tokens = torch.arange(length) if real is None else real[b].nonzero().view(-1)
        a = torch.zeros(length, length, dtype=torch.float64)
        for h in range(heads):
            own = k[b, h * k.shape[1] // heads].double()
            for t, i in enumerate(tokens):
                seen = tokens[: t + 1]
                a[i, seen] += (own[seen] @ q[b, h, i].double() / math.sqrt(width)).softmax(-1) / heads
        for s in tokens[2 * window : len(tokens) - 2 * window]:
            left = float(a[s + window - 1 :, s - window : s].sum())
            right = float(a[s + window - 1 :, s : s + window].sum())
            ratio[b, s] = (max(left, right) + 1e-6) / (min(left, right) + 1e-6)
    return ratio


@twin("dhsa")
def dhsa(
    q: Tensor,
    k: Tensor,
    starts: Tensor,
    *,
    keep: int,
    local: int,
    last: int,
    rows: int,
    pooling: str = "sqrt",
    visible: Tensor | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """Which keys blocks of queries read: bool `(B, blocks of queries, S)`.

    starts: bool `(B, S)`, where chunks begin. A chunk's key is √|c| times the mean of its real keys, or the
    mean, or the largest of every feature; a key scores what the block's mean query gives to its chunk, all
    heads in the mean. A block reads the `local` latest of the keys it sees and the best others, `keep` in
    all, or all if it holds one of the `last` queries of a longer call. visible: bool `(B, L, S)`; None: the
    past.
    """
    batch, _, queries, width = q.shape
    keys = k.shape[2]
    blocks = -(-queries // rows)
    read = torch.zeros(batch, blocks, keys, dtype=torch.bool)
    for b in range(batch):
        mean_q, mean_k = q[b].double().mean(0), k[b].double().mean(0)
        chunk_of: list[int] = []
        chunks: list[list[Tensor]] = []
        for j in range(keys):
            if j == 0 or bool(starts[b, j]):
                chunks.append([])
            chunk_of.append(len(chunks) - 1)
            if real is None or bool(real[b, j]):
                chunks[-1].append(mean_k[j])
        pooled = []
        for members in chunks:
            if not members:
                pooled.append(torch.zeros(width, dtype=torch.float64))
                continue
            together = torch.stack(members)
            factor = math.sqrt(len(members)) if pooling == "sqrt" else 1.0
            pooled.append(together.amax(0) if pooling == "max" else together.mean(0) * factor)
        for m in range(blocks):
            own = range(m * rows, min((m + 1) * rows, queries))
            if visible is None:
                seen = list(range(keys - queries + own[-1] + 1))
            else:
                seen = [j for j in range(keys) if any(bool(visible[b, i, j]) for i in own)]
            if queries > last and own[-1] >= queries - last:
                read[b, m, seen] = True
                continue
            block = mean_q[own[0] : own[-1] + 1].mean(0)
            scores = {j: float(block @ pooled[chunk_of[j]]) for j in seen[:-local]}
            best = sorted(scores, key=lambda j: (-scores[j], -j))[: keep - local]
            read[b, m, seen[-local:] + best] = True
    return read
