"""Keys that heads name in turns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["unified_keys"]


@twin("unified_keys")
def unified_keys(
    q: Tensor,
    k: Tensor,
    *,
    keep: int,
    recent: float = 0.25,
    first: int = 4,
    visible: Tensor | None = None,
) -> Tensor:
    """Which keys are read, by all heads: bool `(B, L, S)`.

    Of the n keys that a query sees, all if n <= keep. Otherwise m = ⌊keep (1 - recent)⌋, less than keep, are
    named, the heads in turns, each its best by q·k that nobody has named, from a list of its own which it
    reads from the top down; the list holds neither the `first` nor the keep - m - first last, at least one,
    which are read besides; where there would be none of the last, the `first` have no places.
    visible: bool `(B, L, S)`; None: the past.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    read = torch.zeros(batch, queries, keys, dtype=torch.bool)
    scores = q.double() @ k.double().repeat_interleave(heads // k.shape[1], 1).mT
    for b in range(batch):
        for i in range(queries):
            past = range(keys - queries + i + 1)
            seen = list(past) if visible is None else [j for j in range(keys) if bool(visible[b, i, j])]
            if len(seen) <= keep:
                read[b, i, seen] = True
                continue
            m = min(math.floor(round(keep * (1 - recent), 6)), keep - 1)
            last, sinks = keep - m, 0
            if last > first:
                last, sinks = last - first, first
            middle = seen[sinks : len(seen) - last]
            lists = [sorted(middle, key=lambda j: (-float(scores[b, h, i, j]), -j)) for h in range(heads)]
            named: list[int] = []
            for turn in range(len(middle)):
                for h in range(heads):
                    if lists[h][turn] not in named and len(named) < m:
                        named.append(lists[h][turn])
            read[b, i, seen[:sinks] + named + seen[len(seen) - last :]] = True
    return read
