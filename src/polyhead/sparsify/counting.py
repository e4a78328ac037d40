"""How many keys queries read."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend import attend
from polyhead.attend.masks import And, Chosen, Mask, is_causal
from polyhead.hf import Call
from polyhead.hf.handles import keys_of

__all__ = ["keys_read", "keys_seen"]

_HELD = 1 << 22  # chosen blocks of queries that are counted at a time


def keys_read(call: Call) -> float:
    """How many keys the mask of a call lets its queries see, over sequences, heads and queries."""
    batch, heads, queries, _ = call.q.shape
    size = {"batch": batch, "heads": heads, "queries": queries, "keys": keys_of(call).shape[2]}
    return float(keys_seen(call.mask, **size, device=call.q.device).double().sum())


@torch.no_grad()
def keys_seen(
    mask: Mask | None,
    *,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    device: torch.device | None = None,
) -> Tensor:
    """How many keys a mask lets every query see, `(B, H, L)` in float32, in O(L) memory.

    Where all scores are 0, the log-sum-exp of a row is the log of their number. The past, and blocks that
    were chosen of it, are counted without attending.
    """
    shape = (batch, heads, queries)
    places = torch.arange(keys - queries, keys, device=device)
    if mask is None:
        return torch.full(shape, float(keys), device=device)
    if is_causal(mask) and queries <= keys:
        return (places + 1.0).expand(shape)
    if isinstance(mask, And) and len(mask.terms) == 2 and queries <= keys:
        for past, chosen in (mask.terms, mask.terms[::-1]):
            if is_causal(past) and isinstance(chosen, Chosen):
                return _chosen(chosen, places).expand(shape).float()
    q, k = (torch.zeros(batch, heads, n, 8, device=device) for n in (queries, keys))
    return attend(q, k, k, mask=mask, return_lse=True)[1].exp().round()


def _chosen(mask: Chosen, places: Tensor) -> Tensor:
    """Keys up to each of the places in the blocks that were chosen for it, `(B or 1, H or 1, L)`."""
    index = mask.index.to(places.device)
    step = max(1, _HELD // max(1, index.shape[0] * index.shape[1] * index.shape[3]))
    found = []
    for at in places.split(step):
        block = (at - mask.first).div(mask.rows, rounding_mode="floor")
        there = (block >= 0) & (block < index.shape[2])
        own = index[:, :, block.clamp(0, max(index.shape[2] - 1, 0))]
        seen = (at[:, None] + 1 - own * mask.cols).clamp(0, mask.cols).masked_fill(own < 0, 0)
        found.append(seen.sum(-1) * there)
    return torch.cat(found, -1)
