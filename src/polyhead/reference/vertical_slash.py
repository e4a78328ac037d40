"""Columns and diagonals of the attention map."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["vertical_slash"]


@twin("vertical_slash")
def vertical_slash(
    q: Tensor,
    k: Tensor,
    *,
    verticals: int,
    slashes: int,
    first: int = 30,
    nearest: int = 100,
    probes: int = 64,
    rows: int,
    cols: int,
) -> Tensor:
    """Which blocks are read under a causal mask: bool `(B, H, blocks of queries, blocks of keys)`.

    a[j] and d[s] are the sums over the last queries i of softmax(q_i·k / √D)[j], by key j and by distance
    s = i - j. A pair (i, j) is read if a[j] is one of the `verticals` largest or d[i - j] one of the
    `slashes` largest; the `first` keys and the `nearest` distances come before all others. A block is read if
    any pair with j <= i in it is.
    """
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    offset = keys - queries
    read = torch.zeros(batch, heads, -(-queries // rows), -(-keys // cols), dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            own = k[b, h * k.shape[1] // heads].double()
            a, d = [0.0] * keys, [0.0] * keys
            for row in range(max(0, queries - probes), queries):
                i = offset + row
                p = (own[: i + 1] @ q[b, h, row].double() / math.sqrt(width)).softmax(-1).tolist()
                for j in range(i + 1):
                    a[j] += p[j]
                    d[i - j] += p[j]
            a[:first] = [math.inf] * len(a[:first])
            d[:nearest] = [math.inf] * len(d[:nearest])
            columns = set(sorted(range(keys), key=lambda j: -a[j])[:verticals])
            distances = set(sorted(range(keys), key=lambda s: -d[s])[:slashes])
            for row in range(queries):
                for j in range(offset + row + 1):
                    if j in columns or offset + row - j in distances:
                        read[b, h, row // rows, j // cols] = True
    return read
