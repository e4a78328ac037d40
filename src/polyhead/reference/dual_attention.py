"""Dual attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["dual_attention"]

_RETRIEVER = ("query.weight", "query.bias", "templates")


@twin("dual_attention")
def dual_attention(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    relational_heads: int,
    relations: int,
    activation: str,
    symbols: str,
    symbol_heads: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_hi = sum_j w_hij v_gj, for relational heads sum_j w_hij (W_rh r(i, j) + W_s s_j), or s_ij for s_j.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state.
        heads, kv_heads, relational_heads, relations: H, G, Hr and R; g = h // (H / G).
        activation, symbols, symbol_heads: see the mechanism.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    own, group = heads - relational_heads, heads // kv_heads
    q, k = heads_of(x, parameters, "query", heads), heads_of(source, parameters, "key", kv_heads)
    seen = torch.ones(len(x), heads, x.shape[1], source.shape[1], dtype=torch.bool)
    seen = seen if mask is None else seen & mask
    seen = seen if padding is None else seen & padding[:, None, None, :]
    outputs = []
    if own:
        v = heads_of(source, parameters, "value", own // group)
    if relational_heads:
        library, count = parameters["symbols.library"].double(), source.shape[1]
        if symbols == "attention":
            weight, bias, templates = (parameters[f"symbols.{n}"].double() for n in _RETRIEVER)
            asked = source @ weight.T + bias
            parts = zip(*(t.chunk(symbol_heads, -1) for t in (asked, templates, library)), strict=True)
            s = torch.cat([(z @ t.T / t.shape[-1] ** 0.5).softmax(-1) @ one for z, t, one in parts], dim=-1)
            s = s[:, None]  # B 1 S d
        elif symbols == "relative":
            i, j, reach = torch.arange(count - x.shape[1], count), torch.arange(count), len(library) // 2
            s = library[(j - i[:, None]).clamp(-reach, reach) + reach][None]  # 1 L S d
        else:
            s = library[None, None, :count]
        sent = heads_of(s, parameters, "symbol", relational_heads // group)
        a = heads_of(x, parameters, "relation_query", relations)
        b = heads_of(source, parameters, "relation_key", relations)
        act = {"identity": lambda r: r, "relu": torch.relu, "tanh": torch.tanh}[activation]
        r = act(a @ b.mT / a.shape[-1] ** 0.5)  # B R L S
    for h in range(heads):
        logits = q[:, h] @ k[:, h // group].mT / q.shape[-1] ** 0.5
        w = logits.masked_fill(~seen[:, h], -torch.inf).softmax(-1).nan_to_num(0.0)
        if h < own:
            outputs.append(w @ v[:, h // group])
            continue
        received = torch.einsum("brij,vr->bijv", r, parameters["relation_map.weight"][h - own].double())
        received = received + sent[:, (h - own) // group]
        outputs.append((w[..., None] * received).sum(2))
    found = torch.stack(outputs, dim=1)
    made = []
    for name, some in (("own", found[:, :own]), ("relational", found[:, own:])):
        if some.shape[1]:
            made.append(joined(some, {key.replace(f"{name}.", ""): t for key, t in parameters.items()}))
    return torch.cat(made, dim=-1)
