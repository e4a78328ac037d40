"""Key-driven grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["key_driven_gqa"]


@twin("key_driven_gqa")
def key_driven_gqa(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_h = attend(q_h, k_g, v_g) with g = pick[h].

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state, with the key/value head `pick` of every query head.
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
    pick = [int(g) for g in parameters["pick"]]
    k, v = (torch.stack([z[:, g] for g in pick], dim=1) for z in (k, v))
    return joined(attend(q, k, v, mask=mask), parameters)
