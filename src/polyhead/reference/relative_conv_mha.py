"""Relative convolutional attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import joined, normed, real
from polyhead.reference.registry import twin

__all__ = ["relative_conv_mha"]


@twin("relative_conv_mha")
def relative_conv_mha(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    kernel: int,
    relative_dim: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """S_ij = ((q_i + u)·k_j + (q_i + w)·W_R R_{i-j}) / √D of convolved q, k, v; R_n = (sin nω, cos nω).

    Args:
        x: `(B, L, d)`.
        parameters: the module's state; u, w and W_R are `content_bias`, `position_bias`, `relative`.
        heads, kv_heads: H and G, g = h // (H / G).
        kernel, relative_dim: K and E.
        mask, padding: bool; see `reference`.
    """
    x, p = real(x, padding), {name: value.double() for name, value in parameters.items()}

    def convolved(name: str, h: int, count: int) -> Tensor:
        w, kernels = p[f"projection.{name}.weight"].chunk(count)[h], p[f"{name}_conv.weight"]
        z, own = x @ w.T, kernels[h % len(kernels)]
        made = torch.zeros_like(z)
        for t in range(z.shape[1]):
            for s in range(min(kernel, t + 1)):
                made[:, t] += own[kernel - 1 - s] * z[:, t - s]
        bias = p.get(f"projection.{name}.bias")
        return normed(made if bias is None else made + bias.chunk(count)[h], parameters, name)

    length, half = x.shape[1], relative_dim // 2
    apart = (torch.arange(length)[:, None] - torch.arange(length)).double()
    angles = torch.stack([apart * 10000.0 ** (-m / half) for m in range(half)], dim=-1)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # L L E
    seen = mask if padding is None else padding[:, None, None] & (True if mask is None else mask)
    outputs = []
    for h in range(heads):
        g = h // (heads // kv_heads)
        q, k, v = convolved("query", h, heads), convolved("key", g, kv_heads), convolved("value", g, kv_heads)
        content = torch.einsum("bid,bjd->bij", q + p["content_bias"][h], k)
        place = torch.einsum("bid,ije,de->bij", q + p["position_bias"][h], waves, p["relative"][h])
        scores = (content + place) / math.sqrt(q.shape[-1])
        outputs.append(attend(q[:, None], k[:, None], v[:, None], mask=seen, scale=0.0, bias=scores[:, None]))
    return joined(torch.cat(outputs, dim=1), parameters)
