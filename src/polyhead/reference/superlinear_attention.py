"""Superlinear attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["superlinear_attention"]


@twin("superlinear_attention")
def superlinear_attention(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    window_index: int,
    top_k: int,
    backward: float,
    forward: float,
    search_power: float,
    span_power: float,
    padding: Tensor | None = None,
) -> Tensor:
    """o_t = Σ_c g_c attend(q_t, the span of anchor c and the window), token by token.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state; `projection.search` makes what the anchors are scored by.
        heads, kv_heads: H and G, g = h // (H / G).
        window_index, top_k, backward, forward, search_power, span_power: s, k, b, f, p and σ.
        padding: bool `(B, L)`, True at real tokens.
    """
    x = real(x, padding)
    u = heads_of(x, parameters, "search", heads)
    q = heads_of(x, parameters, "query", heads)
    k = heads_of(x, parameters, "key", kv_heads)
    v = heads_of(x, parameters, "value", kv_heads)

    def back(i: int) -> int:
        return math.floor(i ** (1 / search_power) + 1e-12) - 1

    window = back(window_index + 1)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(len(x)):
        kept = [True] * x.shape[1] if padding is None else padding[b].tolist()
        for h in range(heads):
            g = h // (heads // kv_heads)
            for t in range(x.shape[1]):
                if not any(kept[: t + 1]):
                    continue
                grown = (t + 1 - kept.index(True)) ** span_power
                near = set(range(max(0, t - window + 1), t + 1))
                anchors = [t - back(i) for i in range(window_index + 1, t + 3) if back(i) <= t]
                routes = sorted(((u[b, h, t] @ k[b, g, a], a) for a in anchors if kept[a]), reverse=True)
                spans = []
                for _, a in routes[:top_k]:
                    start = max(0, a - math.ceil(backward * grown - 1e-9))
                    end = min(a + math.ceil(forward * grown - 1e-9), t - window)
                    spans.append(near | set(range(start, end + 1)))
                gates = torch.stack([r for r, _ in routes[:top_k]] or [x.new_zeros(())]).softmax(0)
                for gate, keys in zip(gates, spans or [near], strict=True):
                    read = sorted(j for j in keys if kept[j])
                    if read:
                        weights = (k[b, g, read] @ q[b, h, t] / math.sqrt(q.shape[-1])).softmax(0)
                        out[b, h, t] = out[b, h, t] + gate * (weights @ v[b, g, read])
    return joined(out, parameters)
