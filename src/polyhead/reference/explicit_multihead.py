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
    norm_at: str | None,
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
        norm_at: where norm(z) = (z - mean z) / √(var z + 1e-5) stands, with γ and β: "out", as above, or
            "kv", on k_h and v_h in the place of head_h.
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
        z = torch.stack([torch.as_tensor(one) for one in of_heads], dim=1)
        mixed.append(_normed(z, parameters, f"projection.{name}_") if norm_at == "kv" else z)
    y = attend(q, *mixed, mask=mask)
    y = _normed(y, parameters, "output.") if norm_at == "out" else y
    return joined(y, parameters)


def _normed(z: Tensor, parameters: Mapping[str, Tensor], prefix: str) -> Tensor:
    gain, offset = (parameters[f"{prefix}{name}"].double() for name in ("gain", "offset"))
    apart = z - z.mean(-1, keepdim=True)
    shape = (z.shape[1], 1, z.shape[-1])
    return apart / (apart.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain.view(shape) + offset.view(
        shape
    )
