"""Dynamic mask attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["dynamic_mask_attention"]


@twin("dynamic_mask_attention")
def dynamic_mask_attention(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    keep: int,
    exponential: bool,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_i = attend(q_i, the real j <= i with the `keep` largest δ_j, bias δ_j), δ_j = A softplus(v_j W).

    Args:
        x: `(B, L, d)`.
        parameters: the module's state.
        heads, kv_heads: H and G, g = h // (H / G).
        keep: keys that a query reads; of equal ones the later.
        exponential: exp(δ_j) in place of δ_j.
        mask, padding: bool; see `reference`. No mask takes away that j <= i.
    """
    batch, length, _ = x.shape
    kept = torch.ones(batch, length, dtype=torch.bool) if padding is None else padding
    source = real(x, padding)
    q = heads_of(source, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    delta = torch.stack(
        [
            parameters["rate"][g].double()
            * F.softplus(torch.cat(list(v.unbind(1)), -1) @ parameters["importance.weight"][g].double())
            for g in range(kv_heads)
        ],
        dim=1,
    )
    delta = delta.exp() if exponential else delta
    read = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                past = [j for j in range(i + 1) if kept[b, j]]
                of = delta[b, h // (heads // kv_heads)]
                for j in sorted(past, key=lambda j: (float(of[j]), j))[-keep:]:
                    read[b, h, i, j] = True
    bias = delta.repeat_interleave(heads // kv_heads, dim=1)[:, :, None]
    return joined(attend(q, k, v, mask=read if mask is None else read & mask, bias=bias), parameters)
