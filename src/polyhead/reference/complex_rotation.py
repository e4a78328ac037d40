"""Complex vector attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["complex_rotation"]


@twin("complex_rotation")
def complex_rotation(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    scaled: bool,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """score_ij = sum_m |q_m| |k_m| cos(δ_m (φ(q_m) - φ(k_m)) + b_m + (i - j) 10000^(-2m/D)) / √D.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state; δ and b are `projection.stretch` and `projection.shift`.
        heads, kv_heads: H and G, g = h // (H / G).
        scaled: whether there is the factor 1/√D.
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
    queries, keys, half = x.shape[1], source.shape[1], q.shape[-1] // 2
    apart = (torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)).double()  # i - j
    outputs = []
    for h in range(heads):
        g = h // (heads // kv_heads)
        scores = torch.zeros(len(x), queries, keys, dtype=torch.float64)
        for m in range(half):
            a = torch.complex(q[:, h, :, m], q[:, h, :, m + half])[:, :, None]
            b = torch.complex(k[:, g, :, m], k[:, g, :, m + half])[:, None, :]
            stretch = parameters["projection.stretch"][g, m].double()
            shift = parameters["projection.shift"][h, m].double()
            angle = stretch * (a.angle() - b.angle()) + shift + apart * 10000 ** (-m / half)
            scores = scores + a.abs() * b.abs() * angle.cos()
        scores = scores / (2 * half) ** 0.5 if scaled else scores
        own = (q[:, h : h + 1], k[:, g : g + 1], v[:, g : g + 1])
        outputs.append(attend(*own, mask=mask, scale=0.0, bias=scores[:, None]))
    return joined(torch.cat(outputs, dim=1), parameters)
