"""Gated linear units of single tokens, and their blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import real
from polyhead.reference.registry import twin

__all__ = ["activator_glu", "activator_glu_block"]


def gelu(x: Tensor) -> Tensor:
    """x Φ(x)."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


GATES = {"geglu": gelu, "swiglu": lambda x: x * x.sigmoid(), "reglu": lambda x: x * (x > 0)}


def linear(x: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
    """x Wᵀ + b."""
    return x @ p[f"{name}.weight"].double().T + p[f"{name}.bias"].double()


def norm(x: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
    """(x - mean) / √(variance + 1e-5) · gain + shift."""
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * p[f"{name}.weight"].double() + p[f"{name}.bias"].double()


def unit(x: Tensor, p: Mapping[str, Tensor], owner: str, activation: str) -> Tensor:
    """W_m (norm(act(W_g x)) ⊙ norm(W_v x)), each map with its bias."""
    gate = norm(GATES[activation](linear(x, p, f"{owner}gate")), p, f"{owner}norm")
    return linear(gate * norm(linear(x, p, f"{owner}value"), p, f"{owner}norm"), p, f"{owner}merge")


@twin("activator_glu")
def activator_glu(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    activation: str = "geglu",
    padding: Tensor | None = None,
) -> Tensor:
    """W₃ (LN(act(W₁ x)) ⊙ LN(W₂ x))."""
    return unit(real(x, padding), parameters, "", activation)


@twin("activator_glu_block")
def activator_glu_block(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    activation: str = "geglu",
    padding: Tensor | None = None,
) -> Tensor:
    """x ← x + unit(LN x);   x ← x + W₅ gelu(W₄ LN' x), where there are W₄ and W₅; LN' may be LN."""
    p = parameters
    x = real(x, padding)
    x = x + unit(norm(x, p, "norm"), p, "unit.", activation)
    if "ffn.up.weight" not in p:
        return x
    inner = gelu(linear(norm(x, p, "ffn_norm" if "ffn_norm.weight" in p else "norm"), p, "ffn.up"))
    return x + linear(inner, p, "ffn.down")
