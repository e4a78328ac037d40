"""The first keys and the nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["a_shape"]


@twin("a_shape")
def a_shape(q: Tensor, k: Tensor, *, first: int, nearest: int, rows: int, cols: int) -> Tensor:
    """Which blocks are read under a causal mask: bool `(B, H, blocks of queries, blocks of keys)`.

    Those that hold a key j of a query i of the block with j < `first` or i - `nearest` < j, and j <= i.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    read = torch.zeros(batch, heads, -(-queries // rows), -(-keys // cols), dtype=torch.bool)
    for row in range(queries):
        i = keys - queries + row
        for j in range(i + 1):
            if j < first or j > i - nearest:
                read[:, :, row // rows, j // cols] = True
    return read
