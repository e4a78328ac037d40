"""A mask of queries: those that are padding look at nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.masks.algebra import Bounds

__all__ = ["RealQueries"]


class RealQueries(Mask):
    """Query i sees something where `real[b, i - start]` is True.

    Attributes:
        real: bool `(B, L)`.
        start: int64 scalar tensor, where the first query stands.
    """

    real: Tensor
    start: Tensor

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.real.to(i.device)[b, i - self.start.to(i.device)]

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        start = self.start.to(i0.device)
        counts = self.real.to(i0.device).long().cumsum(1)
        counts = torch.cat([counts.new_zeros(len(counts), 1), counts], dim=1)
        found = counts[b, i1 - start + 1] - counts[b, i0 - start]
        return found > 0, found == i1 - i0 + 1
