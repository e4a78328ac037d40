"""Gaussian adaptive attention over features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import real
from polyhead.reference.registry import twin

__all__ = ["gaussian_adaptive"]


@twin("gaussian_adaptive")
def gaussian_adaptive(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    gaussians: int,
    padding: Tensor | None = None,
) -> Tensor:
    """y = x ⊙ m / sum(m), m = product over g of exp(-z_g² / 2c_g²), z_g = (x - mean - δ_g) / √(var + 1e-8).

    Args:
        x: `(B, L, d)`.
        parameters: the module's state; δ is `offset`, c² is `spread`² + 1e-4.
        heads, gaussians: H, the last of which has the features that remain, and G.
        padding: bool; see `reference`.
    """
    x = real(x, padding)
    width, made = x.shape[-1] // heads, []
    for h in range(heads):
        part = x[..., h * width : (h + 1) * width if h + 1 < heads else None]
        mean = part.mean(-1, keepdim=True)
        var = (part - mean).square().sum(-1, keepdim=True) / max(part.shape[-1] - 1, 1) + 1e-8
        density = torch.zeros_like(part)
        for g in range(gaussians):
            z = (part - mean - parameters["offset"][h, g].double()) / var.sqrt()
            density = density - z.square() / (2 * (parameters["spread"][h, g].double() ** 2 + 1e-4))
        density = (density - density.amax(-1, keepdim=True)).exp()
        made.append(part * density / density.sum(-1, keepdim=True))
    return torch.cat(made, dim=-1)
