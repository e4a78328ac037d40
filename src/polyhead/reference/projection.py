"""Head by head linear maps that the twins of mechanisms share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["heads_of", "joined", "normed", "real"]


def real(x: Tensor, padding: Tensor | None) -> Tensor:
    """The inputs in float64, padded tokens set to zero."""
    x = x.double()
    return x if padding is None else torch.where(padding[..., None], x, torch.zeros((), dtype=x.dtype))


def heads_of(x: Tensor, parameters: Mapping[str, Tensor], name: str, heads: int) -> Tensor:
    """x W_hᵀ + b_h for every head h, `normed`, `(B, heads, L, width)`; head h owns the h-th rows of W."""
    weight = parameters[f"projection.{name}.weight"].double()
    bias = parameters.get(f"projection.{name}.bias", torch.zeros(len(weight))).double()
    found = []
    for w, b in zip(weight.chunk(heads), bias.chunk(heads), strict=True):
        found.append(normed(x @ w.T + b, parameters, name))
    return torch.stack(found, dim=1)


def normed(z: Tensor, parameters: Mapping[str, Tensor], name: str) -> Tensor:
    """z / √(mean(z²) + 1e-6) times a gain that the heads share, where the module normalises its `name`."""
    gain = parameters.get(f"projection.{name}_norm.weight")
    return z if gain is None else z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain.double()


def joined(heads: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """concat_h(head_h) W_Oᵀ + b, written as the sum of what every head contributes."""
    weight = parameters["output.weight"].double()
    width = heads.shape[-1]
    total = torch.zeros((), dtype=torch.float64)
    for h in range(heads.shape[1]):
        total = total + heads[:, h] @ weight[:, h * width : (h + 1) * width].T
    bias = parameters.get("output.bias")
    return total if bias is None else total + bias.double()
