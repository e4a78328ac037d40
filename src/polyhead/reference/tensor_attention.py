"""Tensor attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import heads_of, joined, normed, real
from polyhead.reference.registry import twin

__all__ = ["tensor_attention"]


@twin("tensor_attention")
def tensor_attention(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    order: int,
    scale: float | None,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_i = sum over tuples t of visible tokens of A_it · prod_p v^p_tp, A_i = softmax_t of their scores.

    The score of a tuple is scale · sum_l q_il prod_p k^p_tp,l, with scale 1/D by default.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state; places after the first are `projection.keys` and `.values`.
        heads, kv_heads: H and G, g = h // (H / G).
        order: tokens of a tuple and one.
        scale: of the scores.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = heads_of(x, parameters, "query", heads)
    names = [("key", "value"), *((f"keys.{n}", f"values.{n}") for n in range(order - 2))]
    keys = [heads_of(source, parameters, k, kv_heads) for k, _ in names]
    keys = [keys[0], *(normed(k, parameters, "key") for k in keys[1:])]
    values = [heads_of(source, parameters, v, kv_heads) for _, v in names]
    shape = (len(x), heads, x.shape[1], source.shape[1])
    seen = (torch.ones(shape, dtype=torch.bool) if mask is None else mask).expand(shape)
    if padding is not None:
        seen = seen & padding[:, None, None, :]
    outputs = torch.zeros(*shape[:3], values[0].shape[-1], dtype=torch.float64)
    for b in range(len(x)):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(x.shape[1]):
                own = seen[b, h, i]
                if own.any():
                    key, value = keys[0][b, g, own], values[0][b, g, own]
                    for k, v in zip(keys[1:], values[1:], strict=True):  # all tuples, one place more
                        key = (key[:, None] * k[b, g, own]).flatten(0, 1)
                        value = (value[:, None] * v[b, g, own]).flatten(0, 1)
                    score = key @ q[b, h, i] * (1 / q.shape[-1] if scale is None else scale)
                    outputs[b, h, i] = score.softmax(0) @ value
    return joined(outputs, parameters)
