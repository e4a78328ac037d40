"""Binary attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["binary_attention", "sign"]


def sign(x: Tensor) -> Tensor:
    """+1 where x ≥ 0 and -1 elsewhere, with the gradient 1[|x| ≤ 1]."""
    path = x.clamp(-1, 1)
    return torch.where(x >= 0, 1.0, -1.0).to(x) + path - path.detach()


@twin("binary_attention")
def binary_attention(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    scope: str = "token",
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """S = μ_q μ_k sign(q) sign(k)ᵀ / √D + table[:, R + clip(j - i, -R, R)]; y = concat(softmax(S) v) W_O.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state; the table `(H, 2 R + 1)`, where it has one, is `score.tensor0`.
        heads, kv_heads: H and G, g = h // (H / G).
        scope: μ is the mean of |·| over the channels of a "token", or over the "sequence" too.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = heads_of(x, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)

    def binary(z: Tensor, seen: Tensor | None) -> Tensor:
        if scope == "token":
            return sign(z) * z.abs().mean(-1, keepdim=True)
        items = [z[n] if seen is None else z[n][:, seen[n]] for n in range(len(z))]
        return sign(z) * torch.stack([item.abs().mean((1, 2)) for item in items])[:, :, None, None]

    q, k = binary(q, padding if context is None else None), binary(k, padding)
    bias = None
    if (table := parameters.get("score.tensor0")) is not None:
        reach, (rows, keys) = table.shape[1] // 2, (q.shape[2], k.shape[2])
        i = torch.arange(rows)[:, None] + keys - rows
        bias = table.double()[:, reach + (torch.arange(keys) - i).clamp(-reach, reach)]
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    return joined(attend(q, k, v, mask=mask, bias=bias), parameters)
