"""Sparse-query attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["sparse_query"]


@twin("sparse_query")
def sparse_query(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    query_heads: int,
    kv_heads: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Fewer query heads than the width has room for, each as wide as before; the map goes back to d.

    Query heads and key/value heads are brought to the same number by repeating whichever is fewer, each
    one as often as needed before the next.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state.
        query_heads, kv_heads: H_q and H_kv.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    maps = max(query_heads, kv_heads)
    q, k, v = (
        torch.stack([z[:, n // (maps // count)] for n in range(maps)], dim=1)
        for z, count in (
            (heads_of(x, parameters, "query", query_heads), query_heads),
            (heads_of(source, parameters, "key", kv_heads), kv_heads),
            (heads_of(source, parameters, "value", kv_heads), kv_heads),
        )
    )
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    return joined(attend(q, k, v, mask=mask), parameters)
