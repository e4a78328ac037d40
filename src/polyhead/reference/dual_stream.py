"""Attention with channelised maps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.grouped_query import grouped_query
from polyhead.reference.registry import twin

__all__ = ["dual_stream"]


def _written_out(weight: Tensor, mixing: str, width: int) -> Tensor:
    """The matrix of a map: its blocks on the diagonal, M ⊗ I of a width, or itself."""
    if mixing == "independent":
        return torch.block_diag(*weight.double())
    return torch.kron(weight.double(), torch.eye(width).double()) if mixing == "kronecker" else weight


@twin("dual_stream")
def dual_stream(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    query_map: str,
    key_map: str,
    value_map: str,
    output_map: str,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Grouped-query attention whose matrices are diag(W_1, ..., W_H), M ⊗ I, or any.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state.
        heads, kv_heads: H and G.
        query_map, key_map, value_map, output_map: what each map is; heads have the width d / H.
        mask, padding: bool; see `reference`.
    """
    width = x.shape[-1] // heads
    dense = {name.replace("output.map.", "output."): t for name, t in parameters.items()}
    names = ("projection.query", "projection.key", "projection.value", "output")
    for name, mixing in zip(names, (query_map, key_map, value_map, output_map), strict=True):
        dense[f"{name}.weight"] = _written_out(dense[f"{name}.weight"], mixing, width)
    return grouped_query(
        x, context, parameters=dense, heads=heads, kv_heads=kv_heads, mask=mask, padding=padding
    )
