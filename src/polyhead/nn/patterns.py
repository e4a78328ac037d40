"""What a mask says of the pattern of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend.masks import And, Mask, Window

__all__ = ["looks_ahead", "looks_back", "never_ahead"]


def never_ahead(mask: Mask, first: int, queries: int, keys: int, *, batch: int = 1, heads: int = 1) -> bool:
    """Whether in some head the mask is sure to hide every key that stands after its query, in all items.

    Args:
        mask: of the call.
        first: where the first query stands.
        queries, keys: L and S. Without a query that has keys after it, the answer is no.
        batch, heads: B and H.
    """
    ahead = _ahead(mask, first, queries, keys, batch, heads)
    return ahead is not None and not bool(ahead.any(-1).any(0).all())


def looks_ahead(
    mask: Mask | None, first: int, queries: int, keys: int, *, batch: int = 1, heads: int = 1
) -> bool:
    """Whether a query may see a key that stands after it, in some head and item; None hides nothing.

    Arguments as of `never_ahead`. A mask that can't say counts as one that shows such a key; `causal()` and a
    mask never does.
    """
    if max(first, -1) >= min(first + queries, keys - 1) or looks_back(mask):
        return False
    ahead = None if mask is None else _ahead(mask, first, queries, keys, max(batch, 1), heads)
    return ahead is None or bool(ahead.any())


def looks_back(mask: Mask | None) -> bool:
    """Whether the mask shows by its make that it hides what comes later; None hides nothing."""
    if isinstance(mask, And):
        return any(looks_back(term) for term in mask.terms)
    return isinstance(mask, Window) and mask.right is not None and mask.right <= 0


def _ahead(mask: Mask, first: int, queries: int, keys: int, batch: int, heads: int) -> Tensor | None:
    """Which queries may see a key after them, `(B or 1, H or 1, n)`; None where no query has one."""
    i = torch.arange(max(first, -1), min(first + queries, keys - 1))
    if not i.shape[0] or not batch:
        return None
    b, h = torch.arange(batch).view(-1, 1, 1), torch.arange(heads).view(-1, 1)
    some, _ = mask.bounds(b, h, i, i, i + 1, torch.full_like(i, keys - 1))
    return some.expand(*(1,) * (3 - some.ndim), *some.shape).expand(-1, -1, i.shape[0])
