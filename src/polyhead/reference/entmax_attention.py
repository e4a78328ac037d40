"""Attention through α-entmax."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.normalizers import entmax
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["entmax_attention"]


@twin("entmax_attention")
def entmax_attention(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    alpha: float | tuple[float, ...] | None,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_h = entmax_αh(q_h k_gᵀ / √D) v_g, α_h = 1 + max(σ(a_h), 0.01) unless given; y = sum_h head_h W_Oh.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state; a is `normalizer.logits`.
        heads, kv_heads: H and G, g = h // (H / G).
        alpha: one for all heads, one for each, or None.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = heads_of(x, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    outputs = []
    for h in range(heads):
        g = h // (heads // kv_heads)
        if alpha is None:
            own = 1 + max(float(torch.sigmoid(parameters["normalizer.logits"][h].double())), 0.01)
        else:
            own = alpha[h] if isinstance(alpha, tuple) else alpha
        row = partial(entmax, alpha=own)
        outputs.append(attend(q[:, h : h + 1], k[:, g : g + 1], v[:, g : g + 1], mask=mask, normalize=row))
    return joined(torch.cat(outputs, dim=1), parameters)
