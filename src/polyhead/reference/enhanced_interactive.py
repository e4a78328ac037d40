"""Enhanced interactive attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["enhanced_interactive"]


@twin("enhanced_interactive")
def enhanced_interactive(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    efficient: bool,
    residual: bool,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """s_ag = q_a·k_g / √D; u_a = w_a·relu(W_a s_a + b_a) + c_a; head_a = softmax((V' relu(V u + b'))_a) v_g.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state; W, b, w, c, V, b' and V' are `inner`, `inner_bias`, `joint`,
            `joint_bias`, `across`, `across_bias` and `last`.
        heads, kv_heads: H and G.
        efficient: the logits are V' relu of all W_a s_a + b_a.
        residual: q_a·k of the head itself is added to its logits.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q, k, v = (
        heads_of(z, parameters, name, count)
        for z, name, count in ((x, "query", heads), (source, "key", kv_heads), (source, "value", kv_heads))
    )
    net = {name.rpartition(".")[2]: p.double() for name, p in parameters.items() if "interactions" in name}
    group = heads // kv_heads
    hidden, own = [], []
    for a in range(heads):
        s = torch.stack([q[:, a] @ k[:, g].mT / q.shape[-1] ** 0.5 for g in range(kv_heads)], dim=-1)
        own.append(s[..., a // group])
        hidden.append((s @ net["inner"][a].T + net["inner_bias"][a]).relu())  # B L S h
    if efficient:
        last = torch.cat(hidden, dim=-1)
    else:
        u = [z @ net["joint"][a] + net["joint_bias"][a] for a, z in enumerate(hidden)]
        last = (torch.stack(u, dim=-1) @ net["across"].T + net["across_bias"]).relu()
    logits = last @ net["last"].T  # B L S H
    seen = torch.ones(len(x), heads, x.shape[1], source.shape[1], dtype=torch.bool)
    seen = seen if mask is None else seen & mask
    seen = seen if padding is None else seen & padding[:, None, None, :]
    outputs = []
    for a in range(heads):
        total = logits[..., a] + own[a] if residual else logits[..., a]
        weights = total.masked_fill(~seen[:, a], -torch.inf).softmax(-1).nan_to_num(0.0)
        outputs.append(weights @ v[:, a // group])
    return joined(torch.stack(outputs, dim=1), parameters)
