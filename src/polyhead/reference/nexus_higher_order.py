"""Higher-order attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["nexus_higher_order"]


@twin("nexus_higher_order")
def nexus_higher_order(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    order: int = 2,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """q^(n) = attend(q^(n-1), q^(n-1), q^(n-1)), k^(n) likewise; head_h = attend(q_h^(m), k_g^(m), v_g).

    Args:
        x: `(B, L, d)`.
        parameters: the module's state.
        heads, kv_heads: H and G, g = h // (H / G).
        order: m.
        mask, padding: bool; see `reference`.
    """
    x = real(x, padding)
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    gates = parameters.get("gates", torch.ones(order, 2)).double()
    found = []
    for side, (name, count) in enumerate((("query", heads), ("key", kv_heads))):
        rows = []
        for row in heads_of(x, parameters, name, count).split(1, dim=1):
            for n in range(order - 1):
                row = row + gates[n, side] * (attend(row, row, row, mask=mask) - row)
            rows.append(row)
        found.append(rows)
    v = heads_of(x, parameters, "value", kv_heads)
    outputs = []
    for h, q in enumerate(found[0]):
        g = h // (heads // kv_heads)
        outputs.append(attend(q, found[1][g], v[:, g : g + 1], mask=mask))
    return joined(torch.cat(outputs, dim=1), parameters)
