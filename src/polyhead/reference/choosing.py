"""What the twins that choose per token share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["largest"]


def largest(scores: Tensor, k: int) -> Tensor:
    """1 at the k largest of the last axis, of equal ones the first, else 0."""
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(scores).scatter(-1, best, 1.0)
