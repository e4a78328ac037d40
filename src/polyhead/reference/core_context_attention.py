"""Core context attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["core_context_attention", "core_token"]


def core_token(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, pool: str) -> tuple[Tensor, Tensor]:
    """Key and value of a group of one head; q, k `(g, D)`, v `(g, Dv)`, kept bool `(g,)`."""
    k, v = k[kept], v[kept]
    if pool == "query":
        weights = (k @ q[-1] / math.sqrt(q.shape[-1])).softmax(0)
        return weights @ k, weights @ v
    return (k.mean(0), v.mean(0)) if pool == "mean" else (k.max(0).values, v.max(0).values)


@twin("core_context_attention")
def core_context_attention(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    group: int,
    window: int,
    pool: str,
    log_size: bool,
    padding: Tensor | None = None,
) -> Tensor:
    """o_t = softmax over the core tokens of groups i < G(t) and the tokens G(t)·g..t, row by row.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state.
        heads, kv_heads: H and G', g' = h // (H / G').
        group, window: g and w.
        pool, log_size: as the configuration has them.
        padding: bool `(B, L)`, True at real tokens.
    """
    x = real(x, padding)
    batch, length, _ = x.shape
    every = torch.ones(batch, length, dtype=torch.bool) if padding is None else padding
    q = heads_of(x, parameters, "query", heads)
    k = heads_of(x, parameters, "key", kv_heads)
    v = heads_of(x, parameters, "value", kv_heads)
    out = torch.zeros(batch, heads, length, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            own_k, own_v = k[b, h // (heads // kv_heads)], v[b, h // (heads // kv_heads)]
            for t in range(length):
                groups = max(0, (t + 1 - window) // group)
                keys, values, sizes = [], [], []
                for i in range(groups):
                    of = slice(i * group, (i + 1) * group)
                    kept = every[b, of]
                    if kept.any():
                        key, value = core_token(q[b, h, of], own_k[of], own_v[of], kept, pool)
                        keys.append(key)
                        values.append(value)
                        sizes.append(int(kept.sum()) if log_size else 1)
                for j in range(groups * group, t + 1):
                    if every[b, j]:
                        keys.append(own_k[j])
                        values.append(own_v[j])
                        sizes.append(1)
                if keys:
                    scores = torch.stack(keys) @ q[b, h, t] / math.sqrt(q.shape[-1])
                    weights = (scores + torch.tensor(sizes).double().log()).softmax(0)
                    out[b, h, t] = weights @ torch.stack(values)
    return joined(out, parameters)
