"""Blocks of keys as a list for every block of queries, and as a table of all blocks."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["listed", "places_of"]


def places_of(table: Tensor) -> Tensor:
    """The blocks that are marked in `(..., blocks)`, ascending, as `(..., K)`, -1 where there are fewer."""
    count = table.cumsum(-1, dtype=torch.int32)
    width = int(count[..., -1].amax()) if table.numel() else 0
    index = torch.full((*table.shape[:-1], width), -1, dtype=torch.int64, device=table.device)
    at = table.nonzero(as_tuple=True)
    index[(*at[:-1], count[at].long() - 1)] = at[-1]
    return index


def listed(index: Tensor, blocks: int) -> Tensor:
    """Blocks listed in `(..., K)`, -1 for none, as a table `(..., blocks)` of those that are."""
    table = torch.zeros(*index.shape[:-1], blocks + 1, dtype=torch.bool, device=index.device)
    return table.scatter_(-1, index.masked_fill(index < 0, blocks), True)[..., :-1]
