"""Attention over an inferred window."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["structural_inference_attention"]


@twin("structural_inference_attention")
def structural_inference_attention(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    iterations: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """w = softmax_j(q·k_j / √D + λ (i - j)), λ = ψ(b') - ψ(a' + b'), digammas; a', b' = a + 1, b + w·(i - j).

    Args:
        x: `(B, L, d)`, its tokens the last ones of the context.
        context: `(B, S, d)`; default x.
        parameters: the module's state; a and b are exp of `log_a` and `log_b`, the first a' and b'.
        heads, kv_heads: H and G, g = h // (H / G).
        iterations: how often w is computed.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = heads_of(x, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    shape = (len(x), heads, x.shape[1], source.shape[1])
    seen = (torch.ones(shape, dtype=torch.bool) if mask is None else mask).expand(shape)
    if padding is not None:
        seen = seen & padding[:, None, None, :]
    outputs = torch.zeros(*shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(len(x)):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(x.shape[1]):
                own = seen[b, h, i]
                if not own.any():
                    continue
                far = (i + shape[3] - shape[2] - torch.arange(shape[3], dtype=torch.float64))[own]
                logits = k[b, g, own] @ q[b, h, i] / math.sqrt(q.shape[-1])
                start, rest = parameters["log_a"][h].double().exp(), parameters["log_b"][h].double().exp()
                top, low = start, rest
                for _ in range(iterations):
                    slope = torch.digamma(low) - torch.digamma(top + low)
                    weights = (logits + slope * far).softmax(0)
                    top, low = start + 1, rest + weights @ far
                outputs[b, h, i] = weights @ v[b, g, own]
    return joined(outputs, parameters)
