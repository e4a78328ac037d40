"""The best of all keys so far, for every query: who they are follows from one threshold a query.

Of the keys 0..i the w largest are those not below the w-th largest, θ_i. A key that comes later can only
raise θ, so a key that has fallen below it never comes back: it is among the best for a while, and a number
that does not depend on the query says how long.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["best_stops", "ranks_of", "thresholds"]

_BAND = 64  # queries that are compared with the best so far at a time
_HELD = 1 << 22  # comparisons that are held at a time


def ranks_of(numbers: Tensor, real: Tensor | None = None, *, later: bool = True) -> Tensor:
    """Places `(..., S)` of numbers in ascending order, of equal ones the later higher; -1 if not `real`.

    Args:
        numbers: `(..., S)`.
        real: bool that broadcasts to it, which numbers there are.
        later: False: of equal ones the earlier is higher.
    """
    order = numbers.detach().sort(dim=-1, stable=True, descending=not later).indices
    places = torch.arange(numbers.shape[-1], device=numbers.device).expand_as(order)
    places = places if later else places.flip(-1)
    ranks = torch.empty_like(order).scatter_(-1, order, places)
    return ranks if real is None else ranks.masked_fill(~real, -1)


def thresholds(ranks: Tensor, keep: Tensor, first: int = 0) -> Tensor:
    """The `keep[i]`-th largest rank among those of 0..i, for i from `first` on; 0 where there are fewer.

    Args:
        ranks: int64 `(N, S)`, distinct but for -1, which stands for none.
        keep: int64 `(S - first,)` or `(N, S - first)`, at least 1, not descending.
        first: the first i.

    Returns:
        `(N, S - first)`; what is a rank and not below it is kept.
    """
    lines, length = ranks.shape
    if first == length or not lines:
        return ranks.new_zeros(lines, length - first)
    most = int(keep[..., -1].max())
    best = ranks[:, :first].topk(min(most, first), dim=-1).values
    room = _HELD // (lines * (min(most, length) + _BAND))
    band = max(1, min(_BAND, room))
    found = []
    for start in range(first, length, band):
        stop = min(start + band, length)
        born = torch.arange(stop - start, device=ranks.device)
        born = torch.cat([born.new_full((best.shape[1],), -1), born])
        values, order = torch.cat([best, ranks[:, start:stop]], dim=1).sort(-1, descending=True)
        rows = torch.arange(stop - start, device=ranks.device)[:, None]
        there = (born[order][:, None] <= rows) & (values >= 0)[:, None]
        enough = there.cumsum(-1, dtype=torch.int32) >= keep[..., start - first : stop - first, None]
        at = enough.to(torch.uint8).argmax(-1)  # the first
        found.append(torch.where(enough.any(-1), values.gather(1, at), 0))
        best = values[:, :most]
    return torch.cat(found, dim=1)


@torch.no_grad()
def best_stops(numbers: Tensor, keep: int, first: int = 0, real: Tensor | None = None) -> Tensor:
    """The first query from `first` on for which key j is no longer among the `keep` largest so far.

    Args:
        numbers: `(B, G, S)`, of the keys; of equal ones the later is taken.
        keep: w.
        first: position of the first query.
        real: bool `(B, G or 1, S)`, which keys there are; None: all.

    Returns:
        int64 `(B, G, S)`, at most S; at most `first` for keys that no query takes.
    """
    if torch.compiler.is_compiling():
        from polyhead.nn.best_so_far_opaque import best_stops_opaque  # imports the compiler

        return best_stops_opaque(numbers.detach(), keep, first, real)
    return stops(numbers, keep, first, real)


def stops(numbers: Tensor, keep: int, first: int, real: Tensor | None) -> Tensor:
    """`best_stops`, as it is computed."""
    ranks = ranks_of(numbers, None if real is None else real.expand(numbers.shape)).flatten(0, 1)
    rows = numbers.shape[2] - first
    least = thresholds(ranks, torch.full((rows,), keep, device=numbers.device), first)
    seen = torch.searchsorted(least, ranks, right=True).masked_fill(ranks < 0, 0)
    return (seen + first).view(numbers.shape)
