"""Position encodings as their equations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["rope", "sinusoidal"]


@twin("sinusoidal")
def sinusoidal(positions: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """PE(p, 2m) = sin(p / base^(2m/d)), PE(p, 2m+1) = cos(p / base^(2m/d)); `(L,)` to `(L, d)`."""
    table = torch.zeros(len(positions), dim, dtype=torch.float64)
    for row, p in enumerate(positions.tolist()):
        for m in range(dim // 2):
            angle = p / base ** (2 * m / dim)
            table[row, 2 * m], table[row, 2 * m + 1] = math.sin(angle), math.cos(angle)
    return table


@twin("rope")
def rope(
    x: Tensor,
    positions: Tensor,
    *,
    base: float = 10000.0,
    width: int | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Every pair of coordinates as a complex number times exp(i·p·ω_m), ω_m = base^(-2m/width).

    Args:
        x: `(B, H, L, D)`.
        positions: `(L,)`.
        width: coordinates that are turned, the first ones; default D.
        interleaved: pairs (2m, 2m+1); otherwise (m, m + width/2).
    """
    out = x.double().clone()
    width = x.shape[-1] if width is None else width
    for row, p in enumerate(positions.tolist()):
        for m in range(width // 2):
            a, b = (2 * m, 2 * m + 1) if interleaved else (m, m + width // 2)
            angle = p * base ** (-2 * m / width)
            turned = torch.complex(out[:, :, row, a], out[:, :, row, b]) * complex(
                math.cos(angle), math.sin(angle)
            )
            out[:, :, row, a], out[:, :, row, b] = turned.real, turned.imag
    return out
