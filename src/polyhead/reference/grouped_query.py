"""Grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["grouped_query"]


@twin("grouped_query", "el_attention")
def grouped_query(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_h = attend(x W_Qh, c W_Kg, c W_Vg) with g = h // (heads / kv_heads); y = sum_h head_h W_Oh.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state.
        heads, kv_heads: H and G.
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
        own = mask[:, h : h + 1] if mask is not None and mask.ndim == 4 and mask.shape[1] > 1 else mask
        outputs.append(attend(q[:, h : h + 1], k[:, g : g + 1], v[:, g : g + 1], mask=own))
    return joined(torch.cat(outputs, dim=1), parameters)
