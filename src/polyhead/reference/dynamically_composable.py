"""Dynamically composable attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.reference.across_heads import attend_across_heads
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["dynamically_composable"]


def _matrices(x: Tensor, parameters: Mapping[str, Tensor], side: str, stage: int, heads: int) -> Tensor:
    """sum_r s_r p_rᵀ + diag(f) for every token, `(B, n, H, H)`."""
    inside, read, write, gate = (
        parameters[f"{side}_mixes.{name}"].double() for name in ("inside.weight", "read", "write", "gate")
    )
    hidden = F.gelu(x @ inside.chunk(2)[stage].T)
    p = (hidden @ read[stage]).unflatten(-1, (-1, heads))  # B n R H
    p = p / (p.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    s = (hidden @ write[stage]).unflatten(-1, (-1, heads))
    return s.mT @ p + torch.diag_embed(torch.tanh(x @ gate.chunk(2)[stage].T))


@twin("dynamically_composable")
def dynamically_composable(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """w_hi = softmax_j((M_ij a_ij)_h); u_ij = M'_ij w_ij; y_i = sum_h (sum_j u_hij v_gj) W_Oh,
    with every M written out: M_ij = I + B + sum_r s_ir p_irᵀ + diag(f_i) + sum_r s_jr p_jrᵀ + diag(f_j).

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state; without `base` B is zero, without `key_mixes` j has no say.
        heads, kv_heads: H and G, g = h // (H / G).
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = heads_of(x, parameters, "query", heads)
    k, v = (heads_of(source, parameters, name, kv_heads) for name in ("key", "value"))
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen

    def composed(stage: int) -> Callable[[Tensor, int, int, int], Tensor]:
        fixed = torch.eye(heads).double()
        if "base" in parameters:
            fixed = fixed + parameters["base"][stage].double()
        of_query = _matrices(x, parameters, "query", stage, heads)
        keyed = "key_mixes.read" in parameters
        of_key = _matrices(source, parameters, "key", stage, heads) if keyed else None
        return lambda numbers, b, i, j: (
            (fixed + of_query[b, i] + (0 if of_key is None else of_key[b, j])) @ numbers
        )

    return joined(attend_across_heads(q, k, v, mask=mask, before=composed(0), after=composed(1)), parameters)
