"""Talking-heads attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.across_heads import attend_across_heads
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["talking_heads"]


@twin("talking_heads")
def talking_heads(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """l_ij = P a_ij; w_hi = softmax_j(l_hij); u_ij = R w_ij; y_i = sum_h (sum_j u_hij v_gj) W_Oh.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state; P and R, where it has them, are `logit_mixing` and `weight_mixing`.
        heads, kv_heads: H and G, g = h // (H / G).
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
    same = torch.eye(heads)
    before = parameters.get("logit_mixing.weight", same).double()
    after = parameters.get("weight_mixing.weight", same).double()
    outputs = attend_across_heads(
        q,
        k,
        v,
        mask=mask,
        before=lambda logits, b, i, j: before @ logits,
        after=lambda weights, b, i, j: after @ weights,
    )
    return joined(outputs, parameters)
