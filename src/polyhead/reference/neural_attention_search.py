"""Neural attention search."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["neural_attention_search"]


@twin("neural_attention_search")
def neural_attention_search(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    window: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_i = Σ_j M_ij e^{s_ij} v_j / Σ_j M_ij e^{s_ij}, M as the mechanism's formula, pair by pair.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state.
        heads, kv_heads: H and G, g = h // (H / G).
        window: W.
        mask, padding: bool; see `reference`. No mask takes away that j <= i.
    """
    batch, length, _ = x.shape
    kept = torch.ones(batch, length, dtype=torch.bool) if padding is None else padding
    source = real(x, padding)
    q = heads_of(source, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    allowed = (allowed if mask is None else allowed & mask).expand(batch, heads, length, length)
    items = []
    for b in range(batch):
        there = [t for t in range(length) if kept[b, t]]
        rows = []
        for h in range(heads):
            g = h // (heads // kv_heads)
            logits = source[b].detach() @ parameters["roles.weight"][3 * g : 3 * g + 3].double().T
            soft = logits.softmax(-1)
            hard = torch.zeros_like(soft).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
            roles = list((hard + soft - soft.detach()).unbind(0))
            if there:
                roles[there[0]] = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
            tops = [torch.zeros_like(v[b, g, 0])] * length
            bottoms = [torch.zeros((), dtype=torch.float64)] * length
            for j in there:
                still = torch.ones((), dtype=torch.float64)  # Π over j < m < i of 1 - roles[m][0]
                for i in range(j, length):
                    if i - 1 > j and kept[b, i - 1]:
                        still = still * (1 - roles[i - 1][0])
                    if not allowed[b, h, i, j]:
                        continue
                    seen = roles[j][0] + roles[j][1] * still + roles[j][2] * float(i <= j + window)
                    weight = seen * (q[b, h, i] @ k[b, g, j] / math.sqrt(q.shape[-1])).exp()
                    tops[i], bottoms[i] = tops[i] + weight * v[b, g, j], bottoms[i] + weight
            rows += [t / s if s > 0 else t for t, s in zip(tops, bottoms, strict=True)]
        items.append(torch.stack(rows).view(heads, length, -1))
    out = torch.stack(items) if items else v.new_zeros(0, heads, length, v.shape[-1])
    return joined(out, parameters)
