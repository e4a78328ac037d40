"""Weights along an axis by learned Gaussians around its mean."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polyhead.attend.precision import exact, wide
from polyhead.checks import place, whole
from polyhead.errors import ConfigError
from polyhead.nn.projections import at_least_one
from polyhead.nn.tokenwise import TokenwiseModule

__all__ = ["GaussianHeads", "gaussian_weights", "importance_factor"]

_EPSILON = 1e-8  # of the variance
_NARROWEST = 1e-4  # of c², so that no Gaussian becomes a spike


def gaussian_weights(
    x: Float[Tensor, ...],
    offset: Float[Tensor, " G"],
    spread: Float[Tensor, " G"],
    *,
    dim: int = -1,
    real: Bool[Tensor, ...] | None = None,
) -> Float[Tensor, ...]:
    """w = softmax along `dim` of -Σ_g z_g² / (2 c_g²), z_g = (x - mean - δ_g) / √var: a product of Gaussians.

    Args:
        x: numbers.
        offset, spread: δ and c of the G Gaussians.
        dim: the axis of the mean, the (unbiased) variance and the softmax: features, or time, to pool by
            `(w * x).sum(dim)`.
        real: what counts, broadcastable to x; the others have weight 0.

    Returns:
        Of the shape of x, in float32 or better.
    """
    with exact(x.device):
        dtype = wide(x.dtype)
        z = x.to(dtype)
        here = torch.ones((), dtype=torch.bool, device=x.device) if real is None else real
        here = here.expand_as(z)
        z = z.masked_fill(~here, 0.0)
        count = here.sum(dim, keepdim=True)
        away = (z - z.sum(dim, keepdim=True) / count.clamp(min=1)).masked_fill(~here, 0.0)
        variance = away.square().sum(dim, keepdim=True) / (count - 1).clamp(min=1) + _EPSILON
        z = (away[..., None] - offset.to(dtype)) / variance.sqrt()[..., None]
        logits = -(z.square() / (2 * (spread.to(dtype).square() + _NARROWEST))).sum(-1)
        weights = torch.softmax(logits.masked_fill(~here, torch.finfo(dtype).min), dim)
        return weights.masked_fill(~here, 0.0)


def importance_factor(weights: Float[Tensor, "... n"]) -> Float[Tensor, " n"]:
    """How much each index of the last axis is weighed on average, from 0 for the least to 1 for the most."""
    mean = weights.flatten(0, -2).to(wide(weights.dtype)).mean(0)
    low, high = mean.aminmax()
    return (mean - low) / (high - low).clamp(min=torch.finfo(mean.dtype).tiny)


class GaussianHeads(TokenwiseModule):
    """y = x ⊙ w, with `gaussian_weights` over the features of every head.

    Args:
        dim: width d.
        heads: H contiguous chunks of dim // heads features; the last takes what remains.
        gaussians: G of every head.
        device, dtype: of the parameters.

    Attributes:
        offset: δ, `(H, G)`, zeros at the start.
        spread: c, `(H, G)`, standard normal at the start.
    """

    mechanism = "gaussian_adaptive"

    def __init__(
        self, dim: int, heads: int, gaussians: int, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        at_least_one("GaussianHeads", dim=dim, heads=heads)
        whole("gaussians", gaussians, 1)
        if heads > dim:
            raise ConfigError(f"heads must be at most dim={dim}, which they share out; got {heads}")
        device, dtype = place("GaussianHeads", device, dtype)
        self.dim, self.heads = dim, heads
        self.widths = (*[dim // heads] * (heads - 1), dim - dim // heads * (heads - 1))
        self.offset = nn.Parameter(torch.zeros(heads, gaussians, device=device, dtype=dtype))
        self.spread = nn.Parameter(torch.randn(heads, gaussians, device=device, dtype=dtype))

    def weights(self, x: Float[Tensor, "B L d"]) -> Float[Tensor, "B L d"]:
        """The weights of every feature; those of a head sum to 1."""
        parts = [
            gaussian_weights(part, self.offset[h], self.spread[h])
            for h, part in enumerate(x.split(self.widths, dim=-1))
        ]
        return torch.cat(parts, dim=-1)

    def of_tokens(self, x: Tensor, real: Tensor | None) -> Tensor:
        return (x * self.weights(x)).to(x.dtype)  # rounded once

    def flops(self, tokens: int) -> int:
        return 0  # no products of matrices

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, gaussians={self.offset.shape[1]}"
