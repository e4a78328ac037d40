"""Selective multi-head attention of Union of Experts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.choosing import largest
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["selective_mha_uoe"]


@twin("selective_mha_uoe")
def selective_mha_uoe(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    top_k: int,
    gate: str,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """All heads over all tokens: head h of slice i sees s from t where both chose i, and is else zero.

    Arguments as in `grouped_query`, and the options of the configuration.
    """
    x = real(x, padding)
    q = heads_of(x, parameters, "query", heads)
    k, v = (heads_of(x, parameters, name, kv_heads) for name in ("key", "value"))
    weight, bias = (parameters[f"router.gate.{name}"].double() for name in ("weight", "bias"))
    p = (x @ weight.T + bias).softmax(-1)
    m = largest(p, top_k)
    g = m * p * kv_heads if gate == "weigh" else m
    if padding is not None:
        m = m * padding[..., None]
    m, g = (t.transpose(1, 2).repeat_interleave(heads // kv_heads, dim=1) for t in (m, g))  # B H L
    both = (m[..., :, None] * m[..., None, :]).bool()
    return joined(attend(q, k, v, mask=both if mask is None else mask & both) * g[..., None], parameters)
