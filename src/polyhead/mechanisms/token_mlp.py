"""A gated MLP of every token where attention would stand: no token is told anything of another.

    y_t = (silu(x_t W_gate) ⊙ (x_t W_up)) W_down,   W_gate, W_up: (d, m),  W_down: (m, d)

The barest of the paper's probes of what attention needs: in a stack between layers of attention it says what
a layer is worth that mixes nothing.

Cost: 3·d·m parameters; m is 4·d/3, rounded, which is the 4·d² of multi-head attention. A cache holds nothing.
Masks are checked and hide nothing, since nothing is looked at; positions say nothing either. `heads` is taken
so that it can stand in for attention, and has no effect.

Paper 010: Deconstructing Attention, Investigating Design Principles for Effective Language Modeling, arXiv
2510.11602, its MLP.
"""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from polyhead.checks import flag
from polyhead.mechanisms.config import MechanismConfig
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.flow import Flow, Step
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.projections import FanInLinear, at_least_one
from polyhead.nn.tokenwise import TokenwiseModule

__all__ = ["TokenMlp", "TokenMlpModule"]


class TokenMlpModule(TokenwiseModule):
    """A gated MLP that is called as attention is.

    Args:
        dim: width d.
        inner: width m of the gate.
        bias: whether the three maps have a bias.
        device, dtype: of the parameters.
    """

    mechanism = "token_mlp"

    def __init__(self, dim: int, inner: int, *, bias: bool = False, device: Any = None, dtype: Any = None):
        super().__init__()
        kind = {"bias": bias, "device": device, "dtype": dtype}
        self.dim = dim
        self.gate = FanInLinear(dim, inner, **kind)
        self.up = FanInLinear(dim, inner, **kind)
        self.down = FanInLinear(inner, dim, **kind)

    def of_tokens(
        self, x: Float[Tensor, "B L d"], real: Bool[Tensor, "B L"] | None
    ) -> Float[Tensor, "B L d"]:
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def flops(self, tokens: int) -> int:
        return 6 * tokens * self.dim * self.gate.out_features


@register(
    "token_mlp",
    aliases=("mlp_mixer_free",),
    paper="010",
    title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
    family="ablation",
    summary="a gated MLP in place of attention: tokens are told nothing of each other",
    equation="y_t = (silu(x_t W_gate) ⊙ (x_t W_up)) W_down",
    supports=frozenset({"self", "causal_self"}),
    facets=Facets(positions="local", alignment="other", distribution="other"),
    picture=Flow(
        (Step("x", "(L, d)"),),
        (),
        (
            Step("gate, up", "d → m each"),
            Step("product", "silu(gate) ⊙ up"),
            Step("down", "m → d"),
            Step("y", "(L, d)"),
        ),
    ),
    promises=Promises(tokenwise=True),
)
class TokenMlp(MechanismConfig):
    """A gated MLP in place of attention.

    Attributes:
        inner: width m of the gate; default 4·dim / 3, rounded: as many parameters as multi-head attention.
        bias: whether the three maps have a bias.
    """

    _: KW_ONLY
    inner: int | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        at_least_one("TokenMlp", dim=self.dim, heads=self.heads)
        if self.inner is None:
            object.__setattr__(self, "inner", (4 * self.dim + 1) // 3)
        at_least_one("TokenMlp", inner=self.inner)
        flag("bias", self.bias)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> TokenMlpModule:
        """The module."""
        assert self.inner is not None
        return TokenMlpModule(self.dim, self.inner, bias=self.bias, device=device, dtype=dtype)
