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
    sentinel: bool = False,
    mask: Tensor | None = None,
    padding: Any = None,
) -> Tensor:
    """c^k = attention to source k; y = attention to c^1..c^K, or to all tokens at once, or Σ_k c^k W_k.

    Args:
        x, parameters, heads, kv_heads, mask, padding: as in `grouped_query`; masks hold for every source.
        context: K sources, or one that stands for all; default x. So with padding.
        sources, mode: K, and "hierarchical", "flat" or "concat".
        sentinel: whether σ(x W_ψ) ⊗ x is one more context, or one more token that its own query alone sees.
    """
    contexts: Any = (context,) * sources if context is None or isinstance(context, Tensor) else context
    paddings: Any = (padding,) * sources if padding is None or isinstance(padding, Tensor) else padding
    x = real(x, paddings[0] if context is None else None)
    batch, length = x.shape[:2]
    rows: list[list[Tensor]] = [[], [], [], []]
    queries, keys, values, seen = rows

    def own(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in parameters.items() if n.startswith(prefix)}

    def show(state: Mapping[str, Tensor], source: Tensor, visible: Tensor) -> None:
        for made, name in ((keys, "key"), (values, "value")):
            made.append(heads_of(source, state, name, kv_heads).repeat_interleave(heads // kv_heads, 1))
        seen.append(visible.expand(batch, heads, length, source.shape[1]))

    for n in range(sources):
        source = real(x if contexts[n] is None else contexts[n], paddings[n])
        visible = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask
        if paddings[n] is not None:
            visible = visible & paddings[n][:, None, None, :]
        queries.append(heads_of(x, own(f"sources.{n}."), "query", heads))
        show(own(f"sources.{n}."), source, visible)
    itself, state = x, own("sentinel.")
    if sentinel:
        itself = (x @ state["gate.weight"].double().T + state.get("gate.bias", 0.0)).sigmoid() * x
    if mode == "flat":
        if sentinel:
            show(state, itself, torch.eye(length, dtype=torch.bool))
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
    made = [joined(c, own(f"sources.{k}.")) for k, c in enumerate(found)]  # each B L d
    shown = [one.any(3).any(1) for one in seen]  # each B L
    if sentinel:
        made.append(joined(itself[:, None], state))
        shown.append(torch.ones(batch, length, dtype=torch.bool))
    around, reach = torch.stack(made, 2), torch.stack(shown, 2)  # B L K d, B L K
    outer, mixed = own("combine."), []
    for i in range(length):
        q = heads_of(x[:, i : i + 1], outer, "query", heads)
        pair = [heads_of(around[:, i], outer, name, heads) for name in ("key", "value")]
        mixed.append(attend(q, *pair, mask=reach[:, i][:, None, None]))
    return joined(torch.cat(mixed, dim=2), outer)
