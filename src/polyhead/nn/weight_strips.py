"""What is made of the weights of a call, some queries at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from polyhead.attend.function import weights_of
from polyhead.nn.chosen_options import of_rows
from polyhead.nn.patterns import looks_back
from polyhead.nn.query_strips import in_strips

__all__ = ["by_weights"]

_HELD = 1 << 22  # numbers of pairs that a strip of queries holds at a time


def by_weights(
    receive: Callable[..., Tensor],
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    asking: Sequence[Tensor],
    *,
    options: dict[str, Any],
    lines: int,
) -> Float[Tensor, "*b L n"]:
    """`receive(weights, first, *asking)` of all queries, for what a pair gives that is no value of its key.

    No L × S table is held: the weights of a strip of queries are made anew for the backward pass.

    Args:
        receive: takes the weights `(B, H, l, s)` of l queries after dropout, in float32 or wider, the first
            of these queries, and what belongs to them; gives `(..., l, n)`. The last keys may be missing,
            if a mask that is made with `causal()` hides them from all of these queries.
        q, k: as of `attend`.
        asking: tensors `(..., L, m)`, of which `receive` gets the rows of its queries.
        options: the options of `attend`.
        lines: numbers that are held for a pair of tokens, in all heads.
    """
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    shown = {name: option for name, option in options.items() if name != "dropout"}
    if shown["mask"] is not None:
        shown["mask"].check(batch=batch, heads=heads, queries=queries, keys=keys, offset=keys - queries)
    past = looks_back(shown["mask"])

    def strip(q: Tensor, *own: Any) -> Tensor:
        *asking, first = own
        count = q.shape[2]
        lacking = min(queries - first - count, keys - 1) if past else 0
        here = of_rows(shown, first, count, queries, lacking)
        weights = weights_of(q, k[:, :, : keys - lacking], **here)
        return receive(F.dropout(weights, options.get("dropout", 0.0)), first, *asking)

    rows = max(16, _HELD // max(1, batch * lines * keys))
    return in_strips(strip, (q, *asking), (), first=0, rows=rows)
