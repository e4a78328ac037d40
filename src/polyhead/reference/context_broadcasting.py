"""Attention with a head of uniform weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["context_broadcasting"]


@twin("context_broadcasting")
def context_broadcasting(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    amount: float | None,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """y_i = sum_h head_hi W_Oh + λ ⊙ mean over visible j of c_j.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state; λ is `channels`, unless `amount` is given.
        heads, kv_heads: H and G, g = h // (H / G).
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = heads_of(x, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    shape = (len(x), 1, x.shape[1], source.shape[1])
    seen = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
    if padding is not None:
        seen = seen & padding[:, None, None, :]
    uniform = seen[:, 0].double() / seen[:, 0].sum(-1, keepdim=True).clamp(min=1)
    scale = parameters["channels"].double() if amount is None else amount
    return joined(attend(q, k, v, mask=seen), parameters) + scale * (uniform @ source)
