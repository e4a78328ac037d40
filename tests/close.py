"""Tensors that are the same but for rounding in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["close"]


def close(found: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    """Fails where they differ in shape or dtype, or anywhere by more than `atol`."""
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
