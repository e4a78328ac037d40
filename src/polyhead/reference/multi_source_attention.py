"""Attention to several sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["multi_source_attention"]


@twin("multi_source_attention")
def multi_source_attention(
    x: Tensor,
    context: Any = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    sources: int,
    mode: str,
    mask: Tensor | None = None,
    padding: Any = None,
) -> Tensor:
    """c^k = attention to source k; y = attention to c^1..c^K, or to all tokens at once, or Σ_k c^k W_k.

    Args:
        x, parameters, heads, kv_heads, mask, padding: as in `grouped_query`; masks hold for every source.
        context: K sources, or one that stands for all; default x. So with padding.
        sources, mode: K, and "hierarchical", "flat" or "concat".
    """
    contexts: Any = (context,) * sources if context is None or isinstance(context, Tensor) else context
    paddings: Any = (padding,) * sources if padding is None or isinstance(padding, Tensor) else padding
    x = real(x, paddings[0] if context is None else None)

    def own(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in parameters.items() if n.startswith(prefix)}

    queries, keys, values, seen = [], [], [], []
    for n in range(sources):
        state, source = own(f"sources.{n}."), real(x if contexts[n] is None else contexts[n], paddings[n])
        queries.append(heads_of(x, state, "query", heads))
        made_of = [heads_of(source, state, name, kv_heads) for name in ("key", "value")]
        keys.append(made_of[0].repeat_interleave(heads // kv_heads, 1))
        values.append(made_of[1].repeat_interleave(heads // kv_heads, 1))
        visible = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask
        if paddings[n] is not None:
            visible = visible & paddings[n][:, None, None, :]
        seen.append(visible.expand(len(x), heads, x.shape[1], source.shape[1]))
    if mode == "flat":
        every = [torch.cat(parts, 2) for parts in (keys, values)]
        return joined(attend(queries[0], *every, mask=torch.cat(seen, 3)), own("combine."))
    sourced = zip(queries, keys, values, seen, strict=True)
    found = [attend(q, k, v, mask=visible) for q, k, v, visible in sourced]
    if mode == "concat":
        total = torch.zeros((), dtype=torch.float64)
        for n, c in enumerate(found):
            state = {f"output.{name}": t for name, t in own(f"combine.outputs.{n}.").items()}
            total = total + joined(c, state)
        return total
    made = torch.stack([joined(c, own(f"sources.{k}.")) for k, c in enumerate(found)], dim=2)  # B L K d
    shown = torch.stack([one.any(3).any(1) for one in seen], dim=2)  # B L K
    outer, rows = own("combine."), []
    for i in range(x.shape[1]):
        q = heads_of(x[:, i : i + 1], outer, "query", heads)
        pair = [heads_of(made[:, i], outer, name, heads) for name in ("key", "value")]
        rows.append(attend(q, *pair, mask=shown[:, i][:, None, None]))
    return joined(torch.cat(rows, dim=2), outer)
