"""Multi-head attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["multi_head"]


@twin("mha", "multi_head")
def multi_head(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
    turn: Callable[[Tensor, Tensor], Tensor] = lambda x, positions: x,
    **options: Any,
) -> Tensor:
    """head_h = attend(x W_Qh, c W_Kh, c W_Vh), y = sum_h head_h W_Oh; c is the context, or x.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`.
        parameters: the module's state.
        heads: H.
        mask, padding: bool; see `reference`.
        turn: turns heads `(B, H, n, D)` to positions `(n,)`; the queries stand at S - L..S - 1.
        options: `scale`, `bias` and `normalize` of the operator's twin.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    length, keys = x.shape[1], source.shape[1]
    q = heads_of(x, parameters, "query", heads)
    k = heads_of(source, parameters, "key", heads)
    v = heads_of(source, parameters, "value", heads)
    q = turn(q, torch.arange(keys - length, keys))
    k = turn(k, torch.arange(keys))
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    return joined(attend(q, k, v, mask=mask, **options), parameters)
