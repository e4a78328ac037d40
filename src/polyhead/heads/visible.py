"""Which rows of an attention call count, and how much there was to see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.shapes import broadcast_shape

__all__ = ["Visible"]

_ROWS = 512


@dataclass(frozen=True, eq=False)
class Visible:
    """What a mask leaves to see, counted once for all layers that share the mask. Never holds L×S.

    A row counts in a measurement when its query is a real token that may look at two keys or more: a
    row with one key to look at has no choice, and says nothing about its head.

    Attributes:
        keys: how many keys each row may look at, `(B|1, H|1, L)`.
        counted: whether the row counts, bool `(B|1, H|1, L)`.
        watchers: how many counted rows may look at each key, `(B|1, H|1, S)`.
        first: position of the first real token of each batch item, `(B|1,)`.
    """

    keys: Tensor
    counted: Tensor
    watchers: Tensor
    first: Tensor

    @classmethod
    def of(
        cls,
        mask: Mask | None,
        *,
        batch: int,
        heads: int,
        queries: int,
        keys: int,
        real: Tensor | None = None,
        first: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Visible:
        """Count for a call of this shape.

        Args:
            mask: who may look at whom; None: all at all.
            real: bool `(B, L)`, which queries are real tokens; None: all are.
            first: position of the first real token of each batch item, `(B,)`; None: 0.
        """
        offset = keys - queries
        position = torch.arange(queries, device=device) + offset
        j = torch.arange(keys, device=device)
        within = (position >= 0)[None, None]
        real = within if real is None else within & real[:, None].to(device)
        first = torch.zeros(1, dtype=torch.int64, device=device) if first is None else first.to(device)
        if mask is None:
            seen = torch.full((1, 1, queries), keys, device=device)
            counted = real & (seen > 1)
            return cls(seen, counted, counted.sum(-1, keepdim=True).expand(*counted.shape[:2], keys), first)
        b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
        h = torch.arange(heads, device=device).view(-1, 1, 1)
        seen_parts, counted_parts = [], []
        watchers = torch.zeros(1, dtype=torch.int64, device=device)
        for start in range(0, queries, _ROWS):
            rows = slice(start, start + _ROWS)
            allowed = mask.allowed(b, h, position[rows].view(-1, 1), j)
            allowed = allowed.expand(broadcast_shape(allowed.shape, (1, 1, len(position[rows]), keys)))
            seen = allowed.sum(-1)
            counted = real[..., rows] & (seen > 1)
            watchers = watchers + (allowed & counted.unsqueeze(-1)).sum(-2)
            seen_parts.append(seen)
            counted_parts.append(counted)
        if not seen_parts:
            empty = torch.zeros(1, 1, 0, dtype=torch.int64, device=device)
            return cls(empty, empty.bool(), torch.zeros(1, 1, keys, dtype=torch.int64, device=device), first)
        return cls(torch.cat(seen_parts, -1), torch.cat(counted_parts, -1), watchers, first)
