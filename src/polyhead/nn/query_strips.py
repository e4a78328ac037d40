"""Work over all pairs, a strip of queries at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["in_strips"]


def in_strips(
    strip: Callable[..., Tensor],
    asking: Sequence[Tensor | None],
    known: Sequence[Tensor | None],
    *,
    first: int,
    rows: int,
) -> Tensor:
    """`strip(*asking, *known, first)` of causal queries, by strips of so many: no L × S table is held.

    What a strip makes is made anew for the backward pass.

    Args:
        strip: gives `(..., L, Dv)`.
        asking: tensors of the queries `(..., L, D)`, the first of them not None.
        known: tensors of the keys `(..., S, D)`, or `(B, S)`; a strip gets those that its last query sees.
        first: position of the first query.
        rows: queries of a strip, at least 1.
    """
    assert asking[0] is not None
    queries = asking[0].shape[-2]
    if queries <= rows:
        return strip(*asking, *known, first)
    found = []
    for at in range(0, queries, rows):
        stop = min(at + rows, queries)
        call = (
            *(None if x is None else x[..., at:stop, :] for x in asking),
            *(None if x is None else _until(x, first + stop) for x in known),
            first + at,
        )
        if torch.is_grad_enabled():
            found.append(checkpoint(strip, *call, use_reentrant=False))
        else:
            found.append(strip(*call))
    return torch.cat(found, dim=-2)


def _until(x: Tensor, stop: int) -> Tensor:
    return x[:, :stop] if x.ndim == 2 else x[..., :stop, :]
