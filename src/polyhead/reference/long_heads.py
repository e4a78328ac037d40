"""Chunks of the past that heads choose, at places next to each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["long_heads"]


def turned(x: Tensor, place: int, base: float) -> Tensor:
    """A vector turned by its place: pairs (m, m + D/2) by place · base^(-2m/D)."""
    half = len(x) // 2
    angle = place * base ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def chunk_key(q: Tensor, k: Tensor, v: Tensor, base: float) -> Tensor:
    """What stands for a chunk of q, k and v `(w, D)`."""
    q, k = (torch.stack([turned(row, n, base) for n, row in enumerate(x)]) for x in (q, k))
    root = math.sqrt(k.shape[1])
    f = ((q @ k.T / root).softmax(-1) @ v).mean(0)
    return (k @ f / root).softmax(0) @ k


@twin("long_heads")
def long_heads(q: Tensor, k: Tensor, v: Tensor, *, window: int, length: int, base: float = 10000.0) -> Tensor:
    """The output `(B, H, L, D)` for queries `(B, H, L, D)`, keys and values `(B, G, L, D)` without places."""
    q, k, v = (x.double() for x in (q, k, v))
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            own = h * k.shape[1] // q.shape[1]
            asked, keys, values = q[b, h], k[b, own], v[b, own]
            for t in range(len(asked)):
                last = t // window
                worth = {}
                for g in range(last + 1):
                    span = slice(g * window, (g + 1) * window)
                    if g in (0, last - 1, last):
                        worth[g] = math.inf
                    else:
                        worth[g] = float(asked[t] @ chunk_key(asked[span], keys[span], values[span], base))
                taken = sorted(sorted(worth, key=lambda g: -worth[g])[: length // window])
                read = [j for g in taken for j in range(g * window, (g + 1) * window) if j <= t]
                query = turned(asked[t], len(read) - 1, base)
                logits = torch.stack([turned(keys[j], n, base) @ query for n, j in enumerate(read)])
                out[b, h, t] = (logits / math.sqrt(asked.shape[1])).softmax(0) @ values[read]
    return out
