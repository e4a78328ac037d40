"""Maps across the heads of a pair, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["attend_across_heads", "head_mix"]

PairMap = Callable[[Tensor, int, int, int], Tensor]


@twin("head_mix")
def head_mix(numbers: Tensor, matrix: Tensor) -> Tensor:
    """y_h = sum_g matrix[h, g] x_g for the numbers `(H,)` of a pair."""
    heads = len(numbers)
    mixed = [torch.stack([matrix[h, g] * numbers[g] for g in range(heads)]).sum() for h in range(heads)]
    return torch.stack(mixed)


@twin("attend_across_heads")
def attend_across_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    before: PairMap | None = None,
    after: PairMap | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """out_hi = sum over visible j of after(w_ij)_h v_j, w_hi = softmax over visible j of before(a_ij)_h.

    Args:
        q: queries `(B, H, L, D)`.
        k, v: keys `(B, G, S, D)` and values `(B, G, S, Dv)`; query head h reads head h // (H / G).
        before, after: maps of the numbers `(H,)` that the heads have at a pair: f(numbers, b, i, j), with
            i and j indices of the query row and the key column.
        mask: bool, True where row i may look at column j; broadcasts to `(B, H, L, S)`.
        scale: default 1/√D.
    """
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, queries, width = q.shape
    keys, scale = k.shape[2], 1 / math.sqrt(width) if scale is None else scale
    visible = (torch.ones((), dtype=torch.bool) if mask is None else mask).expand(batch, heads, queries, keys)
    group = heads // k.shape[1]
    out = q.new_zeros(batch, heads, queries, v.shape[-1])
    for b in range(batch):
        for i in range(queries):
            logits = torch.stack([scale * (k[b, h // group] @ q[b, h, i]) for h in range(heads)])  # H S
            if before is not None:
                logits = torch.stack([before(logits[:, j], b, i, j) for j in range(keys)], dim=1)
            weights = torch.zeros_like(logits)
            for h in range(heads):
                seen = visible[b, h, i]
                if seen.any():
                    powers = (logits[h, seen] - logits[h, seen].max()).exp()
                    weights[h, seen] = powers / powers.sum()
            if after is not None:
                weights = torch.stack([after(weights[:, j], b, i, j) for j in range(keys)], dim=1)
            for h in range(heads):
                out[b, h, i] = torch.where(visible[b, h, i], weights[h], 0.0) @ v[b, h // group]
    return out
