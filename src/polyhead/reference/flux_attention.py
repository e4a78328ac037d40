"""A router of layers, and a layer that reads everything or sinks and a window."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["flux_attention", "layer_router"]


@twin("layer_router")
def layer_router(raw: Tensor, *, parameters: Mapping[str, Tensor], size: int) -> Tensor:
    """Logits (sparse, full) of one text from its queries before rotary positions, `(L, H, D)`.

    p = mean of q_t,h over heads and over t < P or t >= L - P
    V₃ SiLU(V₂ SiLU(V₁ (W₂ SiLU(W₁ p))))
    """
    length = raw.shape[0]
    ends = [t for t in range(length) if t < size or t >= length - size]
    x = sum(raw[t, h].double() for t in ends for h in range(raw.shape[1])) / (len(ends) * raw.shape[1])

    def linear(name: str, x: Tensor) -> Tensor:
        return parameters[f"{name}.weight"].double() @ x + parameters[f"{name}.bias"].double()

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    f = linear("features_out", silu(linear("features_in", x)))  # type: ignore[arg-type]
    return linear("last", silu(linear("second", silu(linear("first", f)))))


@twin("flux_attention")
def flux_attention(
    q: Tensor, k: Tensor, v: Tensor, *, full: bool, sink: int, window: int, scale: float | None = None
) -> Tensor:
    """One text `(H, L, D)`, keys `(G, S, D)`: j <= i, and where not `full` j < sink or i - j < window."""
    heads, queries, width = q.shape
    keys = k.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    out = torch.zeros(heads, queries, v.shape[2], dtype=torch.float64)
    for h in range(heads):
        g = h * k.shape[0] // heads
        for row in range(queries):
            i = row + keys - queries
            seen = [j for j in range(i + 1) if full or j < sink or i - j < window]
            logits = torch.tensor([float(q[h, row].double() @ k[g, j].double()) * scale for j in seen])
            weights = logits.double().softmax(0)
            out[h, row] = weights @ v[g, seen].double()
    return out
