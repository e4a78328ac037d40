"""A gated MLP of every token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import real
from polyhead.reference.registry import twin

__all__ = ["token_mlp"]


@twin("token_mlp")
def token_mlp(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    padding: Tensor | None = None,
) -> Tensor:
    """y_t = W_down (silu(W_gate x_t) ⊙ W_up x_t), token by token.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state.
        padding: bool; see `reference`.
    """

    def mapped(name: str, z: Tensor) -> Tensor:
        made = parameters[f"{name}.weight"].double() @ z
        return made + parameters[f"{name}.bias"].double() if f"{name}.bias" in parameters else made

    x = real(x, padding)
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            gate = mapped("gate", x[b, t])
            y[b, t] = mapped("down", gate / (1 + (-gate).exp()) * mapped("up", x[b, t]))
    return y
