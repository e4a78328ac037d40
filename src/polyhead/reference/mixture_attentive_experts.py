"""Mixture of attentive experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["mixture_attentive_experts"]


@twin("mixture_attentive_experts")
def mixture_attentive_experts(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    inference: str,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """y = Σ_i g_i f_i, f_i = H/(H-1) Σ_{j≠i} head_j W_Oj, expert by expert; arguments as in `grouped_query`.

    `inference`: "best" puts all of g on its greatest weight.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = heads_of(x, parameters, "query", heads)
    k, v = (heads_of(source, parameters, name, kv_heads) for name in ("key", "value"))
    if padding is not None:
        mask = padding[:, None, None] if mask is None else mask & padding[:, None, None]
    own = attend(q, k, v, mask=mask)
    batch, queries, keys = len(x), x.shape[1], source.shape[1]
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask
    seen = seen.expand(batch, -1, queries, keys)[:, 0]
    p = {name: value.double() for name, value in parameters.items()}
    mean = seen.double() @ source / seen.sum(-1, keepdim=True).clamp(min=1)
    inner = (mean @ p["gate.inner.weight"].T + p["gate.bias"]).tanh()
    g = (inner @ p["gate.out.weight"].T + p["gate.out.bias"]).softmax(-1)
    if inference == "best":
        g = (g == g.amax(-1, keepdim=True)).double()
    total = torch.zeros_like(own)
    for i in range(heads):
        expert = own * heads / (heads - 1)
        expert[:, i] = 0
        total = total + g[:, None, :, i, None] * expert
    return joined(total, parameters)
