"""Attention over several hops."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["multihop_attention"]


@twin("multihop_attention")
def multihop_attention(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    hops: int = 2,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_h = Σ_m A_h^m V_gm for m = 1..hops, A_h = softmax(q_h k_gᵀ / √D), as powers of a matrix.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state.
        heads, kv_heads: H and G, g = h // (H / G).
        hops: n.
        mask, padding: bool; see `reference`.
    """
    x = real(x, padding)
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    q, k = heads_of(x, parameters, "query", heads), heads_of(x, parameters, "key", kv_heads)
    names = ["value", *(f"value_{m}" for m in range(2, hops + 1))]
    values = [heads_of(x, parameters, name, kv_heads) for name in names]
    units = torch.eye(x.shape[1], dtype=torch.float64).expand(len(x), 1, -1, -1)
    outputs = []
    for h in range(heads):
        g = h // (heads // kv_heads)
        own = mask[:, h : h + 1] if mask is not None and mask.ndim == 4 and mask.shape[1] > 1 else mask
        edges = attend(q[:, h : h + 1], k[:, g : g + 1], units, mask=own)[:, 0]  # B L L
        head, power = torch.zeros((), dtype=torch.float64), units[:, 0]
        for v in values:
            power = power @ edges
            head = head + power @ v[:, g]
        outputs.append(head)
    return joined(torch.stack(outputs, dim=1), parameters)
