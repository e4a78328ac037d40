"""Multi-query attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["multi_query"]


@twin("multi_query")
def multi_query(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """k_s = c_s P_k and v_s = c_s P_v without a head axis; o_ht = sum_s softmax_s(q_ht·k_s/√D) v_s.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state.
        heads: query heads H.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = heads_of(x, parameters, "query", heads)  # B H L D
    k = heads_of(source, parameters, "key", 1)[:, 0]  # B S D
    v = heads_of(source, parameters, "value", 1)[:, 0]  # B S D
    logits = torch.einsum("bhtd,bsd->bhts", q, k) / math.sqrt(q.shape[-1])
    seen = torch.ones_like(logits, dtype=torch.bool)
    if mask is not None:
        seen = seen & mask
    if padding is not None:
        seen = seen & padding[:, None, None, :]
    top = logits.masked_fill(~seen, -math.inf).amax(-1, keepdim=True).clamp(min=-1e300)
    powers = torch.where(seen, (logits - top).exp(), 0.0)
    total = powers.sum(-1, keepdim=True)
    weights = torch.where(total > 0, powers / total.clamp(min=1e-300), 0.0)
    return joined(torch.einsum("bhts,bsd->bhtd", weights, v), parameters)
