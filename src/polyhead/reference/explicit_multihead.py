"""Explicit multi-head attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["explicit_multihead"]


@twin("explicit_multihead")
def explicit_multihead(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    stored_heads: int,
    norm: bool,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """y = sum_h (γ_h norm(attend(q_h, k_h, v_h)) + β_h) W_Oh, with
    k_h = sum_n M_K[n, h] c_n and v_h = sum_n M_V[n, h] u_n.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state.
        heads, stored_heads: H and N.
        norm: whether there is norm(z) = (z - mean z) / √(var z + 1e-5), with γ and β.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    q = heads_of(x, parameters, "query", heads)
    mixed = []
    for name in ("key", "value"):
        stored = heads_of(source, parameters, name, stored_heads)
        by = parameters[f"projection.{name}_mix"].double()
        of_heads = [sum(by[n, h] * stored[:, n] for n in range(stored_heads)) for h in range(heads)]
        mixed.append(torch.stack([torch.as_tensor(one) for one in of_heads], dim=1))
    y = attend(q, *mixed, mask=mask)
    if norm:
        gain, offset = (
            parameters[f"output.{name}"].double().view(heads, 1, -1) for name in ("gain", "offset")
        )
        mean = y.mean(-1, keepdim=True)
        y = (y - mean) / ((y - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + offset
    return joined(y, parameters)
