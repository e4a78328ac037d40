"""Mixture of attention heads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.choosing import largest
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["moa_heads"]


@twin("moa_heads")
def moa_heads(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    experts: int,
    renormalise: str | None,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """y_t = Σ_i w_i(t) E_i(t): every expert computed for every token, weights zero but for k of them.

    Args:
        x, context, parameters, mask, padding: as in `grouped_query`.
        heads: query heads that a token has, k · kv_heads.
        kv_heads: G; expert i has the query heads i, E + i, ..., the g-th of which reads key/value head g.
        experts: E.
        renormalise: None: w are the probabilities themselves.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = heads_of(x, parameters, "query", experts * kv_heads)
    k, v = (heads_of(source, parameters, name, kv_heads) for name in ("key", "value"))
    if padding is not None:
        mask = padding[:, None, None] if mask is None else mask & padding[:, None, None]
    p = (x @ parameters["router.gate.weight"].double().T).softmax(-1)
    w = p * largest(p, heads // kv_heads)
    w = w if renormalise is None else w / w.sum(-1, keepdim=True)
    outputs = []
    for g in range(kv_heads):
        for i in range(experts):
            h = g * experts + i
            own = attend(q[:, h : h + 1], k[:, g : g + 1], v[:, g : g + 1], mask=mask)
            outputs.append(own * w[:, None, :, i : i + 1])
    return joined(torch.cat(outputs, dim=1), parameters)
