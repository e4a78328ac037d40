"""S2-Attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["s2_attention"]


@twin("s2_attention")
def s2_attention(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    block_size: int,
    local_blocks: int,
    stride: int,
    offset: int = 0,
    dense_heads: int = 0,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_i = attend(q_i, the keys of blocks n with |m - n| < l or (n + g·step + o) mod s = 0), m = i // C.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state.
        heads, kv_heads: H and G, g = h // (H / G).
        block_size, local_blocks, stride, offset: C, l, s and o; step = max(1, s // G).
        dense_heads: key/value heads, the last ones, that read everything.
        mask, padding: bool; see `reference`.
    """
    source, length = real(x, padding), x.shape[1]
    q = heads_of(source, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    step = max(1, stride // kv_heads)
    read = torch.zeros(heads, length, length, dtype=torch.bool)
    for h in range(heads):
        g = h // (heads // kv_heads)
        for i in range(length):
            for j in range(length):
                m, n = i // block_size, j // block_size
                own = abs(m - n) < local_blocks or (n + g * step + offset) % stride == 0
                read[h, i, j] = own or g >= kv_heads - dense_heads
    if padding is not None:
        read = read & padding[:, None, None]
    return joined(attend(q, k, v, mask=read if mask is None else read & mask), parameters)
