"""Attention without pairs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["self_gate"]


@twin("self_gate")
def self_gate(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_i = sum over visible j of e^(g_j) v_j / sum of e^(g_j), g_j = sum_d silu(q_j)_d (k_j)_d / √D.

    Args:
        x: `(B, L, d)`; with a context only its length counts.
        context: `(B, S, d)`; default x.
        parameters: the module's state.
        heads: H.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    q, k, v = (heads_of(source, parameters, name, heads) for name in ("query", "key", "value"))
    gates = (q / (1 + (-q).exp()) * k).sum(-1) / q.shape[-1] ** 0.5
    batch, length, keys = len(x), x.shape[1], source.shape[1]
    seen = torch.ones((), dtype=torch.bool) if mask is None else mask
    seen = seen if padding is None else seen & padding[:, None, None, :]
    seen = seen.expand(batch, heads, length, keys)
    out = torch.zeros(batch, heads, length, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                own = seen[b, h, i]
                if own.any():
                    powers = (gates[b, h, own] - gates[b, h, own].max()).exp()
                    out[b, h, i] = (powers / powers.sum()) @ v[b, h, own]
    return joined(out, parameters)
