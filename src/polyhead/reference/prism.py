"""Blocks by the fast and by the slow features of rotary positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["prism"]


def rms(x: Tensor) -> float:
    """√(mean of squares)."""
    return math.sqrt(float(x.square().mean()))


@twin("prism")
def prism(
    q: Tensor, k: Tensor, *, rows: int, cols: int, mass: float = 0.95, high: float = 0.5, low: float = 0.75
) -> Tensor:
    """Which blocks are read under a causal mask: bool `(B, H, blocks of queries, blocks of keys)`.

    For a band of d of D features, fast (the first d/2 pairs) or slow (the last), pairs (i, i + D/2):

        t      = √(d/D) · r(q̄_band)/r(q̄) · r(k̄_band)/r(k̄)
        p[m]   = softmax over the blocks n up to m's of  q̄_band[m] · k̄_band[n] / (√d · t)

    of each row the largest p are read while the sum of those before is below `mass`; besides, block 0 and the
    blocks of the queries' own keys.

    Args:
        q, k: `(B, H, L, D)` and `(B, G, S, D)`, turned by their positions.
    """
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    blocks, others = -(-queries // rows), -(-keys // cols)
    read = torch.zeros(batch, heads, blocks, others, dtype=torch.bool)
    pairs = width // 2
    fast = list(range(round(high * pairs)))
    slow = list(range(pairs - round(low * pairs), pairs))
    for b in range(batch):
        for h in range(heads):
            own = k[b, h * k.shape[1] // heads].double()
            qs = torch.stack([q[b, h, m * rows : (m + 1) * rows].double().mean(0) for m in range(blocks)])
            ks = torch.stack([own[n * cols : (n + 1) * cols].mean(0) for n in range(others)])
            for band in (fast, slow):
                at = band + [i + pairs for i in band]
                qb, kb, d = qs[:, at], ks[:, at], len(at)
                t = math.sqrt(d / width) * rms(qb) / rms(qs) * rms(kb) / rms(ks)
                for m in range(blocks):
                    first = keys - queries + m * rows
                    last = min(first + rows, keys) - 1
                    p = ((qb[m] @ kb[: last // cols + 1].T) / (math.sqrt(d) * t)).softmax(-1)
                    before = 0.0
                    for n in p.argsort(descending=True).tolist():
                        if before < mass:
                            read[b, h, m, n] = True
                        before += float(p[n])
                    read[b, h, m, 0] = True
                    read[b, h, m, first // cols : last // cols + 1] = True
    return read
