"""Knocking-heads attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import joined, normed, real
from polyhead.reference.registry import twin

__all__ = ["knocking_heads"]


def _mapped(x: Tensor, parameters: Mapping[str, Tensor], name: str, heads: int) -> Tensor:
    """z T, or 2 ((z U) ⊙ sigmoid(z G)) W, for z = x W_hᵀ + b_h of every head, then normalised."""
    weight = parameters[f"projection.{name}.weight"].double().chunk(heads)
    bias = parameters.get(f"projection.{name}.bias", torch.zeros(heads)).double().chunk(heads)
    own = {k: p.double() for k, p in parameters.items() if k.startswith(f"projection.{name}_map.")}
    own = {k.rpartition(".")[2]: p for k, p in own.items()}
    found = []
    for h in range(heads):
        z = x @ weight[h].T + bias[h]
        if "weight" in own:
            z = z @ own["weight"]
        elif own:
            z = 2 * ((z @ own["up"]) / (1 + (-(z @ own["gate"])).exp())) @ own["down"]
        found.append(normed(z, parameters, name))
    return torch.stack(found, dim=1)


@twin("knocking_heads")
def knocking_heads(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_h = attend(q_h, k_g, v_g) of vectors that went through the maps; y = sum_h head_h W_Oh.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state.
        heads, kv_heads: H and the number of key/value heads.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = _mapped(x, parameters, "query", heads)
    k, v = (_mapped(source, parameters, name, kv_heads) for name in ("key", "value"))
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    return joined(attend(q, k, v, mask=mask), parameters)
