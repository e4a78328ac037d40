"""Extremes of many ranges of a sequence at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["range_max"]


def range_max(
    values: Sequence[Tensor], row: Tensor, start: Tensor, stop: Tensor, *, nothing: int
) -> list[Tensor]:
    """The largest of `values[row, start..stop]`, ends included, for each tensor `(B, S)` of `values`.

    Positions outside the sequence count as `nothing`. Takes O(S log W) for ranges of up to W positions:
    a range is covered by two overlapping ranges whose width is a power of two.
    """
    length = values[0].shape[1]
    first, last = start.clamp(min=0), stop.clamp(max=length - 1)
    width = last - first + 1
    levels = int(width.max()).bit_length() if width.numel() else 0
    level = torch.zeros_like(width)
    for k in range(1, levels):
        level = level + (width >= 1 << k)
    second = last + 1 - (1 << level)
    found = []
    for line in values:
        table = [line]
        for k in range(1, levels):
            half = table[-1]
            shifted = torch.cat([half[:, 1 << (k - 1) :], half[:, length - (1 << (k - 1)) :]], dim=1)
            table.append(torch.maximum(half, shifted))
        stacked = torch.stack(table)
        at = [stacked[level, row, p.clamp(0, length - 1)] for p in (first, second)]
        found.append(torch.maximum(*at).masked_fill(width <= 0, nothing))
    return found
