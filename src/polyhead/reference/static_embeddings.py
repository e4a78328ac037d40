"""Attention whose maps come from the token embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["static_embeddings"]


@twin("static_embeddings")
def static_embeddings(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
    embeddings: Tensor | None = None,
) -> Tensor:
    """head_h = attend(e W_Qh, e W_Kg, c W_Vg) with e the embeddings of x or, for keys, those of c.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`, its own embeddings; default x.
        parameters: the module's state.
        heads, kv_heads: H and G.
        mask, padding: bool; see `reference`.
        embeddings: e `(B, L, d)` of x; default x.
    """
    e = x if embeddings is None else embeddings
    values = real(x if context is None else context, padding)
    keys = real(e if context is None else context, padding)
    q = heads_of(keys if context is None else e.double(), parameters, "query", heads)
    k = heads_of(keys, parameters, "key", kv_heads)
    v = heads_of(values, parameters, "value", kv_heads)
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    return joined(attend(q, k, v, mask=mask), parameters)
