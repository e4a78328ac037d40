"""The α of entmax as something that every head learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyhead.attend.normalizers import Entmax, entmax
from polyhead.attend.precision import wide

__all__ = ["LearnedAlpha"]

_LEAST = 0.01  # of α - 1: rounding in a weight grows as its inverse


class LearnedAlpha(nn.Module):
    """α_h = 1 + σ(a_h) for every head, not below 1.01.

    Args:
        heads: H.
        device, dtype: of a.

    Attributes:
        logits: a, `(H,)`; standard normal at the start, so that α lies around 1.5 and heads differ.
    """

    def __init__(self, heads: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(heads, device=device, dtype=dtype))
        self.spec, _ = entmax(torch.full((heads,), 1.5)).flatten()  # as pictures and facets show it

    @property
    def alpha(self) -> torch.Tensor:
        """α, `(H,)`."""
        return 1 + torch.sigmoid(self.logits.to(wide(self.logits.dtype))).clamp(min=_LEAST)

    def forward(self) -> Entmax:
        return entmax(self.alpha)

    def extra_repr(self) -> str:
        return f"heads={len(self.logits)}"
