"""Attention with heads of a fixed width."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["fixed_head_size"]


@twin("fixed_head_size")
def fixed_head_size(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    head_dim: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_h = softmax(x W_Qh (c W_Kg)ᵀ / √D) c W_Vg, g = h // (heads / kv_heads); y = sum_h head_h W_Oh.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state.
        heads, kv_heads: H and G.
        head_dim: D, of any size.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = heads_of(x, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    assert q.shape[-1] == k.shape[-1] == head_dim
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    shared = torch.arange(heads) // (heads // kv_heads)
    return joined(attend(q, k[:, shared], v[:, shared], mask=mask), parameters)
