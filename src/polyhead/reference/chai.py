"""Heads that use the map of another one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["chai"]


def _map(q: Tensor, k: Tensor, i: int) -> list[float]:
    """The causal weights of query i."""
    scores = [float(q[i] @ k[j]) / math.sqrt(len(q[i])) for j in range(i + 1)]
    powers = [math.exp(s - max(scores)) for s in scores]
    return [p / sum(powers) for p in powers]


@twin("chai")
def chai(q: Tensor, k: Tensor, v: Tensor, *, count: int, tokens: int) -> tuple[Tensor, list[list[int]]]:
    """The output `(H, L, Dv)` of one causal sequence, and the clusters, lists of heads.

    q is `(H, L, D)`, k and v `(G, L, D)`. F_h are the causal weights of the first `tokens` queries of head h
    as one row, with zeros for the future. Clusters of one head each are joined, two at a time, those with
    the smallest mean of 1 - cos(F_a, F_b) over their heads a and b, until `count` are left. Behind the
    first tokens every head weighs its values as the first head of its cluster does.
    """
    q, k, v = q.double(), k.double(), v.double()
    heads, length, _ = q.shape
    repeat = heads // k.shape[0]
    rows = []
    for h in range(heads):
        row: list[float] = []
        for i in range(tokens):
            row += _map(q[h], k[h // repeat], i) + [0.0] * (tokens - i - 1)
        rows.append(torch.tensor(row, dtype=torch.float64))

    def far(a: int, b: int) -> float:
        return 1 - float(rows[a] @ rows[b] / (rows[a].norm() * rows[b].norm()))

    clusters = [[h] for h in range(heads)]
    while len(clusters) > count:
        pairs = [(m, n) for m in range(len(clusters)) for n in range(m + 1, len(clusters))]
        means = [
            sum(far(a, b) for a in clusters[m] for b in clusters[n]) / (len(clusters[m]) * len(clusters[n]))
            for m, n in pairs
        ]
        m, n = pairs[means.index(min(means))]
        clusters[m] = sorted(clusters[m] + clusters.pop(n))
        clusters.sort()
    out = torch.zeros(heads, length, v.shape[2], dtype=torch.float64)
    for cluster in clusters:
        for h in cluster:
            for i in range(length):
                r = h if i < tokens else cluster[0]
                for j, weight in enumerate(_map(q[r], k[r // repeat], i)):
                    out[h, i] += weight * v[h // repeat, j]
    return out, clusters
