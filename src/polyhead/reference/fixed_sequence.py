"""Attention with the maps of a fixed sequence."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from polyhead.reference.registry import twin
from polyhead.reference.static_embeddings import static_embeddings

__all__ = ["fixed_sequence"]


@twin("fixed_sequence", "random_embeddings")
def fixed_sequence(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_h = attend(e W_Qh, e W_Kg, x W_Vg) with e the first L tokens of the fixed sequence.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state, e in it.
        heads, kv_heads: H and G.
        mask, padding: bool; see `reference`.
    """
    e = parameters["sequence"][: x.shape[1]].expand(x.shape)
    return static_embeddings(
        x, parameters=parameters, heads=heads, kv_heads=kv_heads, mask=mask, padding=padding, embeddings=e
    )
