"""What a mask says of the pattern of a call."""

from __future__ import annotations

import torch

from polyhead.attend.masks import Mask

__all__ = ["never_ahead"]


def never_ahead(mask: Mask, first: int, queries: int, keys: int) -> bool:
    """Whether the mask of the first head and item is sure to hide every key that stands after its query.

    Args:
        mask: of the call.
        first: where the first query stands.
        queries, keys: L and S. Without a query that has keys after it, the answer is no.
    """
    i = torch.arange(max(first, -1), min(first + queries, keys - 1))
    if not i.shape[0]:
        return False
    zero = torch.zeros((), dtype=torch.int64)
    some, _ = mask.bounds(zero, zero, i, i, i + 1, torch.full_like(i, keys - 1))
    return not bool(some.any())
