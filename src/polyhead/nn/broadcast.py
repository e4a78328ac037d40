"""The mean token, added to every token: uniform attention by hand."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polyhead.attend.masks import causal as causal_mask
from polyhead.attend.masks import padding as real_keys
from polyhead.checks import flag, given, place
from polyhead.errors import ConfigError
from polyhead.nn.inputs import check_inputs, check_real
from polyhead.nn.projections import at_least_one
from polyhead.nn.visible_mean import visible_mean

__all__ = ["ContextBroadcast", "context_broadcast"]


def context_broadcast(
    x: Float[Tensor, "B L d"],
    *,
    scale: Float[Tensor, " d"] | None = None,
    padding: Bool[Tensor, "B L"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "B L d"]:
    """(x_i + mean_j x_j) / 2, or with a scale x_i + scale ⊙ mean_j x_j.

    Args:
        x: tokens.
        scale: λ, one number a channel.
        padding: True at real tokens; the others do not count, and what is made of them means nothing.
        causal: take the mean up to token i.
    """
    check_inputs("x", x, x.shape[-1] if isinstance(x, Tensor) and x.ndim else 1)
    flag("causal", causal)
    mask = causal_mask() if causal else None
    if padding is not None:
        check_real("x", padding, x)
        x = x.masked_fill(~padding[..., None], 0.0)
        mask = real_keys(padding) if mask is None else mask & real_keys(padding)
    mean = visible_mean(x[:, None], x.shape[1], mask)[:, 0]
    if scale is None:
        return (x + mean) / 2
    if not isinstance(scale, Tensor) or scale.ndim != 1 or scale.shape[0] not in (1, x.shape[-1]):
        raise ConfigError(f"scale must be a tensor ({x.shape[-1]},); got {given(scale)}")
    return x + scale.to(x.dtype) * mean


class ContextBroadcast(nn.Module):
    """`context_broadcast` as a layer: put it behind the MLP of a block, x + broadcast(mlp(norm(x))).

    Args:
        dim: width d for a learned λ, zeros at the start, so that the layer starts as the identity; None, the
            default: no parameters, and the mean of token and mean token.
        causal: take means of earlier tokens only.
        device, dtype: of λ.
    """

    def __init__(
        self, dim: int | None = None, *, causal: bool = False, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        flag("causal", causal)
        self.causal = causal
        device, dtype = place("ContextBroadcast", device, dtype)
        self.scale: nn.Parameter | None = None
        if dim is not None:
            at_least_one("ContextBroadcast", dim=dim)
            self.scale = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(
        self, x: Float[Tensor, "B L d"], padding: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L d"]:
        return context_broadcast(x, scale=self.scale, padding=padding, causal=self.causal)
