"""Mixture of heads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.choosing import largest
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["moh"]


@twin("moh")
def moh(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    shared_heads: int,
    top_k: int,
    router: str,
    rescale: bool,
    renormalise: bool,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """y_t = Σ_h g_h(x_t) head_h(x_t) W_Oh with all heads; arguments as in `grouped_query` and the options."""
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = heads_of(x, parameters, "query", heads)
    k, v = (heads_of(source, parameters, name, kv_heads) for name in ("key", "value"))
    if padding is not None:
        mask = padding[:, None, None] if mask is None else mask & padding[:, None, None]

    def softmax(name: str, size: int) -> Tensor:
        weight = parameters.get(f"router.{name}.weight", torch.zeros(size, x.shape[-1]))
        return (x @ weight.double().T).softmax(-1)

    if router == "query_norm":
        lengths = q.norm(dim=-1).transpose(1, 2)
        gates = torch.cat([lengths[..., :shared_heads] ** 0, largest(lengths[..., shared_heads:], top_k)], -1)
    else:
        s, r = softmax("shared", shared_heads), softmax("routed", heads - shared_heads)
        r = r * largest(r, top_k)
        r = r / r.sum(-1, keepdim=True) if renormalise else r
        if rescale:
            s, r = shared_heads * s, top_k * r
        if 0 < shared_heads < heads:
            a, b = (softmax("split", 2) * (2 if rescale else 1)).split(1, dim=-1)
            s, r = a * s, b * r
        gates = torch.cat([s, r], -1)
    return joined(attend(q, k, v, mask=mask) * gates.transpose(1, 2)[..., None], parameters)
