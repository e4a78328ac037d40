"""How many keys the queries of a model read."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend import attend
from polyhead.attend.masks import Mask
from polyhead.hf import Call
from polyhead.hf.selecting import keys_of

__all__ = ["Counting", "keys_seen"]


@torch.no_grad()
def keys_seen(mask: Mask | None, *, batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """How many keys a mask lets every query see, `(B, H, L)` in float32, in O(L) memory.

    Where all scores are 0, the log-sum-exp of a row is the log of their number.
    """
    if mask is None:
        return torch.full((batch, heads, queries), float(keys))
    q, k = (torch.zeros(batch, heads, n, 8) for n in (queries, keys))
    return attend(q, k, k, mask=mask, return_lse=True)[1].exp().round()


class Counting:
    """A handler that counts, layer by layer, the keys that calls of several queries read.

    Attributes:
        read: keys that were read, over all such calls, `(layers,)`.
    """

    def __init__(self, layers: int) -> None:
        self.read = torch.zeros(layers, dtype=torch.float64)

    def __call__(self, call: Call) -> Tensor:
        batch, heads, queries, _ = call.q.shape
        if queries > 1:
            size = {"batch": batch, "heads": heads, "queries": queries, "keys": keys_of(call).shape[2]}
            self.read[call.layer.index] += keys_seen(call.mask, **size).double().sum()
        return call.proceed()
