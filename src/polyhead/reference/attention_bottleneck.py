"""An attention bottleneck."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["attention_bottleneck"]


@twin("attention_bottleneck")
def attention_bottleneck(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    gate: bool,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Grouped-query attention whose first row is times 1 - a, a its weight on the first key; y = concat W_O.

    Args:
        x, context, parameters, heads, kv_heads, mask, padding: as in `grouped_query`.
        gate: whether it is.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = heads_of(x, parameters, "query", heads)
    k, v = (
        heads_of(source, parameters, name, kv_heads).repeat_interleave(heads // kv_heads, 1)
        for name in ("key", "value")
    )
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask
    if padding is not None:
        seen = seen & padding[:, None, None, :]
    outputs = attend(q, k, v, mask=seen)
    seen = seen.expand(len(x), heads, x.shape[1], source.shape[1])
    for b in range(len(x) if gate else 0):
        for h in range(heads):
            if seen[b, h, 0, 0]:
                powers = (k[b, h] @ q[b, h, 0] / math.sqrt(q.shape[-1])).exp()
                outputs[b, h, 0] = outputs[b, h, 0] * (1 - powers[0] / powers[seen[b, h, 0]].sum())
    return joined(outputs, parameters)
