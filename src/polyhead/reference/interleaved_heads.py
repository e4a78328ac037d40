"""Interleaved-head attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["interleaved_heads"]


@twin("interleaved_heads")
def interleaved_heads(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    pseudo: int,
    order: str,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """õ_hnp = sum over tokens j and p' of softmax(q̃_hnp · k̃_gjp' / √D) ṽ_gjp'; o_hn = sum_p R õ.

    q̃_hnp = sum_m A[p, h, m] q_mn, and so k̃ and ṽ among the `kv_heads`; g = h // (heads / kv_heads).

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state; A are `query_mix`, `key_mix` and `value_mix`, R is `collapse`.
        heads, kv_heads, pseudo: H, G and P.
        order: "flat" hides p' > p of the token that stands where the query does.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()

    def mixtures(z: Tensor, name: str) -> list[list[Tensor]]:
        weight = parameters[f"{name}_mix.weight"].double()
        one = lambda row: sum(a * z[:, m] for m, a in enumerate(row))  # noqa: E731
        return [[one(weight[p, h]) for p in range(pseudo)] for h in range(z.shape[1])]

    q = mixtures(heads_of(x, parameters, "query", heads), "query")
    k = mixtures(heads_of(source, parameters, "key", kv_heads), "key")
    v = mixtures(heads_of(source, parameters, "value", kv_heads), "value")
    batch, queries, keys = len(x), x.shape[1], source.shape[1]
    seen = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    seen = seen if mask is None else seen & mask
    seen = seen if padding is None else seen & padding[:, None, None, :]
    own = torch.arange(queries)[:, None] + keys - queries == torch.arange(keys)
    collapse = parameters["collapse.weight"].double()
    outputs: list[list[Tensor]] = [[] for _ in range(heads)]
    for h in range(heads):
        g = h // (heads // kv_heads)
        for p in range(pseudo):
            blocks = []
            for later in range(pseudo):
                logits = q[h][p] @ k[g][later].mT / q[h][p].shape[-1] ** 0.5
                hidden = own & (order == "flat" and later > p)
                blocks.append(logits.masked_fill(~seen[:, h] | hidden, float("-inf")))
            weights = torch.cat(blocks, dim=-1).softmax(-1).nan_to_num(0.0)
            outputs[h].append(weights @ torch.cat(v[g], dim=1))
    found = torch.stack([torch.stack(one) for one in outputs])  # H P B L Dv
    if collapse.ndim == 2:
        return joined(torch.einsum("hp,hpbld->bhld", collapse, found), parameters)
    return joined(torch.einsum("hgp,gpbld->bhld", collapse, found), parameters)
