"""Decoupled-head attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["decoupled_head"]


@twin("decoupled_head")
def decoupled_head(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    key_map: Sequence[int],
    value_map: Sequence[int],
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_h = attend(x W_Qh, c W_Ka, c W_Vb), a = key_map[h], b = value_map[h]; y = sum_h head_h W_Oh.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state.
        heads: H.
        key_map, value_map: the key head and the value head of every query head.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = heads_of(x, parameters, "query", heads)
    k = heads_of(source, parameters, "key", max(key_map) + 1)
    v = heads_of(source, parameters, "value", max(value_map) + 1)
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    outputs = []
    for h, (a, b) in enumerate(zip(key_map, value_map, strict=True)):
        own = mask[:, h : h + 1] if mask is not None and mask.ndim == 4 and mask.shape[1] > 1 else mask
        outputs.append(attend(q[:, h : h + 1], k[:, a : a + 1], v[:, b : b + 1], mask=own))
    return joined(torch.cat(outputs, dim=1), parameters)
