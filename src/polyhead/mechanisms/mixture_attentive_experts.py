"""Mixture of attentive experts: an expert is all heads but one, and the inputs weigh the experts.

    f_i = H/(H-1) Σ_{j≠i} head_j W_Oj,   y = Σ_i g_i f_i = Σ_j c_j head_j W_Oj,   c_j = H (1 - g_j) / (H-1)
    g = softmax(W₂ tanh(W₁ x̄ + b₁) + b₂),   x̄ the mean of the tokens that a query sees

Uniform g is multi-head attention, and so is the start. All heads are computed: an expert lacks only one.

Trained in turns, `ph.nn.BlockCoordinates`: in four epochs of five the gates rest and every layer draws one
expert for a sequence by g; in the fifth only the gates learn, with the mixture.
Drawing by a uniform g, which is head dropout, is the same with gates that never learned.

Cost: n·(d + H + 1) + H parameters more than grouped-query attention, 2·n·(d + H) operations a token, and n
numbers a token in the cache, from which x̄ is taken under any mask: n = `hidden`. Sums suffice under a causal
mask or none; other masks take an attention with equal weights besides.

Paper 044: A Mixture of h-1 Heads is Better than h Heads, arXiv 2005.06537. Ours: under a causal mask x̄ is the
mean up to the token, in cross-attention that of the context; where heads have masks of their own, x̄ goes by
that of the first; n is 256; one draw a sequence also where g changes from token to token; the fifth epoch is
that of the gates, and before the first of these g is uniform. Experts that lack two heads are left out.
"""

from __future__ import annotations

from typing import Any

from polyhead.errors import ConfigError, unknown_name
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.attentive_experts import AttentiveExperts, MeanGate
from polyhead.nn.projections import at_least_one

__all__ = ["MixtureAttentiveExperts"]


@register(
    "mixture_attentive_experts",
    aliases=("mae",),
    paper="044",
    title="A Mixture of h-1 Heads is Better than h Heads",
    family="routing",
    summary="a mixture of experts that lack one head each, weighed by the inputs and trained in turns",
    equation=(
        "y = Σ_i g_i f_i,  f_i = H/(H-1) Σ_{j≠i} head_j W_Oj;  g = softmax(W₂ tanh(W₁ x̄ + b₁) + b₂), "
        "x̄ the mean of what is seen"
    ),
    promises=Promises(least_heads=2),
)
class MixtureAttentiveExperts(GroupedConfig):
    """Mixture of attentive experts; at least 2 heads.

    Attributes:
        hidden: n, inner width of the gate.
        inference: "soft", or "best": in evaluation only the expert of the greatest weight.
    """

    hidden: int = 256
    inference: str = "soft"

    def __post_init__(self) -> None:
        at_least_one("MixtureAttentiveExperts", dim=self.dim, heads=self.heads, hidden=self.hidden)
        if self.heads < 2:
            raise ConfigError(f"heads must be at least 2, since an expert is all but one; got {self.heads}")
        if self.inference not in ("soft", "best"):
            raise unknown_name("inference", self.inference, ("soft", "best"))
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> AttentiveExperts:
        """The module."""
        width = self.dim if self.context_dim is None else self.context_dim
        at_least_one("MixtureAttentiveExperts", context_dim=width)
        gate = MeanGate(width, self.heads, self.hidden, device=device, dtype=dtype)

        def module(*parts: Any, **options: Any) -> AttentiveExperts:
            return AttentiveExperts(*parts, gate=gate, inference=self.inference, **options)

        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )
