"""Weighted grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, normed, real
from polyhead.reference.registry import twin

__all__ = ["weighted_grouped_query"]


@twin("weighted_grouped_query")
def weighted_grouped_query(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    granularity: str,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """k_g = sum over the heads h of group g of a_h ⊙ (c W_Kh), or of (a_h ⊙ c) W_Kh; v_g likewise.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state.
        heads, kv_heads: H and G.
        granularity: whether a_h is one number, lies on the output side of W_Kh, or on its input side.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    each = heads // kv_heads
    q = heads_of(x, parameters, "query", heads)
    shared = {}
    for name in ("key", "value"):
        weight = parameters[f"projection.{name}.weight"].double().chunk(heads)
        bias = parameters.get(f"projection.{name}.bias", torch.zeros(heads)).double().chunk(heads)
        factor = parameters[f"projection.{name}_weights"].double()
        groups = []
        for g in range(kv_heads):
            total = torch.zeros((), dtype=torch.float64)
            for h in range(g * each, (g + 1) * each):
                if granularity == "input":
                    total = total + (source * factor[h]) @ weight[h].T + bias[h] / each
                else:
                    total = total + factor[h] * (source @ weight[h].T + bias[h])
            groups.append(normed(total, parameters, name))
        shared[name] = torch.stack(groups, dim=1)
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    k, v = (shared[name].repeat_interleave(each, dim=1) for name in ("key", "value"))
    return joined(attend(q, k, v, mask=mask), parameters)
