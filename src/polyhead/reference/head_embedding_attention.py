"""Attention with head embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["head_embedding_attention"]


@twin("head_embedding_attention")
def head_embedding_attention(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    mode: str,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """q_h = q ⊙ (1 + e_hQ) or q + e_hQ with one q = x W_Q for all heads; k_h, v_h likewise from the context.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state.
        heads: H.
        mode: "mul" or "add".
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    made = {}
    for name, inputs in (("query", x), ("key", source), ("value", source)):
        shared = heads_of(inputs, parameters, name, 1)[:, 0]  # B n D
        embedding = parameters[f"projection.{name}_embedding"].double()
        made[name] = torch.stack(
            [shared * (1 + embedding[h]) if mode == "mul" else shared + embedding[h] for h in range(heads)],
            dim=1,
        )
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    return joined(attend(made["query"], made["key"], made["value"], mask=mask), parameters)
