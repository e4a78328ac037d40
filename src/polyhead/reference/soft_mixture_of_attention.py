"""Soft mixture of attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["soft_mixture_of_attention"]


@twin("soft_mixture_of_attention")
def soft_mixture_of_attention(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    experts: int,
    share_kv: bool,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """y_t = Σ_i r_i(x_t) Attn_i(x)_t, r = softmax(W x_t): expert by expert.

    Args:
        x, context, parameters, mask, padding: as in `grouped_query`.
        heads, kv_heads: H and G of an expert.
        experts: N; expert i has the i-th H query heads, and unless `share_kv` the i-th G of keys and values.
        share_kv: head n of expert i, which reads key/value head g = n // (H/G), is the one at g·N·H/G + i·H/G
            + n - g·H/G.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    held = kv_heads if share_kv else experts * kv_heads
    q = heads_of(x, parameters, "query", experts * heads)
    k, v = (heads_of(source, parameters, name, held) for name in ("key", "value"))
    if padding is not None:
        mask = padding[:, None, None] if mask is None else mask & padding[:, None, None]
    r = (x @ parameters["gate.router.weight"].double().T).softmax(-1)
    each = heads // kv_heads
    outputs = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for i in range(experts):
        for n in range(heads):
            g = n // each
            h = g * experts * each + i * each + n - g * each if share_kv else i * heads + n
            own = slice(g, g + 1) if share_kv else slice(i * kv_heads + g, i * kv_heads + g + 1)
            outputs[:, h] = r[..., i : i + 1] * attend(q[:, h : h + 1], k[:, own], v[:, own], mask=mask)[:, 0]
    return joined(outputs, parameters)
