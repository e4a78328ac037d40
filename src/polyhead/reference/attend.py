"""The operator, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["attend"]


def _softmax(logits: Tensor) -> Tensor:
    powers = (logits - logits.max()).exp()
    return powers / powers.sum()


@twin("attend")
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    normalize: Callable[[Tensor], Tensor] = _softmax,
) -> Tensor:
    """out_i = sum over visible j of w_ij v_j, w_i = normalize(scale · q_i·k_j + bias_ij).

    Args:
        q: queries `(B, H, L, D)`.
        k, v: keys `(B, G, S, D)` and values `(B, G, S, Dv)`; query head h reads head h // (H / G).
        mask: bool, True where row i may look at column j; broadcasts to `(B, H, L, S)`.
        scale: default 1/√D.
        bias: added to the logits; broadcasts to `(B, H, L, S)`.
        normalize: the logits `(n,)` that a row sees, to weights.
    """
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, queries, width = q.shape
    shape = (batch, heads, queries, k.shape[2])
    visible = (torch.ones((), dtype=torch.bool) if mask is None else mask).expand(shape)
    added = (torch.zeros((), dtype=q.dtype) if bias is None else bias).expand(shape)
    scale = 1 / math.sqrt(width) if scale is None else scale
    out = q.new_zeros(batch, heads, queries, v.shape[-1])
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[1])
            for i in range(queries):
                seen = visible[b, h, i]
                if seen.any():
                    logits = scale * (k[b, g, seen] @ q[b, h, i]) + added[b, h, i, seen]
                    out[b, h, i] = normalize(logits) @ v[b, g, seen]
    return out
