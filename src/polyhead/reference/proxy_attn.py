"""Blocks ranked by mean heads, as many as every head's last queries need."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["proxy_attn"]


def weights(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) over the keys that are seen."""
    return (q @ k.T / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf).softmax(-1)


@twin("proxy_attn")
def proxy_attn(
    q: Tensor,
    k: Tensor,
    *,
    rows: int,
    cols: int,
    mass: float = 0.95,
    groups: int = 1,
    stride: int = 4,
    least: int = 2048,
) -> Tensor:
    """Which blocks are read under a causal mask: bool `(B, H, blocks of queries, blocks of keys)`.

    For a group of heads, over the first of every `stride` queries and keys of a block:

        A[m, n] = max over i in m, j in n of  softmax(mean_h q_h · mean_h k_h / √D)[i, j]

    Head h reads the c_h blocks of a row with the largest A, block 0 and the blocks of the queries' own keys;
    c_h is the smallest number of blocks that holds `mass` of what its last `rows` queries give, and at least
    `least` tokens.
    """
    batch, heads, queries, _ = q.shape
    keys, size = k.shape[2], heads // groups
    offset, blocks, others = keys - queries, -(-queries // rows), -(-keys // cols)
    q, k = q.double(), k.double().repeat_interleave(heads // k.shape[1], 1)
    past = torch.arange(keys) <= torch.arange(offset, keys)[:, None]
    some = [i for i in range(queries) if i % rows % stride == 0]
    taken = [j for j in range(keys) if j % cols % stride == 0]
    read = torch.zeros(batch, heads, blocks, others, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            group = slice(h // size * size, (h // size + 1) * size)
            mean_q, mean_k = q[b, group].mean(0)[some], k[b, group].mean(0)[taken]
            p = weights(mean_q, mean_k, past[some][:, taken]).tolist()
            best = [[-1.0] * others for _ in range(blocks)]
            for row, i in enumerate(some):
                for col, j in enumerate(taken):
                    if j <= offset + i:
                        best[i // rows][j // cols] = max(best[i // rows][j // cols], p[row][col])
            last = weights(q[b, h, -rows:], k[b, h], past[-rows:]).sum(0)
            held = sorted((float(part.sum()) for part in last.split(cols)), reverse=True)
            count = 1
            while count < others and sum(held[:count]) < mass * sum(held):
                count += 1
            count = max(count, -(-least // cols))
            for m in range(blocks):
                first, final = offset + m * rows, min(offset + (m + 1) * rows, keys) - 1
                order = sorted(range(final // cols + 1), key=lambda n: (-best[m][n], -n))
                read[b, h, m, order[:count]] = True
                read[b, h, m, 0] = True
                read[b, h, m, first // cols : final // cols + 1] = True
    return read
