"""Spans of heads that grow with the length."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["attention_influence", "spans"]


@twin("spans")
def spans(
    queries: int,
    keys: int,
    *,
    alpha: list[float],
    beta: list[float],
    first: int,
    rows: int,
    cols: int,
) -> Tensor:
    """Which blocks are read under a causal mask: bool `(H, blocks of queries, blocks of keys)`.

    With s = max(1, ⌊(alpha_h + beta_h · keys) / cols⌋), the query i may read the key j <= i if its block is
    one of the s up to the query's own, or holds one of the first keys. A block is read if any pair is.
    """
    read = torch.zeros(len(alpha), -(-queries // rows), -(-keys // cols), dtype=torch.bool)
    for h, (a, b) in enumerate(zip(alpha, beta, strict=True)):
        s = max(1, math.floor((a + b * keys) / cols))
        for row in range(queries):
            i = keys - queries + row
            for j in range(i + 1):
                near = 0 <= i // cols - j // cols < s
                if near or (j // cols) * cols < first:
                    read[h, row // rows, j // cols] = True
    return read


@twin("attention_influence")
def attention_influence(weights: Tensor, gradient: Tensor, block: int) -> Tensor:
    """Change of a loss when a weight is removed, to first order, summed over blocks: `(H, N, N)`.

    weights A and gradient g = dloss/dA are `(H, L, L)`. When the rest of the row is scaled up in its place,

        E[t, j] = -A[t, j] · (g[t, j] - Σ_m g[t, m] A[t, m]) / (1 - A[t, j])

    and -A·g where nothing else is in the row.
    """
    heads, length, _ = weights.shape
    found = torch.zeros(heads, -(-length // block), -(-length // block), dtype=torch.float64)
    for h in range(heads):
        for t in range(length):
            a, g = weights[h, t].tolist(), gradient[h, t].tolist()
            mean = sum(x * y for x, y in zip(a, g, strict=True))
            alone = sum(x > 0 for x in a) == 1
            for j in range(length):
                if a[j] > 0:
                    one = -a[j] * g[j] if alone else -a[j] * (g[j] - mean) / (1 - a[j])
                    found[h, t // block, j // block] += one
    return found
