"""Mixture of block attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["moba"]


@twin("moba")
def moba(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    block_size: int,
    top_k: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_t = attend(q_t, the j <= t of its own block and of the top_k - 1 earlier ones with most q_t·k̄_i).

    A block's mean key k̄_i is that of its real tokens; a block without any is not there, the own one too.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state.
        heads, kv_heads: H and G, g = h // (H / G).
        block_size: C.
        top_k: blocks that are read, the own one among them; of equal ones the later.
        mask, padding: bool; see `reference`. No mask takes away that j <= t.
    """
    batch, length, _ = x.shape
    kept = torch.ones(batch, length, dtype=torch.bool) if padding is None else padding
    source = real(x, padding)
    q = heads_of(source, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    read = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                own, scored = t // block_size, []
                for i in range(own + 1):
                    block = slice(i * block_size, (i + 1) * block_size)
                    keys = k[b, h // (heads // kv_heads), block][kept[b, block]]
                    if len(keys):
                        like = math.inf if i == own else float(q[b, h, t] @ keys.mean(0))
                        scored.append((like, i))
                for _, i in sorted(scored, reverse=True)[:top_k]:
                    read[b, h, t, i * block_size : (i + 1) * block_size] = True
    read = read & kept[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril()
    return joined(attend(q, k, v, mask=read if mask is None else read & mask), parameters)
