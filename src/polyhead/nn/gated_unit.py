"""Gated linear units over single tokens, and the blocks made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polyhead.checks import place
from polyhead.errors import unknown_name
from polyhead.nn.layer_norm import LayerNorm
from polyhead.nn.projections import FanInLinear, at_least_one
from polyhead.nn.tokenwise import TokenwiseModule

__all__ = ["GATES", "FeedForward", "GatedBlock", "GatedUnit"]

GATES: dict[str, Callable[[Tensor], Tensor]] = {"geglu": F.gelu, "swiglu": F.silu, "reglu": F.relu}


class GatedUnit(TokenwiseModule):
    """y = W₃ (LN(act(W₁ x + b₁)) ⊙ LN(W₂ x + b₂)) + b₃, with one LN of width f for both.

    Args:
        dim: width d.
        width: inner width f.
        activation: "geglu", "swiglu" or "reglu".
        device, dtype: of the parameters.
    """

    mechanism = "activator_glu"

    def __init__(
        self, dim: int, width: int, *, activation: str = "geglu", device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        at_least_one("GatedUnit", dim=dim, width=width)
        if not isinstance(activation, str) or activation not in GATES:
            raise unknown_name("activation", activation, GATES)
        device, dtype = place("GatedUnit", device, dtype)
        kind = {"device": device, "dtype": dtype}
        self.dim, self.width, self.activation = dim, width, activation
        self.gate = FanInLinear(dim, width, bias=True, **kind)
        self.value = FanInLinear(dim, width, bias=True, **kind)
        self.norm = LayerNorm(width, **kind)
        self.merge = FanInLinear(width, dim, bias=True, **kind)

    def of_tokens(self, x: Float[Tensor, "B L d"], real: Tensor | None) -> Float[Tensor, "B L d"]:
        gate = self.norm(GATES[self.activation](self.gate(x)))  # B L f
        return self.merge(gate * self.norm(self.value(x)))

    def flops(self, tokens: int) -> int:
        return 2 * tokens * 3 * self.dim * self.width

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class FeedForward(nn.Module):
    """drop(W₂ drop(gelu(W₁ x + b₁)) + b₂), d → f → d."""

    def __init__(self, dim: int, width: int, *, dropout: float = 0.0, **kind: Any) -> None:
        super().__init__()
        self.up = FanInLinear(dim, width, bias=True, **kind)
        self.down = FanInLinear(width, dim, bias=True, **kind)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        inner = F.dropout(F.gelu(self.up(x)), self.dropout, self.training)
        return F.dropout(self.down(inner), self.dropout, self.training)

    def flops(self, tokens: int) -> int:
        """Operations for so many tokens."""
        return 4 * tokens * self.up.in_features * self.up.out_features


class GatedBlock(TokenwiseModule):
    """x ← x + unit(LN x);   x ← x + ffn(LN' x)   where there is an `ffn`.

    Args:
        unit: the gated unit.
        ffn: the feed-forward layer behind it; None: none.
        shared_norm: whether LN' is LN.
        device, dtype: of the norms.
    """

    mechanism = "activator_glu_block"

    def __init__(
        self,
        unit: GatedUnit,
        ffn: FeedForward | None = None,
        *,
        shared_norm: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.dim = unit.dim
        self.norm = LayerNorm(unit.dim, **kind)
        self.unit, self.ffn = unit, ffn
        self.ffn_norm = None if ffn is None or shared_norm else LayerNorm(unit.dim, **kind)

    def of_tokens(self, x: Float[Tensor, "B L d"], real: Tensor | None) -> Float[Tensor, "B L d"]:
        x = x + self.unit.of_tokens(self.norm(x), real)
        if self.ffn is None:
            return x
        norm = self.norm if self.ffn_norm is None else self.ffn_norm
        return x + self.ffn(norm(x))

    def flops(self, tokens: int) -> int:
        return self.unit.flops(tokens) + (0 if self.ffn is None else self.ffn.flops(tokens))
